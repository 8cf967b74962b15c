"""Shuffled batches whose position can be saved and restored exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_curv.training.errors import SettingError


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """``rows // batch_size``: the rest of an epoch that fills no batch is dropped.

    Raises:
        SettingError: Where ``batch_size`` is not between 1 and ``rows``.

    """
    if not 1 <= batch_size <= rows:
        raise SettingError(f"expected a batch size from 1 to {rows} (the training rows), got {batch_size}")
    return rows // batch_size


class BatchOrder:
    """Row numbers of one batch after another, as ``DataLoader(shuffle=True, drop_last=True)`` draws them.

    Args:
        rows: Rows of the training set.
        batch_size: Rows of a batch.
        seed: Seed of the shuffle, which has its own generator.

    Raises:
        SettingError: Where ``batch_size`` is not between 1 and ``rows``.

    """

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        self.steps_per_epoch = steps_per_epoch(rows, batch_size)
        self.rows = rows
        self.batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.randperm(rows, generator=self._generator)
        self._batch = 0

    def draw(self) -> Tensor:
        """(batch_size,) int64 row numbers of the next batch; a new epoch is shuffled anew."""
        if self._batch == self.steps_per_epoch:
            self._order = torch.randperm(self.rows, generator=self._generator)
            self._batch = 0
        first = self._batch * self.batch_size
        self._batch += 1
        return self._order[first : first + self.batch_size]

    def state_dict(self) -> dict[str, Any]:
        """The current epoch's order, the position in it, and the generator that shuffles the next."""
        return {"order": self._order, "batch": self._batch, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken.

        Raises:
            SettingError: Where the state is of another number of rows.

        """
        if len(state["order"]) != self.rows:
            raise SettingError(f"expected an order of {self.rows} rows, got {len(state['order'])}")
        self._order, self._batch = state["order"], state["batch"]
        self._generator.set_state(state["generator"])
