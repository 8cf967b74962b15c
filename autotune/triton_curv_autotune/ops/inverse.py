"""Inverses: `damped_inverse_` and `apply_damped_inverse`."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from triton_curv_autotune.registry import Inputs, Op, power_of_two, register, width_bucket
from triton_curv_kernels import (
    apply_inverse,
    apply_inverse_config,
    apply_inverse_kernels,
    apply_inverse_work,
    damped_inverse,
    damped_inverse_config,
    damped_inverse_kernels,
    damped_inverse_work,
)
from triton_curv_kernels.apply_inverse import ApplyConfig, ApplyProblem
from triton_curv_kernels.backend import device_limits
from triton_curv_kernels.damped_inverse import DampedInverseConfig, DampedInverseProblem

P = TypeVar("P")
C = TypeVar("C")

DAMPING = 0.03  # of the mean eigenvalue

# damped_inverse_


def bucket(problem: DampedInverseProblem) -> DampedInverseProblem:
    """Size up to its bucket, matrices down to a power of two."""
    return replace(problem, n=width_bucket(problem.n), batch=power_of_two(problem.batch))


def make_inputs(problem: DampedInverseProblem, device: torch.device) -> Inputs:
    """(inverses, factors, shifts, iterations, order): a refresh that starts from a somewhat older inverse."""
    generator = torch.Generator(device).manual_seed(0)
    batch, n = problem.batch, problem.n
    scales = torch.logspace(0, -2, n, device=device)
    old, new = (torch.randn((batch, 2 * n, n), device=device, generator=generator) * scales for _ in range(2))
    older = old.mT @ old / (2 * n)
    factors = 0.95 * older + 0.05 * (new.mT @ new / (2 * n))
    shifts = DAMPING * factors.diagonal(dim1=-2, dim2=-1).mean(-1)
    identity = torch.eye(n, device=device)
    inverses = torch.linalg.inv(older + shifts[:, None, None] * identity)
    return [(inverses + inverses.mT) / 2], [(factors + factors.mT) / 2], [shifts], 8, 3


def launch(inputs: Inputs, config: DampedInverseConfig) -> list[Tensor]:
    """The Triton path; the inverses are the results."""
    inverses, factors, shifts, iterations, order = inputs
    damped_inverse.launch_damped_inverse_(inverses, factors, shifts, iterations, order, config)
    return list(inverses)


def reference(inputs: Inputs) -> list[Tensor]:
    """Plain torch."""
    damped_inverse.damped_inverse_reference(*inputs)
    return list(inputs[0])


def describe(inputs: Inputs) -> list[tuple[str, Any]]:
    """A problem for the small matrices, one for all others."""
    factors = [factor for factor in inputs[1] if factor.numel()]
    classes: dict[bool, list[tuple[int, int]]] = {}
    for factor in factors:
        n = factor.shape[-1]
        classes.setdefault(n <= damped_inverse_config.SMALL, []).append((len(factor), n))
    return [
        ("damped_inverse_", DampedInverseProblem.of(shapes, device_limits(factors[0].device)))
        for shapes in classes.values()
    ]


# apply_damped_inverse


def apply_bucket(problem: ApplyProblem) -> ApplyProblem:
    """Elements and side down to powers of two."""
    return replace(problem, numel=power_of_two(problem.numel), side=power_of_two(problem.side))


def apply_inputs(problem: ApplyProblem, device: torch.device) -> Inputs:
    """(updates, grads, inverse_A, inverse_G, kl_clip, lr): square gradients, or a long one if that is too much."""
    generator = torch.Generator(device).manual_seed(0)
    side = max(1, problem.side)
    count, r, c = problem.numel // side**2, side, side
    if count == 0:
        count, r, c = 1, max(1, problem.numel // (2 * side)), 2 * side
    c += not problem.aligned

    def randn(rows: int, columns: int) -> list[Tensor]:
        return [torch.randn((rows, columns), device=device, generator=generator) for _ in range(count)]

    grads = randn(r, c)
    halves = [randn(size, size) for size in (c, r)]
    inverse_a, inverse_g = ([(x + x.mT) / len(x) for x in half] for half in halves)
    lists = [[x.to(problem.dtype) for x in tensors] for tensors in (grads, grads, inverse_a, inverse_g)]
    return (*lists, torch.tensor(1e-3, device=device), torch.tensor(0.1, device=device))


def apply_launch(inputs: Inputs, config: ApplyConfig) -> list[Tensor]:
    """The Triton path; updates, sums and the clipping factor are the results."""
    updates, grads, inverse_a, inverse_g, kl_clip, lr = inputs
    sums = apply_inverse.launch_apply_damped_inverse(updates, grads, inverse_a, inverse_g, kl_clip, lr, config)
    return [*updates, *sums]


def apply_reference(inputs: Inputs) -> list[Tensor]:
    """Plain torch."""
    sums = apply_inverse.apply_damped_inverse_reference(*inputs)
    return [*inputs[0], *sums]


def apply_describe(inputs: Inputs) -> list[tuple[str, Any]]:
    """The one problem of a call."""
    grads, inverse_a = inputs[1], inputs[2]
    shapes = [(grad.shape, of_a.dim() > 1) for grad, of_a in zip(grads, inverse_a, strict=True)]
    return [("apply_damped_inverse", ApplyProblem.of(shapes, grads[0].dtype, device_limits(grads[0].device)))]


EXAMPLES = tuple(
    DampedInverseProblem(n, batch=batch)
    for n, batch in product((16, 64, 256, 576, 1024, 2304, 4608), (1, 16))
    if n * batch <= 1 << 14
)
APPLY_EXAMPLES = tuple(
    ApplyProblem(numel, dtype, side=side, aligned=aligned)
    for dtype, (numel, side), aligned in product(
        (torch.float32, torch.bfloat16),
        ((1 << 20, 256), (1 << 22, 512), (1 << 24, 1024), (1 << 26, 2048)),
        (True, False),
    )
)


def _declare(
    name: str, kernel: ModuleType, problem: type[P], config: type[C], parts: Sequence[ModuleType], **ways: Any
) -> Op[P, C]:
    """An op whose file `kernel` names its configurations; `parts` are the files beside it."""
    return register(
        Op(
            name=name,
            problem=problem,
            config=config,
            configs=kernel.CONFIGS,
            prune=kernel.prune,
            default=kernel.default_config,
            numerics=kernel.NUMERICS,
            modules=(kernel, *parts),
            **ways,
        )
    )


DAMPED_INVERSE = _declare(
    "damped_inverse_",
    damped_inverse,
    DampedInverseProblem,
    DampedInverseConfig,
    (damped_inverse_config, damped_inverse_kernels, damped_inverse_work),
    bucket=bucket,
    make_inputs=make_inputs,
    launch=launch,
    reference=reference,
    describe=describe,
    examples=EXAMPLES,
)
APPLY_DAMPED_INVERSE = _declare(
    "apply_damped_inverse",
    apply_inverse,
    ApplyProblem,
    ApplyConfig,
    (apply_inverse_config, apply_inverse_kernels, apply_inverse_work),
    bucket=apply_bucket,
    make_inputs=apply_inputs,
    launch=apply_launch,
    reference=apply_reference,
    describe=apply_describe,
    examples=APPLY_EXAMPLES,
)
