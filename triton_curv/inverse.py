"""Damped inverses and eigenbases of many symmetric matrices at once, and what is used when one of them fails."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from triton_curv.hostcheck import known_true
from triton_curv_kernels.damped_inverse import damped_inverse_

InverseName = Literal["auto", "cholesky", "low_rank", "eigen", "neumann"]

MAX_RAISES = 3  # times the damping of a failing factor is multiplied by ten (DESIGN section 8)
RUNGS = ("fresh", "previous", "diagonal", "identity")
TOLERANCE = 0.1  # a probe residual above it counts as a failure


class Inversion(NamedTuple):
    """Inverses (b, n, n) of damped matrices; where that succeeded (b,); residuals (b,)."""

    inverses: Tensor
    ok: Tensor
    residuals: Tensor


class Decomposition(NamedTuple):
    """M = bases diag(spectra) bases^T: (b, n, n) and (b, n), ascending; where that succeeded (b,); residuals (b,)."""

    bases: Tensor
    spectra: Tensor
    ok: Tensor
    residuals: Tensor


def damp_(matrices: Tensor, shifts: Tensor) -> Tensor:
    """M_i += s_i I, in place; returns the matrices."""
    matrices.diagonal(dim1=-2, dim2=-1).add_(shifts[:, None])
    return matrices


def spd_inverse(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.inv` of symmetric positive definite matrices (b, n, n), with a flag (b,) where it succeeded.

    Closed form for n = 1 and 2 (batches of thousands for norm layers), batched Cholesky above. A linear algebra
    library that throws counts as a failure of all its matrices; running out of memory does not.
    """
    n = matrices.shape[-1]
    if n == 1:
        return matrices.reciprocal(), matrices[:, 0, 0] > 0
    if n == 2:
        a, b, d = matrices[:, 0, 0], matrices[:, 0, 1], matrices[:, 1, 1]
        determinant = a * d - b * b
        adjugate = torch.stack((d, -b, -b, a), dim=-1).view(-1, 2, 2)
        return adjugate / determinant[:, None, None], (determinant > 0) & (a > 0)
    try:
        factor, info = torch.linalg.cholesky_ex(matrices)
        ok = info == 0
        if not known_true(ok):  # cholesky_inverse raises on a zero in the diagonal
            factor = torch.where(ok[:, None, None], factor, torch.eye(n, dtype=factor.dtype, device=factor.device))
        return torch.cholesky_inverse(factor), ok
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # torch.linalg.LinAlgError is one
        return torch.full_like(matrices, torch.nan), torch.zeros_like(matrices[:, 0, 0], dtype=torch.bool)


def damped_inverse(damped: Tensor, tolerance: float = TOLERANCE) -> Inversion:
    """(M_i + s_i I)^-1 of matrices (b, n, n) that are damped already.

    Counts as failed (`ok` False) when Cholesky does, when the result is not finite, or when the probe residual
    max|1 - (M + sI) X 1| exceeds `tolerance`. No host sync.
    """
    inverses, ok = spd_inverse(damped)
    probe = torch.bmm(damped, inverses.sum(-1, keepdim=True))
    residuals = (probe - 1.0).abs_().amax((1, 2))
    return Inversion(inverses, ok & (residuals < tolerance), residuals)  # a comparison with NaN is False


def hyperpower_inverses(
    matrices: Sequence[Tensor],
    shifts: Sequence[Tensor],
    previous: Sequence[Tensor],
    iterations: int,
    tolerance: float = TOLERANCE,
) -> list[Inversion]:
    """(M_i + s_i I)^-1 of each bank by products alone, from the `previous` inverses: `damped_inverse_` of the kernels.

    The residual is ||I - (M + sI) X||_F. Warm or cold start is decided on the device, for each matrix.
    """
    inverses = [x.clone() for x in previous]
    residuals = damped_inverse_(inverses, matrices, shifts, iterations=iterations).split([len(x) for x in inverses])
    return [Inversion(x, r < tolerance, r) for x, r in zip(inverses, residuals, strict=True)]


def eigenbasis(matrices: Tensor, tolerance: float = TOLERANCE) -> Decomposition:
    """`torch.linalg.eigh` of symmetric matrices (b, n, n), eigenvalues clamped at 0.

    float32 LAPACK fails to converge on some real factors (785 x 785, rank 128). Tries: as it is; with a jitter of
    1e-6 of the mean eigenvalue on the diagonal; in float64. Each retry only where the last failed, and only where the
    host can know without a sync or the library has thrown. The residual is max|M Q 1 - Q L 1| / max|diag M|.
    In a graph of torch.compile it is one call: the library decides on the host.
    """
    if torch.compiler.is_compiling():
        return Decomposition(*torch.ops.triton_curv.eigenbasis(matrices, tolerance))
    best = _try_eigh(matrices, matrices, tolerance)
    if known_true(best.ok) or not bool(matrices.isfinite().all()):
        return best
    mean = matrices.diagonal(dim1=-2, dim2=-1).mean(-1)
    for dtype in (matrices.dtype, torch.float64):
        jitter = 1e-6 * mean if dtype != torch.float64 else torch.zeros_like(mean)
        tried = _try_eigh(damp_(matrices.to(dtype, copy=True), jitter.to(dtype)), matrices, tolerance)
        keep = best.ok[:, None]
        best = Decomposition(
            torch.where(keep[..., None], best.bases, tried.bases),
            torch.where(keep, best.spectra, tried.spectra),
            best.ok | tried.ok,
            torch.where(best.ok, best.residuals, tried.residuals),
        )
        if known_true(best.ok):
            break
    return best


@torch.library.custom_op("triton_curv::eigenbasis", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _eigenbasis_op(matrices: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = eigenbasis(matrices, tolerance)
    return found.bases.contiguous(), found.spectra.contiguous(), found.ok, found.residuals


@_eigenbasis_op.register_fake
def _(matrices: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, n, _ = matrices.shape
    none = matrices.new_empty(batch)
    return matrices.new_empty(batch, n, n), matrices.new_empty(batch, n), none.bool(), none.clone()


def _try_eigh(given: Tensor, matrices: Tensor, tolerance: float) -> Decomposition:
    """One call, whole batch; if it throws and there are several, one by one."""
    try:
        spectra, bases = torch.linalg.eigh(given)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        if len(given) > 1:
            pairs = zip(given.split(1), matrices.split(1), strict=True)
            parts = [_try_eigh(g, m, tolerance) for g, m in pairs]
            return Decomposition(*(torch.cat(column) for column in zip(*parts, strict=True)))
        none = matrices.new_zeros(1)
        return Decomposition(
            torch.full_like(matrices, torch.nan),
            torch.full_like(matrices[..., 0], torch.nan),
            none > 0,
            none + torch.nan,
        )
    bases, spectra = bases.to(matrices.dtype), spectra.to(matrices.dtype).clamp_min(0.0)
    ones = matrices.new_ones(len(matrices), matrices.shape[-1], 1)
    wrong = torch.bmm(matrices, torch.bmm(bases, ones)) - torch.bmm(bases, spectra[..., None])
    scale = matrices.diagonal(dim1=-2, dim2=-1).abs().amax(-1).clamp_min(torch.finfo(matrices.dtype).tiny)
    residuals = wrong.abs().amax((1, 2)) / scale
    return Decomposition(bases, spectra, residuals < tolerance, residuals)


def stand_in(damped: Tensor, previous: Tensor, failures: Tensor) -> tuple[Tensor, Tensor]:
    """What serves where the inverse failed, and its rung (b,) in `RUNGS`.

    The previous inverse for the first `MAX_RAISES` failures in a row, while each new try is damped ten times more
    (`raised`); then the inverse of the damped diagonal; where that is not finite and positive, the identity.
    """
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    usable = ((diagonal > 0) & diagonal.isfinite()).all(-1)
    last_resort = torch.diag_embed(torch.where(usable[:, None], diagonal.reciprocal(), 1.0))
    rungs = torch.where(failures <= MAX_RAISES, 1, torch.where(usable, 2, 3))
    return torch.where((rungs == 1)[:, None, None], previous, last_resort), rungs


def raised(shifts: Tensor, failures: Tensor) -> Tensor:
    """Ten times the damping for every failure in a row, at most `MAX_RAISES` times."""
    return shifts * 10.0 ** failures.clamp(max=MAX_RAISES).to(shifts.dtype)
