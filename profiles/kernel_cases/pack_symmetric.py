"""`pack_symmetric` and `unpack_symmetric` on the factors of real nets, against a gather by triangular indices."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from profiles.kernel_cases.case import Case
from profiles.kernel_cases.shapes import (
    gpt2_factors,
    llama7b_layer_factors,
    resnet50_factors,
    vit_b16_factors,
)
from triton_curv_kernels import pack_symmetric, packed_offsets, unpack_symmetric

BAR = "at least 88 % of the memory's bandwidth on an H200"


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """To fp32 and to bf16, and back, all factors of a net at once."""
    nets = {"ResNet-50": resnet50_factors(1)}
    if device.type != "cuda":
        nets = {"ResNet-50, up to 1152": [shape for shape in resnet50_factors(1) if shape.n <= 1152]}
    elif not quick:
        nets |= {"GPT-2 124M": gpt2_factors(), "ViT-B/16": vit_b16_factors()}
        nets |= {"LLaMA-7B layer": llama7b_layer_factors()}
    for net, shapes in nets.items():
        sizes = [shape.n + shape.ones for shape in shapes]
        matrices = [_symmetric(size, device) for size in sizes]
        for dtype in (torch.float32, torch.bfloat16):
            yield _pack(f"{net} to {str(dtype).removeprefix('torch.')}", matrices, dtype)
            yield _unpack(f"{net} from {str(dtype).removeprefix('torch.')}", matrices, dtype)


def _symmetric(size: int, device: torch.device) -> Tensor:
    half = torch.randn(size, size, device=device)
    return half.add_(half.mT.clone())


def _triangles(matrices: Sequence[Tensor], dtype: torch.dtype, indices: Sequence[Tensor]) -> Tensor:
    return torch.cat([0.5 * m[i[0], i[1]] for m, i in zip(matrices, indices, strict=True)]).to(dtype)


def _matrices(buffer: Tensor, sizes: Sequence[int], indices: Sequence[Tensor]) -> list[Tensor]:
    results = []
    offsets = packed_offsets(sizes)
    for n, start, end, (row, column) in zip(sizes, offsets, offsets[1:], indices, strict=False):
        matrix = torch.empty(n, n, device=buffer.device)
        matrix[row, column] = 2.0 * buffer[start:end].float()
        matrix[column, row] = matrix[row, column]
        results.append(matrix)
    return results


def _round_trip_error(matrices: Sequence[Tensor], dtype: torch.dtype) -> float:
    """Largest over the first and the largest matrices, relative to the largest number."""
    chosen = [matrices[0], max(matrices, key=Tensor.numel)]
    sizes = [m.shape[0] for m in chosen]
    results = unpack_symmetric(pack_symmetric(chosen, dtype, 0.5), sizes, torch.float32, 2.0)
    pairs = zip(results, chosen, strict=True)
    return max(float((r.double() - m.double()).abs().max() / m.double().abs().max()) for r, m in pairs)


def _case(
    op: str,
    name: str,
    ours: Callable[[], object],
    naive: Callable[[], object],
    matrices: Sequence[Tensor],
    dtype: torch.dtype,
    dense_share: float,
) -> Case:
    numbers = packed_offsets([m.shape[0] for m in matrices])[-1]
    dense = sum(m.numel() for m in matrices)
    return Case(
        op=op,
        name=name,
        ours=ours,
        alternatives={"triangular indices": naive},
        error=partial(_round_trip_error, matrices, dtype),
        allowed_error=lambda: torch.finfo(dtype).eps if dtype != torch.float32 else 0.0,
        flops=float(numbers),
        bytes=4.0 * dense * dense_share + dtype.itemsize * numbers,
        bound="memory",
        bar=BAR,
    )


def _indices(matrices: Sequence[Tensor]) -> list[Tensor]:
    """16 bytes of index for each number, which a user would keep or make anew; for equal sizes made once."""
    device = matrices[0].device
    made = {n: torch.tril_indices(n, n, device=device) for n in {m.shape[0] for m in matrices}}
    return [made[m.shape[0]] for m in matrices]


def _pack(name: str, matrices: Sequence[Tensor], dtype: torch.dtype) -> Case:
    """Half of each matrix is read."""
    ours = partial(pack_symmetric, matrices, dtype, 0.5)
    naive = partial(_triangles, matrices, dtype, _indices(matrices))
    return _case("pack_symmetric", name, ours, naive, matrices, dtype, 0.5)


def _unpack(name: str, matrices: Sequence[Tensor], dtype: torch.dtype) -> Case:
    """All of each matrix is written."""
    sizes = [m.shape[0] for m in matrices]
    buffer = pack_symmetric(matrices, dtype, 0.5)
    ours = partial(unpack_symmetric, buffer, sizes, torch.float32, 2.0)
    naive = partial(_matrices, buffer, sizes, _indices(matrices))
    return _case("unpack_symmetric", name, ours, naive, matrices, dtype, 1.0)
