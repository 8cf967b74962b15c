"""Products that torch.compile takes as one graph: equal to the dense matrices, traced once for all steps."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.support.products import join, make_problem
from triton_curv.operators import FrozenClosure, GaussNewtonOperator, HessianOperator, UnsupportedOpError, compiled
from triton_curv.optimizers.neumann_inner import NeumannInner
from triton_curv.optimizers.newton_cg import NewtonCG
from triton_curv.optimizers.sgn import SGN


@pytest.fixture(autouse=True)
def fresh_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No C++ compiler: the traced graphs run by aot_eager."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("model", ["conv", "batch_norm", "attention"])
def test_products_are_the_dense_ones_and_running_statistics_stay(model: str) -> None:
    problem = make_problem(model, "cross_entropy")
    v = [torch.randn_like(p) for p in problem.params]
    hessian = HessianOperator(FrozenClosure(problem.model, problem.loss_closure), problem.params, "compiled")
    gauss_newton = GaussNewtonOperator(FrozenClosure(problem.model, problem.pair_closure), problem.params, "compiled")
    before = [b.clone() for b in problem.model.buffers()]
    torch.testing.assert_close(join(hessian(v)), problem.hessian() @ join(v), rtol=0, atol=1e-12)
    torch.testing.assert_close(join(gauss_newton(v)), problem.gauss_newton() @ join(v), rtol=0, atol=1e-12)
    block = hessian.block(1)([v[1]])
    rows = slice(v[0].numel(), v[0].numel() + v[1].numel())
    torch.testing.assert_close(join(block), problem.hessian()[rows, rows] @ join([v[1]]), rtol=0, atol=1e-12)
    for buffer, saved in zip(problem.model.buffers(), before, strict=True):
        assert torch.equal(buffer, saved)


@pytest.mark.parametrize(
    ("build", "plain", "damping"), [(NewtonCG, "reverse", {"tau": 1.0}), (SGN, "double_vjp", {"damping": 1.0})]
)
def test_steps_equal_the_eager_ones_and_share_one_graph(build: Any, plain: str, damping: dict[str, float]) -> None:
    fast, slow = make_problem("linear", "cross_entropy"), make_problem("linear", "cross_entropy")
    optimizers = [build(fast.model, product="compiled", **damping), build(slow.model, product=plain, **damping)]
    for step in range(3):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for problem, opt in zip((fast, slow), optimizers, strict=True):

            def closure(problem: Any = problem, x: Tensor = x) -> Any:
                z = problem.model(x)
                loss = problem.loss(z, problem.y)
                return loss if build is NewtonCG else (loss, z)

            opt.step(closure)
        torch.testing.assert_close(fast.flat(), slow.flat(), rtol=0, atol=1e-10)
    assert counters["stats"]["unique_graphs"] == 1
    assert "compiled" in str(optimizers[0].explain())


@pytest.mark.parametrize(
    ("build", "given", "settings"),
    [
        (NewtonCG, "closure", {"product": "reverse"}),
        (NewtonCG, "model", {"product": "forward"}),
        (SGN, "model", {"product": "double_vjp"}),
        (NeumannInner, "closure", {}),
    ],
)
def test_closures_of_compiled_models_make_the_same_steps(build: Any, given: str, settings: dict[str, Any]) -> None:
    """What torch.compile made has no second derivatives: products run the code that it was made of."""
    results, rounding = [], 1e-9 if build is NeumannInner else 0.0
    for compiles in (False, True):
        problem = make_problem("batch_norm", "cross_entropy")
        model, loss = problem.model, problem.loss
        if compiles:
            model = torch.compile(problem.model, backend="aot_eager")  # type: ignore[assignment]  # a module still
            loss = torch.compile(problem.loss, backend="aot_eager")
        optimizer = build(model if given == "model" else problem.model, **settings)

        def closure(model: Any = model, loss: Any = loss, y: Tensor = problem.y, x: Tensor = problem.x) -> Any:
            z = model(x)
            return (loss(z, y), z) if build is SGN else loss(z, y)

        for _ in range(2):
            optimizer.step(closure)
        results.append([t.detach().clone() for t in (*problem.params, *problem.model.buffers())])
        if compiles:
            problem.model.zero_grad()
            loss(model(problem.x), problem.y).backward()  # compiled as ever afterwards
            assert counters["stats"]["unique_graphs"] >= 2
    for plain, compiled_one in zip(*results, strict=True):
        torch.testing.assert_close(compiled_one, plain, rtol=rounding, atol=rounding)


def test_fastest_counts_the_compiled_product_among_the_candidates() -> None:
    problem = make_problem("linear")
    opt = NewtonCG(problem.model, product="fastest")
    opt.step(problem.loss_closure)
    chosen = opt.explain().product
    assert chosen is not None
    assert set(chosen.seconds) == {"reverse", "forward", "compiled"}


def test_what_does_not_fit_into_a_graph_is_named() -> None:
    problem = make_problem("linear")
    problem.model.append(nn.Dropout(0.5))  # type: ignore[operator]  # a Sequential
    with pytest.raises(UnsupportedOpError, match="random numbers"):
        NewtonCG(problem.model, product="compiled").step(problem.loss_closure)
    other = make_problem("linear")
    with pytest.raises(UnsupportedOpError, match="micro-batches"):
        NewtonCG(other.model, product="compiled").step(lambda: [other.loss_closure()])
    opt = NewtonCG(problem.model, product="fastest")
    opt.step(problem.loss_closure)
    assert "not compiled: random numbers" in str(opt.explain())

    def breaks() -> Tensor:
        loss = other.loss_closure()
        return loss if float(loss) > 0 else -loss

    with pytest.raises(UnsupportedOpError, match="the closure as one graph"):
        NewtonCG(other.model, product="compiled").step(breaks)


@pytest.mark.parametrize(
    ("build", "few"),
    [
        (NewtonCG, {"product": "reverse", "cg_max_iter": 3}),
        (SGN, {"product": "jvp", "cg_max_iter": 3, "cg_first_iter": 3}),
    ],
)
def test_what_lies_between_products_compiles_once_for_all_steps(build: Any, few: dict[str, Any]) -> None:
    """With a scalar parameter, changing rates, a preconditioner and line search; four graphs, none broken.

    Few iterations: after ten, a change of the weights by 1e-14 is one of 1e-8.
    """
    results = []
    for compile in (False, {"backend": "aot_eager"}):
        torch.manual_seed(0)
        model = Scaled()
        optimizer = build(model, lr=0.5, preconditioner="diagonal", line_search=True, compile=compile, **few)
        for step in range(4):
            optimizer.param_groups[0]["lr"] = 0.5 / (1 + step)
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)

            def closure(model: nn.Module = model, x: Tensor = x) -> Any:
                z = model(x)
                loss = (z - x[:, :2].sin()).square().mean()
                return loss if build is NewtonCG else (loss, z)

            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                optimizer.step(closure)
        results.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]


class Scaled(nn.Module):
    """Two layers and a scale, a tensor without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.layers(x) * self.scale
        return z
