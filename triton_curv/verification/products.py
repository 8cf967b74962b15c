"""Hessian- and Gauss-Newton-vector products against central differences, and who is to blame where they can't be."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from triton_curv.explanation.observe import floating_tensors
from triton_curv.operators.errors import UnsupportedOpError
from triton_curv.operators.frozen import FrozenClosure
from triton_curv.operators.ggn import GaussNewtonOperator
from triton_curv.operators.hvp import HessianOperator
from triton_curv.operators.loss import LossAndOutput
from triton_curv.operators.vectors import Vectors

TOLERANCE = 1e-5
"""Relative error against the best of the differences, themselves about 1e-7 off where the loss is smooth."""
STEPS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
"""Of the differences, in units of the weights' norm: large ones cross kinks of ReLUs, small ones drown in rounding."""


@dataclass(frozen=True)
class ProductRow:
    """A matrix-free product: its error, or the op that has no derivative, and the layers that use it."""

    product: str
    error: float | None
    op: str = ""
    layers: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether it works and is right."""
        return self.error is not None and self.error <= TOLERANCE


class Problem:
    """The mean over samples of the squared distance of all outputs to random targets, as a function of the weights.

    Random numbers that the model draws are the same in every evaluation, and its buffers are put back.
    """

    def __init__(self, model: nn.Module, inputs: Tensor, seed: int) -> None:
        self.model = model
        self.inputs = inputs
        self.seed = seed
        self.params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(seed)
        self.direction = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in self.params]
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:  # autograd takes it for a constant
                for p, v in zip(self.params, self.direction, strict=True):
                    if p is module.weight:
                        v[module.padding_idx] = 0.0
        with self.as_before():
            output = self._output()
        self._targets = torch.randn(output.shape, dtype=output.dtype, generator=generator)

    def _output(self) -> Tensor:
        outputs = floating_tensors(self.model(self.inputs))
        return torch.cat([output.reshape(len(output), -1) for output in outputs], dim=1)

    def loss(self) -> LossAndOutput:
        """The loss and the output that it is a function of."""
        output = self._output()
        return LossAndOutput((output - self._targets).square().sum() / len(output), output)

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """The same random numbers as ever, and buffers put back afterwards."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        torch.manual_seed(self.seed)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in self.model.named_buffers():
                    buffer.copy_(buffers[name])

    def ours(self, product: Callable[[], Vectors]) -> Vectors:
        """What `product` gives."""
        with self.as_before():
            return product()

    def along(self, measure: Callable[[LossAndOutput], Vectors], step: float) -> Vectors:
        """d/ds measure(w + s v) at s = 0, by central differences along the direction v."""
        weights = [p.detach().clone() for p in self.params]
        scale = step * sum(float(w.square().sum()) for w in weights) ** 0.5
        scale /= sum(float(v.square().sum()) for v in self.direction) ** 0.5
        ends = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                for p, weight, v in zip(self.params, weights, self.direction, strict=True):
                    p.copy_(weight + sign * scale * v)
            with self.as_before():
                ends.append(measure(self.loss()))
        with torch.no_grad():
            for p, weight in zip(self.params, weights, strict=True):
                p.copy_(weight)
        return [(up - down) / (2 * scale) for up, down in zip(*ends, strict=True)]

    def gradient(self, of: Tensor, cotangent: Tensor | None = None) -> Vectors:
        """d of / dw, or its product with a cotangent."""
        return list(torch.autograd.grad(of, self.params, cotangent, allow_unused=True, materialize_grads=True))


def check_products(problem: Problem) -> tuple[ProductRow, ...]:
    """One row for each product."""
    return (
        _row(problem, "Hessian (NewtonCG)", _hessian, _hessian_by_differences),
        _row(problem, "Gauss-Newton (SGN)", _gauss_newton, _gauss_newton_by_differences),
    )


def _row(
    problem: Problem, name: str, product: Callable[[Problem], Vectors], expected: Callable[[Problem, float], Vectors]
) -> ProductRow:
    try:
        ours = problem.ours(lambda: product(problem))
    except UnsupportedOpError as error:
        return ProductRow(name, None, error.op, tuple(layers_without_second_derivatives(problem)))
    return ProductRow(name, min(_distance(ours, expected(problem, step)) for step in STEPS))


def _distance(ours: Vectors, expected: Vectors) -> float:
    norm = sum(float(b.square().sum()) for b in expected)
    off = sum(float((a - b).square().sum()) for a, b in zip(ours, expected, strict=True))
    return math.sqrt(off / norm if norm else off)


def _hessian(problem: Problem) -> Vectors:
    operator = HessianOperator(FrozenClosure(problem.model, lambda: problem.loss().loss), problem.params)
    return operator(problem.direction)


def _hessian_by_differences(problem: Problem, step: float) -> Vectors:
    return problem.along(lambda found: problem.gradient(found.loss), step)


def _gauss_newton(problem: Problem) -> Vectors:
    closure = FrozenClosure(problem.model, lambda: tuple(problem.loss()))
    return GaussNewtonOperator(closure, problem.params, "double_vjp")(problem.direction)


def _gauss_newton_by_differences(problem: Problem, step: float) -> Vectors:
    """J^T H_L J v: J v by differences of outputs, H_L = 2 / N of the squared distance, J^T by autograd."""
    (tangent,) = problem.along(lambda found: [found.output.detach()], step)

    def pull() -> Vectors:
        output = problem.loss().output
        return problem.gradient(output, 2 / len(output) * tangent)

    return problem.ours(pull)


def layers_without_second_derivatives(problem: Problem) -> Sequence[str]:
    """Names of the layers that fail on their own, at the inputs that they see in the model."""
    inputs: dict[str, Tensor] = {}
    names = {module: name for name, module in problem.model.named_modules() if not list(module.children())}

    def keep(module: nn.Module, given: tuple[object, ...]) -> None:
        if given and isinstance(given[0], Tensor):
            inputs.setdefault(names[module], given[0].detach().clone())

    handles = [module.register_forward_pre_hook(keep) for module in names]
    problem.ours(lambda: [problem.loss().output.detach()])
    for handle in handles:
        handle.remove()
    return [name for module, name in names.items() if name in inputs and not _twice(problem, module, inputs[name])]


def _twice(problem: Problem, layer: nn.Module, inputs: Tensor) -> bool:
    """Whether a layer alone can be differentiated twice."""
    params: list[Tensor] = [p for p in layer.parameters() if p.requires_grad]
    if inputs.is_floating_point():
        params.append(inputs.requires_grad_())

    def closure() -> Tensor:
        copied = inputs.clone()  # a layer may work in place, which a leaf forbids
        return torch.stack([o.square().sum() for o in floating_tensors(layer(copied))]).sum()

    try:
        if params:
            problem.ours(lambda: HessianOperator(FrozenClosure(layer, closure), params)([p.detach() for p in params]))
    except UnsupportedOpError:
        return False
    return True
