"""Floating-point operations and bytes of each stage, from shapes alone: the least work that the result needs."""

from typing import NamedTuple


class Cost(NamedTuple):
    """FLOPs and bytes moved through memory."""

    flops: int
    bytes: int

    def __add__(self, other: object) -> "Cost":
        """Both numbers added."""
        if not isinstance(other, Cost):
            return NotImplemented
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


NOTHING = Cost(0, 0)


def triangle(n: int) -> int:
    """n (n + 1) / 2: entries of a symmetric matrix."""
    return n * (n + 1) // 2


def factor_cost(rows: int, n: int, batch: int = 1, itemsize: int = 4) -> Cost:
    """C + X^T X for X (batch, rows, n), one triangle: 2 rows multiply-adds an entry; X read, C read and written."""
    return Cost(2 * batch * rows * triangle(n), batch * (rows * n * itemsize + 2 * triangle(n) * 4))


def inverse_cost(n: int, batch: int = 1, itemsize: int = 4) -> Cost:
    """Cholesky inverse of (batch, n, n): n^3/3 for the factor and 2 n^3/3 for the inverse; matrix in, inverse out."""
    return Cost(batch * n**3, batch * (triangle(n) + n * n) * itemsize)


def apply_cost(rows: int, columns: int, batch: int = 1, itemsize: int = 4) -> Cost:
    """G^-1 D A^-1 for D (batch, rows, columns): two products; both inverses and D read, the result written."""
    moved = rows**2 + columns**2 + 2 * rows * columns
    return Cost(2 * batch * rows * columns * (rows + columns), batch * moved * itemsize)


def update_cost(numel: int, itemsize: int = 4) -> Cost:
    """Momentum and decay: parameter and momentum read and written, update read."""
    return Cost(6 * numel, 5 * numel * itemsize)
