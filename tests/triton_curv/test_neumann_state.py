"""Neumann's state: eval() and train(), exact resumption, copies, state dicts that do not fit."""

import copy
import io
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.neumann import (
    STRONG,
    flat,
    in_two_groups,
    make_params,
    run,
    state_of,
)
from triton_curv.errors import EvaluationModeError, StateMismatchError
from triton_curv.optimizers.neumann import Neumann


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [0, 3, 7, 20])
def test_eval_shows_the_true_weights_and_train_returns_bit_for_bit(steps: int, dtype: torch.dtype) -> None:
    params = make_params(dtype)
    opt = Neumann(params, lr=0.05, **STRONG)
    run(opt, params, 0, steps)
    w, m = flat(params), state_of(opt, params, "momentum_buffer")
    mu = float(np.clip(1 - 1 / (1 + max(steps - 6, 0)), 0.5, 0.9))
    for _ in range(2):
        opt.eval()
        assert opt.evaluating
        np.testing.assert_allclose(flat(params), w - mu * m, rtol=torch.finfo(dtype).eps, atol=1e-15)
    if steps > 6:
        assert np.abs(flat(params) - w).max() > 0
    with pytest.raises(EvaluationModeError, match=r"expected train\(\) before step\(\)"):
        opt.step()
    with pytest.raises(EvaluationModeError, match=r"expected train\(\) before add_param_group\(\)"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    for _ in range(2):
        opt.train()
        assert not opt.evaluating
        np.testing.assert_array_equal(flat(params), w)


def saved(opt: Neumann, params: list[nn.Parameter]) -> Any:
    """Model and optimizer through a file, as a restart sees them."""
    file = io.BytesIO()
    torch.save({"params": [p.data for p in params], "opt": opt.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def restore(checkpoint: Any, opt: Neumann, params: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for p, value in zip(params, checkpoint["params"], strict=True):
            p.copy_(value)
    opt.load_state_dict(checkpoint["opt"])


# warm-up, its last step, the first reset, within a period, right before and after the reset at t = 8
@pytest.mark.parametrize("at", [0, 2, 6, 7, 10, 13, 14])
@pytest.mark.parametrize("evaluating", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_bit_for_bit(at: int, evaluating: bool, dtype: torch.dtype) -> None:
    def fresh() -> tuple[list[nn.Parameter], Neumann]:
        params = make_params(dtype)
        return params, Neumann(in_two_groups(params, 2), lr=0.05, **STRONG)

    params, opt = fresh()
    run(opt, params, 0, at)
    if evaluating:
        opt.eval()
    checkpoint = saved(opt, params)
    opt.train()
    run(opt, params, at, 40)

    resumed, other = fresh()
    run(other, resumed, 0, 3)  # state to be overwritten
    buffers = [id(t) for s in other.state.values() for t in s.values()] + [
        id(g["distance"]) for g in other.param_groups
    ]
    restore(checkpoint, other, resumed)
    assert other.evaluating == evaluating
    other.train()
    run(other, resumed, at, 40)
    np.testing.assert_array_equal(flat(params), flat(resumed))
    for name in ("momentum_buffer", "exp_avg"):
        np.testing.assert_array_equal(state_of(opt, params, name), state_of(other, resumed, name))
    assert {t.dtype for s in other.state.values() for t in s.values()} == {torch.float32}
    now = [id(t) for s in other.state.values() for t in s.values()] + [id(g["distance"]) for g in other.param_groups]
    assert now == buffers


def test_loading_takes_nothing_by_reference() -> None:
    params, others = make_params(), make_params()
    opt = Neumann(params, lr=torch.tensor(0.05, dtype=torch.float64), **STRONG)
    other = Neumann(others, lr=0.1, **STRONG)
    run(opt, params, 0, 12)
    other.load_state_dict(opt.state_dict())
    before = copy.deepcopy(opt.state_dict())
    run(other, others, 12, 20)
    other.param_groups[0]["lr"].fill_(7.0)
    after = opt.state_dict()
    assert before["param_groups"][0]["distance"] == after["param_groups"][0]["distance"]
    assert before["param_groups"][0]["lr"] == after["param_groups"][0]["lr"]
    for a, b in itertools.product(opt.state.values(), other.state.values()):
        assert not {t.data_ptr() for t in a.values()} & {t.data_ptr() for t in b.values()}


def test_a_copy_of_the_optimizer_goes_on_like_the_original() -> None:
    params = make_params()
    opt = Neumann(params, lr=0.05, **STRONG)
    run(opt, params, 0, 12)
    twin_params, twin = copy.deepcopy((params, opt))
    run(opt, params, 12, 30)
    run(twin, twin_params, 12, 30)
    np.testing.assert_array_equal(flat(params), flat(twin_params))


@pytest.mark.parametrize("evaluating", [False, True])
def test_a_state_dict_that_does_not_fit_is_refused_and_changes_nothing(evaluating: bool) -> None:
    params = make_params()
    opt = Neumann(params, lr=0.05, **STRONG)
    run(opt, params, 0, 12)
    if evaluating:
        opt.eval()
    before = copy.deepcopy(opt.state_dict())
    adam = torch.optim.AdamW(params, lr=0.1)
    wider = Neumann(nn.ParameterList(torch.zeros(9, 9) for _ in params), lr=0.1)
    fewer = Neumann(params[:1], lr=0.1)
    torn = copy.deepcopy(wider.state_dict())
    torn["param_groups"][0]["evaluating"] = True  # says eval(), lacks the displaced weights
    for bad in (adam.state_dict(), wider.state_dict(), fewer.state_dict(), torn):
        with pytest.raises(StateMismatchError):
            opt.load_state_dict(bad)
    torch.testing.assert_close(opt.state_dict()["state"], before["state"], rtol=0, atol=0)
    assert opt.evaluating == evaluating
    assert opt.param_groups[0]["distance"] == before["param_groups"][0]["distance"]
