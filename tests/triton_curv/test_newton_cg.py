"""NewtonCG against dense Newton steps, its paper and its contract as a torch optimizer."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR

from tests.support.products import Problem, join, make_problem
from triton_curv import KFAC
from triton_curv.errors import ConfigurationError, StateMismatchError
from triton_curv.operators import ClosureError, NoGraphError, NonFiniteError, UnsupportedOpError
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


def test_line_search_halves_until_the_loss_falls() -> None:
    model = Quadratic([1.0] * 4)
    w, w_star = weights(model), model.b.clone()
    opt = NewtonCG(model, lr=6.0, tau=0.0, cg_tol=1e-12, line_search=True)
    opt.step(model)  # 6 and 3 times the way to the minimum climb, 1.5 times falls
    torch.testing.assert_close(weights(model), w + 1.5 * (w_star - w), rtol=0, atol=1e-12)


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


# the contract of a torch optimizer


def test_gradients_of_the_user_stay() -> None:
    problem = make_problem("linear")
    problem.loss_closure().backward()
    before = [p.grad for p in problem.params]
    copies = [g.clone() for g in before if g is not None]
    NewtonCG(problem.model, line_search=True).step(problem.loss_closure)
    for p, grad, saved in zip(problem.params, before, copies, strict=True):
        assert p.grad is grad
        assert torch.equal(p.grad, saved)  # type: ignore[arg-type]  # not None


def test_frozen_parameters_and_unused_ones_stay() -> None:
    problem = make_problem("linear")
    problem.model.extra = nn.Linear(2, 2).double()
    first = problem.model.get_parameter("0.weight").requires_grad_(False).clone()
    opt = NewtonCG(problem.model, lr=0.1)
    extra = weights(problem.model.extra)
    hook = problem.model.extra.register_forward_hook(lambda *_: pytest.fail("not part of the loss"))
    opt.step(
        lambda: problem.loss(
            problem.model.get_submodule("2")(torch.tanh(problem.model.get_submodule("0")(problem.x))), problem.y
        )
    )
    hook.remove()
    assert torch.equal(problem.model.get_parameter("0.weight"), first)
    assert torch.equal(weights(problem.model.extra), extra)
    report = opt.explain()
    assert report.left_out == {"0.weight": "frozen"}
    assert "extra.weight" in report.trained


def test_param_groups_lr_and_add_param_group() -> None:
    model = Quadratic([1.0] * 4)
    w, b = weights(model), model.b
    model.second.requires_grad_(False)
    opt = NewtonCG(model, lr=0.5, tau=0.0, cg_tol=1e-12)
    model.second.requires_grad_(True)
    opt.step(model)
    assert torch.equal(weights(model)[2:], w[2:])
    opt.add_param_group({"params": [model.second], "lr": 1.0})
    opt.step(model)
    torch.testing.assert_close(weights(model)[2:], b[2:], rtol=0, atol=1e-12)
    torch.testing.assert_close(weights(model)[:2], b[:2] + (w - b)[:2] / 4, rtol=0, atol=1e-12)
    with pytest.raises(ConfigurationError, match="of the model"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    opt.param_groups[1]["tau"] = 1.0
    with pytest.raises(ConfigurationError, match="one tau for all groups"):
        opt.step(model)


def test_groups_by_module_pattern() -> None:
    problem = make_problem("linear")
    opt = NewtonCG(problem.model, lr=1.0, groups=[{"modules": "2", "lr": 0.0}])
    assert [(len(g["params"]), g["lr"]) for g in opt.param_groups] == [(2, 0.0), (2, 1.0)]
    before = [p.detach().clone() for p in problem.params]
    opt.step(problem.loss_closure)
    moved = [not torch.equal(p, b) for p, b in zip(problem.params, before, strict=True)]
    assert moved == [True, True, False, False]
    for wrong in ({"modules": "7"}, {"lr": 1.0}, {"modules": "2", "momentum": 0.1}):
        with pytest.raises(ConfigurationError):
            NewtonCG(problem.model, groups=[wrong])


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_lr_schedules_work(tensor_lr: bool) -> None:
    lr = torch.tensor(1.0, dtype=torch.float64) if tensor_lr else 1.0
    makers: list[Callable[[Any], Any]] = [
        lambda opt: CosineAnnealingLR(opt, T_max=4),
        lambda opt: CyclicLR(opt, 0.1, 0.5, step_size_up=2, mode="exp_range", gamma=0.5, cycle_momentum=False),
    ]
    for make in makers:
        model = Quadratic([1.0] * 4)
        opt = NewtonCG(model, lr=lr.clone() if isinstance(lr, Tensor) else lr, tau=0.0, cg_tol=1e-12)
        schedule = make(opt)
        for _ in range(3):
            w, rate = weights(model), float(opt.param_groups[0]["lr"])
            opt.step(model)
            schedule.step()
            torch.testing.assert_close(weights(model), w + rate * (model.b - w), rtol=0, atol=1e-12)
        assert float(opt.param_groups[0]["lr"]) != rate


@pytest.mark.parametrize("options", [{}, {"warm_start": 0.9, "line_search": True}, {"hessian": "per_tensor"}])
def test_resumes_bit_for_bit(options: dict[str, Any]) -> None:
    def start() -> tuple[Problem, NewtonCG]:
        problem = make_problem("batch_norm", "cross_entropy")
        return problem, NewtonCG(problem.model, lr=0.3, tau=0.5, product="reverse", **options)

    (straight, opt), (stopped, first) = start(), start()
    for _ in range(5):
        opt.step(straight.loss_closure)
    for _ in range(3):
        first.step(stopped.loss_closure)
    file = io.BytesIO()
    torch.save({"model": stopped.model.state_dict(), "opt": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    resumed, second = start()
    resumed.model.load_state_dict(saved["model"])
    second.load_state_dict(saved["opt"])
    for _ in range(2):
        second.step(resumed.loss_closure)
    for a, b in zip(straight.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_chosen_product_is_part_of_the_state() -> None:
    problem = make_problem("linear")
    opt = NewtonCG(problem.model)
    assert "chosen at the first step" in str(opt.explain())
    opt.step(problem.loss_closure)
    chosen = opt.explain().product
    assert chosen is not None
    assert chosen.seconds
    other = NewtonCG(make_problem("linear").model)
    other.load_state_dict(opt.state_dict())
    assert other.explain().product.name == chosen.name  # type: ignore[union-attr]  # a step was made
    assert other.param_groups[0]["step"] == 1


def test_a_foreign_state_is_refused() -> None:
    problem = make_problem("linear")
    other = NewtonCG(make_problem("linear").model, warm_start=0.5)
    with pytest.raises(StateMismatchError):
        other.load_state_dict(NewtonCG(problem.model).state_dict())


@pytest.mark.parametrize("form", ["list", "generator"])
def test_micro_batches_make_the_same_step(form: str) -> None:
    whole, split = make_problem("linear", "cross_entropy"), make_problem("linear", "cross_entropy")

    def parts() -> Iterator[Tensor]:
        for rows in (slice(0, 2), slice(2, 5)):
            z = split.model(split.x[rows])
            yield len(z) / len(split.x) * split.loss(z, split.y[rows])

    options: dict[str, Any] = {"tau": 1.0, "lr": 4.0, "line_search": True, "product": "reverse"}
    a = NewtonCG(whole.model, **options).step(whole.loss_closure)
    b = NewtonCG(split.model, **options).step(parts if form == "generator" else lambda: list(parts()))
    torch.testing.assert_close(a, b, rtol=1e-14, atol=0)
    torch.testing.assert_close(whole.flat(), split.flat(), rtol=0, atol=1e-13)


def test_running_statistics_move_once_and_randomness_as_for_one_pass() -> None:
    problem, other = make_problem("batch_norm"), make_problem("batch_norm")
    problem.model.append(nn.Dropout(0.5))  # type: ignore[operator]  # a Sequential
    other.model(other.x)
    torch.manual_seed(1)
    NewtonCG(problem.model, lr=10.0, line_search=True).step(problem.loss_closure)
    after = torch.rand(2)
    torch.manual_seed(1)
    problem.model(problem.x)
    assert torch.equal(torch.rand(2), after)
    assert int(problem.model.get_buffer("1.num_batches_tracked")) == 2
    fresh = make_problem("batch_norm")
    NewtonCG(fresh.model, lr=10.0, line_search=True).step(fresh.loss_closure)
    for a, b in zip(fresh.model.buffers(), other.model.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_parameters(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
    x = torch.randn(64, 4, dtype=dtype)
    y = x[:, :1] * x[:, 1:2]
    opt = NewtonCG(model, lr=1.0, tau=0.1, line_search=True)
    losses = [float(opt.step(lambda: F.mse_loss(model(x), y))) for _ in range(10)]
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.dtype == dtype for p in model.parameters())


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


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda loss: None, ClosureError, "None"),
        (lambda loss: loss.item(), ClosureError, "scalar tensor"),
        (lambda loss: (loss, loss), ClosureError, "tensor"),
        (lambda loss: loss.expand(2), ClosureError, r"\(2,\)"),
        (lambda loss: loss.detach(), NoGraphError, "requires no gradient"),
        (lambda loss: loss * float("nan"), NonFiniteError, "loss"),
        (lambda loss: loss * 1e308 * 1e308, NonFiniteError, "loss"),
    ],
)
def test_wrong_losses_are_refused_and_nothing_changes(
    result: Callable[[Tensor], object], error: type[Exception], message: str
) -> None:
    problem = make_problem("linear")
    opt = NewtonCG(problem.model, warm_start=0.9)
    opt.step(problem.loss_closure)
    before, state = problem.flat(), copy.deepcopy(opt.state_dict())
    with pytest.raises(error, match=message):
        opt.step(lambda: result(problem.loss_closure()))
    assert torch.equal(problem.flat(), before)
    torch.testing.assert_close(opt.state_dict()["state"], state["state"], rtol=0, atol=0)
    assert opt.param_groups[0]["step"] == 1


def test_a_finite_loss_with_an_infinite_gradient_is_refused() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    with pytest.raises(NonFiniteError, match="gradient"):
        NewtonCG(model).step(lambda: model.weight.sqrt().sum())


def test_no_closure_is_refused() -> None:
    with pytest.raises(ClosureError, match="needs a closure"):
        NewtonCG(make_problem("linear").model).step(None)  # type: ignore[arg-type]  # the mistake tested


def test_backward_inside_is_refused() -> None:
    problem = make_problem("linear")

    def closure() -> Tensor:
        loss = problem.loss_closure()
        loss.backward()
        return loss

    with pytest.raises(ClosureError, match=r"backward\(\)"):
        NewtonCG(problem.model).step(closure)


def test_an_unsupported_op_is_named_and_nothing_changes() -> None:
    problem = make_problem("linear")
    before = problem.flat()
    with pytest.raises(UnsupportedOpError, match="hardsigmoid_backward"):
        NewtonCG(problem.model).step(lambda: F.hardsigmoid(problem.model(problem.x)).sum())
    assert torch.equal(problem.flat(), before)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"tau": -1.0},
        {"cg_tol": -1.0},
        {"cg_max_iter": 0},
        {"stop": "martens"},
        {"hessian": "diagonal"},
        {"product": "linearize"},
        {"feasibility": "yes"},
        {"negative_curvature": "follow"},
        {"preconditioner": "ssor"},
        {"warm_start": 2.0},
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        NewtonCG(nn.Linear(2, 2), **options)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="trainable"):
        NewtonCG(nn.Linear(2, 2).requires_grad_(False))
