"""Every option of KFAC: a run saved, loaded and continued equals the run that went on, bit for bit."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import triton_curv as tc
from tests.support.small_net import Batch, batches, small_net, weights


def run(model: nn.Module, optimizer: tc.KFAC, data: list[Batch]) -> None:
    sampled = optimizer.options.fisher != "empirical"
    measured = optimizer.options.damping_rule.interval > 0
    for x, y in data:
        optimizer.zero_grad()
        output = model(x)
        if sampled:
            optimizer.sample_fisher(output, "cross_entropy")
        functional.cross_entropy(output, y).backward()
        if measured:
            optimizer.step(evaluate=lambda x=x, y=y: functional.cross_entropy(model(x), y))  # type: ignore[misc]  # mypy can't infer lambda defaults
        else:
            optimizer.step()


OPTIONS: dict[str, dict[str, Any]] = {
    "sampled": {"fisher": "sampled"},
    "exact": {"fisher": "exact", "factor_interval": 2},
    "eigen": {"inverse": "eigen"},
    "ekfac": {"inverse": "eigen", "ekfac": True},
    "neumann": {"inverse": "neumann"},
    "budget": {"refresh_budget": 1, "inverse_interval": 6},
    "ekfac-budget": {"inverse": "eigen", "ekfac": True, "refresh_budget": 2, "inverse_interval": 6},
    "even": {"refresh_budget": "even", "factor_interval": 4, "inverse_interval": 4},
    "growing": {"factor_interval": tc.GrowingInterval(8), "inverse_interval": tc.GrowingInterval(8)},
    "even-growing": {
        "refresh_budget": "even",
        "factor_interval": tc.GrowingInterval(8),
        "inverse_interval": tc.GrowingInterval(8),
    },
    "even-reject": {"refresh_budget": "even", "damping_rule": tc.LevenbergMarquardt(interval=2, reject=True)},
    "even-apart": {"refresh_budget": "even", "fisher": "sampled"},
    "epoch": {"factor_interval": tc.EpochInterval(2), "inverse_interval": tc.EpochInterval(2)},
    "adaptive": {"factor_interval": tc.AdaptiveInterval(0.5), "factor_decay": 0.0},
    "adaptive-eigen": {"factor_interval": tc.AdaptiveInterval(0.5), "inverse": "eigen"},
    "warmup": {"damping_rule": tc.WarmupDamping(100.0, 10)},
    "levenberg": {"damping_rule": tc.LevenbergMarquardt(interval=2)},
    "reject": {"damping_rule": tc.LevenbergMarquardt(interval=1, reject=True), "lr": 0.3},
    "rescale": {"rescale": "paper"},
    "rescale-code": {"rescale": "code", "update_size": "none", "damping": 0.1},
    "sgd": {"fallback": "sgd", "update_size": "kl_clip"},
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(small_net(), nn.LayerNorm(3))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_resume_is_bit_for_bit(options: dict[str, Any]) -> None:
    settings = {"lr": 0.01, "factor_interval": 3, "inverse_interval": 4, **options}
    model, data, at = net(), batches(11), 5
    optimizer = tc.KFAC(model, **settings)
    run(model, optimizer, data[:at])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    run(model, optimizer, data[at:])

    resumed = net()
    other = tc.KFAC(resumed, **settings)
    run(resumed, other, data[:3])  # leaves state that loading must overwrite
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    run(resumed, other, data[at:])
    for a, b in zip(weights(model), weights(resumed), strict=True):
        assert torch.equal(a, b)
    assert str(optimizer.state_dict()) == str(other.state_dict())


def test_tensor_hyper_parameters_survive_every_option() -> None:
    results = []
    for wrap in (float, torch.tensor):
        model = net()
        optimizer = tc.KFAC(
            model,
            lr=wrap(0.01),
            momentum=wrap(0.8),
            weight_decay=wrap(0.1),
            damping=wrap(0.1),
            inverse="eigen",
            damping_rule=tc.LevenbergMarquardt(interval=2),
            rescale="code",
        )
        run(model, optimizer, batches(5))
        results.append(weights(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_an_added_group_continues_too() -> None:
    results = []
    for resumed in (False, True):
        model, extra = net(), nn.Parameter(torch.ones(3))
        optimizer = tc.KFAC(model, lr=0.01)
        optimizer.add_param_group({"params": [extra], "lr": 0.1})
        for step, (x, y) in enumerate(batches(6)):
            if resumed and step == 3:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer.detach()
                optimizer = tc.KFAC(model, lr=0.01)
                optimizer.add_param_group({"params": [extra], "lr": 0.1})
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            functional.cross_entropy(model(x) * extra, y).backward()
            optimizer.step()
        results.append([*weights(model), extra.detach()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
