"""Tables in device memory through which one launch reaches all tensors of several lists.

A `PointerTable` describes L lists of N tensors, pairwise of equal shapes, in int64 words:

    records (R, 8 + 5 L)  one for each tensor that is not empty (more for those with over three merged dimensions):
                          numel, aligned, inner size, middle size, first block and number of blocks of the tensor,
                          two words of the op's own; L addresses; L times the strides (outer, middle, inner) in
                          elements; L dtype codes
    blocks (B,)           record << 32 | place within the record, for each program of BLOCK elements

Elements are counted in the memory order of the first list's tensor. A record is `aligned` if all its tensors are
dense in that order and begin at multiples of 16 bytes: whole blocks of it are read and written as 16-byte vectors.

Tables are made on the host and copied once, from pinned memory and without waiting. The last CACHE_SIZE of them are
kept, keyed by addresses, shapes, strides, dtypes, device and stream. While a CUDA graph is captured, a table that its
stream knows is taken as it is and never freed; of a new one the copy is a node of the graph, whose source is never
freed (the table itself lives in the graph's pool).

A trace (torch.compile) has no addresses: there the launchers fall back to one launch a tensor, inlined in the graph.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, repeat
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_curv_kernels.backend import NO_DEVICE, DeviceLimits, UnsupportedInputError
from triton_curv_kernels.choice import ListProblem

CACHE_SIZE = 64
HEADER = 8
LONGEST_AXIS = 1 << 30  # within a block, indices are 32-bit integers
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Axis(NamedTuple):
    """A dimension that several tensors share: its size and its stride in each of them."""

    size: int
    strides: tuple[int, ...]


def merged_axes(*tensors: Tensor) -> list[Axis]:
    """The fewest dimensions that describe tensors of one shape, in the first one's memory order and none of size 1."""
    return _merge(tensors[0].shape, tuple(t.stride() for t in tensors))


def _merge(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> list[Axis]:
    axes = map(Axis, shape, zip(*strides, strict=True))
    merged: list[Axis] = []
    for axis in sorted((a for a in axes if a.size != 1), key=lambda a: a.strides[0], reverse=True):
        if merged and all(o == i * axis.size for o, i in zip(merged[-1].strides, axis.strides, strict=True)):
            axis = Axis(merged.pop().size * axis.size, axis.strides)
        merged.append(axis)
    return merged


@dataclass(frozen=True)
class Piece:
    """Elements that three dimensions describe: where they begin in each tensor (in elements), and the dimensions."""

    starts: tuple[int, ...]
    outer: Axis
    middle: Axis
    inner: Axis

    @cached_property
    def numel(self) -> int:
        """How many elements."""
        return self.outer.size * self.middle.size * self.inner.size

    @cached_property
    def dense(self) -> bool:
        """Whether the elements lie next to each other in each tensor."""
        return self.numel == self.inner.size and (self.inner.size == 1 or set(self.inner.strides) == {1})

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """For each tensor, those of the outer, the middle and the inner dimension."""
        return tuple(chain(*zip(self.outer.strides, self.middle.strides, self.inner.strides, strict=True)))


@lru_cache(maxsize=4096)
def _pieces_of(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> tuple[Piece, ...]:
    return tuple(pieces(_merge(shape, strides), len(strides)))


def pieces(axes: Sequence[Axis], lists: int) -> Iterator[Piece]:
    """The fewest pieces with three dimensions of at most LONGEST_AXIS that make up `axes`.

    One for the weights of linear and conv layers, whatever the memory order of their gradients and momenta.
    """
    one = Axis(1, (0,) * lists)

    def split(axes: Sequence[Axis], starts: tuple[int, ...]) -> Iterator[Piece]:
        long = next((place for place, axis in enumerate(axes) if axis.size > LONGEST_AXIS), None)
        if long is None and len(axes) <= 3:
            yield Piece(starts, *([one] * (3 - len(axes)) + list(axes)))
            return
        place, step = (0, 1) if long is None else (long, LONGEST_AXIS)
        size, strides = axes[place]
        for first in range(0, size, step):
            moved = tuple(start + first * stride for start, stride in zip(starts, strides, strict=True))
            part = [] if step == 1 else [Axis(min(step, size - first), strides)]
            yield from split([*axes[:place], *part, *axes[place + 1 :]], moved)

    yield from split(axes, (0,) * lists)


@dataclass(frozen=True)
class ListConfig:
    """A program handles BLOCK elements of one tensor, in memory order."""

    BLOCK: int = 2048
    num_warps: int = 4

    def to_ints(self) -> list[int]:
        """The form in which a configuration goes through an op's schema."""
        return [self.BLOCK, self.num_warps]

    @classmethod
    def from_ints(cls, values: Sequence[int]) -> "ListConfig":
        """Inverse of `to_ints`."""
        return cls(*values)


CONFIGS: list[ListConfig] = [ListConfig(block, warps) for block in (512, 1024, 2048, 4096, 8192) for warps in (2, 4, 8)]


def prune(configs: Sequence[ListConfig], numel: int, limits: DeviceLimits = NO_DEVICE) -> list[ListConfig]:
    """Configs worth measuring for `numel` elements in all: 4 to 16 elements a thread, no block over twice the data."""
    lanes = 64 if limits.platform == "hip" else 32
    most = max(CONFIGS[0].BLOCK, 2 * numel)
    return [c for c in configs if most >= c.BLOCK and 4 <= c.BLOCK // (lanes * c.num_warps) <= 16]


def default_config(numel: int, limits: DeviceLimits = NO_DEVICE) -> ListConfig:
    """Analytic choice: 8 elements a thread, two 16-byte loads of fp32; longer blocks where each SM still has some.

    Eight programs on each multiprocessor hide the latency of the table; longer blocks read it less often.
    """
    lanes = 64 if limits.platform == "hip" else 32
    longest = numel // (8 * limits.multiprocessors)
    warps = 8 if longest >= 64 * lanes else 4 if longest >= 32 * lanes else 2
    return ListConfig(8 * lanes * warps, warps)


def default_for(problem: ListProblem) -> ListConfig:
    """`default_config` of a problem as `choose` describes it."""
    return default_config(problem.numel, problem.limits)


@dataclass(frozen=True)
class PointerTable:
    """See the module. `dtypes` holds, for each list, the dtype that its tensors share, or None if there are several."""

    records: Tensor
    blocks: Tensor
    dtypes: tuple[torch.dtype | None, ...]

    @property
    def programs(self) -> int:
        """How many programs a launch over the table has."""
        return self.blocks.numel()


_cache: OrderedDict[tuple[Any, ...], PointerTable] = OrderedDict()
_lock = Lock()
_of_graphs: list[Tensor | PointerTable] = []  # kept as long as the process lives


def pointer_table(
    lists: Sequence[Sequence[Tensor]],
    block: int,
    check: Callable[[], None],
    words: Sequence[Sequence[int]] | None = None,
) -> PointerTable:
    """The table of `lists`, whose tensors are not traced ones, for programs of `block` elements.

    Args:
        lists: as many tensors each.
        block: elements a program handles.
        check: called before a new table is made, to raise if the op does not take these shapes and dtypes.
        words: for each place in the lists two integers of the op's own, part of the key.

    Raises:
        UnsupportedInputError: tensors on several devices, or a dtype without a code.

    """
    device = lists[0][0].device if lists and lists[0] else torch.device("cpu")
    on_cuda = _is_cuda(device)
    tensors = [(t.data_ptr(), t.dtype, t.device, t.shape, t.stride()) for t in chain(*lists)]
    capturing = on_cuda and torch.cuda.is_current_stream_capturing()
    stream = torch.cuda.current_stream(device).cuda_stream if on_cuda else 0
    key = (len(lists), block, stream, *tensors, *chain(*(words or ())))
    with _lock:
        if (table := _cache.get(key)) is not None:
            _cache.move_to_end(key)
            if capturing:
                _of_graphs.append(table)
            return table
    check()
    table = _build(lists, block, words, device, capturing)
    if capturing:
        return table
    with _lock:
        _cache[key] = table
        while len(_cache) > CACHE_SIZE:
            _cache.popitem(last=False)
    return table


def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def _build(
    lists: Sequence[Sequence[Tensor]],
    block: int,
    words: Sequence[Sequence[int]] | None,
    device: torch.device,
    capturing: bool = False,
) -> PointerTable:
    records: list[list[int]] = []
    counts: list[int] = []
    first_block = 0
    for place, (tensors, own) in enumerate(zip(zip(*lists, strict=True), words or repeat((0, 0)), strict=False)):
        _check(place, tensors, device)
        if tensors[0].numel() > 0:
            parts = _pieces_of(tensors[0].shape, tuple(t.stride() for t in tensors))
            blocks = [-(-part.numel // block) for part in parts]
            whole = [first_block, sum(blocks), *own]
            first_block += sum(blocks)
            records += [_record(tensors, part, whole) for part in parts]
            counts += blocks
    width = HEADER + 5 * len(lists)
    size = len(records) * width + len(records) * width % 2  # both parts begin at multiples of 16 bytes
    total = first_block
    host = torch.empty(size + total, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    if records:
        host[: len(records) * width] = torch.tensor(records, device="cpu").view(-1)
        repeats = torch.tensor(counts, device="cpu")
        before = torch.arange(len(counts), device="cpu").bitwise_left_shift(32) - (repeats.cumsum(0) - repeats)
        torch.add(
            before.repeat_interleave(repeats, output_size=total), torch.arange(total, device="cpu"), out=host[size:]
        )
    if capturing:
        _of_graphs.append(host)
    there = host.to(device, non_blocking=True)
    return PointerTable(
        there[: len(records) * width].view(-1, width), there[size:], tuple(_common_dtype(tensors) for tensors in lists)
    )


def _record(tensors: Sequence[Tensor], piece: Piece, whole: Sequence[int]) -> list[int]:
    addresses = [t.data_ptr() + start * t.itemsize for t, start in zip(tensors, piece.starts, strict=True)]
    aligned = piece.dense and all(address % 16 == 0 for address in addresses)
    codes = [CODES[t.dtype] for t in tensors]
    return [piece.numel, aligned, piece.inner.size, piece.middle.size, *whole, *addresses, *piece.strides, *codes]


def _common_dtype(tensors: Iterable[Tensor]) -> torch.dtype | None:
    dtypes = {t.dtype for t in tensors if t.numel() > 0}
    return dtypes.pop() if len(dtypes) == 1 else None


def _check(place: int, tensors: Sequence[Tensor], device: torch.device) -> None:
    if any(t.device != device for t in tensors):
        raise UnsupportedInputError(
            f"expected all tensors on one device, got {device} and, at place {place}, "
            f"{', '.join(str(t.device) for t in tensors)}"
        )
    if any(t.dtype not in CODES for t in tensors):
        raise UnsupportedInputError(
            f"expected {', '.join(map(str, CODES))}, got at place {place} {', '.join(str(t.dtype) for t in tensors)}"
        )


def check_shapes(*lists: Sequence[Tensor]) -> None:
    """Raise UnsupportedInputError unless tensors at the same place of the lists have the same shape."""
    shapes = [[t.shape for t in tensors] for tensors in lists]
    if all(of_list == shapes[0] for of_list in shapes):
        return
    for place, tensors in enumerate(zip(*lists, strict=True)):
        if any(t.shape != tensors[0].shape for t in tensors):
            raise UnsupportedInputError(
                f"expected tensors of one shape at place {place}, got {', '.join(str(tuple(t.shape)) for t in tensors)}"
            )


def dense_views(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Views of the tensors in the first one's memory order, and dense versions of them: themselves or copies.

    For launches without a table, in traces: there a compiler sees the copies.
    """
    order = sorted(range(tensors[0].dim()), key=tensors[0].stride, reverse=True)
    views = [t.permute(order) for t in tensors]
    return views, [t.contiguous() for t in views]
