"""A and G of rows of inputs and signals, what they leave of the exact Fisher, and dense solves with them."""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from triton_curv.verification.seen import Seen


class Rows(NamedTuple):
    """a (N, T, groups, n) and g (N, T, groups, m) of one call: the gradient is the sum of g a^T."""

    inputs: Tensor
    grads: Tensor


@dataclass(frozen=True)
class Kronecker:
    """A and G (groups, n, n), or (groups, n) where only a diagonal is meant; gradients (N, groups, m, n) by sample."""

    A: Tensor
    G: Tensor
    gradients: Tensor

    def gap(self) -> float | None:
        """||F - G (x) A|| / ||F||, F the empirical Fisher from the samples' gradients; None if F is 0."""
        samples, gradients = len(self.gradients), self.gradients
        flat = gradients.movedim(1, 0).flatten(2)
        of_exact = float((samples * (flat @ flat.mT)).square().sum())  # the norm of F is that of its Gram matrix
        if of_exact == 0:
            return None
        left = gradients * self.G[..., None] if self.G.dim() == 2 else self.G @ gradients
        both = left * self.A[:, None, :] if self.A.dim() == 2 else left @ self.A
        mixed = samples * float((gradients * both).sum())
        of_product = float((self.A.square().flatten(1).sum(1) * self.G.square().flatten(1).sum(1)).sum())
        return math.sqrt(max(of_exact - 2 * mixed + of_product, 0.0) / of_exact)


def of_rows(calls: Sequence[Rows], samples: int, diagonal: Container[str] = ()) -> Kronecker:
    """A averaged and G summed over the positions of all calls; of those in `diagonal` the diagonal alone."""

    def sums(name: str, sides: Sequence[Tensor]) -> Tensor:
        formula = "ntgi,ntgi->gi" if name in diagonal else "ntgi,ntgj->gij"
        return torch.stack([torch.einsum(formula, side, side) for side in sides]).sum(0)

    A, G = sums("A", [r.inputs for r in calls]), samples * sums("G", [r.grads for r in calls])
    gradients = torch.stack([torch.einsum("ntgi,ntgj->ngij", r.grads, r.inputs) for r in calls]).sum(0)
    return Kronecker(A / sum(r.inputs.shape[0] * r.inputs.shape[1] for r in calls), G, gradients)


def of_tokens(layer: nn.Embedding, calls: Sequence[Seen], samples: int) -> Kronecker:
    """A linear layer on one-hot vectors: A is the diagonal of frequencies, gradients are (N, 1, width, vocabulary)."""
    counts = layer.weight.new_zeros(layer.num_embeddings)
    G = layer.weight.new_zeros(1, layer.embedding_dim, layer.embedding_dim)
    gradients = layer.weight.new_zeros(samples, layer.num_embeddings, layer.embedding_dim)
    for call in calls:
        tokens, signal = call.inputs.reshape(samples, -1), call.grad.reshape(samples, -1, layer.embedding_dim)
        real = tokens != (-1 if layer.padding_idx is None else layer.padding_idx)
        counts.index_add_(0, tokens[real], torch.ones_like(tokens[real], dtype=counts.dtype))
        G += samples * signal[real].mT @ signal[real]
        for gradient, row, of_row, kept in zip(gradients, tokens, signal, real, strict=True):
            gradient.index_add_(0, row[kept], of_row[kept])
    return Kronecker((counts / counts.sum().clamp_min(1))[None], G, gradients.mT[:, None])


def token_rows(layer: nn.Embedding, call: Seen, samples: int) -> Rows:
    """An embedding as a transposed linear layer: its signals as inputs, one-hot tokens, 0 for padding, as gradients."""
    tokens = call.inputs.reshape(samples, -1)
    real = tokens != (-1 if layer.padding_idx is None else layer.padding_idx)
    one_hot = nn.functional.one_hot(tokens, layer.num_embeddings).to(call.grad.dtype) * real[..., None]
    return Rows(call.grad.reshape(samples, -1, 1, layer.embedding_dim), one_hot[:, :, None])


def of_shared_tokens(uses: Sequence[Rows], samples: int) -> Kronecker:
    """One product for a weight (vocabulary, width) that is an embedding and the heads of a net.

    Of F = N sum over uses and rows of g g^T (x) a a^T, g over the vocabulary: G is the diagonal of the partial trace
    over the width, A the partial trace over the vocabulary, divided by tr F.
    """
    G = samples * torch.stack([torch.einsum("ntgi,ntgj->gi", r.grads**2, r.inputs**2) for r in uses]).sum(0)
    A = torch.stack([torch.einsum("ntgk,ntgi,ntgj->gij", r.grads**2, r.inputs, r.inputs) for r in uses]).sum(0)
    gradients = torch.stack([torch.einsum("ntgi,ntgj->ngij", r.grads, r.inputs) for r in uses]).sum(0)
    return Kronecker(samples * A / G.sum(), G, gradients)


def mean_eigenvalue(factors: Mapping[str, Tensor]) -> float:
    """Of G (x) A or F, over all groups."""
    means = [(m.diagonal(dim1=-2, dim2=-1) if m.dim() == 3 else m).mean(1) for m in factors.values()]
    return float(torch.stack(means).prod(0).mean())


def solve(factors: Mapping[str, Tensor], matrix: Tensor, damping: float) -> Tensor:
    """(G + sqrt(lambda)/pi I)^-1 D (A + pi sqrt(lambda) I)^-1, or (F + lambda I)^-1 D, by `torch.linalg.solve`.

    D (groups, rows, columns); factors (groups, n, n), or (groups, n) for diagonals.
    """
    if "F" in factors:
        return _damped_solve(factors["F"], damping, matrix)
    done = []
    for a, g, d in zip(factors["A"], factors["G"], matrix, strict=True):
        trace_a, trace_g = (m.trace() if m.dim() == 2 else m.sum() for m in (a, g))
        if not float(trace_a) or not float(trace_g):
            done.append(torch.zeros_like(d))  # a dead group: its gradient is 0, and so is its step
            continue
        pi = float((trace_a / len(a) / (trace_g / len(g))).sqrt())
        left = _damped_solve(g, damping**0.5 / pi, d)
        done.append(_damped_solve(a, damping**0.5 * pi, left.T).T)
    return torch.stack(done)


def _damped_solve(factor: Tensor, shift: float, matrix: Tensor) -> Tensor:
    if factor.dim() < matrix.dim():
        return matrix / (factor + shift)[..., None]
    solution: Tensor = torch.linalg.solve(factor + shift * torch.eye(factor.shape[-1], dtype=factor.dtype), matrix)
    return solution
