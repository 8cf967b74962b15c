"""Conjugate gradients on A x = b for lists of tensors, with scalars that stay on the device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from triton_curv.errors import ConfigurationError
from triton_curv.hostcheck import known_true
from triton_curv.operators.recurrences import EAGER, Recurrences, Rules, Scalars
from triton_curv.operators.vectors import Vectors, norm_2, norm_inf, zeros_like
from triton_curv_kernels.cg import cg_dot

NegativeCurvature = Literal["exit", "ignore"]
ENDS = ("iteration limit", "converged", "negative curvature", "breakdown")


@dataclass(frozen=True)
class StoppingRule:
    """When a residual r of A x = b is small enough: ||r|| <= max(tol, rtol ||b||, eps ||b||), eps that of the dtype.

    Args:
        tol: absolute tolerance.
        rtol: relative tolerance.
        norm: "2" or "inf".
        at_least: iterations made whatever the tolerance says (but never from a residual of zero).

    """

    tol: float = 0.0
    rtol: float = 0.0
    norm: Literal["2", "inf"] = "2"
    at_least: int = 0

    @classmethod
    def named(cls, name: str, tol: float) -> "StoppingRule":
        """A rule by name.

        "reiz": ||r||_2 <= tol (arXiv 2208.02017, the authors' code). "gargiani": max|r| <= tol, after one iteration at
        least (arXiv 2006.02409, the authors' code). "relative": ||r||_2 <= tol ||b||_2.

        Raises:
            ConfigurationError: another name.

        """
        if name not in RULES:
            raise ConfigurationError(f"expected a stopping rule among {sorted(RULES)}, got {name!r}")
        return RULES[name](tol)


RULES: Mapping[str, Callable[[float], StoppingRule]] = {
    "reiz": lambda tol: StoppingRule(tol=tol),
    "gargiani": lambda tol: StoppingRule(tol=tol, norm="inf", at_least=1),
    "relative": lambda tol: StoppingRule(rtol=tol),
}


@dataclass(frozen=True)
class CGResult:
    """What `cg` found.

    Args:
        solution: x, the last good iterate.
        residual: b - A x, as the recurrence gives it.
        iterations: how many steps x took, int64 ().
        end: index into ENDS of why it ended, int64 ().
        history: the residual norms (of the rule) of x_0, x_1, ... (max_iter + 1,), NaN after the end; None unless
            asked for.

    """

    solution: Vectors
    residual: Vectors
    iterations: Tensor
    end: Tensor
    history: Tensor | None

    @property
    def reason(self) -> str:
        """Why it ended, in words. Waits for the device."""
        return ENDS[int(self.end)]


def cg(
    product: Callable[[Vectors], Vectors],
    rhs: Sequence[Tensor],
    rule: StoppingRule,
    max_iter: int,
    *,
    start: Sequence[Tensor] | None = None,
    preconditioner: Callable[[Vectors], Vectors] | None = None,
    negative_curvature: NegativeCurvature = "exit",
    keep_history: bool = False,
    recurrences: Recurrences = EAGER,
) -> CGResult:
    """`torch.linalg.solve(A, b)`, A symmetric positive definite and given by `product`, in at most `max_iter` products.

    No value is read on the host: once a solve has ended, further iterations change nothing; where looking is free
    (CPU, eager mode) they are left out. Ends at:

    * "converged": the rule holds.
    * "negative curvature": <p, A p> / <p, p> is not above rounding, eps times the largest seen; the iterate before is
      returned. With `negative_curvature="ignore"`, as the authors of both papers do, any nonzero curvature is used.
    * "breakdown": a number that is not finite came up, or <r, M r> <= 0; the iterate before is returned.

    Args:
        product: v -> A v; one more than that is called for `start`.
        rhs: b; fp32 or fp64, any shapes.
        rule: when to stop.
        max_iter: limit of iterations.
        start: x_0, zero by default; not changed.
        preconditioner: r -> M r, symmetric positive definite, close to A^-1.
        negative_curvature: "exit" or "ignore".
        keep_history: record the residual norms.
        recurrences: what goes on between products, compiled or not.

    Source: Hestenes and Stiefel 1952; arXiv 2208.02017 Algorithm 1; the exit: Nocedal and Wright 2006, Algorithm 7.1.

    """
    b = list(rhs)
    x = zeros_like(b) if start is None else [t.clone() for t in start]
    r = [t.clone() for t in b] if start is None else list(torch._foreach_sub(b, product(x)))
    norm = norm_2 if rule.norm == "2" else norm_inf
    size, rounding = norm(r), torch.finfo(b[0].dtype).eps
    wanted = torch.clamp(max(rule.rtol, rounding) * norm(b), min=rule.tol)

    precondition = preconditioner or (lambda vectors: vectors)
    z = precondition(r)
    p = [t.clone() for t in z]
    active = size > (0 if rule.at_least > 0 else wanted)
    end = torch.where(active, 0, torch.where(size.isfinite(), 1, 3))
    scalars = Scalars(cg_dot(r, z), size, torch.zeros_like(size), active, end, torch.zeros_like(end))
    rules = Rules(negative_curvature == "exit", rule.norm == "inf", preconditioner is not None)
    sizes, zero = [size], torch.zeros_like(wanted)
    for k in range(max_iter):
        if known_true(~scalars.active):
            break
        limit = zero if k + 1 < rule.at_least else wanted
        scalars, square = recurrences.update_(x, r, p, product(p), scalars, limit, rules)
        sizes.append(scalars.size)
        scalars = recurrences.turn_(p, precondition(r), r, scalars, square, rules)
    history = None
    if keep_history:
        history = size.new_full((max_iter + 1,), torch.nan)
        history[: len(sizes)] = torch.stack(sizes)
    return CGResult(x, r, scalars.steps, scalars.end, history)
