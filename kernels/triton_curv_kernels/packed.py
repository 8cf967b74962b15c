# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201
# (Triton's language is untyped)
"""The packed format of symmetric matrices, n (n + 1) / 2 numbers each: where they lie, to it and from it.

Layout: rectangular full packed, LAPACK's TRANSR = 'T', UPLO = 'L' (Gustavson et al., ACM TOMS 37(2), 2010). With
k = ceil(n/2) and e = 1 for even n, else 0, a matrix M is the row-major rectangle R (n + e, k) without a gap:

    R[i + e, j] = M[i, j]              for j <= i, j < k       the first k columns of the lower triangle
    R[j - k, i - k + 1 - e] = M[i, j]  for k <= j <= i         the small triangle left over, above them

Nothing is wasted, rows of M are rows of R, so that both sides are read and written in long runs, and the rows of the
lower left block M[k:, :k] are the last rows of R, which a matrix product can write in place.
"""

from collections.abc import Iterable
from itertools import accumulate
from math import isqrt
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from triton_curv_kernels.backend import UnsupportedInputError


def packed_length(n: int) -> int:
    """n (n + 1) / 2: how many numbers a symmetric n x n matrix has."""
    return n * (n + 1) // 2


def packed_size(length: int) -> int:
    """Inverse of `packed_length`.

    Raises:
        UnsupportedInputError: no n has this length.

    """
    n = (isqrt(8 * length + 1) - 1) // 2
    if packed_length(n) != length:
        raise UnsupportedInputError(f"expected a packed matrix of n (n + 1) / 2 numbers, got {length}")
    return n


def packed_offsets(sizes: Iterable[int]) -> list[int]:
    """Where the triangle of each n x n matrix starts in the buffer, and last the length of the buffer."""
    return list(accumulate((n * (n + 1) // 2 for n in sizes), initial=0))


class PackedBlocks(NamedTuple):
    """Views of packed matrices (..., n (n + 1) / 2), k = ceil(n / 2).

    `first` (..., k, k) has M[:k, :k] in its lower triangle, `last` (..., n - k, n - k) has M[k:, k:] in its upper
    one; they overlap, each where the other is unused. `below` (..., n - k, k) is M[k:, :k].
    """

    first: Tensor
    last: Tensor
    below: Tensor


def packed_blocks(packed: Tensor, n: int) -> PackedBlocks:
    """The three blocks of packed (..., n (n + 1) / 2), in place; the last dimension is contiguous."""
    half, even = (n + 1) // 2, 1 - n % 2
    rectangle = packed.unflatten(-1, (n + even, half)) if n else packed.new_empty((*packed.shape[:-1], 1, 0))
    first = rectangle[..., even : even + half, :]
    last = rectangle[..., : n - half, 1 - even : 1 - even + n - half]
    return PackedBlocks(first, last, rectangle[..., even + half :, :])


def packed_diagonal(packed: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Views of M's diagonal in packed (..., n (n + 1) / 2): its first ceil(n / 2) numbers, and the others."""
    blocks = packed_blocks(packed, n)
    return blocks.first.diagonal(0, -2, -1), blocks.last.diagonal(0, -2, -1)


def from_dense(matrix: Tensor) -> Tensor:
    """Pack (..., n, n) into (..., n (n + 1) / 2): three block copies; `pack_symmetric` does a list at once.

    Raises:
        UnsupportedInputError: a matrix that is not square.

    """
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise UnsupportedInputError(f"expected square matrices (..., n, n), got {tuple(matrix.shape)}")
    n = matrix.shape[-1]
    half = (n + 1) // 2
    packed = matrix.new_empty((*matrix.shape[:-2], packed_length(n)))
    first, last, below = packed_blocks(packed, n)
    first.copy_(matrix[..., :half, :half])
    below.copy_(matrix[..., half:, :half])
    last.tril_(-1).add_(matrix[..., half:, half:].triu())
    return packed


def to_dense(packed: Tensor) -> Tensor:
    """Unpack (..., n (n + 1) / 2) into symmetric (..., n, n): inverse of `from_dense`.

    Raises:
        UnsupportedInputError: no n has this length.

    """
    n = packed_size(packed.shape[-1])
    half = (n + 1) // 2
    first, last, below = packed_blocks(packed.contiguous(), n)
    matrix = packed.new_empty((*packed.shape[:-1], n, n))
    matrix[..., :half, :half] = first
    matrix[..., half:, :half] = below
    matrix[..., half:, half:] = last.mT
    matrix.tril_()
    return matrix.add_(matrix.tril(-1).mT)


@triton.jit
def offset_in_packed(i, j, n):
    """Where M[i, j], j <= i, lies in its packed form; int64 in, int64 out."""
    half = (n + 1) // 2
    even = 1 - n % 2
    return tl.where(j < half, (i + even) * half + j, (j - half) * half + i - half + 1 - even)


@triton.jit
def tile_of(p, tiles):
    """Tile (row, column), row >= column, number p of a triangle of `tiles` rows: exact, in integers only.

    Row `tiles - 1 - i` (long) and row `i` (short) together have tiles + 1 tiles, whatever i: they are numbered as one.
    """
    pair = p // (tiles + 1)
    j = p % (tiles + 1)
    is_long = j < tiles - pair
    row = tl.where(is_long, tiles - 1 - pair, pair)
    column = tl.where(is_long, j, j - (tiles - pair))
    return row, column
