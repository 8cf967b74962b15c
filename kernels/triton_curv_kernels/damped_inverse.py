# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202
# (Triton's language is untyped)
"""X <- (F + s I)^-1 for many symmetric F at once, by hyperpower steps that start from the X of the last time.

Shapes: lists over banks; inverses and factors (b, n, n), shifts (b,), any n. Dtype: fp32; the reference takes fp64, too.

With A = F + s I and R = I - A X, a step of order 2 or 3 is (Altman 1960; Schulz 1933 for order 2)

    X <- X + X R                R <- R^2
    X <- X + X R + X R R        R <- R^3

X R and X R R are symmetric even where X and A do not commute, A X is not: R is a whole product, the others take one
triangle. A step squares or cubes ||R||_F once that is below 1, whatever the rounding of the last step.

Cold start: X = 2 / (l + u) I, where u >= lambda_max is the largest absolute row sum of A and l <= lambda_min the larger
of s and Gershgorin's bound. The spectrum of R then lies in [-rho, rho], rho = (u - l) / (u + l), and the polynomial in
R of least maximum there is Chebyshev's, T_k(R / rho) / T_k(1 / rho). It takes the same products as a plain step:

    order 2:  X <- a (X + X R)              a = 2 / (2 - rho^2)       rho <- 1 / T_2(1 / rho)
    order 3:  X <- X + a (X R + X R R)      a = 4 / (4 - 3 rho^2)     rho <- 1 / T_3(1 / rho)

so that small eigenvalues of A X grow by 4 and 9 a step in place of 2 and 3. Steps are plain again once ||R||_F < 1.

Which start a matrix takes is decided on the device, at every step: a warm one goes on while ||R||_F < 1 (it converges,
this is a proof) or has halved (X = 0, of residual sqrt(n), counts as the step before the first), else X starts cold. A
matrix is left alone once ||R||_F is at rounding level or stops falling, or a cold start diverges. What comes back is
||R||_F of the X that is returned, measured, not predicted; NaN or Inf in F give NaN or Inf.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import triton_op

from triton_curv_kernels.backend import UnsupportedInputError, use_reference
from triton_curv_kernels.damped_inverse_config import DampedInverseConfig

BOUND_SLACK = 1 + 1e-4  # on u: its rounding, and room between -1 and the least eigenvalue of R


def damped_inverse_reference(
    inverses: Sequence[Tensor], factors: Sequence[Tensor], shifts: Sequence[Tensor], iterations: int = 8, order: int = 3
) -> Tensor:
    """The steps as batched products, one bank after another; on CPU a bank ends when all its matrices have."""
    if not inverses:
        return torch.empty(0)
    banks = zip(inverses, factors, shifts, strict=True)
    return torch.cat([_invert_bank(x, f, s, iterations, order) for x, f, s in banks])


def _invert_bank(inverse: Tensor, factor: Tensor, shift: Tensor, iterations: int, order: int) -> Tensor:
    """`damped_inverse_reference` of one bank."""
    n = factor.shape[-1]
    if factor.numel() == 0:
        return factor.new_zeros(len(factor))
    identity = torch.eye(n, dtype=factor.dtype, device=factor.device)
    damped = torch.addcmul(factor, identity, shift[:, None, None])
    rows = damped.abs().sum(-1)
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    upper = rows.amax(-1) * BOUND_SLACK
    lower = torch.maximum(shift, (diagonal - (rows - diagonal.abs())).amin(-1))
    cold_scale, cold_delta = 2 / (lower + upper), 2 * lower / (lower + upper)
    may_stop_early = factor.device.type == "cpu" and not torch.compiler.is_compiling()

    of_zero = n**0.5
    previous = torch.full_like(shift, of_zero)
    delta = torch.ones_like(shift)  # 1 - rho; 1 where the step is plain
    warm = torch.ones_like(shift, dtype=torch.bool)
    done = torch.zeros_like(warm)
    x = inverse
    for _ in range(iterations):
        residual_matrix = torch.baddbmm(identity, damped, x, alpha=-1)
        residual = torch.linalg.vector_norm(residual_matrix, dim=(1, 2))
        # what becomes of each matrix
        restart = warm & ~done & ~((residual < 1) | (residual <= previous / 2))
        warm = warm & ~restart
        stalled = (previous < 0.5) & (residual > previous / 2)
        diverged = ~warm & ~(residual <= 2 * of_zero)
        done = done | (~restart & (stalled | diverged | (residual <= converged_residual(n, factor.dtype))))
        if may_stop_early and bool(done.all()):
            break
        delta = torch.where(restart, cold_delta, torch.where(residual < 1, 1.0, delta))
        previous = torch.where(restart, of_zero, residual)
        # the step
        start = identity * cold_scale[:, None, None]
        at = restart[:, None, None]
        x = torch.where(at, start, x)
        residual_matrix = torch.where(at, torch.baddbmm(identity, damped, start, alpha=-1), residual_matrix)
        curved = delta * (2 - delta)  # 1 - rho^2
        correction = x @ residual_matrix
        if order == 2:
            weight = (2 / (1 + curved))[:, None, None]
            stepped = weight * (x + correction)
            delta = 2 * curved / (1 + curved)
        else:
            weight = (4 / (1 + 3 * curved))[:, None, None]
            stepped = x + weight * torch.baddbmm(correction, correction, residual_matrix)
            delta = delta * (3 - delta) ** 2 / (1 + 3 * curved)
        x = torch.where(done[:, None, None], x, (stepped + stepped.mT) / 2)
    else:
        residual = torch.linalg.vector_norm(torch.baddbmm(identity, damped, x, alpha=-1), dim=(1, 2))
    if x is not inverse:
        inverse.copy_(x)
    return residual


def converged_residual(n: int, dtype: torch.dtype) -> float:
    """||R||_F that rounding alone leaves of an n x n matrix: 4 units in each column's last place."""
    return 4 * torch.finfo(dtype).eps * n**0.5


def supports(inverses: Sequence[Tensor], factors: Sequence[Tensor], shifts: Sequence[Tensor]) -> bool:
    """Whether the Triton path takes these dtypes: fp32. For others, fp64 say, the op takes the reference."""
    return all(t.dtype == torch.float32 for t in (*inverses, *factors, *shifts))


def _check(
    inverses: Sequence[Tensor], factors: Sequence[Tensor], shifts: Sequence[Tensor], iterations: int, order: int
) -> None:
    if not len(inverses) == len(factors) == len(shifts):
        raise UnsupportedInputError(
            f"expected lists of one length, got {len(inverses)} inverses, {len(factors)} factors, {len(shifts)} shifts"
        )
    if order not in (2, 3) or iterations < 0:
        raise UnsupportedInputError(f"expected order 2 or 3 and iterations >= 0, got {order=}, {iterations=}")
    for index, (x, f, s) in enumerate(zip(inverses, factors, shifts, strict=True)):
        if f.dim() != 3 or f.shape[1] != f.shape[2] or x.shape != f.shape or s.shape != f.shape[:1]:
            raise UnsupportedInputError(
                f"expected inverse (b, n, n), factor (b, n, n) and shift (b,) at place {index}, got "
                f"{tuple(x.shape)}, {tuple(f.shape)} and {tuple(s.shape)}"
            )
        if not x.dtype == f.dtype == s.dtype or not x.device == f.device == s.device == factors[0].device:
            raise UnsupportedInputError(
                f"expected one dtype at place {index} and one device, got {x.dtype} on {x.device}, {f.dtype} on "
                f"{f.device}, {s.dtype} on {s.device}"
            )


@triton_op("triton_curv::damped_inverse_", mutates_args={"inverses"})
def _damped_inverse_op(
    inverses: list[Tensor],
    factors: list[Tensor],
    shifts: list[Tensor],
    iterations: int = 8,
    order: int = 3,
    config: list[int] | None = None,
) -> Tensor:
    _check(inverses, factors, shifts, iterations, order)
    return damped_inverse_reference(inverses, factors, shifts, iterations, order)


def damped_inverse_(
    inverses: Sequence[Tensor],
    factors: Sequence[Tensor],
    shifts: Sequence[Tensor],
    iterations: int = 8,
    order: int = 3,
    config: DampedInverseConfig | None = None,
) -> Tensor:
    """`x.copy_(torch.linalg.inv(f + s[:, None, None] * I))` for all banks, as far as `iterations` steps go.

    Args:
        inverses: (b, n, n) for each bank, changed in place; they hold where to start from, anything at all, and end
            bitwise symmetric. A caller who wants the old ones when this fails keeps a copy.
        factors: (b, n, n), symmetric, fp32 (fp64: by the reference).
        shifts: (b,), positive, of the factors' dtype.
        iterations: most steps of a matrix; 0 measures only.
        order: 2 or 3.
        config: tiling of the Triton kernels; None means `default_config`.

    Returns:
        ||I - (F + s I) X||_F of each X returned, (sum of b,), banks in their order. At most 0.01, say, means success.

    Raises:
        UnsupportedInputError: lists, shapes or dtypes that do not match, or another order.

    """
    if not torch.compiler.is_compiling() and (not factors or use_reference(factors[0])):
        _check(inverses, factors, shifts, iterations, order)
        return damped_inverse_reference(inverses, factors, shifts, iterations, order)
    ints = None if config is None else config.to_ints()
    return torch.ops.triton_curv.damped_inverse_(inverses, factors, shifts, iterations, order, ints)
