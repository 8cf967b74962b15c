"""SGN against dense Gauss-Newton steps and the authors' rules; what it shares with NewtonCG is in test_matrix_free."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation

from tests.support.products import Problem, join, make_problem
from triton_curv.damping import LevenbergMarquardt, ScheduledDamping
from triton_curv.errors import ConfigurationError
from triton_curv.operators import ClosureError
from triton_curv.optimizers.sgn import SGN, predicted_change

Pair = tuple[Tensor, Tensor]


def gradient_of(problem: Problem) -> Tensor:
    return join(torch.autograd.grad(problem.loss_closure(), problem.params))


def linear_problem() -> Problem:
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    return Problem(model, torch.randn(30, 4).double(), torch.randn(30, 2).double(), F.mse_loss)


@pytest.mark.parametrize("product", ["jvp", "double_vjp", "auto"])
def test_linear_least_squares_is_lstsq_in_one_step(product: Any) -> None:
    problem = linear_problem()
    opt = SGN(problem.model, damping=0.0, cg_tol=1e-14, cg_first_iter=50, product=product)
    opt.step(problem.pair_closure)
    ones = torch.cat([problem.x, torch.ones(30, 1).double()], 1)
    expected = torch.linalg.lstsq(ones, problem.y).solution
    found = torch.cat([problem.model.weight, problem.model.bias[:, None]], 1).T  # type: ignore[list-item,index]  # a Linear
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce"])
def test_a_step_is_the_damped_gauss_newton_step(loss: str) -> None:
    problem = make_problem("conv", loss)
    G, w, g = problem.gauss_newton(), problem.flat(), gradient_of(problem)
    rho = 0.1
    opt = SGN(
        problem.model, damping=rho, cg_tol=1e-14, cg_first_iter=500, trust_region=False, line_search=False, lr=0.7
    )
    opt.step(problem.pair_closure)
    d = torch.linalg.solve(G + rho * torch.eye(len(w), dtype=w.dtype), -g)
    torch.testing.assert_close(problem.flat(), w + 0.7 * d, rtol=0, atol=1e-11)


def test_iterations_are_the_authors() -> None:
    """Their loop, in their signs: r = m, p = -M r, x += a p, r += a A p."""
    problem = make_problem("linear", "cross_entropy")
    G, w, g = problem.gauss_newton(), problem.flat(), gradient_of(problem)
    rho = 1e-3
    A = G + rho * torch.eye(len(w), dtype=w.dtype)
    M = 1 / (g.square() + rho) ** 0.75
    x, r = torch.zeros_like(w), g.clone()
    y = M * r
    p = -y
    for _ in range(4):
        a = (r @ y) / (p @ A @ p)
        x, old = x + a * p, r @ y
        r = r + a * (A @ p)
        y = M * r
        p = -y + (r @ y) / old * p
    opt = SGN(problem.model, damping=rho, preconditioner="diagonal", cg_first_iter=4, line_search=False)
    opt.step(problem.pair_closure)
    torch.testing.assert_close(problem.flat(), w + x, rtol=0, atol=1e-11)


def test_the_first_steps_have_their_own_iteration_limit() -> None:
    problem = make_problem("linear", "cross_entropy")
    opt = SGN(problem.model, cg_max_iter=2, cg_tol=0.0, damping=1e-3, lr=0.1)
    counts = []
    for _ in range(11):
        opt.step(problem.pair_closure)
        counts.append(int(opt.solves[0].iterations))
    assert counts == [10] * 9 + [2] * 2


# trust region


def test_predicted_change_is_the_models() -> None:
    problem = make_problem("linear", "cross_entropy")
    A = problem.gauss_newton() + 0.1 * torch.eye(len(problem.flat())).double()
    g = gradient_of(problem)
    torch.manual_seed(2)
    d = torch.randn_like(g)

    def model(w: Tensor) -> Tensor:
        return g @ w + w @ A @ w / 2

    assert predicted_change([g], [d], [A @ d]).item() == pytest.approx((model(d) - model(torch.zeros_like(d))).item())
    # the authors' form, after CG: half of (residual + gradient) . d with their residual A d + g
    assert predicted_change([g], [d], [A @ d]).item() == pytest.approx(0.5 * ((A @ d + g + g) @ d).item())


@pytest.mark.parametrize("iterations", [1, 3, 50])
def test_damping_follows_the_ratio_of_actual_to_predicted_change(iterations: int) -> None:
    """By brute force: the same step, its losses, and the quadratic model from dense matrices."""
    seen = set()
    for rho, shrink in ((1e-4, 1.0), (1.0, 1.0), (1e-4, 30.0), (1e-3, 8.0)):
        problem = make_problem("linear", "cross_entropy", seed=3)
        with torch.no_grad():
            for p in problem.params:
                p.mul_(shrink)
        G, w, g, before = problem.gauss_newton(), problem.flat(), gradient_of(problem), problem.loss_closure().item()
        opt = SGN(problem.model, damping=rho, damping_min=0.9e-4, cg_first_iter=iterations, line_search=False)
        opt.step(problem.pair_closure)
        d = problem.flat() - w
        predicted = (g @ d + d @ (G + rho * torch.eye(len(w)).double()) @ d / 2).item()
        ratio = (problem.loss_closure().item() - before) / predicted
        factor = 1.5 if ratio < 0.25 else max(2 / 3, 0.9e-4 / rho) if ratio > 0.75 else 1.0
        assert opt.damping.item() == pytest.approx(rho * factor, rel=1e-12)
        seen.add(factor)
    assert len(seen) > 1


def test_trust_region_rule() -> None:
    rho = torch.tensor(3.0)
    rule = SGN(nn.Linear(2, 2), damping_min=2.5)._rule
    for ratio, expected in ((0.75, 3.0), (0.25, 3.0), (0.2, 4.5), (-1.0, 4.5), (float("nan"), 4.5)):
        assert rule.adapt(rho, torch.tensor(ratio)).item() == pytest.approx(expected)
    assert rule.adapt(rho, torch.tensor(1.0)).item() == 2.5
    assert rule.adapt(2 * rho, torch.tensor(0.8)).item() == 4.0


@pytest.mark.parametrize("line_search", [False, True])
def test_a_rule_of_kfac_moves_rho_and_takes_steps_back(line_search: bool) -> None:
    """Far too long a step: it raises the loss, and no halving of it, ten at most, lowers it."""
    problem = make_problem("linear", "cross_entropy")
    rule = LevenbergMarquardt(interval=2, grow=10.0, reject=True)
    opt = SGN(problem.model, lr=1e7, damping=1e-3, damping_rule=rule, line_search=line_search)
    before = problem.flat()
    opt.step(problem.pair_closure)
    assert torch.equal(problem.flat(), before)
    assert opt.damping.item() == pytest.approx(1e-2)
    opt.step(problem.pair_closure)  # not measured
    assert not torch.equal(problem.flat(), before)
    assert opt.damping.item() == pytest.approx(1e-2)


def test_a_schedule_multiplies_the_groups_damping() -> None:
    problem = make_problem("linear", "cross_entropy")
    options: dict[str, Any] = {"line_search": False, "cg_tol": 1e-14, "cg_first_iter": 500}
    opt = SGN(problem.model, damping=0.5, damping_rule=ScheduledDamping(lambda step: 4.0**-step), **options)
    for rho in (0.5, 0.125):
        G, w, g = problem.gauss_newton(), problem.flat(), gradient_of(problem)
        assert float(opt.damping) == rho
        opt.step(problem.pair_closure)
        d = torch.linalg.solve(G + rho * torch.eye(len(w), dtype=w.dtype), -g)
        torch.testing.assert_close(problem.flat(), w + d, rtol=0, atol=1e-11)


def test_without_trust_region_the_groups_damping_is_used() -> None:
    problem = make_problem("linear", "cross_entropy")
    opt = SGN(problem.model, damping=0.1, trust_region=False, line_search=False, cg_tol=1e-14, cg_first_iter=500)
    opt.step(problem.pair_closure)
    assert float(opt.damping) == 0.1
    opt.param_groups[0]["damping"] = 7.0
    G, w, g = problem.gauss_newton(), problem.flat(), gradient_of(problem)
    opt.step(problem.pair_closure)
    d = torch.linalg.solve(G + 7.0 * torch.eye(len(w), dtype=w.dtype), -g)
    torch.testing.assert_close(problem.flat(), w + d, rtol=0, atol=1e-11)


def test_negative_curvature_raises_the_damping_until_there_is_none() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False).double()
    x = torch.randn(10, 3).double()

    def closure() -> Pair:
        z = model(x)
        return (-z.square() + 0.1 * z.square().square() + z).mean(), z  # not convex in z

    opt = SGN(model, damping=1e-3)
    losses = [float(opt.step(closure)) for _ in range(60)]
    assert losses[-1] < losses[0] - 0.1


def test_at_a_minimum_nothing_moves() -> None:
    problem = make_problem("linear")
    problem.y.copy_(problem.model(problem.x).detach())
    w = problem.flat()
    opt = SGN(problem.model, damping=1e-4)
    opt.step(problem.pair_closure)
    assert torch.equal(problem.flat(), w)
    assert opt.damping.item() == 1e-4


# line search


def test_default_settings_train_without_tuning() -> None:
    torch.manual_seed(10)
    model = nn.Sequential(nn.Linear(1, 20), nn.Sigmoid(), nn.Linear(20, 20), nn.Sigmoid(), nn.Linear(20, 1))
    x = torch.rand(500, 1) * 2 - 1
    y = torch.sin(10 * x)
    opt = SGN(model, cg_max_iter=20)
    for p in model.parameters():
        nn.init.normal_(p) if p.dim() == 2 else nn.init.zeros_(p)
    before = float(F.mse_loss(model(x), y))

    def closure() -> Pair:
        z = model(x)
        return F.mse_loss(z, y), z

    for _ in range(150):
        opt.step(closure)
    assert float(F.mse_loss(model(x), y)) < 1e-2 < 0.1 < before


def test_momentum_is_a_bias_corrected_average() -> None:
    problem = make_problem("linear", "cross_entropy")
    options: dict[str, Any] = {"trust_region": False, "line_search": False, "cg_tol": 1e-14, "cg_first_iter": 500}
    opt = SGN(problem.model, damping=0.5, momentum=0.6, **options)
    average = torch.zeros_like(problem.flat())
    for t in range(1, 4):
        G, w, g = problem.gauss_newton(), problem.flat(), gradient_of(problem)
        average = 0.6 * average + 0.4 * g
        opt.step(problem.pair_closure)
        d = torch.linalg.solve(G + 0.5 * torch.eye(len(w), dtype=w.dtype), -average / (1 - 0.6**t))
        torch.testing.assert_close(problem.flat(), w + d, rtol=0, atol=1e-11)


# errors by name


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda loss, z: loss, r"\(loss, output\)"),
        (lambda loss, z: (loss, z.clone()), "function of the returned output"),
    ],
)
def test_results_without_the_output_are_refused(result: Callable[[Tensor, Tensor], object], message: str) -> None:
    problem = make_problem("linear")
    before = problem.flat()
    with pytest.raises(ClosureError, match=message):
        SGN(problem.model).step(lambda: result(*problem.pair_closure()))
    assert torch.equal(problem.flat(), before)


@pytest.mark.parametrize(
    "options",
    [
        {"damping": -1.0},
        {"damping": float("nan")},
        {"cg_first_iter": 0},
        {"cg_first_steps": -1},
        {"momentum": 1.0},
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        SGN(nn.Linear(2, 2), **options)
