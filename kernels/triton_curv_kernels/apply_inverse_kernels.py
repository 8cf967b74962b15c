# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202
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
def _at(base, where, FLAT: tl.constexpr):
    """The pointer that a table's entry stands for: an element of `base`, or an address of its dtype."""
    if FLAT:
        pointer = base + where
    else:
        pointer = where.to(tl.pointer_type(base.dtype.element_ty))
    return pointer


@triton.jit
def _multiply(
    left,
    right,
    i,
    j,
    rows,
    columns,
    length,
    stride_left,
    stride_right,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(left right^T)[i:, j:] of left (rows, length) and right (columns, length); aligned rows are read by vectors."""
    if ALIGNED:
        left = tl.multiple_of(left, 16)
        right = tl.multiple_of(right, 16)
        stride_left = tl.multiple_of(stride_left, 8)
        stride_right = tl.multiple_of(stride_right, 8)
        length = tl.multiple_of(length, 8)
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
    grad = _at(grads, tl.load(matrix), FLAT) + b * tl.load(matrix + 13)
    inverse = _at(inverse_G, tl.load(matrix + 2), FLAT) + b * tl.load(matrix + 14)
    update = _at(updates, tl.load(matrix + 3), FLAT) + b * tl.load(matrix + 15)
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
    program = programs + tl.program_id(0) * 4
    matrix = matrices + tl.load(program) * 16
    i = tl.load(program + 1)
    j = tl.load(program + 2)
    kind = tl.load(matrix + 12)
    if kind == _SMALL:
        _apply_small(matrix, updates, grads, inverse_G, i, j, sums, tl.load(program + 3), FLAT)
    else:
        grad = _at(grads, tl.load(matrix), FLAT)
        out = transposed + tl.load(matrix + 4)
        rows, columns = tl.load(matrix + 5), tl.load(matrix + 6)
        stride_d = tl.load(matrix + 7)
        offs_i = i + tl.arange(0, BLOCK)
        offs_j = j + tl.arange(0, BLOCK)
        mask = (offs_i[:, None] < columns) & (offs_j[None, :] < rows)
        out_ptrs = out + offs_i[:, None] * rows + offs_j[None, :]
        if kind == _PAIR:
            left = _at(inverse_A, tl.load(matrix + 1), FLAT)
            stride_a = tl.load(matrix + 8)
            if tl.load(matrix + 11) != 0:
                acc = _multiply(
                    left, grad, i, j, columns, rows, columns, stride_a, stride_d, True, BLOCK, BLOCK_K, PRECISION
                )
                tl.store(out_ptrs, acc.to(transposed.dtype.element_ty), mask=mask)
            else:
                acc = _multiply(
                    left, grad, i, j, columns, rows, columns, stride_a, stride_d, False, BLOCK, BLOCK_K, PRECISION
                )
                tl.store(out_ptrs, acc.to(transposed.dtype.element_ty), mask=mask)
        else:
            in_grad = offs_j[:, None] * stride_d + offs_i[None, :]
            tile = tl.load(grad + in_grad, mask=(offs_j[:, None] < rows) & (offs_i[None, :] < columns), other=0.0)
            tl.store(out_ptrs, tl.trans(tile).to(transposed.dtype.element_ty), mask=mask)


@triton.jit
def _finish_tile(acc, updates, update, grad, i, j, rows, columns, stride_p, stride_d, sums, place, BLOCK: tl.constexpr):
    """Write P and this tile's sums."""
    offs_i = i + tl.arange(0, BLOCK)
    offs_j = j + tl.arange(0, BLOCK)
    mask = (offs_i[:, None] < rows) & (offs_j[None, :] < columns)
    d = tl.load(grad + offs_i[:, None] * stride_d + offs_j[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(update + offs_i[:, None] * stride_p + offs_j[None, :], acc.to(updates.dtype.element_ty), mask=mask)
    tl.store(sums + place * 2, tl.sum(tl.sum(acc * d, axis=1), axis=0))
    tl.store(sums + place * 2 + 1, tl.sum(tl.sum(acc * acc, axis=1), axis=0))


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
    program = programs + tl.program_id(0) * 4
    matrix = matrices + tl.load(program) * 16
    i = tl.load(program + 1)
    j = tl.load(program + 2)
    place = tl.load(program + 3)
    grad = _at(grads, tl.load(matrix), FLAT)
    left = _at(inverse_G, tl.load(matrix + 2), FLAT)
    update = _at(updates, tl.load(matrix + 3), FLAT)
    right = transposed + tl.load(matrix + 4)
    rows, columns = tl.load(matrix + 5), tl.load(matrix + 6)
    stride_d, stride_g, stride_p = tl.load(matrix + 7), tl.load(matrix + 9), tl.load(matrix + 10)
    if tl.load(matrix + 11) != 0:
        acc = _multiply(left, right, i, j, rows, columns, rows, stride_g, rows, True, BLOCK, BLOCK_K, PRECISION)
        _finish_tile(acc, updates, update, grad, i, j, rows, columns, stride_p, stride_d, sums, place, BLOCK)
    else:
        acc = _multiply(left, right, i, j, rows, columns, rows, stride_g, rows, False, BLOCK, BLOCK_K, PRECISION)
        _finish_tile(acc, updates, update, grad, i, j, rows, columns, stride_p, stride_d, sums, place, BLOCK)


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
    """Sums of each layer, one program each, in a fixed order; the last program finishes the KL clip from all of them."""
    layer = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    if layer < tl.num_programs(0) - 1:
        first = tl.load(layers + layer)
        last = tl.load(layers + layer + 1)
        product = tl.zeros((BLOCK,), dtype=tl.float32)
        square = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(first, last, BLOCK):
            mask = start + offs < last
            product += tl.load(sums + (start + offs) * 2, mask=mask, other=0.0)
            square += tl.load(sums + (start + offs) * 2 + 1, mask=mask, other=0.0)
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
