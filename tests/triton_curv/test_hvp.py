"""Hessian-vector products against torch.func.hessian, and what must not move while they are made."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.support.products import LOSSES, MODELS, Problem, dense_of, join, make_problem, split_like
from triton_curv.operators import FrozenClosure, HessianOperator, NoGraphError, UnsupportedOpError, hvp
from triton_curv.operators.cheap import CheapDerivatives
from triton_curv.operators.frozen import DifferentiableOps
from triton_curv.operators.hvp import HessianMethod

METHODS: list[HessianMethod] = ["reverse", "forward"]


def operator_of(
    problem: Problem, method: HessianMethod, closure: Callable[[], object] | None = None
) -> HessianOperator:
    return HessianOperator(FrozenClosure(problem.model, closure or problem.loss_closure), problem.params, method)


def dense_hessian(problem: Problem, method: HessianMethod, closure: Callable[[], object] | None = None) -> Tensor:
    return dense_of(operator_of(problem, method, closure), problem.params)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
def test_products_make_the_dense_hessian(model: str, loss: str, method: HessianMethod) -> None:
    problem = make_problem(model, loss)
    if (model, method) == ("silu", "forward"):
        with pytest.raises(UnsupportedOpError, match="got silu_backward"):
            dense_hessian(problem, method)
        return
    torch.testing.assert_close(dense_hessian(problem, method), problem.hessian(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["batch_norm", "layer_norm", "attention"])
def test_products_against_finite_differences_of_gradients(model: str, method: HessianMethod) -> None:
    problem = make_problem(model, "mse")  # not torch.func, which shares formulas with us
    params = problem.params
    torch.manual_seed(1)
    v = [torch.randn_like(p) for p in params]
    product = operator_of(problem, method)(v)

    def gradient_at(shift: float) -> Tensor:
        with torch.no_grad():
            for p, part in zip(params, v, strict=True):
                p.add_(part, alpha=shift)
        gradient = join(torch.autograd.grad(problem.loss_closure(), params))
        with torch.no_grad():
            for p, part in zip(params, v, strict=True):
                p.sub_(part, alpha=shift)
        return gradient

    h = 1e-5
    differences = (gradient_at(h) - gradient_at(-h)) / (2 * h)
    torch.testing.assert_close(join(product), differences, rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_come_with_the_operator(method: HessianMethod) -> None:
    problem = make_problem("conv", "cross_entropy")
    operator = operator_of(problem, method)
    loss = problem.loss_closure()
    assert operator.loss.item() == loss.item()
    torch.testing.assert_close(operator.gradient, list(torch.autograd.grad(loss, problem.params)))


@pytest.mark.parametrize("method", METHODS)
def test_blocks_are_the_diagonal_blocks(method: HessianMethod) -> None:
    problem = make_problem("linear")
    operator, dense = operator_of(problem, method), problem.hessian()
    start = 0
    for i, p in enumerate(problem.params):
        end = start + p.numel()
        got = dense_of(operator.block(i), [p])
        torch.testing.assert_close(got, dense[start:end, start:end], rtol=0, atol=1e-12)
        start = end


class Tied(nn.Module):
    """y = W^T tanh(W x + b): the same weight twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(3, 4)
        self.decode = nn.Linear(4, 3)
        self.decode.weight = nn.Parameter(torch.zeros(4, 3))  # replaced below by a view of the other's name
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.encode(x)), self.decode.weight.T, self.decode.bias)


@pytest.mark.parametrize("method", METHODS)
def test_tied_weights_and_frozen_parameters(method: HessianMethod) -> None:
    torch.manual_seed(0)
    model = Tied().double()
    model.decode.bias.requires_grad_(False)
    problem = Problem(model, torch.randn(5, 3).double(), torch.randn(5, 3).double(), F.mse_loss)
    assert list(problem.named) == ["encode.weight", "encode.bias"]

    def loss(w: Tensor) -> Tensor:
        W, b = w[:12].view(4, 3), w[12:]
        return (torch.tanh(problem.x @ W.T + b) @ W + model.decode.bias - problem.y).square().mean()

    expected = torch.func.hessian(loss)(problem.flat())
    torch.testing.assert_close(dense_hessian(problem, method), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_module_under_two_names_keeps_its_parameters(method: HessianMethod) -> None:
    torch.manual_seed(0)
    shared = nn.Linear(3, 3).double()
    model = nn.Sequential(shared, nn.Tanh(), shared)
    problem = Problem(model, torch.randn(5, 3).double(), torch.randn(5, 3).double(), F.mse_loss)
    weight = shared.weight

    def loss(w: Tensor) -> Tensor:
        W, b = w[:9].view(3, 3), w[9:]
        return (torch.tanh(problem.x @ W.T + b) @ W.T + b - problem.y).square().mean()

    expected = torch.func.hessian(loss)(problem.flat())
    torch.testing.assert_close(dense_hessian(problem, method), expected, rtol=0, atol=1e-12)
    assert shared.weight is weight  # torch.func.functional_call would have left its replacement here


# micro-batches


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["list", "generator"])
def test_micro_batches_add_up_exactly(form: str, method: HessianMethod) -> None:
    problem = make_problem("linear", "cross_entropy")

    def parts() -> Iterator[Tensor]:
        for rows in (slice(0, 2), slice(2, 5)):
            share = len(problem.x[rows]) / len(problem.x)
            yield share * problem.loss(problem.model(problem.x[rows]), problem.y[rows])

    closure = parts if form == "generator" else lambda: list(parts())
    operator = operator_of(problem, method, closure)
    whole = operator_of(problem, method)
    torch.testing.assert_close(operator.loss, whole.loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(operator.gradient, whole.gradient, rtol=0, atol=1e-15)
    dense = dense_of(operator, problem.params)
    torch.testing.assert_close(dense, problem.hessian(), rtol=0, atol=1e-12)


# frozen: random numbers, buffers, attention


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_all_products_of_a_solve_see_one_dropout_mask(method: HessianMethod, streams: bool) -> None:
    problem = make_problem("linear")
    problem.model.append(nn.Dropout(0.5))  # type: ignore[operator]  # a Sequential

    def stream() -> Iterator[Tensor]:
        yield problem.loss_closure()

    torch.manual_seed(3)
    operator = operator_of(problem, method, stream if streams else None)
    after = torch.rand(3)
    v = split_like(torch.randn(problem.flat().numel()).double(), problem.params)
    before = torch.get_rng_state()
    first = operator(v)
    assert torch.equal(torch.get_rng_state(), before)  # products draw no numbers that are seen outside
    torch.rand(7)
    torch.testing.assert_close(operator(v), first, rtol=0, atol=0)

    torch.manual_seed(3)
    mask = nn.functional.dropout(torch.ones(5, 3).double(), 0.5)
    torch.testing.assert_close(torch.rand(3), after)  # as if the closure had run once
    problem.model[-1] = Mask(mask)  # type: ignore[operator]  # a Sequential
    torch.testing.assert_close(operator_of(problem, method)(v), first, rtol=0, atol=1e-13)


class Mask(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_running_statistics_move_once(method: HessianMethod, streams: bool) -> None:
    problem, other = make_problem("batch_norm"), make_problem("batch_norm")
    other.model(other.x)

    def stream() -> Iterator[Tensor]:
        yield problem.loss_closure()

    operator = operator_of(problem, method, stream if streams else None)
    v = [torch.randn_like(p) for p in problem.params]
    for _ in range(3):
        operator(v)
    for buffer, expected in zip(problem.model.buffers(), other.model.buffers(), strict=True):
        assert torch.equal(buffer, expected)


def test_only_passes_of_the_operator_use_the_math_backend() -> None:
    problem = make_problem("attention")
    seen: list[bool] = []
    hook = problem.model.register_forward_hook(lambda *_: seen.append(torch._C._get_flash_sdp_enabled()))
    operator = operator_of(problem, "forward")
    operator([torch.randn_like(p) for p in problem.params])
    problem.loss_closure()
    hook.remove()
    assert seen == [False, False, True]


# choice and errors


def test_auto_names_a_method_that_works() -> None:
    problem = make_problem("linear")
    operator = HessianOperator(FrozenClosure(problem.model, problem.loss_closure), problem.params, "auto")
    assert operator.choice is None
    dense = dense_of(operator, problem.params)
    torch.testing.assert_close(dense, problem.hessian(), rtol=0, atol=1e-12)
    choice = operator.choice
    assert choice is not None
    assert set(choice.seconds) == {"reverse", "forward"}
    assert choice.name == min(choice.seconds, key=lambda name: choice.seconds[name])


def test_auto_takes_what_works_if_one_method_does_not() -> None:
    problem = make_problem("linear")

    def closure() -> Tensor:  # forward AD of huber_loss's backward is missing
        return F.huber_loss(problem.model(problem.x), problem.y)

    operator = HessianOperator(FrozenClosure(problem.model, closure), problem.params, "auto")
    operator([torch.randn_like(p) for p in problem.params])
    assert operator.choice is not None
    assert operator.choice.name == "reverse"
    assert "huber_loss_backward" in operator.choice.failed["forward"]


@pytest.mark.parametrize("method", METHODS)
def test_an_op_without_second_derivative_is_named(method: HessianMethod) -> None:
    problem = make_problem("linear")
    closure = lambda: F.hardsigmoid(problem.model(problem.x)).sum()  # noqa: E731
    operator = operator_of(problem, method, closure)
    with pytest.raises(UnsupportedOpError, match="hardsigmoid_backward") as caught:
        operator([torch.randn_like(p) for p in problem.params])
    assert caught.value.op == "hardsigmoid_backward"


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, g: Tensor) -> Tensor:
        return g * 2


@pytest.mark.parametrize("method", METHODS)
def test_a_function_that_is_differentiable_once_is_named(method: HessianMethod) -> None:
    problem = make_problem("linear")

    def closure() -> Tensor:
        loss: Tensor = Once.apply(problem.model(problem.x)).square().sum()  # type: ignore[no-untyped-call]  # torch's
        return loss

    with pytest.raises(UnsupportedOpError, match=r"got Once" if method == "reverse" else r"autograd\.Function"):
        operator_of(problem, method, closure)([torch.randn_like(p) for p in problem.params])


def test_a_compiled_model_runs_uncompiled_inside_products() -> None:
    problem = make_problem("linear")
    compiled = torch.compile(problem.model, backend="aot_eager")
    v = [torch.randn_like(p) for p in problem.params]

    def closure() -> Tensor:
        loss: Tensor = compiled(problem.x).square().sum()
        return loss

    expected = operator_of(problem, "reverse", lambda: problem.model(problem.x).square().sum())(v)
    torch.testing.assert_close(operator_of(problem, "reverse", closure)(v), expected, rtol=0, atol=0)
    kept = HessianOperator(FrozenClosure(problem.model, closure, eager=False), problem.params, "reverse")
    with pytest.raises(UnsupportedOpError, match=r"torch\.compile"):
        kept(v)


def test_a_loss_linear_in_the_parameters_has_no_curvature() -> None:
    model = nn.Linear(2, 1).double()
    problem = Problem(model, torch.ones(3, 2).double(), torch.zeros(3, 1).double(), lambda z, _: z.sum())
    assert not dense_hessian(problem, "reverse").any()
    assert not dense_hessian(problem, "forward").any()


def test_a_loss_without_graph_is_refused() -> None:
    problem = make_problem("linear")
    with pytest.raises(NoGraphError, match="detached"):
        operator_of(problem, "reverse", lambda: problem.loss_closure().detach())


# the pure function


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["conv", "batch_norm", "attention"])
def test_pure_product_compiles_to_one_graph(model: str, method: str) -> None:
    problem = make_problem(model)
    params = [p.detach() for p in problem.params]
    v = [torch.randn_like(p) for p in params]

    def loss(tensors: list[Tensor]) -> Tensor:
        named = dict(zip(problem.named, tensors, strict=True))
        buffers = {name: b.clone() for name, b in problem.model.named_buffers()}
        with sdpa_kernel(SDPBackend.MATH):
            return problem.loss(
                torch.func.functional_call(problem.model, {**named, **buffers}, (problem.x,)), problem.y
            )

    def product(tensors: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
        return hvp(loss, tensors, vectors, method)

    torch._dynamo.reset()
    expected = join(v) @ problem.hessian()
    torch.testing.assert_close(join(product(params, v)), expected, rtol=0, atol=1e-12)
    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(join(compiled(params, v)), expected, rtol=0, atol=1e-12)
    before = [b.clone() for b in problem.model.buffers()]
    compiled(params, v)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.model.buffers(), strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_elementary_mse_loss_is_torchs(reduction: str, weighted: bool) -> None:
    z, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    options: dict[str, Any] = {"reduction": reduction}
    if weighted:
        options["weight"] = torch.rand(4, 3, dtype=torch.float64)
    expected = F.mse_loss(z, y, **options)
    with DifferentiableOps():
        got = F.mse_loss(z, y, **options)
        legacy = nn.MSELoss(size_average=False)(z, y) if reduction == "sum" and not weighted else got
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(legacy, expected)


# layers with backward formulas of ours


def conv_cases() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    return {
        "1d": (nn.Conv1d(2, 3, 2, dilation=2), (3, 2, 6)),
        "stride": (nn.Conv2d(2, 4, 3, stride=(2, 1), padding=(1, 0)), (3, 2, 5, 4)),
        "groups": (nn.Conv2d(4, 4, 2, groups=2, bias=False), (2, 4, 3, 3)),
        "depthwise": (nn.Conv2d(3, 6, 2, groups=3), (2, 3, 3, 3)),
        "circular": (nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), (2, 1, 3, 3)),
        "same": (nn.Conv2d(1, 2, 3, padding="same"), (2, 1, 3, 3)),
        "3d": (nn.Conv3d(1, 2, 2), (2, 1, 3, 3, 3)),
        "bn2d": (nn.BatchNorm2d(3), (4, 3, 2, 2)),
        "bn1d": (nn.BatchNorm1d(3), (6, 3)),
        "bn_plain": (nn.BatchNorm1d(3, affine=False, track_running_stats=False), (6, 3)),
        "bn_cumulative": (nn.BatchNorm2d(3, momentum=None), (4, 3, 2, 2)),
    }


@pytest.mark.parametrize("curved", [True, False])
@pytest.mark.parametrize("case", list(conv_cases()))
def test_replaced_layers_are_torchs(case: str, curved: bool) -> None:
    """Output, gradients, buffers, and the derivatives of the gradients, in an outer function that bends."""
    torch.manual_seed(0)
    layer, shape = conv_cases()[case]
    layer.double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    start = {name: b.clone() for name, b in layer.state_dict().items()}
    inputs = [x, *layer.parameters()]

    def derivatives(mode: CheapDerivatives | None) -> list[Tensor]:
        linear = nullcontext() if mode is None or curved else mode.linear()
        layer.load_state_dict(start)
        with mode or nullcontext():
            y = layer(torch.sin(x))
        u = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y).requires_grad_()
        with linear:
            first = torch.autograd.grad(y, inputs, u, create_graph=True)
        torch.manual_seed(1)
        v = [torch.randn_like(t) for t in first]
        second = torch.autograd.grad(first, [u, *inputs] if curved else [u], v, retain_graph=True, allow_unused=True)
        some = torch.autograd.grad(first[0], [u, *inputs] if curved else [u], v[0], allow_unused=True)
        results = [y, *first, *second, *some, *layer.buffers()]
        # torch says None where nothing depends, ours says zero
        return [t.detach().clone() for t in results if t is not None and t.any()]

    torch.testing.assert_close(derivatives(CheapDerivatives()), derivatives(None), rtol=0, atol=1e-11)
