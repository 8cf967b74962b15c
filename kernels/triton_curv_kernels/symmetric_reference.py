"""The plain-torch references of `pack_symmetric` and `unpack_symmetric`: the path that CPUs take."""

from collections.abc import Sequence

import torch
from torch import Tensor

from triton_curv_kernels.packed import packed_offsets


def _scaled(tensor: Tensor, scale: float | Tensor) -> Tensor:
    """`tensor * scale` in at least fp32."""
    no_scale = not isinstance(scale, Tensor) and scale == 1.0
    return tensor if no_scale else tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * scale


def pack_symmetric_reference(matrices: Sequence[Tensor], dtype: torch.dtype, scale: float | Tensor = 1.0) -> Tensor:
    """Lower triangles of `matrices`, times `scale`, in `dtype`: four block copies a matrix."""
    sizes = [matrix.shape[0] for matrix in matrices]
    offsets = packed_offsets(sizes)
    packed = torch.empty(offsets[-1], dtype=dtype, device=matrices[0].device)
    for matrix, n, start, end in zip(matrices, sizes, offsets, offsets[1:], strict=False):
        half, even = (n + 1) // 2, 1 - n % 2
        rectangle = packed[start:end].view(n + even, half)
        scaled = _scaled(matrix, scale)
        rectangle[even:].copy_(scaled[:, :half])
        small = rectangle[: n - half, 1 - even :]
        small.tril_(-1).add_(scaled[half:, half:].triu())
    return packed


def unpack_symmetric_reference(
    packed: Tensor, sizes: Sequence[int], dtype: torch.dtype, scale: float | Tensor = 1.0
) -> list[Tensor]:
    """Dense matrices of the given sizes, times `scale`, in `dtype`."""
    matrices = [torch.empty((n, n), dtype=dtype, device=packed.device) for n in sizes]
    unpack_symmetric_reference_(matrices, packed, scale)
    return matrices


def unpack_symmetric_reference_(matrices: Sequence[Tensor], packed: Tensor, scale: float | Tensor = 1.0) -> None:
    """The same into given matrices: five block operations each."""
    sizes = [matrix.shape[0] for matrix in matrices]
    offsets = packed_offsets(sizes)
    for matrix, n, start, end in zip(matrices, sizes, offsets, offsets[1:], strict=False):
        half, even = (n + 1) // 2, 1 - n % 2
        rectangle = _scaled(packed[start:end].view(n + even, half), scale)
        matrix[:, :half] = rectangle[even:]
        matrix[half:, half:] = rectangle[: n - half, 1 - even :].mT
        matrix.tril_()
        matrix.add_(matrix.tril(-1).mT)
