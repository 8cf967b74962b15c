"""Scale and shift of normalisation layers against the exact empirical Fisher by `jacrev`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.support.capture import captured, kfac
from tests.support.units import per_unit_gradients, second_moment
from triton_curv.blocks import NormFisher

SAMPLES = 5
Case = tuple[Callable[[], nn.Module], tuple[int, ...]]

NORMS: dict[str, Case] = {
    "layer": (lambda: nn.LayerNorm(4), (4,)),
    "layer-positions": (lambda: nn.LayerNorm(4), (3, 4)),
    "layer-two-dims": (lambda: nn.LayerNorm((2, 3)), (4, 2, 3)),
    "layer-no-bias": (lambda: nn.LayerNorm(4, bias=False), (3, 4)),
    "rms": (lambda: nn.RMSNorm(4), (2, 3, 4)),
    "rms-eps": (lambda: nn.RMSNorm(4, eps=0.1), (4,)),
    "group": (lambda: nn.GroupNorm(2, 4), (4, 3, 2)),
    "group-flat": (lambda: nn.GroupNorm(2, 6), (6,)),
    "instance1d": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 5)),
    "instance2d": (lambda: nn.InstanceNorm2d(3, affine=True), (3, 2, 3)),
    "instance3d-running": (
        lambda: nn.InstanceNorm3d(3, affine=True, track_running_stats=True).eval(),
        (3, 2, 1, 3),
    ),
    "batch-eval": (lambda: nn.BatchNorm2d(3).eval(), (3, 2, 2)),
}


def expected(fisher: Tensor, kind: NormFisher, parts: int) -> Tensor:
    """The part of the exact (p c, p c) Fisher that is kept."""
    if kind == "full":
        return fisher
    if kind == "diagonal":
        return fisher.diagonal()
    channels = len(fisher) // parts
    blocks = fisher.view(parts, channels, parts, channels)
    return torch.stack([blocks[:, c, :, c] for c in range(channels)])


@pytest.mark.parametrize("kind", ["unit", "diagonal", "full"])
@pytest.mark.parametrize("case", NORMS.values(), ids=NORMS.keys())
def test_fisher_is_the_exact_one(case: Case, kind: NormFisher) -> None:
    torch.manual_seed(0)
    layer = case[0]().double()
    for p in layer.parameters():
        nn.init.normal_(p, 1.0, 0.3)
    x = torch.randn(SAMPLES, *case[1], dtype=torch.float64)
    target = torch.randn_like(x)
    names = [name for name, _ in layer.named_parameters()]
    rows = per_unit_gradients(layer, names, lambda m: ((m(x) - target) ** 3).flatten(1).sum(1))
    fisher = second_moment(rows)
    optimizer = captured(layer, lambda m: ((m(x) - target) ** 3).flatten(1).sum(1).mean(), norm_fisher=kind)
    (block,) = optimizer.blocks.values()
    value = block.factors()["F"]
    torch.testing.assert_close(value, expected(fisher, kind, len(names)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["unit", "diagonal", "full"])
def test_preconditioned_gradient_is_the_dense_solve(kind: NormFisher) -> None:
    torch.manual_seed(0)
    layer = nn.LayerNorm((2, 3)).double()
    x = torch.randn(40, 4, 2, 3, dtype=torch.float64)
    rows = per_unit_gradients(layer, ["weight", "bias"], lambda m: (m(x) ** 3).flatten(1).sum(1))
    dense = second_moment(rows)
    optimizer = captured(layer, lambda m: (m(x) ** 3).flatten(1).sum(1).mean(), norm_fisher=kind, damping=0.1)
    if kind != "full":
        index = torch.arange(12)
        dense = dense * ((index[:, None] % 6 == index % 6) if kind == "unit" else torch.eye(12, dtype=torch.bool))
    gradient = {name: torch.randn(2, 3, dtype=torch.float64) for name in ("weight", "bias")}
    solution = optimizer.blocks[""].precondition(gradient)
    stacked = torch.cat([gradient["weight"].flatten(), gradient["bias"].flatten()])
    answer = torch.linalg.solve(dense + 0.1 * torch.eye(12, dtype=torch.float64), stacked)
    torch.testing.assert_close(torch.cat([p.flatten() for p in solution.values()]), answer, rtol=1e-8, atol=1e-10)


def test_a_full_fisher_that_is_too_large_is_unit_wise_and_says_so() -> None:
    optimizer = captured(nn.LayerNorm(6), lambda m: m(torch.randn(3, 6)).sum(), norm_fisher="full", max_factor_dim=8)
    assert optimizer.blocks[""].factors()["F"].shape == (6, 2, 2)
    assert "more than 8" in optimizer.explain().rows[0].note


def test_a_lone_sample_has_no_batch_dimension() -> None:
    torch.manual_seed(0)
    layer = nn.InstanceNorm1d(3, affine=True).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    factors = []
    for inputs in (x, x[None]):
        optimizer = kfac(layer)
        (layer(inputs) ** 3).sum().backward()
        factors.append(optimizer.blocks[""].factors()["F"])
        optimizer.detach()
    torch.testing.assert_close(factors[0], factors[1])
