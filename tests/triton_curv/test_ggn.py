"""Gauss-Newton products against dense J^T H_L J by jacrev, and against the Hessian where the two are equal."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.support.products import LOSSES, MODELS, Problem, dense_of, join, make_problem
from triton_curv.operators import (
    ClosureError,
    FrozenClosure,
    GaussNewtonOperator,
    NoGraphError,
    UnsupportedOpError,
    ggn_vp,
)
from triton_curv.operators.ggn import GaussNewtonMethod

METHODS: list[GaussNewtonMethod] = ["jvp", "double_vjp"]


def operator_of(
    problem: Problem, method: GaussNewtonMethod, closure: Callable[[], object] | None = None
) -> GaussNewtonOperator:
    return GaussNewtonOperator(FrozenClosure(problem.model, closure or problem.pair_closure), problem.params, method)


def dense_ggn(problem: Problem, method: GaussNewtonMethod, closure: Callable[[], object] | None = None) -> Tensor:
    return dense_of(operator_of(problem, method, closure), problem.params)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
def test_products_make_the_dense_matrix(model: str, loss: str, method: GaussNewtonMethod) -> None:
    problem = make_problem(model, loss)
    torch.testing.assert_close(dense_ggn(problem, method), problem.gauss_newton(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loss", ["cross_entropy", "bce", "mse"])
@pytest.mark.parametrize("kind", ["relu", "leaky_relu", "max_pool"])
def test_piecewise_linear_nets_have_the_hessian_as_ggn_on_each_layer(
    kind: str, loss: str, method: GaussNewtonMethod
) -> None:
    """The Hessian's blocks of one layer each: between layers the Hessian has products of slopes that G lacks."""
    torch.manual_seed(0)
    if kind == "max_pool":
        model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
        x = torch.randn(5, 1, 5, 5)
    else:
        act = nn.ReLU() if kind == "relu" else nn.LeakyReLU(0.3)
        model, x = nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 3)), torch.randn(5, 3)
    problem = Problem(model.double(), x.double(), torch.randn(5, 3).double(), LOSSES[loss])
    got, hessian = dense_ggn(problem, method), problem.hessian()
    first = sum(p.numel() for p in model[0].parameters())
    for block in (slice(0, first), slice(first, None)):
        torch.testing.assert_close(got[block, block], hessian[block, block], rtol=0, atol=1e-12)
    assert (got - hessian).abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_net_has_the_hessian_as_ggn(method: GaussNewtonMethod) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3).double()
    problem = Problem(model, torch.randn(5, 3).double(), torch.randn(5, 3).double(), LOSSES["cross_entropy"])
    torch.testing.assert_close(dense_ggn(problem, method), problem.hessian(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_come_with_the_operator(method: GaussNewtonMethod) -> None:
    problem = make_problem("conv", "cross_entropy")

    def decayed() -> tuple[Tensor, Tensor]:  # a part of the loss that does not pass through the output
        loss, z = problem.pair_closure()
        return loss + sum(p.square().sum() for p in problem.params), z

    operator = operator_of(problem, method, decayed)
    loss, _ = decayed()
    assert operator.loss.item() == loss.item()
    expected = torch.autograd.grad(loss, problem.params)
    torch.testing.assert_close(operator.gradient, list(expected))
    torch.testing.assert_close(dense_of(operator, problem.params), problem.gauss_newton(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_with_layers_of_its_own(method: GaussNewtonMethod) -> None:
    """Convolution and BatchNorm behind the output: their curvature belongs to H_L."""
    problem = make_problem("linear")
    torch.manual_seed(4)
    kernel = torch.randn(2, 1, 2).double()

    def critic(z: Tensor, plain: bool) -> Tensor:
        z = torch.tanh(F.conv1d(z[:, None, :], kernel))
        if plain:
            z = (z - z.mean((0, 2), keepdim=True)) / (z.var((0, 2), unbiased=False, keepdim=True) + 1e-5).sqrt()
        else:
            z = F.batch_norm(z, None, None, training=True)
        return z.pow(3).sum()

    def closure() -> tuple[Tensor, Tensor]:
        z = problem.model(problem.x)
        return critic(z, plain=False), z

    z = problem.model(problem.x).detach()
    J = torch.func.jacrev(problem.output)(problem.flat()).reshape(z.numel(), -1)
    H = torch.func.hessian(lambda u: critic(u.view_as(z), plain=True))(z.reshape(-1))
    torch.testing.assert_close(dense_ggn(problem, method, closure), J.T @ H @ J, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_tied_weights_and_frozen_parameters(method: GaussNewtonMethod) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(3, 3)
            self.two = nn.Linear(3, 3)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(x)))  # type: ignore[no-any-return]  # torch's modules return Any

    torch.manual_seed(0)
    model = Tied().double()
    model.two.bias.requires_grad_(False)
    problem = Problem(model, torch.randn(5, 3).double(), torch.randn(5, 3).double(), F.mse_loss)

    def output(w: Tensor) -> Tensor:
        W, b = w[:9].view(3, 3), w[9:]
        return torch.tanh(problem.x @ W.T + b) @ W.T + model.two.bias

    J = torch.func.jacrev(output)(problem.flat()).reshape(15, 12)
    torch.testing.assert_close(dense_ggn(problem, method), 2 / 15 * J.T @ J, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_linear_in_the_output_has_no_curvature(method: GaussNewtonMethod) -> None:
    problem = make_problem("linear")

    def closure() -> tuple[Tensor, Tensor]:
        z = problem.model(problem.x)
        return (z - problem.y).abs().sum(), z

    assert not dense_ggn(problem, method, closure).any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["list", "generator"])
def test_micro_batches_add_up_exactly(form: str, method: GaussNewtonMethod) -> None:
    problem = make_problem("linear", "cross_entropy")

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        for rows in (slice(0, 2), slice(2, 5)):
            z = problem.model(problem.x[rows])
            yield len(z) / len(problem.x) * problem.loss(z, problem.y[rows]), z

    closure = parts if form == "generator" else lambda: list(parts())
    operator, whole = operator_of(problem, method, closure), operator_of(problem, method)
    torch.testing.assert_close(operator.loss, whole.loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(operator.gradient, whole.gradient, rtol=0, atol=1e-15)
    dense = dense_of(operator, problem.params)
    torch.testing.assert_close(dense, problem.gauss_newton(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("streams", [False, True])
def test_both_methods_see_the_same_dropout_and_statistics(streams: bool) -> None:
    problem = make_problem("batch_norm")
    problem.model.append(nn.Dropout(0.5))  # type: ignore[operator]  # a Sequential
    v = [torch.randn_like(p) for p in problem.params]

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        yield problem.pair_closure()

    products, statistics = [], []
    for method in METHODS:
        other = make_problem("batch_norm")
        problem.model.load_state_dict(other.model.state_dict())
        torch.manual_seed(5)
        operator = operator_of(problem, method, stream if streams else None)
        products += [operator(v), operator(v)]
        statistics.append([b.clone() for b in problem.model.buffers()])
        other.model(other.x)
        assert all(torch.equal(a, b) for a, b in zip(statistics[-1], other.model.buffers(), strict=True))
    for product in products[1:]:
        torch.testing.assert_close(product, products[0], rtol=0, atol=1e-13)


def test_auto_names_a_method_and_gives_right_products() -> None:
    problem = make_problem("conv")
    operator = GaussNewtonOperator(FrozenClosure(problem.model, problem.pair_closure), problem.params, "auto")
    dense = dense_of(operator, problem.params)
    torch.testing.assert_close(dense, problem.gauss_newton(), rtol=0, atol=1e-12)
    assert operator.choice is not None
    assert set(operator.choice.seconds) == {"jvp", "double_vjp"}


def test_auto_does_without_forward_ad() -> None:
    problem = make_problem("linear")

    def closure() -> tuple[Tensor, Tensor]:
        z = problem.model(problem.x)
        distances = torch.cdist(z, problem.y)  # has neither forward AD nor a second derivative, but z itself has
        return z.square().sum() + distances.detach().sum(), z

    operator = GaussNewtonOperator(FrozenClosure(problem.model, closure), problem.params, "auto")
    operator([torch.randn_like(p) for p in problem.params])
    assert operator.choice is not None
    assert operator.choice.name == "double_vjp"
    assert "cdist" in operator.choice.failed["jvp"]


# errors


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, g: Tensor) -> Tensor:
        return g * 2


def test_functions_that_are_differentiable_once_are_named() -> None:
    problem = make_problem("linear")

    def in_output() -> tuple[Tensor, Tensor]:
        z: Tensor = Once.apply(problem.model(problem.x))  # type: ignore[no-untyped-call]  # torch's
        return z.square().sum(), z

    def in_loss() -> tuple[Tensor, Tensor]:
        z = problem.model(problem.x)
        return Once.apply(z).square().sum(), z  # type: ignore[no-untyped-call]  # torch's

    v = [torch.randn_like(p) for p in problem.params]
    for closure in (in_output, in_loss):
        with pytest.raises(UnsupportedOpError, match="double vjp.*got Once" if closure is in_output else "got Once"):
            operator_of(problem, "double_vjp", closure)(v)
        with pytest.raises(UnsupportedOpError, match=r"autograd\.Function"):
            operator_of(problem, "jvp", closure)(v)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda loss, z: loss, "got Tensor"),
        (lambda loss, z: (loss, z, z), "a tuple of 3"),
        (lambda loss, z: (loss, None), "a tuple of 2"),
        (lambda loss, z: [loss, z], "got Tensor"),
        (lambda loss, z: None, "got NoneType"),
        (lambda loss, z: (z, loss), "scalar"),
        (lambda loss, z: (loss.item(), z), "a tuple of 2"),
        (lambda loss, z: (loss, z.argmax(1)), "floating-point output"),
        (lambda loss, z: (loss, z.clone()), "function of the returned output"),
    ],
)
def test_wrong_results_are_refused(result: Callable[[Tensor, Tensor], object], message: str) -> None:
    problem = make_problem("linear")
    with pytest.raises(ClosureError, match=message):
        operator_of(problem, "jvp", lambda: result(*problem.pair_closure()))


def test_results_without_graph_are_refused() -> None:
    problem = make_problem("linear")
    loss, z = problem.pair_closure()
    with pytest.raises(NoGraphError, match="expected a loss"):
        operator_of(problem, "jvp", lambda: (loss.detach(), z))
    with pytest.raises(NoGraphError, match="expected an output"):
        operator_of(problem, "jvp", lambda: (loss, z.detach()))


# the pure function


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["conv", "batch_norm", "attention"])
def test_pure_product_compiles_to_one_graph(model: str, method: str) -> None:
    problem = make_problem(model)
    params = [p.detach() for p in problem.params]
    v = [torch.randn_like(p) for p in params]

    def output(tensors: list[Tensor]) -> Tensor:
        named = dict(zip(problem.named, tensors, strict=True))
        buffers = {name: b.clone() for name, b in problem.model.named_buffers()}
        with sdpa_kernel(SDPBackend.MATH):
            result: Tensor = torch.func.functional_call(problem.model, {**named, **buffers}, (problem.x,))
        return result

    def product(tensors: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
        return ggn_vp(output, lambda z: problem.loss(z, problem.y), tensors, vectors, method)

    torch._dynamo.reset()
    expected = join(v) @ problem.gauss_newton()
    torch.testing.assert_close(join(product(params, v)), expected, rtol=0, atol=1e-12)
    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(join(compiled(params, v)), expected, rtol=0, atol=1e-12)
