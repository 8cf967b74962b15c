"""Pointer tables: what they hold, when they are made anew, and what the kernels read through them."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.support.offline import MACHINES, Arch, dry_launches, report
from triton_curv_kernels import pointer_table as file
from triton_curv_kernels.backend import DeviceLimits, UnsupportedInputError
from triton_curv_kernels.momentum import launch_momentum_update_
from triton_curv_kernels.neumann import launch_neumann_update_
from triton_curv_kernels.pointer_table import (
    CONFIGS,
    HEADER,
    Axis,
    ListConfig,
    PointerTable,
    default_config,
    merged_axes,
    pieces,
    pointer_table,
    prune,
)
from triton_curv_kernels.pointer_table_device import find_block, launch_finish


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    file._cache.clear()
    yield
    file._cache.clear()


def no_check() -> None:
    pass


def elements(table: PointerTable, lists: int) -> list[list[int]]:
    """The address of every element in each list, as a program would find it, in order."""
    found: list[list[int]] = [[] for _ in range(lists)]
    for record in table.records.tolist():
        numel, _, inner, middle = record[:4]
        for which in range(lists):
            outer_stride, middle_stride, inner_stride = record[HEADER + lists + 3 * which :][:3]
            size = {0: 4, 1: 2, 2: 2}[record[HEADER + 4 * lists + which]]
            for e in range(numel):
                row, i = divmod(e, inner)
                o, m = divmod(row, middle)
                at = o * outer_stride + m * middle_stride + i * inner_stride
                found[which].append(record[HEADER + which] + at * size)
    return found


def addresses(t: Tensor) -> list[int]:
    return [
        t.data_ptr() + t.itemsize * sum(i * s for i, s in zip(index, t.stride(), strict=True))
        for index in itertools.product(*map(range, t.shape))
    ]


LAYOUTS = {
    "contiguous": lambda: torch.empty(3, 4, 2, 2),
    "channels last": lambda: torch.empty(3, 4, 2, 2).contiguous(memory_format=torch.channels_last),
    "rows of more": lambda: torch.empty(3, 17)[:, :16].view(3, 4, 2, 2),
    "bfloat16, every second": lambda: torch.empty(3, 4, 2, 4, dtype=torch.bfloat16)[..., ::2],
    "four axes": lambda: torch.empty(4, 4, 5, 5).permute(2, 0, 3, 1)[:3, :, :2, :2],
}


@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_records_lead_to_every_element_once(first: str, second: str) -> None:
    lists = [[torch.empty(0), LAYOUTS[name](), torch.empty(5), torch.empty(())] for name in (first, second)]
    table = pointer_table(lists, 8, no_check)
    of_first, of_second = elements(table, 2)
    expected = [pair for a, b in zip(*lists, strict=True) for pair in zip(addresses(a), addresses(b), strict=True)]
    assert sorted(zip(of_first, of_second, strict=True)) == sorted(expected)


def test_blocks_and_header() -> None:
    a, b = torch.empty(20), torch.empty(24)[1:21]
    own = [(7, -3), (0, 0), (5, 6)]
    table = pointer_table([[a, torch.empty(0), b], [a, torch.empty(0), b]], 8, no_check, own)
    assert table.blocks.tolist() == [0, 1, 2, 1 << 32, 1 << 32 | 1, 1 << 32 | 2]
    assert table.programs == 6
    assert table.records[:, :HEADER].tolist() == [[20, 1, 20, 1, 0, 3, 7, -3], [20, 0, 20, 1, 3, 3, 5, 6]]
    assert table.dtypes == (torch.float32, torch.float32)
    assert table.records.data_ptr() % 16 == table.blocks.data_ptr() % 16 == 0


def test_mixed_dtypes_have_codes() -> None:
    mixed = [torch.empty(3), torch.empty(3, dtype=torch.float16), torch.empty(3, dtype=torch.bfloat16)]
    table = pointer_table([mixed, [torch.empty(3)] * 3], 8, no_check)
    assert table.dtypes == (None, torch.float32)
    assert table.records[:, HEADER + 8 :].tolist() == [[0, 0], [1, 0], [2, 0]]


def test_merged_axes() -> None:
    t = torch.empty(6, 5, 3, 2)
    assert [(a.size, a.strides) for a in merged_axes(t, t)] == [(180, (1, 1))]
    rows = torch.empty(6, 31)[:, :30].view(6, 3, 2, 5).movedim(-1, 1)  # a block's matrix with a bias column
    assert [a.size for a in merged_axes(t, rows)] == [6, 5, 6]
    assert [a.size for a in merged_axes(rows, t)] == [6, 6, 5]
    assert merged_axes(torch.empty(1, 1), torch.empty(1, 1)) == []


def test_long_axes_are_cut_so_that_indices_within_a_block_fit_32_bits() -> None:
    n = 3 << 30
    parts = list(pieces([Axis(2, (n + 1,)), Axis(n, (1,))], 1))
    assert [part.inner.size for part in parts] == [1 << 30] * 3
    assert [part.starts for part in parts] == [(0,), (1 << 30,), (2 << 30,)]
    assert sum(part.numel for part in parts) == 2 * n


def test_a_table_is_made_once_and_again_when_something_changes() -> None:
    a, b = torch.empty(4, 6), torch.empty(4, 6)
    table = pointer_table([[a], [b]], 8, no_check)

    def is_new(lists: list[list[Tensor]], block: int = 8, own: Any = None) -> bool:
        return pointer_table(lists, block, no_check, own) is not table

    assert not is_new([[a], [b]])
    assert not is_new([[a.detach()], [torch.nn.Parameter(b)]])  # another object, the same memory
    assert is_new([[b], [a]])
    assert is_new([[a], [b]], block=16)
    assert is_new([[a], [b]], own=[(1, 0)])
    assert is_new([[a.view(6, 4)], [b.view(6, 4)]])
    assert is_new([[a.as_strided((4, 6), (1, 4))], [b.as_strided((4, 6), (1, 4))]])
    assert is_new([[a.view(torch.bfloat16)[:, :6]], [b]])
    assert is_new([[a, b]])


def test_a_graph_keeps_the_tables_that_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """While capturing, a known table is used and kept for good; a new one is not handed to calls outside the graph."""

    class Stream:
        cuda_stream = 7

    known, new = [[torch.ones(3)]], [[torch.ones(4)]]
    monkeypatch.setattr(file, "_is_cuda", lambda _: True)
    monkeypatch.setattr(file, "_of_graphs", [])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    table = pointer_table(known, 8, no_check)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert pointer_table(known, 8, no_check) is table
    assert any(kept is table for kept in file._of_graphs)
    inside = pointer_table(new, 8, no_check)
    assert len(file._of_graphs) == 2
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert pointer_table(new, 8, no_check) is not inside


def test_the_check_runs_before_a_new_table_only() -> None:
    calls: list[int] = []
    a = torch.empty(4)
    for _ in range(3):
        pointer_table([[a]], 8, lambda: calls.append(1))
    assert len(calls) == 1


def test_the_cache_is_bounded_and_forgets_the_oldest() -> None:
    tensors = [torch.empty(4) for _ in range(file.CACHE_SIZE + 1)]
    first, second = (pointer_table([[t]], 8, no_check) for t in tensors[:2])
    for t in tensors[2:-1]:
        pointer_table([[t]], 8, no_check)
    assert pointer_table([[tensors[0]]], 8, no_check) is first  # used last now
    pointer_table([[tensors[-1]]], 8, no_check)
    assert len(file._cache) == file.CACHE_SIZE
    assert pointer_table([[tensors[0]]], 8, no_check) is first
    assert pointer_table([[tensors[1]]], 8, no_check) is not second


def test_bad_input_is_named() -> None:
    with pytest.raises(UnsupportedInputError, match=r"one device, got cpu and, at place 1, cpu, meta"):
        pointer_table([[torch.ones(2)] * 2, [torch.ones(2), torch.ones(2, device="meta")]], 8, no_check)
    with pytest.raises(UnsupportedInputError, match=r"expected torch.float32, .* got at place 0 torch.float64"):
        pointer_table([[torch.ones(2, dtype=torch.float64)]], 8, no_check)


LIMITS = {
    "A100": DeviceLimits("cuda", 108, 163 * 1024),
    "H100": DeviceLimits("cuda", 132, 227 * 1024),
    "H200": DeviceLimits("cuda", 132, 227 * 1024),
    "B200": DeviceLimits("cuda", 148, 227 * 1024),
    "MI300": DeviceLimits("hip", 304, 64 * 1024),
}


@pytest.mark.parametrize("numel", [1, 1000, 100_000, 10_000_000, 10**10])
@pytest.mark.parametrize("gpu", LIMITS)
def test_default_is_one_of_the_pruned_configs(gpu: str, numel: int) -> None:
    chosen = default_config(numel, LIMITS[gpu])
    if numel >= 1000:
        assert chosen in prune(CONFIGS, numel, LIMITS[gpu])
    assert ListConfig.from_ints(chosen.to_ints()) == chosen
    assert prune(CONFIGS, numel, LIMITS[gpu])


# the kernels, on tensors whose offsets need 64 bits


FAR = 2**31 + 2**20


@pytest.mark.interpreter
def test_a_block_beyond_32_bits() -> None:
    """The last block only of a tensor of over 2^31 elements: the table is cut down to it."""
    last = FAR // 512
    a = torch.empty(FAR, dtype=torch.bfloat16)
    a[last * 512 - 512 :] = 1.0
    table = pointer_table([[a], [a]], 512, no_check)
    assert table.records.shape[0] == 3  # pieces of 2^30 elements and the rest
    assert table.programs == last
    whole = table.records[:1].clone()
    whole[0, [0, 2]] = FAR  # one record for all, which the launcher never makes
    block = torch.tensor([last - 1])
    out = torch.empty(512, dtype=torch.int64)
    _first_element[(1,)](whole, block, out, WIDE=True, BLOCK=512)
    assert out[0] == FAR - 512
    _first_element[(1,)](whole, block, out, WIDE=False, BLOCK=512)
    assert out[0] != FAR - 512  # what a product of 32 bits would give


@triton.jit  # type: ignore[untyped-decorator]  # Triton leaves it untyped
def _first_element(records_ptr, blocks_ptr, out_ptr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    if WIDE:
        _record, first, _vectors = find_block(records_ptr, blocks_ptr, BLOCK, 2)
    else:
        first = (tl.load(blocks_ptr) & 0xFFFFFFFF).to(tl.int32) * BLOCK
    tl.store(out_ptr + tl.arange(0, BLOCK), first + tl.arange(0, BLOCK))


@pytest.mark.interpreter
def test_finishing_adds_rows_of_any_length() -> None:
    partials = torch.rand(2, 20_000)
    out, root = torch.empty(2), torch.empty(())
    launch_finish(partials, out)
    launch_finish(partials[:1, :3].contiguous(), root, sqrt=True)
    torch.testing.assert_close(out, partials.double().sum(1).float())
    torch.testing.assert_close(root, partials[0, :3].sum().sqrt())


# one launch, whatever the lists


@pytest.mark.parametrize("arch", MACHINES)
def test_one_launch_for_mixed_lists(arch: Arch) -> None:
    """Sizes, dtypes, layouts and empty tensors in one list: launches, registers and atomics of the worst case."""
    shapes = [(4096, 1024), (7,), (0, 3), (), (64, 3, 3, 3)]

    def make(*dtypes: torch.dtype) -> list[Tensor]:
        return [torch.empty(s, dtype=d, device="meta") for s, d in zip(shapes, itertools.cycle(dtypes), strict=False)]

    wide = [make(torch.float32) for _ in range(2)]
    narrow = [make(torch.bfloat16, torch.float32, torch.float16) for _ in range(2)]
    scalar, hyper = torch.empty((), device="meta"), torch.empty(5, device="meta")
    scales = [scalar] * len(shapes)
    rescale = [1.0, 0.0, 1.0, 1.0, 2.0]

    def names(launch: Any) -> list[str]:
        launches = dry_launches(arch, launch)
        for each in map(report, launches):
            assert each.spills == 0, each
            assert each.fits_shared
            assert each.registers <= 128, each
            assert each.counts["ATOM"] == each.counts["atomic"] == 0
        return [each.name for each in launches]

    assert names(
        lambda: launch_momentum_update_(narrow[0], wide[0], narrow[1], scales, hyper, coupled=True, rescale=rescale)
    ) == ["momentum_update_kernel", "rescale_kernel"]
    assert names(lambda: launch_neumann_update_(narrow[0], wide[0], wide[1], narrow[1], scalar, hyper)) == [
        "_update_kernel",
        "_finish_kernel",
    ]
