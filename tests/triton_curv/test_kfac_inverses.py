"""Three inverses against dense ones; EKFAC's second moments by brute force; budgets of renewal."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import triton_curv as tc
from tests.support.brute import kronecker_factors, observe
from tests.support.capture import captured
from tests.support.dense import gram, jacobian, join, kron, relative_error, split, weight_layers
from tests.support.small_net import batches, small_net, train, weights

Net = Callable[[], tuple[nn.Sequential, tuple[int, ...]]]

NETS: dict[str, Net] = {
    "mlp": lambda: (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)), (4,)),
    "conv": lambda: (
        nn.Sequential(nn.Conv2d(2, 4, (3, 2), padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(60, 3)),
        (2, 3, 4),
    ),
    "groups": lambda: (
        nn.Sequential(nn.Conv2d(4, 4, 2, groups=2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)),
        (4, 3, 4),
    ),
}
SAMPLES = 9


def probe(net: Net) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model, shape = net()
    return model.double(), torch.randn(SAMPLES, *shape, dtype=torch.float64), torch.randint(0, 3, (SAMPLES,))


def gradients(layer: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {k: torch.randn(p.shape, generator=generator, dtype=p.dtype) for k, p in layer.named_parameters()}


@pytest.mark.parametrize("net", NETS.values(), ids=NETS.keys())
def test_eigen_damps_the_kronecker_product_exactly(net: Net) -> None:
    model, x, y = probe(net)
    oracle = {
        n: kronecker_factors(layer, observe(model, n, lambda m: cross_entropy(m(x), y), SAMPLES))
        for n, layer in weight_layers(model).items()
    }
    optimizer = captured(model, lambda m: cross_entropy(m(x), y), damping=0.02, inverse="eigen")
    optimizer.refresh()
    for name, layer in weight_layers(model).items():
        A, G = (f if f.dim() == 3 else f[None] for f in (oracle[name]["A"], oracle[name]["G"]))
        grads = gradients(layer)
        theta = join(layer, grads["weight"], grads.get("bias"))
        dense = kron(G, A) + 0.02 * torch.eye(G.shape[-1] * A.shape[-1], dtype=A.dtype)
        expected = split(layer, torch.linalg.solve(dense, theta.flatten(-2).unsqueeze(-1)).view_as(theta))
        for key, value in optimizer.blocks[name].precondition(grads).items():
            assert relative_error(value, expected[key]) < 1e-8


@pytest.mark.parametrize("net", NETS.values(), ids=NETS.keys())
def test_hyperpower_and_cholesky_agree(net: Net) -> None:
    results = []
    for inverse in ("cholesky", "neumann"):
        model, x, y = probe(net)
        optimizer = captured(model, lambda m, x=x, y=y: cross_entropy(m(x), y), relative_damping=0.03, inverse=inverse)  # type: ignore[misc]  # mypy can't infer lambda defaults
        optimizer.refresh()
        results.append({n: optimizer.blocks[n].precondition(gradients(v)) for n, v in weight_layers(model).items()})
        assert max(optimizer.health()[n]["residual"] for n in optimizer.blocks) < 1e-3
    for name, value in results[0].items():
        for key in value:
            assert relative_error(results[1][name][key], value[key]) < 1e-4


def per_sample(model: nn.Sequential, name: str, x: Tensor, y: Tensor) -> Tensor:
    """Gradients of the sample losses, (N, 1, groups, out / groups, n)."""
    return jacobian(model, name, x, lambda outputs: cross_entropy(outputs, y, reduction="none")[:, None])


def ekfac(model: nn.Module, x: Tensor, y: Tensor) -> tc.KFAC:
    """EKFAC after two captured steps on one batch with lr 0: bases from the first, second moments from the second."""
    optimizer = tc.KFAC(
        model, lr=0.0, factor_interval=1, inverse_interval=100, inverse="eigen", ekfac=True, damping=1e-3
    )
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        if optimizer.param_groups[0]["step"] == 0:
            optimizer.step()
    return optimizer


@pytest.mark.parametrize("net", NETS.values(), ids=NETS.keys())
def test_moments_are_the_mean_squares_in_the_eigenbasis(net: Net) -> None:
    model, x, y = probe(net)
    J = {name: per_sample(model, name, x, y)[:, 0] for name in weight_layers(model)}
    optimizer = ekfac(model, x, y)
    optimizer._curvature.fold(1)
    for name, J_layer in J.items():
        block = optimizer.blocks[name]
        assert block.moments is not None
        U_A, U_G = block.inverses["A"], block.inverses["G"]
        expected = (U_G.mT @ J_layer @ U_A).square().mean(0)
        assert relative_error(block.moments.averages, expected) < 1e-10
        assert relative_error(U_A.mT @ U_A, torch.eye(U_A.shape[-1], dtype=U_A.dtype).expand_as(U_A)) < 1e-10


@pytest.mark.parametrize("net", NETS.values(), ids=NETS.keys())
def test_ekfac_is_nearer_to_the_fisher_than_kfac(net: Net) -> None:
    model, x, y = probe(net)
    fisher = {name: gram(per_sample(model, name, x, y)) for name in weight_layers(model)}
    optimizer = ekfac(model, x, y)
    optimizer._curvature.fold(1)
    for name, dense in fisher.items():
        block = optimizer.blocks[name]
        assert block.moments is not None
        U = kron(block.inverses["G"], block.inverses["A"])
        rescaled = U @ torch.diag_embed(block.moments.averages.flatten(1)) @ U.mT
        factors = {k: f if f.dim() == 3 else f[None] for k, f in block.factors().items()}
        product = kron(factors["G"], factors["A"])
        assert (rescaled - dense).norm() < (product - dense).norm() * (1 - 1e-6)
        # in this basis nothing diagonal is nearer
        best = (U.mT @ dense @ U).diagonal(dim1=-2, dim2=-1)
        assert relative_error(block.moments.averages.flatten(1), best) < 1e-8


def test_ekfac_divides_by_its_moments_once_they_are_there() -> None:
    model, x, y = probe(NETS["mlp"])
    J = per_sample(model, "0", x, y)[:, 0]
    optimizer = ekfac(model, x, y)
    block = optimizer.blocks["0"]
    before = block.precondition(gradients(model[0]))
    optimizer.step()
    U_A, U_G = block.inverses["A"], block.inverses["G"]
    grads = gradients(model[0])
    theta = join(model[0], grads["weight"], grads["bias"])  # type: ignore[arg-type]  # Sequential's items are Modules
    turned = (U_G.mT @ theta @ U_A) / ((U_G.mT @ J @ U_A).square().mean(0) + 1e-3)
    expected = split(model[0], U_G @ turned @ U_A.mT)  # type: ignore[arg-type]  # Sequential's items are Modules
    for key, value in block.precondition(grads).items():
        assert relative_error(value, expected[key]) < 1e-8
        assert relative_error(before[key], expected[key]) > 1e-2


def test_moments_of_the_mean_gradient_would_be_far_off() -> None:
    """The planted bug: squares of the batch's mean gradient in place of the mean of squares."""
    model, x, y = probe(NETS["mlp"])
    J = per_sample(model, "0", x, y)[:, 0]
    optimizer = ekfac(model, x, y)
    optimizer._curvature.fold(1)
    block = optimizer.blocks["0"]
    assert block.moments is not None
    wrong = (block.inverses["G"].mT @ J.mean(0) @ block.inverses["A"]).square()
    assert relative_error(block.moments.averages, wrong) > 1.0


def test_ekfac_trains_and_keeps_its_moments_between_changes_of_basis() -> None:
    model = small_net()
    optimizer = tc.KFAC(model, lr=1e-2, inverse="eigen", ekfac=True, factor_interval=5, inverse_interval=10)
    folds = []
    losses = []
    for batch in batches(1) * 40:
        losses += train(model, optimizer, [batch])
        moments = optimizer.blocks["4"].moments
        assert moments is not None
        folds.append(int(moments.folds))
    assert losses[-1] < 0.1 * losses[0]
    assert folds[:12] == [0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 1]


@pytest.mark.parametrize("inverse", ["cholesky", "eigen", "neumann"])
def test_a_budget_ends_at_the_same_inverses_as_a_burst(inverse: Any) -> None:
    """Between two folds the parts of a renewal all see the same averages, so its end is the burst's result."""
    results = []
    for budget in (None, 1, 3):
        model = small_net().double()
        optimizer = tc.KFAC(
            model, lr=0.0, factor_interval=20, inverse_interval=20, refresh_budget=budget, inverse=inverse
        )
        renewed = 0
        for step, (x, y) in enumerate(batches(30)):
            old = [t.clone() for b in optimizer.blocks.values() for t in b.inverses.values()]
            train(model, optimizer, [(x.double(), y)])
            new = [t for b in optimizer.blocks.values() for t in b.inverses.values()]
            changed = sum(not torch.equal(a, b) for a, b in zip(old, new, strict=True))
            assert step == 0 or budget is None or changed <= budget
            renewed += changed if step else 0
        assert renewed == len(new)
        results.append([t.clone() for t in new])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_parts_of_a_budget_cost_about_the_same() -> None:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    parts = tc.KFAC(model, refresh_budget=4)._curvature.parts
    assert sorted(len(part) for part in parts) == [4, 4, 4]
    assert len({key for part in parts for key in part}) == 12


def test_averages_take_half_the_memory_of_dense_ones() -> None:
    model = nn.Sequential(nn.Linear(63, 64, bias=False))
    optimizer = tc.KFAC(model)
    state = optimizer.state[model.get_parameter("0.weight")]
    assert state["A"].shape == (63 * 64 // 2,)
    assert state["G"].shape == (64 * 65 // 2,)
    train(model, optimizer, [(torch.randn(5, 63), torch.randint(0, 64, (5,)))])
    factors = optimizer.blocks["0"].factors()
    assert factors["A"].shape == (63, 63)
    assert torch.equal(factors["A"], factors["A"].mT)
    assert weights(model)[0].isfinite().all()
