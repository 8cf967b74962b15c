"""Elements more than 2^31 apart: factor and packing kernels in the interpreter, on memory that is mostly not there.

Buffers are reserved, not committed: only the pages a kernel touches exist. Their middle is where tensors start, so
that an offset which wraps at 32 bits lands in the same buffer, on zeros, and shows in the result instead of crashing.
"""

import mmap
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_curv_kernels.factor import FactorConfig, launch_accumulate_factor_
from triton_curv_kernels.factor_group import launch_accumulate_factors_
from triton_curv_kernels.factor_group_config import GroupConfig
from triton_curv_kernels.factor_tiles import store_columns
from triton_curv_kernels.packed import packed_length
from triton_curv_kernels.symmetric import SymmetricConfig, launch_pack_symmetric

pytestmark = pytest.mark.interpreter
MAP_NORESERVE = 0x4000  # Linux's; Python 3.11 has no name for it
FAR = 1 << 28  # 12 such steps leave 32 bits


def reserved(numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=flags), dtype=dtype)


def far_apart(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """(rows, columns) with FAR elements from one row to the next, zeros as far before and after."""
    memory = reserved((rows + 8 + 8) * FAR, dtype)
    return memory.as_strided((rows, columns), (FAR, 1), 8 * FAR)


def integers(*shape: int) -> Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(0)).float()


@triton.jit  # type: ignore[untyped-decorator]  # Triton is untyped
def _narrow_kernel(ROWS: Any, OUT: Any, stride: Any, N: tl.constexpr) -> None:
    """A column of N rows, with offsets of 32 bits: what the kernels must not do."""
    k = tl.arange(0, N)
    tl.store(OUT + k, tl.load(ROWS + k * stride))


@pytest.mark.filterwarnings("ignore:overflow")
def test_probe_sees_offsets_of_32_bits() -> None:
    """The negative control: row 8 and those after it are read from elsewhere."""
    rows = far_apart(16, 1, torch.float16)
    rows.copy_(torch.arange(1, 17)[:, None])
    out = torch.empty(16, dtype=torch.float16)
    _narrow_kernel[(1,)](rows, out, rows.stride(0), N=16)
    assert torch.equal(out[:8], rows[:8, 0])
    assert not out[8:].any()


@pytest.mark.parametrize("grouped", [False, True], ids=["one", "list"])
def test_rows_far_apart(grouped: bool) -> None:
    rows, factor = far_apart(16, 8, torch.float16), torch.full((9, 9), float("nan"))
    rows.copy_(integers(16, 8))
    x = torch.cat([rows.float(), torch.ones(16, 1)], 1)
    if grouped:
        one, zero = torch.ones(1), torch.zeros(1)
        launch_accumulate_factors_([factor], [rows], one, zero, [True], config=GroupConfig(32, 16, 16, 64, 4, 2))
    else:
        launch_accumulate_factor_(factor, rows, 1.0, 0.0, ones=True, config=FactorConfig(16, 16))
    assert torch.equal(factor, x.mT @ x)


@pytest.mark.parametrize("grouped", [False, True], ids=["one", "list"])
def test_factor_of_rows_far_apart(grouped: bool) -> None:
    rows, factor = integers(20, 11), far_apart(12, 12, torch.float32)
    factor.fill_(1.0)
    x = torch.cat([rows, torch.ones(20, 1)], 1)
    if grouped:
        one = torch.ones(1)
        launch_accumulate_factors_([factor], [rows], one, one, [True], config=GroupConfig(32, 16, 16, 16, 4, 2))
    else:
        launch_accumulate_factor_(factor, rows, ones=True, config=FactorConfig(16, 16))
    assert torch.equal(factor, x.mT @ x + 1)


@triton.jit  # type: ignore[untyped-decorator]  # Triton is untyped
def _store_kernel(PACKED: Any, i: Any, j: Any, size: Any, beta: Any) -> None:
    value = (tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]).to(tl.float32)
    store_columns(PACKED, value, i, j, True, size, size, beta, 0, 0, 16, 16, True)


@pytest.mark.parametrize("place", ["first", "last"])
def test_end_of_a_large_packed_factor(place: str) -> None:
    """The last tile of n = 100,000 in each part of the rectangle, 5 and 2.5 milliards of elements from its start."""
    n = 100_000
    half = n // 2
    packed = reserved(packed_length(n), torch.float32)
    i, j = n - 16, half - 16 if place == "first" else n - 32
    _store_kernel[(1,)](packed, i, j, n, 1.0)
    rectangle = packed.view(n + 1, half)
    if place == "first":
        tile = rectangle[i + 1 : i + 17, j : j + 16]
    else:
        tile = rectangle[j - half : j - half + 16, i - half : i - half + 16].mT
    assert torch.equal(tile, torch.arange(256.0).view(16, 16))


def test_matrix_of_rows_far_apart_is_packed() -> None:
    matrix, tiles = far_apart(12, 12, torch.float16), SymmetricConfig(16, 1)
    half = integers(12, 12)
    matrix.copy_(half + half.mT)
    packed = launch_pack_symmetric([matrix], torch.float32, config=tiles)
    assert torch.equal(packed, launch_pack_symmetric([matrix.contiguous()], torch.float32, config=tiles))
    assert packed.any()
