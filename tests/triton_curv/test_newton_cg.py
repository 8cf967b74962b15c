"""NewtonCG against dense Newton steps and its paper; what it shares with SGN is in test_matrix_free."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation

from tests.support.products import Problem, join, make_problem
from triton_curv import KFAC
from triton_curv.errors import ConfigurationError
from triton_curv.operators import NonFiniteError
from triton_curv.optimizers.newton_cg import NewtonCG


class Quadratic(nn.Module):
    """w.A w/2 - b.w in float64, w in two tensors; A has the given eigenvalues."""

    def __init__(self, eigenvalues: list[float]) -> None:
        super().__init__()
        n = len(eigenvalues)
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
        self.A: Tensor = basis * torch.tensor(eigenvalues, dtype=torch.float64) @ basis.T
        self.b = torch.randn(n, generator=generator, dtype=torch.float64)
        self.first = nn.Parameter(torch.randn(2, generator=generator, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(n - 2, generator=generator, dtype=torch.float64))

    def forward(self) -> Tensor:
        w = self.w()
        return w @ self.A @ w / 2 - self.b @ w

    def w(self) -> Tensor:
        return torch.cat([self.first, self.second])


POSITIVE = [1.0, 2, 3, 5, 8, 13]


def weights(model: nn.Module) -> Tensor:
    return join([p.detach() for p in model.parameters()]).clone()


def test_a_quadratic_is_solved_in_one_step_of_at_most_n_iterations() -> None:
    model = Quadratic(POSITIVE)
    opt = NewtonCG(model, lr=1.0, tau=0.0, cg_tol=1e-12, cg_max_iter=6)
    expected = torch.linalg.solve(model.A, model.b)
    before = model().item()
    assert opt.step(model).item() == before
    torch.testing.assert_close(model.w().detach(), expected, rtol=0, atol=1e-12)
    assert opt.solves[0].iterations <= 6
    assert not opt.solves[0].fell_back


def test_a_step_is_the_regularised_newton_step() -> None:
    problem = make_problem("linear", "cross_entropy")
    H, w = problem.hessian(), problem.flat()
    g = join(torch.autograd.grad(problem.loss_closure(), problem.params))
    tau = 1 - 2 * float(torch.linalg.eigvalsh(H).min())  # makes it positive definite
    opt = NewtonCG(problem.model, lr=0.3, tau=tau, cg_tol=1e-13, cg_max_iter=100)
    # ... but a threshold as large as tau would refuse most directions: see test_feasibility
    d = torch.linalg.solve(H + tau * torch.eye(len(w), dtype=w.dtype), -g)
    taken = d if g @ d < -tau else -g
    opt.step(problem.loss_closure)
    torch.testing.assert_close(problem.flat(), w + 0.3 * taken, rtol=0, atol=1e-12)


@pytest.mark.parametrize("product", ["reverse", "forward", "auto"])
def test_newton_direction_on_a_real_loss(product: Any) -> None:
    problem = make_problem("linear", "mse")
    with torch.no_grad():
        problem.y.copy_(problem.model(problem.x) + 0.01 * problem.y)  # near a minimum H has no negative curvature
    H, w = problem.hessian(), problem.flat()
    tau = 1e-6 - min(0.0, 2 * float(torch.linalg.eigvalsh(H).min()))
    g = join(torch.autograd.grad(problem.loss_closure(), problem.params))
    d = torch.linalg.solve(H + tau * torch.eye(len(w), dtype=w.dtype), -g)
    opt = NewtonCG(problem.model, tau=tau, cg_tol=1e-16, cg_max_iter=500, product=product, feasibility="paper")
    opt.step(problem.loss_closure)
    torch.testing.assert_close(problem.flat(), w + d, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("feasibility", "tau", "fell_back"),
    # g.d is about -0.5 |g|^2 / 1: see below
    [("code", 0.1, False), ("code", 5.0, True), ("paper", 0.1, False), ("paper", 5.0, False)],
)
def test_feasibility(feasibility: Any, tau: float, fell_back: bool) -> None:
    """H = I, g = (2, 0, ...): d = -g/(1 + tau), g.d = -4/(1 + tau) is -3.6 or -0.67."""
    model = Quadratic([1.0] * 4)
    with torch.no_grad():
        model.b.zero_()
        model.first.copy_(torch.tensor([2.0, 0.0]))
        model.second.zero_()
    opt = NewtonCG(model, tau=tau, cg_tol=1e-12, feasibility=feasibility)
    opt.step(model)
    assert bool(opt.solves[0].fell_back) == fell_back
    step = -2.0 if fell_back else -2.0 / (1 + tau)
    assert model.first[0].item() == pytest.approx(2.0 + step, abs=1e-12)


@pytest.mark.parametrize(("feasibility", "fell_back"), [("code", True), ("paper", False)])
def test_mild_ascent_passes_only_as_the_paper_prints_it(feasibility: Any, fell_back: bool) -> None:
    """Curvature -1, ignored: d = g, g.d = |g|^2 = 0.04 > -tau, and < tau = 0.1."""
    model = Quadratic([-1.0] * 4)
    with torch.no_grad():
        model.b.zero_()
        model.first.copy_(torch.tensor([0.2, 0.0], dtype=torch.float64))
        model.second.zero_()
    opt = NewtonCG(model, tau=0.1, cg_tol=1e-12, feasibility=feasibility, negative_curvature="ignore")
    opt.step(model)
    assert bool(opt.solves[0].fell_back) == fell_back
    # g = -0.2: downhill is outwards
    assert model.first[0].item() == pytest.approx(0.2 + (0.2 if fell_back else -0.2 / 0.9), abs=1e-12)


def test_negative_curvature_at_once_takes_the_gradient() -> None:
    model = Quadratic([-3.0] * 4)
    w, g = weights(model), torch.autograd.grad(model(), list(model.parameters()))
    opt = NewtonCG(model, lr=0.1)
    opt.step(model)
    torch.testing.assert_close(weights(model), w - 0.1 * join(g), rtol=0, atol=1e-14)
    assert opt.solves[0].fell_back


def test_per_tensor_solves_with_diagonal_blocks() -> None:
    model = Quadratic(POSITIVE)
    w = weights(model)
    g = model.A @ w - model.b
    opt = NewtonCG(model, tau=0.01, cg_tol=1e-13, hessian="per_tensor")
    expected = w.clone()
    for block in (slice(0, 2), slice(2, None)):
        size = len(w[block])
        expected[block] -= torch.linalg.solve(model.A[block, block] + 0.01 * torch.eye(size).double(), g[block])
    opt.step(model)
    torch.testing.assert_close(weights(model), expected, rtol=0, atol=1e-11)
    assert len(opt.solves) == 2
    full = Quadratic(POSITIVE)
    NewtonCG(full, tau=0.01, cg_tol=1e-13).step(full)
    assert (weights(full) - expected).abs().max() > 0.1


def test_line_search_never_moves_to_a_loss_that_is_not_finite() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 1.0)
    opt = NewtonCG(model, lr=1e6, line_search=True)
    # finite only in the neighbourhood of the start, closer than ten halvings come
    opt.step(lambda: torch.log(1e-3 - (model.weight - 1).square()).sum() + model.weight.sum())
    assert model.weight.item() == 1.0


def test_maximize_climbs() -> None:
    model = Quadratic([-v for v in POSITIVE])
    opt = NewtonCG(model, tau=0.0, cg_tol=1e-12, maximize=True)
    before = model().item()
    assert opt.step(model).item() == pytest.approx(before)
    torch.testing.assert_close(weights(model), torch.linalg.solve(model.A, model.b), rtol=0, atol=1e-11)


def test_warm_start_begins_from_the_last_direction() -> None:
    counts = {}
    for warm_start in (0.0, 1.0):
        problem = make_problem("linear")
        opt = NewtonCG(
            problem.model, lr=1e-3, tau=5.0, cg_tol=1e-8, cg_max_iter=100, feasibility="paper", warm_start=warm_start
        )
        for _ in range(3):
            opt.step(problem.loss_closure)
        counts[warm_start] = int(opt.solves[0].iterations)
    assert counts[1.0] < counts[0.0], counts
    assert not NewtonCG(make_problem("linear").model).state_dict()["state"]


# preconditioners


def test_diagonal_preconditioner_changes_the_way_not_the_end() -> None:
    steps = []
    for preconditioner in ("identity", "diagonal"):
        model = Quadratic(POSITIVE)
        opt = NewtonCG(model, tau=0.1, cg_tol=1e-12, cg_max_iter=50, preconditioner=preconditioner)
        opt.step(model)
        steps.append(weights(model))
    torch.testing.assert_close(steps[0], steps[1], rtol=0, atol=1e-10)


def test_kfac_preconditioner_solves_in_fewer_iterations_and_counts_statistics_once() -> None:
    torch.manual_seed(0)
    scales = torch.logspace(0, 2, 6, dtype=torch.float64)
    x = torch.randn(200, 6).double() * scales
    model = nn.Linear(6, 2).double()
    y = x / scales @ torch.randn(6, 2).double() + 0.5 * torch.randn(200, 2).double()
    problem = Problem(model, x, y, F.mse_loss)
    twin = copy.deepcopy(model)
    kfac = KFAC(model, damping=1e-9)
    opt = NewtonCG(model, tau=1e-9, cg_max_iter=100, stop="relative", cg_tol=1e-8, preconditioner=kfac)
    plain = NewtonCG(twin, tau=1e-9, cg_max_iter=100, stop="relative", cg_tol=1e-8)
    opt.step(problem.loss_closure)
    plain.step(lambda: F.mse_loss(twin(x), y))
    assert opt.solves[0].iterations < 0.7 * plain.solves[0].iterations
    torch.testing.assert_close(weights(model), weights(twin), rtol=0, atol=1e-5)
    A = torch.cat([x, torch.ones(200, 1).double()], 1)
    torch.testing.assert_close(kfac.blocks[""].factors()["A"], A.T @ A / 200)
    for _ in range(3):
        opt.step(problem.loss_closure)
    torch.testing.assert_close(kfac.blocks[""].factors()["A"], A.T @ A / 200)
    assert "K-FAC, except nothing" in str(opt.explain())


def test_kfac_and_per_tensor_do_not_go_together() -> None:
    problem = make_problem("linear")
    with pytest.raises(ConfigurationError, match="K-FAC"):
        NewtonCG(problem.model, preconditioner=KFAC(problem.model), hessian="per_tensor")


def test_history_on_request() -> None:
    model = Quadratic(POSITIVE)
    opt = NewtonCG(model, keep_history=True, cg_max_iter=9, cg_tol=1e-10, tau=0.0)
    g = model.A @ weights(model) - model.b
    opt.step(model)
    history = opt.solves[0].history
    assert history is not None
    assert history.shape == (10,)
    assert history[0].item() == pytest.approx(g.norm().item())
    assert history[int(opt.solves[0].iterations)] <= 1e-10


# errors by name


def test_a_finite_loss_with_an_infinite_gradient_is_refused() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    with pytest.raises(NonFiniteError, match="gradient"):
        NewtonCG(model).step(lambda: model.weight.sqrt().sum())


@pytest.mark.parametrize(
    "options",
    [
        {"tau": -1.0},
        {"hessian": "diagonal"},
        {"feasibility": "yes"},
        {"warm_start": 2.0},
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        NewtonCG(nn.Linear(2, 2), **options)
