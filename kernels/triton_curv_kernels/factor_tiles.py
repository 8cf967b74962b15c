# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202
# (Triton's language is untyped)
"""Parts of the kernels of `accumulate_factor_` and `accumulate_factors_`: products of tiles, and where results go.

A factor C is dense, (n', n') of any strides and both triangles, or `PACKED` (see packed.py); n is the number of
columns of the rows, `size` = n' that of C, one more with a border of ones.
"""

import triton
import triton.language as tl

from triton_curv_kernels.packed import offset_in_packed


@triton.jit
def block_pointers(rows, i, stride_k, stride_n, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """X[:BLOCK_K, i:i + BLOCK_N]."""
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_n = (i + tl.arange(0, BLOCK_N)).to(tl.int64)
    return rows + offs_k[:, None] * stride_k + offs_n[None, :] * stride_n


@triton.jit
def multiply_tile(
    rows,
    i,
    j,
    count,
    n,
    stride_k,
    stride_n,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """X[:count, i:i + BLOCK_N]^T X[:count, j:j + BLOCK_N] in fp32.

    A tile on the diagonal loads its columns once: for a factor of one tile, memory is the limit. Not so if fp32 units
    multiply, where a second loop spills registers.
    """
    offs_k = tl.arange(0, BLOCK_K)
    offs_i = i + tl.arange(0, BLOCK_N)
    offs_j = j + tl.arange(0, BLOCK_N)
    j_ptrs = block_pointers(rows, j, stride_k, stride_n, BLOCK_K, BLOCK_N)
    advance = tl.cast(stride_k, tl.int64) * BLOCK_K
    acc = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
    steps = tl.cdiv(count, BLOCK_K).to(tl.int32)
    LOADS_BOUND: tl.constexpr = not (rows.dtype.element_ty == tl.float32 and INPUT_PRECISION == "ieee")
    if LOADS_BOUND and i == j:
        for step in range(0, steps):
            in_k = offs_k[:, None] < count - step * BLOCK_K
            x = tl.load(j_ptrs, mask=in_k & (offs_j[None, :] < n), other=0.0)  # (BLOCK_K, BLOCK_N)
            acc = tl.dot(tl.trans(x), x, acc, input_precision=INPUT_PRECISION)
            j_ptrs += advance
    else:
        i_ptrs = block_pointers(rows, i, stride_k, stride_n, BLOCK_K, BLOCK_N)
        for step in range(0, steps):
            in_k = offs_k[:, None] < count - step * BLOCK_K
            x_i = tl.load(i_ptrs, mask=in_k & (offs_i[None, :] < n), other=0.0)
            x_j = tl.load(j_ptrs, mask=in_k & (offs_j[None, :] < n), other=0.0)
            acc = tl.dot(tl.trans(x_i), x_j, acc, input_precision=INPUT_PRECISION)
            i_ptrs += advance
            j_ptrs += advance
    return acc


@triton.jit
def sum_columns(rows, j, count, n, stride_k, stride_n, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """X[:count, j:j + BLOCK_N].sum(0) in fp32."""
    offs_k = tl.arange(0, BLOCK_K)
    offs_j = j + tl.arange(0, BLOCK_N)
    ptrs = block_pointers(rows, j, stride_k, stride_n, BLOCK_K, BLOCK_N)
    acc = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    for step in range(0, tl.cdiv(count, BLOCK_K).to(tl.int32)):
        mask = (offs_k[:, None] < count - step * BLOCK_K) & (offs_j[None, :] < n)
        acc += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        ptrs += tl.cast(stride_k, tl.int64) * BLOCK_K
    return tl.sum(acc, axis=0)


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Left and right half of the columns."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def store_columns(
    factor,
    value,
    i,
    j,
    mirror,
    n,
    size,
    beta,
    stride_i,
    stride_j,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """C[i:, j:] <- beta C[i:, j:] + value, and the same transposed to C[j:, i:] if `mirror`.

    Packed: what lies on or under the diagonal, columns of the first half as they are, the others transposed.
    """
    if PACKED:
        half = (size + 1) // 2
        even = 1 - size % 2
        base_i = tl.cast(i, tl.int64)
        base_j = tl.cast(j, tl.int64)
        r = tl.arange(0, ROWS)
        c = tl.arange(0, COLUMNS)
        mask = (r[:, None] < n - i) & (c[None, :] - r[:, None] <= i - j)
        if j < half:
            ptrs = factor + (base_i + even) * half + base_j + r[:, None] * half + c[None, :]
            in_first = mask & (c[None, :] < half - j)
            result = value
            if beta != 0.0:
                result += beta * tl.load(ptrs, mask=in_first, other=0.0)
            tl.store(ptrs, result, mask=in_first)
        if j + COLUMNS > half:
            ptrs = factor + (base_j - half) * half + base_i - half + 1 - even + c[:, None] * half + r[None, :]
            in_last = (r[None, :] < n - i) & (c[:, None] - r[None, :] <= i - j) & (c[:, None] >= half - j)
            result = tl.trans(value)
            if beta != 0.0:
                result += beta * tl.load(ptrs, mask=in_last, other=0.0)
            tl.store(ptrs, result, mask=in_last)
    else:
        offs_i = (i + tl.arange(0, ROWS)).to(tl.int64)
        offs_j = (j + tl.arange(0, COLUMNS)).to(tl.int64)
        ptrs = factor + offs_i[:, None] * stride_i + offs_j[None, :] * stride_j
        mask = (offs_i[:, None] < n) & (offs_j[None, :] < n)
        if beta != 0.0:
            value += beta * tl.load(ptrs, mask=mask, other=0.0)
        tl.store(ptrs, value, mask=mask)
        if mirror:
            mirrored_ptrs = factor + offs_j[:, None] * stride_i + offs_i[None, :] * stride_j
            tl.store(mirrored_ptrs, tl.trans(value), mask=(offs_j[:, None] < n) & (offs_i[None, :] < n))


@triton.jit
def store_tile(
    factor, acc, i, j, n, size, alpha, beta, stride_i, stride_j, BLOCK_N: tl.constexpr, PACKED: tl.constexpr
):
    """C[tile] <- beta C[tile] + alpha acc and the same values mirrored; acc of a diagonal tile is made symmetric.

    Large tiles go in parts of 32 columns: the addresses of a whole tile at a time would spill registers.
    """
    in_block = tl.arange(0, BLOCK_N)
    if not PACKED and i == j:
        acc = tl.where(in_block[None, :] <= in_block[:, None], acc, tl.trans(acc))
    value = alpha * acc
    m = i != j
    if BLOCK_N <= 32:
        store_columns(factor, value, i, j, m, n, size, beta, stride_i, stride_j, BLOCK_N, BLOCK_N, PACKED)
    else:
        left, right = _halves(value, BLOCK_N, BLOCK_N)
        if BLOCK_N == 64:
            store_columns(factor, left, i, j, m, n, size, beta, stride_i, stride_j, BLOCK_N, 32, PACKED)
            store_columns(factor, right, i, j + 32, m, n, size, beta, stride_i, stride_j, BLOCK_N, 32, PACKED)
        else:
            tl.static_assert(BLOCK_N == 128)
            first, second = _halves(left, BLOCK_N, 64)
            third, fourth = _halves(right, BLOCK_N, 64)
            store_columns(factor, first, i, j, m, n, size, beta, stride_i, stride_j, BLOCK_N, 32, PACKED)
            store_columns(factor, second, i, j + 32, m, n, size, beta, stride_i, stride_j, BLOCK_N, 32, PACKED)
            store_columns(factor, third, i, j + 64, m, n, size, beta, stride_i, stride_j, BLOCK_N, 32, PACKED)
            store_columns(factor, fourth, i, j + 96, m, n, size, beta, stride_i, stride_j, BLOCK_N, 32, PACKED)


@triton.jit
def store_border(factor, sums, j, n, k, alpha, beta, stride_i, stride_j, BLOCK_N: tl.constexpr, PACKED: tl.constexpr):
    """Row and column n of C from column sums of the rows; block 0 also writes the corner, sum of ones * ones = k."""
    offs = (j + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask = offs < n
    end = tl.cast(n, tl.int64)
    if PACKED:
        row_ptrs = factor + offset_in_packed(end, offs, end + 1)
        corner_ptr = factor + offset_in_packed(end, end, end + 1)
    else:
        row_ptrs = factor + end * stride_i + offs * stride_j
        corner_ptr = factor + end * stride_i + end * stride_j
    value = alpha * sums
    if beta != 0.0:
        value += beta * tl.load(row_ptrs, mask=mask, other=0.0)
    tl.store(row_ptrs, value, mask=mask)
    if not PACKED:
        tl.store(factor + offs * stride_i + end * stride_j, value, mask=mask)
    if j == 0:
        corner = alpha * k
        if beta != 0.0:
            corner += beta * tl.load(corner_ptr)
        tl.store(corner_ptr, corner)
