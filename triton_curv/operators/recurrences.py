"""The vector parts of matrix-free steps, between products: each a function of tensors that compiles as one graph.

Conjugate gradients (Hestenes and Stiefel 1952) with their tests, and the move of the weights.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_curv.graphs import Graphs
from triton_curv.operators.vectors import Vectors, norm_inf
from triton_curv_kernels.cg import cg_direction_, cg_dot, cg_dots, cg_update_


class Scalars(NamedTuple):
    """Of a solve, each (): <r, M r>, the norm of r, the largest curvature, whether it goes on, why not, steps."""

    rz: Tensor
    size: Tensor
    largest: Tensor
    active: Tensor
    end: Tensor
    steps: Tensor


class Rules(NamedTuple):
    """Whether CG leaves at negative curvature, takes max|r| for the size of r, and has a preconditioner."""

    exits: bool
    by_maximum: bool
    preconditioned: bool


def update_(
    x: Vectors, r: Vectors, p: Vectors, product: Vectors, scalars: Scalars, limit: Tensor, rules: Rules
) -> tuple[Scalars, Tensor]:
    """x += a p, r -= a A p with a = <r, M r> / <p, A p>, unless the solve has ended or ends here; and ||r||^2.

    It goes on while the size of r is above `limit`.
    """
    rz, size, largest, active, end, steps = (scalar.reshape(()) for scalar in scalars)
    rounding = torch.finfo(size.dtype).eps
    curvature, length = cg_dots(p, product)
    largest = torch.maximum(largest, curvature / length)
    sound = curvature.isfinite() & (rz > 0 if rules.preconditioned else rz.isfinite())
    curved = curvature > rounding * largest * length if rules.exits else curvature != 0
    end = torch.where(active & ~curved, 2, end)
    end = torch.where(active & ~sound, 3, end)
    active = active & sound & curved
    square = torch.zeros_like(size)
    cg_update_(x, r, p, product, torch.where(active, rz / curvature, 0.0), square)
    steps = steps + active
    size = norm_inf(r) if rules.by_maximum else square.sqrt()
    goes_on = size > limit.reshape(())
    end = torch.where(active & ~goes_on, torch.where(size.isfinite(), 1, 3), end)
    moved = Scalars(rz, torch.where(active, size, torch.nan), largest, active & goes_on, end, steps)
    return moved, square


def turn_(p: Vectors, z: Vectors, r: Vectors, scalars: Scalars, square: Tensor, rules: Rules) -> Scalars:
    """p = z + b p with z = M r and b = <r, z> / <r, z> of the iteration before."""
    before, active = scalars.rz.reshape(()), scalars.active.reshape(())
    rz = cg_dot(r, z) if rules.preconditioned else square.reshape(()).clone()
    cg_direction_(p, z, torch.where(active, rz / before, 0.0))
    return scalars._replace(rz=rz)


def scaled(direction: Vectors, rates: Sequence[Tensor | float]) -> Vectors:
    """The step: each part of the direction times its learning rate."""
    return [part * rate for part, rate in zip(direction, rates, strict=True)]


def move_(params: Sequence[Tensor], weights: Sequence[Tensor], step: Vectors, scale: Tensor | float) -> None:
    """w = w_0 + scale step, in place."""
    for p, weight, part in zip(params, weights, step, strict=True):
        p.copy_(weight + scale * part)


class Recurrences:
    """The four, as they are, or each compiled when it first runs, with arguments for `torch.compile`."""

    def __init__(self, compiling: Mapping[str, Any] | None = None) -> None:
        self.compiling = compiling
        self.update_ = _maybe_compiled(update_, compiling)
        self.turn_ = _maybe_compiled(turn_, compiling)
        self.scaled = _maybe_compiled(scaled, compiling)
        self.move_ = _maybe_compiled(move_, compiling)

    def number(self, value: float | Tensor, like: Tensor) -> Tensor | float:
        """A number that changes, as a graph takes it without being made anew."""
        if self.compiling is None:
            return value
        return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def _maybe_compiled(function: Callable[..., Any], compiling: Mapping[str, Any] | None) -> Callable[..., Any]:
    if compiling is None:
        return function
    graphs = Graphs(function, compiling)

    def run(*args: Any) -> Any:
        return graphs(None, *map(_lifted, args))

    return run


def _lifted(value: Any) -> Any:
    """Tensors without dimensions with one instead.

    torch 2.13 takes 0-dim float64 tensors on a CPU for numbers: a graph that writes one writes nothing, and one that
    reads NaN is made anew.
    """
    if isinstance(value, Tensor):
        return value.view(1) if value.dim() == 0 else value
    if isinstance(value, Scalars):
        return Scalars(*map(_lifted, value))
    return list(map(_lifted, value)) if isinstance(value, list) else value


EAGER = Recurrences()
