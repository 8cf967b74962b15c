"""Hessian-vector products: H v = d/dw <dL/dw, v> (Pearlmutter 1994)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from triton_curv.nvtx import stage
from triton_curv.operators.cheap import CheapDerivatives
from triton_curv.operators.choice import Choice, fastest
from triton_curv.operators.compiled import CompiledPass
from triton_curv.operators.errors import UnsupportedOpError, named_ops, no_backward_inside
from triton_curv.operators.frozen import DifferentiableOps, FrozenClosure
from triton_curv.operators.loss import as_loss
from triton_curv.operators.once import once_differentiable_function
from triton_curv.operators.vectors import Vectors, add_, zeros_like

HessianMethod = Literal["reverse", "forward", "compiled"]

REVERSE = "Hessian-vector product, reverse over reverse"


def hvp(
    loss: Callable[[Vectors], Tensor], params: Sequence[Tensor], vectors: Sequence[Tensor], method: str = "reverse"
) -> Vectors:
    """H v of `loss(params)` as one pure function, `torch.compile(fullgraph=True)`-able.

    Args:
        loss: a scalar function of a list of tensors, without side effects (`functional_call` on clones of buffers).
        params: where; any shapes, one floating dtype each.
        vectors: v, shaped and typed as `params`.
        method: "reverse" differentiates the gradient backwards, "forward" pushes v through it with forward AD.

    Source: Pearlmutter 1994; arXiv 2208.02017 section 3.

    """
    with DifferentiableOps():
        gradient = torch.func.grad(loss)
        if method == "forward":
            tangent: Vectors = torch.func.jvp(gradient, (list(params),), (list(vectors),))[1]
            return tangent
        return list(torch.func.vjp(gradient, list(params))[1](list(vectors))[0])


class _GradientGraph:
    """dL/dw of one loss with its graph, ready to be differentiated again and again."""

    def __init__(self, loss: Tensor, params: Sequence[Tensor], verify: bool) -> None:
        self._once = once_differentiable_function(loss) if verify else None
        found = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        self.gradient = [torch.zeros_like(p) if g is None else g.detach() for g, p in zip(found, params, strict=True)]
        self._graphs = [g if g is not None and g.requires_grad else None for g in found]

    def product(self, params: Sequence[Tensor], vectors: Sequence[Tensor], rows: Sequence[int], keep: bool) -> Vectors:
        """Rows and columns `rows` of H times v: H v if they are all."""
        if self._once is not None:
            raise UnsupportedOpError(self._once, REVERSE, "its backward is marked @once_differentiable")
        curved = [(self._graphs[i], v) for i, v in zip(rows, vectors, strict=True) if self._graphs[i] is not None]
        wanted = [params[i] for i in rows]
        if not curved:
            return zeros_like(wanted)
        graphs, cotangents = zip(*curved, strict=True)
        return list(
            torch.autograd.grad(
                graphs, wanted, cotangents, retain_graph=keep, allow_unused=True, materialize_grads=True
            )
        )


class HessianOperator:
    """v -> H v at the weights as they are, for one solve; also the loss and its gradient.

    The closure runs once. Products by "reverse" go backwards through the gradient's graph, built once and kept (built
    again each time for a closure that streams); "forward" repeats the closure with dual numbers in place of the
    weights and takes the gradient of that, which needs no second backward pass but is slower in eager mode; "compiled"
    does so in one graph of torch.compile (`CompiledPass`), built at the first product ever, which takes seconds to
    minutes. The weights must be reached through the model then.

    Args:
        closure: the frozen closure, not run yet; its results are losses.
        params: the parameters to differentiate for.
        method: "reverse", "forward", "compiled"; "auto": time the first two on the first product and keep the faster
            that works; "fastest": time all three.
        verify: look for functions that torch would differentiate twice without a word though they can't be: some
            microseconds for each node of the graph.

    Raises:
        ClosureError, NoGraphError: see `as_loss`.
        UnsupportedOpError: at a product, an op without the derivative it needs.

    """

    def __init__(
        self,
        closure: FrozenClosure,
        params: Sequence[Tensor],
        method: HessianMethod | Literal["auto", "fastest"] = "reverse",
        verify: bool = True,
    ) -> None:
        self._closure = closure
        self._verify = verify
        self._params = list(params)
        self._graphs: list[_GradientGraph] = []
        self._candidates = ("reverse", "forward") if method == "auto" else ("reverse", "forward", "compiled")
        self._compiled: CompiledPass | None = None
        self.choice: Choice | None = None if method in ("auto", "fastest") else Choice(method)
        self.gradient: Vectors = zeros_like(self._params)
        self.loss = torch.zeros((), dtype=self._params[0].dtype, device=self._params[0].device)
        with named_ops("gradient of the loss"), no_backward_inside(), CheapDerivatives():
            closure.first(self._take)

    def _take(self, result: Any) -> None:
        loss = as_loss(result)
        self.loss = self.loss + loss.detach()
        if self._closure.streams or (self.choice is not None and self.choice.name != "reverse"):
            found = torch.autograd.grad(loss, self._params, allow_unused=True, materialize_grads=True)
            add_(self.gradient, found)
        else:
            graph = _GradientGraph(loss, self._params, self._verify)
            self._graphs.append(graph)
            add_(self.gradient, graph.gradient)

    def __call__(self, vectors: Vectors) -> Vectors:
        """H v; v and the result shaped as the parameters, in v's dtypes."""
        return self._times(vectors, range(len(self._params)))

    def release(self) -> None:
        """Let go of the graphs; no product can be made any more."""
        self._graphs.clear()

    def block(self, index: int) -> Callable[[Vectors], Vectors]:
        """[v] -> [H_ii v], the diagonal block of one parameter."""
        return lambda vectors: self._times(vectors, [index])

    @stage("product", payload=lambda operator, vectors, rows: 2 * sum(v.nbytes for v in vectors))
    def _times(self, vectors: Vectors, rows: Sequence[int]) -> Vectors:
        narrow = [v.to(self._params[i].dtype) for i, v in zip(rows, vectors, strict=True)]
        methods = {"reverse": self._reverse, "forward": self._forward, "compiled": self._by_compiled}
        if self.choice is None:
            every = zeros_like(self._params)
            for i, v in zip(rows, narrow, strict=True):
                every[i] = v
            whole = range(len(self._params))
            self.choice = fastest({name: partial(methods[name], rows=whole) for name in self._candidates}, every)
        products = methods[self.choice.name](narrow, rows)
        return [product.to(v.dtype) for product, v in zip(products, vectors, strict=True)]

    def _by_compiled(self, vectors: Vectors, rows: Sequence[int]) -> Vectors:
        if self._compiled is None:
            self._compiled = CompiledPass(self._closure, self._params)
        every = zeros_like(self._params)
        for i, v in zip(rows, vectors, strict=True):
            every[i] = v
        with named_ops("compiled Hessian-vector product"):
            product = self._compiled.hessian(every)
        return [product[i] for i in rows]

    def _reverse(self, vectors: Vectors, rows: Sequence[int]) -> Vectors:
        totals = zeros_like([self._params[i] for i in rows])

        def add(result: Any) -> None:
            graph = _GradientGraph(as_loss(result), self._params, self._verify)
            add_(totals, graph.product(self._params, vectors, rows, keep=False))

        with named_ops(REVERSE):
            if self._closure.streams:
                with torch.enable_grad(), CheapDerivatives():
                    self._closure.again(add)
            for graph in self._graphs:
                add_(totals, graph.product(self._params, vectors, rows, keep=True))
        return totals

    def _forward(self, vectors: Vectors, rows: Sequence[int]) -> Vectors:
        totals = zeros_like([self._params[i] for i in rows])

        def add(result: Any) -> None:
            wanted = [duals[i] for i in rows]
            found = torch.autograd.grad(as_loss(result), wanted, allow_unused=True)
            tangents = [None if g is None else forward_ad.unpack_dual(g).tangent for g in found]
            add_(totals, [torch.zeros_like(t) if g is None else g for g, t in zip(tangents, totals, strict=True)])

        with (
            named_ops("Hessian-vector product, forward over reverse"),
            forward_ad.dual_level(),
            torch.enable_grad(),
            DifferentiableOps(),
        ):
            directions = dict(zip(rows, vectors, strict=True))
            duals = [
                forward_ad.make_dual(p.detach().requires_grad_(), directions[i]) if i in directions else p.detach()
                for i, p in enumerate(self._params)
            ]
            self._closure.again(add, dict(zip(self._params, duals, strict=True)))
        return totals
