"""For each known K-FAC bug the library equals the right expectation and is far from the buggy one.

The bugs were found in published implementations (dilation and padding mode ignored, groups averaged, 1/N and
1/T misplaced) or are one slip away. They are planted in the expectation: a library with one of them would
fail the first assertion, and the second proves that the case can tell.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.support.brute import Call, Conv, kronecker_factors, observe
from tests.support.capture import captured
from tests.support.dense import WeightLayer, damped_kron, join, relative_error, solve

SAMPLES = 4
DAMPING = 1e-2
FAR = 0.1

Factors = dict[str, Tensor]
Expectation = Callable[[WeightLayer, list[Call]], Factors]


def with_layer(change: Callable[[Conv], None]) -> Expectation:
    """Return the factors of a layer that misreads one of its own options."""

    def expectation(layer: WeightLayer, calls: list[Call]) -> Factors:
        misread = copy.deepcopy(layer)
        assert isinstance(misread, Conv)
        change(misread)
        return kronecker_factors(misread, calls)

    return expectation


def with_factors(change: Callable[[Factors], Factors]) -> Expectation:
    """Return the right factors, spoilt afterwards."""
    return lambda layer, calls: change(kronecker_factors(layer, calls))


def ignore_dilation(layer: Conv) -> None:
    layer.dilation = (1,) * len(layer.kernel_size)


def ignore_stride(layer: Conv) -> None:
    layer.stride = (1,) * len(layer.kernel_size)


def ignore_padding_mode(layer: Conv) -> None:
    layer.padding_mode = "zeros"


def average_groups(factors: Factors) -> Factors:
    return {key: factor.mean(0, keepdim=True).expand_as(factor) for key, factor in factors.items()}


def drop_bias(factors: Factors) -> Factors:
    A = factors["A"].clone()
    A[..., -1, :] = A[..., :, -1] = 0.0
    return {**factors, "A": A}


def kernel_major(factors: Factors) -> Factors:
    channels, kernel = 4, 6
    order = torch.arange(channels * kernel).reshape(channels, kernel).T.flatten()
    return {**factors, "A": factors["A"][order][:, order]}


@dataclass(frozen=True)
class Bug:
    """A layer, its input's shape, and the factors a library with the bug would give."""

    layer: Callable[[], WeightLayer]
    shape: tuple[int, ...]
    buggy: Expectation


def grouped_conv() -> WeightLayer:
    return nn.Conv2d(4, 4, 3, groups=2)


def plain_conv() -> WeightLayer:
    return nn.Conv2d(4, 3, (3, 2), bias=False)


BUGS = {
    "dilation-ignored": Bug(lambda: nn.Conv2d(2, 3, 3, dilation=2), (2, 7, 7), with_layer(ignore_dilation)),
    "stride-ignored": Bug(lambda: nn.Conv2d(2, 3, 3, stride=3), (2, 7, 7), with_layer(ignore_stride)),
    "circular-as-zeros": Bug(
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        (2, 3, 3),
        with_layer(ignore_padding_mode),
    ),
    "groups-averaged": Bug(grouped_conv, (4, 5, 5), with_factors(average_groups)),
    "A-without-1/N": Bug(grouped_conv, (4, 5, 5), with_factors(lambda f: {**f, "A": f["A"] * SAMPLES})),
    "G-without-1/N": Bug(grouped_conv, (4, 5, 5), with_factors(lambda f: {**f, "G": f["G"] * SAMPLES})),
    "G-of-the-mean-loss": Bug(grouped_conv, (4, 5, 5), with_factors(lambda f: {**f, "G": f["G"] / SAMPLES**2})),
    "A-without-1/T": Bug(grouped_conv, (4, 5, 5), with_factors(lambda f: {**f, "A": f["A"] * 9})),
    "G-with-1/T": Bug(grouped_conv, (4, 5, 5), with_factors(lambda f: {**f, "G": f["G"] / 9})),
    "bias-dropped": Bug(lambda: nn.Linear(4, 3), (4,), with_factors(drop_bias)),
    "bias-dropped-conv": Bug(grouped_conv, (4, 5, 5), with_factors(drop_bias)),
    "kernel-before-channel": Bug(plain_conv, (4, 5, 5), with_factors(kernel_major)),
}


def probe(bug: Bug) -> tuple[nn.Sequential, Callable[[nn.Module], Tensor]]:
    """Return layer -> tanh -> linear, and its loss on inputs of mean 1/2 whose channels differ in size."""
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, *bug.shape, dtype=torch.float64) + 0.5
    x = x * torch.arange(1, bug.shape[0] + 1, dtype=x.dtype).reshape(-1, *[1] * (len(bug.shape) - 1))
    layer = bug.layer().double()
    with torch.no_grad():
        features = layer(x).flatten(1).shape[1]
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(features, 3)).double()
    return model, lambda model: cross_entropy(model(x), torch.tensor([0, 1, 2, 0]))


def distance(actual: Factors, expected: Factors) -> float:
    """Return the larger relative error of A and G."""
    return max(relative_error(actual[key], expected[key]) for key in ("A", "G"))


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS.keys())
def test_factors_are_far_from_the_bugs(bug: Bug) -> None:
    model, loss = probe(bug)
    layer = bug_layer(model)
    calls = observe(model, "0", loss, SAMPLES)
    factors = captured(model, loss).blocks["0"].factors()
    assert distance(factors, kronecker_factors(layer, calls)) < 1e-10
    assert distance(factors, bug.buggy(layer, calls)) > FAR


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS.keys())
def test_preconditioned_gradient_is_far_from_the_bugs(bug: Bug) -> None:
    model, loss = probe(bug)
    layer = bug_layer(model)
    calls = observe(model, "0", loss, SAMPLES)
    optimizer = captured(model, loss, damping=DAMPING)
    optimizer.refresh()
    gradients = {key: torch.randn_like(value) for key, value in layer.named_parameters()}
    actual = optimizer.blocks["0"].precondition(gradients)
    theta = join(layer, actual["weight"], actual.get("bias"))
    assert relative_error(theta, damped_solution(layer, gradients, kronecker_factors(layer, calls))) < 1e-8
    assert relative_error(theta, damped_solution(layer, gradients, bug.buggy(layer, calls))) > FAR


def bug_layer(model: nn.Sequential) -> WeightLayer:
    layer = model[0]
    assert isinstance(layer, WeightLayer)
    return layer


def damped_solution(layer: WeightLayer, gradients: dict[str, Tensor], factors: Factors) -> Tensor:
    """Return the dense damped Kronecker solve of the layer's gradients, in the layout of `join`."""
    A, G = (factor if factor.dim() == 3 else factor[None] for factor in (factors["A"], factors["G"]))
    return solve(damped_kron(A, G, DAMPING), join(layer, gradients["weight"], gradients.get("bias")))
