"""A closure's pass through the model as a pure function of the parameters, compiled into one graph.

torch.compile can't trace a backward pass through a graph that lives outside, so that products on a kept graph stay
eager. What it takes whole is the pass itself together with its derivative by forward AD. The graph is built at the
first product of the first solve and serves all later closures of the same code and shapes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from triton_curv.operators.errors import UnsupportedOpError
from triton_curv.operators.frozen import DifferentiableOps, FrozenClosure
from triton_curv.operators.vectors import Vectors

PRODUCT = "compiled product"
BACKEND = "inductor"


class _Pass(nn.Module):
    """`closure()` as a module, so that `functional_call` can replace the tensors of the model that it runs."""

    def __init__(self, model: nn.Module, closure: Callable[[], Any]) -> None:
        super().__init__()
        self.model, self.closure = model, closure

    def forward(self) -> Any:
        return self.closure()


def _hessian_product(
    run: _Pass, names: Sequence[str], params: Vectors, fixed: dict[str, Tensor], vectors: Vectors
) -> Vectors:
    """H v, forward over reverse."""

    def loss(tensors: Vectors) -> Any:
        return _call(run, names, tensors, fixed).reshape(())

    with DifferentiableOps():
        product: Vectors = torch.func.jvp(torch.func.grad(loss), (params,), (vectors,))[1]
    return product


def _output_tangent(
    run: _Pass, names: Sequence[str], params: Vectors, fixed: dict[str, Tensor], vectors: Vectors
) -> Tensor:
    """J v of the closure's output."""

    def output(tensors: Vectors) -> Any:
        return _call(run, names, tensors, fixed)[1]

    with DifferentiableOps():
        tangent: Tensor = torch.func.jvp(output, (params,), (vectors,))[1]
    return tangent


def _call(run: _Pass, names: Sequence[str], tensors: Vectors, fixed: dict[str, Tensor]) -> Any:
    replaced = dict(zip(names, tensors, strict=True))
    for name, tensor in fixed.items():
        replaced[name] = tensor.clone()  # running statistics move on clones
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.functional_call(run, replaced, ())


class CompiledPass:
    """Derivatives of a frozen closure, which has run once, by compiled functions.

    Raises:
        UnsupportedOpError: at a product: a closure that draws random numbers, which a graph would draw anew each time;
            that returns several results; a module under two names; anything that does not trace into one graph.

    """

    def __init__(self, closure: FrozenClosure, params: Sequence[Tensor]) -> None:
        model = closure.model
        if closure.weights.stand_ins:
            raise UnsupportedOpError("parameters sharded by FSDP2", PRODUCT, "their whole copies are not the model's")
        if closure.draws:
            raise UnsupportedOpError("random numbers", PRODUCT, "all products of a solve must see the same ones")
        if closure.several:
            raise UnsupportedOpError("micro-batches", PRODUCT, "expected a closure that returns one result")
        if len(list(model.named_modules(remove_duplicate=False))) > len(list(model.modules())):
            raise UnsupportedOpError("a module under two names", PRODUCT, "functional_call leaves tensors behind there")
        wanted: dict[Tensor, str] = {p: f"model.{name}" for name, p in model.named_parameters()}
        self._run = _Pass(model, closure.closure)
        self._names = [wanted[p] for p in params]
        self._params = [p.detach() for p in params]
        self._fixed = {f"model.{name}": buffer for name, buffer in model.named_buffers()}

    def hessian(self, vectors: Vectors) -> Vectors:
        """H v."""
        product: Vectors = self._compiled(_hessian_product, vectors)
        return product

    def tangent(self, vectors: Vectors) -> Tensor:
        """J v."""
        tangent: Tensor = self._compiled(_output_tangent, vectors)
        return tangent

    def _compiled(self, function: Callable[..., Any], vectors: Vectors) -> Any:
        compiled = torch.compile(function, fullgraph=True, backend=BACKEND)
        try:
            return compiled(self._run, self._names, self._params, self._fixed, vectors)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UnsupportedOpError("the closure as one graph", PRODUCT, error) from error
