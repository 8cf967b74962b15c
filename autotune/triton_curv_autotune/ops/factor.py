"""Factors: `accumulate_factor_`."""

from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from triton_curv_autotune.registry import Inputs, Op, power_of_two, register, width_bucket
from triton_curv_kernels import factor as kernel
from triton_curv_kernels import factor_config, factor_tiles, packed
from triton_curv_kernels.factor import FactorConfig, FactorProblem


def bucket(problem: FactorProblem) -> FactorProblem:
    """Rows and batch down to a power of two, width up to its bucket; an unaligned width stays unaligned."""
    n = width_bucket(problem.n)
    return replace(
        problem,
        batch=power_of_two(problem.batch),
        k=power_of_two(problem.k),
        n=n if problem.aligned else max(n - 1, 0),
    )


def make_inputs(problem: FactorProblem, device: torch.device) -> Inputs:
    """(factor, rows, alpha, beta, ones) as a training step has them: a running average of scaled products."""
    generator = torch.Generator(device).manual_seed(0)
    batch = (problem.batch,) if problem.batch > 1 else ()
    rows = torch.randn((*batch, problem.k, problem.n), device=device, generator=generator).to(problem.dtype)
    width = problem.n + problem.ones
    half = torch.randn((*batch, width, width), device=device, generator=generator)
    return half + half.mT, rows, 1.0 / max(problem.k, 1), 0.95, problem.ones


def launch(inputs: Inputs, config: FactorConfig) -> list[Tensor]:
    """The Triton path; the factor is the result."""
    factor, rows, alpha, beta, ones = inputs
    kernel.launch_accumulate_factor_(factor, rows, alpha, beta, ones, config)
    return [factor]


def reference(inputs: Inputs) -> list[Tensor]:
    """Plain torch."""
    kernel.accumulate_factor_reference(*inputs)
    return [inputs[0]]


def describe(inputs: Inputs) -> list[FactorProblem]:
    """The one problem of a call."""
    return [FactorProblem.of(inputs[1], inputs[4] if len(inputs) > 4 else False)]


EXAMPLES = tuple(
    FactorProblem(1, k, n, dtype)
    for dtype, k, n in product(
        (torch.bfloat16, torch.float32), (1 << 11, 1 << 15), (64, 256, 576, 768, 1024, 2304, 3072, 4608)
    )
)

ACCUMULATE_FACTOR = register(
    Op(
        name="accumulate_factor_",
        problem=FactorProblem,
        config=FactorConfig,
        configs=kernel.CONFIGS,
        prune=kernel.prune,
        default=kernel.default_config,
        bucket=bucket,
        numerics=factor_config.NUMERICS,
        modules=(kernel, factor_config, factor_tiles, packed),
        make_inputs=make_inputs,
        launch=launch,
        reference=reference,
        describe=describe,
        examples=EXAMPLES,
    )
)
