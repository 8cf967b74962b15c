"""Gauss-Newton-vector products: G v = J^T H_L J v, J = d output / d w, H_L = d^2 loss / d output^2."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from triton_curv.nvtx import stage
from triton_curv.operators.cheap import CheapDerivatives
from triton_curv.operators.choice import Choice, fastest
from triton_curv.operators.compiled import CompiledPass
from triton_curv.operators.errors import ClosureError, UnsupportedOpError, named_ops, no_backward_inside
from triton_curv.operators.frozen import DifferentiableOps, FrozenClosure
from triton_curv.operators.loss import as_loss_and_output
from triton_curv.operators.once import once_differentiable_function
from triton_curv.operators.vectors import Vectors, add_, zeros_like

GaussNewtonMethod = Literal["jvp", "double_vjp", "compiled"]

ONCE = "its backward is marked @once_differentiable"


def ggn_vp(
    output: Callable[[Vectors], Tensor],
    loss: Callable[[Tensor], Tensor],
    params: Sequence[Tensor],
    vectors: Sequence[Tensor],
    method: str = "jvp",
) -> Vectors:
    """J^T H_L J v of `loss(output(params))` as one pure function, `torch.compile(fullgraph=True)`-able.

    Args:
        output: a function of a list of tensors, without side effects (`functional_call` on clones of buffers).
        loss: a scalar function of the output.
        params: where; any shapes.
        vectors: v, shaped and typed as `params`.
        method: how J v is made: "jvp" by forward AD, "double_vjp" by reverse AD alone.

    Source: Schraudolph 2002; arXiv 2006.02409 section 3.

    """
    z, pull = torch.func.vjp(output, list(params))[:2]
    if method == "jvp":
        tangent: Tensor = torch.func.jvp(output, (list(params),), (list(vectors),))[1]
    else:
        tangent = torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(z))[1](list(vectors))[0]
    curved = torch.func.vjp(torch.func.grad(loss), z)[1](tangent)[0]
    return list(pull(curved)[0])


class _Linearisation:
    """One output and its loss, with the graphs that J v, H_L u and J^T u go through again and again."""

    def __init__(self, result: Any, params: Sequence[Tensor], cheap: CheapDerivatives, verify: bool) -> None:
        loss, self._output = as_loss_and_output(result)
        self._once_in_output = once_differentiable_function(self._output) if verify else None
        self._once_in_loss = once_differentiable_function(loss, stop=self._output) if verify else None
        self.loss = loss.detach()
        self._params = params
        self._cheap = cheap
        try:
            (self._residual,) = torch.autograd.grad(loss, self._output, create_graph=True)
        except RuntimeError as error:
            if "not have been used in the graph" not in str(error):
                raise
            raise ClosureError(
                "expected a loss that is a function of the returned output, got one computed from another tensor; "
                "return the very tensor the loss is computed from"
            ) from error
        gradient = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True, materialize_grads=True)
        self.gradient = list(gradient)
        self._cotangent: Tensor | None = None
        self._pulled: list[tuple[int, Tensor]] = []

    def push(self, vectors: Sequence[Tensor]) -> Tensor:
        """J v by reverse AD alone: u -> J^T u is linear, so the gradient of <J^T u, v> in u is J v, whatever u is."""
        if self._once_in_output is not None:
            raise UnsupportedOpError(self._once_in_output, "Gauss-Newton product, double vjp", ONCE)
        if self._cotangent is None:
            self._cotangent = torch.zeros_like(self._output, requires_grad=True)
            with self._cheap.linear():
                pulled = torch.autograd.grad(
                    self._output, self._params, self._cotangent, create_graph=True, allow_unused=True
                )
            self._pulled = [(i, t) for i, t in enumerate(pulled) if t is not None and t.requires_grad]
        if not self._pulled:
            return torch.zeros_like(self._output, requires_grad=False)
        tensors, cotangents = [t for _, t in self._pulled], [vectors[i] for i, _ in self._pulled]
        return torch.autograd.grad(tensors, self._cotangent, cotangents, retain_graph=True)[0]

    def pull(self, tangent: Tensor) -> Vectors:
        """J^T H_L u."""
        if self._once_in_loss is not None:
            raise UnsupportedOpError(self._once_in_loss, "Gauss-Newton product, Hessian of the loss", ONCE)
        if not self._residual.requires_grad:  # a loss that is linear in the output, piece by piece
            return zeros_like(self._params)
        curved = torch.autograd.grad(
            self._residual, self._output, tangent, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return list(
            torch.autograd.grad(
                self._output, self._params, curved, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        )


class GaussNewtonOperator:
    """v -> J^T H_L J v at the weights as they are, for one solve; also the loss and its gradient.

    The closure runs once; the graphs of outputs and losses are kept (built again each time for a closure that
    streams). J v is computed by "jvp", repeating the forward pass with dual numbers in place of the weights (which must
    be reached through the model), by "double_vjp" on a graph that is built at the first product, or by "compiled": jvp
    in one graph of torch.compile (`CompiledPass`), built at the first product ever, which takes seconds to minutes.

    Args:
        closure: the frozen closure, not run yet; its results are pairs (loss, output).
        params: the parameters to differentiate for.
        method: "jvp", "double_vjp", "compiled"; "auto": time the first two on the first product and keep the faster
            that works; "fastest": time all three.
        verify: look for functions that torch would differentiate twice without a word though they can't be: some
            microseconds for each node of the graph.

    Raises:
        ClosureError, NoGraphError: see `as_loss_and_output`; or a loss that is no function of the output.
        UnsupportedOpError: at a product, an op without the derivative it needs.

    """

    def __init__(
        self,
        closure: FrozenClosure,
        params: Sequence[Tensor],
        method: GaussNewtonMethod | Literal["auto", "fastest"] = "auto",
        verify: bool = True,
    ) -> None:
        self._closure = closure
        self._verify = verify
        self._cheap = CheapDerivatives()
        self._params = list(params)
        self._kept: list[_Linearisation] = []
        self._candidates = ("jvp", "double_vjp") if method == "auto" else ("jvp", "double_vjp", "compiled")
        self._compiled: CompiledPass | None = None
        self.choice: Choice | None = None if method in ("auto", "fastest") else Choice(method)
        self.gradient: Vectors = zeros_like(self._params)
        self.loss = torch.zeros((), dtype=self._params[0].dtype, device=self._params[0].device)
        with named_ops("gradient of the loss"), no_backward_inside(), self._cheap:
            closure.first(self._take)

    def _take(self, result: Any) -> None:
        linearisation = _Linearisation(result, self._params, self._cheap, self._verify)
        self.loss = self.loss + linearisation.loss
        add_(self.gradient, linearisation.gradient)
        if not self._closure.streams:
            self._kept.append(linearisation)

    @stage("product", payload=lambda operator, vectors: 2 * sum(v.nbytes for v in vectors))
    def __call__(self, vectors: Vectors) -> Vectors:
        """G v; v and the result shaped as the parameters, in v's dtypes."""
        narrow = [v.to(p.dtype) for v, p in zip(vectors, self._params, strict=True)]
        methods = {"jvp": self._by_jvp, "double_vjp": self._by_double_vjp, "compiled": self._by_compiled}
        if self.choice is None:
            self.choice = fastest({name: methods[name] for name in self._candidates}, narrow)
        products = methods[self.choice.name](narrow)
        return [product.to(v.dtype) for product, v in zip(products, vectors, strict=True)]

    def release(self) -> None:
        """Let go of the graphs; no product can be made any more."""
        self._kept.clear()

    def _by_double_vjp(self, vectors: Vectors) -> Vectors:
        totals = zeros_like(self._params)

        def add(linearisation: _Linearisation) -> None:
            add_(totals, linearisation.pull(linearisation.push(vectors)))

        with named_ops("Gauss-Newton product, double vjp"):
            self._visit(add)
        return totals

    def _by_jvp(self, vectors: Vectors) -> Vectors:
        totals, tangents = zeros_like(self._params), self._tangents(vectors)

        def add(linearisation: _Linearisation) -> None:
            add_(totals, linearisation.pull(tangents.pop(0)))

        with named_ops("Gauss-Newton product, reverse part"):
            self._visit(add)
        return totals

    def _by_compiled(self, vectors: Vectors) -> Vectors:
        if self._compiled is None:
            self._compiled = CompiledPass(self._closure, self._params)
        with named_ops("compiled Gauss-Newton product"):
            tangent = self._compiled.tangent(vectors)
            return self._kept[0].pull(tangent)

    def _visit(self, use: Callable[[_Linearisation], None]) -> None:
        """Every micro-batch's linearisation in turn: the kept ones, or made anew one at a time."""
        if self._closure.streams:
            with torch.enable_grad(), self._cheap:
                self._closure.again(lambda result: use(_Linearisation(result, self._params, self._cheap, self._verify)))
        for linearisation in self._kept:
            use(linearisation)

    def _tangents(self, vectors: Vectors) -> list[Tensor]:
        """J v of every micro-batch by forward AD."""
        tangents: list[Tensor] = []

        def take(result: Any) -> None:
            primal, tangent = forward_ad.unpack_dual(as_loss_and_output(result).output)
            tangents.append(torch.zeros_like(primal) if tangent is None else tangent)

        with (
            named_ops("Gauss-Newton product, forward AD"),
            forward_ad.dual_level(),
            torch.no_grad(),
            DifferentiableOps(),
        ):
            pairs = zip(self._params, vectors, strict=True)
            duals = [forward_ad.make_dual(p.detach(), v) for p, v in pairs]
            self._closure.again(take, dict(zip(self._params, duals, strict=True)))
        return tangents
