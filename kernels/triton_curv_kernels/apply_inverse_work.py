"""Work lists of `apply_damped_inverse`: where each layer's matrices lie, and which program does which tile."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from threading import Lock
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Table: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

KEPT = 16  # lists of tensors whose tables stay on the device

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


_cache: OrderedDict[tuple[object, ...], ApplyWork] = OrderedDict()
_lock = Lock()


def work_of(
    updates: Sequence[Tensor],
    grads: Sequence[Tensor],
    inverse_A: Sequence[Tensor],
    inverse_G: Sequence[Tensor],
    block: int,
) -> ApplyWork:
    """Tables for tensors that have addresses; kept until KEPT other lists have come.

    Call it once before a CUDA graph is captured: a table made during capture would belong to the graph.
    """
    lists = (grads, inverse_A, inverse_G, updates)
    key = (block, *((t.data_ptr(), t.shape, t.stride(), t.device) for tensors in lists for t in tensors))
    with _lock:
        if (work := _cache.get(key)) is not None:
            _cache.move_to_end(key)
            return work
    strides = [[(t.data_ptr(), *_steps(t)) for t in tensors] for tensors in lists]
    work = _make(lists, strides, grads[0].itemsize, 16, block)
    with _lock:
        _cache[key] = work
        if len(_cache) > KEPT:
            _cache.popitem(last=False)
    return work


def flat_work_of(
    updates: Sequence[Tensor],
    grads: Sequence[Tensor],
    inverse_A: Sequence[Tensor],
    inverse_G: Sequence[Tensor],
    block: int,
) -> ApplyWork:
    """Tables for tensors of a trace, which have no addresses: they lie in four buffers, one after another."""
    lists = (grads, inverse_A, inverse_G, updates)
    places = []
    for tensors in lists:
        starts = accumulate((t.numel() for t in tensors), initial=0)
        shapes = ((*t.shape, 1, 1)[: max(2, t.dim())] for t in tensors)
        places.append([(start, shape[-2] * shape[-1], shape[-1]) for start, shape in zip(starts, shapes, strict=False)])
    return _make(lists, places, 1, 16 // grads[0].itemsize, block)


def _steps(tensor: Tensor) -> tuple[int, int]:
    """Strides of the batch and of the rows, in elements."""
    if tensor.dim() < 2:
        return 0, 0
    return (tensor.stride(0) if tensor.dim() == 3 else 0), tensor.stride(-2)


def _make(
    lists: Sequence[Sequence[Tensor]],
    places: Sequence[Sequence[tuple[int, int, int]]],
    unit: int,
    alignment: int,
    block: int,
) -> ApplyWork:
    """Tables from start and strides of each tensor; an element adds `unit` to a start."""
    vector = 16 // lists[0][0].itemsize
    matrices: list[list[int]] = []
    first: list[Table] = []
    second: list[Table] = []
    sums, layers, workspace = 0, [0], 0
    for grad, of_a, *where in zip(*lists[:2], *places, strict=True):
        r, c = grad.shape[-2:]
        batch = grad.shape[0] if grad.dim() == 3 else 1
        single = of_a.numel() == 0
        kind = PAIR if not single else SMALL if max(r, c) <= SMALL_SIZE else SINGLE
        used = [place for index, place in enumerate(where) if not (single and index == 1)]
        for b in range(0 if grad.numel() == 0 else 1 if kind == SMALL else batch):
            at = [start + b * step * unit for start, step, _ in where]
            aligned = all((start + b * step * unit) % alignment == 0 == row % vector for start, step, row in used)
            aligned = aligned and r % vector == 0 == c % vector
            rows = [row for _, _, row in where]
            steps = [where[index][1] for index in (0, 2, 3)]
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
        layers.append(sums)
    device = lists[0][0].device

    def on_device(table: npt.ArrayLike) -> Tensor:
        values = np.asarray(table, dtype=np.int64)
        return torch.tensor(values.tolist(), dtype=torch.int64, device=device).view(values.shape)

    layer_of = np.repeat(np.arange(len(layers) - 1), np.diff(layers))
    tables: tuple[npt.ArrayLike, ...] = (matrices, _longest_first(first), _longest_first(second), layers, layer_of)
    on_matrices, on_first, on_second, on_layers, on_layer_of = map(on_device, tables)
    return ApplyWork(on_matrices, on_first, on_second, on_layers, on_layer_of, workspace)


def _programs(cost: int, m: int, i: Table, j: Table, slot: int) -> Table:
    """Rows (cost, m, i, j, slot), with sums from place `slot` on."""
    columns = (np.full_like(i, cost), np.full_like(i, m), i, j, slot + np.arange(len(i)))
    return np.stack(columns, axis=1)


def _longest_first(programs: list[Table]) -> Table:
    """All programs by falling cost, which is dropped."""
    table = np.concatenate([np.empty((0, 5), dtype=np.int64), *programs])
    return table[np.argsort(-table[:, 0], kind="stable"), 1:]
