# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202
# (Triton's language is untyped)
"""Device functions that walk over the pixels of a box, in all samples, and multiply or add their channels."""

import triton
import triton.language as tl

GEOMETRY = [
    f"{name}_{dim}" for name in ("size", "out", "kernel", "step", "before", "dilation") for dim in ("t", "h", "w")
]
NOT_SPECIALIZED = [*GEOMETRY, "samples", "steps_per_split", "splits", "items", "stride_fb"]
"""Arguments that are not worth a compilation of their own."""


@triton.jit
def _seen_by_both(a, b, size, out, step, before, dilation):
    """Output positions [first, last) along a dimension at which kernel positions a and b both see the image."""
    low, high = tl.minimum(a, b), tl.maximum(a, b)
    first = tl.cdiv(tl.maximum(before - low * dilation, 0), step)
    last = tl.minimum(out, tl.cdiv(tl.maximum(size + before - high * dilation, 0), step))
    return first, tl.maximum(first, last)


@triton.jit
def _seen_from(b, d, size, out, before, dilation):
    """Pixels [first, last) that kernel position b sees while b + d sees the image, too; stride 1."""
    low = tl.maximum(0, -d * dilation)
    high = tl.maximum(low, tl.minimum(size, size - d * dilation))
    start = b * dilation - before
    return tl.minimum(tl.maximum(start, low), high), tl.minimum(tl.maximum(start + out, low), high)


@triton.jit
def _seen_from_all(d, kernel, size, out, before, dilation):
    """Pixels [first, last) that `_seen_from` gives for all kernel positions b with a b + d."""
    first, _ = _seen_from(kernel - 1 - tl.maximum(0, d), d, size, out, before, dilation)
    _, last = _seen_from(tl.maximum(0, -d), d, size, out, before, dilation)
    return first, tl.maximum(first, last)


@triton.jit
def _first_pixels(first, box_t, box_h, box_w, stride_n, stride_t, stride_h, stride_w, BLOCK_K: tl.constexpr):
    """Place in the box and offset in memory of BLOCK_K pixels, from number first * BLOCK_K on."""
    pixel = first * BLOCK_K + tl.arange(0, BLOCK_K)
    w = pixel % box_w
    row = pixel // box_w
    h = row % box_h
    plane = row // box_h
    t = plane % box_t
    sample = (plane // box_t).to(tl.int64)
    offset = sample * stride_n + t.to(tl.int64) * stride_t + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w
    return t, h, w, offset


@triton.jit
def _next_pixels(t, h, w, offset, box_t, box_h, box_w, stride_n, stride_t, stride_h, stride_w, BLOCK_K: tl.constexpr):
    """The same BLOCK_K pixels later, without a division by a vector."""
    stride_n, stride_t = tl.cast(stride_n, tl.int64), tl.cast(stride_t, tl.int64)
    stride_h, stride_w = tl.cast(stride_h, tl.int64), tl.cast(stride_w, tl.int64)
    rows = BLOCK_K // box_w
    planes = rows // box_h
    move = (planes // box_t) * stride_n + (planes % box_t) * stride_t
    offset += move + (rows % box_h) * stride_h + (BLOCK_K % box_w) * stride_w
    w += BLOCK_K % box_w
    over = w >= box_w
    w = tl.where(over, w - box_w, w)
    offset += tl.where(over, stride_h - box_w * stride_w, 0)
    h += rows % box_h + over.to(tl.int32)
    over = h >= box_h
    h = tl.where(over, h - box_h, h)
    offset += tl.where(over, stride_t - box_h * stride_h, 0)
    t += planes % box_t + over.to(tl.int32)
    over = t >= box_t
    t = tl.where(over, t - box_t, t)
    offset += tl.where(over, stride_n - box_t * stride_t, 0)
    return t, h, w, offset


@triton.jit
def _add_products(
    acc,
    # pointers to the channels of the first pixel, and which of them there are
    i_ptrs,
    j_ptrs,
    mask_i,
    mask_j,
    # pixels in the box, distances between them, and the part of them
    samples,
    box_t,
    box_h,
    box_w,
    stride_n,
    stride_t,
    stride_h,
    stride_w,
    first,
    steps,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """acc + sum of x_i x_j^T over the pixels of a box, from step `first` on and for `steps` steps at most."""
    total = samples * box_t * box_h * box_w
    last = tl.minimum(first + steps, tl.cdiv(total, BLOCK_K))
    box_t, box_h, box_w = tl.maximum(box_t, 1), tl.maximum(box_h, 1), tl.maximum(box_w, 1)
    t, h, w, offset = _first_pixels(first, box_t, box_h, box_w, stride_n, stride_t, stride_h, stride_w, BLOCK_K)
    offs_k = tl.arange(0, BLOCK_K)
    for step in range(first, last):
        there = offs_k[:, None] < total - step * BLOCK_K
        x_i = tl.load(i_ptrs[None, :] + offset[:, None], mask=there & mask_i[None, :], other=0.0)  # (BLOCK_K, BLOCK_N)
        x_j = tl.load(j_ptrs[None, :] + offset[:, None], mask=there & mask_j[None, :], other=0.0)
        acc = tl.dot(tl.trans(x_i), x_j, acc, input_precision=INPUT_PRECISION)
        t, h, w, offset = _next_pixels(
            t, h, w, offset, box_t, box_h, box_w, stride_n, stride_t, stride_h, stride_w, BLOCK_K
        )
    return acc


@triton.jit
def _sum_pixels(
    ptrs,
    mask_j,
    # pixels in the box, distances between them, and the part of them
    samples,
    box_t,
    box_h,
    box_w,
    stride_n,
    stride_t,
    stride_h,
    stride_w,
    first,
    steps,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sum of x over the pixels that `_add_products` takes."""
    total = samples * box_t * box_h * box_w
    last = tl.minimum(first + steps, tl.cdiv(total, BLOCK_K))
    box_t, box_h, box_w = tl.maximum(box_t, 1), tl.maximum(box_h, 1), tl.maximum(box_w, 1)
    t, h, w, offset = _first_pixels(first, box_t, box_h, box_w, stride_n, stride_t, stride_h, stride_w, BLOCK_K)
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    for step in range(first, last):
        mask = (offs_k[:, None] < total - step * BLOCK_K) & mask_j[None, :]
        acc += tl.load(ptrs[None, :] + offset[:, None], mask=mask, other=0.0).to(tl.float32)
        t, h, w, offset = _next_pixels(
            t, h, w, offset, box_t, box_h, box_w, stride_n, stride_t, stride_h, stride_w, BLOCK_K
        )
    return tl.sum(acc, axis=0)
