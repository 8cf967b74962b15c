"""KFAC when gradients or factors go bad: skipped steps, the failure ladder, reports."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

import triton_curv as tc
from tests.support.small_net import batches, small_net, train, weights


def poison_gradient(model: nn.Sequential, optimizer: tc.KFAC) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.view(-1)[0] = float("nan")


def test_a_step_with_nan_gradients_changes_nothing_and_is_counted() -> None:
    model = small_net()
    optimizer = tc.KFAC(model, lr=0.01)
    train(model, optimizer, batches(2))
    before, momentum = weights(model), [s["momentum_buffer"].clone() for s in optimizer.state.values()]
    x, y = batches(3)[2]
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    poison_gradient(model, optimizer)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    kept = [s["momentum_buffer"] for s in optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(momentum, kept, strict=True))
    assert optimizer.health()["optimizer"]["skipped_steps"] == 1


def test_nan_statistics_never_enter_the_average() -> None:
    model = small_net()
    optimizer = tc.KFAC(model, lr=0.01, factor_interval=1, inverse_interval=1)
    train(model, optimizer, batches(2))
    before = {n: b.factors() for n, b in optimizer.blocks.items()}
    x, y = batches(1)[0]
    optimizer.zero_grad()
    functional.cross_entropy(model(x * float("inf")), y).backward()
    optimizer.step()
    for name, kinds in before.items():
        for kind, value in kinds.items():
            assert optimizer.blocks[name].factors()[kind].isfinite().all()
            if kind == "A" and name == "0":
                torch.testing.assert_close(optimizer.blocks[name].factors()[kind], value)


def break_factor(optimizer: tc.KFAC, how: str) -> None:
    average = optimizer.state[optimizer.blocks["4"].rule.params["weight"]]["A"]
    if how == "indefinite":
        average.diagonal(dim1=-2, dim2=-1).fill_(-1.0)
    else:
        average.fill_(float(how))


@pytest.mark.parametrize("how", ["indefinite", "nan", "inf"])
def test_failure_ladder_is_climbed_and_left(how: str) -> None:
    model = small_net()
    optimizer = tc.KFAC(model, lr=1e-3, factor_interval=100, inverse_interval=1)
    train(model, optimizer, batches(1))
    healthy = optimizer.state[optimizer.blocks["4"].rule.params["weight"]]["A"].clone()
    previous = optimizer.blocks["4"].inverses["A"].clone()
    break_factor(optimizer, how)
    rungs = []
    for batch in batches(6)[1:]:
        train(model, optimizer, [batch])
        rungs.append(optimizer.health()["4"]["rung"])
        if rungs[-1] == "previous":
            assert torch.equal(optimizer.blocks["4"].inverses["A"], previous)
    assert rungs == ["previous"] * 3 + ["identity"] * 2
    assert optimizer.health()["4"]["failures"] == 5
    assert optimizer.health()["0"]["rung"] == "fresh"
    assert all(p.isfinite().all() for p in model.parameters())
    optimizer.state[optimizer.blocks["4"].rule.params["weight"]]["A"].copy_(healthy)
    train(model, optimizer, batches(7)[6:])
    assert optimizer.health()["4"]["rung"] == "fresh"
    assert optimizer.health()["4"]["failures"] == 0


def test_ladder_uses_the_diagonal_where_only_the_rest_is_broken() -> None:
    model = small_net()
    optimizer = tc.KFAC(model, lr=1e-3, factor_interval=100, inverse_interval=1, damping=1e-14)
    train(model, optimizer, batches(1))
    average = optimizer.state[optimizer.blocks["6"].rule.params["weight"]]["G"]
    average.copy_(
        torch.tensor([[1.0, 5.0, 0.0], [5.0, 1.0, 0.0], [0.0, 0.0, 2.0]])[None]
    )  # indefinite, positive diagonal
    train(model, optimizer, batches(6)[1:])
    assert optimizer.health()["6"]["rung"] == "diagonal"
    expected = torch.diag(torch.tensor([1.0, 1.0, 0.5]))[None]
    torch.testing.assert_close(optimizer.blocks["6"].inverses["G"], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("call", [lambda o: o.explain(), lambda o: o.health(), lambda o: repr(o)])
def test_reports_do_not_disturb_the_state(call: Callable[[tc.KFAC], object]) -> None:
    models = [small_net(), small_net()]
    optimizers = [tc.KFAC(m, lr=0.01) for m in models]
    for batch in batches(3):
        train(models[0], optimizers[0], [batch])
        train(models[1], optimizers[1], [batch])
        call(optimizers[1])
    for a, b in zip(weights(models[0]), weights(models[1]), strict=True):
        assert torch.equal(a, b)
