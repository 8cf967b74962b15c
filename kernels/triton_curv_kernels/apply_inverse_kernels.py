# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202
# (Triton's language is untyped)
"""The kernels of `apply_damped_inverse`: T^T = A^-1 D^T and P = G^-1 T for all layers, one launch each, then the sums.

Tables (see apply_inverse_work.py) say which program does which tile of which matrix. Both products have the form
left right^T with both read along rows, which TF32 tensor cores require: hence T is stored transposed, and A^-1 is taken
to be symmetric.
"""

import triton
import triton.language as tl

from triton_curv_kernels.apply_inverse_work import PAIR, SMALL
from triton_curv_kernels.apply_inverse_work import SMALL_BLOCK as _SMALL_BLOCK

_PAIR = tl.constexpr(PAIR)
_SMALL = tl.constexpr(SMALL)
_BLOCK_SMALL = tl.constexpr(_SMALL_BLOCK)


@triton.jit
def _at(base, matrix, COLUMN: tl.constexpr, FLAT: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer that an entry of the table stands for: an element of `base`, or an address of its dtype."""
    where = tl.load(matrix + COLUMN)
    pointer = base + where if FLAT else where.to(tl.pointer_type(base.dtype.element_ty))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _size(matrix, COLUMN: tl.constexpr, ALIGNED: tl.constexpr):
    """A size or a stride of rows, a multiple of ALIGNED elements, which is 16 bytes, or of none if that is 0."""
    value = tl.load(matrix + COLUMN)
    if ALIGNED:
        value = tl.multiple_of(value, ALIGNED)
    return value


@triton.jit
def _multiply(
    left,
    right,
    matrix,
    i,
    j,
    rows,
    columns,
    LENGTH: tl.constexpr,
    STRIDE_LEFT: tl.constexpr,
    STRIDE_RIGHT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(left right^T)[i:, j:] of left (rows, length) and right (columns, length); aligned rows are read by vectors.

    Length and strides are columns of the table.
    """
    length = _size(matrix, LENGTH, ALIGNED)
    stride_left = _size(matrix, STRIDE_LEFT, ALIGNED)
    stride_right = _size(matrix, STRIDE_RIGHT, ALIGNED)
    offs_i = i + tl.arange(0, BLOCK)
    offs_j = j + tl.arange(0, BLOCK)
    offs_k = tl.arange(0, BLOCK_K)
    left_ptrs = left + offs_i.to(tl.int64)[:, None] * stride_left + offs_k[None, :]
    right_ptrs = right + offs_j.to(tl.int64)[:, None] * stride_right + offs_k[None, :]
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for k in range(0, length, BLOCK_K):
        in_length = offs_k[None, :] < length - k
        x = tl.load(left_ptrs, mask=(offs_i[:, None] < rows) & in_length, other=0.0)
        y = tl.load(right_ptrs, mask=(offs_j[:, None] < columns) & in_length, other=0.0)
        acc = tl.dot(x, tl.trans(y), acc, input_precision=PRECISION)
        left_ptrs += BLOCK_K
        right_ptrs += BLOCK_K
    return acc


@triton.jit
def _apply_small(matrix, updates, grads, inverse_G, first, count, sums, place, FLAT: tl.constexpr):
    """P = F^-1 D of `count` small matrices, one to a lane."""
    lane = tl.arange(0, _BLOCK_SMALL)
    b = first + lane
    mask = lane < count
    grad = _at(grads, matrix, 0, FLAT, 0) + b * tl.load(matrix + 13)
    inverse = _at(inverse_G, matrix, 2, FLAT, 0) + b * tl.load(matrix + 14)
    update = _at(updates, matrix, 3, FLAT, 0) + b * tl.load(matrix + 15)
    rows, columns = tl.load(matrix + 5).to(tl.int32), tl.load(matrix + 6).to(tl.int32)
    stride_d, stride_g, stride_p = tl.load(matrix + 7), tl.load(matrix + 9), tl.load(matrix + 10)
    product = tl.zeros((_BLOCK_SMALL,), dtype=tl.float32)
    square = tl.zeros((_BLOCK_SMALL,), dtype=tl.float32)
    for i in range(0, rows):
        for j in range(0, columns):
            value = tl.zeros((_BLOCK_SMALL,), dtype=tl.float32)
            for k in range(0, rows):
                f = tl.load(inverse + i * stride_g + k, mask=mask, other=0.0).to(tl.float32)
                value += f * tl.load(grad + k * stride_d + j, mask=mask, other=0.0).to(tl.float32)
            product += value * tl.load(grad + i * stride_d + j, mask=mask, other=0.0).to(tl.float32)
            square += value * value
            tl.store(update + i * stride_p + j, value.to(updates.dtype.element_ty), mask=mask)
    tl.store(sums + place * 2, tl.sum(product))
    tl.store(sums + place * 2 + 1, tl.sum(square))


@triton.jit
def _store_transposed(matrix, transposed, value, i, j, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """T^T[i:, j:] = value."""
    out = transposed + tl.multiple_of(tl.load(matrix + 4), 16)
    rows = _size(matrix, 5, ALIGNED)
    offs_i = i + tl.arange(0, BLOCK)
    offs_j = j + tl.arange(0, BLOCK)
    mask = (offs_i[:, None] < tl.load(matrix + 6)) & (offs_j[None, :] < rows)
    tl.store(out + offs_i[:, None] * rows + offs_j[None, :], value.to(transposed.dtype.element_ty), mask=mask)


@triton.jit
def _transform_tile(
    matrix,
    grads,
    inverse_A,
    transposed,
    i,
    j,
    FLAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(A^-1 D^T)[i:, j:]."""
    left = _at(inverse_A, matrix, 1, FLAT, ALIGNED)
    right = _at(grads, matrix, 0, FLAT, ALIGNED)
    rows, columns = tl.load(matrix + 5), tl.load(matrix + 6)
    acc = _multiply(left, right, matrix, i, j, columns, rows, 6, 8, 7, ALIGNED, BLOCK, BLOCK_K, PRECISION)
    _store_transposed(matrix, transposed, acc, i, j, ALIGNED, BLOCK)


@triton.jit
def first_kernel(
    # tables
    matrices,
    programs,
    # tensors, or what stands for them
    updates,
    grads,
    inverse_A,
    inverse_G,
    transposed,
    sums,
    # configuration
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """T^T = A^-1 D^T; of a single factor T^T = D^T, and small single factors are applied whole."""
    VECTOR: tl.constexpr = 128 // grads.dtype.element_ty.primitive_bitwidth
    program = programs + tl.program_id(0) * 4
    matrix = matrices + tl.load(program) * 16
    i = tl.load(program + 1)
    j = tl.load(program + 2)
    kind = tl.load(matrix + 12)
    if kind == _SMALL:
        _apply_small(matrix, updates, grads, inverse_G, i, j, sums, tl.load(program + 3), FLAT)
    elif kind == _PAIR:
        if tl.load(matrix + 11) != 0:
            _transform_tile(matrix, grads, inverse_A, transposed, i, j, FLAT, VECTOR, BLOCK, BLOCK_K, PRECISION)
        else:
            _transform_tile(matrix, grads, inverse_A, transposed, i, j, FLAT, 0, BLOCK, BLOCK_K, PRECISION)
    else:
        rows, columns, stride_d = tl.load(matrix + 5), tl.load(matrix + 6), tl.load(matrix + 7)
        offs_i = i + tl.arange(0, BLOCK)
        offs_j = j + tl.arange(0, BLOCK)
        in_grad = offs_j[:, None] * stride_d + offs_i[None, :]
        mask = (offs_j[:, None] < rows) & (offs_i[None, :] < columns)
        tile = tl.load(_at(grads, matrix, 0, FLAT, 0) + in_grad, mask=mask, other=0.0)
        _store_transposed(matrix, transposed, tl.trans(tile), i, j, 0, BLOCK)


@triton.jit
def _update_tile(
    matrix,
    updates,
    grads,
    inverse_G,
    transposed,
    sums,
    place,
    i,
    j,
    FLAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """P[i:, j:] = (G^-1 T)[i:, j:] and the sums of this tile."""
    left = _at(inverse_G, matrix, 2, FLAT, ALIGNED)
    right = transposed + tl.multiple_of(tl.load(matrix + 4), 16)
    rows, columns = tl.load(matrix + 5), tl.load(matrix + 6)
    acc = _multiply(left, right, matrix, i, j, rows, columns, 5, 9, 5, ALIGNED, BLOCK, BLOCK_K, PRECISION)
    offs_i = i + tl.arange(0, BLOCK)
    offs_j = j + tl.arange(0, BLOCK)
    mask = (offs_i[:, None] < rows) & (offs_j[None, :] < _size(matrix, 6, ALIGNED))
    in_grad = offs_i[:, None] * _size(matrix, 7, ALIGNED) + offs_j[None, :]
    in_update = offs_i[:, None] * _size(matrix, 10, ALIGNED) + offs_j[None, :]
    d = tl.load(_at(grads, matrix, 0, FLAT, ALIGNED) + in_grad, mask=mask, other=0.0).to(tl.float32)
    tl.store(_at(updates, matrix, 3, FLAT, ALIGNED) + in_update, acc.to(updates.dtype.element_ty), mask=mask)
    # one sum over the flat tile: Triton 3.7 fails to compile two, one after another, of a bf16 product for sm_100
    tl.store(sums + place * 2, tl.sum(acc * d))
    tl.store(sums + place * 2 + 1, tl.sum(acc * acc))


@triton.jit
def second_kernel(
    # tables
    matrices,
    programs,
    # tensors, or what stands for them
    updates,
    grads,
    inverse_G,
    transposed,
    sums,
    # configuration
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """P = G^-1 T, and the sums of each tile."""
    VECTOR: tl.constexpr = 128 // grads.dtype.element_ty.primitive_bitwidth
    program = programs + tl.program_id(0) * 4
    matrix = matrices + tl.load(program) * 16
    i = tl.multiple_of(tl.load(program + 1), BLOCK)
    j = tl.multiple_of(tl.load(program + 2), BLOCK)
    place = tl.load(program + 3)
    tensors = (updates, grads, inverse_G, transposed, sums)
    if tl.load(matrix + 11) != 0:
        _update_tile(matrix, *tensors, place, i, j, FLAT, VECTOR, BLOCK, BLOCK_K, PRECISION)
    else:
        _update_tile(matrix, *tensors, place, i, j, FLAT, 0, BLOCK, BLOCK_K, PRECISION)


@triton.jit
def finish_kernel(
    # tables
    layers,
    layer_of,
    # inputs
    sums,
    kl_clip,
    lr,
    num_sums,
    stride_lr,
    # results
    products,
    squares,
    clip,
    BLOCK: tl.constexpr,
):
    """Sums of each layer, one program each, in a fixed order; the last program makes the KL clip from all of them."""
    layer = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    if layer < tl.num_programs(0) - 1:
        first = tl.load(layers + layer)
        last = tl.load(layers + layer + 1)
        product = tl.zeros((BLOCK,), dtype=tl.float32)
        square = tl.zeros((BLOCK,), dtype=tl.float32)
        for here in range(first, last, BLOCK):
            in_layer = here + offs < last
            product += tl.load(sums + (here + offs) * 2, mask=in_layer, other=0.0)
            square += tl.load(sums + (here + offs) * 2 + 1, mask=in_layer, other=0.0)
        tl.store(products + layer, tl.sum(product))
        tl.store(squares + layer, tl.sum(square))
    else:
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, num_sums, BLOCK):
            mask = start + offs < num_sums
            at = tl.load(layer_of + start + offs, mask=mask, other=0)
            rate = tl.load(lr + at * stride_lr, mask=mask, other=0.0).to(tl.float32)
            total += rate * rate * tl.load(sums + (start + offs) * 2, mask=mask, other=0.0)
        decrease = tl.sum(total)
        decrease = tl.where(decrease < 1e-30, 1e-30, decrease)  # a NaN passes, here and below
        factor = tl.sqrt(tl.load(kl_clip).to(tl.float32) / decrease)
        tl.store(clip, tl.where(factor > 1.0, 1.0, factor))
