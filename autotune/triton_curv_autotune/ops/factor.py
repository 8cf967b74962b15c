"""Factors: `accumulate_factor_` and, for whole lists, `accumulate_factors_`."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from triton_curv_autotune.registry import Inputs, Op, power_of_two, register, width_bucket
from triton_curv_kernels import factor as kernel
from triton_curv_kernels import (
    factor_config,
    factor_group,
    factor_group_config,
    factor_group_kernels,
    factor_table,
    factor_tiles,
    packed,
)
from triton_curv_kernels.factor import FactorConfig, FactorProblem
from triton_curv_kernels.factor_group_config import GroupConfig, GroupProblem

MOST_MATRICES = 10_000  # of one shape in a list that is tuned

# one factor


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


def describe(inputs: Inputs) -> list[tuple[str, Any]]:
    """The one problem of a call."""
    return [("accumulate_factor_", FactorProblem.of(inputs[1], inputs[4] if len(inputs) > 4 else False))]


# a list of factors


def group_bucket(problem: GroupProblem) -> GroupProblem:
    """Rows down to powers of two, widths up to their buckets."""
    return replace(problem, shapes=GroupProblem.count((power_of_two(k), width_bucket(n)) for k, n in _each(problem)))


def _each(problem: GroupProblem) -> Iterator[tuple[int, int]]:
    return ((k, n) for k, n, count in problem.shapes for _ in range(min(count, MOST_MATRICES)))


def group_inputs(problem: GroupProblem, device: torch.device) -> Inputs:
    """(factors, rows, alphas, betas, ones); where the problem has some of a kind, every second one is.

    Of unaligned rows there is one, the narrowest.
    """
    generator = torch.Generator(device).manual_seed(0)
    factors, rows, ones = [], [], []
    narrowest = min((n for _, n in _each(problem)), default=0)
    aligned = problem.aligned
    for place, (k, n) in enumerate(_each(problem)):
        strided = not aligned and n == narrowest
        aligned = aligned or strided
        wide = torch.randn((k, n + strided), device=device, generator=generator).to(problem.dtype)
        one, is_packed = problem.ones and place % 2 == 0, problem.packed and place % 2 == 0
        size = n + one
        half = torch.randn((size, size), device=device, generator=generator)
        factor = half + half.mT
        factors.append(packed.from_dense(factor) if is_packed else factor)
        rows.append(wide[:, :n])
        ones.append(one)
    alphas = torch.tensor([1.0 / max(k, 1) for k, _ in _each(problem)], device=device)
    return factors, rows, alphas, torch.full_like(alphas, 0.95), ones


def group_launch(inputs: Inputs, config: GroupConfig) -> list[Tensor]:
    """The Triton path; the factors are the results."""
    factors, rows, alphas, betas, ones = inputs
    factor_group.launch_accumulate_factors_(factors, rows, alphas, betas, ones, config=config)
    return list(factors)


def group_reference(inputs: Inputs) -> list[Tensor]:
    """Plain torch."""
    factors, rows, alphas, betas, ones = inputs
    factor_group.accumulate_factors_reference(factors, rows, alphas.tolist(), betas.tolist(), ones)
    return list(factors)


def group_describe(inputs: Inputs) -> list[tuple[str, Any]]:
    """A problem for each dtype of rows."""
    factors, rows, _, _, ones, *_ = inputs
    by_dtype: dict[torch.dtype, list[factor_table.MatrixShape]] = {}
    for place, (factor, x, one) in enumerate(zip(factors, rows, ones, strict=True)):
        matrices = factor_table.matrices_of(place, 0, factor, x, one)
        by_dtype.setdefault(x.dtype, []).extend(matrix.shape for matrix in matrices)
    return [
        ("accumulate_factors_", factor_group.group_problem(shapes, dtype, rows[0].device))
        for dtype, shapes in by_dtype.items()
    ]


EXAMPLES = tuple(
    FactorProblem(1, k, n, dtype)
    for dtype, k, n in product(
        (torch.bfloat16, torch.float32), (1 << 11, 1 << 15), (64, 256, 576, 768, 1024, 2304, 3072, 4608)
    )
)


def _transformer(width: int, blocks: int, rows: int) -> tuple[tuple[int, int, int], ...]:
    """A and G of a transformer's linear layers."""
    widths = (width, 3 * width, width, width, width, 4 * width, 4 * width, width)
    return GroupProblem.count((rows, n) for n in widths * blocks)


GROUP_EXAMPLES = tuple(
    GroupProblem(_transformer(width, blocks, 1 << 13), dtype, ones=True)
    for dtype, (width, blocks) in product((torch.bfloat16, torch.float32), ((768, 12), (1024, 24)))
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
        instruction=lambda config: config.BLOCK_N >= 64,  # from there on a warp group's, on sm_90
        modules=(kernel, factor_config, factor_tiles, packed),
        make_inputs=make_inputs,
        launch=launch,
        reference=reference,
        describe=describe,
        examples=EXAMPLES,
    )
)

ACCUMULATE_FACTORS = register(
    Op(
        name="accumulate_factors_",
        problem=GroupProblem,
        config=GroupConfig,
        configs=factor_group_config.GROUP_CONFIGS,
        prune=factor_group_config.prune_group,
        default=factor_group_config.default_group_config,
        bucket=group_bucket,
        numerics=factor_group_config.GROUP_NUMERICS,
        modules=(factor_group, factor_group_config, factor_group_kernels, factor_table, factor_tiles, packed),
        make_inputs=group_inputs,
        launch=group_launch,
        reference=group_reference,
        describe=group_describe,
        examples=GROUP_EXAMPLES,
    )
)
