"""Regions 1 and 2 of a step of KFAC, statistics into averages and averages into inverses. Region 3 is in `apply`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from triton_curv.blocks import Block, FactorStore
from triton_curv.blocks.bank import FactorKey, Normalisation
from triton_curv.optimizers.exchange import Exchange


def fold_(
    store: FactorStore,
    moving: Sequence[Block],
    how: Normalisation,
    due: Tensor | None,
    exchange: Exchange,
) -> None:
    """Fold pending statistics into the moving averages, those of `moving` blocks' second moments included."""
    if moving:
        scale, weight = store.pending(how)
        for block in moving:
            assert block.moments is not None
            rows = store.rows(block.keys["G"])
            block.moments.fold_(torch.where(weight[rows] > 0, scale[rows], 0.0), how.decay)
            block.renew_gains_()
    exchange.fold_(store, how, due)


def refresh_(
    store: FactorStore,
    turned: Sequence[Block],
    keys: Sequence[FactorKey] | None,
    dampings: tuple[Tensor, Tensor] | None,
    exchange: Exchange,
) -> None:
    """Renew damped inverses or eigenbases, all or those of some factors, and the gains of `turned` blocks.

    `dampings`, absolute and relative, per block, split lambda anew between the factors; None leaves it as it is.
    """
    if dampings is not None:
        store.set_shifts_(*dampings)
    exchange.invert_(store, keys)
    owners = {key.block for key in (store.keys if keys is None else keys)}
    for block in turned:
        if block.moments is not None and block.index in owners:
            block.moments.restart_()
        if dampings is not None or block.index in owners:
            block.renew_gains_()
