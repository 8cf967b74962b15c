"""Damped inverses of wide factors of which few directions stand out: a multiple of I less a few outer products."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_SIZE = 256  # smaller factors are inverted densely: that is as fast
LEAST_ACROSS = 64  # so are those of layers that are narrow on their other side: there is little to multiply
ROUNDS = 6  # times the basis may be widened in one renewal
PROBES = 4  # rows of power steps; their number matters little
NORM_STEPS = 3  # of 66 factors in training the norm found was 0.89 to 1.5 of the true one; 0.83 after 2, 0.57 after 1
SEED = 0x5EED


class LowRank(NamedTuple):
    """(M + l I)^-1 ~ scale (I - U^T diag(gains) U): `basis` U (r, n) with orthonormal rows, `gains` (r,)."""

    basis: Tensor
    gains: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """r."""
        return len(self.gains)

    def dense(self) -> Tensor:
        """The whole matrix (n, n)."""
        n = self.basis.shape[1]
        identity = torch.eye(n, dtype=self.basis.dtype, device=self.basis.device)
        return identity.sub_((self.basis.mT * self.gains) @ self.basis).mul_(self.scale)


class Truncation(NamedTuple):
    """A form, and the bound that it keeps (see `truncate`)."""

    form: LowRank
    error: float


def pays(size: int, across: int) -> bool:
    """Whether a low-rank form of a factor of this size saves time in a layer whose other side has `across` rows."""
    return size >= LEAST_SIZE and across >= LEAST_ACROSS


def truncate(matrix: Tensor, shift: float, start: Tensor | None, tolerance: float) -> Truncation | None:
    r"""(M + l I)^-1 from the eigenvectors that stand out, M (n, n) positive semidefinite, l = `shift`.

    With r eigenpairs (s_i, u_i), E = M - U S U^T, and mu = tr E / (n - r), the mean of what they leave, known exactly:

        M~ = U S U^T + mu (I - U U^T),   (M~ + l I)^-1 = 1/(mu + l) (I - U diag((s - mu)/(s + l)) U^T)

    E >= -nu, so |(M~ + l I)^-1/2 (M - M~) (M~ + l I)^-1/2|_2 <= max(|E|_2, mu + nu) / (mu + l), the error. r is the
    smallest for which s_(r+1) gives one of tolerance / 2; then |E|_2 is taken by `NORM_STEPS` power steps from the next
    eigenvectors, and where the error is above `tolerance` all is done again from what was found.

    The pairs are those of a Nystrom approximation by rows V, which are `start` (r', n) of the last time and random
    ones (arXiv 2110.02820, algorithm 2.1): of (M + nu I), (Y V^T)^-1 with Y = V M + nu V between Y^T and Y. One product
    with M, 2 n^2 r operations, to n^3 and more of a dense inverse. The host looks at a few numbers.

    Returns:
        None where r would exceed n / 3, or M is not positive semidefinite, or not finite: invert it densely.

    """
    n = matrix.shape[-1]
    trace = float(matrix.diagonal().sum())
    if trace == 0.0 and not bool(matrix.any()):  # a layer that has not been used yet
        return Truncation(LowRank(matrix[:0], matrix[0, :0], 1.0 / shift), 0.0)
    rows = _widened(matrix, start, n // 8 if start is None else max(12, len(start) // 6))
    for _ in range(ROUNDS):
        if len(rows) > n // 2 or not abs(trace) < math.inf:
            return None
        pairs = _nystrom(matrix, rows, shift * min(tolerance, 2.0) / 40)
        if pairs is None:
            return None
        values, basis, nu = pairs
        left = n - torch.arange(len(values), dtype=values.dtype, device=values.device)
        means = ((trace - values.cumsum(0).sub_(values)) / left).clamp_min_(0.0)
        errors = torch.maximum(values - means, means) / (means + shift)
        enough = torch.nonzero(errors <= tolerance / 2)
        if len(enough):
            rank = int(enough[0])
            if rank > n // 3:
                return None
            mean, kept = float(means[rank]), values[:rank]
            error = max(_norm_left(matrix, kept, basis, rank), mean + nu) / (mean + shift)
            if error <= tolerance:
                gains = ((kept - mean) / (kept + shift)).clamp_min_(0.0)
                return Truncation(LowRank(basis[:rank], gains, 1.0 / (mean + shift)), error)
            basis = basis[: rank + rank // 4]
        rows = _widened(matrix, basis, max(12, len(basis) // (6 if len(enough) else 2)))
    return None


def _nystrom(matrix: Tensor, rows: Tensor, least: float) -> tuple[Tensor, Tensor, float] | None:
    """Eigenvalues (k,), from the largest, and orthonormal eigenvectors (k, n) of M's approximation from V (k, n), nu.

    nu, at `least` this, keeps Y V^T definite where M has fewer directions than V.
    """
    images = rows @ matrix
    most = float(images.norm(dim=1).amax())
    if not 0 < most < math.inf:
        return None
    nu = max(least, 8 * len(rows) * torch.finfo(matrix.dtype).eps * most)
    images.add_(rows, alpha=nu)
    try:
        lower, failed = torch.linalg.cholesky_ex(images @ rows.mT)
        if bool(failed):
            return None
        half = torch.linalg.solve_triangular(lower, images, upper=False)
        values, vectors = torch.linalg.eigh(half @ half.mT)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # of eigh, where numbers are not finite, too
        return None
    values, turn = values.flip(0), vectors.flip(1).mT
    basis = (turn / values.clamp_min(torch.finfo(values.dtype).tiny).sqrt()[:, None]) @ half
    return values - nu, basis, nu


def _norm_left(matrix: Tensor, values: Tensor, basis: Tensor, rank: int) -> float:
    """|E|_2 of what r = `rank` pairs leave of M, from below, by power steps."""
    kept, probes = basis[:rank], basis[rank : rank + PROBES]
    norm = 0.0
    for _ in range(NORM_STEPS):
        images = torch.addmm(probes @ matrix, (probes @ kept.mT).mul_(values), kept, alpha=-1)
        lengths = images.norm(dim=1, keepdim=True)
        norm = float(lengths.amax())
        probes = images / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)
    return norm


def _widened(matrix: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """The rows, and `count` random ones, the same every time."""
    n = matrix.shape[-1]
    generator = torch.Generator(matrix.device).manual_seed(SEED)
    fresh = torch.randn(count, n, generator=generator, dtype=matrix.dtype, device=matrix.device)
    fresh.div_(n**0.5)
    return fresh if rows is None else torch.cat([rows, fresh])


# ---- in the place of a dense inverse (n, n): rows of the basis, ..., gains, and (scale, ..., -1 - rank); the last
# number of an inverse of a positive definite matrix is positive, so that it says which of the two lies there


def write_(place: Tensor, form: LowRank) -> None:
    """Put a form where a dense inverse (n, n) would lie, n >= 4 and r <= n - 2."""
    rank = form.rank
    place[:rank].copy_(form.basis)
    place[-2, :rank].copy_(form.gains)
    place[-1, :: len(place) - 1].copy_(place.new_tensor([form.scale, -1.0 - rank]))


def read(place: Tensor) -> LowRank | None:
    """What `write_` has put there, as views; None for a dense inverse."""
    scale, last = place[-1, :: len(place) - 1].tolist()
    if not last < 0:
        return None
    rank = int(-1.0 - last)
    return LowRank(place[:rank], place[-2, :rank], scale)


# ---- products


def times_right_(matrix: Tensor, form: LowRank) -> Tensor:
    """D <- D scale (I - U^T diag(gains) U) of D (m, n), in place."""
    inside = (matrix @ form.basis.mT).mul_(form.gains)
    return matrix.addmm_(inside, form.basis, beta=form.scale, alpha=-form.scale)


def times_left_(form: LowRank, matrix: Tensor) -> Tensor:
    """D <- scale (I - U^T diag(gains) U) D of D (m, n), in place."""
    inside = (form.basis @ matrix).mul_(form.gains[:, None])
    return matrix.addmm_(form.basis.mT, inside, beta=form.scale, alpha=-form.scale)
