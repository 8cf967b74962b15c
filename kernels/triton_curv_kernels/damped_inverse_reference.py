"""The reference of `damped_inverse_`; see there for the algorithm."""

from collections.abc import Sequence

import torch
from torch import Tensor

from triton_curv_kernels.backend import is_traced

BOUND_SLACK = 1 + 1e-4  # on u: its rounding, and room between -1 and the least eigenvalue of R
TOLERANCE = 4.0  # units in the last place of each column of I - A X that count as rounding


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
    may_look = factor.device.type == "cpu" and not is_traced(factor)

    of_zero = n**0.5  # ||R||_F of X = 0
    least = TOLERANCE * torch.finfo(factor.dtype).eps * of_zero
    previous = torch.full_like(shift, of_zero)
    delta = torch.ones_like(shift)  # 1 - rho; 1 where the step is plain
    warm = torch.ones_like(shift, dtype=torch.bool)
    done = torch.zeros_like(warm)
    x = (inverse + inverse.mT) / 2
    for _ in range(iterations):
        left = _left_residual(x, damped, identity)
        residual = torch.linalg.vector_norm(left, dim=(1, 2))
        # what becomes of each matrix
        restart = warm & ~done & ~((residual < 1) | (residual <= previous / 2))
        warm = warm & ~restart
        stalled = (previous < 0.5) & (residual > previous / 2)
        diverged = ~warm & ~(residual <= 2 * of_zero)
        done = done | (~restart & (stalled | diverged | (residual <= least)))
        if may_look and bool(done.all()):
            break
        delta = torch.where(restart, cold_delta, torch.where(residual < 1, 1.0, delta))
        previous = torch.where(restart, of_zero, residual)
        # the step
        start = identity * cold_scale[:, None, None]
        at = restart[:, None, None]
        x = torch.where(at, start, x)
        left = torch.where(at, identity - cold_scale[:, None, None] * damped, left)
        curved = delta * (2 - delta)  # 1 - rho^2
        correction = x @ left.mT
        if order == 2:
            stepped = (2 / (1 + curved))[:, None, None] * (x + correction)
            delta = 2 * curved / (1 + curved)
        else:
            weight = (4 / (1 + 3 * curved))[:, None, None]
            stepped = x + weight * torch.baddbmm(correction, correction, left.mT)
            delta = delta * (3 - delta) ** 2 / (1 + 3 * curved)
        x = torch.where(done[:, None, None], x, (stepped + stepped.mT) / 2)
    else:
        residual = torch.linalg.vector_norm(_left_residual(x, damped, identity), dim=(1, 2))
    inverse.copy_(x)
    result: Tensor = residual
    return result


def _left_residual(x: Tensor, damped: Tensor, identity: Tensor) -> Tensor:
    """I - X A, the transpose of R, added up in fp64: rounding there decides how well X can get (`_residual_kernel`)."""
    wide = torch.baddbmm(identity.double(), x.double(), damped.double(), alpha=-1)
    left: Tensor = wide.to(x.dtype)
    return left
