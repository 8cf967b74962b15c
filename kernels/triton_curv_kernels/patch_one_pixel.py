# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202
# (Triton's language is untyped)
"""Kernel of `accumulate_patch_factor_` for a kernel of one pixel, read where it lies: pixels are neighbours in memory.

Factor A of such a convolution is a sum of x x^T over pixels, whose patches would be a copy of the input: no part of it
is copied. K runs over rows of pixels that are evenly apart, all pixels of a sample if the stride is 1, and within each
by steps of BLOCK_K. Tiles, their parts of K and the second kernel are those of factor.py.
"""

import triton
import triton.language as tl

from triton_curv_kernels.factor import _count_programs
from triton_curv_kernels.factor_tiles import store_border, store_tile
from triton_curv_kernels.packed import tile_of
from triton_curv_kernels.patch_store import _slot_of


@triton.jit
def _place_of(step, steps, pixels, size_1, size_2, stride_0, stride_1, stride_2, stride_ip, BLOCK_K: tl.constexpr):
    """Where step number `step` begins in memory, and how many pixels are left in its row."""
    row = step // steps
    first = (step - row * steps) * BLOCK_K
    plane = row // size_2
    offset = (plane // size_1).to(tl.int64) * stride_0 + (plane % size_1).to(tl.int64) * stride_1
    return offset + (row % size_2).to(tl.int64) * stride_2 + first.to(tl.int64) * stride_ip, pixels - first


@triton.jit(do_not_specialize=["rows", "size_1", "size_2", "pixels", "steps_per_split", "stride_0", "stride_fb"])
def _pixels_kernel(
    # tensors; the workspace, used if SPLIT, has room for a tile for each program
    input,
    factor,
    workspace,
    # rows of pixels, which are (rows / size_1 / size_2, size_1, size_2), pixels of each, channels; scales
    rows,
    size_1,
    size_2,
    pixels,
    per_group,
    alpha,
    beta,
    steps_per_split,
    # strides
    stride_0,
    stride_1,
    stride_2,
    stride_ip,
    stride_ic,
    stride_fb,
    stride_fi,
    stride_fj,
    # configuration; ALIGN: pixels are neighbours, rows and channels multiples of so many elements long and apart, or 1
    ONES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """A tile of sum x x^T, or column sums, over a part of all pixels."""
    tiles, triangle, programs = _count_programs(per_group, ONES, BLOCK_N)
    group = (tl.program_id(0) // programs).to(tl.int64)
    p = tl.program_id(0) % programs
    split = tl.program_id(1)
    if ALIGN > 1:  # says it to the compiler
        pixels = pixels // ALIGN * ALIGN
        stride_0, stride_1 = stride_0 // ALIGN * ALIGN, stride_1 // ALIGN * ALIGN
        stride_2, stride_ic = stride_2 // ALIGN * ALIGN, stride_ic // ALIGN * ALIGN
    steps = tl.cdiv(pixels, BLOCK_K)
    first = split * steps_per_split
    last = tl.minimum(first + steps_per_split, rows * steps)
    factor += group * stride_fb
    input += group * per_group * stride_ic
    in_block = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    in_memory = offs_k.to(tl.int64)[None, :] * stride_ip
    part = workspace + _slot_of(split) * (BLOCK_N * BLOCK_N)
    LOADS_BOUND: tl.constexpr = not (input.dtype.element_ty == tl.float32 and INPUT_PRECISION == "ieee")

    if p < triangle:
        row, column = tile_of(p, tiles)
        i, j = row * BLOCK_N, column * BLOCK_N
        offs_i, offs_j = i + in_block, j + in_block
        i_ptrs = input + offs_i.to(tl.int64)[:, None] * stride_ic + in_memory
        acc = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
        if LOADS_BOUND and i == j:
            for step in range(first, last):
                at, left = _place_of(
                    step, steps, pixels, size_1, size_2, stride_0, stride_1, stride_2, stride_ip, BLOCK_K
                )
                x = tl.load(i_ptrs + at, mask=(offs_i[:, None] < per_group) & (offs_k[None, :] < left), other=0.0)
                acc = tl.dot(x, tl.trans(x), acc, input_precision=INPUT_PRECISION)  # x (BLOCK_N, BLOCK_K)
        else:
            j_ptrs = input + offs_j.to(tl.int64)[:, None] * stride_ic + in_memory
            for step in range(first, last):
                at, left = _place_of(
                    step, steps, pixels, size_1, size_2, stride_0, stride_1, stride_2, stride_ip, BLOCK_K
                )
                in_row = offs_k[None, :] < left
                x_i = tl.load(i_ptrs + at, mask=(offs_i[:, None] < per_group) & in_row, other=0.0)
                x_j = tl.load(j_ptrs + at, mask=(offs_j[:, None] < per_group) & in_row, other=0.0)
                acc = tl.dot(x_i, tl.trans(x_j), acc, input_precision=INPUT_PRECISION)
        if SPLIT:
            tl.store(part + in_block[:, None] * BLOCK_N + in_block[None, :], acc)
        else:
            size = per_group + (1 if ONES else 0)
            store_tile(factor, acc, i, j, per_group, size, alpha, beta, stride_fi, stride_fj, BLOCK_N, False)
    else:
        j = (p - triangle) * BLOCK_N
        offs_j = j + in_block
        j_ptrs = input + offs_j.to(tl.int64)[:, None] * stride_ic + in_memory
        columns = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        for step in range(first, last):
            at, left = _place_of(step, steps, pixels, size_1, size_2, stride_0, stride_1, stride_2, stride_ip, BLOCK_K)
            mask = (offs_j[:, None] < per_group) & (offs_k[None, :] < left)
            columns += tl.load(j_ptrs + at, mask=mask, other=0.0).to(tl.float32)
        sums = tl.sum(columns, axis=1)
        if SPLIT:
            tl.store(part + in_block, sums)
        else:
            k = tl.cast(rows, tl.int64) * pixels
            store_border(factor, sums, j, per_group, k, alpha, beta, stride_fi, stride_fj, BLOCK_N, False)
