"""Damped inverses of wide factors of which few directions stand out: a multiple of I less a few outer products."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_SIZE = 256  # smaller factors are inverted densely: that is as fast
LEAST_ACROSS = 64  # so are those of layers that are narrow on their other side: there is little to multiply
ROUNDS = 6  # times the basis may be widened in one renewal
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

    With Ritz pairs (s_i, u_i) and mu = (tr M - sum s_i) / (n - r), the mean of the other eigenvalues, known exactly:

        M~ = U S U^T + mu (I - U U^T),   (M~ + l I)^-1 = 1/(mu + l) (I - U diag((s - mu)/(s + l)) U^T)

    The error is |(M~ + l I)^-1/2 (M - M~) (M~ + l I)^-1/2|_2 <= e/2 + sqrt(e^2/4 + c^2) <= `tolerance`, with
    e = max(b - mu, mu) / (mu + l) for what is left out, b = s_(r+1) + |M u_(r+1) - s_(r+1) u_(r+1)|, and
    c = |(S + l I)^-1/2 U^T M (I - U U^T)|_2 / sqrt(mu + l) for its coupling with U. c is a bound. b is one of the
    largest eigenvalue left out once the basis has converged; until then it is an estimate, and the error may be twice
    what it says (random rows look for what the basis lacks).

    Subspace iteration: rows `start` (r', n) of the last time and random ones, times M, made orthonormal, and
    Rayleigh-Ritz: 4 n^2 r operations, to n^3 and more of a dense inverse. r is the smallest with e <= tolerance / 2;
    if the rows are not enough, again with more of them. The host looks at r numbers.

    Returns:
        None where r would exceed n / 3, or M is not positive semidefinite, or not finite: invert it densely.

    """
    n = matrix.shape[-1]
    trace = float(matrix.diagonal().sum())
    rows = _widened(matrix, start, n // 8 if start is None else max(12, len(start) // 6))
    for _ in range(ROUNDS):
        if len(rows) > n // 2 or not abs(trace) < math.inf:
            return None
        basis = torch.linalg.qr((rows @ matrix).mT).Q.mT
        for _ in range(2 if start is None else 0):
            basis = torch.linalg.qr((basis @ matrix).mT).Q.mT
        images = basis @ matrix
        small = images @ basis.mT
        if not bool(small.isfinite().all()):
            return None
        values, vectors = torch.linalg.eigh(small)
        values, turn = values.flip(0), vectors.flip(1).mT
        if not float(values[-1]) > -shift:
            return None
        rows = turn @ basis
        rest = torch.addcmul(turn @ images, values[:, None], rows, value=-1)
        left = n - torch.arange(len(values), dtype=values.dtype, device=values.device)
        sums = torch.cat([values.new_zeros(1), values.cumsum(0)[:-1]])
        means = ((trace - sums) / left).clamp_min_(0.0)
        errors = torch.maximum(values + rest.norm(dim=1) - means, means) / (means + shift)
        enough = torch.nonzero(errors <= tolerance / 2)
        if len(enough):
            rank = int(enough[0])
            if rank > n // 3:
                return None
            mean, half, kept = float(means[rank]), float(errors[rank]) / 2, values[:rank]
            coupling = _largest(rest[:rank] / (kept + shift).sqrt()[:, None]) / (mean + shift) ** 0.5
            error = half + math.hypot(half, coupling)
            if error <= tolerance:
                gains = ((kept - mean) / (kept + shift)).clamp_min_(0.0)
                return Truncation(LowRank(rows[:rank], gains, 1.0 / (mean + shift)), error)
            rows = rows[: rank + rank // 4]
        start, rows = rows, _widened(matrix, rows, max(12, len(rows) // (6 if len(enough) else 2)))
    return None


def _largest(rows: Tensor) -> float:
    """A bound of |W|_2, W (r, n): (tr (W W^T)^16)^(1/32), at most r^(1/32) times too large."""
    if not len(rows):
        return 0.0
    gram = rows @ rows.mT
    scale = float(gram.diagonal().sum())
    if not scale > 0:
        return 0.0
    gram.div_(scale)
    for _ in range(3):
        gram = gram @ gram
    return math.sqrt(scale) * math.pow(float(gram.norm()), 0.0625)


def _widened(matrix: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """The rows, and `count` random ones, the same every time."""
    n = matrix.shape[-1]
    generator = torch.Generator(matrix.device).manual_seed(SEED)
    fresh = torch.randn(count, n, generator=generator, dtype=matrix.dtype, device=matrix.device)
    return fresh if rows is None else torch.cat([rows, fresh / n**0.5])


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
