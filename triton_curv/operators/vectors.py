"""Lists of tensors as one vector, without copying them into one."""

from collections.abc import Sequence

import torch
from torch import Tensor

Vectors = list[Tensor]


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """sum_i <a_i, b_i>, a scalar on the tensors' device."""
    return torch.stack([torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(a, b, strict=True)]).sum()


def norm_2(a: Sequence[Tensor]) -> Tensor:
    """sqrt(sum_i ||a_i||^2)."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(a))))
    return norm


def norm_inf(a: Sequence[Tensor]) -> Tensor:
    """max_i max|a_i|; empty tensors count 0. NaN if one is there."""
    return torch.stack([t.abs().max() for t in a if t.numel()] or [torch.zeros(())]).max()


def add_scaled(a: Sequence[Tensor], b: Sequence[Tensor], scale: float | Tensor) -> Vectors:
    """a + scale b, new tensors."""
    return list(torch._foreach_add(list(a), torch._foreach_mul(list(b), scale)))


def add_(totals: Vectors, terms: Sequence[Tensor]) -> None:
    """totals += terms."""
    torch._foreach_add_(totals, list(terms))


def zeros_like(a: Sequence[Tensor], dtype: torch.dtype | None = None) -> Vectors:
    """A zero vector that neither requires grad nor shares memory with `a`."""
    return [torch.zeros_like(t, dtype=dtype, requires_grad=False) for t in a]


def working_dtype(t: Tensor) -> torch.dtype:
    """Solvers work in fp64 for fp64 parameters and in fp32 for all narrower ones."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32
