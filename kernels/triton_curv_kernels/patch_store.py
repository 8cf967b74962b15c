# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202
# (Triton's language is untyped)
"""Device functions that write a tile of a block (a, b) of a patch factor, for kernel positions a and b, or its ones."""

import triton
import triton.language as tl


@triton.jit
def _tile_of(p, tiles):
    """Tile (row, column), row >= column, number p of a triangle of `tiles` rows, as in factor.py."""
    pair = p // (tiles + 1)
    j = p % (tiles + 1)
    is_long = j < tiles - pair
    row = tl.where(is_long, tiles - 1 - pair, pair)
    column = tl.where(is_long, j, j - (tiles - pair))
    return row, column


@triton.jit
def _slot_of(split):
    """The program's place in the workspace, in tiles."""
    return tl.num_programs(0).to(tl.int64) * split + tl.program_id(0)


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Left and right half of the columns."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _store_columns(
    factor,
    value,
    # of the part in its block, and of what there is of it
    row,
    column,
    per_group,
    # blocks
    b,
    difference,
    blocks,
    blocks_h,
    blocks_w,
    kernel_h,
    kernel_w,
    mirror,
    beta,
    stride_i,
    stride_j,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`_store_block` of ROWS x COLUMNS elements that begin at (row, column) of the block."""
    in_i = row + tl.arange(0, ROWS)
    in_j = column + tl.arange(0, COLUMNS)
    mask_i, mask_j = in_i < per_group, in_j < per_group
    for number in range(blocks):
        here = b + number // (blocks_h * blocks_w) * kernel_h * kernel_w
        here += number // blocks_w % blocks_h * kernel_w + number % blocks_w
        offs_i = ((here + difference) * per_group + in_i).to(tl.int64)
        offs_j = (here * per_group + in_j).to(tl.int64)
        ptrs = factor + offs_i[:, None] * stride_i + offs_j[None, :] * stride_j
        mask = mask_i[:, None] & mask_j[None, :]
        result = value
        if beta != 0.0:
            result += beta * tl.load(ptrs, mask=mask, other=0.0)
        tl.store(ptrs, result, mask=mask)
        if mirror:
            mirrored_ptrs = factor + offs_j[:, None] * stride_i + offs_i[None, :] * stride_j
            tl.store(mirrored_ptrs, tl.trans(result), mask=mask_j[:, None] & mask_i[None, :])


@triton.jit
def _store_block(
    factor,
    value,
    # which tile, in which blocks
    row,
    column,
    per_group,
    b,
    difference,
    blocks,
    blocks_h,
    blocks_w,
    kernel_h,
    kernel_w,
    beta,
    stride_i,
    stride_j,
    BLOCK_N: tl.constexpr,
):
    """C <- beta C + value at tile (row, column) of the blocks (b + difference, b), and transposed at the mirror image.

    There are `blocks` of them, b and its neighbours in a box whose sides along h and w are blocks_h and blocks_w. What
    lies on the diagonal is made symmetric instead of mirrored. Large tiles go in parts of 32 columns: the addresses of
    a whole tile at a time, and a copy of it transposed, would spill registers.
    """
    mirror = (difference != 0) | (row != column)
    if not mirror:
        in_block = tl.arange(0, BLOCK_N)
        value = tl.where(in_block[None, :] <= in_block[:, None], value, tl.trans(value))
    i, j = row * BLOCK_N, column * BLOCK_N
    if BLOCK_N <= 32:
        _store_columns(
            factor, value, i, j, per_group, b, difference, blocks, blocks_h, blocks_w, kernel_h, kernel_w, mirror,
            beta, stride_i, stride_j, BLOCK_N, BLOCK_N,
        )  # fmt: skip
    else:
        left, right = _halves(value, BLOCK_N, BLOCK_N)
        for half in tl.static_range(2):
            part = left if half == 0 else right
            if BLOCK_N == 64:
                _store_columns(
                    factor, part, i, j + 32 * half, per_group, b, difference, blocks, blocks_h, blocks_w, kernel_h,
                    kernel_w, mirror, beta, stride_i, stride_j, BLOCK_N, 32,
                )  # fmt: skip
            else:
                tl.static_assert(BLOCK_N == 128)
                first, second = _halves(part, BLOCK_N, 64)
                for quarter in tl.static_range(2):
                    _store_columns(
                        factor, first if quarter == 0 else second, i, j + 64 * half + 32 * quarter, per_group, b,
                        difference, blocks, blocks_h, blocks_w, kernel_h, kernel_w, mirror, beta, stride_i, stride_j,
                        BLOCK_N, 32,
                    )  # fmt: skip


@triton.jit
def _store_sums(factor, sums, a, block, n, per_group, rows, alpha, beta, stride_i, stride_j, BLOCK_N: tl.constexpr):
    """Row and column n of C at a block of channels of kernel position a; the first also writes the corner."""
    in_group = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = in_group < per_group
    offs = (a * per_group + in_group).to(tl.int64)
    end = tl.cast(n, tl.int64)
    row_ptrs = factor + end * stride_i + offs * stride_j
    value = alpha * sums
    if beta != 0.0:
        value += beta * tl.load(row_ptrs, mask=mask, other=0.0)
    tl.store(row_ptrs, value, mask=mask)
    tl.store(factor + offs * stride_i + end * stride_j, value, mask=mask)
    if (a == 0) & (block == 0):
        corner_ptr = factor + end * stride_i + end * stride_j
        corner = alpha * rows
        if beta != 0.0:
            corner += beta * tl.load(corner_ptr)
        tl.store(corner_ptr, corner)
