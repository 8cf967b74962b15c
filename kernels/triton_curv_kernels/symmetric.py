# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202, SIM108
# (Triton's language is untyped)
"""Triangles of symmetric matrices, packed one after another into a 1-D buffer, and back, a whole list in one launch.

Shapes: matrices (n, n), dense and symmetric, any strides; buffer (sum of n (n + 1) / 2,). Each triangle is in
rectangular full packed format: see packed.py. A scale is applied on the way, in fp32; it may lie on the device.
Dtypes: fp32, fp16, bf16 on either side; the reference takes fp64, too.

Programs copy square tiles of the lower triangle. Those of M's first columns are copied as they are, those of the small
triangle left over transposed, so that both sides are read and written in long runs; whole tiles of a matrix whose
rows begin at multiples of 16 bytes, in the matrix and in the buffer, in vectors. One launch takes all matrices of a
dtype through a table of their addresses. A trace (torch.compile) has no addresses: there each matrix is one launch,
inlined in the graph.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from triton_curv_kernels.backend import (
    UnsupportedInputError,
    device_limits,
    is_traced,
    on_own_device,
    use_reference,
    wrap_triton,
)
from triton_curv_kernels.choice import choose_once, tables_key
from triton_curv_kernels.device_cache import DeviceCache, Table
from triton_curv_kernels.packed import packed_length, packed_offsets, tile_of
from triton_curv_kernels.symmetric_config import (
    CONFIGS,
    NUMERICS,
    SymmetricConfig,
    SymmetricProblem,
    default_config,
    prune,
)
from triton_curv_kernels.symmetric_reference import (
    pack_symmetric_reference,
    unpack_symmetric_reference,
    unpack_symmetric_reference_,
)

__all__ = [
    # the ops, their references and their launchers
    "launch_pack_symmetric",
    "launch_unpack_symmetric",
    "launch_unpack_symmetric_",
    "pack_symmetric",
    "pack_symmetric_reference",
    "packed_offsets",
    "supports",
    "unpack_symmetric",
    "unpack_symmetric_",
    "unpack_symmetric_reference",
    "unpack_symmetric_reference_",
    # their configurations
    "CONFIGS",
    "NUMERICS",
    "SymmetricConfig",
    "SymmetricProblem",
    "default_config",
    "prune",
]

TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
DTYPES = tuple(TRITON_DTYPES)

_tables = DeviceCache(64)


@triton.jit
def _copy(
    matrix,
    packed,
    i,
    j,
    n,
    scale,
    stride_i,
    stride_j,
    FIRST: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGN: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """M[i:i + BLOCK, j:j + BLOCK], where it is in the FIRST part of the packed rectangle or in the other, transposed.

    A WHOLE tile lies in one part and under the diagonal, and its rows begin at multiples of ALIGN elements.
    """
    if WHOLE:
        half = n // (2 * ALIGN) * ALIGN
        even = 1
    else:
        half = (n + 1) // 2
        even = 1 - n % 2
    if FIRST:
        start = (i.to(tl.int64) + even) * half + j
        r = i + tl.arange(0, BLOCK)[:, None]
        c = j + tl.arange(0, BLOCK)[None, :]
        mask = (r < n) & (c <= r) & (c < half)
    else:
        start = (j.to(tl.int64) - half) * half + i - half + 1 - even
        r = j + tl.arange(0, BLOCK)[:, None]
        c = i + tl.arange(0, BLOCK)[None, :]
        mask = (c < n) & (r <= c) & (r >= half)
    packed_ptrs = packed + start + (tl.arange(0, BLOCK)[:, None].to(tl.int64) * half + tl.arange(0, BLOCK)[None, :])
    ptrs = matrix + r.to(tl.int64) * stride_i + c.to(tl.int64) * stride_j
    if PACK:
        if WHOLE:
            value = tl.load(ptrs)
        else:
            value = tl.load(ptrs, mask=mask, other=0.0)
        value = (value.to(tl.float32) * scale).to(packed.dtype.element_ty)
        if WHOLE:
            tl.store(packed_ptrs, value)
        else:
            tl.store(packed_ptrs, value, mask=mask)
    else:
        mirrored = matrix + tl.trans(c).to(tl.int64) * stride_i + tl.trans(r).to(tl.int64) * stride_j
        if WHOLE:
            value = tl.load(packed_ptrs)
        else:
            value = tl.load(packed_ptrs, mask=mask, other=0.0)
        value = (value.to(tl.float32) * scale).to(matrix.dtype.element_ty)
        if WHOLE:
            tl.store(ptrs, value)
            tl.store(mirrored, tl.trans(value))
        else:
            tl.store(ptrs, value, mask=mask)
            tl.store(mirrored, tl.trans(value), mask=tl.trans(mask & (r != c)))


@triton.jit
def _copy_tile(
    matrix, packed, p, n, scale, stride_i, stride_j, wide, ALIGN: tl.constexpr, PACK: tl.constexpr, BLOCK: tl.constexpr
):
    """Tile number p of the triangle; a `wide` matrix has rows at multiples of ALIGN elements on both sides."""
    row, column = tile_of(p, tl.cdiv(n, BLOCK))
    i, j = row * BLOCK, column * BLOCK
    half = (n + 1) // 2
    is_whole = wide & (i + BLOCK <= n) & (j < i)
    if is_whole and j + BLOCK <= half:
        _copy(matrix, packed, i, j, n, scale, stride_i // ALIGN * ALIGN, 1, True, True, ALIGN, PACK, BLOCK)
    elif is_whole and j >= half:
        _copy(matrix, packed, i, j, n, scale, stride_i // ALIGN * ALIGN, 1, False, True, ALIGN, PACK, BLOCK)
    else:
        if j < half:
            _copy(matrix, packed, i, j, n, scale, stride_i, stride_j, True, False, ALIGN, PACK, BLOCK)
        if j + BLOCK > half:
            _copy(matrix, packed, i, j, n, scale, stride_i, stride_j, False, False, ALIGN, PACK, BLOCK)


@triton.jit(do_not_specialize=["offset", "n", "stride_i"])  # WIDE says what matters
def _matrix_kernel(
    # tensors; the scale on the device is one factor more, if HAS_SCALE
    matrix,
    packed,
    scale_ptr,
    # sizes, strides
    offset,
    n,
    scale,
    stride_i,
    stride_j,
    # configuration
    WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One matrix."""
    if HAS_SCALE:
        scale *= tl.load(scale_ptr).to(tl.float32)
    if WIDE:
        offset = offset // ALIGN * ALIGN
    _copy_tile(matrix, packed + offset, tl.program_id(0), n, scale, stride_i, stride_j, WIDE, ALIGN, PACK, BLOCK)


@triton.jit
def _list_kernel(
    # tables (M, 6) of address, n, strides, offset in the buffer, wide; and (programs,) of matrix << 32 | tile
    table,
    items,
    packed,
    scale_ptr,
    scale,
    # configuration
    MATRIX_DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All matrices of a dtype."""
    item = tl.load(items + tl.program_id(0))
    p = (item & 0x7FFFFFFF).to(tl.int32)
    row = table + (item >> 32) * 6
    address = tl.load(row)
    n = tl.load(row + 1).to(tl.int32)
    stride_i = tl.load(row + 2)
    stride_j = tl.load(row + 3)
    offset = tl.load(row + 4)
    wide = tl.load(row + 5) != 0
    if HAS_SCALE:
        scale *= tl.load(scale_ptr).to(tl.float32)
    if wide:
        matrix = tl.multiple_of(address.to(tl.pointer_type(MATRIX_DTYPE)), 16)
        at = packed + offset // ALIGN * ALIGN
        _copy_tile(matrix, at, p, n, scale, stride_i, stride_j, True, ALIGN, PACK, BLOCK)
    else:
        matrix = address.to(tl.pointer_type(MATRIX_DTYPE))
        _copy_tile(matrix, packed + offset, p, n, scale, stride_i, stride_j, False, ALIGN, PACK, BLOCK)


def supports(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the Triton path converts between these dtypes: all but fp64, for which the ops take the reference."""
    return tensor.dtype in DTYPES and dtype in DTYPES


@on_own_device
def launch_pack_symmetric(
    matrices: Sequence[Tensor],
    dtype: torch.dtype,
    scale: float | Tensor = 1.0,
    config: SymmetricConfig | None = None,
) -> Tensor:
    """`pack_symmetric` by Triton, whatever the device: one launch for each dtype of matrices."""
    _check_matrices(matrices)
    sizes = [matrix.shape[0] for matrix in matrices]
    for matrix in matrices:
        _check_dtypes(matrix, dtype)
    packed = torch.empty(packed_offsets(sizes)[-1], dtype=dtype, device=matrices[0].device)
    _launch(matrices, packed, scale, config, pack=True)
    return packed


@on_own_device
def launch_unpack_symmetric(
    packed: Tensor,
    sizes: Sequence[int],
    dtype: torch.dtype,
    scale: float | Tensor = 1.0,
    config: SymmetricConfig | None = None,
) -> list[Tensor]:
    """`unpack_symmetric` by Triton, whatever the device: one launch."""
    _check_packed(packed, sizes)
    _check_dtypes(packed, dtype)
    matrices = [torch.empty((n, n), dtype=dtype, device=packed.device) for n in sizes]
    _launch(matrices, packed, scale, config, pack=False)
    return matrices


@on_own_device
def launch_unpack_symmetric_(
    matrices: Sequence[Tensor], packed: Tensor, scale: float | Tensor = 1.0, config: SymmetricConfig | None = None
) -> None:
    """`unpack_symmetric_` by Triton, whatever the device: one launch for each dtype of matrices."""
    _check_matrices(matrices)
    _check_packed(packed, [matrix.shape[0] for matrix in matrices])
    for matrix in matrices:
        _check_dtypes(packed, matrix.dtype)
    _launch(matrices, packed, scale, config, pack=False)


def _launch(
    matrices: Sequence[Tensor], packed: Tensor, scale: float | Tensor, config: SymmetricConfig | None, pack: bool
) -> None:
    """Copy all matrices to their places in `packed`, or from there."""
    sizes = [matrix.shape[0] for matrix in matrices]
    if config is None:
        dtypes = (matrices[0].dtype if matrices else packed.dtype, packed.dtype)
        config = choose_once(
            "pack_symmetric" if pack else "unpack_symmetric",
            (tuple(sizes), *dtypes, packed.device),
            lambda: symmetric_problem(sizes, *dtypes, packed.device),
            default_config,
        )
    on_device = isinstance(scale, Tensor)
    scales = (scale, 1.0) if on_device else (packed, scale)
    by_dtype: dict[torch.dtype, list[tuple[Tensor, int]]] = {}
    for matrix, offset in zip(matrices, packed_offsets(sizes), strict=False):
        if matrix.numel() > 0:
            by_dtype.setdefault(matrix.dtype, []).append((matrix, offset))
    for dtype, pairs in by_dtype.items():
        align = 16 // min(dtype.itemsize, packed.dtype.itemsize)
        options = {"ALIGN": align, "HAS_SCALE": on_device, "PACK": pack, "BLOCK": config.BLOCK}
        rows = [(*_layout(matrix, packed, offset, align, config.BLOCK), offset) for matrix, offset in pairs]
        if is_traced(packed):
            for (matrix, _), (n, *strides, wide, offset) in zip(pairs, rows, strict=True):
                wrap_triton(_matrix_kernel)[(packed_length(triton.cdiv(n, config.BLOCK)),)](
                    *(matrix, packed, scales[0], offset, n, scales[1], *strides),
                    **options,
                    WIDE=wide,
                    num_warps=config.num_warps,
                )
            continue
        table = tuple(
            (matrix.data_ptr(), n, *strides, offset, wide and matrix.data_ptr() % 16 == packed.data_ptr() % 16 == 0)
            for (matrix, _), (n, *strides, wide, offset) in zip(pairs, rows, strict=True)
        )
        counts = tuple(packed_length(triton.cdiv(n, config.BLOCK)) for n, *_ in rows)
        (on_table,) = _tables.get(table, packed.device, lambda table=table: (np.array(table, dtype=np.int64),))
        (items,) = _tables.get(counts, packed.device, lambda counts=counts: (_items(counts),))
        _list_kernel[(sum(counts),)](
            *(on_table, items, packed, *scales),
            **options,
            MATRIX_DTYPE=TRITON_DTYPES[dtype],
            num_warps=config.num_warps,
        )


def symmetric_problem(
    sizes: Sequence[int], dtype: torch.dtype, packed_dtype: torch.dtype, device: torch.device
) -> SymmetricProblem:
    """Describe a launch over matrices of these sizes."""
    return SymmetricProblem(
        max(sizes, default=0), packed_offsets(sizes)[-1], dtype, packed_dtype, device_limits(device)
    )


def _layout(matrix: Tensor, packed: Tensor, offset: int, align: int, block: int) -> tuple[int, int, int, bool]:
    """n, strides, and whether rows begin at multiples of 16 bytes on both sides, if the tensors do."""
    n = matrix.shape[0]
    stride_i, stride_j = matrix.stride()
    wide = n % (2 * align) == stride_i % align == offset % align == block % align == 0 and stride_j == 1
    return n, stride_i, stride_j, wide


def _items(counts: Sequence[int]) -> Table:
    """For each program matrix << 32 | tile."""
    return np.concatenate([np.arange(count, dtype=np.int64) | m << 32 for m, count in enumerate(counts)])


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
def _pack_symmetric_op(
    matrices: list[Tensor],
    dtype: torch.dtype,
    scale: float = 1.0,
    device_scale: Tensor | None = None,
    tables: str = "",
) -> Tensor:
    both = scale if device_scale is None else device_scale
    if use_reference(matrices[0]) or not all(supports(matrix, dtype) for matrix in matrices):
        _check_matrices(matrices)
        return pack_symmetric_reference(matrices, dtype, both)
    return launch_pack_symmetric(matrices, dtype, both)


@triton_op("triton_curv::unpack_symmetric", mutates_args=())
def _unpack_symmetric_op(
    packed: Tensor,
    sizes: list[int],
    dtype: torch.dtype,
    scale: float = 1.0,
    device_scale: Tensor | None = None,
    tables: str = "",
) -> list[Tensor]:
    both = scale if device_scale is None else device_scale
    if use_reference(packed) or not supports(packed, dtype):
        _check_packed(packed, sizes)
        return unpack_symmetric_reference(packed, sizes, dtype, both)
    return launch_unpack_symmetric(packed, sizes, dtype, both)


@triton_op("triton_curv::unpack_symmetric_", mutates_args={"matrices"})
def _unpack_symmetric_into_op(
    matrices: list[Tensor], packed: Tensor, scale: float = 1.0, device_scale: Tensor | None = None, tables: str = ""
) -> None:
    both = scale if device_scale is None else device_scale
    if use_reference(packed) or not all(supports(packed, matrix.dtype) for matrix in matrices):
        _check_matrices(matrices)
        _check_packed(packed, [matrix.shape[0] for matrix in matrices])
        unpack_symmetric_reference_(matrices, packed, both)
    else:
        launch_unpack_symmetric_(matrices, packed, both)


def pack_symmetric(matrices: Sequence[Tensor], dtype: torch.dtype, scale: float | Tensor = 1.0) -> Tensor:
    """`torch.cat([scale * M[tril] for M in matrices]).to(dtype)`, in the order of rectangular full packed storage.

    Args:
        matrices: dense symmetric (n, n), of any sizes, dtypes and strides, on one device; both triangles are read.
        dtype: of the buffer.
        scale: factor on every element, applied in fp32 before the cast; a number or a 0-dim tensor on the device.

    Returns:
        (sum of n (n + 1) / 2,); `packed_offsets` says where each matrix starts.

    Raises:
        UnsupportedInputError: no matrices, or not square, or on several devices; a scale that is not 0-dim.

    """
    if not matrices:
        raise UnsupportedInputError("expected at least one matrix, got none: their device is the buffer's")
    _check_scale(scale)
    if not torch.compiler.is_compiling() and use_reference(matrices[0]):
        _check_matrices(matrices)
        return pack_symmetric_reference(matrices, dtype, scale)
    return torch.ops.triton_curv.pack_symmetric(matrices, dtype, *_scale_arguments(scale), tables_key())


def unpack_symmetric(
    packed: Tensor, sizes: Sequence[int], dtype: torch.dtype, scale: float | Tensor = 1.0
) -> list[Tensor]:
    """Inverse of `pack_symmetric`: dense symmetric (n, n) for each n of `sizes`, times `scale`, in `dtype`.

    Raises:
        UnsupportedInputError: a buffer not contiguous or not of the sizes' length; a scale that is not 0-dim.

    """
    _check_scale(scale)
    if not torch.compiler.is_compiling() and use_reference(packed):
        _check_packed(packed, sizes)
        return unpack_symmetric_reference(packed, sizes, dtype, scale)
    return torch.ops.triton_curv.unpack_symmetric(packed, sizes, dtype, *_scale_arguments(scale), tables_key())


def unpack_symmetric_(matrices: Sequence[Tensor], packed: Tensor, scale: float | Tensor = 1.0) -> None:
    """`unpack_symmetric` into matrices that are there: views of one tensor, say.

    Raises:
        UnsupportedInputError: as `unpack_symmetric`; matrices that are not square or on several devices.

    """
    _check_scale(scale)
    if not torch.compiler.is_compiling() and use_reference(packed):
        _check_matrices(matrices)
        _check_packed(packed, [matrix.shape[0] for matrix in matrices])
        unpack_symmetric_reference_(matrices, packed, scale)
    else:
        torch.ops.triton_curv.unpack_symmetric_(matrices, packed, *_scale_arguments(scale), tables_key())


def _check_scale(scale: float | Tensor) -> None:
    if isinstance(scale, Tensor) and scale.dim() != 0:
        raise UnsupportedInputError(f"expected a number or a 0-dim tensor as scale, got {tuple(scale.shape)}")


def _scale_arguments(scale: float | Tensor) -> tuple[float, Tensor | None]:
    return (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
