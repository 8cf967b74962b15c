"""The end of a step on a CPU: `step_size.py` and `move_` with what is one number a block as Python's.

A call on a vector of three numbers takes 3 to 6 us there, between the passes of a network, and a step has forty.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from triton_curv.costs import update_cost
from triton_curv.hostcheck import on_host
from triton_curv.nvtx import stage
from triton_curv.optimizers.hyper_slots import OF_UPDATE, SLOT
from triton_curv.optimizers.kfac_options import KFACOptions
from triton_curv.optimizers.matrices import Lists
from triton_curv_kernels.backend import use_reference
from triton_curv_kernels.momentum_host import momentum_update_on_host_, runs_on_host


class HostMove(NamedTuple):
    """A parameter group, and its hyper-parameters, `corrected_numbers`."""

    lists: Lists
    hyper: list[float]


def moves_on_host(every: Sequence[Lists], steps: Tensor, options: KFACOptions) -> bool:
    """Whether all groups can be moved by `moves_on_host_`: sizes that are matched, blocks that lie here, on a CPU."""
    if not options.averages or not on_host(steps) or not use_reference(steps):
        return False
    return all(each.host_sizes and runs_on_host(each.params, each.momenta, each.updates) for each in every)


def all_finite(norms: Sequence[Sequence[float]], others: Sequence[Tensor]) -> Tensor:
    """Whether all are, (): the norms of blocks, and vectors of further ones."""
    total = sum(map(sum, norms)) + sum(float(norm.sum()) for norm in others)
    return torch.tensor(math.isfinite(total))


def moves_on_host_(
    moves: Sequence[HostMove],
    norms: Sequence[Sequence[float]],
    momentum_norms: Sequence[Sequence[float]] | None,
    options: KFACOptions,
) -> None:
    """`scales`, `agreement` (with `momentum_norms`) and `move_` of all groups, given the norms of their updates."""
    matched = options.update_size == "matched"
    targets = [[root * fan if matched else root for root, fan in move.lists.host_sizes] for move in moves]
    agreed = 1.0
    if momentum_norms is not None:
        agreed = _agreement(moves, targets, momentum_norms)
    for move, wanted, found in zip(moves, targets, norms, strict=True):
        _move_(move, wanted, found, agreed)


def _agreement(
    moves: Sequence[HostMove], targets: Sequence[Sequence[float]], momentum_norms: Sequence[Sequence[float]]
) -> float:
    total, count = 0.0, 0
    for move, wanted, found in zip(moves, targets, momentum_norms, strict=True):
        settled = move.hyper[SLOT["settled"]]
        if settled == 0.0:  # before the first step
            return 1.0
        total += sum(norm / (target * settled) for target, norm in zip(wanted, found, strict=True))
        count += len(wanted)
    return min(total / count, 1.0) if total > 0 else 1.0


@stage("update", payload=lambda move, targets, norms, agreed: update_cost(move.lists.flat_updates.numel()))
def _move_(move: HostMove, targets: Sequence[float], norms: Sequence[float], agreed: float) -> None:
    lists, hyper = move
    length = hyper[SLOT["sign"]] * hyper[SLOT["average"]]
    least = torch.finfo(lists.idle.dtype).tiny ** 0.5
    sizes = zip(targets, norms, lists.host_sizes, strict=True)
    of_row = [target * length / max(norm, root * least) for target, norm, (root, _) in sizes]
    lr, momentum, weight_decay, *weights = hyper[:OF_UPDATE]
    of_param = [of_row[row] for row in lists.row_of_param]
    numbers = (lr * agreed, momentum, weight_decay / agreed, *weights)
    momentum_update_on_host_(lists.params, lists.momenta, lists.updates, of_param, numbers)
