"""Factors of convolutions without patches: `accumulate_patch_factor_`, and which of its three algorithms."""

from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from triton_curv_autotune.registry import Inputs, Op, power_of_two, register
from triton_curv_kernels import patch as kernel
from triton_curv_kernels import (
    patch_config,
    patch_gather,
    patch_geometry,
    patch_one_pixel,
    patch_pixels,
    patch_products,
    patch_store,
)
from triton_curv_kernels.patch import PatchConfig, PatchProblem
from triton_curv_kernels.patch_geometry import PatchGeometry
from triton_curv_kernels.patch_pixel_rows import pixel_problem, takes_pixels


def bucket(problem: PatchProblem) -> PatchProblem:
    """Samples down to a power of two; channels and geometry stay."""
    return replace(problem, samples=power_of_two(problem.samples))


def make_inputs(problem: PatchProblem, device: torch.device) -> Inputs:
    """(factor, input, geometry, alpha, beta, ones); channels are neighbours in memory."""
    generator = torch.Generator(device).manual_seed(0)
    channels = problem.groups * problem.per_group
    odd = not problem.aligned and problem.per_group % 16 == 0
    pixels = (problem.samples, *problem.geometry.sizes)
    wide = torch.randn((*pixels, channels + odd), device=device, generator=generator).to(problem.dtype)
    size = problem.n + problem.ones
    half = torch.randn((problem.groups, size, size), device=device, generator=generator)
    alpha = 1.0 / max(problem.rows, 1)
    return half + half.mT, wide[..., :channels].movedim(-1, 1), problem.geometry, alpha, 0.95, problem.ones


def launch(inputs: Inputs, config: PatchConfig) -> list[Tensor]:
    """The Triton path; the factor is the result."""
    factor, input, geometry, alpha, beta, ones = inputs
    kernel.launch_accumulate_patch_factor_(factor, input, geometry, alpha, beta, ones, config)
    return [factor]


def reference(inputs: Inputs) -> list[Tensor]:
    """Plain torch."""
    kernel.accumulate_patch_factor_reference(*inputs)
    return [inputs[0]]


def describe(inputs: Inputs) -> list[tuple[str, Any]]:
    """The problem of a call: for a kernel of one pixel that of `accumulate_factor_`; none if channels are gathered."""
    factor, input, kernel_size, stride, padding, dilation = inputs[:6]
    ones = inputs[8] if len(inputs) > 8 else False
    geometry = PatchGeometry.of(input.shape[2:], kernel_size, stride, padding, dilation)
    if takes_pixels(input, geometry, factor.shape[0]):
        return [("accumulate_factor_", pixel_problem(input, geometry, factor.shape[0], ones))]
    problem = PatchProblem.of(input, factor.shape[0], geometry, ones)
    in_place = input.stride(1) != 1 and problem.per_group > 1 and patch_config.samples_of_part(problem) == 0
    return [] if in_place else [("accumulate_patch_factor_", problem)]


def _conv(channels: int, size: int, kernel_size: int, stride: int) -> PatchProblem:
    """A square convolution of 32 images, padded as in ResNets."""
    pad = [kernel_size // 2] * 4
    geometry = PatchGeometry.of((size, size), (kernel_size, kernel_size), (stride, stride), pad, (1, 1))
    return PatchProblem(32, channels, 1, geometry, torch.float32, aligned=channels % 16 == 0)


RESNET_50 = (
    *(_conv(channels, size, 3, 1) for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7))),
    *(_conv(channels, size, 3, 2) for channels, size in ((128, 56), (256, 28), (512, 14))),
    *(_conv(channels, size, 1, 2) for channels, size in ((256, 56), (512, 28), (1024, 14))),
    _conv(3, 224, 7, 2),
)
EXAMPLES = tuple(replace(p, dtype=dtype) for dtype, p in product((torch.bfloat16, torch.float32), RESNET_50))

ACCUMULATE_PATCH_FACTOR = register(
    Op(
        name="accumulate_patch_factor_",
        problem=PatchProblem,
        config=PatchConfig,
        configs=kernel.CONFIGS,
        prune=kernel.prune,
        default=kernel.default_config,
        bucket=bucket,
        numerics=kernel.NUMERICS,
        modules=(
            kernel,
            patch_config,
            patch_gather,
            patch_geometry,
            patch_one_pixel,
            patch_pixels,
            patch_products,
            patch_store,
        ),
        make_inputs=make_inputs,
        launch=launch,
        reference=reference,
        describe=describe,
        examples=EXAMPLES,
    )
)
