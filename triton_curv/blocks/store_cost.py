"""What folding and inverting the factors of a store costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from triton_curv.costs import NOTHING, Cost, inverse_cost

if TYPE_CHECKING:
    from triton_curv.blocks.bank import FactorKey, FactorStore


def fold_cost(store: FactorStore) -> Cost:
    """Of one fold: sums read, averages read and written, a multiply-add a number."""
    sums, averages = (sum(getattr(bank, name).numel() for bank in store.banks) for name in ("sums", "averages"))
    return Cost(2 * averages, (sums + 2 * averages) * store.samples.element_size())


def inversion_cost(store: FactorStore, keys: Sequence[FactorKey] | None = None) -> Cost:
    """Of inverting, by Cholesky, factors that this rank owns: all of them, or those of some keys."""
    costs = []
    for key in store.keys if keys is None else keys:
        if store.owns(key):
            batch, size, _ = store.view("sums", key).shape
            costs.append(inverse_cost(size, batch, store.samples.element_size()))
    return sum(costs, NOTHING)
