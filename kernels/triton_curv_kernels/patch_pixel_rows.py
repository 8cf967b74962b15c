"""Convolutions with a kernel of one pixel, whose patches are pixels: launches of factor.py, or over rows of pixels."""

from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from triton_curv_kernels.backend import device_limits, on_own_device, wrap_triton
from triton_curv_kernels.choice import choose_once, with_hints
from triton_curv_kernels.factor import _finish_kernel, compiled_precision, launch_accumulate_factor_
from triton_curv_kernels.factor_config import SPLITS, FactorConfig, FactorProblem, default_config
from triton_curv_kernels.patch_config import RATES, WORKSPACE_SHARE
from triton_curv_kernels.patch_geometry import PatchGeometry
from triton_curv_kernels.patch_one_pixel import _pixels_kernel


class PixelRows(NamedTuple):
    """Pixels that a kernel of one pixel sees: `sizes` of three dimensions of rows and the pixels of each; strides."""

    sizes: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]

    def is_aligned(self, input: Tensor) -> bool:
        """Whether pixels of a row are neighbours, and rows and channels multiples of 16 bytes long and apart."""
        wide = 16 // input.dtype.itemsize
        apart = (*self.strides[:3], self.sizes[3], input.stride(1))
        return self.strides[3] == 1 and all(number % wide == 0 for number in apart)


def takes_pixels(input: Tensor, geometry: PatchGeometry, groups: int) -> bool:
    """Whether `launch_pixels_` is for it: not if channels are neighbours but pixels no matrix, which others read."""
    if not geometry.sees_pixels:
        return False
    others = input.stride(1) == 1 or input.shape[1] == groups
    return not others or pixel_matrix(input, geometry, groups) is not None


def pixel_matrix(input: Tensor, geometry: PatchGeometry, groups: int) -> Tensor | None:
    """(pixels, channels) without a copy, if patches are pixels, all of them, that follow one another in memory."""
    if groups > 1 or not geometry.sees_pixels or geometry.outputs != geometry.sizes:
        return None
    pixels = input.movedim(1, -1)
    sizes, strides = pixels.shape[:-1], pixels.stride()[:-1]
    if any(strides[i] != strides[i + 1] * sizes[i + 1] for i in range(len(sizes) - 1)):
        return None
    return pixels.flatten(0, -2)


def pixel_rows(input: Tensor, geometry: PatchGeometry) -> PixelRows:
    """The fewest rows that hold all of them: a sample each if the stride is 1 and they are in order."""
    steps = [stride * step for stride, step in zip(input.stride()[2:], geometry.stride, strict=True)]
    axes = [(int(input.shape[0]), input.stride(0)), *zip(geometry.outputs, steps, strict=True)]
    merged = [axes[0]]
    for size, stride in axes[1:]:
        outer, outer_stride = merged[-1]
        if size == 1 or outer_stride == stride * size or outer == 1:
            last = (outer, outer_stride) if size == 1 else (outer * size, stride)
            merged[-1] = last
        else:
            merged.append((size, stride))
    merged = [(1, 0)] * (4 - len(merged)) + merged
    sizes, strides = zip(*merged, strict=True)
    return PixelRows(sizes, strides)


def pixel_problem(input: Tensor, geometry: PatchGeometry, groups: int, ones: bool) -> FactorProblem:
    """The problem of `accumulate_factor_` that a launch over pixels is."""
    if (matrix := pixel_matrix(input, geometry, groups)) is not None:
        return FactorProblem.of(matrix, ones)
    rows = pixel_rows(input, geometry)
    n, limits = int(input.shape[1]) // groups, device_limits(input.device)
    return FactorProblem(groups, prod(rows.sizes), n, input.dtype, ones, rows.is_aligned(input), limits)


def programs_of(config: FactorConfig, problem: FactorProblem) -> int:
    """Programs of one part of K."""
    tiles = triton.cdiv(problem.n, config.BLOCK_N)
    return int(problem.batch * (tiles * (tiles + 1) // 2 + (max(tiles, 1) if problem.ones else 0)))


def workspace_bytes(config: FactorConfig, problem: FactorProblem) -> int:
    """Of fp32 tiles, if K is split."""
    return 4 * config.SPLIT_K * programs_of(config, problem) * config.BLOCK_N**2 if config.SPLIT_K > 1 else 0


@lru_cache(maxsize=1024)
def within_memory(config: FactorConfig, problem: FactorProblem) -> FactorConfig:
    """`config`, or if its workspace takes 5 % of the pixels the fastest with less, by an estimate: smaller tiles."""
    pixel_bytes = problem.batch * problem.k * problem.n * problem.dtype.itemsize
    most = WORKSPACE_SHARE * pixel_bytes
    if config.SPLIT_K == 1 or workspace_bytes(config, problem) < most:
        return config
    fp32, hip = problem.dtype == torch.float32, problem.limits.platform == "hip"
    num_stages = 2 if hip or fp32 else 3
    candidates = [
        FactorConfig(block_n, 16 if fp32 else 32 if block_n == 16 else 64, split_k, num_warps, num_stages)
        for block_n, num_warps in ((16, 1), (32, 4), (64, 4 if problem.aligned else 8))
        for split_k in SPLITS
        if block_n <= max(16, triton.next_power_of_2(problem.n)) and (split_k == 1 or 512 * split_k <= problem.k)
    ]
    return min((c for c in candidates if workspace_bytes(c, problem) < most or c.SPLIT_K == 1), key=_duration(problem))


def _duration(problem: FactorProblem) -> Callable[[FactorConfig], float]:
    """Waves of programs, weighted by their length: see patch_config."""

    def of(config: FactorConfig) -> float:
        split = config.SPLIT_K
        waves = triton.cdiv(programs_of(config, problem) * split, problem.limits.multiprocessors)
        length = problem.k / split * config.BLOCK_N**2 / RATES[config.BLOCK_N]
        return float(waves * length * (1 + 0.02 * split + 0.1 * (split > 1)))

    return of


@on_own_device
def launch_pixels_(
    factor: Tensor, input: Tensor, geometry: PatchGeometry, alpha: float, beta: float, ones: bool
) -> None:
    """`accumulate_patch_factor_` if patches are pixels, without a copy of any layout; factor (groups, n', n')."""
    groups = factor.shape[0]
    call = ("pixels", input.shape, input.stride(), input.dtype, input.device, groups, geometry, ones)
    problem = with_hints(pixel_problem(input, geometry, groups, ones))
    chosen = choose_once("accumulate_factor_", call, lambda: problem, default_config)
    config = within_memory(chosen, problem)
    if (matrix := pixel_matrix(input, geometry, groups)) is not None:
        launch_accumulate_factor_(factor.select(0, 0), matrix, alpha, beta, ones, config)
        return
    rows, block, n = pixel_rows(input, geometry), config.BLOCK_N, problem.n
    programs, count = programs_of(config, problem), prod(rows.sizes[:3])
    steps = count * triton.cdiv(rows.sizes[3], config.BLOCK_K)
    steps_per_split = max(1, triton.cdiv(steps, config.SPLIT_K))
    splits = max(1, triton.cdiv(steps, steps_per_split))
    workspace = input.new_empty(splits * programs * block**2, dtype=torch.float32) if splits > 1 else factor
    tiling = {"ONES": ones, "BLOCK_N": block, "num_warps": config.num_warps}
    wrap_triton(_pixels_kernel)[(programs, splits)](
        *(input, factor, workspace, count, *rows.sizes[1:], n, alpha, beta, steps_per_split),
        *(*rows.strides, input.stride(1), *factor.stride()),
        **tiling,
        ALIGN=16 // input.dtype.itemsize if rows.is_aligned(input) else 1,
        BLOCK_K=config.BLOCK_K,
        SPLIT=splits > 1,
        INPUT_PRECISION=compiled_precision(config.input_precision),
        num_stages=config.num_stages,
    )
    if splits > 1:
        wrap_triton(_finish_kernel)[(programs,)](
            factor, workspace, problem.k, n, alpha, beta, splits, *factor.stride(), **tiling, PACKED=False
        )
