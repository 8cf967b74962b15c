"""What NewtonCG and SGN share: parameter groups by module pattern, closures, preconditioners, line search, reports."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from triton_curv.costs import Cost, update_cost
from triton_curv.errors import ConfigurationError
from triton_curv.nvtx import stage
from triton_curv.operators.cg import CGResult, StoppingRule, cg
from triton_curv.operators.choice import Choice
from triton_curv.operators.errors import ClosureError
from triton_curv.operators.frozen import Closure, FrozenClosure
from triton_curv.operators.ggn import GaussNewtonOperator
from triton_curv.operators.hvp import HessianOperator
from triton_curv.operators.loss import check_finite
from triton_curv.operators.recurrences import EAGER, Recurrences
from triton_curv.operators.vectors import Vectors, add_scaled, dot, working_dtype, zeros_like
from triton_curv.optimizers.copies import Rebuilt
from triton_curv.optimizers.kfac import KFAC
from triton_curv.optimizers.preconditioner import (
    KFACPreconditioner,
    Preconditioner,
    diagonal_preconditioner,
    require_all_inverses,
)
from triton_curv.optimizers.state import load_state_in_place
from triton_curv.sharding.mean import RankMean
from triton_curv.sharding.ranks import Where, find_ranks
from triton_curv.sharding.weights import GatheredWeights, ReplicatedWeights, Weights

PreconditionerArgument = Literal["identity", "diagonal"] | KFAC

Step = TypeVar("Step", bound=Callable[..., Any])
Operator = TypeVar("Operator", HessianOperator, GaussNewtonOperator)

METHODS = ("reverse", "forward", "jvp", "double_vjp", "compiled")

ARMIJO_SLOPE, SHRINK, MAX_SHRINKS = 1e-4, 0.5, 10


@dataclass
class Start(Generic[Operator]):
    """Where a step starts: the frozen closure, the trained parameters, the product there, gradient and loss.

    `weights.tensors` are what the product is taken at and what the step moves. On several ranks the gradient and the
    product are means over them with `exact_products`, this rank's own with `average_updates`; the loss is the mean.
    """

    closure: FrozenClosure
    params: list[Parameter]
    weights: Weights
    operator: Operator
    product: Callable[[Vectors], Vectors]
    gradient: Vectors
    loss: Tensor


@dataclass(frozen=True)
class Solve:
    """How one CG solve of the last step went; tensors on the parameters' device, so that nobody waits for them.

    Args:
        iterations: iterations that moved the solution, ().
        end: index into `triton_curv.operators.cg.ENDS`, ().
        history: residual norms (max_iter + 1,), NaN after the end, if asked for.
        fell_back: whether the negative gradient was taken instead of the solution, ().

    """

    iterations: Tensor
    end: Tensor
    history: Tensor | None
    fell_back: Tensor

    @classmethod
    def of(cls, result: CGResult, fell_back: Tensor) -> "Solve":
        """The parts of a CG result that are worth keeping."""
        return cls(result.iterations, result.end, result.history, fell_back)


@dataclass(frozen=True)
class Explanation:
    """What an optimizer does with which parameter; `print` it.

    `product` is None until the first step has chosen one.
    """

    optimizer: str
    curvature: str
    product: Choice | None
    preconditioner: str
    trained: Mapping[str, tuple[int, ...]]
    left_out: Mapping[str, str]
    frozen_buffers: Sequence[str]

    def __str__(self) -> str:
        numbers = sum(math.prod(shape) for shape in self.trained.values())
        lines = [
            f"{self.optimizer}: {self.curvature} over {len(self.trained)} parameters, {numbers} numbers",
            f"product: {self.product or 'chosen at the first step'}",
            f"preconditioner: {self.preconditioner}",
            *(f"not trained: {name}: {why}" for name, why in self.left_out.items()),
        ]
        if self.frozen_buffers:
            lines.append("moved once a step, cloned for all other passes: " + ", ".join(self.frozen_buffers))
        return "\n".join(lines)


class MatrixFree(Rebuilt):
    """Base of the optimizers that see curvature through products alone; the subclass adds state and `step`."""

    preconditioner_exponent = 0.75

    def __init__(
        self,
        model: nn.Module,
        defaults: dict[str, Any],
        groups: Sequence[Mapping[str, Any]],
        preconditioner: PreconditionerArgument,
        process_group: Where = "auto",
        compile: bool | Mapping[str, Any] = False,
    ) -> None:
        if not (isinstance(preconditioner, KFAC) or preconditioner in ("identity", "diagonal")):
            raise ConfigurationError(
                f"expected preconditioner 'identity', 'diagonal' or a KFAC of the model, got {preconditioner!r}"
            )
        self._found = find_ranks(model, process_group)
        model = self._found.model
        self.model = model
        self.solves: list[Solve] = []
        self._recurrences = Recurrences({} if compile is True else compile or None)
        self._names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self._choice: Choice | None = None
        super().__init__(_param_groups(model, defaults, groups), defaults)
        self._mean = RankMean(self._found, self.param_groups[0]["params"][0].device)
        self._opt_called = True  # an LR scheduler looks for it
        if isinstance(preconditioner, KFAC):
            require_all_inverses(preconditioner, self._found)
        self._diagonal = preconditioner == "diagonal"
        self._kfac = KFACPreconditioner(preconditioner, self._names) if isinstance(preconditioner, KFAC) else None

    # ---- groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model, unfrozen since, say; see `torch.optim.Optimizer.add_param_group`.

        Raises:
            ConfigurationError: not the model's, not real floating-point numbers, or on several devices.

        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except ConfigurationError:
            self.param_groups.pop()
            raise
        group["step"] = self.param_groups[0].get("step", 0)
        if hasattr(self, "_opt_called"):  # not the constructor's own
            self._late.append(group)
        for p in group["params"]:
            self._init_state(p)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        devices = {p.device for g in self.param_groups for p in g["params"]}
        if len(devices) > 1:
            raise ConfigurationError(f"expected all parameters on one device, got {sorted(map(str, devices))}")
        for p in group["params"]:
            if p not in self._names:
                raise ConfigurationError(f"expected parameters of the model, got another of shape {tuple(p.shape)}")
            if not p.is_floating_point():
                raise ConfigurationError(f"expected real floating-point parameters, got {p.dtype}: {self._names[p]}")
        value = float(group["lr"])
        if not (math.isfinite(value) and value >= 0):
            raise ConfigurationError(f"expected lr >= 0, got {value}")

    def _init_state(self, p: Parameter) -> None:
        raise ConfigurationError("expected a subclass")

    def _shared(self, name: str) -> Any:
        """A hyper-parameter of the joint system, which must be the same in all groups."""
        first = self.param_groups[0][name]
        if any(group[name] is not first and group[name] != first for group in self.param_groups[1:]):
            found = [group[name] for group in self.param_groups]
            raise ConfigurationError(f"expected one {name} for all groups, which are solved together, got {found}")
        return first

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a state into the existing buffers.

        Raises StateMismatchError if the state is of another model or optimizer.
        """
        with torch.no_grad():
            load_state_in_place(self, state_dict)
        chosen = self.param_groups[0]["chosen_product"]
        self._choice = None if chosen is None else Choice(chosen)

    # ---- pieces of a step

    def _start(self, closure: Closure, operator: type[Operator], exact: bool = True) -> Start[Operator]:
        """Run the closure for the first time: loss and gradient, checked, and the product, built.

        `exact`: on several ranks, gradient and product are means over them.
        """
        params = list(self._trained().values())
        weights = self._weights(params)
        frozen = self._freeze(negated(closure) if self._shared("maximize") else closure, weights)
        method: Any = self._method()
        with self._mean.agreeing("run their closures"):
            local = operator(frozen, weights.tensors, method, self._first_step())
        gradient: Vectors = widened(local.gradient)
        if exact:
            loss, *gradient = self._mean.vectors([local.loss, *gradient])
            squares = dot(gradient, gradient)
        else:
            loss, squares = self._mean.vectors([local.loss, dot(gradient, gradient)])
        check_finite(loss, squares)
        product = self._mean_product(local) if exact else local
        return Start(frozen, params, weights, local, product, gradient, loss)

    def _mean_product(self, local: Callable[[Vectors], Vectors]) -> Callable[[Vectors], Vectors]:
        """v -> the mean of H v over ranks."""
        return local if self._mean.size == 1 else lambda vectors: self._mean.vectors(local(vectors))

    def _weights(self, params: Sequence[Parameter]) -> Weights:
        """What this step differentiates by and moves."""
        if self._found.wrapper == "fsdp":
            return GatheredWeights(params, self.model)
        return Weights(params) if self._found.ddp is None else ReplicatedWeights(params, self._found.ddp)

    @stage("cg", payload=lambda optimizer, product, gradient, damping, max_iter, *_: solving_cost(gradient, max_iter))
    def _solve(
        self,
        product: Callable[[Vectors], Vectors],
        gradient: Vectors,
        damping: float | Tensor,
        max_iter: int,
        preconditioner: Preconditioner | None,
        start: Vectors | None = None,
    ) -> CGResult:
        """CG on (product + damping I) d = -gradient, by the shared settings."""
        return cg(
            damped(product, damping),
            torch._foreach_neg(gradient),
            StoppingRule.named(self._shared("stop"), self._shared("cg_tol")),
            max_iter,
            start=start,
            preconditioner=preconditioner,
            negative_curvature=self._shared("negative_curvature"),
            keep_history=self._shared("keep_history"),
            recurrences=self._recurrences,
        )

    @stage("update", payload=lambda optimizer, start, *_: update_cost(sum(p.numel() for p in start.params)))
    def _move(
        self, start: Start[Operator], direction: Vectors, loss_of: Callable[[Any], Tensor]
    ) -> "tuple[Trial, Vectors]":
        """Go the whole step, lr times the direction; returns what can shorten it, and the step."""
        self._note_choice(start.operator.choice)
        start.operator.release()  # the weights that its graphs hold change now
        step = self._scaled(direction)
        trial = Trial(start.weights.tensors, start.closure, loss_of, self._mean, self._recurrences)
        trial.move(step)
        return trial, step

    def _end(self, start: Start[Operator]) -> Tensor:
        """Keep the weights as they are now, count the step; the loss before it, in the closure's sign."""
        start.weights.write_back()
        self._count_step()
        loss = start.loss
        return -loss if self._shared("maximize") else loss

    def _freeze(self, closure: Closure, weights: Weights, eager: bool = True) -> FrozenClosure:
        if not callable(closure):
            raise ClosureError(
                f"{type(self).__name__}.step needs a closure that computes the loss and does not call backward(), "
                f"got {closure!r}"
            )
        if self._kfac is not None:
            self._kfac.taps_off()
        return FrozenClosure(self.model, closure, weights, eager)

    def _trained(self) -> dict[str, Parameter]:
        return {self._names[p]: p for group in self.param_groups for p in group["params"] if p.requires_grad}

    def _method(self) -> str:
        return self.param_groups[0]["chosen_product"] or str(self._shared("product"))

    def _first_step(self) -> bool:
        return self.param_groups[0]["step"] == 0 or self._choice is None

    def _note_choice(self, choice: Choice | None) -> None:
        if choice is not None and (self._choice is None or self._choice.name != choice.name):
            if self._mean.size > 1 and self._method() not in METHODS:  # they were timed: all ranks take the same
                choice = replace(choice, name=METHODS[self._mean.first_of(METHODS.index(choice.name))])
            self._choice = choice
            for group in self.param_groups:
                group["chosen_product"] = choice.name

    def _count_step(self) -> int:
        for group in self.param_groups:
            group["step"] += 1
        return int(self.param_groups[0]["step"])

    def _preconditioner(
        self,
        closure: FrozenClosure,
        loss_of: Callable[[Any], Tensor],
        params: Sequence[Tensor],
        gradient: Vectors,
        damping: float | Tensor,
    ) -> Preconditioner | None:
        """The preconditioner for vectors shaped as `params`."""
        if self._diagonal:
            return diagonal_preconditioner(gradient, damping, self.preconditioner_exponent)
        if self._kfac is None:
            return None
        if self.param_groups[0]["step"] % self._kfac.interval == 0:
            self._kfac.refresh(closure, loss_of, params)
        return self._kfac.on(params)

    def _scaled(self, direction: Vectors) -> Vectors:
        """lr times the direction, group by group."""
        trained = [(p, group["lr"]) for group in self.param_groups for p in group["params"] if p.requires_grad]
        rates = [self._recurrences.number(number(lr), d) for (_, lr), d in zip(trained, direction, strict=True)]
        step: Vectors = self._recurrences.scaled(direction, rates)
        return [part.view_as(d) for part, d in zip(step, direction, strict=True)]

    def explain(self) -> Explanation:
        """Which parameters are trained with what curvature and which product; printable."""
        trained = self._trained()
        kfac = self._kfac
        covered = f"K-FAC, except {', '.join(kfac.uncovered) or 'nothing'}" if kfac else "identity"
        return Explanation(
            optimizer=type(self).__name__,
            curvature=self._curvature(),
            product=self._choice,
            preconditioner="diagonal, (g^2 + damping)^-0.75" if self._diagonal else covered,
            trained={name: tuple(p.shape) for name, p in trained.items()},
            left_out={
                name: "frozen" if not p.requires_grad else "frozen when the optimizer was built; add_param_group"
                for p, name in self._names.items()
                if name not in trained
            },
            frozen_buffers=[name for name, _ in self.model.named_buffers()],
        )

    def _curvature(self) -> str:
        raise ConfigurationError("expected a subclass")


class Trial:
    """The weights before a step, and moves away from them and back.

    Losses are those of the same batch, random numbers and buffers as the gradient's; means over ranks.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        closure: FrozenClosure,
        loss_of: Callable[[Any], Tensor],
        mean: RankMean,
        recurrences: Recurrences = EAGER,
    ) -> None:
        self._mean = mean
        self._recurrences = recurrences
        self._params = list(params)
        self._weights = [p.detach().clone() for p in params]
        self._closure = closure
        self._loss_of = loss_of

    def move(self, step: Vectors, scale: float = 1.0) -> None:
        """w = w_0 + scale step, in place."""
        at = self._recurrences.number(scale, self._weights[0])
        self._recurrences.move_(self._params, self._weights, step, at)

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Put the weights before the step back if what runs inside ends with an exception, Ctrl-C included."""
        try:
            yield
        except BaseException:
            torch._foreach_copy_(self._params, self._weights)
            raise

    def loss(self) -> float:
        """The loss at the weights as they are; if that raises, they are those before the step."""
        total = 0.0

        def take(result: Any) -> None:
            nonlocal total
            total += float(self._loss_of(result))

        with self.restoring():
            self._closure.again(take)
            return self._mean.number(total)

    @stage("line search", payload=lambda trial, *_: MAX_SHRINKS)
    def backtrack(self, step: Vectors, loss_before: float, slope: float, loss_now: float) -> float:
        """Armijo's rule: halve until L(w_0 + s step) <= L(w_0) + 1e-4 s slope, ten times at most; returns s.

        The weights are at s = 1, where the loss is `loss_now`, at the start and at s in the end. After ten halvings the
        step is taken as it is (arXiv 2006.02409, the authors' code), but not to a loss that is not finite: s = 0 then.
        """
        scale, halvings = 1.0, 0
        while not loss_now <= loss_before + ARMIJO_SLOPE * scale * slope and halvings < MAX_SHRINKS:
            scale, halvings = scale * SHRINK, halvings + 1
            self.move(step, scale)
            loss_now = self.loss()
        if not math.isfinite(loss_now):
            scale = 0.0
            self.move(zeros_like(step))
        return scale


def solving_cost(vectors: Vectors, iterations: int) -> Cost:
    """At most: a CG solve's recurrences and dots, products and preconditioner apart: x, r, p and A p, 10 operations."""
    numel = sum(v.numel() for v in vectors)
    moved = sum(v.nbytes for v in vectors)
    return Cost(10 * numel * iterations, 9 * moved * iterations)


def never_traced(step: Step) -> Step:
    """`torch.compiler.disable`, typed: one solve is many products on graphs that live across them."""
    untraced: Step = torch.compiler.disable(step)
    # A scheduler wraps `step` to see that it is called; compiled before that, `step` would be called unseen.
    vars(untraced)["_wrapped_by_lr_sched"] = True
    return untraced


def negated(closure: Closure) -> Closure:
    """The closure with the sign of its losses turned."""

    def turn(result: Any) -> Any:
        if isinstance(result, Tensor):
            return -result
        if isinstance(result, tuple) and result and isinstance(result[0], Tensor):
            return (-result[0], *result[1:])
        return result

    def negative() -> Any:
        results = closure()
        if isinstance(results, list):
            return [turn(result) for result in results]
        return (turn(r) for r in results) if isinstance(results, Iterator) else turn(results)

    return negative


def number(value: float | Tensor) -> float | Tensor:
    """A float for a CPU tensor; a tensor on an accelerator stays there, since reading it would wait for the device."""
    return value.item() if isinstance(value, Tensor) and value.device.type == "cpu" else value


def widened(tensors: Sequence[Tensor]) -> Vectors:
    """The tensors in the solver's dtype: fp64 as they are, all narrower ones in fp32."""
    return [t.to(working_dtype(t)) for t in tensors]


def damped(product: Callable[[Vectors], Vectors], damping: float | Tensor) -> Callable[[Vectors], Vectors]:
    """v -> (H + damping I) v."""
    return lambda vectors: add_scaled(product(vectors), vectors, damping)


def _param_groups(
    model: nn.Module, defaults: Mapping[str, Any], overrides: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The model's trainable parameters, those of an override's modules with its settings; the first match wins."""
    for override in overrides:
        if "modules" not in override or set(override) - set(defaults) - {"modules"}:
            raise ConfigurationError(
                f"expected a group with 'modules' and any of {sorted(defaults)}, got {sorted(override)}"
            )
    patterns = [[o["modules"]] if isinstance(o["modules"], str) else o["modules"] for o in overrides]
    params: list[list[Parameter]] = [[] for _ in range(len(overrides) + 1)]
    for name, p in model.named_parameters():
        if p.requires_grad:
            module = name.rpartition(".")[0]
            matches = (i for i, group in enumerate(patterns) if any(fnmatchcase(module, one) for one in group))
            params[next(matches, len(overrides))].append(p)
    empty = [pattern for pattern, group in zip(patterns, params, strict=False) if not group]
    if empty:
        raise ConfigurationError(f"expected every group pattern to match a trainable module, got no match for {empty}")
    if not any(params):
        raise ConfigurationError(f"expected a model with trainable parameters, got none in {type(model).__name__}")
    settings = [{k: v for k, v in o.items() if k != "modules"} for o in overrides] + [{}]
    return [{"params": p, **setting} for p, setting in zip(params, settings, strict=True) if p]
