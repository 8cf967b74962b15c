"""SGN against dense Gauss-Newton steps, the authors' rules and its contract as a torch optimizer."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation
from torch.optim.lr_scheduler import LambdaLR

from tests.support.products import Problem, join, make_problem
from triton_curv import KFAC
from triton_curv.errors import ConfigurationError, StateMismatchError
from triton_curv.operators import ClosureError, NoGraphError, NonFiniteError, UnsupportedOpError
from triton_curv.optimizers.sgn import SGN, predicted_change, trust_region_damping

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
    for ratio, expected in ((0.8, 2.0), (0.75, 3.0), (0.25, 3.0), (0.2, 4.5), (-1.0, 4.5), (float("nan"), 4.5)):
        assert trust_region_damping(rho, ratio, 1e-6).item() == pytest.approx(expected)
    assert trust_region_damping(rho, 1.0, 2.5).item() == 2.5


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


def test_armijo_halves_until_the_loss_falls() -> None:
    problem = linear_problem()
    w = problem.flat()
    exact = linear_problem()
    SGN(exact.model, damping=0.0, cg_tol=1e-14, cg_first_iter=50).step(exact.pair_closure)
    opt = SGN(problem.model, lr=6.0, damping=0.0, cg_tol=1e-14, cg_first_iter=50)
    opt.step(problem.pair_closure)
    torch.testing.assert_close(problem.flat(), w + 1.5 * (exact.flat() - w), rtol=0, atol=1e-11)
    without = linear_problem()
    SGN(without.model, lr=6.0, damping=0.0, cg_tol=1e-14, cg_first_iter=50, line_search=False).step(
        without.pair_closure
    )
    torch.testing.assert_close(without.flat(), w + 6 * (exact.flat() - w), rtol=0, atol=1e-11)


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


def test_kfac_preconditioner_saves_iterations() -> None:
    problem = linear_problem()
    options: dict[str, Any] = {"damping": 1e-8, "cg_first_iter": 100, "stop": "relative", "cg_tol": 1e-6}
    problem.x.mul_(torch.tensor([1.0, 5.0, 30.0, 100.0]))
    opt = SGN(problem.model, preconditioner=KFAC(problem.model, damping=1e-8), **options)
    plain = linear_problem()
    plain.x.copy_(problem.x)
    other = SGN(plain.model, **options)
    opt.step(problem.pair_closure)
    other.step(plain.pair_closure)
    assert opt.solves[0].iterations < other.solves[0].iterations
    torch.testing.assert_close(problem.flat(), plain.flat(), rtol=0, atol=1e-3)


# the contract of a torch optimizer


def test_gradients_of_the_user_stay() -> None:
    problem = make_problem("linear")
    for p in problem.params:
        p.grad = torch.ones_like(p)
    SGN(problem.model).step(problem.pair_closure)
    for p in problem.params:
        assert p.grad is not None
        assert torch.equal(p.grad, torch.ones_like(p))


def test_lr_scheduler_and_groups() -> None:
    problem = make_problem("linear")
    opt = SGN(problem.model, lr=1.0, groups=[{"modules": "2", "lr": 0.0}], line_search=False)
    schedule = LambdaLR(opt, lambda t: 0.5**t)
    fixed = [p.detach().clone() for p in problem.model.get_submodule("2").parameters()]
    for t in range(3):
        assert [g["lr"] for g in opt.param_groups] == [0.0, 0.5**t]
        opt.step(problem.pair_closure)
        schedule.step()
    for p, before in zip(problem.model.get_submodule("2").parameters(), fixed, strict=True):
        assert torch.equal(p, before)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "preconditioner": "diagonal"}])
def test_resumes_bit_for_bit(options: dict[str, Any]) -> None:
    def start() -> tuple[Problem, SGN]:
        problem = make_problem("batch_norm", "cross_entropy")
        return problem, SGN(problem.model, cg_first_steps=3, cg_max_iter=4, product="double_vjp", **options)

    (straight, opt), (stopped, first) = start(), start()
    for _ in range(6):
        opt.step(straight.pair_closure)
    for _ in range(3):
        first.step(stopped.pair_closure)
    file = io.BytesIO()
    torch.save({"model": stopped.model.state_dict(), "opt": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    resumed, second = start()
    resumed.model.load_state_dict(saved["model"])
    second.load_state_dict(saved["opt"])
    assert second.damping.item() == first.damping.item() != 1e-4
    for _ in range(3):
        second.step(resumed.pair_closure)
    assert opt.damping.item() == second.damping.item()
    for a, b in zip(straight.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_foreign_state_is_refused() -> None:
    problem = make_problem("linear")
    with pytest.raises(StateMismatchError):
        SGN(problem.model, momentum=0.5).load_state_dict(SGN(problem.model).state_dict())


@pytest.mark.parametrize("form", ["list", "generator"])
def test_micro_batches_make_the_same_step(form: str) -> None:
    whole, split = make_problem("linear", "cross_entropy"), make_problem("linear", "cross_entropy")

    def parts() -> Iterator[Pair]:
        for rows in (slice(0, 2), slice(2, 5)):
            z = split.model(split.x[rows])
            yield len(z) / len(split.x) * split.loss(z, split.y[rows]), z

    a = SGN(whole.model, damping=0.1, cg_tol=1e-14, product="double_vjp")
    b = SGN(split.model, damping=0.1, cg_tol=1e-14, product="jvp")
    a.step(whole.pair_closure)
    b.step(parts if form == "generator" else lambda: list(parts()))
    torch.testing.assert_close(whole.flat(), split.flat(), rtol=0, atol=1e-10)
    assert a.damping.item() == b.damping.item()


def test_running_statistics_move_once_and_dropout_is_the_same_in_all_passes() -> None:
    problem, other = make_problem("batch_norm"), make_problem("batch_norm")
    masks: list[Tensor] = []

    class Recorder(nn.Dropout):
        def forward(self, input: Tensor) -> Tensor:
            masks.append(super().forward(torch.ones_like(input)).detach())
            return input * masks[-1]

    problem.model.append(Recorder(0.5))  # type: ignore[operator]  # a Sequential
    opt = SGN(problem.model, lr=100.0, product="jvp")
    opt.step(problem.pair_closure)
    assert len(masks) > 5
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    other.model(other.x)
    for a, b in zip(problem.model.buffers(), other.model.buffers(), strict=True):
        assert torch.equal(a, b)


def test_maximize_climbs() -> None:
    problem = linear_problem()
    before = problem.loss_closure().item()

    def negative() -> Pair:
        loss, z = problem.pair_closure()
        return -loss, z

    opt = SGN(problem.model, maximize=True, damping=0.0, cg_tol=1e-14, cg_first_iter=50)
    assert opt.step(negative).item() == pytest.approx(-before)
    exact = linear_problem()
    SGN(exact.model, damping=0.0, cg_tol=1e-14, cg_first_iter=50).step(exact.pair_closure)
    torch.testing.assert_close(problem.flat(), exact.flat(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_parameters(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
    x = torch.randn(64, 4, dtype=dtype)
    y = x[:, :1] * x[:, 1:2]

    def closure() -> Pair:
        z = model(x)
        return F.mse_loss(z, y), z

    opt = SGN(model, damping=1e-2)
    losses = [float(opt.step(closure)) for _ in range(10)]
    assert losses[-1] < 0.8 * losses[0]


def test_explain_names_the_product() -> None:
    problem = make_problem("batch_norm")
    opt = SGN(problem.model)
    opt.step(problem.pair_closure)
    text = str(opt.explain())
    assert "jvp" in text
    assert "ms" in text
    assert "Gauss-Newton" in text
    assert "1.running_mean" in text


# errors by name


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda loss, z: loss, ClosureError, r"\(loss, output\)"),
        (lambda loss, z: (loss, z.clone()), ClosureError, "function of the returned output"),
        (lambda loss, z: (loss.detach(), z), NoGraphError, "requires no gradient"),
        (lambda loss, z: (loss * float("inf"), z), NonFiniteError, "loss"),
    ],
)
def test_wrong_results_are_refused_and_nothing_changes(
    result: Callable[[Tensor, Tensor], object], error: type[Exception], message: str
) -> None:
    problem = make_problem("linear")
    opt = SGN(problem.model, momentum=0.5)
    opt.step(problem.pair_closure)
    before, state = problem.flat(), copy.deepcopy(opt.state_dict()["state"])
    with pytest.raises(error, match=message):
        opt.step(lambda: result(*problem.pair_closure()))
    assert torch.equal(problem.flat(), before)
    torch.testing.assert_close(opt.state_dict()["state"], state, rtol=0, atol=0)


def test_an_unsupported_op_is_named_and_nothing_changes() -> None:
    problem = make_problem("linear")
    before = problem.flat()

    def closure() -> Pair:
        z = F.hardsigmoid(problem.model(problem.x))
        return F.hardsigmoid(z).sum(), z

    with pytest.raises(UnsupportedOpError, match="hardsigmoid_backward"):
        SGN(problem.model).step(closure)
    assert torch.equal(problem.flat(), before)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"damping": -1.0},
        {"damping": float("nan")},
        {"cg_max_iter": 0},
        {"cg_first_iter": 0},
        {"cg_first_steps": -1},
        {"momentum": 1.0},
        {"stop": "x"},
        {"product": "x"},
        {"negative_curvature": "x"},
        {"preconditioner": "x"},
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        SGN(nn.Linear(2, 2), **options)
