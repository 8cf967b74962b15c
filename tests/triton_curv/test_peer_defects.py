"""Defects reproduced in other K-FAC and curvature libraries, each as the user would meet it.

Dilation, padding modes, groups and the scales of A and G have their own oracles (test_kfac_planted); here stands what
is not a wrong factor: crashes, layers left out without a word, damping that loses its meaning, starts that lie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy

import triton_curv as tc
from tests.support.brute import kronecker_factors, observe
from tests.support.capture import captured, kfac
from tests.support.dense import relative_error


def conv_net(size: int) -> nn.Sequential:
    """Two convolutions and two linear layers on (2, size, size) images."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    ).double()


def cosines(size: int, copies: int) -> list[float]:
    """cos(gradient, preconditioned gradient) of each weight at the first step, absolute damping 1e-3; 8 samples."""
    model = conv_net(size)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 2, 1, 1, generator=generator, dtype=torch.float64).expand(-1, -1, size, size)
    x, y = x.repeat(copies, 1, 1, 1), torch.randint(0, 3, (8,), generator=generator).repeat(copies)
    optimizer = captured(model, lambda m: cross_entropy(m(x), y), damping=1e-3)
    found = []
    for block in optimizer.blocks.values():
        grads = {name: p.grad for name, p in block.rule.params.items() if p.grad is not None}
        solved = block.precondition(grads)
        found.append(float(functional.cosine_similarity(grads["weight"].flatten(), solved["weight"].flatten(), dim=0)))
    return found


def test_damping_means_the_same_at_every_batch_and_image_size() -> None:
    """Elsewhere tr A falls as 1/T^3 and tr G as 1/N^2: at N = 512 K-FAC was SGD to five digits."""
    small, many, large = cosines(4, 1), cosines(4, 64), cosines(8, 1)
    assert max(small) < 0.98
    assert max(large) < 0.98
    assert many == pytest.approx(small, rel=1e-8)


def test_a_net_of_refused_convolutions_trains() -> None:
    """Groups and 'same' crashed, an in-place ReLU broke autograd, and so did a layer that is never called."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=2, padding="same"),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, groups=4, padding=2, dilation=2, padding_mode="circular"),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(100, 3),
        nn.ReLU(inplace=True),
    ).double()
    model.register_module("unused", nn.Linear(3, 3).double())
    model.forward = lambda x: nn.Sequential(*list(model)[:7])(x)  # type: ignore[method-assign]  # leaves one out
    x, y = torch.randn(6, 4, 5, 5, dtype=torch.float64), torch.randint(0, 3, (6,))
    optimizer = kfac(model, lr=0.01)
    unused = model.get_parameter("unused.weight").detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    assert torch.equal(model.get_parameter("unused.weight"), unused)
    assert optimizer.health()["0"]["rung"] == "fresh"


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolutions_are_exact_per_group(groups: int) -> None:
    """Averaging the inputs over groups is 89 to 98 % off where K-FAC is exact: one datum, one position."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=groups), nn.Flatten()).double()
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    leaf = x.clone()
    output = model(leaf)
    signal = torch.randn_like(output)
    gradients = torch.autograd.grad(output, list(model.parameters()), signal)
    theta = torch.cat([gradients[0].reshape(groups, 4 // groups, -1), gradients[1].reshape(groups, -1, 1)], dim=-1)
    flat = theta.flatten(1)
    exact = flat[:, :, None] * flat[:, None, :]
    block = captured(model, lambda m: (m(x) * signal).sum()).blocks["0"]
    factors = block.factors()
    product = torch.stack([torch.kron(g, a) for g, a in zip(factors["G"], factors["A"], strict=True)])
    assert relative_error(product, exact) < 1e-12


def test_averages_start_from_the_first_statistics_not_from_the_identity() -> None:
    model = conv_net(4)
    x, y = torch.randn(5, 2, 4, 4, dtype=torch.float64), torch.randint(0, 3, (5,))
    calls = observe(model, "6", lambda m: cross_entropy(m(x), y), 5)
    optimizer = kfac(model, lr=0.0, factor_decay=0.99)
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    layer = model.get_submodule("6")
    assert isinstance(layer, nn.Linear)
    for name, expected in kronecker_factors(layer, calls).items():
        torch.testing.assert_close(optimizer.blocks["6"].factors()[name], expected, rtol=1e-10, atol=1e-14)


def bias_only(model: nn.Sequential) -> None:
    model[0].weight.requires_grad_(False)


def weight_only(model: nn.Sequential) -> None:
    model[0].bias.requires_grad_(False)


@pytest.mark.parametrize("freeze", [bias_only, weight_only])
def test_half_frozen_layers_train_and_are_reported(freeze: Callable[[nn.Sequential], None]) -> None:
    """A layer with one frozen parameter was dropped without a word."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    freeze(model)
    free = {name for name, p in model.named_parameters() if p.requires_grad}
    optimizer = kfac(model, lr=0.01)
    rows = {row.parameter: row for row in optimizer.explain().rows}
    assert set(rows) == free
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == free


class Attention(nn.Module):
    """Self-attention by scaled_dot_product_attention's default kernel, which has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, 4)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.out(functional.scaled_dot_product_attention(q, k, v)[:, 0].mean(1))
        return out


@pytest.mark.parametrize("build", [tc.NewtonCG, tc.SGN])
def test_products_go_through_attention(build: Any) -> None:
    model = Attention()
    x, y = torch.randn(6, 5, 4), torch.randint(0, 2, (6,))
    optimizer = build(model, lr=0.5)

    def closure() -> Any:
        output = model(x)
        loss = cross_entropy(output, y)
        return (loss, output) if build is tc.SGN else loss

    losses = [float(optimizer.step(closure)) for _ in range(4)]
    assert losses[-1] < losses[0]
