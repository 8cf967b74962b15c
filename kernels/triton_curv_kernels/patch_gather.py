# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202
# (Triton's language is untyped)
"""Kernel of `accumulate_patch_factor_` for few channels: tiles go across kernel positions, elements come one by one."""

import triton
import triton.language as tl

from triton_curv_kernels.patch_pixels import NOT_SPECIALIZED, _first_pixels, _next_pixels
from triton_curv_kernels.patch_store import _slot_of, _store_block, _store_sums, _tile_of


@triton.jit
def _count_programs(n, ONES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of one group: rows of tiles, tiles in the lower triangle, programs (one a tile, then the ones)."""
    tiles = tl.cdiv(n, BLOCK_N)
    triangle = tiles * (tiles + 1) // 2
    return tiles, triangle, triangle + (tl.maximum(tiles, 1) if ONES else 0)


@triton.jit
def _store_tile(factor, value, row, column, n, beta, stride_i, stride_j, BLOCK_N: tl.constexpr):
    """C <- beta C + value at tile (row, column) and at its mirror image: the whole factor as one block."""
    _store_block(factor, value, row, column, n, 0, 0, 1, 1, 1, 1, 1, beta, stride_i, stride_j, BLOCK_N)


@triton.jit
def _patch_columns(
    column,
    per_group,
    kernel_h,
    kernel_w,
    before_t,
    before_h,
    before_w,
    dilation_t,
    dilation_h,
    dilation_w,
    stride_ic,
    stride_it,
    stride_ih,
    stride_iw,
):
    """Of elements of a patch: where they lie from the output position's pixel on, and how far in memory."""
    channel, position = column % per_group, column // per_group
    t = position // (kernel_w * kernel_h) * dilation_t - before_t
    h = position // kernel_w % kernel_h * dilation_h - before_h
    w = position % kernel_w * dilation_w - before_w
    offset = channel.to(tl.int64) * stride_ic + t.to(tl.int64) * stride_it + h.to(tl.int64) * stride_ih
    return t, h, w, offset + w.to(tl.int64) * stride_iw


@triton.jit
def _is_inside(pixel, column, size):
    """(pixels, columns): whether a patch element lies in the image along a dimension."""
    place = pixel[:, None] + column[None, :]
    return place.to(tl.uint32, bitcast=True) < tl.cast(size, tl.uint32)  # a negative one becomes large


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _gather_kernel(
    # tensors; the workspace, used if SPLIT, has room for a tile for each program
    input,
    factor,
    workspace,
    # sizes and scales
    samples,
    per_group,
    alpha,
    beta,
    steps_per_split,
    size_t,
    size_h,
    size_w,
    out_t,
    out_h,
    out_w,
    kernel_t,
    kernel_h,
    kernel_w,
    step_t,
    step_h,
    step_w,
    before_t,
    before_h,
    before_w,
    dilation_t,
    dilation_h,
    dilation_w,
    # strides
    stride_in,
    stride_ic,
    stride_it,
    stride_ih,
    stride_iw,
    stride_fb,
    stride_fi,
    stride_fj,
    # configuration
    ONES: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """A tile of P^T P, or column sums of P, with the elements of P fetched one by one; the rest is as in factor.py."""
    n, rows = kernel_t * kernel_h * kernel_w * per_group, samples * out_t * out_h * out_w
    tiles, triangle, programs = _count_programs(n, ONES, BLOCK_N)
    group = (tl.program_id(0) // programs).to(tl.int64)
    p = tl.program_id(0) % programs
    split = tl.program_id(1)
    first = split * steps_per_split
    last = tl.minimum(first + steps_per_split, tl.cdiv(rows, BLOCK_K))
    factor += group * stride_fb
    input += group * per_group * stride_ic
    in_block = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    part = workspace + _slot_of(split) * (BLOCK_N * BLOCK_N)
    out_stride_t, out_stride_h = tl.cast(stride_it, tl.int64) * step_t, tl.cast(stride_ih, tl.int64) * step_h
    out_stride_w = tl.cast(stride_iw, tl.int64) * step_w
    t, h, w, offset = _first_pixels(
        first, out_t, out_h, out_w, stride_in, out_stride_t, out_stride_h, out_stride_w, BLOCK_K
    )

    if p < triangle:
        row, column = _tile_of(p, tiles)
    else:
        row, column = p - triangle, p - triangle
    offs_i = row * BLOCK_N + in_block
    offs_j = column * BLOCK_N + in_block
    i_t, i_h, i_w, i_offset = _patch_columns(
        offs_i,
        per_group,
        kernel_h,
        kernel_w,
        before_t,
        before_h,
        before_w,
        dilation_t,
        dilation_h,
        dilation_w,
        stride_ic,
        stride_it,
        stride_ih,
        stride_iw,
    )
    if p < triangle:
        j_t, j_h, j_w, j_offset = _patch_columns(
            offs_j,
            per_group,
            kernel_h,
            kernel_w,
            before_t,
            before_h,
            before_w,
            dilation_t,
            dilation_h,
            dilation_w,
            stride_ic,
            stride_it,
            stride_ih,
            stride_iw,
        )
        acc = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
        for step in range(first, last):
            there = offs_k[:, None] < rows - step * BLOCK_K
            mask_i = there & (offs_i[None, :] < n) & _is_inside(w * step_w, i_w, size_w)
            mask_j = there & (offs_j[None, :] < n) & _is_inside(w * step_w, j_w, size_w)
            if DIMS > 1:
                mask_i = mask_i & _is_inside(h * step_h, i_h, size_h)
                mask_j = mask_j & _is_inside(h * step_h, j_h, size_h)
            if DIMS > 2:
                mask_i = mask_i & _is_inside(t * step_t, i_t, size_t)
                mask_j = mask_j & _is_inside(t * step_t, j_t, size_t)
            x_i = tl.load(input + (offset[:, None] + i_offset[None, :]), mask=mask_i, other=0.0)  # (BLOCK_K, BLOCK_N)
            x_j = tl.load(input + (offset[:, None] + j_offset[None, :]), mask=mask_j, other=0.0)
            acc = tl.dot(tl.trans(x_i), x_j, acc, input_precision=INPUT_PRECISION)
            t, h, w, offset = _next_pixels(
                t, h, w, offset, out_t, out_h, out_w, stride_in, out_stride_t, out_stride_h, out_stride_w, BLOCK_K
            )
        if SPLIT:
            tl.store(part + in_block[:, None] * BLOCK_N + in_block[None, :], acc)
        else:
            _store_tile(factor, alpha * acc, row, column, n, beta, stride_fi, stride_fj, BLOCK_N)
    else:
        column_acc = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
        for step in range(first, last):
            mask = (offs_k[:, None] < rows - step * BLOCK_K) & (offs_i[None, :] < n)
            mask = mask & _is_inside(w * step_w, i_w, size_w) & _is_inside(h * step_h, i_h, size_h)
            mask = mask & _is_inside(t * step_t, i_t, size_t)
            x = tl.load(input + (offset[:, None] + i_offset[None, :]), mask=mask, other=0.0)
            column_acc += x.to(tl.float32)
            t, h, w, offset = _next_pixels(
                t, h, w, offset, out_t, out_h, out_w, stride_in, out_stride_t, out_stride_h, out_stride_w, BLOCK_K
            )
        sums = tl.sum(column_acc, axis=0)
        if SPLIT:
            tl.store(part + in_block, sums)
        else:
            _store_sums(factor, sums, 0, p - triangle, n, n, rows, alpha, beta, stride_fi, stride_fj, BLOCK_N)


@triton.jit(do_not_specialize=["rows", "splits", "stride_fb"])
def _finish_gather_kernel(
    # tensors
    factor,
    workspace,
    # sizes and scales
    rows,
    n,
    alpha,
    beta,
    splits,
    # strides
    stride_fb,
    stride_fi,
    stride_fj,
    # configuration
    ONES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the partial tiles (or column sums) of all parts of K, in their order, and store."""
    tiles, triangle, programs = _count_programs(n, ONES, BLOCK_N)
    p = tl.program_id(0) % programs
    factor += (tl.program_id(0) // programs).to(tl.int64) * stride_fb
    in_block = tl.arange(0, BLOCK_N)

    if p < triangle:
        row, column = _tile_of(p, tiles)
        acc = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
        for split in range(splits):
            part = workspace + _slot_of(split) * (BLOCK_N * BLOCK_N)
            acc += tl.load(part + in_block[:, None] * BLOCK_N + in_block[None, :])
        _store_tile(factor, alpha * acc, row, column, n, beta, stride_fi, stride_fj, BLOCK_N)
    else:
        sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for split in range(splits):
            sums += tl.load(workspace + _slot_of(split) * (BLOCK_N * BLOCK_N) + in_block)
        _store_sums(factor, sums, 0, p - triangle, n, n, rows, alpha, beta, stride_fi, stride_fj, BLOCK_N)
