"""Newton-CG: regularised Newton steps by conjugate gradients on Hessian-vector products (arXiv 2208.02017)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from triton_curv.errors import ConfigurationError
from triton_curv.nvtx import stage
from triton_curv.operators.cg import RULES, NegativeCurvature
from triton_curv.operators.hvp import HessianOperator
from triton_curv.operators.loss import as_loss
from triton_curv.operators.vectors import Vectors, dot
from triton_curv.optimizers.groups import choose
from triton_curv.optimizers.kfac import KFAC
from triton_curv.optimizers.matrix_free import (
    MatrixFree,
    PreconditionerArgument,
    Solve,
    Start,
    never_traced,
    number,
    widened,
)
from triton_curv.sharding.ranks import Where

Product = Literal["auto", "fastest", "reverse", "forward", "compiled"]
Feasibility = Literal["code", "paper"]
DataParallel = Literal["exact_products", "average_updates"]


class NewtonCG(MatrixFree):
    r"""w <- w + lr d, (H + tau I) d = -g solved by CG; d = -g where that is not a descent direction.

    `step(closure)` wants a closure that computes the loss and returns it, without `backward()`; gradients in `p.grad`
    are neither read nor written. It returns the loss before the step. For micro-batches the closure returns a list of
    losses, whose graphs are all kept, or is a generator that yields them, run again for each product with one graph
    alive at a time; their sum is what is minimised. The closure sees the same random numbers in every pass of a step,
    BatchNorm's running statistics move once; it must see the same batch in all passes.

    Args:
        model: its parameters that require a gradient are trained.
        lr: step size; a float or a 0-dim tensor.
        tau: the regularisation of the Hessian, and the threshold of the feasibility check.
        cg_tol: tolerance of CG.
        cg_max_iter: limit of its iterations.
        stop: "reiz": ||r||_2 <= cg_tol (the authors' code); "relative": ||r||_2 <= cg_tol ||g||_2; "gargiani": max|r|.
        negative_curvature: "exit": CG ends with the iterate before; "ignore": the authors' code, which has no test.
        feasibility: "code": d = -g unless g.d < -tau, sufficient descent (the authors' code); "paper": d = -g if
            g.d > tau, which lets mild ascent pass.
        hessian: "full": one system over all parameters; "per_tensor": one for each parameter tensor, with its own
            diagonal block of H and its own feasibility check (what the authors' Keras optimizer does).
        preconditioner: "identity", "diagonal" (1/(g^2 + tau)^0.75) or a `KFAC` of the same model, whose `step` is never
            called; with "full" only. On several ranks it needs `Sharding(gather="inverses")`.
        line_search: halve the step until the loss falls enough (Armijo); the authors have none.
        warm_start: in [0, 1]: CG starts from this multiple of the last direction; 0 is the authors' zero start.
        product: "reverse", "forward" or "compiled" Hessian-vector products (`HessianOperator`); "auto": that of the
            first two, "fastest": that of all three that a first measurement finds fastest; `explain()` names it.
            Compiling takes seconds to minutes. Measured times differ from run to run: name one for bitwise
            reproducible training.
        keep_history: record residual norms in `solves`.
        groups: settings by module pattern, [{"modules": "layer1.*", "lr": 0.1}, ...]; all but lr must agree.
        maximize: ascend instead of descend.
        process_group: the ranks that train the model together, as for `KFAC`; "alone": this one.
        data_parallel: on several ranks, "exact_products": gradients and products are means over ranks, one all-reduce
            for each product, so that a step is that of one process on all batches together. "average_updates": each
            rank solves for its own batch and the directions are averaged, one all-reduce for each step (the paper).
        compile: True, or arguments for `torch.compile`: what lies between products, recurrences and the move of
            weights, becomes a few graphs when it first runs. `product="compiled"` compiles products.

    A loss is a mean over the ranks' losses. If their batches differ in size, let each be (ranks / all samples) times
    its sum.

    Raises:
        ConfigurationError: an argument out of range.

    Source: Reiz, Neckel, Bungartz 2022, arXiv 2208.02017, Algorithm 2, and the authors' code.

    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1.0,
        *,
        tau: float | Tensor = 1e-5,
        cg_tol: float = 1e-5,
        cg_max_iter: int = 20,
        stop: str = "reiz",
        negative_curvature: NegativeCurvature = "exit",
        feasibility: Feasibility = "code",
        hessian: Literal["full", "per_tensor"] = "full",
        preconditioner: PreconditionerArgument = "identity",
        line_search: bool = False,
        warm_start: float = 0.0,
        product: Product = "auto",
        keep_history: bool = False,
        groups: Sequence[Mapping[str, Any]] = (),
        maximize: bool = False,
        process_group: Where = "auto",
        data_parallel: DataParallel = "exact_products",
        compile: bool | Mapping[str, Any] = False,
    ) -> None:
        choose("data_parallel", data_parallel, get_args(DataParallel))
        choose("stop", stop, tuple(RULES))
        choose("negative_curvature", negative_curvature, get_args(NegativeCurvature))
        choose("feasibility", feasibility, get_args(Feasibility))
        choose("hessian", hessian, ("full", "per_tensor"))
        choose("product", product, get_args(Product))
        if not 0 <= warm_start <= 1:
            raise ConfigurationError(f"expected warm_start in [0, 1], got {warm_start}")
        if hessian == "per_tensor" and isinstance(preconditioner, KFAC):
            raise ConfigurationError("expected hessian='full' with K-FAC, whose blocks span tensors, got 'per_tensor'")
        self.hessian = hessian
        self._exact = data_parallel == "exact_products"
        self._warm = warm_start > 0
        defaults = {
            "lr": lr,
            "tau": tau,
            "cg_tol": cg_tol,
            "cg_max_iter": cg_max_iter,
            "stop": stop,
            "negative_curvature": negative_curvature,
            "feasibility": feasibility,
            "line_search": line_search,
            "warm_start": warm_start,
            "product": product,
            "chosen_product": None if product in ("auto", "fastest") else product,
            "keep_history": keep_history,
            "maximize": maximize,
        }
        super().__init__(model, defaults, groups, preconditioner, process_group, compile)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        if not float(group["tau"]) >= 0 or not group["cg_tol"] >= 0 or group["cg_max_iter"] < 1:
            raise ConfigurationError(
                "expected tau >= 0, cg_tol >= 0 and cg_max_iter >= 1, got "
                f"{float(group['tau'])}, {group['cg_tol']}, {group['cg_max_iter']}"
            )

    def _init_state(self, p: Parameter) -> None:
        if self._warm:
            self.state[p]["direction"] = torch.zeros_like(widened([p])[0], requires_grad=False)

    @never_traced
    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Tensor:  # type: ignore[override]  # the closure is a must
        """One Newton step on `closure() -> loss`; returns the loss before it.

        Raises:
            ClosureError: the closure returned something else than a scalar loss.
            NoGraphError: a loss without graph.
            NonFiniteError: the loss or its gradient is not finite; parameters and state stay as they are.
            UnsupportedOpError: an op in the closure has no second derivative; says which.

        """
        return self._take_step(closure)

    @stage("step", payload=lambda optimizer, closure: optimizer.param_groups[0]["step"])
    def _take_step(self, closure: Callable[[], Any]) -> Tensor:
        start = self._start(closure, HessianOperator, self._exact)
        self.solves = []
        last = self._last(start) if self._warm else None
        if self.hessian == "full":
            direction = self._direction(start.product, start, start.params, start.gradient, last)
        else:
            direction = []
            for i, (p, g) in enumerate(zip(start.params, start.gradient, strict=True)):
                local = start.operator.block(i)
                product = self._mean_product(local) if self._exact else local
                direction += self._direction(product, start, [p], [g], last and [last[i]])
        if not self._exact:
            direction = self._mean.vectors(direction)
        trial, step = self._move(start, direction, as_loss)
        if self._shared("line_search"):
            slope = float(dot(start.gradient, step))
            slope = slope if self._exact else self._mean.number(slope)
            trial.backtrack(step, float(start.loss), slope, trial.loss())
        if self._warm:
            torch._foreach_copy_(self._kept(start), start.weights.own(direction))
        return self._end(start)

    def _kept(self, start: Start[HessianOperator]) -> Vectors:
        return start.weights.kept([self.state[p]["direction"] for p in start.params])

    def _last(self, start: Start[HessianOperator]) -> Vectors:
        """Where CG starts: `warm_start` times the last direction."""
        directions = start.weights.whole([self.state[p]["direction"] for p in start.params])
        return list(torch._foreach_mul(directions, self._shared("warm_start")))

    def _direction(
        self,
        product: Callable[[Vectors], Vectors],
        start: Start[HessianOperator],
        params: Sequence[Parameter],
        gradient: Vectors,
        last: Vectors | None,
    ) -> Vectors:
        """The feasible solution d of one system (H + tau I) d = -g."""
        tau = number(self._shared("tau"))
        preconditioner = self._preconditioner(start.closure, as_loss, params, gradient, tau)
        result = self._solve(product, gradient, tau, self._shared("cg_max_iter"), preconditioner, last)
        slope = dot(gradient, result.solution)
        feasible = slope < -tau if self._shared("feasibility") == "code" else slope <= tau
        self.solves.append(Solve.of(result, fell_back=~feasible))
        return [torch.where(feasible, d, -g) for d, g in zip(result.solution, gradient, strict=True)]

    def _curvature(self) -> str:
        scope = "the full Hessian" if self.hessian == "full" else "the Hessian's diagonal block of each tensor"
        return f"{scope} + {float(self._shared('tau'))} I"
