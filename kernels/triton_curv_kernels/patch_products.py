# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202
# (Triton's language is untyped)
"""Kernels of `accumulate_patch_factor_` for many channels: each tile lies within one pair of kernel positions.

Block (a, b) of the factor, for kernel positions a >= b, is a sum of x[u + a - b] x[u]^T over pixels u, of which those
that see zeros of the padding on either side are left out: what is left is a box. "implicit" computes each block by
itself, for any stride. "displacement", for stride 1, computes a sum once for each difference a - b, over the pixels
that are in the boxes of all blocks with that difference; what a block has beside those, at the boundary, is computed
in the second kernel, which follows.
"""

import triton
import triton.language as tl

from triton_curv_kernels.patch_pixels import (
    NOT_SPECIALIZED,
    _add_products,
    _seen_by_both,
    _seen_from,
    _seen_from_all,
    _sum_pixels,
)
from triton_curv_kernels.patch_store import _slot_of, _store_block, _store_sums, _tile_of


@triton.jit
def _count_products(
    per_group, kernel_t, kernel_h, kernel_w, ONES: tl.constexpr, DISPLACEMENT: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Of one group: kernel positions, tiles along a block, products, and programs (one a tile, then the ones)."""
    positions = kernel_t * kernel_h * kernel_w
    tiles = tl.maximum(tl.cdiv(per_group, BLOCK_N), 1)
    if DISPLACEMENT:
        products = ((2 * kernel_t - 1) * (2 * kernel_h - 1) * (2 * kernel_w - 1) + 1) // 2
    else:
        products = positions * (positions + 1) // 2
    return positions, tiles, products, products * tiles * tiles + (positions * tiles if ONES else 0)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _products_kernel(
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
    DISPLACEMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """A tile of one product: of a block (a, b), or of the pixels that all blocks with a - b = d have in common."""
    positions, tiles, products, programs = _count_products(
        per_group, kernel_t, kernel_h, kernel_w, ONES, DISPLACEMENT, BLOCK_N
    )
    group = (tl.program_id(0) // programs).to(tl.int64)
    p = tl.program_id(0) % programs
    split = tl.program_id(1)
    first = split * steps_per_split
    factor += group * stride_fb
    input += group * per_group * stride_ic
    in_block = tl.arange(0, BLOCK_N)
    part = workspace + _slot_of(split) * (BLOCK_N * BLOCK_N)
    # from one output position to the next
    out_stride_t, out_stride_h = tl.cast(stride_it, tl.int64) * step_t, tl.cast(stride_ih, tl.int64) * step_h
    out_stride_w = tl.cast(stride_iw, tl.int64) * step_w

    if p < products * tiles * tiles:
        product = p // (tiles * tiles)
        row, column = p // tiles % tiles, p % tiles
        if DISPLACEMENT:
            # the middle of all differences is 0, the others after it are the lexicographically positive ones
            number = product + products - 1
            d_w = number % (2 * kernel_w - 1) - (kernel_w - 1)
            d_h = number // (2 * kernel_w - 1) % (2 * kernel_h - 1) - (kernel_h - 1)
            d_t = number // ((2 * kernel_w - 1) * (2 * kernel_h - 1)) - (kernel_t - 1)
            is_symmetric = product == 0
            u_t, end_t = _seen_from_all(d_t, kernel_t, size_t, out_t, before_t, dilation_t)
            u_h, end_h = _seen_from_all(d_h, kernel_h, size_h, out_h, before_h, dilation_h)
            u_w, end_w = _seen_from_all(d_w, kernel_w, size_w, out_w, before_w, dilation_w)
            box_t, box_h, box_w = end_t - u_t, end_h - u_h, end_w - u_w
        else:
            a, b = _tile_of(product, positions)
            a_w, a_h, a_t = a % kernel_w, a // kernel_w % kernel_h, a // (kernel_w * kernel_h)
            b_w, b_h, b_t = b % kernel_w, b // kernel_w % kernel_h, b // (kernel_w * kernel_h)
            d_t, d_h, d_w = a_t - b_t, a_h - b_h, a_w - b_w
            is_symmetric = a == b
            q_t, end_t = _seen_by_both(a_t, b_t, size_t, out_t, step_t, before_t, dilation_t)
            q_h, end_h = _seen_by_both(a_h, b_h, size_h, out_h, step_h, before_h, dilation_h)
            q_w, end_w = _seen_by_both(a_w, b_w, size_w, out_w, step_w, before_w, dilation_w)
            box_t, box_h, box_w = end_t - q_t, end_h - q_h, end_w - q_w
            u_t = q_t * step_t + b_t * dilation_t - before_t
            u_h = q_h * step_h + b_h * dilation_h - before_h
            u_w = q_w * step_w + b_w * dilation_w - before_w
        if (row >= column) | (is_symmetric == 0):
            j_start = u_t.to(tl.int64) * stride_it + u_h.to(tl.int64) * stride_ih + u_w.to(tl.int64) * stride_iw
            apart = (d_t * dilation_t).to(tl.int64) * stride_it + (d_h * dilation_h).to(tl.int64) * stride_ih
            i_start = j_start + apart + (d_w * dilation_w).to(tl.int64) * stride_iw
            offs_i = row * BLOCK_N + in_block
            offs_j = column * BLOCK_N + in_block
            acc = _add_products(
                tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32),
                input + i_start + offs_i.to(tl.int64) * stride_ic,
                input + j_start + offs_j.to(tl.int64) * stride_ic,
                offs_i < per_group,
                offs_j < per_group,
                samples,
                box_t,
                box_h,
                box_w,
                stride_in,
                out_stride_t,
                out_stride_h,
                out_stride_w,
                first,
                steps_per_split,
                BLOCK_K,
                INPUT_PRECISION,
            )
            if SPLIT:
                tl.store(part + in_block[:, None] * BLOCK_N + in_block[None, :], acc)
            else:
                if DISPLACEMENT:  # all kernel positions b with a b + d
                    b_t, b_h, b_w = tl.maximum(0, -d_t), tl.maximum(0, -d_h), tl.maximum(0, -d_w)
                    blocks_t, blocks_h = kernel_t - tl.abs(d_t), kernel_h - tl.abs(d_h)
                    blocks_w = kernel_w - tl.abs(d_w)
                    b = (b_t * kernel_h + b_h) * kernel_w + b_w
                    difference = (d_t * kernel_h + d_h) * kernel_w + d_w
                    blocks = blocks_t * blocks_h * blocks_w
                else:
                    difference, blocks, blocks_h, blocks_w = a - b, 1, 1, 1
                _store_block(
                    factor, alpha * acc, row, column, per_group, b, difference, blocks, blocks_h, blocks_w, kernel_h,
                    kernel_w, beta, stride_fi, stride_fj, BLOCK_N,
                )  # fmt: skip
    else:
        a = (p - products * tiles * tiles) // tiles
        block = (p - products * tiles * tiles) % tiles
        a_w, a_h, a_t = a % kernel_w, a // kernel_w % kernel_h, a // (kernel_w * kernel_h)
        start_t, stop_t = _seen_by_both(a_t, a_t, size_t, out_t, step_t, before_t, dilation_t)
        start_h, stop_h = _seen_by_both(a_h, a_h, size_h, out_h, step_h, before_h, dilation_h)
        start_w, stop_w = _seen_by_both(a_w, a_w, size_w, out_w, step_w, before_w, dilation_w)
        start = (start_t * step_t + a_t * dilation_t - before_t).to(tl.int64) * stride_it
        start += (start_h * step_h + a_h * dilation_h - before_h).to(tl.int64) * stride_ih
        start += (start_w * step_w + a_w * dilation_w - before_w).to(tl.int64) * stride_iw
        in_group = block * BLOCK_N + in_block
        sums = _sum_pixels(
            input + start + in_group.to(tl.int64) * stride_ic,
            in_group < per_group,
            samples,
            stop_t - start_t,
            stop_h - start_h,
            stop_w - start_w,
            stride_in,
            out_stride_t,
            out_stride_h,
            out_stride_w,
            first,
            steps_per_split,
            BLOCK_N,
            BLOCK_K,
        )
        if SPLIT:
            tl.store(part + in_block, sums)
        else:
            n, rows = positions * per_group, samples * out_t * out_h * out_w
            _store_sums(factor, sums, a, block, n, per_group, rows, alpha, beta, stride_fi, stride_fj, BLOCK_N)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _blocks_kernel(
    # tensors
    input,
    factor,
    workspace,
    # sizes and scales; `items` are the programs of one part of K in the first kernel
    samples,
    per_group,
    alpha,
    beta,
    splits,
    items,
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
    DISPLACEMENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """A tile of block (a, b): partial tiles in their order if SPLIT, and if DISPLACEMENT the pixels that it has alone.

    Without SPLIT the first kernel has stored the rest, with beta: here beta is 1. Then no program writes the ones.
    """
    positions, tiles, products, programs = _count_products(
        per_group, kernel_t, kernel_h, kernel_w, ONES, DISPLACEMENT, BLOCK_N
    )
    pairs = positions * (positions + 1) // 2 * tiles * tiles
    here = pairs + (positions * tiles if ONES and SPLIT else 0)
    group = (tl.program_id(0) // here).to(tl.int64)
    p = tl.program_id(0) % here
    factor += group * stride_fb
    input += group * per_group * stride_ic
    in_block = tl.arange(0, BLOCK_N)

    if p < pairs:
        a, b = _tile_of(p // (tiles * tiles), positions)
        row, column = p // tiles % tiles, p % tiles
        a_w, a_h, a_t = a % kernel_w, a // kernel_w % kernel_h, a // (kernel_w * kernel_h)
        b_w, b_h, b_t = b % kernel_w, b // kernel_w % kernel_h, b // (kernel_w * kernel_h)
        d_t, d_h, d_w = a_t - b_t, a_h - b_h, a_w - b_w
        if (row >= column) | (a != b):
            acc = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
            if SPLIT:
                if DISPLACEMENT:
                    plane = (d_t + kernel_t - 1) * (2 * kernel_h - 1) + d_h + kernel_h - 1
                    product = plane * (2 * kernel_w - 1) + d_w + kernel_w - 1 - (products - 1)
                else:
                    product = p // (tiles * tiles)
                item = group * programs + product * tiles * tiles + row * tiles + column
                for split in range(splits):
                    slot = tl.cast(items, tl.int64) * split + item
                    part = workspace + slot * (BLOCK_N * BLOCK_N)
                    acc += tl.load(part + in_block[:, None] * BLOCK_N + in_block[None, :])
            if DISPLACEMENT:
                core_t, core_end_t = _seen_from_all(d_t, kernel_t, size_t, out_t, before_t, dilation_t)
                core_h, core_end_h = _seen_from_all(d_h, kernel_h, size_h, out_h, before_h, dilation_h)
                core_w, core_end_w = _seen_from_all(d_w, kernel_w, size_w, out_w, before_w, dilation_w)
                all_t, end_t = _seen_from(b_t, d_t, size_t, out_t, before_t, dilation_t)
                all_h, end_h = _seen_from(b_h, d_h, size_h, out_h, before_h, dilation_h)
                all_w, end_w = _seen_from(b_w, d_w, size_w, out_w, before_w, dilation_w)
                offs_i = row * BLOCK_N + in_block
                offs_j = column * BLOCK_N + in_block
                apart = (d_t * dilation_t).to(tl.int64) * stride_it + (d_h * dilation_h).to(tl.int64) * stride_ih
                apart += (d_w * dilation_w).to(tl.int64) * stride_iw
                # around the core: planes before and behind it, then in its planes rows, then in its rows pixels
                for side in range(6):
                    u_t = tl.where(side == 0, all_t, tl.where(side == 1, core_end_t, core_t))
                    v_t = tl.where(side == 0, core_t, tl.where(side == 1, end_t, core_end_t))
                    u_h = tl.where(side <= 2, all_h, tl.where(side == 3, core_end_h, core_h))
                    v_h = tl.where((side <= 1) | (side == 3), end_h, tl.where(side == 2, core_h, core_end_h))
                    u_w = tl.where(side == 5, core_end_w, all_w)
                    v_w = tl.where(side == 4, core_w, end_w)
                    start = u_t.to(tl.int64) * stride_it + u_h.to(tl.int64) * stride_ih + u_w.to(tl.int64) * stride_iw
                    acc = _add_products(
                        acc,
                        input + start + apart + offs_i.to(tl.int64) * stride_ic,
                        input + start + offs_j.to(tl.int64) * stride_ic,
                        offs_i < per_group,
                        offs_j < per_group,
                        samples,
                        tl.maximum(v_t - u_t, 0),
                        tl.maximum(v_h - u_h, 0),
                        tl.maximum(v_w - u_w, 0),
                        stride_in,
                        stride_it,
                        stride_ih,
                        stride_iw,
                        0,
                        2147483647 // BLOCK_K,
                        BLOCK_K,
                        INPUT_PRECISION,
                    )
                alone = (end_t - all_t) * (end_h - all_h) * (end_w - all_w)
                common = (core_end_t - core_t) * (core_end_h - core_h) * (core_end_w - core_w)
                if SPLIT or alone != common:
                    _store_block(
                    factor, alpha * acc, row, column, per_group, b, a - b, 1, 1, 1, kernel_h, kernel_w, beta,
                    stride_fi, stride_fj, BLOCK_N,
                )  # fmt: skip
            else:
                _store_block(
                    factor, alpha * acc, row, column, per_group, b, a - b, 1, 1, 1, kernel_h, kernel_w, beta,
                    stride_fi, stride_fj, BLOCK_N,
                )  # fmt: skip
    else:
        q = p - pairs
        item = group * programs + products * tiles * tiles + q
        sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for split in range(splits):
            slot = tl.cast(items, tl.int64) * split + item
            sums += tl.load(workspace + slot * (BLOCK_N * BLOCK_N) + in_block)
        n, rows = positions * per_group, samples * out_t * out_h * out_w
        _store_sums(factor, sums, q // tiles, q % tiles, n, per_group, rows, alpha, beta, stride_fi, stride_fj, BLOCK_N)
