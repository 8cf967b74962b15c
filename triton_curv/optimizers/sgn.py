"""Stochastic Gauss-Newton: damped Gauss-Newton steps by conjugate gradients (arXiv 2006.02409)."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from triton_curv.damping import ConstantDamping, DampingRule, LevenbergMarquardt
from triton_curv.errors import ConfigurationError
from triton_curv.nvtx import stage
from triton_curv.operators.cg import RULES, NegativeCurvature
from triton_curv.operators.ggn import GaussNewtonOperator
from triton_curv.operators.loss import as_loss_and_output
from triton_curv.operators.vectors import Vectors, add_scaled, dot, working_dtype, zeros_like
from triton_curv.optimizers.groups import choose
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

Product = Literal["auto", "fastest", "jvp", "double_vjp", "compiled"]


def predicted_change(gradient: Vectors, direction: Vectors, damped_product: Vectors) -> Tensor:
    """g.d + d.(G + rho I)d / 2: what the damped quadratic model says the loss changes by."""
    return dot(gradient, direction) + 0.5 * dot(direction, damped_product)


class SGN(MatrixFree):
    r"""w <- w + lr s d, (J^T H_L J + rho I) d = -g solved by CG, rho by trust region, s by line search.

    `step(closure)` wants a closure that returns (loss, output), without `backward()`: the loss a function of the
    output, the output the network's before the nonlinearity that belongs to the loss (logits). Parts of the loss that
    do not pass through the output, weight decay say, count in g but have no curvature here. Gradients in `p.grad` are
    neither read nor written. `step` returns the loss before the step. For micro-batches the closure returns a list of
    pairs, whose graphs are all kept, or is a generator that yields them, run again for each product with one graph
    alive at a time; the sum of the losses is what is minimised. The closure sees the same random numbers in every
    pass of a step, BatchNorm's running statistics move once; it must see the same batch in all passes.

    The first `cg_first_steps` steps make at most `cg_first_iter` iterations of CG whatever `cg_max_iter` says, as in
    every logged run of the authors. With a trust region, the loss of the full step is compared with the model's
    prediction and rho follows (`LevenbergMarquardt`, the rule that KFAC takes too); the step is taken all the same.

    Args:
        model: its parameters that require a gradient are trained.
        lr: step size; 1 needs no tuning. A float or a 0-dim tensor.
        damping: rho, at the start; with `trust_region=False` always, read at each step from `param_groups`.
        damping_min: the least rho a trust region goes down to.
        cg_tol: tolerance of CG.
        cg_max_iter: limit of its iterations.
        cg_first_iter: the limit in the first steps.
        cg_first_steps: how many steps those are.
        stop: "gargiani": max|r| <= cg_tol after one iteration at least (the authors' code), "reiz", "relative".
        negative_curvature: "exit" or "ignore"; J^T H_L J has none if the loss is convex in the output.
        trust_region: adapt rho, by 3/2 below a ratio of 1/4 and by 2/3 above 3/4.
        damping_rule: another rule, as KFAC takes them: a `LevenbergMarquardt` of your own moves rho, and with
            `reject` takes back steps that raise the loss; schedules multiply the groups' `damping`.
        line_search: halve the step until the loss falls enough (Armijo, c = 1e-4, at most 10 times).
        momentum: in [0, 1): the right-hand side is the bias-corrected moving average of gradients.
        preconditioner: "identity", "diagonal" (1/(m^2 + rho)^0.75) or a `KFAC` of the same model, whose `step` is never
            called. On several ranks it needs `Sharding(gather="inverses")`.
        product: how J v is made, "jvp", "double_vjp" or "compiled" (`GaussNewtonOperator`); "auto": that of the first
            two, "fastest": that of all three that a first measurement finds fastest; `explain()` names it. Compiling
            takes seconds to minutes. Measured times differ from run to run: name one for bitwise reproducible training.
        keep_history: record residual norms in `solves`.
        groups: settings by module pattern, [{"modules": "layer1.*", "lr": 0.1}, ...]; all but lr must agree.
        maximize: ascend instead of descend.
        process_group: the ranks that train the model together, as for `KFAC`; "alone": this one. Gradients, products
            and losses are means over ranks, one all-reduce for each product, so that a step is that of one process on
            all batches together. If these differ in size, let each loss be (ranks / all samples) times its sum.
        compile: True, or arguments for `torch.compile`: what lies between products, recurrences and the move of
            weights, becomes a few graphs when it first runs. `product="compiled"` compiles products.

    Raises:
        ConfigurationError: an argument out of range.

    Source: Gargiani, Zanelli, Diehl, Hutter 2020, arXiv 2006.02409, and the authors' code.

    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1.0,
        *,
        damping: float | Tensor = 1e-4,
        damping_min: float = 1e-6,
        cg_tol: float = 1e-6,
        cg_max_iter: int = 10,
        cg_first_iter: int = 10,
        cg_first_steps: int = 9,
        stop: str = "gargiani",
        negative_curvature: NegativeCurvature = "exit",
        trust_region: bool = True,
        damping_rule: DampingRule | None = None,
        line_search: bool = True,
        momentum: float = 0.0,
        preconditioner: PreconditionerArgument = "identity",
        product: Product = "auto",
        keep_history: bool = False,
        groups: Sequence[Mapping[str, Any]] = (),
        maximize: bool = False,
        process_group: Where = "auto",
        compile: bool | Mapping[str, Any] = False,
    ) -> None:
        choose("stop", stop, tuple(RULES))
        choose("negative_curvature", negative_curvature, get_args(NegativeCurvature))
        choose("product", product, get_args(Product))
        if not 0 <= momentum < 1:
            raise ConfigurationError(f"expected momentum in [0, 1), got {momentum}")
        self._momentum = momentum
        self._own_rule = damping_rule
        defaults = {
            "lr": lr,
            "damping": damping,
            "damping_min": damping_min,
            "cg_tol": cg_tol,
            "cg_max_iter": cg_max_iter,
            "cg_first_iter": cg_first_iter,
            "cg_first_steps": cg_first_steps,
            "stop": stop,
            "negative_curvature": negative_curvature,
            "trust_region": trust_region,
            "line_search": line_search,
            "product": product,
            "chosen_product": None if product in ("auto", "fastest") else product,
            "keep_history": keep_history,
            "maximize": maximize,
        }
        super().__init__(model, defaults, groups, preconditioner, process_group, compile)
        first = self.param_groups[0]["params"][0]
        self.state[first]["damping"] = torch.as_tensor(damping, dtype=working_dtype(first), device=first.device).clone()

    @property
    def damping(self) -> Tensor:
        """The rho of the next step, ()."""
        factor = self._rule.factor(int(self.param_groups[0]["step"]))
        if self._rule.interval:
            return self._adapted * factor
        return torch.as_tensor(self._shared("damping"), dtype=torch.float64) * factor

    @property
    def _adapted(self) -> Tensor:
        found: Tensor = self.state[self.param_groups[0]["params"][0]]["damping"]
        return found

    @property
    def _rule(self) -> DampingRule:
        if self._own_rule is not None:
            return self._own_rule
        if self._shared("trust_region"):
            return LevenbergMarquardt(interval=1, least=self._shared("damping_min"), most=math.inf)
        return ConstantDamping()

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        numbers = {name: float(group[name]) for name in ("damping", "damping_min", "cg_tol")}
        if not all(math.isfinite(value) and value >= 0 for value in numbers.values()):
            raise ConfigurationError(f"expected numbers >= 0, got {numbers}")
        limits = {name: group[name] for name in ("cg_max_iter", "cg_first_iter", "cg_first_steps")}
        if limits["cg_max_iter"] < 1 or limits["cg_first_iter"] < 1 or limits["cg_first_steps"] < 0:
            raise ConfigurationError(f"expected at least 1 iteration of CG and no negative steps, got {limits}")

    def _init_state(self, p: Parameter) -> None:
        if self._momentum:
            self.state[p]["momentum_buffer"] = torch.zeros_like(widened([p])[0], requires_grad=False)

    @never_traced
    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Tensor:  # type: ignore[override]  # the closure is a must
        """One Gauss-Newton step on `closure() -> (loss, output)`; returns the loss before it.

        Raises:
            ClosureError: the closure returned something else, or a loss that is no function of the output.
            NoGraphError: a loss or an output without graph.
            NonFiniteError: the loss or its gradient is not finite; parameters and state stay as they are.
            UnsupportedOpError: an op in the closure lacks a derivative that the product needs; says which.

        """
        return self._take_step(closure)

    @stage("step", payload=lambda optimizer, closure: optimizer.param_groups[0]["step"])
    def _take_step(self, closure: Callable[[], Any]) -> Tensor:
        start = self._start(closure, GaussNewtonOperator)
        steps = int(self.param_groups[0]["step"]) + 1
        average = self._averaged(start, steps)
        rho = self.damping
        preconditioner = self._preconditioner(start.closure, _loss_of, start.params, average, number(rho))
        limit = self._shared("cg_first_iter" if steps <= self._shared("cg_first_steps") else "cg_max_iter")
        result = self._solve(start.product, average, number(rho), limit, preconditioner)
        self.solves = [Solve.of(result, fell_back=torch.zeros_like(result.end, dtype=torch.bool))]

        direction = result.solution
        trial, step = self._move(start, direction, _loss_of)
        rule, line_search = self._rule, self._shared("line_search")
        measures = rule.interval > 0 and (steps - 1) % rule.interval == 0
        if measures or line_search:
            before, after = float(start.loss), trial.loss()
            if measures:
                product = torch._foreach_neg(add_scaled(average, result.residual, 1.0))  # (G + rho I) d = -m - r
                change = float(predicted_change(start.gradient, direction, list(product)))
                ratio = (after - before) / change if change < 0 else math.nan
                if change != 0 or bool(dot(start.gradient, start.gradient) > 0):
                    self._adapted.copy_(rule.adapt(self._adapted, torch.tensor(ratio, dtype=torch.float64)))
            if line_search:
                trial.backtrack(step, before, float(dot(average, step)), after)
            if measures and rule.reject and not (trial.loss() if line_search else after) <= before:
                trial.move(zeros_like(step))
        return self._end(start)

    def _averaged(self, start: Start[GaussNewtonOperator], steps: int) -> Vectors:
        """The bias-corrected moving average of gradients, this one included; the gradient itself without momentum."""
        beta = self._momentum
        if not beta:
            return start.gradient
        buffers = [self.state[p]["momentum_buffer"] for p in start.params]
        torch._foreach_lerp_(start.weights.kept(buffers), start.weights.own(start.gradient), 1 - beta)
        return list(torch._foreach_div(start.weights.whole(buffers), 1 - beta**steps))

    def _curvature(self) -> str:
        return f"the Gauss-Newton matrix J^T H_L J + {float(self.damping)} I"


def _loss_of(result: Any) -> Tensor:
    return as_loss_and_output(result).loss
