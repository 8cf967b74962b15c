"""Backward passes whose gradients are thrown away leave no statistics: skipped steps, other networks' losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import triton_curv as tc
from tests.support.capture import kfac

X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def factors_of(optimizer: tc.KFAC) -> dict[str, Tensor]:
    return {f"{n}.{k}": v for n, block in optimizer.blocks.items() for k, v in block.factors().items()}


def assert_plain(optimizer: tc.KFAC, factor_G: float = 1.0) -> None:
    """The factors of one backward pass of the mean loss on (X, Y)."""
    model = net()
    reference = kfac(model)
    cross_entropy(model(X), Y).backward()
    for key, value in factors_of(reference).items():
        scale = factor_G if key.endswith("G") else 1.0
        torch.testing.assert_close(factors_of(optimizer)[key], scale * value, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("says_units", [False, True])
@pytest.mark.parametrize("zeroed", ["optimizer", "model"])
def test_a_step_that_a_grad_scaler_leaves_out(zeroed: str, says_units: bool) -> None:
    """Only one gradient overflowed; the finite statistics of the others carry the old scale."""
    model = net()
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    optimizer = kfac(model, grad_scaler=scaler)
    for overflows in (True, False):
        (optimizer if zeroed == "optimizer" else model).zero_grad()
        for part in (slice(0, 2), slice(2, 8)):  # micro-batches stay together
            if says_units:
                optimizer.count(len(Y[part]))
            scaler.scale(cross_entropy(model(X[part]), Y[part]) * len(Y[part]) / len(Y)).backward()
        if overflows:
            grad = model.get_parameter("0.weight").grad
            assert grad is not None
            grad.fill_(float("inf"))
            scaler.step(optimizer)
            scaler.update()
    assert optimizer.param_groups[0]["step"] == 0
    assert_plain(optimizer)


@pytest.mark.parametrize("options", [{}, {"inverse": "eigen", "ekfac": True}])
def test_another_networks_loss_through_the_model(options: dict[str, Any]) -> None:
    """A discriminator's optimizer: the generator's loss goes through it, its gradients are zeroed."""
    model = net()
    optimizer = kfac(model, **options)
    (-100 * model(X)[:, 0].mean()).backward()
    optimizer.zero_grad()
    cross_entropy(model(X), Y).backward()
    assert_plain(optimizer)
    for block in optimizer.blocks.values():
        if block.moments is not None:  # the basis is the identity still: sums of squares of samples' gradients
            diagonal = torch.outer(*(block.factors()[k].diagonal() for k in ("G", "A")))
            assert float(block.moments.sums.sum() * len(X)) == pytest.approx(float(diagonal.sum()), rel=0.5)


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("early", [False, True], ids=["after zero_grad", "before zero_grad"])
@pytest.mark.parametrize("blind", [False, True], ids=["host knows", "host blind"])
def test_what_the_loss_averages_over_is_said_on_either_side_of_zero_grad(
    early: bool, skipped: bool, blind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if blind:
        monkeypatch.setattr("triton_curv.blocks.bank.known_true", lambda flags: False)
    model = net()
    optimizer = kfac(model)
    for _ in range(2 if skipped else 1):
        if early:
            optimizer.count(2 * len(X))
        optimizer.zero_grad()
        if not early:
            optimizer.count(2 * len(X))
        cross_entropy(model(X), Y).backward()
    assert_plain(optimizer, factor_G=2.0)


def test_micro_batches_and_sampled_statistics_stay() -> None:
    model = net()
    optimizer = kfac(model)
    optimizer.zero_grad()
    for part in (slice(0, 2), slice(2, 8)):
        (cross_entropy(model(X[part]), Y[part]) * len(Y[part]) / len(Y)).backward()
    assert_plain(optimizer)
    sampled = kfac(net(), fisher="sampled")
    output = sampled._model(X)
    sampled.sample_fisher(output, "cross_entropy")
    before = factors_of(sampled)
    sampled.zero_grad()  # torch's usual order is forward, zero_grad, backward
    for key, value in factors_of(sampled).items():
        assert torch.equal(value, before[key])
