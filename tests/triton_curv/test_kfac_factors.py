"""`block.factors()` against loops over samples and positions, for every layer and convolution option."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.support.brute import (
    BatchNorm,
    Conv,
    conv_patches,
    kronecker_factors,
    norm_fisher,
    norm_gradients,
    observe,
)
from tests.support.capture import captured, kfac
from tests.support.dense import relative_error, weight_layers

SAMPLES = 3
CONVS: dict[int, type[Conv]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, type[BatchNorm]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SIZES = {1: (7,), 2: (5, 6), 3: (3, 4, 3)}
LABELS = torch.tensor([0, 2, 1])


class Probe(nn.Module):
    """A linear layer -> layer -> tanh -> linear head: gradients at the layer's output differ by position."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.front = nn.Linear(shape[-1], shape[-1])
        self.layer = layer
        with torch.no_grad():
            features = layer(torch.zeros(SAMPLES, *shape)).flatten(1).shape[1]
        self.head = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(torch.tanh(self.layer(self.front(x))).flatten(1))
        return outputs


def probe(layer: nn.Module, shape: tuple[int, ...]) -> tuple[Probe, Callable[[nn.Module], Tensor]]:
    """Return the net in float64 and its loss on SAMPLES random inputs of mean 1/2."""
    model = Probe(layer, shape).double()
    x = torch.randn(SAMPLES, *shape, dtype=torch.float64) + 0.5
    return model, lambda model: cross_entropy(model(x), LABELS)


def assert_factors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, factor in expected.items():
        assert relative_error(actual[key], factor) < 1e-10, key


CONV2D: dict[str, dict[str, Any]] = {
    f"{mode}-pad_{pad}-dil_{dilation}-groups{groups}-{'bias' if bias else 'nobias'}": {
        "padding_mode": mode,
        "padding": pad,
        "dilation": dilation,
        "groups": groups,
        "bias": bias,
        "stride": stride,
        "kernel_size": (3, 2),
    }
    for mode, (pad, stride), (dilation, groups, bias) in itertools.product(
        ["zeros", "reflect", "replicate", "circular"],
        [("valid", (2, 1)), (1, 2), ((2, 1), (1, 3)), ("same", 1)],
        [(1, 1, True), (1, 2, False), (2, 1, False), ((1, 2), 4, True)],
    )
}
CONV_ND: dict[str, tuple[int, dict[str, Any]]] = {
    "1d-stride2-pad1-dil2": (1, {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2}),
    "1d-groups2-nobias": (1, {"kernel_size": 2, "groups": 2, "bias": False}),
    "1d-same-even-kernel": (1, {"kernel_size": 4, "padding": "same"}),
    "1d-same-circular": (1, {"kernel_size": 4, "padding": "same", "padding_mode": "circular"}),
    "1d-reflect": (1, {"kernel_size": 3, "padding": 3, "padding_mode": "reflect"}),
    "1d-replicate-depthwise": (1, {"kernel_size": 3, "padding": 2, "padding_mode": "replicate", "groups": 4}),
    "3d": (3, {"kernel_size": 2}),
    "3d-uneven": (
        3,
        {"kernel_size": (1, 3, 2), "stride": (2, 1, 1), "padding": (0, 2, 1), "dilation": (1, 2, 1)},
    ),
    "3d-same-dil2-groups2": (3, {"kernel_size": (2, 3, 1), "padding": "same", "dilation": 2, "groups": 2}),
    "3d-circular-nobias": (3, {"kernel_size": 2, "padding": 1, "padding_mode": "circular", "bias": False}),
    "3d-reflect-depthwise": (3, {"kernel_size": 2, "padding": 1, "padding_mode": "reflect", "groups": 4}),
    "3d-same-replicate": (3, {"kernel_size": 2, "padding": "same", "padding_mode": "replicate"}),
}
CONV_CASES = {f"2d-{name}": (2, options) for name, options in CONV2D.items()} | CONV_ND


def convolution(dimensions: int, options: dict[str, Any]) -> tuple[Conv, tuple[int, ...]]:
    torch.manual_seed(0)
    return CONVS[dimensions](4, 8, **options), (4, *SIZES[dimensions])


@pytest.mark.parametrize(("dimensions", "options"), CONV_CASES.values(), ids=CONV_CASES.keys())
def test_conv_factors_equal_the_loop(dimensions: int, options: dict[str, Any]) -> None:
    layer, shape = convolution(dimensions, options)
    model, loss = probe(layer, shape)
    expected = kronecker_factors(layer, observe(model, "layer", loss, SAMPLES))
    optimizer = captured(model, loss)
    assert_factors(optimizer.blocks["layer"].factors(), expected)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (1, 5)], ids=["2d", "3d", "4d", "one-position"])
def test_linear_factors_equal_the_loop(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 4, bias=bias)
    model, loss = probe(layer, shape)
    expected = kronecker_factors(layer, observe(model, "layer", loss, SAMPLES))
    optimizer = captured(model, loss)
    assert_factors(optimizer.blocks["layer"].factors(), expected)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", ["unit", "diagonal", "full"])
@pytest.mark.parametrize("shape", [(4,), (4, 5), (4, 3, 2), (4, 2, 3, 2)], ids=["1d", "1d-seq", "2d", "3d"])
def test_batch_norm_fisher_equals_the_loop(shape: tuple[int, ...], kind: str, mode: str) -> None:
    layer, model, loss = norm_probe(shape, mode)
    expected = norm_fisher(layer, observe(model, "layer", loss, SAMPLES), kind)
    optimizer = captured(model, loss, norm_fisher=kind)
    assert_factors(optimizer.blocks["layer"].factors(), expected)


@pytest.mark.parametrize("kind", ["unit", "diagonal", "full"])
def test_batch_norm_precondition_solves_with_the_damped_fisher(kind: str) -> None:
    layer, model, loss = norm_probe((4, 3, 2), "train")
    fisher = norm_fisher(layer, observe(model, "layer", loss, SAMPLES), kind)["F"]
    gamma, beta = torch.randn(2, 4, dtype=torch.float64)
    if kind == "unit":
        stacked = torch.stack([gamma, beta], dim=1)
        gamma_step, beta_step = torch.linalg.solve(fisher + 0.01 * torch.eye(2, dtype=torch.float64), stacked).unbind(1)
    else:
        dense = fisher.diag() if kind == "diagonal" else fisher
        step = torch.linalg.solve(dense + 0.01 * torch.eye(8, dtype=torch.float64), torch.cat([gamma, beta]))
        gamma_step, beta_step = step.split(4)
    optimizer = captured(model, loss, norm_fisher=kind, damping=0.01)
    optimizer.refresh()
    solution = optimizer.blocks["layer"].precondition({"weight": gamma, "bias": beta})
    assert relative_error(solution["weight"], gamma_step) < 1e-10
    assert relative_error(solution["bias"], beta_step) < 1e-10


def norm_probe(shape: tuple[int, ...], mode: str) -> tuple[BatchNorm, Probe, Callable[[nn.Module], Tensor]]:
    """Return a norm layer of 4 channels with random gamma, beta and running statistics inside a probe."""
    torch.manual_seed(0)
    layer = NORMS[max(len(shape) - 1, 1)](4, eps=1e-3)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    nn.init.normal_(layer.running_mean)
    nn.init.uniform_(layer.running_var, 0.5, 2.0)
    layer.train(mode == "train")
    model, loss = probe(layer, shape)
    return layer, model, loss


class Twice(nn.Module):
    """One linear and one convolution, each called at two places and sizes of one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 2, groups=2)
        self.linear = nn.Linear(4, 4)
        self.head = nn.Linear(2 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(torch.tanh(self.conv(x))))
        x = torch.tanh(self.linear(x.flatten(2)))
        x = torch.tanh(self.linear(x))
        outputs: Tensor = self.head(x.flatten(1))
        return outputs


@pytest.mark.parametrize("name", ["conv", "linear"])
def test_positions_of_two_calls_add_up(name: str) -> None:
    torch.manual_seed(0)
    model = Twice().double()
    x = torch.randn(SAMPLES, 2, 4, 4, dtype=torch.float64) + 0.5

    def loss(model: nn.Module) -> Tensor:
        return cross_entropy(model(x), LABELS)

    calls = observe(model, name, loss, SAMPLES)
    assert len(calls) == 2
    expected = kronecker_factors(weight_layers(model)[name], calls)
    optimizer = captured(model, loss)
    assert_factors(optimizer.blocks[name].factors(), expected)


def test_factors_are_the_bias_corrected_average_over_steps() -> None:
    """After k backwards: sum_i decay^(k-i) (1 - decay) F_i / (1 - decay^k).

    Pending or folded, the last batch counts. lr = 0 keeps the weights.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    batches = torch.randn(3, SAMPLES, 4, dtype=torch.float64)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return cross_entropy(model(x), LABELS)

    layer, decay = weight_layers(model)["0"], 0.7

    def batch_factors(x: Tensor) -> dict[str, Tensor]:
        return kronecker_factors(layer, observe(model, "0", lambda twin: loss(twin, x), SAMPLES))

    per_batch = [batch_factors(x) for x in batches]
    optimizer = kfac(model, lr=0.0, factor_decay=decay)
    for k, x in enumerate(batches, start=1):
        torch.autograd.backward(loss(model, x))
        weights = [decay ** (k - i) * (1 - decay) / (1 - decay**k) for i in range(1, k + 1)]
        expected = {
            key: sum((w * f[key] for w, f in zip(weights, per_batch, strict=False)), torch.zeros(()))
            for key in ("A", "G")
        }
        assert_factors(optimizer.blocks["0"].factors(), expected)
        optimizer.step()
        assert_factors(optimizer.blocks["0"].factors(), expected)
        optimizer.zero_grad()


@pytest.mark.parametrize(("dimensions", "options"), CONV_CASES.values(), ids=CONV_CASES.keys())
def test_oracle_patches_times_weight_are_the_convolution(dimensions: int, options: dict[str, Any]) -> None:
    layer, shape = convolution(dimensions, options)
    layer.double()
    x = torch.randn(2, *shape, dtype=torch.float64)
    patches = torch.from_numpy(conv_patches(layer, x.numpy()))
    weight = layer.weight.detach().reshape(layer.groups, 8 // layer.groups, -1)
    outputs = torch.einsum("ntgi,goi->ngot", patches, weight).reshape(2, 8, -1)
    if layer.bias is not None:
        outputs = outputs + layer.bias.detach()[:, None]
    assert relative_error(outputs, layer(x).detach().flatten(2)) < 1e-12


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_oracle_norm_gradients_sum_to_the_gradient(mode: str) -> None:
    layer, model, loss = norm_probe((4, 3, 2), mode)
    (call,) = observe(model, "layer", loss, SAMPLES)
    torch.autograd.backward(loss(model))
    gamma, beta = torch.from_numpy(norm_gradients(layer, call).mean(axis=0)).unbind(1)
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    assert relative_error(gamma, layer.weight.grad) < 1e-12
    assert relative_error(beta, layer.bias.grad) < 1e-12
