"""The vector work of a conjugate-gradient iteration on whole parameter lists, beside foreach calls and torch.dot."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from profiles.kernel_cases.case import Case
from profiles.parameter_lists import Shapes, largest_error, named_shapes, random_lists
from triton_curv_kernels.cg import (
    cg_direction_,
    cg_direction_reference,
    cg_dot_reference,
    cg_dots,
    cg_update_,
    cg_update_reference,
)

Vectors = list[Tensor]


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Each op of an iteration on parameter lists of real networks."""
    for name, shapes in named_shapes(device, quick):
        yield from _cases(name, shapes, device)


def _cases(name: str, shapes: Shapes, device: torch.device) -> Iterator[Case]:
    x, r, p, Ap = random_lists(shapes, (torch.float32,) * 4, device)
    numel = sum(t.numel() for t in x)
    step, beta, square = (
        torch.tensor(1e-3, device=device),
        torch.tensor(0.5, device=device),
        torch.empty((), device=device),
    )
    theirs = [[t.clone() for t in ts] for ts in (x, r, p)]

    def update_error(update: Callable[..., None]) -> float:
        exact_x, exact_r, exact_p, exact_Ap = ([t.double() for t in ts] for ts in (x, r, p, Ap))
        exact_square = torch.empty((), dtype=torch.float64, device=device)
        cg_update_reference(exact_x, exact_r, exact_p, exact_Ap, step.double(), exact_square)
        found, found_square = [[t.clone() for t in ts] for ts in (x, r)], torch.empty((), device=device)
        update(*found, p, Ap, step, found_square)
        relative = abs(float(found_square) / float(exact_square) - 1)
        return max(relative, largest_error([*found[0], *found[1]], [*exact_x, *exact_r]))

    def direction_error(update: Callable[..., None]) -> float:
        exact, found = [t.double() for t in p], [t.clone() for t in p]
        cg_direction_reference(exact, [t.double() for t in r], beta.double())
        update(found, r, beta)
        return largest_error(found, exact)

    def both_dots(a: Vectors, b: Vectors) -> tuple[Tensor, Tensor]:
        return cg_dot_reference(a, b), cg_dot_reference(a, a)

    def dots_error(dots: Callable[[Vectors, Vectors], tuple[Tensor, Tensor]]) -> float:
        exact = torch.stack(both_dots([t.double() for t in p], [t.double() for t in Ap]))
        return float((torch.stack(dots(p, Ap)).double() - exact).abs().max() / exact.abs().max())

    def make(op: str, ours: Callable[[], Any], other: Callable[[], Any], error: Callable[[], float],
             allowed: Callable[[], float], streams: int, flops: int) -> Case:  # fmt: skip
        return Case(
            op=op,
            name=name,
            ours=ours,
            alternatives={"foreach": other},
            error=error,
            allowed_error=allowed,
            flops=float(flops * numel),
            bytes=float(4 * streams * numel),
            bound="memory",
            bar="at least 88 % of HBM",
        )

    # the error of a sum: never asked to be below eight roundings, which a lucky order may give
    least = 8 * torch.finfo(torch.float32).eps
    yield make(
        "cg_update_",
        lambda: cg_update_(x, r, p, Ap, step, square),
        lambda: cg_update_reference(theirs[0], theirs[1], p, Ap, step, square),
        lambda: update_error(cg_update_),
        lambda: max(least, 2 * update_error(cg_update_reference)),
        streams=6,
        flops=6,
    )
    yield make(
        "cg_direction_",
        lambda: cg_direction_(p, r, beta),
        lambda: cg_direction_reference(theirs[2], r, beta),
        lambda: direction_error(cg_direction_),
        lambda: 2 * direction_error(cg_direction_reference),
        streams=3,
        flops=2,
    )
    yield make(
        "cg_dots",
        lambda: cg_dots(p, Ap),
        lambda: both_dots(p, Ap),
        lambda: dots_error(cg_dots),
        lambda: max(least, 2 * dots_error(both_dots)),
        streams=2,
        flops=4,
    )
