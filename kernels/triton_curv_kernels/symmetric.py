# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202
# (Triton's language is untyped)
"""Triangles of symmetric matrices, packed one after another into a 1-D buffer, and back.

Shapes: matrices (n, n), dense and symmetric, any strides; buffer (sum of n (n + 1) / 2,). A scale is applied on the
way, in fp32. Dtypes: fp32, fp16, bf16 on either side; the reference takes fp64, too.

Layout: rectangular full packed, LAPACK's TRANSR = 'T', UPLO = 'L' (Gustavson et al., ACM TOMS 37(2), 2010). With
k = ceil(n/2) and e = 1 for even n, else 0, a matrix M is the row-major rectangle R (n + e, k) without a gap:

    R[i + e, j] = M[i, j]              for j <= i, j < k       the first k columns of the lower triangle
    R[j - k, i - k + 1 - e] = M[i, j]  for k <= j <= i         the small triangle left over, above them

Rows of M are rows of R, so both sides are read and written in long runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from triton_curv_kernels.backend import UnsupportedInputError, use_reference, wrap_triton
from triton_curv_kernels.packed import packed_offsets

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    """`tensor * scale` in at least fp32."""
    return tensor if scale == 1.0 else tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * scale


def pack_symmetric_reference(matrices: Sequence[Tensor], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Lower triangles of `matrices`, times `scale`, in `dtype`: four block copies a matrix."""
    sizes = [matrix.shape[0] for matrix in matrices]
    offsets = packed_offsets(sizes)
    packed = torch.empty(offsets[-1], dtype=dtype, device=matrices[0].device)
    for matrix, n, start, end in zip(matrices, sizes, offsets, offsets[1:], strict=False):
        half, even = (n + 1) // 2, 1 - n % 2
        rectangle = packed[start:end].view(n + even, half)
        scaled = _scaled(matrix, scale)
        rectangle[even:].copy_(scaled[:, :half])
        small = rectangle[: n - half, 1 - even :]
        small.tril_(-1).add_(scaled[half:, half:].triu())
    return packed


def unpack_symmetric_reference(
    packed: Tensor, sizes: Sequence[int], dtype: torch.dtype, scale: float = 1.0
) -> list[Tensor]:
    """Dense matrices of the given sizes, times `scale`, in `dtype`: five block operations a matrix."""
    offsets = packed_offsets(sizes)
    matrices = []
    for n, start, end in zip(sizes, offsets, offsets[1:], strict=False):
        half, even = (n + 1) // 2, 1 - n % 2
        rectangle = _scaled(packed[start:end].view(n + even, half), scale)
        matrix = torch.empty((n, n), dtype=dtype, device=packed.device)
        matrix[:, :half] = rectangle[even:]
        matrix[half:, half:] = rectangle[: n - half, 1 - even :].mT
        matrix.tril_()
        matrices.append(matrix.add_(matrix.tril(-1).mT))
    return matrices


@dataclass(frozen=True)
class SymmetricConfig:
    """Programs handle BLOCK x BLOCK tiles of the packed rectangle."""

    BLOCK: int = 64
    num_warps: int = 4


CONFIGS: list[SymmetricConfig] = [SymmetricConfig(block, warps) for block in (16, 32, 64, 128) for warps in (2, 4, 8)]


def prune(configs: Sequence[SymmetricConfig], n: int) -> list[SymmetricConfig]:
    """Tiles no larger than the rectangle of an n x n matrix, with 4 to 32 elements a thread."""
    widest = max(16, triton.next_power_of_2((n + 1) // 2))
    return [c for c in configs if widest >= c.BLOCK and c.BLOCK**2 // (32 * c.num_warps) in range(4, 33)]


def default_config(n: int) -> SymmetricConfig:
    """Analytic choice for an n x n matrix."""
    return SymmetricConfig(16, 2) if n <= 32 else SymmetricConfig(32, 4) if n <= 512 else SymmetricConfig(64, 8)


@triton.jit
def _places(n, BLOCK: tl.constexpr):
    """The program's elements of the rectangle: their offset in it, their (i, j) in the matrix, and which exist.

    Those of the small triangle are at j >= i, in the upper half, so that rows of the rectangle are rows of the matrix.
    """
    half = (n + 1) // 2
    even = 1 - n % 2
    across = tl.cdiv(half, BLOCK)
    r = ((tl.program_id(0) // across) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    c = ((tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
    mask = (r < n + even) & (c < half)
    is_first = c <= r - even
    i = tl.where(is_first, r - even, r + half)
    j = tl.where(is_first, c, c + half - 1 + even)
    return r * half + c, i, j, mask


@triton.jit
def _pack_kernel(matrix, packed, offset, n, scale, stride_i, stride_j, BLOCK: tl.constexpr):
    at, i, j, mask = _places(n, BLOCK)
    value = tl.load(matrix + i * stride_i + j * stride_j, mask=mask, other=0.0).to(tl.float32) * scale
    tl.store(packed + offset + at, value.to(packed.dtype.element_ty), mask=mask)


@triton.jit
def _unpack_kernel(packed, matrix, offset, n, scale, BLOCK: tl.constexpr):
    at, i, j, mask = _places(n, BLOCK)
    value = tl.load(packed + offset + at, mask=mask, other=0.0).to(tl.float32) * scale
    value = value.to(matrix.dtype.element_ty)
    tl.store(matrix + i * n + j, value, mask=mask)
    tl.store(matrix + tl.trans(j * n + i), tl.trans(value), mask=tl.trans(mask & (i != j)))


def supports(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the Triton path converts between these dtypes: all but fp64, for which the ops take the reference."""
    return tensor.dtype in DTYPES and dtype in DTYPES


def launch_pack_symmetric(
    matrices: Sequence[Tensor], dtype: torch.dtype, scale: float = 1.0, config: SymmetricConfig | None = None
) -> Tensor:
    """`pack_symmetric` by Triton, whatever the device: one launch a matrix."""
    _check_matrices(matrices)
    sizes = [matrix.shape[0] for matrix in matrices]
    offsets = packed_offsets(sizes)
    packed = torch.empty(offsets[-1], dtype=dtype, device=matrices[0].device)
    for matrix, n, offset in zip(matrices, sizes, offsets, strict=False):
        _check_dtypes(matrix, dtype)
        if n > 0:
            chosen = config or default_config(n)
            wrap_triton(_pack_kernel)[_grid(n, chosen)](
                matrix, packed, offset, n, scale, *matrix.stride(), BLOCK=chosen.BLOCK, num_warps=chosen.num_warps
            )
    return packed


def launch_unpack_symmetric(
    packed: Tensor,
    sizes: Sequence[int],
    dtype: torch.dtype,
    scale: float = 1.0,
    config: SymmetricConfig | None = None,
) -> list[Tensor]:
    """`unpack_symmetric` by Triton, whatever the device: one launch a matrix."""
    _check_packed(packed, sizes)
    _check_dtypes(packed, dtype)
    matrices = []
    for n, offset in zip(sizes, packed_offsets(sizes), strict=False):
        matrix = torch.empty((n, n), dtype=dtype, device=packed.device)
        if n > 0:
            chosen = config or default_config(n)
            wrap_triton(_unpack_kernel)[_grid(n, chosen)](
                packed, matrix, offset, n, scale, BLOCK=chosen.BLOCK, num_warps=chosen.num_warps
            )
        matrices.append(matrix)
    return matrices


def _grid(n: int, config: SymmetricConfig) -> tuple[int]:
    """Tiles of the rectangle."""
    return (triton.cdiv(n + 1 - n % 2, config.BLOCK) * triton.cdiv((n + 1) // 2, config.BLOCK),)


def _check_dtypes(tensor: Tensor, dtype: torch.dtype) -> None:
    if not supports(tensor, dtype):
        raise UnsupportedInputError(f"expected dtypes out of {DTYPES}, got {tensor.dtype} to {dtype}")


def _check_matrices(matrices: Sequence[Tensor]) -> None:
    wrong = [tuple(m.shape) for m in matrices if m.dim() != 2 or m.shape[0] != m.shape[1]]
    if wrong or len({m.device for m in matrices}) > 1:
        raise UnsupportedInputError(
            f"expected square matrices on one device, got shapes {wrong or [tuple(m.shape) for m in matrices]} on "
            f"{sorted({str(m.device) for m in matrices})}"
        )


def _check_packed(packed: Tensor, sizes: Sequence[int]) -> None:
    expected = packed_offsets(sizes)[-1]
    if packed.dim() != 1 or not packed.is_contiguous() or packed.shape[0] != expected:
        raise UnsupportedInputError(
            f"expected a contiguous buffer ({expected},) for sizes {list(sizes)}, got {tuple(packed.shape)} with "
            f"strides {packed.stride()}"
        )


@triton_op("triton_curv::pack_symmetric", mutates_args=())
def _pack_symmetric_op(matrices: list[Tensor], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    if use_reference(matrices[0]) or not all(supports(matrix, dtype) for matrix in matrices):
        _check_matrices(matrices)
        return pack_symmetric_reference(matrices, dtype, scale)
    return launch_pack_symmetric(matrices, dtype, scale)


@triton_op("triton_curv::unpack_symmetric", mutates_args=())
def _unpack_symmetric_op(packed: Tensor, sizes: list[int], dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    if use_reference(packed) or not supports(packed, dtype):
        _check_packed(packed, sizes)
        return unpack_symmetric_reference(packed, sizes, dtype, scale)
    return launch_unpack_symmetric(packed, sizes, dtype, scale)


def pack_symmetric(matrices: Sequence[Tensor], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """`torch.cat([scale * M[tril] for M in matrices]).to(dtype)`, in the order of rectangular full packed storage.

    Args:
        matrices: dense symmetric (n, n), of any sizes and strides, on one device; both triangles are read.
        dtype: of the buffer.
        scale: factor on every element, applied before the cast.

    Returns:
        (sum of n (n + 1) / 2,); `packed_offsets` says where each matrix starts.

    Raises:
        UnsupportedInputError: no matrices, or not square, or on several devices.

    """
    if not matrices:
        raise UnsupportedInputError("expected at least one matrix, got none: their device is the buffer's")
    if not torch.compiler.is_compiling() and use_reference(matrices[0]):
        _check_matrices(matrices)
        return pack_symmetric_reference(matrices, dtype, scale)
    return torch.ops.triton_curv.pack_symmetric(matrices, dtype, scale)


def unpack_symmetric(packed: Tensor, sizes: Sequence[int], dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    """Inverse of `pack_symmetric`: dense symmetric (n, n) for each n of `sizes`, times `scale`, in `dtype`.

    Raises:
        UnsupportedInputError: a buffer not contiguous or not of the sizes' length.

    """
    if not torch.compiler.is_compiling() and use_reference(packed):
        _check_packed(packed, sizes)
        return unpack_symmetric_reference(packed, sizes, dtype, scale)
    return torch.ops.triton_curv.unpack_symmetric(packed, sizes, dtype, scale)
