"""Neumann against Algorithm 2 of arXiv 1712.03298 in NumPy; schedules, groups and gradients it takes and refuses."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from tests.support.neumann import (
    SIZE,
    STRONG,
    agree,
    algorithm_2,
    flat,
    give_gradients,
    gradient,
    in_two_groups,
    make_params,
    run,
    state_of,
)
from triton_curv.errors import ConfigurationError, SparseGradientError
from triton_curv.optimizers.neumann import (
    Neumann,
    mu_at,
    next_reset,
)

# the algorithm


def test_equals_algorithm_2_with_all_terms_on() -> None:
    params = make_params()
    opt = Neumann(params, lr=0.05, **STRONG)
    got = run(opt, params, 0, 106)
    want = algorithm_2(106, 0.05, **STRONG)
    np.testing.assert_allclose(got, want.weights, rtol=0, atol=1e-12)
    np.testing.assert_allclose(state_of(opt, params, "momentum_buffer"), want.m, rtol=0, atol=1e-12)
    np.testing.assert_allclose(state_of(opt, params, "exp_avg"), want.v, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "change", [{"alpha": 0.0}, {"beta": 0.0}, {"gamma": 0.8}, {"mu": (0.9, 0.9)}, {"period": 8}, {"warmup": 5}]
)
def test_every_setting_matters_in_that_comparison(change: dict[str, Any]) -> None:
    with_all, without = (algorithm_2(106, 0.05, **settings).weights for settings in (STRONG, STRONG | change))
    assert np.abs(np.array(with_all) - np.array(without)).max() > 1e-2


def test_groups_share_the_norm_and_the_number_of_variables() -> None:
    params = make_params()
    opt = Neumann(in_two_groups(params, 1), lr=0.05, **STRONG)
    lr = np.r_[np.full(12, 0.05), np.full(13, 0.02)]
    got = run(opt, params, 0, 106)
    np.testing.assert_allclose(got, algorithm_2(106, lr, **STRONG).weights, rtol=0, atol=1e-12)


@pytest.mark.parametrize("nesterov_mu", [0.0, 0.9])
def test_without_regulariser_it_is_nesterov_momentum_on_the_true_weights(nesterov_mu: float) -> None:
    params = make_params()
    plain: dict[str, Any] = {"alpha": 0.0, "beta": 0.0, "mu": (nesterov_mu, nesterov_mu), "warmup": 0, "period": 10**6}
    opt = Neumann(params, lr=0.05, **plain)
    give_gradients(params, 0)
    opt.step()  # the reset at t = 1
    m = state_of(opt, params, "momentum_buffer")
    u = flat(params) - nesterov_mu * m
    for step in range(1, 200):
        m = nesterov_mu * m - 0.05 * gradient(u + nesterov_mu * m, step)
        u = u + m
        give_gradients(params, step)
        opt.step()
        opt.eval()
        np.testing.assert_allclose(flat(params), u, rtol=0, atol=1e-12)
        opt.train()


def test_v_aliased_to_w_is_noticed() -> None:
    params = make_params()
    opt = Neumann(params, lr=0.05, **STRONG)
    assert agree(opt, params, 0.05, STRONG, 30)
    params = make_params()
    opt = Neumann(params, lr=0.05, **STRONG)
    for p in params:
        assert opt.state[p]["exp_avg"].data_ptr() != p.data_ptr()
        opt.state[p]["exp_avg"] = p.data
    assert not agree(opt, params, 0.05, STRONG, 30)


@pytest.mark.parametrize("split", [False, True], ids=["one group", "two groups"])
def test_distance_is_the_norm_of_w_minus_v_after_every_step(split: bool) -> None:
    params = make_params()
    opt = Neumann(in_two_groups(params, 2) if split else [{"params": params}], lr=0.05, **STRONG)
    for step in range(40):
        give_gradients(params, step)
        if step % 3 == 0:
            params[step % 2].grad = None  # stays where it is, and counts
        opt.step()
        gap = flat(params) - state_of(opt, params, "exp_avg")
        distances = [float(g["distance"]) for g in opt.param_groups]
        assert np.linalg.norm(distances) == pytest.approx(np.linalg.norm(gap), rel=1e-12)
    assert np.linalg.norm(gap) > 0.1


def test_parameters_without_a_gradient_stay_and_count_in_the_norm() -> None:
    params = make_params()
    opt = Neumann(params, lr=0.05, **STRONG)
    run(opt, params, 0, 10)
    before, still, D = flat(params[:1]), flat([opt.state[params[0]]["exp_avg"]]), float(opt.param_groups[0]["distance"])
    w, v, m = flat(params[1:]), state_of(opt, params[1:], "exp_avg"), state_of(opt, params[1:], "momentum_buffer")
    give_gradients(params, 10)
    params[0].grad = None
    opt.step()
    mu = 1 - 1 / (1 + 5)
    d = gradient(np.r_[before, w], 10)[12:] + (0.3 * D**2 - 0.02 * SIZE / D**2) * (w - v) / D
    np.testing.assert_allclose(flat(params[1:]), w + mu * (mu * m - 0.05 * d) - 0.05 * d, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(flat(params[:1]), before)
    np.testing.assert_array_equal(flat([opt.state[params[0]]["exp_avg"]]), still)


def test_no_warm_up_means_no_regulariser_until_w_leaves_v() -> None:
    params = make_params()
    settings = STRONG | {"warmup": 0, "beta": 1e-7}
    opt = Neumann(params, lr=0.05, **settings)
    assert agree(opt, params, 0.05, settings, 40)
    assert np.isfinite(flat(params)).all()


def test_origin_is_what_the_first_step_finds() -> None:
    params = make_params()
    with torch.no_grad():
        for p in params:
            p.zero_()
    opt = Neumann(params, lr=0.05, **STRONG)
    with torch.no_grad():
        for p, fresh in zip(params, make_params(), strict=True):
            p.copy_(fresh)  # pretrained weights, loaded late
    assert agree(opt, params, 0.05, STRONG, 40)


def test_periods_double() -> None:
    resets = [t for t in range(1, 400) if next_reset(t - 1, 10) == t]
    assert resets == [1, 11, 31, 71, 151, 311]
    assert [next_reset(t, 3) for t in range(-2, 11)] == [1, 1, 1, 4, 4, 4, 10, 10, 10, 10, 10, 10, 22]


def test_mu_rises_from_one_half_to_nine_tenths() -> None:
    assert [mu_at(t, (0.5, 0.9), 1) for t in (-5, 0, 1, 3, 9, 100)] == pytest.approx([0.5, 0.5, 0.5, 0.75, 0.9, 0.9])
    assert mu_at(30, (0.5, 0.9), 10) == pytest.approx(0.75)


# hyper-parameters, gradients, groups


@pytest.mark.parametrize("as_tensor", [False, True])
def test_schedulers_change_the_learning_rate(as_tensor: bool) -> None:
    params, by_hand = make_params(), make_params()
    opt = Neumann(params, lr=torch.tensor(0.05, dtype=torch.float64) if as_tensor else 0.05, **STRONG)
    manual = Neumann(by_hand, lr=0.05, **STRONG)
    scheduler = LambdaLR(opt, lambda step: 0.9**step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(40):
            manual.param_groups[0]["lr"] = 0.05 * 0.9**step
            run(opt, params, step, step + 1)
            run(manual, by_hand, step, step + 1)
            scheduler.step()
    np.testing.assert_allclose(flat(params), flat(by_hand), rtol=0, atol=1e-13)
    assert isinstance(opt.param_groups[0]["lr"], Tensor) == as_tensor


def test_one_cycle_schedule() -> None:
    params = make_params()
    opt = Neumann(params, lr=0.05, **STRONG)
    scheduler = OneCycleLR(opt, max_lr=0.1, total_steps=10, cycle_momentum=False)
    for step in range(9):
        run(opt, params, step, step + 1)
        scheduler.step()
    assert opt.param_groups[0]["lr"] < 1e-5


@pytest.mark.parametrize("compile_first", [False, True])
def test_compiled_step_with_a_scheduler(compile_first: bool) -> None:
    torch._dynamo.reset()
    eager, compiled = make_params(), make_params()
    a, b = Neumann(eager, lr=0.05, **STRONG), Neumann(compiled, lr=0.05, **STRONG)
    step_b: Callable[[], Any] = torch.compile(b.step, backend="eager", fullgraph=True) if compile_first else b.step
    schedulers = [LambdaLR(opt, lambda step: 0.9**step) for opt in (a, b)]
    step_b = step_b if compile_first else torch.compile(b.step, backend="eager", fullgraph=True)
    phases: set[tuple[bool, str]] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(30):
            run(a, eager, step, step + 1)
            give_gradients(compiled, step)
            plan = b._plans[0]
            known = {(plan.fresh, plan.phase)} <= phases
            phases.add((plan.fresh, plan.phase))
            with torch._dynamo.config.patch(error_on_recompile=known):
                step_b()
            for scheduler in schedulers:
                scheduler.step()
    assert {phase for _, phase in phases} == {"warmup", "reset", "main"}
    np.testing.assert_allclose(flat(eager), flat(compiled), rtol=1e-12)


@pytest.mark.parametrize("whole", [False, True], ids=["regions", "step"])
def test_compiled_by_aot_autograd_it_is_what_it_is_eagerly(whole: bool) -> None:
    """Two groups, weight decay, a parameter without gradients; 30 steps of changing hyper-parameters, 4 graphs."""
    torch._dynamo.reset()
    counters.clear()
    results = []
    for compiled in (False, True):
        params = make_params()
        groups: list[dict[str, Any]] = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.1}]
        opt = Neumann(groups, lr=0.05, **STRONG, compile={"backend": "aot_eager"} if compiled and not whole else False)
        step = torch.compile(opt.step, fullgraph=True, backend="aot_eager") if compiled and whole else opt.step
        for i in range(30):
            for group in opt.param_groups:
                group.update(lr=0.05 / (1 + i), alpha=0.1 * i, gamma=0.99 - 0.01 * i)
            give_gradients(params, i)
            params[-1].grad = None
            with torch._dynamo.config.patch(error_on_recompile=i > 20):
                step()
        results.append(flat(params))
        assert [group["step"] for group in opt.param_groups] == [30, 30]
    np.testing.assert_allclose(results[1], results[0], rtol=1e-12)
    assert not counters["graph_break"]


@pytest.mark.parametrize(("setting", "sign"), [({"maximize": True}, -1.0), ({"weight_decay": 0.3}, 1.0)])
def test_maximize_and_weight_decay(setting: dict[str, Any], sign: float) -> None:
    params, by_hand = make_params(), make_params()
    opt, manual = Neumann(params, lr=0.05, **STRONG, **setting), Neumann(by_hand, lr=0.05, **STRONG)
    for step in range(30):
        run(opt, params, step, step + 1)
        give_gradients(by_hand, step)
        for p in by_hand:
            assert p.grad is not None
            p.grad = sign * p.grad + setting.get("weight_decay", 0.0) * p.detach()
        manual.step()
    np.testing.assert_allclose(flat(params), flat(by_hand), rtol=0, atol=1e-13)


def test_step_leaves_gradients_alone_and_returns_the_loss() -> None:
    params = make_params()
    opt = Neumann(params, lr=0.05, weight_decay=0.1, maximize=True, **STRONG)
    grads: list[Tensor] = []

    def closure() -> float:
        assert torch.is_grad_enabled()
        give_gradients(params, 0)
        grads[:] = [p.grad.clone() for p in params if p.grad is not None]
        return 3.5

    for _ in range(10):
        assert opt.step(closure) == 3.5
        for p, g in zip(params, grads, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=0, atol=0)
    opt.zero_grad()
    assert opt.step() is None


def test_named_parameters_generators_and_added_groups() -> None:
    net = nn.Linear(3, 2)
    assert Neumann(net.named_parameters(), lr=0.1).param_groups[0]["param_names"] == ["weight", "bias"]
    opt = Neumann((p for p in [net.weight]), lr=0.1)
    opt.add_param_group({"params": [net.bias], "lr": 0.2})
    assert [g["lr"] for g in opt.param_groups] == [0.1, 0.2]
    assert set(opt.state[net.bias]) == {"momentum_buffer", "exp_avg"}
    for _ in range(5):
        net(torch.ones(4, 3)).square().mean().backward()
        opt.step()
    assert Neumann(in_two_groups(list(net.parameters()), 0), lr=0.1).step() is None


def test_late_group_gets_a_warm_up_of_its_own() -> None:
    params = make_params()
    opt = Neumann(params[:2], lr=0.05, **STRONG)
    give_gradients(params, 0)
    for _ in range(20):
        opt.step()
    opt.add_param_group({"params": params[2:]})
    before, grad = flat(params[2:]), flat([params[2].grad])
    opt.step()
    np.testing.assert_allclose(flat(params[2:]), before - 0.05 * grad, rtol=0, atol=1e-15)
    assert [g["step"] for g in opt.param_groups] == [21, 1]


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    opt = Neumann(table.parameters(), lr=0.1)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(SparseGradientError, match=r"expected dense gradients, got one of layout torch\.sparse_coo"):
        opt.step()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr": -1.0}, r"lr >= 0, got -1\.0"),
        ({"lr": float("nan")}, "lr >= 0, got nan"),
        ({"alpha": -1.0}, "alpha >= 0"),
        ({"beta": -1.0}, "beta >= 0"),
        ({"weight_decay": -1.0}, "weight_decay >= 0"),
        ({"gamma": 1.5}, r"gamma in \[0, 1\], got 1.5"),
        ({"mu": (0.9, 0.5)}, r"first <= last < 1, got \(0.9, 0.5\)"),
        ({"mu_steps": 0}, "mu_steps > 0"),
        ({"period": 0}, "period to be an integer >= 1"),
        ({"period": 2.5}, "period to be an integer >= 1"),
        ({"warmup": -1}, "warmup to be an integer >= 0"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Neumann(nn.Linear(1, 1).parameters(), **setting)


def test_parameters_it_cannot_train_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"real floating-point parameters, got torch\.complex64"):
        Neumann([nn.Parameter(torch.zeros(1, dtype=torch.complex64))])
    with pytest.raises(ConfigurationError, match=r"one device, got \['cpu', 'meta'\]"):
        Neumann([nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, device="meta"))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_keep_wide_state(dtype: torch.dtype) -> None:
    params = make_params(dtype)
    opt = Neumann(params, lr=0.05, **STRONG)
    got = run(opt, params, 0, 25)
    assert {t.dtype for s in opt.state.values() for t in s.values()} == {torch.float32}
    want = algorithm_2(25, 0.05, **STRONG).weights
    np.testing.assert_allclose(got[-1], want[-1], rtol=0, atol=0.1)  # 25 roundings of w to 2^-9
    gap = flat(params) - state_of(opt, params, "exp_avg")
    assert float(opt.param_groups[0]["distance"]) == pytest.approx(np.linalg.norm(gap), rel=1e-5)


def test_trains_a_network_with_batch_norm() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    x = torch.randn(256, 6)
    y = x[:, :1] * x[:, 1:2]
    opt = Neumann(net.parameters(), lr=0.1, warmup=50, period=100)
    losses = []
    for _ in range(400):
        loss = (net(x) - y).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
