"""Limits of the damping: infinite gives the gradient, zero solves least squares in one step; layers without any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, mse_loss

import triton_curv as tc
from tests.support.capture import captured
from tests.support.dense import WeightLayer, gauss_newton_batch, join, relative_error

SAMPLES = 5
LAYERS = ["conv", "norm", "linear"]


def small_net() -> nn.Module:
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(2, 4, 2, groups=2))
    model.add_module("norm", nn.BatchNorm2d(4))
    model.add_module("tanh", nn.Tanh())
    model.add_module("flatten", nn.Flatten())
    model.add_module("linear", nn.Linear(16, 3))
    return model.double()


def small_loss(model: nn.Module) -> Tensor:
    x = torch.randn(SAMPLES, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    return cross_entropy(model(x), torch.tensor([0, 1, 2, 1, 0]))


@pytest.mark.parametrize("norm_fisher", ["unit", "diagonal", "full"])
@pytest.mark.parametrize("name", LAYERS)
def test_infinite_damping_leaves_the_gradients_direction(name: str, norm_fisher: str) -> None:
    """As damping grows, damping (F + damping I)^-1 -> I: the same direction, and the same length."""
    torch.manual_seed(0)
    model = small_net()
    damping = 1e16
    optimizer = captured(model, small_loss, damping=damping, norm_fisher=norm_fisher)
    optimizer.refresh()
    layer = model.get_submodule(name)
    gradients = {key: torch.randn_like(value) for key, value in layer.named_parameters()}
    solution = optimizer.blocks[name].precondition(gradients)
    flat_solution = torch.cat([solution[key].flatten() for key in gradients])
    flat_gradient = torch.cat([gradient.flatten() for gradient in gradients.values()])
    assert cosine_similarity(damping * flat_solution, flat_gradient, dim=0) > 1 - 1e-10
    assert relative_error(damping * flat_solution, flat_gradient) < 1e-6


@pytest.mark.parametrize("name", LAYERS)
def test_infinitely_damped_step_is_gradient_descent(name: str) -> None:
    """With lr = damping, no momentum and update_size="none", a step moves by minus the gradient."""
    torch.manual_seed(0)
    model = small_net()
    damping = 1e16
    optimizer = captured(model, small_loss, damping=damping, lr=damping, momentum=0.0, update_size="none")
    weight = model.get_parameter(f"{name}.weight")
    assert weight.grad is not None
    before, gradient = weight.detach().clone(), weight.grad.clone()
    optimizer.step()
    assert relative_error(weight.detach() - before, -gradient) < 1e-6


REGRESSIONS: dict[str, Callable[[], tuple[WeightLayer, tuple[int, ...]]]] = {
    "bias": lambda: (nn.Linear(6, 4), (6,)),
    "nobias": lambda: (nn.Linear(6, 4, bias=False), (6,)),
    "scalar": lambda: (nn.Linear(6, 1), (6,)),
    "conv2d-dilation2": lambda: (nn.Conv2d(2, 3, 2, dilation=2), (2, 3, 3)),
    "conv1d-nobias": lambda: (nn.Conv1d(2, 3, 3, bias=False), (2, 3)),
}


@pytest.mark.parametrize("regression", REGRESSIONS.values(), ids=REGRESSIONS.keys())
def test_one_undamped_step_solves_linear_least_squares(
    regression: Callable[[], tuple[WeightLayer, tuple[int, ...]]],
) -> None:
    """The targets make the empirical Fisher the Hessian, so that a step of lr = 1 is Newton's."""
    torch.manual_seed(0)
    layer, shape = regression()
    model = nn.Sequential(layer, nn.Flatten()).double()
    inputs = torch.randn(40, *shape, dtype=torch.float64) + 0.5
    x, y = gauss_newton_batch(model, inputs)
    optimizer = captured(
        model, lambda model: mse_loss(model(x), y), damping=1e-24, lr=1.0, momentum=0.0, update_size="none"
    )
    optimizer.step()

    # the kernel of a dilated convolution with one output position reads every other pixel
    columns = x[..., ::2, ::2].flatten(1) if isinstance(layer, nn.Conv2d) else x.flatten(1)
    if layer.bias is not None:
        columns = torch.cat([columns, torch.ones(len(columns), 1, dtype=columns.dtype)], dim=1)
    expected = torch.linalg.lstsq(columns, y).solution.mT
    bias = None if layer.bias is None else layer.bias.detach()
    assert relative_error(join(layer, layer.weight.detach(), bias)[0], expected) < 1e-8


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter whose second half starts at 0: its first half has no gradient at first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base, self.norm = nn.Linear(40, 6), nn.LayerNorm(6)
        self.base.requires_grad_(False)
        self.down, self.up, self.head = nn.Linear(40, 3, bias=False), nn.Linear(3, 6, bias=False), nn.Linear(6, 3)
        self.gate = 0.0
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.base(x) + self.up(self.down(x)))
        out: Tensor = self.head(y) + self.gate * self.norm(y)[:, :3]
        return out


@pytest.mark.parametrize("update_size", ["matched", "kl_clip", "none"])
@pytest.mark.parametrize("inverse", ["cholesky", "eigen", "neumann"])
def test_layers_without_curvature_yet_are_no_failure_and_start_gently(inverse: Any, update_size: Any) -> None:
    """G, or a norm's F, is exactly 0 in the only statistics, and so is the damping; A has fewer rows than columns."""
    model = Adapted()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 40, generator=generator), torch.arange(9) % 3
    optimizer = tc.KFAC(
        model, lr=0.01, inverse=inverse, update_size=update_size, factor_interval=100, inverse_interval=100
    )
    losses = []
    for step in range(12):
        model.gate = float(step > 3)
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert not optimizer.blocks["down"].factors()["G"].any()
    assert not optimizer.blocks["norm"].factors()["F"].any()
    assert optimizer.health()["optimizer"]["failed_inverses"] == 0
    assert max(losses[:4]) == losses[0]
    assert max(losses[4:]) == losses[4]
    assert losses[-1] < losses[4]
