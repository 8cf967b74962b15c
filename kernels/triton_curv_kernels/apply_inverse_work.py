"""Work lists of `apply_damped_inverse`: where each layer's matrices lie, and which program does which tile."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from triton_curv_kernels.device_cache import DeviceCache, Table

KEPT = 16  # lists of tensors whose tables stay on the device

_kept = DeviceCache(KEPT)

PAIR = 0  # P = G^-1 D A^-1
SINGLE = 1  # P = F^-1 D
SMALL = 2  # the same, of at most SMALL_SIZE rows and columns: many to a program
SMALL_SIZE = 4
SMALL_BLOCK = 256  # matrices that a program of the small ones handles


class ApplyWork(NamedTuple):
    """Tables on the device and what the host must know of them.

    `matrices` (matrices, 16), one for each matrix of a batch (one for a whole batch of small ones): where D, A^-1,
    G^-1, P and T lie, rows, columns, strides of the rows of D, A^-1, G^-1 and P, whether all rows begin at multiples of
    16 bytes, the kind, and strides of the batches of D, G^-1 and P. The first four are addresses, or (`flat`) elements
    of a buffer for each list. `first`, `second` (programs, 4): matrix, first row and column of the tile that each
    program of the two launches computes, longest first, and the place of its sums; for small matrices the first one and
    how many. `layers` (layers + 1,): where each layer's sums begin; `layer_of` (sums,): the layer of each sum.
    """

    matrices: Tensor
    first: Tensor
    second: Tensor
    layers: Tensor
    layer_of: Tensor
    workspace: int


class Place(NamedTuple):
    """Where a tensor lies: an address or an element of a buffer; strides of its batch and of its rows, in elements."""

    start: int
    step: int
    row: int


class Layer(NamedTuple):
    """Shape of the gradient, whether there is a single factor, and where D, A^-1, G^-1 and P lie."""

    shape: tuple[int, ...]
    single: bool
    places: tuple[Place, ...]


class ApplyPlan(NamedTuple):
    """The tables of an `ApplyWork` on the host."""

    tables: tuple[Table, ...]
    workspace: int


def work_of(
    updates: Sequence[Tensor],
    grads: Sequence[Tensor],
    inverse_A: Sequence[Tensor],
    inverse_G: Sequence[Tensor],
    block: int,
) -> ApplyWork:
    """Tables for tensors that have addresses; kept until KEPT other lists have come."""
    lists = (grads, inverse_A, inverse_G, updates)
    layers = tuple(
        Layer(tuple(tensors[0].shape), tensors[1].numel() == 0, tuple(map(_place_of, tensors)))
        for tensors in zip(*lists, strict=True)
    )
    key = (layers, grads[0].itemsize, block)
    plan = _plan_of_addresses(*key)
    matrices, first, second, sums_of, layer_of = _kept.get(key, grads[0].device, lambda: plan.tables)
    return ApplyWork(matrices, first, second, sums_of, layer_of, plan.workspace)


@lru_cache(maxsize=KEPT)
def _plan_of_addresses(layers: tuple[Layer, ...], itemsize: int, block: int) -> ApplyPlan:
    return plan_apply(layers, 16 // itemsize, itemsize, 16, block)


def flat_work_of(
    updates: Sequence[Tensor],
    grads: Sequence[Tensor],
    inverse_A: Sequence[Tensor],
    inverse_G: Sequence[Tensor],
    block: int,
) -> ApplyWork:
    """Tables for tensors of a trace, which have no addresses: they lie in four buffers, one after another."""
    places = []
    for tensors in (grads, inverse_A, inverse_G, updates):
        starts = accumulate((t.numel() for t in tensors), initial=0)
        shapes = ((*t.shape, 1, 1)[: max(2, t.dim())] for t in tensors)
        places.append([Place(at, shape[-2] * shape[-1], shape[-1]) for at, shape in zip(starts, shapes, strict=False)])
    layers = [
        Layer(tuple(grad.shape), of_a.numel() == 0, tuple(where))
        for grad, of_a, *where in zip(grads, inverse_A, *places, strict=True)
    ]
    vector, device = 16 // grads[0].itemsize, grads[0].device
    plan = plan_apply(layers, vector, 1, vector, block)

    def on_device(table: Table) -> Tensor:
        """Made from lists: a trace on fake tensors can't copy arrays to a GPU."""
        return torch.tensor(table.tolist(), dtype=torch.int64, device=device).view(table.shape)

    matrices, first, second, sums_of, layer_of = map(on_device, plan.tables)
    return ApplyWork(matrices, first, second, sums_of, layer_of, plan.workspace)


def _place_of(tensor: Tensor) -> Place:
    step = tensor.stride(0) if tensor.dim() == 3 else 0
    return Place(tensor.data_ptr(), step, tensor.stride(-2) if tensor.dim() > 1 else 0)


def plan_apply(layers: Sequence[Layer], vector: int, unit: int, alignment: int, block: int) -> ApplyPlan:
    """Tables from places: `vector` elements are 16 bytes; an element adds `unit` to a start, 16 bytes `alignment`."""
    matrices: list[list[int]] = []
    first: list[Table] = []
    second: list[Table] = []
    sums, starts, workspace = 0, [0], 0
    for shape, single, where in layers:
        r, c = shape[-2:]
        batch = shape[0] if len(shape) == 3 else 1
        kind = PAIR if not single else SMALL if max(r, c) <= SMALL_SIZE else SINGLE
        used = [place for index, place in enumerate(where) if not (single and index == 1)]
        for b in range(0 if batch * r * c == 0 else 1 if kind == SMALL else batch):
            at = [start + b * step * unit for start, step, _ in where]
            aligned = all((start + b * step * unit) % alignment == 0 == row % vector for start, step, row in used)
            aligned = aligned and r % vector == 0 == c % vector
            rows = [row for _, _, row in where]
            steps = [where[index].step for index in (0, 2, 3)]
            m = len(matrices)
            matrices.append([*at, workspace, r, c, *rows, aligned, kind, *steps])
            if kind == SMALL:
                begin = np.arange(0, batch, SMALL_BLOCK)
                first.append(_programs(r * r * c, m, begin, np.minimum(batch - begin, SMALL_BLOCK), sums))
                sums += len(begin)
            else:
                i, j = (x.ravel() for x in np.meshgrid(np.arange(0, r, block), np.arange(0, c, block), indexing="ij"))
                first.append(_programs(1 if single else c, m, j, i, 0))
                second.append(_programs(r, m, i, j, sums))
                sums += len(i)
                workspace += -(-r * c // 16) * 16
        starts.append(sums)
    tables = (
        np.array(matrices, dtype=np.int64).reshape(-1, 16),
        _longest_first(first),
        _longest_first(second),
        np.array(starts, dtype=np.int64),
        np.repeat(np.arange(len(starts) - 1, dtype=np.int64), np.diff(starts)),
    )
    return ApplyPlan(tables, workspace)


def _programs(cost: int, m: int, i: Table, j: Table, slot: int) -> Table:
    """Rows (cost, m, i, j, slot), with sums from place `slot` on."""
    columns = (np.full_like(i, cost), np.full_like(i, m), i, j, slot + np.arange(len(i)))
    return np.stack(columns, axis=1)


def _longest_first(programs: list[Table]) -> Table:
    """All programs by falling cost, which is dropped."""
    table = np.concatenate([np.empty((0, 5), dtype=np.int64), *programs])
    return table[np.argsort(-table[:, 0], kind="stable"), 1:]
