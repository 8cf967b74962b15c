"""K-FAC against the dense Gauss-Newton or Fisher solve, where a Kronecker product is exact.

Deep linear nets with mean squared error: the backpropagated signal does not depend on the input, so G (x) A
is the Gauss-Newton block of every layer, per group, if its weight is used at one position. Targets come from
`gauss_newton_batch`, which makes the empirical Fisher equal to the Gauss-Newton matrix. One datum makes the
empirical Fisher a Kronecker product for any net and loss.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from tests.support.capture import captured
from tests.support.dense import (
    WeightLayer,
    damped_kron,
    gauss_newton,
    gauss_newton_batch,
    gram,
    jacobian,
    join,
    kron,
    kronecker_parts,
    relative_error,
    solve,
    split,
    weight_layers,
)

Net = tuple[nn.Sequential, tuple[int, ...]]

INPUTS = 48
VANISHING = 1e-24  # its root, 1e-12 of the factors' size, is what the damped inverse sees


def after(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, *sizes: int) -> Net:
    """One convolution with one output position, then a linear layer on its channels."""
    out = layer.out_channels
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(out, out)), (layer.in_channels, *sizes)


# Widths never change between two layers, so A and G stay regular and the dense solve is unique.
LINEAR_NETS: dict[str, Callable[[], Net]] = {
    "linear": lambda: (nn.Sequential(nn.Linear(5, 3)), (5,)),
    "linear-deep": lambda: (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), (4,)),
    "linear-deep-nobias": lambda: (
        nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)),
        (4,),
    ),
    "linear-mixed-bias": lambda: (nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5)), (5,)),
    "conv2d": lambda: after(nn.Conv2d(2, 4, 2), 2, 2),
    "conv2d-nobias": lambda: after(nn.Conv2d(2, 4, 2, bias=False), 2, 2),
    "conv2d-rectangular": lambda: after(nn.Conv2d(2, 4, (3, 2)), 3, 2),
    "conv2d-groups2": lambda: after(nn.Conv2d(4, 4, 2, groups=2), 2, 2),
    "conv2d-groups2-nobias": lambda: after(nn.Conv2d(4, 6, 2, groups=2, bias=False), 2, 2),
    "conv2d-depthwise": lambda: after(nn.Conv2d(3, 3, 2, groups=3), 2, 2),
    "conv2d-depthwise-multiplier2": lambda: after(nn.Conv2d(3, 6, 2, groups=3), 2, 2),
    "conv2d-dilation2": lambda: after(nn.Conv2d(2, 3, 2, dilation=2), 3, 3),
    "conv2d-dilation2-groups2": lambda: after(nn.Conv2d(4, 4, 2, dilation=2, groups=2), 3, 3),
    "conv2d-dilation-uneven": lambda: after(nn.Conv2d(2, 3, 2, dilation=(1, 3)), 2, 4),
    "conv2d-stride2": lambda: after(nn.Conv2d(2, 3, 2, stride=2), 3, 3),
    "conv2d-stride-uneven": lambda: after(nn.Conv2d(2, 3, 2, stride=(2, 3)), 3, 4),
    # kernel 2 at dilation 3 on 2 pixels padded to 4 reads the two padded ends: A is regular
    "conv2d-circular": lambda: after(nn.Conv2d(2, 3, 2, dilation=3, padding=1, padding_mode="circular"), 2, 2),
    "conv2d-circular-depthwise": lambda: after(
        nn.Conv2d(3, 3, 2, dilation=3, padding=1, padding_mode="circular", groups=3), 2, 2
    ),
    "conv2d-reflect": lambda: after(nn.Conv2d(2, 3, 2, dilation=3, padding=1, padding_mode="reflect"), 2, 2),
    "conv2d-replicate": lambda: after(nn.Conv2d(2, 3, 2, dilation=3, padding=1, padding_mode="replicate"), 2, 2),
    # one output at 'same' means one input pixel: the rest of the patch is zero, and so are those rows of A
    "conv2d-same": lambda: after(nn.Conv2d(6, 3, 3, padding="same"), 1, 1),
    "conv2d-same-even-kernel": lambda: after(nn.Conv2d(6, 3, (4, 2), padding="same"), 1, 1),
    "conv2d-same-groups2-dilation2": lambda: after(nn.Conv2d(8, 4, 3, padding="same", dilation=2, groups=2), 1, 1),
    "conv1d": lambda: after(nn.Conv1d(3, 4, 3, dilation=2), 5),
    "conv1d-groups2": lambda: after(nn.Conv1d(4, 4, 3, groups=2, stride=2), 4),
    "conv1d-circular": lambda: after(nn.Conv1d(3, 3, 2, dilation=3, padding=1, padding_mode="circular"), 2),
    "conv1d-same": lambda: after(nn.Conv1d(3, 3, 4, padding="same"), 1),
    "conv3d": lambda: after(nn.Conv3d(2, 3, (2, 1, 2), dilation=(2, 1, 1)), 3, 1, 2),
    "conv3d-groups2": lambda: after(nn.Conv3d(4, 4, 2, groups=2), 2, 2, 2),
    "conv3d-depthwise": lambda: after(nn.Conv3d(3, 3, (1, 2, 2), groups=3), 1, 2, 2),
    "conv2d-twice": lambda: (
        nn.Sequential(nn.Conv2d(2, 4, 2), nn.Conv2d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(4, 4)),
        (2, 2, 2),
    ),
    "linear-before-conv": lambda: (
        nn.Sequential(nn.Linear(8, 8), nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 8, 2), nn.Flatten()),
        (8,),
    ),
}


def build(net: Callable[[], Net]) -> tuple[nn.Sequential, Tensor]:
    """Return the net in float64 and inputs of mean 1/2. Singular values of the weights lie in [1/2, 2]."""
    torch.manual_seed(0)
    model, shape = net()
    model.double()
    for layer in weight_layers(model).values():
        nn.init.orthogonal_(layer.weight)
        rows = torch.linspace(0.5, 2.0, len(layer.weight), dtype=torch.float64)
        layer.weight.data.mul_(rows.reshape(-1, *[1] * (layer.weight.dim() - 1)))
    return model, torch.randn(INPUTS, *shape, dtype=torch.float64) + 0.5


def reachable_gradient(jacobian: Tensor) -> Tensor:
    """Return J^T r / N for a random r: in the range of the layer's matrix, singular or not."""
    generator = torch.Generator().manual_seed(7)
    r = torch.randn(jacobian.shape[:2], generator=generator, dtype=jacobian.dtype)
    return torch.einsum("nk,nkgoi->goi", r, jacobian) / len(jacobian)


def grouped(factor: Tensor) -> Tensor:
    """Return the factor with its leading dimension of groups."""
    return factor if factor.dim() == 3 else factor[None]


def assert_preconditions(solution: dict[str, Tensor], layer: WeightLayer, expected: Tensor) -> None:
    assert solution.keys() == split(layer, expected).keys()
    error = relative_error(join(layer, solution["weight"], solution.get("bias")), expected)
    assert error < 1e-8, f"relative error {error:.1e}"


@pytest.mark.parametrize("net", LINEAR_NETS.values(), ids=LINEAR_NETS.keys())
def test_factors_multiply_to_the_gauss_newton_block(net: Callable[[], Net]) -> None:
    model, inputs = build(net)
    x, y = gauss_newton_batch(model, inputs)
    expected = {name: gauss_newton(model, name, inputs) for name in weight_layers(model)}
    optimizer = captured(model, lambda model: mse_loss(model(x), y))
    assert optimizer.blocks.keys() == expected.keys()
    for name, block in optimizer.blocks.items():
        factors = {key: grouped(factor) for key, factor in block.factors().items()}
        assert relative_error(kron(factors["G"], factors["A"]), expected[name]) < 1e-10


@pytest.mark.parametrize("net", LINEAR_NETS.values(), ids=LINEAR_NETS.keys())
def test_vanishing_damping_solves_with_the_gauss_newton_block(net: Callable[[], Net]) -> None:
    model, inputs = build(net)
    x, y = gauss_newton_batch(model, inputs)
    layers = weight_layers(model)
    jacobians = {name: jacobian(model, name, inputs, lambda outputs: outputs) for name in layers}
    dense = {name: gauss_newton(model, name, inputs) for name in layers}
    optimizer = captured(model, lambda model: mse_loss(model(x), y), damping=VANISHING)
    optimizer.refresh()
    for name, layer in layers.items():
        gradient = reachable_gradient(jacobians[name])
        solution = optimizer.blocks[name].precondition(split(layer, gradient))
        assert_preconditions(solution, layer, solve(dense[name], gradient))


@pytest.mark.parametrize("options", [{"damping": 0.3}, {"relative_damping": 0.1}], ids=["absolute", "relative"])
@pytest.mark.parametrize("net", LINEAR_NETS.values(), ids=LINEAR_NETS.keys())
def test_damping_solves_with_the_damped_kronecker_product(net: Callable[[], Net], options: dict[str, float]) -> None:
    model, inputs = build(net)
    x, y = gauss_newton_batch(model, inputs)
    layers = weight_layers(model)
    dense = {name: gauss_newton(model, name, inputs) for name in layers}
    optimizer = captured(model, lambda model: mse_loss(model(x), y), **options)
    optimizer.refresh()
    for name, layer in layers.items():
        A, G = kronecker_parts(dense[name], layer.weight.shape[0] // len(dense[name]))
        mean_eigenvalue = float(dense[name].diagonal(dim1=-2, dim2=-1).mean())  # of all groups: one lambda a block
        damping = options.get("damping", 0.0) + options.get("relative_damping", 0.0) * mean_eigenvalue
        gradient = torch.randn(len(A), G.shape[-1], A.shape[-1], dtype=A.dtype)
        solution = optimizer.blocks[name].precondition(split(layer, gradient))
        assert_preconditions(solution, layer, solve(damped_kron(A, G, damping), gradient))


NONLINEAR_NETS: dict[str, Callable[[], Net]] = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 3)),
        (6,),
    ),
    "conv": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 5, 2, dilation=2),
            nn.Tanh(),
            nn.Conv2d(5, 4, 1),
            nn.Sigmoid(),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        (2, 3, 3),
    ),
    "conv-groups": lambda: (
        nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)),
        (4, 2, 2),
    ),
}


@pytest.mark.parametrize("net", NONLINEAR_NETS.values(), ids=NONLINEAR_NETS.keys())
def test_one_datum_makes_the_empirical_fisher_exact(net: Callable[[], Net]) -> None:
    torch.manual_seed(0)
    model, shape = net()
    model.double()
    x, y = torch.randn(1, *shape, dtype=torch.float64), torch.tensor([2])
    layers = weight_layers(model)
    gradients = {
        name: jacobian(model, name, x, lambda outputs: cross_entropy(outputs, y, reduction="none")[:, None])
        for name in layers
    }
    optimizer = captured(model, lambda model: cross_entropy(model(x), y), damping=0.02)
    optimizer.refresh()
    for name, layer in layers.items():
        fisher = gram(gradients[name])
        factors = {key: grouped(factor) for key, factor in optimizer.blocks[name].factors().items()}
        assert relative_error(kron(factors["G"], factors["A"]), fisher) < 1e-10
        A, G = kronecker_parts(fisher, layer.weight.shape[0] // len(fisher))
        gradient = torch.randn(len(A), G.shape[-1], A.shape[-1], dtype=A.dtype)
        solution = optimizer.blocks[name].precondition(split(layer, gradient))
        assert_preconditions(solution, layer, solve(damped_kron(A, G, 0.02), gradient))


@pytest.mark.parametrize("net", LINEAR_NETS.values(), ids=LINEAR_NETS.keys())
def test_oracle_batch_makes_the_empirical_fisher_the_gauss_newton_matrix(net: Callable[[], Net]) -> None:
    """Both matrices by jacrev: of the outputs on M inputs, and of the sample losses on M d targets."""
    model, inputs = build(net)
    x, y = gauss_newton_batch(model, inputs)
    for name in weight_layers(model):
        gradients = jacobian(model, name, x, lambda outputs: (outputs - y).square().mean(dim=1, keepdim=True))
        dense = gauss_newton(model, name, inputs)
        assert relative_error(gram(gradients), dense) < 1e-12
        A, G = kronecker_parts(dense, gradients.shape[-2])
        assert relative_error(kron(G, A), dense) < 1e-12
