"""`accumulate_patch_factor_` in plain torch, without ever holding the patches of a whole batch.

`by_pixels`, for a kernel of one pixel, multiplies the pixels where they lie. Two other ways go over a few samples at a
time, in channels-last memory of the factor's dtype. `by_displacement`, for
stride 1: with zeros between rows and between images, a displacement between pixels is a distance between rows of one
(pixels, channels) matrix. So one product of matrices for each displacement d of kernel positions gives
S_d = sum_u x[u + d] x[u]^T, over all u: block (o + d, o) of the factor, but for the patches that the convolution does
not visit, near the boundary. Those are taken away, patches of one border row (and so on) at a time; they have few
columns that are not zero. `by_patches`, for all others: patches of a few samples.

Memory beside the factor: by pixels less than 5 % of what `unfold` takes, which for a kernel of one pixel is a copy of
the input (nothing for an fp32 input in either layout, and otherwise a row of pixels at least). By patches 2.5 % of all
patches, 4 MiB at least, and half as much for the image they come from. By displacement 2 MiB of the image, a product
of channels for each displacement, and as much again for what is added to the factor in the end.

Source: own derivation (block (i, j) of a patch covariance depends on j - i but for the boundary).
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from triton_curv_kernels.factor import accumulate_factor_reference
from triton_curv_kernels.patch_config import COPY_SHARE
from triton_curv_kernels.patch_geometry import PatchGeometry, displacements

SCRATCH = 1 << 19  # elements of the image that `by_displacement` holds at a time
PATCH_SCRATCH = 1 << 20, 1 << 22  # elements of patches that `by_patches` holds at a time, at least and at most


def accumulate_patch_factor_reference(
    factor: Tensor, input: Tensor, geometry: PatchGeometry, alpha: float = 1.0, beta: float = 1.0, ones: bool = False
) -> None:
    """`factor.mul_(beta).add_(P.mT @ P, alpha=alpha)` with the patches P of a zero-padded convolution, never whole.

    factor (groups, n', n'); input (samples, channels, *spatial). The faster of two ways by `prefers_displacement`.
    """
    per_group = input.shape[1] // factor.shape[0]
    if geometry.sees_pixels:
        by_pixels(factor, input, geometry, alpha, beta, ones)
    elif prefers_displacement(geometry, input.shape[0], per_group, factor.shape[0]):
        by_displacement(factor, input, geometry, alpha, beta, ones)
    else:
        by_patches(factor, input, geometry, alpha, beta, ones)


@lru_cache(maxsize=256)
def prefers_displacement(geometry: PatchGeometry, samples: int, per_group: int, groups: int) -> bool:
    """Whether one product a displacement takes at most 0.7 of the time of patches, by an estimate.

    Its constants are measured on one CPU thread: 70 GFLOP/s in large products, half of that at 16 columns; 1.6e9
    elements of patches written a second; 60 us for each set of unvisited patches, 10 us for each other call.
    """
    if any(s != 1 for s in geometry.stride) or geometry.kernel_positions == 1 or per_group < 16:
        return False

    def product_time(rows: int, n: int) -> float:
        return groups * rows * n * (2 * n / (70e9 * n / (n + 16)) + 1 / 1.6e9)

    rows, n = samples * geometry.positions, geometry.kernel_positions * per_group
    patches = product_time(rows, n)
    pixels = samples * prod(size + gap for size, gap in zip(geometry.sizes, geometry.gaps, strict=True))
    chunks = 1 + pixels * per_group * groups // SCRATCH
    calls = len(displacements(geometry.kernel))
    displaced = groups * calls * pixels * 2 * per_group * (per_group + 16) / 70e9
    displaced += (calls * chunks + geometry.kernel_positions) * 10e-6
    for starts in _unvisited_sets(geometry):
        count, offsets = prod(s.places for s in starts), prod(s.offsets for s in starts)
        displaced += product_time(samples * count, offsets * per_group) + chunks * 60e-6
        if displaced > 0.7 * patches:
            return False
    return displaced <= 0.7 * patches


def by_pixels(factor: Tensor, input: Tensor, geometry: PatchGeometry, alpha: float, beta: float, ones: bool) -> None:
    """factor (groups, n', n') <- beta factor + alpha sum over pixels of x x^T: for a kernel of one pixel.

    Pixels or channels that are neighbours in memory are multiplied where they are; others, and other dtypes than the
    factor's, are copied in parts of COPY_SHARE of the patches or one row of pixels.
    """
    groups, samples, channels = factor.shape[0], input.shape[0], input.shape[1]
    n = channels // groups
    reach = zip(geometry.outputs, geometry.stride, strict=True)
    every = slice(None)
    seen = input[(every, every, *(slice(0, (out - 1) * step + 1, step) for out, step in reach))]
    core, left = factor[:, :n, :n], beta
    sums = factor.new_zeros(channels)
    for rows in _rows_of_pixels(seen, factor):
        if ones:
            sums += rows.sum(-1) if rows.dim() == 2 else rows.sum((0, 2))
        if groups == 1 and rows.dim() == 3:
            core[0].addbmm_(rows, rows.mT, beta=left, alpha=alpha)
        elif groups == 1:
            accumulate_factor_reference(core[0], rows.mT, alpha, left)
        else:
            for each in rows if rows.dim() == 3 else [rows]:
                of_group = each.unflatten(0, (groups, n))
                core.baddbmm_(of_group, of_group.mT, beta=left, alpha=alpha)
                left = 1.0
        left = 1.0
    if samples == 0:
        core.mul_(beta) if beta != 0.0 else core.zero_()
    if not ones:
        return
    border = factor[:, n, :]
    if beta == 0.0:
        border.zero_()  # 0 * NaN is not 0
    elif beta != 1.0:
        border.mul_(beta)
    border[:, :n].add_(sums.view(groups, n), alpha=alpha)
    border[:, n].add_(alpha * samples * geometry.positions)
    factor[:, :n, n].copy_(border[:, :n])


def _rows_of_pixels(seen: Tensor, factor: Tensor) -> Iterator[Tensor]:
    """All pixels of (samples, channels, *spatial), as (channels, pixels) or (samples, channels, pixels).

    They are views where layout and dtype allow it, else copies of a part.
    """
    samples, channels, positions = seen.shape[0], seen.shape[1], prod(seen.shape[2:])
    if seen.numel() == 0:
        return
    if seen.dtype == factor.dtype:
        whole = _as_view(seen.movedim(1, -1), samples * positions, channels)
        view = _as_view(seen, samples, channels, positions) if whole is None else whole.mT
        if view is not None:
            yield view
            return
    most = COPY_SHARE * samples * positions * seen.dtype.itemsize / factor.dtype.itemsize  # pixels of a part
    together = max(1, int(most / positions))
    lines = seen.shape[2] if most >= positions else max(1, int(most * seen.shape[2] / positions))
    buffer = factor.new_empty(min(together, samples) * lines * prod(seen.shape[3:]) * channels)
    for some in seen.split(together):
        for part in some.split(lines, dim=2):
            copy = buffer[: part.numel()].view(part.shape[0], *part.shape[2:], channels).copy_(part.movedim(1, -1))
            yield copy.view(-1, channels).mT  # to be used before the next


def _as_view(tensor: Tensor, *shape: int) -> Tensor | None:
    """`tensor.view(shape)`, or None where that needs a copy."""
    try:
        return tensor.view(shape)
    except RuntimeError:
        return None


def by_patches(
    factor: Tensor,
    input: Tensor,
    geometry: PatchGeometry,
    alpha: float,
    beta: float,
    ones: bool,
    scratch: int | None = None,
) -> None:
    """factor (groups, n', n') <- beta factor + alpha P^T P with the patches P of few samples at a time.

    If it can, it takes the 4 n rows at a time from which on `accumulate_factor_reference` uses the symmetry.
    """
    channels = input.shape[1]
    groups = factor.shape[0]
    per_group = channels // groups
    before, kernel = geometry.before, geometry.kernel
    padded = [
        max(size + start, (out - 1) * s + gap + 1)
        for size, start, out, s, gap in zip(
            geometry.sizes, before, geometry.outputs, geometry.stride, geometry.gaps, strict=True
        )
    ]
    inside = tuple(slice(start, start + size) for start, size in zip(before, geometry.sizes, strict=True))
    row = geometry.kernel_positions * per_group
    if scratch is None:
        share = int(COPY_SHARE * input.shape[0] * geometry.positions * row * groups)
        scratch = min(max(PATCH_SCRATCH[0], 4 * groups * row**2), PATCH_SCRATCH[1], max(PATCH_SCRATCH[0], share))
    at_once = max(1, scratch // max(1, geometry.positions * row * groups))
    for some in input.split(at_once):
        image = some.movedim(1, -1)
        if padded == list(geometry.sizes):
            image = image.to(factor.dtype).contiguous()
        else:
            image = factor.new_zeros(some.shape[0], *padded, channels)
            image[(slice(None), *inside)] = some.movedim(1, -1)
        strides = image.stride()
        view = image.as_strided(
            (groups, some.shape[0], *geometry.outputs, *kernel, per_group),
            (
                per_group,
                strides[0],
                *(step * s for step, s in zip(strides[1:-1], geometry.stride, strict=True)),
                *(step * d for step, d in zip(strides[1:-1], geometry.dilation, strict=True)),
                1,
            ),
        )
        rows = view.reshape(groups, some.shape[0] * geometry.positions, row)
        if groups == 1:
            accumulate_factor_reference(factor[0], rows[0], alpha, beta, ones)
        else:
            accumulate_factor_reference(factor, rows, alpha, beta, ones)
        beta = 1.0


def by_displacement(
    factor: Tensor,
    input: Tensor,
    geometry: PatchGeometry,
    alpha: float,
    beta: float,
    ones: bool,
    scratch: int = SCRATCH,
) -> None:
    """factor (groups, n', n') <- beta factor + alpha P^T P from one product a displacement; stride 1 only."""
    samples, channels = input.shape[:2]
    groups = factor.shape[0]
    per_group = channels // groups
    kernel, gaps = geometry.kernel, geometry.gaps
    n = geometry.kernel_positions * per_group
    if beta == 0.0:
        factor.zero_()  # 0 * NaN is not 0
    elif beta != 1.0:
        factor.mul_(beta)
    core = factor[:, :n, :n]

    apart = [size + gap for size, gap in zip(geometry.sizes, gaps, strict=True)]
    row_strides = [prod(apart[i + 1 :]) for i in range(len(apart))]  # rows from pixel to pixel along a dimension
    lead = sum(gap * step for gap, step in zip(gaps, row_strides, strict=True))
    inside = (slice(None), *(slice(size) for size in geometry.sizes))
    moves = displacements(kernel)
    distances = [
        sum(m * d * step for m, d, step in zip(move, geometry.dilation, row_strides, strict=True)) for move in moves
    ]
    products = factor.new_zeros(len(moves), groups, per_group, per_group)
    seen = factor.new_zeros(*geometry.sizes, channels) if ones else None
    at_once = max(1, scratch // max(1, prod(apart) * channels))
    for some in input.split(at_once):
        pixels = some.shape[0] * prod(apart)
        memory = factor.new_zeros(lead + pixels + lead, channels)
        image = memory[lead : lead + pixels].view(-1, *apart, channels)[inside]
        image.copy_(some.movedim(1, -1))
        rows = memory.view(-1, groups, per_group)
        here = rows[lead : lead + pixels].transpose(0, 1)
        for distance, total in zip(distances, products, strict=True):
            there = rows[lead + distance : lead + distance + pixels].transpose(0, 1)
            if groups == 1:
                total[0].addmm_(there[0].mT, here[0])
            else:
                total.baddbmm_(there.mT, here)
        _take_unvisited_away(core, memory, lead, some.shape[0], row_strides, geometry, alpha)
        if seen is not None:
            seen.add_(image.sum(0))

    blocks = torch.cat([products, products[1:].mT])
    which = _displacement_of_pairs(kernel, factor.device)
    split = core.unflatten(2, (-1, per_group)).unflatten(1, (-1, per_group))
    for position, others in enumerate(which):
        split[:, position].add_(blocks[others].permute(1, 2, 0, 3), alpha=alpha)
    if seen is not None:
        _add_ones(factor, seen, samples, geometry, alpha)


def _take_unvisited_away(
    core: Tensor,
    memory: Tensor,
    lead: int,
    samples: int,
    row_strides: list[int],
    geometry: PatchGeometry,
    alpha: float,
) -> None:
    """core -= alpha P^T P over all patches that touch the image where the convolution does not go.

    Inclusion and exclusion: along each dimension a patch starts anywhere, or at one given unvisited place; an odd
    number of given places is subtracted, an even one added back.
    """
    groups, channels = core.shape[0], memory.shape[1]
    per_group = channels // groups
    dims = range(len(row_strides))
    view = core.unflatten(2, (*geometry.kernel, per_group)).unflatten(1, (*geometry.kernel, per_group))
    per_sample = channels * row_strides[0] * (geometry.sizes[0] + geometry.gaps[0])
    for starts in _unvisited_sets(geometry):
        first = lead + sum((s.first + s.offset * geometry.dilation[i]) * row_strides[i] for i, s in enumerate(starts))
        patches = memory.as_strided(
            (groups, samples, *(s.places for s in starts), *(s.offsets for s in starts), per_group),
            (
                per_group,
                per_sample,
                *(channels * row_strides[i] for i in dims),
                *(channels * row_strides[i] * geometry.dilation[i] for i in dims),
                1,
            ),
            first * channels,
        )
        columns = prod(s.offsets for s in starts) * per_group
        rows = patches.reshape(groups, -1, columns)
        part = rows.mT @ rows
        window = tuple(slice(s.offset, s.offset + s.offsets) for s in starts)
        shape = (*(s.offsets for s in starts), per_group)
        view[(slice(None), *window, slice(None), *window)].add_(
            part.unflatten(2, shape).unflatten(1, shape), alpha=-alpha if sum(s.given for s in starts) % 2 else alpha
        )


class _Starts(NamedTuple):
    """`places` patch starts from `first` on, and the kernel positions from `offset` on that touch the image there."""

    first: int
    places: int
    offset: int
    offsets: int
    given: bool  # one given place; else all there are


@lru_cache(maxsize=256)
def _unvisited_sets(geometry: PatchGeometry) -> list[tuple[_Starts, ...]]:
    """Starts along each dimension, given in one of them or more."""
    every = zip(geometry.gaps, geometry.sizes, geometry.kernel, strict=True)
    anywhere = [_Starts(-gap, gap + size, 0, k, False) for gap, size, k in every]
    choices = ([some, *_unvisited(geometry, i)] for i, some in enumerate(anywhere))
    return [starts for starts in product(*choices) if any(s.given for s in starts)]


def _unvisited(geometry: PatchGeometry, i: int) -> Iterator[_Starts]:
    """Starts along dimension i from which a patch touches the image and at which the convolution has no output."""
    size, gap, before, d = geometry.sizes[i], geometry.gaps[i], geometry.before[i], geometry.dilation[i]
    for start in (*range(-gap, min(-before, size)), *range(max(geometry.outputs[i] - before, -gap), size)):
        first = max(0, -(start // d))
        last = min(geometry.kernel[i] - 1, (size - 1 - start) // d)
        if first <= last:
            yield _Starts(start, 1, first, last - first + 1, True)


@lru_cache(maxsize=64)
def _numbers_of_pairs(kernel: tuple[int, ...]) -> list[list[int]]:
    moves = displacements(kernel)
    number = {move: i for i, move in enumerate(moves)}
    for i, move in enumerate(moves[1:]):
        number[tuple(-m for m in move)] = len(moves) + i
    positions = list(product(*map(range, kernel)))
    return [[number[tuple(a - b for a, b in zip(p, q, strict=True))] for q in positions] for p in positions]


def _displacement_of_pairs(kernel: tuple[int, ...], device: torch.device) -> Tensor:
    """Which product (those of `displacements`, then all but the first transposed) block (p, q) of the factor is."""
    return torch.tensor(_numbers_of_pairs(kernel), device=device)


def _add_ones(factor: Tensor, seen: Tensor, samples: int, geometry: PatchGeometry, alpha: float) -> None:
    """Add the last row and column: sums of each patch column, from the image `seen` summed over samples."""
    groups, n = factor.shape[0], factor.shape[1] - 1
    sums = []
    for position in product(*map(range, geometry.kernel)):
        window = []
        for i, offset in enumerate(position):
            start = offset * geometry.dilation[i] - geometry.before[i]
            window.append(slice(max(0, start), max(0, start + geometry.outputs[i])))
        sums.append(seen[tuple(window)].sum(tuple(range(len(window)))))
    border = torch.stack(sums).view(len(sums), groups, -1).transpose(0, 1).reshape(groups, n)
    factor[:, n, :n].add_(border, alpha=alpha)
    factor[:, n, n].add_(alpha * samples * geometry.positions)
    factor[:, :n, n].copy_(factor[:, n, :n])
