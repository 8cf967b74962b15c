"""`accumulate_factor_`: the Triton kernels in the interpreter and the CPU reference, against products in float64."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.support.poison import poisoned, poisoned_allocations
from triton_curv_kernels.backend import DeviceLimits, UnsupportedInputError
from triton_curv_kernels.factor import (
    CONFIGS,
    NUMERICS,
    FactorConfig,
    FactorProblem,
    accumulate_factor_,
    default_config,
    launch_accumulate_factor_,
    prune,
)
from triton_curv_kernels.factor_config import InputPrecision
from triton_curv_kernels.packed import from_dense, packed_length, tile_of, to_dense

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = FactorConfig(BLOCK_N=16, BLOCK_K=16, SPLIT_K=1, num_warps=1, num_stages=2)
SPLIT = replace(SMALL, SPLIT_K=3)
# rows: nothing, one element, less than a tile, exact tiles, odd sizes over several tiles; with and without a batch
SHAPES = [(0, 5), (3, 0), (1, 1), (5, 7), (32, 32), (41, 50), (2, 35, 19), (3, 1, 17), (0, 4, 3)]

Accumulate = Callable[..., None]


def integers(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Small whole numbers: every sum of products is exact in fp32, so that results are compared bit for bit."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def symmetric(shape: tuple[int, ...]) -> Tensor:
    half = integers((*shape, shape[-1]))
    return half + half.mT


def expected(factor: Tensor, rows: Tensor, alpha: float, beta: float, ones: bool) -> Tensor:
    """The definition, in float64."""
    x = rows.double()
    if ones:
        x = torch.cat([x, x.new_ones((*x.shape[:-1], 1))], dim=-1)
    old = torch.zeros_like(factor, dtype=torch.float64) if beta == 0 else beta * factor.double()
    return old + alpha * (x.mT @ x)


def launching(config: FactorConfig) -> Accumulate:
    return partial(launch_accumulate_factor_, config=config)


def check(accumulate: Accumulate, rows: Tensor, beta: float, ones: bool, packed: bool = False) -> None:
    """Exactly the definition for integer rows, and bitwise symmetric; an ignored factor may hold NaN."""
    shape = (*rows.shape[:-2], rows.shape[-1] + ones)
    factor = poisoned((*shape, shape[-1])) if beta == 0 else symmetric(shape)
    target = expected(factor, rows, 0.5, beta, ones)
    if packed:
        factor = from_dense(factor)
    with poisoned_allocations():
        accumulate(factor, rows, 0.5, beta, ones)
    if packed:
        factor = to_dense(factor)
    torch.testing.assert_close(factor.double(), target, rtol=0, atol=0)
    assert torch.equal(factor, factor.mT)


@pytest.mark.interpreter
@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["one pass", "split"])
@pytest.mark.parametrize("ones", [False, True], ids=["plain", "ones"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_launch_is_exact(shape: tuple[int, ...], ones: bool, config: FactorConfig) -> None:
    for beta, dtype in ((0.0, torch.float32), (0.25, torch.bfloat16)):
        check(launching(config), integers(shape, dtype), beta, ones)


@pytest.mark.interpreter
@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["one pass", "split"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_launch_of_a_packed_factor_is_exact(shape: tuple[int, ...], config: FactorConfig) -> None:
    for beta, ones in ((0.0, True), (0.25, False), (1.0, True)):
        check(launching(config), integers(shape), beta, ones, packed=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "bf16x6"])
def test_launch_takes_every_precision(precision: InputPrecision) -> None:
    check(launching(replace(SPLIT, input_precision=precision)), integers((33, 20)), 0.25, ones=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_second_launch_equals_the_first(packed: bool) -> None:
    rows = torch.randn(100, 37, generator=torch.Generator().manual_seed(0))
    results = []
    for _ in range(2):
        factor = poisoned((packed_length(38),) if packed else (38, 38))
        launch_accumulate_factor_(factor, rows, 0.7, 0.0, ones=True, config=SPLIT)
        results.append(factor)
    assert torch.equal(*results)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_launch_accumulates_in_fp32(dtype: torch.dtype) -> None:
    """Rounding of products or sums to 16 bits, or to TF32, would be off by 1e-3."""
    rows = torch.randn(70, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    factor = symmetric((34,))
    target = expected(factor, rows, 0.7, 0.3, ones=True)
    launch_accumulate_factor_(factor, rows, 0.7, 0.3, ones=True, config=SMALL)
    torch.testing.assert_close(factor.double(), target, rtol=1e-6, atol=2e-5)
    assert torch.equal(factor, factor.mT)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.mT.contiguous().mT,  # column-major
        lambda x: torch.stack([x, -x], dim=-1)[..., 0],  # gaps within a row
        lambda x: torch.cat([x, -x], dim=-1)[..., : x.shape[-1]],  # gaps between rows
        lambda x: x[..., :1, :].expand_as(x),  # stride 0
        lambda x: torch.cat([x[..., :1], x], dim=-1)[..., 1:],  # not at the start of its memory
    ],
    ids=["transposed", "strided columns", "strided rows", "expanded", "offset"],
)
def test_launch_takes_any_strides_of_rows(view: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    for shape in ((19, 21), (2, 5, 18)):
        rows = view(integers(shape, dtype))
        for config in (SMALL, SPLIT):
            check(launching(config), rows, 0.25, ones=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["one pass", "split"])
def test_launch_writes_the_view_and_nothing_else(config: FactorConfig) -> None:
    memory = poisoned((2, 24, 50))
    factor = memory[:, 2:22, 3:43:2]
    factor.copy_(symmetric((2, 20)))
    rows = integers((2, 33, 19), torch.float16)
    target = expected(factor, rows, 1.0, 1.0, ones=True)
    launch_accumulate_factor_(factor, rows, ones=True, config=config)
    assert torch.equal(factor.double(), target)
    assert memory.isnan().sum() == memory.numel() - factor.numel()


@pytest.mark.interpreter
@pytest.mark.parametrize("block", [32, 64, 128])
def test_launch_stores_large_tiles_whole(block: int) -> None:
    """Tiles of 64 and 128 are stored in parts of 32 columns."""
    rows = integers((20, 150), torch.bfloat16)
    for beta, packed in ((0.0, False), (0.25, False), (0.25, True)):
        check(launching(FactorConfig(block, 32)), rows, beta, True, packed)


@pytest.mark.interpreter
def test_launch_by_default_splits_a_long_k() -> None:
    rows = integers((1100, 40))
    config = default_config(FactorProblem.of(rows, ones=True))
    assert config.SPLIT_K == 2
    check(launch_accumulate_factor_, rows, 0.0, ones=True)


@triton.jit  # type: ignore[untyped-decorator]  # Triton is untyped
def _tiles_kernel(FIRST: Any, TILES: Any, OUT: Any, N: tl.constexpr) -> None:
    p = tl.load(FIRST) + tl.arange(0, N)
    row, column = tile_of(p, tl.load(TILES))
    tl.store(OUT + tl.arange(0, N), row)
    tl.store(OUT + N + tl.arange(0, N), column)


@pytest.mark.interpreter
@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5, 12, 31, 32, 1000, 1001, 46340])
def test_tile_map_covers_the_triangle_once(tiles: int) -> None:
    """All tiles of small triangles; ends and middle of the large ones, up to 1.07e9 tiles."""
    total, block = tiles * (tiles + 1) // 2, 1024
    seen = []
    for first in {0, max(0, total // 2 - block // 2), max(0, total - block)}:
        out = torch.empty(2, block, dtype=torch.int32)
        _tiles_kernel[(1,)](
            torch.tensor(first, dtype=torch.int32), torch.tensor(tiles, dtype=torch.int32), out, N=block
        )
        rows, columns = out[:, : total - first].long()
        assert (columns >= 0).all()
        assert (columns <= rows).all()
        assert (rows < tiles).all()
        numbers = rows * (rows + 1) // 2 + columns
        assert torch.unique(numbers).numel() == numbers.numel()
        seen.append(numbers)
    if total <= block:
        assert torch.unique(torch.cat(seen)).tolist() == list(range(total))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("ones", [False, True], ids=["plain", "ones"])
@pytest.mark.parametrize("shape", [*SHAPES, (600, 150), (30, 400), (2, 2000, 17)], ids=str)  # panels; a border
def test_reference_is_exact(shape: tuple[int, ...], ones: bool, beta: float, dtype: torch.dtype) -> None:
    def accumulate(factor: Tensor, *args: Any) -> None:
        wide = factor.to(dtype)
        accumulate_factor_(wide, *args)
        factor.copy_(wide)

    for packed in (False, True):
        check(accumulate, integers(shape, dtype), beta, ones, packed)


@pytest.mark.parametrize("n", [384, 385, 449])  # whole panels of 64 in each triangle, odd, a rest
def test_packed_reference_by_panels_is_exact(n: int) -> None:
    for beta in (0.0, 0.25):
        check(accumulate_factor_, integers((70, n)), beta, ones=False, packed=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_reference_takes_rows_of_16_bits_and_any_strides(dtype: torch.dtype) -> None:
    check(accumulate_factor_, integers((21, 19), dtype).mT, 1.0, ones=True)
    check(accumulate_factor_, integers((2, 21, 19), dtype).mT, 1.0, ones=True)


def test_no_gradient_flows() -> None:
    factor, rows = symmetric((4,)), integers((5, 3)).requires_grad_()
    accumulate_factor_(factor, rows, ones=True)
    assert not factor.requires_grad


@pytest.mark.parametrize(
    ("factor", "rows", "ones"),
    [
        ((3, 3), (5, 4), False),
        ((4, 4), (5, 4), True),
        ((6, 6), (5, 4), True),
        ((2, 4, 4), (5, 4), False),
        ((4,), (4,), False),
        ((9,), (5, 4), False),
        ((10,), (2, 5, 4), False),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_named(factor: tuple[int, ...], rows: tuple[int, ...], ones: bool) -> None:
    for accumulate in (accumulate_factor_, launch_accumulate_factor_):
        with pytest.raises(UnsupportedInputError, match=r"expected rows .* got rows \(.*\) and factor \("):
            accumulate(torch.zeros(factor), torch.zeros(rows), ones=ones)


@pytest.mark.parametrize(
    ("factor", "rows"), [(torch.float64, torch.float64), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.int32)]
)
def test_dtypes_that_triton_does_not_take_are_named(factor: torch.dtype, rows: torch.dtype) -> None:
    with pytest.raises(UnsupportedInputError, match=f"got {factor} and {rows}"):
        launch_accumulate_factor_(torch.zeros(4, 4, dtype=factor), torch.zeros(5, 4, dtype=rows))


def test_packed_factor_with_gaps_is_named() -> None:
    with pytest.raises(UnsupportedInputError, match="without gaps, got strides"):
        accumulate_factor_(torch.zeros(20)[::2], torch.zeros(5, 4))


def test_numerics_are_fields() -> None:
    assert set(NUMERICS) <= {field.name for field in fields(FactorConfig)}


def test_config_goes_through_integers() -> None:
    for config in CONFIGS:
        assert FactorConfig.from_ints(config.to_ints()) == config


PROBLEM = FactorProblem(batch=1, k=32768, n=1024, dtype=torch.bfloat16)
HIP = DeviceLimits("hip", 304, 64 * 1024)


@pytest.mark.parametrize(
    ("problem", "refused"),
    [
        (replace(PROBLEM, limits=HIP), FactorConfig(128, 64, num_stages=3)),  # 96 KiB
        (PROBLEM, FactorConfig(128, 64, input_precision="tf32x3")),  # the same kernel as "ieee"
        (replace(PROBLEM, dtype=torch.float32), FactorConfig(128, 32, input_precision="bf16x6")),
        (replace(PROBLEM, dtype=torch.float32, limits=HIP), FactorConfig(64, 32, input_precision="tf32x3")),
        (replace(PROBLEM, dtype=torch.float32), FactorConfig(64, 64)),
        (replace(PROBLEM, n=33), FactorConfig(128, 64)),
        (replace(PROBLEM, k=100), FactorConfig(64, 64, SPLIT_K=2)),
    ],
)
def test_prune_refuses(problem: FactorProblem, refused: FactorConfig) -> None:
    assert prune([refused], PROBLEM) == ([refused] if refused.input_precision == "ieee" else [])
    assert prune([refused], problem) == []


@pytest.mark.parametrize("limits", [DeviceLimits(), HIP], ids=lambda limits: limits.platform)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("k", "n"), [(64, 1), (1000, 27), (32768, 64), (32768, 500), (4096, 4096)])
def test_default_is_one_of_the_pruned_configs(k: int, n: int, dtype: torch.dtype, limits: DeviceLimits) -> None:
    for aligned in (True, False):
        problem = FactorProblem(1, k, n, dtype, aligned=aligned, limits=limits)
        assert default_config(problem) in prune(CONFIGS, problem)


def test_default_split_fills_the_device() -> None:
    """A small factor of a long batch would keep 1 of 132 multiprocessors busy; a large one needs no split."""
    assert default_config(replace(PROBLEM, n=64, k=1 << 20)).SPLIT_K >= 96
    assert default_config(replace(PROBLEM, n=64, k=256)).SPLIT_K == 1
    assert default_config(replace(PROBLEM, n=8192)).SPLIT_K == 1
    assert default_config(replace(PROBLEM, n=2048)).SPLIT_K > 1  # 136 tiles: one would wait for 135 idle places
    assert default_config(replace(PROBLEM, n=64, batch=512)).SPLIT_K == 1
