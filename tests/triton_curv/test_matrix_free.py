"""What NewtonCG and SGN promise alike: one battery for the contract of a torch optimizer with a closure."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, LambdaLR

from tests.support.products import Problem, make_problem
from triton_curv import KFAC
from triton_curv.errors import ConfigurationError, StateMismatchError
from triton_curv.operators import ClosureError, NoGraphError, NonFiniteError, UnsupportedOpError
from triton_curv.optimizers.matrix_free import MatrixFree
from triton_curv.optimizers.newton_cg import NewtonCG
from triton_curv.optimizers.sgn import SGN


class Kind(NamedTuple):
    """An optimizer, what its closure returns of (loss, output), and settings for some tests.

    `fixed` names the product, so that runs repeat bit for bit; `memory` keeps state from step to step; `exact` solves
    well-posed systems to rounding.
    """

    build: Callable[..., Any]
    returns: Callable[[Tensor, Tensor], Any]
    products: tuple[str, str]
    memory: dict[str, Any]
    exact: dict[str, Any]

    def closure(self, problem: Problem) -> Callable[[], Any]:
        """The whole batch of a problem."""
        return lambda: self.returns(*problem.pair_closure())


KINDS = {
    "newton_cg": Kind(
        NewtonCG,
        lambda loss, z: loss,
        ("reverse", "forward"),
        {"warm_start": 0.9, "tau": 0.5},
        {"tau": 1.0, "cg_tol": 1e-13, "cg_max_iter": 200, "feasibility": "paper"},
    ),
    "sgn": Kind(
        SGN,
        lambda loss, z: (loss, z),
        ("double_vjp", "jvp"),
        {"momentum": 0.5},
        {"damping": 1.0, "cg_tol": 1e-14, "cg_first_iter": 200, "trust_region": False, "line_search": False},
    ),
}

pytestmark = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


# gradients, parameters, groups


def test_gradients_of_the_user_stay(kind: Kind) -> None:
    problem = make_problem("linear")
    problem.loss_closure().backward()
    before = [p.grad for p in problem.params]
    copies = [g.clone() for g in before if g is not None]
    kind.build(problem.model, line_search=True).step(kind.closure(problem))
    for p, grad, saved in zip(problem.params, before, copies, strict=True):
        assert p.grad is grad
        assert torch.equal(p.grad, saved)  # type: ignore[arg-type]  # not None


def test_frozen_parameters_and_unused_ones_stay(kind: Kind) -> None:
    problem = make_problem("linear")
    first, _, last = problem.model.children()
    problem.model.extra = nn.Linear(2, 2).double()
    frozen = problem.model.get_parameter("0.weight").requires_grad_(False).clone()
    opt = kind.build(problem.model)
    extra = weights(problem.model.extra)

    def closure() -> Any:
        z = last(torch.tanh(first(problem.x)))
        return kind.returns(problem.loss(z, problem.y), z)

    opt.step(closure)
    assert torch.equal(problem.model.get_parameter("0.weight"), frozen)
    assert torch.equal(weights(problem.model.extra), extra)
    report = opt.explain()
    assert report.left_out == {"0.weight": "frozen"}
    assert "extra.weight" in report.trained


def test_groups_by_module_pattern(kind: Kind) -> None:
    problem = make_problem("linear")
    opt = kind.build(problem.model, lr=1.0, groups=[{"modules": "2", "lr": 0.0}])
    assert [(len(g["params"]), g["lr"]) for g in opt.param_groups] == [(2, 0.0), (2, 1.0)]
    before = [p.detach().clone() for p in problem.params]
    opt.step(kind.closure(problem))
    moved = [not torch.equal(p, b) for p, b in zip(problem.params, before, strict=True)]
    assert moved == [True, True, False, False]
    for wrong in ({"modules": "7"}, {"lr": 1.0}, {"modules": "2", "nesterov": True}):
        with pytest.raises(ConfigurationError):
            kind.build(problem.model, groups=[wrong])


def test_add_param_group(kind: Kind) -> None:
    problem = make_problem("linear")
    late = list(problem.model.get_submodule("2").parameters())
    for p in late:
        p.requires_grad_(False)
    opt = kind.build(problem.model, **kind.exact)
    for p in late:
        p.requires_grad_(True)
    before = [p.detach().clone() for p in late]
    opt.step(kind.closure(problem))
    assert all(torch.equal(p, b) for p, b in zip(late, before, strict=True))
    opt.add_param_group({"params": late, "lr": 0.5})
    twin, other = copy.deepcopy(problem), kind.build
    whole = other(twin.model, **kind.exact)
    start = problem.flat()
    opt.step(kind.closure(problem))
    whole.step(kind.closure(twin))
    share = torch.cat([torch.full((p.numel(),), 0.5 if p in set(late) else 1.0) for p in problem.params])
    torch.testing.assert_close(problem.flat() - start, share * (twin.flat() - start), rtol=0, atol=1e-9)
    with pytest.raises(ConfigurationError, match="of the model"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    opt.param_groups[1]["cg_tol"] = 1.0
    with pytest.raises(ConfigurationError, match="one cg_tol for all groups"):
        opt.step(kind.closure(problem))


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "cosine": lambda opt: CosineAnnealingLR(opt, T_max=4),
    "cyclic": lambda o: CyclicLR(o, 0.1, 0.5, step_size_up=2, mode="exp_range", gamma=0.5, cycle_momentum=False),
    "lambda": lambda opt: LambdaLR(opt, lambda t: 0.5**t),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_lr_schedules_scale_the_step(kind: Kind, tensor_lr: bool, schedule: str) -> None:
    problem = make_problem("linear", "cross_entropy")
    lr = torch.tensor(1.0, dtype=torch.float64) if tensor_lr else 1.0
    opt = kind.build(problem.model, lr, **kind.exact)
    scheduler = SCHEDULES[schedule](opt)
    for _ in range(3):
        w, rate = problem.flat(), float(opt.param_groups[0]["lr"])
        twin = copy.deepcopy(problem)
        kind.build(twin.model, 1.0, **kind.exact).step(kind.closure(twin))
        opt.step(kind.closure(problem))
        scheduler.step()
        torch.testing.assert_close(problem.flat(), w + rate * (twin.flat() - w), rtol=0, atol=1e-9)
    assert float(opt.param_groups[0]["lr"]) != rate


# state


@pytest.mark.parametrize("remembers", [False, True])
def test_resumes_bit_for_bit(kind: Kind, remembers: bool) -> None:
    def start() -> tuple[Problem, MatrixFree]:
        problem = make_problem("batch_norm", "cross_entropy")
        options = {"line_search": True, "preconditioner": "diagonal", **kind.memory} if remembers else {}
        return problem, kind.build(problem.model, lr=0.3, product=kind.products[0], **options)

    (straight, opt), (stopped, first) = start(), start()
    for _ in range(5):
        opt.step(kind.closure(straight))
    for _ in range(3):
        first.step(kind.closure(stopped))
    file = io.BytesIO()
    torch.save({"model": stopped.model.state_dict(), "opt": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    resumed, second = start()
    resumed.model.load_state_dict(saved["model"])
    second.load_state_dict(saved["opt"])
    for _ in range(2):
        second.step(kind.closure(resumed))
    for a, b in zip(straight.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for p, q in zip(straight.params, resumed.params, strict=True):
        for name, value in opt.state.get(p, {}).items():
            assert torch.equal(value, second.state[q][name])


def test_the_chosen_product_is_part_of_the_state(kind: Kind) -> None:
    problem = make_problem("batch_norm")
    opt = kind.build(problem.model)
    assert "chosen at the first step" in str(opt.explain())
    opt.step(kind.closure(problem))
    chosen = opt.explain().product
    assert chosen is not None
    assert chosen.name in kind.products
    assert chosen.seconds
    text = str(opt.explain())
    assert f"product: {chosen.name} (" in text
    assert "1.running_mean" in text
    other = kind.build(make_problem("batch_norm").model)
    other.load_state_dict(opt.state_dict())
    assert other.explain().product.name == chosen.name
    assert other.param_groups[0]["step"] == 1


def test_a_foreign_state_is_refused(kind: Kind) -> None:
    problem = make_problem("linear")
    other = kind.build(make_problem("linear").model, **kind.memory)
    with pytest.raises(StateMismatchError):
        other.load_state_dict(kind.build(problem.model).state_dict())


# passes through the model


@pytest.mark.parametrize("form", ["list", "generator"])
def test_micro_batches_make_the_same_step(kind: Kind, form: str) -> None:
    whole, split = make_problem("linear", "cross_entropy"), make_problem("linear", "cross_entropy")

    def parts() -> Iterator[Any]:
        for rows in (slice(0, 2), slice(2, 5)):
            z = split.model(split.x[rows])
            yield kind.returns(len(z) / len(split.x) * split.loss(z, split.y[rows]), z)

    options = {**kind.exact, "lr": 4.0, "line_search": True}
    a = kind.build(whole.model, **options, product=kind.products[0]).step(kind.closure(whole))
    second = kind.build(split.model, **options, product=kind.products[1])
    b = second.step(parts if form == "generator" else lambda: list(parts()))
    torch.testing.assert_close(a, b, rtol=1e-14, atol=0)
    torch.testing.assert_close(whole.flat(), split.flat(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("product", [0, 1])
def test_running_statistics_move_once_and_dropout_is_the_same_in_all_passes(kind: Kind, product: int) -> None:
    problem, other = make_problem("batch_norm"), make_problem("batch_norm")
    masks: list[Tensor] = []

    class Recorder(nn.Dropout):
        def forward(self, input: Tensor) -> Tensor:
            masks.append(super().forward(torch.ones_like(input)).detach())
            return input * masks[-1]

    problem.model.append(Recorder(0.5))  # type: ignore[operator]  # a Sequential
    opt = kind.build(problem.model, lr=100.0, line_search=True, product=kind.products[product])
    torch.manual_seed(1)
    opt.step(kind.closure(problem))
    after = torch.rand(2)
    assert len(masks) > 5
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    torch.manual_seed(1)
    problem.model(problem.x)
    assert torch.equal(torch.rand(2), after)  # as if there had been one pass
    fresh = make_problem("batch_norm")
    kind.build(fresh.model, lr=100.0, line_search=True, product=kind.products[product]).step(kind.closure(fresh))
    other.model(other.x)
    for a, b in zip(fresh.model.buffers(), other.model.buffers(), strict=True):
        assert torch.equal(a, b)


def test_maximize_climbs_as_minimising_the_negative_descends(kind: Kind) -> None:
    up, down = make_problem("linear"), make_problem("linear")

    def negative() -> Any:
        loss, z = up.pair_closure()
        return kind.returns(-loss, z)

    a = kind.build(up.model, maximize=True, **kind.exact).step(negative)
    b = kind.build(down.model, **kind.exact).step(kind.closure(down))
    assert a.item() == pytest.approx(-b.item())
    torch.testing.assert_close(up.flat(), down.flat(), rtol=0, atol=1e-12)


def test_line_search_halves_until_the_loss_falls(kind: Kind) -> None:
    """From the linear net's least-squares step: 6 and 3 times the way to the minimum climb, 1.5 times falls."""

    def start() -> Problem:
        torch.manual_seed(0)
        model = nn.Linear(4, 2).double()
        return Problem(model, torch.randn(30, 4).double(), torch.randn(30, 2).double(), F.mse_loss)

    damping = {"tau": 0.0, "feasibility": "code"} if kind.build is NewtonCG else {"damping": 0.0}
    exact, far, without = start(), start(), start()
    w = exact.flat()
    options = {**kind.exact, **damping}
    kind.build(exact.model, **options).step(kind.closure(exact))
    kind.build(far.model, **{**options, "lr": 6.0, "line_search": True}).step(kind.closure(far))
    kind.build(without.model, **{**options, "lr": 6.0, "line_search": False}).step(kind.closure(without))
    torch.testing.assert_close(far.flat(), w + 1.5 * (exact.flat() - w), rtol=0, atol=1e-11)
    torch.testing.assert_close(without.flat(), w + 6 * (exact.flat() - w), rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_parameters(kind: Kind, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
    x = torch.randn(64, 4, dtype=dtype)
    y = x[:, :1] * x[:, 1:2]

    def closure() -> Any:
        z = model(x)
        return kind.returns(F.mse_loss(z, y), z)

    opt = kind.build(model, line_search=True, **({"tau": 0.1} if kind.build is NewtonCG else {"damping": 1e-2}))
    losses = [float(opt.step(closure)) for _ in range(10)]
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.dtype == dtype for p in model.parameters())


def test_kfac_preconditioner_saves_iterations(kind: Kind) -> None:
    torch.manual_seed(0)
    scales = torch.tensor([1.0, 5.0, 30.0, 100.0], dtype=torch.float64)
    model = nn.Linear(4, 2).double()
    problem = Problem(model, torch.randn(60, 4).double() * scales, torch.randn(60, 2).double(), F.mse_loss)
    plain = copy.deepcopy(problem)
    small = {"tau": 1e-8} if kind.build is NewtonCG else {"damping": 1e-8, "cg_first_iter": 100}
    options = {"stop": "relative", "cg_tol": 1e-6, "cg_max_iter": 100, **small}
    opt = kind.build(problem.model, preconditioner=KFAC(problem.model, damping=1e-8), **options)
    other = kind.build(plain.model, **options)
    opt.step(kind.closure(problem))
    other.step(kind.closure(plain))
    assert opt.solves[0].iterations < other.solves[0].iterations
    torch.testing.assert_close(problem.flat(), plain.flat(), rtol=0, atol=1e-3)
    assert "K-FAC, except nothing" in str(opt.explain())


def test_history_on_request(kind: Kind) -> None:
    problem = make_problem("linear", "cross_entropy")
    opt = kind.build(
        problem.model, keep_history=True, cg_max_iter=9, **({} if kind.build is NewtonCG else {"cg_first_iter": 9})
    )
    opt.step(kind.closure(problem))
    history = opt.solves[0].history
    assert history is not None
    assert history.shape == (10,)
    assert history[: int(opt.solves[0].iterations) + 1].isfinite().all()


# errors by name


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda loss, z, kind: None, ClosureError, "None"),
        (lambda loss, z, kind: loss.item(), ClosureError, "tensor|float"),
        (lambda loss, z, kind: (loss, loss, loss), ClosureError, "tensor"),
        (lambda loss, z, kind: kind.returns(loss.expand(2), z), ClosureError, r"\(2,\)"),
        (lambda loss, z, kind: kind.returns(loss.detach(), z), NoGraphError, "requires no gradient"),
        (lambda loss, z, kind: kind.returns(loss * float("nan"), z), NonFiniteError, "loss"),
        (lambda loss, z, kind: kind.returns(loss * 1e308 * 1e308, z), NonFiniteError, "loss"),
    ],
)
def test_wrong_results_are_refused_and_nothing_changes(
    kind: Kind, result: Callable[[Tensor, Tensor, Kind], object], error: type[Exception], message: str
) -> None:
    problem = make_problem("linear")
    opt = kind.build(problem.model, **kind.memory)
    opt.step(kind.closure(problem))
    before, state = problem.flat(), copy.deepcopy(opt.state_dict())
    with pytest.raises(error, match=message):
        opt.step(lambda: result(*problem.pair_closure(), kind))
    assert torch.equal(problem.flat(), before)
    torch.testing.assert_close(opt.state_dict()["state"], state["state"], rtol=0, atol=0)
    assert opt.param_groups[0]["step"] == 1


def test_no_closure_is_refused(kind: Kind) -> None:
    opt: Any = kind.build(make_problem("linear").model)
    with pytest.raises(ClosureError, match="needs a closure"):
        opt.step(None)


def test_backward_inside_is_refused(kind: Kind) -> None:
    problem = make_problem("linear")

    def closure() -> Any:
        loss, z = problem.pair_closure()
        loss.backward()
        return kind.returns(loss, z)

    with pytest.raises(ClosureError, match=r"backward\(\)"):
        kind.build(problem.model).step(closure)


def test_an_unsupported_op_is_named_and_nothing_changes(kind: Kind) -> None:
    problem = make_problem("linear")
    before = problem.flat()

    def closure() -> Any:
        z = F.hardsigmoid(problem.model(problem.x))
        return kind.returns(F.hardsigmoid(z).sum(), z)

    with pytest.raises(UnsupportedOpError, match="hardsigmoid_backward"):
        kind.build(problem.model).step(closure)
    assert torch.equal(problem.flat(), before)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"cg_tol": -1.0},
        {"cg_max_iter": 0},
        {"stop": "martens"},
        {"product": "linearize"},
        {"negative_curvature": "follow"},
        {"preconditioner": "ssor"},
    ],
)
def test_arguments_out_of_range_are_refused(kind: Kind, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        kind.build(nn.Linear(2, 2), **options)


def test_a_model_without_trainable_parameters_is_refused(kind: Kind) -> None:
    with pytest.raises(ConfigurationError, match="trainable"):
        kind.build(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize("ending", [KeyboardInterrupt, ValueError])
def test_a_closure_that_ends_a_trial_leaves_the_weights_before_the_step(
    kind: Kind, ending: type[BaseException]
) -> None:
    problem = make_problem("linear")
    opt = kind.build(problem.model, line_search=True, product=kind.products[0])
    before = problem.flat()

    def closure() -> Any:
        if not torch.equal(problem.flat(), before):
            raise ending
        return kind.returns(*problem.pair_closure())

    with pytest.raises(ending):
        opt.step(closure)
    assert torch.equal(problem.flat(), before)
