"""Curvature of one layer by definition, from inputs and output gradients that plain hooks saw; nothing of our blocks.

With a_nt the inputs (patches for a convolution, 1 appended for a bias) and g_nt the gradients of a sample's loss:
A = (1/N) sum_n (1/T) sum_t a a^T, G = (1/N) sum_n sum_t g g^T, F = (1/N) sum_n h h^T with h_n the sample's gradient.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

LARGEST_VOCABULARY = 4096
Norm = nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm


class Seen(NamedTuple):
    """Input of one call, and the mean loss's gradient at its output."""

    inputs: Tensor
    grad: Tensor


class Rows(NamedTuple):
    """a (N, T, groups, n) and g (N, T, groups, m)."""

    inputs: Tensor
    grads: Tensor


@dataclass(frozen=True)
class Definition:
    """Factors of one layer as `Block.factors()` shows them, and the sizes needed to compare with the exact Fisher."""

    factors: Mapping[str, Tensor]
    gap: float | None
    """||F - its approximation|| / ||F||, for the empirical Fisher F of the layer's parameters; None if F is 0."""


def watch(model: nn.Module) -> dict[str, list[Seen]]:
    """What each layer's calls saw, filled by the next forward and backward pass."""
    seen: dict[str, list[Seen]] = {}

    def hook_of(name: str) -> object:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: object) -> None:
            if isinstance(output, Tensor) and output.requires_grad and given and isinstance(given[0], Tensor):
                inputs = given[0].detach().clone()
                output.register_hook(lambda grad: seen.setdefault(name, []).append(Seen(inputs, grad.clone())))

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(hook_of(name))
    return seen


def define(module: nn.Module, calls: Sequence[Seen]) -> Definition | str:
    """The curvature of a layer of torch.nn, or why there is no definition of it here."""
    samples = calls[0].inputs.shape[0]
    if isinstance(module, Norm):
        if len(calls) > 1:
            return "a normalisation layer that is called several times"
        return _of_norm(module, calls[0], samples)
    rows = [rows_of(module, call) for call in calls]
    whole = [r for r in rows if isinstance(r, Rows)]
    if len(whole) < len(rows):
        return next(r for r in rows if isinstance(r, str))
    A, G, gradients = (
        torch.stack([torch.einsum(sums, *pair) for pair in pairs]).sum(0)
        for sums, pairs in (
            ("ntgi,ntgj->gij", [(r.inputs, r.inputs) for r in whole]),
            ("ntgi,ntgj->gij", [(r.grads, r.grads) for r in whole]),
            ("ntgi,ntgj->ngij", [(r.grads, r.inputs) for r in whole]),
        )
    )
    A = A / sum(r.inputs.shape[0] * r.inputs.shape[1] for r in whole)
    G = samples * G
    gap = _kronecker_gap(A, G, gradients, samples)
    if isinstance(module, nn.Embedding):
        return Definition({"A": A[0].diagonal(), "G": G[0]}, gap)
    return Definition({"A": A, "G": G} if len(A) > 1 else {"A": A[0], "G": G[0]}, gap)


def rows_of(module: nn.Module, call: Seen) -> Rows | str:
    """a and g of one call, or why they are not known."""
    x, g = call
    kind = type(module)
    if kind is nn.Linear:
        a, grads = x.reshape(len(x), -1, 1, x.shape[-1]), g.reshape(len(g), -1, 1, g.shape[-1])
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        if module.groups > 1:
            return "a transposed convolution with groups"
        patches = _patches(module, g, module.out_channels, 1)
        for i, size in enumerate(x.shape[2:]):  # output_padding leaves room for patches that no input feeds
            patches = patches.narrow(2 + i, 0, size)
        a, grads = x.flatten(2).mT[:, :, None], patches.flatten(2).mT[:, :, None]
        return Rows(a, grads)
    elif isinstance(module, nn.modules.conv._ConvNd):
        groups = module.groups
        a = _patches(module, x, module.in_channels, groups).flatten(2).mT.unflatten(-1, (groups, -1))
        grads = g.flatten(2).mT.unflatten(-1, (groups, -1))
    elif kind is nn.Embedding:
        if len(cast("Tensor", module.weight)) > LARGEST_VOCABULARY:
            return f"an embedding of more than {LARGEST_VOCABULARY} rows"
        one_hot = functional.one_hot(x, len(cast("Tensor", module.weight))).to(g.dtype)
        return Rows(one_hot.reshape(len(x), -1, 1, one_hot.shape[-1]), g.reshape(len(x), -1, 1, g.shape[-1]))
    else:
        return f"{kind.__name__}: no definition outside its block"
    if module.bias is not None and module.bias.requires_grad:
        a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1)
    return Rows(a, grads)


def _patches(module: nn.modules.conv._ConvNd, x: Tensor, channels: int, groups: int) -> Tensor:
    """(N, channels * kernel, positions...): a convolution of this geometry whose filters each pick one number."""
    kernel, per_group = module.kernel_size, channels // groups
    count = per_group * math.prod(kernel)
    pick = torch.eye(count, dtype=x.dtype).reshape(count, per_group, *kernel)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        convolve: Any = (functional.conv1d, functional.conv2d, functional.conv3d)[len(kernel) - 1]
        patches: Tensor = convolve(x, pick, None, module.stride, module.padding, module.dilation)
        return patches
    of_any_dimension: Any = module
    return cast("Tensor", of_any_dimension._conv_forward(x, pick.repeat(groups, *(1 for _ in kernel), 1), None))


def _of_norm(module: Norm, call: Seen, samples: int) -> Definition:
    own = {name: p.detach() for name, p in module.named_parameters(recurse=False)}
    plain = {name: torch.ones_like(p) if name == "weight" else torch.zeros_like(p) for name, p in own.items()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers(recurse=False)}
    with torch.no_grad():
        normalised: Tensor = functional_call(module, {**plain, **buffers}, (call.inputs,))
    parts = []
    for name, p in module.named_parameters(recurse=False):
        if p.requires_grad:
            values = call.grad * normalised if name == "weight" else call.grad
            if isinstance(module, nn.LayerNorm | nn.RMSNorm):
                parts.append(values.reshape(samples, -1, p.numel()).sum(1))
            else:
                parts.append(values.reshape(samples, p.numel(), -1).sum(2))
    h = torch.stack(parts, dim=-1)  # (N, channels, parts)
    unit = samples * torch.einsum("nci,ncj->cij", h, h)
    gram = samples * (h.flatten(1) @ h.flatten(1).T)
    whole = float(gram.square().sum())
    gap = (max(whole - float(unit.square().sum()), 0.0) / whole) ** 0.5 if whole else None
    return Definition({"F": unit}, gap)


def _kronecker_gap(A: Tensor, G: Tensor, gradients: Tensor, samples: int) -> float | None:
    """||F - G (x) A|| / ||F|| over groups, from the N samples' gradients (N, groups, m, n) of the mean loss."""
    flat = gradients.movedim(1, 0).flatten(2)
    gram = samples * (flat @ flat.mT)  # ||F||^2 = ||gram||^2
    of_exact = float(gram.square().sum())
    if of_exact == 0:
        return None
    mixed = samples * torch.einsum("ngij,gik,ngkl,glj->", gradients, G, gradients, A)
    of_product = float((A.square().sum((1, 2)) * G.square().sum((1, 2))).sum())
    return math.sqrt(max(of_exact - 2 * float(mixed) + of_product, 0.0) / of_exact)


def solve(factors: Mapping[str, Tensor], matrix: Tensor, damping: float) -> Tensor:
    """(G + sqrt(lambda)/pi I)^-1 D (A + pi sqrt(lambda) I)^-1, or (F + lambda I)^-1 D, by `torch.linalg.solve`.

    D (groups, rows, columns), factors with the same leading dimension; an A that is a vector is a diagonal.
    """

    def damped(M: Tensor, shift: Tensor | float) -> Tensor:
        return M + shift * torch.eye(M.shape[-1], dtype=M.dtype)

    if "F" in factors:
        solution: Tensor = torch.linalg.solve(damped(factors["F"], damping), matrix)
        return solution
    A, G = factors["A"], factors["G"]
    A = torch.diag(A)[None] if A.dim() == 1 else A if A.dim() == 3 else A[None]
    G = G if G.dim() == 3 else G[None]
    done = []
    for a, g, d in zip(A, G, matrix, strict=True):
        if not float(a.trace()) or not float(g.trace()):
            done.append(torch.zeros_like(d))  # a dead group: its gradient is 0, and so is its step
            continue
        pi = (a.trace() / len(a) / (g.trace() / len(g))).sqrt()
        left = torch.linalg.solve(damped(g, damping**0.5 / pi), d)
        done.append(torch.linalg.solve(damped(a, damping**0.5 * pi), left.T).T)
    return torch.stack(done)
