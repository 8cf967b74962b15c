"""`pack_symmetric`, `unpack_symmetric`: kernels in the interpreter and CPU reference, against LAPACK's routine."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import lapack  # type: ignore[import-untyped]  # scipy has no type stubs
from torch import Tensor

from tests.support.poison import poisoned_allocations
from triton_curv_kernels import symmetric as symmetric_file
from triton_curv_kernels.backend import UnsupportedInputError
from triton_curv_kernels.packed import from_dense, packed_diagonal, packed_length, packed_size, to_dense
from triton_curv_kernels.symmetric import (
    CONFIGS,
    SymmetricConfig,
    SymmetricProblem,
    default_config,
    launch_pack_symmetric,
    launch_unpack_symmetric,
    launch_unpack_symmetric_,
    pack_symmetric,
    packed_offsets,
    prune,
    unpack_symmetric,
    unpack_symmetric_,
)

SIZES = [5, 0, 1, 2, 33, 3, 16, 40]
TILES = SymmetricConfig(BLOCK=16, num_warps=1)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

Pack = Callable[..., Tensor]
Unpack = Callable[..., list[Tensor]]


def into_views(
    unpack: Callable[..., None], packed: Tensor, sizes: list[int], dtype: torch.dtype, scale: Any = 1.0
) -> list[Tensor]:
    """Matrices in one piece of memory, with room between their rows that stays as it is."""
    widest = max(sizes) + 1
    memory = torch.full((len(sizes), widest, widest + 7), float("nan"), dtype=dtype)
    views = [memory[i, :n, :n] for i, n in enumerate(sizes)]
    unpack(views, packed, scale)
    assert memory.isnan().sum() == memory.numel() - sum(n * n for n in sizes)
    return [view.contiguous() for view in views]


both = pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        pytest.param(pack_symmetric, unpack_symmetric, id="reference"),
        pytest.param(launch_pack_symmetric, launch_unpack_symmetric, id="default", marks=pytest.mark.interpreter),
        pytest.param(
            partial(launch_pack_symmetric, config=TILES),
            partial(launch_unpack_symmetric, config=TILES),
            id="small tiles",
            marks=pytest.mark.interpreter,
        ),
        pytest.param(pack_symmetric, partial(into_views, unpack_symmetric_), id="into views"),
        pytest.param(
            launch_pack_symmetric,
            partial(into_views, launch_unpack_symmetric_),
            id="launch into views",
            marks=pytest.mark.interpreter,
        ),
    ],
)


def symmetric(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Whole numbers, every one exact in 16 bits, no two pairs (i, j) alike as far as 16 bits go."""
    half = torch.arange(n * n).reshape(n, n) % 251 - 125
    return (half.tril() + half.tril(-1).mT).to(dtype)


def lapack_packed(matrix: Tensor) -> Tensor:
    """What LAPACK's dtrttf makes of the lower triangle."""
    if matrix.shape[0] == 0:
        return torch.empty(0, dtype=torch.float64)
    packed, info = lapack.dtrttf(matrix.double().numpy(), transr="T", uplo="L")
    assert info == 0
    return torch.from_numpy(np.asarray(packed).ravel())


@both
@pytest.mark.parametrize("to", DTYPES, ids=str)
def test_layout_is_lapacks(pack: Pack, unpack: Unpack, to: torch.dtype) -> None:
    matrices = [symmetric(n) for n in SIZES]
    with poisoned_allocations():
        packed = pack(matrices, to, 0.5)
    target = torch.cat([0.5 * lapack_packed(m) for m in matrices])
    assert packed.dtype == to
    assert torch.equal(packed, target.to(to))


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip(pack: Pack, unpack: Unpack, dtype: torch.dtype) -> None:
    matrices = [symmetric(n, dtype) for n in SIZES]
    with poisoned_allocations():
        results = unpack(pack(matrices, torch.float32, 0.25), SIZES, dtype, 4.0)
    for result, matrix in zip(results, matrices, strict=True):
        assert result.dtype == dtype
        assert result.is_contiguous()
        assert torch.equal(result, matrix)


@both
def test_any_strides(pack: Pack, unpack: Unpack) -> None:
    memory = torch.full((50, 50), float("nan"))
    matrix = memory[3:36, 1:34]
    matrix.copy_(symmetric(33))
    (result,) = unpack(pack([matrix.mT], torch.float32), [33], torch.float32)
    assert torch.equal(result, symmetric(33))


@both
def test_scale_is_applied_in_fp32(pack: Pack, unpack: Unpack) -> None:
    """1e6 does not exist in fp16, and 3e-3 * 1e6 does: the cast comes last on the way in, first on the way out."""
    matrix = torch.full((3, 3), 1e6)
    packed = pack([matrix], torch.float16, 3e-3)
    assert torch.equal(packed, torch.full((6,), 3e3, dtype=torch.float16))
    (result,) = unpack(packed, [3], torch.float32, 1e3)
    assert torch.equal(result, torch.full((3, 3), 3e6))


@both
def test_scale_may_lie_on_the_device(pack: Pack, unpack: Unpack) -> None:
    matrices = [symmetric(n) for n in SIZES]
    packed = pack(matrices, torch.float32, torch.tensor(0.5))
    assert torch.equal(packed, pack(matrices, torch.float32, 0.5))
    for result, matrix in zip(unpack(packed, SIZES, torch.float32, torch.tensor(2.0)), matrices, strict=True):
        assert torch.equal(result, matrix)


@both
def test_a_list_may_mix_dtypes(pack: Pack, unpack: Unpack) -> None:
    matrices = [symmetric(n, DTYPES[n % 3]) for n in SIZES]
    assert torch.equal(pack(matrices, torch.float32), pack([m.float() for m in matrices], torch.float32))


@both
def test_whole_tiles_of_aligned_matrices(pack: Pack, unpack: Unpack) -> None:
    """Their rows begin at multiples of 16 bytes: copied in vectors, in both parts of the rectangle."""
    sizes = [96, 128]
    matrices = [symmetric(n, torch.bfloat16) for n in sizes]
    packed = pack(matrices, torch.bfloat16)
    assert torch.equal(packed, torch.cat([lapack_packed(m) for m in matrices]).bfloat16())
    for result, matrix in zip(unpack(packed, sizes, torch.bfloat16), matrices, strict=True):
        assert torch.equal(result, matrix)


@pytest.mark.interpreter
def test_list_takes_one_launch_a_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[Any] = []
    monkeypatch.setattr(symmetric_file, "_list_kernel", _Counting(symmetric_file._list_kernel, launches))
    packed = launch_pack_symmetric([symmetric(n) for n in SIZES], torch.float32)
    launch_unpack_symmetric(packed, SIZES, torch.float32)
    assert len(launches) == 2
    launch_pack_symmetric([symmetric(n, DTYPES[n % 3]) for n in SIZES], torch.float32)
    assert len(launches) == 2 + 3


class _Counting:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any, launches: list[Any]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        self.launches.append(grid)
        return self.kernel[grid]


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 6), (7,), (3, 8)], ids=str)
def test_dense_and_back(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(*shape, shape[-1], generator=torch.Generator().manual_seed(0))
    matrix = matrix + matrix.mT
    packed = from_dense(matrix)
    assert packed.shape == (*shape[:-1], packed_length(shape[-1]))
    assert torch.equal(to_dense(packed), matrix)
    diagonal = torch.cat(packed_diagonal(packed, shape[-1]), -1)
    assert torch.equal(diagonal, matrix.diagonal(0, -2, -1))
    if len(shape) == 1:
        assert torch.equal(packed.double(), lapack_packed(matrix))


def test_length_without_a_size_is_named() -> None:
    assert [packed_size(packed_length(n)) for n in (0, 1, 2, 100_000)] == [0, 1, 2, 100_000]
    with pytest.raises(UnsupportedInputError, match="got 5"):
        to_dense(torch.zeros(5))
    with pytest.raises(UnsupportedInputError, match=r"expected square .* got \(2, 3\)"):
        from_dense(torch.zeros(2, 3))


@both
def test_unpacked_is_bitwise_symmetric(pack: Pack, unpack: Unpack) -> None:
    packed = torch.randn(packed_offsets(SIZES)[-1], generator=torch.Generator().manual_seed(0))
    for result in unpack(packed, SIZES, torch.bfloat16, 1 / 3):
        assert torch.equal(result, result.mT)


def test_reference_takes_float64() -> None:
    matrix = symmetric(7, torch.float64) / 3
    (result,) = unpack_symmetric(pack_symmetric([matrix], torch.float64), [7], torch.float64)
    assert torch.equal(result, matrix)


def test_offsets() -> None:
    assert packed_offsets([3, 0, 2]) == [0, 6, 6, 9]
    assert packed_offsets([100_000]) == [0, 5_000_050_000]


def test_bad_input_is_named() -> None:
    square = torch.zeros(3, 3)
    for pack in (pack_symmetric, launch_pack_symmetric):
        with pytest.raises(UnsupportedInputError, match=r"square matrices .* got shapes \[\(2, 3\)\]"):
            pack([square, square[:2]], torch.float32)
    with pytest.raises(UnsupportedInputError, match="at least one matrix"):
        pack_symmetric([], torch.float32)
    with pytest.raises(UnsupportedInputError, match=r"0-dim tensor as scale, got \(3,\)"):
        pack_symmetric([square], torch.float32, torch.ones(3))
    with pytest.raises(UnsupportedInputError, match=r"expected dtypes .* got torch\.float64"):
        launch_pack_symmetric([square.double()], torch.float32)
    for unpack in (unpack_symmetric, launch_unpack_symmetric):
        with pytest.raises(UnsupportedInputError, match=r"buffer \(9,\) for sizes \[3, 2\], got \(6,\)"):
            unpack(torch.zeros(6), [3, 2], torch.float32)
        with pytest.raises(UnsupportedInputError, match="contiguous buffer"):
            unpack(torch.zeros(12)[::2], [3], torch.float32)


@pytest.mark.parametrize("n", [0, 1, 27, 100, 1024, 20_000])
def test_default_is_one_of_the_pruned_configs(n: int) -> None:
    problem = SymmetricProblem(n, n * (n + 1) // 2, torch.float32, torch.float16)
    assert default_config(problem) in prune(CONFIGS, problem)
