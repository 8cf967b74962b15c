"""Damped inverses of many symmetric matrices at once, and what is used when one of them fails."""

from typing import NamedTuple

import torch
from torch import Tensor

from triton_curv.hostcheck import known_true

MAX_RAISES = 3  # times the damping of a failing factor is multiplied by ten (DESIGN section 8)
RUNGS = ("fresh", "previous", "diagonal", "identity")


class Inversion(NamedTuple):
    """Inverses (b, n, n) of damped matrices; where that succeeded (b,); probe residuals (b,)."""

    inverses: Tensor
    ok: Tensor
    residuals: Tensor


def spd_inverse(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.inv` of symmetric positive definite matrices (b, n, n), with a flag (b,) where it succeeded.

    Closed form for n = 1 and 2 (batches of thousands for norm layers), batched Cholesky above.
    """
    n = matrices.shape[-1]
    if n == 1:
        return matrices.reciprocal(), matrices[:, 0, 0] > 0
    if n == 2:
        a, b, d = matrices[:, 0, 0], matrices[:, 0, 1], matrices[:, 1, 1]
        determinant = a * d - b * b
        adjugate = torch.stack((d, -b, -b, a), dim=-1).view(-1, 2, 2)
        return adjugate / determinant[:, None, None], (determinant > 0) & (a > 0)
    factor, info = torch.linalg.cholesky_ex(matrices)
    ok = info == 0
    if not known_true(ok):  # cholesky_inverse raises on a zero in the diagonal
        factor = torch.where(ok[:, None, None], factor, torch.eye(n, dtype=factor.dtype, device=factor.device))
    return torch.cholesky_inverse(factor), ok


def damped_inverse(matrices: Tensor, shifts: Tensor, tolerance: float = 0.1) -> Inversion:
    """(M_i + s_i I)^-1 for symmetric matrices (b, n, n) and shifts (b,).

    Counts as failed (`ok` False) when Cholesky does, when the result is not finite, or when the probe residual
    max|1 - (M + sI) X 1| exceeds `tolerance`. No host sync.
    """
    damped = matrices.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(shifts[:, None])
    inverses, ok = spd_inverse(damped)
    probe = torch.bmm(damped, inverses.sum(-1, keepdim=True))
    residuals = (probe - 1.0).abs_().amax((1, 2))
    return Inversion(inverses, ok & (residuals < tolerance), residuals)  # a comparison with NaN is False


def stand_in(matrices: Tensor, shifts: Tensor, previous: Tensor, failures: Tensor) -> tuple[Tensor, Tensor]:
    """What serves where the inverse failed, and its rung (b,) in `RUNGS`.

    The previous inverse for the first `MAX_RAISES` failures in a row, while each new try is damped ten times more
    (`raised`); then the inverse of the damped diagonal; where that is not finite and positive, the identity.
    """
    diagonal = matrices.diagonal(dim1=-2, dim2=-1) + shifts[:, None]
    usable = ((diagonal > 0) & diagonal.isfinite()).all(-1)
    last_resort = torch.diag_embed(torch.where(usable[:, None], diagonal.reciprocal(), 1.0))
    rungs = torch.where(failures <= MAX_RAISES, 1, torch.where(usable, 2, 3))
    return torch.where((rungs == 1)[:, None, None], previous, last_resort), rungs


def raised(shifts: Tensor, failures: Tensor) -> Tensor:
    """Ten times the damping for every failure in a row, at most `MAX_RAISES` times."""
    return shifts * 10.0 ** failures.clamp(max=MAX_RAISES).to(shifts.dtype)
