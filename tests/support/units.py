"""Kronecker factors of layers on rows, and exact Fishers of any parameters, by loops and `jacrev`; float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev


def per_unit_gradients(model: nn.Module, names: Sequence[str], losses: Callable[[nn.Module], Tensor]) -> Tensor:
    """Return (units, p): d losses(model)[unit] / d the named parameters, flattened one after another.

    Call it before KFAC attaches to the model: taps refuse to run under `torch.func`.
    """
    own = {name: model.get_parameter(name).detach() for name in names}

    def run(parameters: dict[str, Tensor]) -> Tensor:
        class Bound(nn.Module):
            def forward(self, *args: Tensor) -> Tensor:
                out: Tensor = functional_call(model, parameters, args)
                return out

        return losses(Bound())

    parts: dict[str, Tensor] = jacrev(run)(own)
    return torch.cat([parts[name].flatten(1) for name in names], dim=1)


def second_moment(rows: Tensor) -> Tensor:
    """Return (1/k) sum_i r_i r_i^T of rows (k, n), one outer product at a time."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=rows.dtype)
    for row in rows:
        total += torch.outer(row, row) / len(rows)
    return total


def observed(model: nn.Module, name: str, loss: Callable[[nn.Module], Tensor]) -> tuple[Tensor, Tensor]:
    """Return input and gradient of the loss at the output of one layer that is called once. Call it before KFAC."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        seen.extend([args[0].detach().clone(), output])

    handle = model.get_submodule(name).register_forward_hook(keep)
    torch.autograd.backward(loss(model))
    handle.remove()
    model.zero_grad()
    grad = seen[1].grad
    assert grad is not None
    return seen[0], grad


def with_ones(rows: Tensor) -> Tensor:
    """Return rows with a last column of ones."""
    return torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1)
