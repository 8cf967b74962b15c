"""Fixed splits and standardisation shared by the tabular scenarios."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from triton_curv.scenarios.scenario import Data

Table = NDArray[np.float64]


def standardise(train: Table, val: Table) -> tuple[Table, Table]:
    """``(x - mean) / std`` by the training rows' statistics; a constant column is only centred."""
    mean, std = train.mean(axis=0), train.std(axis=0)
    std = np.where(std > 0, std, 1.0)
    return (train - mean) / std, (val - mean) / std


def regression_data(numeric: Table, indicators: Table, target: Table, train_rows: int) -> Data:
    """Data of a regression table: a fixed shuffle (seed 0), the first ``train_rows`` rows to train on.

    Args:
        numeric: (rows, features) columns to standardise.
        indicators: (rows, categories) 0/1 columns, kept as they are; may have no columns.
        target: (rows,) in original units, standardised by the training rows.
        train_rows: Number of training rows; the others validate.

    """
    order = np.random.default_rng(0).permutation(len(target))
    train, val = order[:train_rows], order[train_rows:]
    train_x, val_x = standardise(numeric[train], numeric[val])
    train_y, val_y = standardise(target[train, None], target[val, None])

    def tensor(array: Table) -> torch.Tensor:
        return torch.tensor(array, dtype=torch.float32)

    return Data(
        tensor(np.hstack([train_x, indicators[train]])),
        tensor(train_y),
        tensor(np.hstack([val_x, indicators[val]])),
        tensor(val_y),
        target_scale=float(target[train].std()),
    )
