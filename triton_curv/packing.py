"""Batches of symmetric matrices as rows of packed triangles: `pack_symmetric` of the kernels for (batch, n, n)."""

from functools import lru_cache

import torch
from torch import Tensor

from triton_curv_kernels import pack_symmetric, unpack_symmetric_
from triton_curv_kernels.backend import use_reference

WIDEST_BATCHED = 32  # on a GPU, larger matrices go to the kernels one by one; of smaller ones there are thousands

SMALL_BLOCK = 256


def packed_size(n: int) -> int:
    """Numbers in one triangle, its diagonal included."""
    return n * (n + 1) // 2


def pack(matrices: Tensor, spoil: bool = False) -> Tensor:
    """(batch, n, n) symmetric -> (batch, n (n + 1) / 2), each row laid out as `pack_symmetric` of the kernels does.

    With `spoil` parts of the matrices may be overwritten, which takes less memory.
    """
    batch, n, _ = matrices.shape
    if n == 1:
        return matrices.reshape(batch, 1).clone()
    if n > WIDEST_BATCHED and not use_reference(matrices):
        return pack_symmetric(list(matrices.unbind()), matrices.dtype).view(batch, -1)
    half, even = (n + 1) // 2, 1 - n % 2
    packed = torch.empty((batch, packed_size(n)), dtype=matrices.dtype, device=matrices.device)
    rectangle = packed.view(batch, n + even, half)
    rectangle[:, even:].copy_(matrices[:, :, :half])
    small = rectangle[:, : n - half, 1 - even :]
    last = matrices[:, half:, half:]
    small.tril_(-1).add_(last.triu_() if spoil else last.triu())
    return packed


def unpack(packed: Tensor, n: int, out: Tensor | None = None) -> Tensor:
    """(batch, n (n + 1) / 2) -> (batch, n, n), bitwise symmetric: a fresh tensor, or `out`."""
    if n == 1:
        return packed.view(-1, 1, 1).clone() if out is None else out.copy_(packed.view(-1, 1, 1))
    if n > WIDEST_BATCHED and not use_reference(packed):
        matrices = packed.new_empty((len(packed), n, n)) if out is None else out
        unpack_symmetric_(list(matrices.unbind()), packed.reshape(-1))
        return matrices
    half, even = (n + 1) // 2, 1 - n % 2
    rectangle = packed.view(-1, n + even, half)
    matrices = packed.new_empty((len(packed), n, n)) if out is None else out
    if n <= SMALL_BLOCK or torch.compiler.is_compiling():
        matrices[:, :, :half] = rectangle[:, even:]
        matrices[:, half:, half:] = rectangle[:, : n - half, 1 - even :].mT
        if n <= WIDEST_BATCHED or torch.compiler.is_compiling():
            matrices.tril_()
            return matrices.add_(matrices.tril(-1).mT)
        for matrix in matrices:
            _mirror_(matrix)
        return matrices
    for matrix, stored in zip(matrices.unbind(), rectangle.unbind(), strict=True):
        (first, above), (below, last) = _quarters(matrix, half)
        matrix[:, :half].copy_(stored[even:])
        above.copy_(below.T)
        _mirror_(first)
        last.copy_(stored[: n - half, 1 - even :])
        _mirror_(last.T)
    return matrices


def _mirror_(matrix: Tensor) -> None:
    """The lower triangle of (n, n) onto the upper one by blocks, which stay in the cache while they are transposed."""
    if len(matrix) <= SMALL_BLOCK:
        upper = matrix.tril_().T.clone(memory_format=torch.contiguous_format)
        matrix.tril_(-1).add_(upper)  # in place, which only writes zeros: a third of the time of `tril`
        return
    (first, above), (below, last) = _quarters(matrix, len(matrix) // 2)
    above.copy_(below.T)
    _mirror_(first)
    _mirror_(last)


def _quarters(matrix: Tensor, half: int) -> list[tuple[Tensor, ...]]:
    """Of (n, n), of which the first is (half, half): by rows."""
    sizes = [half, len(matrix) - half]
    return [rows.split(sizes, 1) for rows in matrix.split(sizes)]


@lru_cache(maxsize=1024)
def _diagonal(n: int) -> tuple[int, ...]:
    half, even = (n + 1) // 2, 1 - n % 2
    first = [(i + even) * half + i for i in range(half)]
    return (*first, *((i - half) * half + i - half + 1 - even for i in range(half, n)))


def diagonal_places(n: int, device: torch.device) -> Tensor:
    """Where the n diagonal elements lie in a packed row."""
    return torch.tensor(_diagonal(n), dtype=torch.int64, device=device)


def squared_norms(packed: Tensor, diagonal: Tensor) -> Tensor:
    """||M||_F^2 of each row; `diagonal` is its `diagonal_places`."""
    twice = packed.new_full(packed.shape[1:], 2.0)  # an element beside the diagonal stands for two
    twice[diagonal] = 1.0
    return packed.square() @ twice
