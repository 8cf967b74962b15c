"""Neumann optimizer: the inverse Hessian implicitly, by Neumann iterates, at one gradient a step."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, StateDict

from triton_curv.costs import Cost
from triton_curv.errors import ConfigurationError, EvaluationModeError, SparseGradientError, StateMismatchError
from triton_curv.graphs import Graphs
from triton_curv.nvtx import stage
from triton_curv.optimizers.hyper import write_rows_
from triton_curv.optimizers.neumann_step import (
    SLOTS,
    Gradients,
    GroupTensors,
    Phase,
    Plan,
    gradients_of,
    norm,
    step_groups_,
)
from triton_curv.optimizers.state import load_state_in_place
from triton_curv.optimizers.traced import begin_step_, register
from triton_curv.optimizers.watchers import watchable
from triton_curv.sharding.ranks import mesh_of
from triton_curv.sharding.weights import local_of
from triton_curv_kernels.neumann import neumann_update_


def next_reset(t: int, period: int) -> int:
    """The first reset after main-loop step t: of 1, 1 + K, 1 + 3K, 1 + 7K, ... with K = period, the first above t.

    arXiv 1712.03298, Algorithm 2 line 6 with a K that doubles after each reset (Table 1). t <= 0 means warm-up.
    """
    if t < 1:
        return 1
    return 1 + period * ((1 << ((t - 1) // period + 1).bit_length()) - 1)


def mu_at(t: int, mu: tuple[float, float], mu_steps: float) -> float:
    """mu(t) = clip(1 - 1/(1 + t/mu_steps), mu[0], mu[1]); arXiv 1712.03298 Table 1. t <= 0 means warm-up: mu[0]."""
    return min(max(1 - 1 / (1 + max(t, 0) / mu_steps), mu[0]), mu[1])


def neumann_cost(params: Sequence[Tensor]) -> Cost:
    """Of Algorithm 2's update of all parameters: gradient read, w, m and v read and written, 14 operations a number."""
    numel = sum(p.numel() for p in params)
    return Cost(14 * numel, sum(3 * p.nbytes for p in params) + 4 * 4 * numel)


class Neumann(Optimizer):
    r"""w <- w + mu m - lr d, m <- mu m - lr d: Nesterov momentum on grad + regulariser, with doubling restarts.

    One step of Algorithm 2 (arXiv 1712.03298), with D = ||w - v||_2 over all parameters and n variables:

        d = grad + (alpha D^2 - beta n / D^2) (w - v) / D
        m = mu m - lr d
        w = w + mu m - lr d
        v = w + gamma (v - w)

    The parameters hold the displaced weights w; the true weights are u = w - mu m. `eval()` puts u into the parameters,
    for evaluation and export; `train()` brings w back bit for bit. State: m and v, as much memory as Adam's.

    What the listing leaves open, and what is done here:

    * Warm-up: the first `warmup` steps are SGD. v stays w_0, the weights the first step finds, and m stays 0, as line 1
      has it. So D > 0 when the repulsive term, beta n / D^2 long, comes in; with warmup=0 that term is large at first.
    * D = 0: the regulariser's gradient is 0; the denominators hold max(D, 1e-8).
    * The main loop counts t = 1, 2, ... after warm-up. t = 1 is a reset, and so are t = 1 + K, 1 + 3K, 1 + 7K, ... for
      K = `period`: m = -lr grad; w and v don't move.
    * mu(t) = clip(1 - 1/(1 + t/mu_steps), *mu). The paper gives no unit of t: main-loop steps here, unless `mu_steps`
      says how many steps make one unit.
    * On several ranks: DDP or FSDP2 average the gradients. Of parameters that FSDP2 shards each rank moves its shards
      and keeps their state; D is that of all shards, one all-reduce of a number for each group.
    * Every group has its own hyper-parameters and counts its own steps. D and n (variables that require a gradient)
      are those of all groups together. A parameter without a gradient does not move, but counts in D.

    The paper's warm-up is 5 epochs and its period 10: multiply by `len(loader)` to get `warmup` and `period`. On small
    problems (digits, Boston) 20 steps of warm-up reached low losses sooner than 100. If training blows up right after
    warm-up, D is still small: lengthen `warmup` or lower `beta`.

    Args:
        params: parameters, named parameters or groups: fp32, bf16, fp16 or fp64, on one device.
            m and v are fp32 (fp64 for fp64 parameters).
        lr: eta, a float or a 0-dim tensor; the one number to tune, says the paper.
        alpha: weight of the cubic regulariser alpha/3 ||w - v||^3, which attracts.
        beta: weight per variable of the regulariser beta n / ||w - v||, which repels.
        gamma: decay per step of the moving average v.
        mu: first and last value of mu(t); (0.9, 0.9) is constant.
        mu_steps: steps per unit of t in mu(t).
        period: steps from the first reset to the second.
        warmup: steps of SGD before the main loop.
        weight_decay: L2 coefficient; weight_decay * w is added to the gradient.
        maximize: ascend instead of descend.
        compile: True, or arguments for `torch.compile`: each kind of step becomes a graph when it first runs.

    Raises:
        ConfigurationError: a number out of range, complex parameters, parameters on several devices.

    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        *,
        alpha: float | Tensor = 1e-7,
        beta: float | Tensor = 1e-5,
        gamma: float | Tensor = 0.99,
        mu: tuple[float, float] = (0.5, 0.9),
        mu_steps: float = 1,
        period: int = 200,
        warmup: int = 20,
        weight_decay: float | Tensor = 0.0,
        maximize: bool = False,
        compile: bool | Mapping[str, Any] = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "beta": beta,
            "gamma": gamma,
            "mu": mu,
            "mu_steps": mu_steps,
            "period": period,
            "warmup": warmup,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        self._last_hyper: dict[Tensor, tuple[list[float], Tensor]] = {}
        self._shards: dist.ProcessGroup | None = None
        self._opt_called = True  # an LR scheduler built after torch.compile(opt.step) looks for it
        self._groups, self._plans, self._rows = list[GroupTensors](), list[Plan](), list[Tensor]()
        self._written: list[list[float]] | None = None  # what `_rows` holds
        self._number = register(self)
        compiling = {} if compile is True else compile
        self._graphs = None if compiling is False else Graphs(step_groups_, compiling)
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:  # what copies and unpickled optimizers lack
        super().__setstate__(state)
        self._last_hyper, self._graphs, self._number = {}, None, register(self)
        self._shards = self._find_shards()
        self._groups, self._plans, self._rows, self._written = [], [], [], None
        for group in self.param_groups:
            self._lay_out(group)

    @property
    def evaluating(self) -> bool:
        """Whether the parameters hold the true weights u, as after `eval()`, and not the displaced weights w."""
        return bool(self.param_groups[0]["evaluating"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with m = 0, v = w and a warm-up of its own; see `torch.optim.Optimizer.add_param_group`.

        Raises:
            ConfigurationError: as the constructor.
            EvaluationModeError: in `eval()` mode.

        """
        if self.param_groups and self.evaluating:
            raise EvaluationModeError("expected train() before add_param_group(), got eval() mode")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        devices = {p.device for g in self.param_groups for p in g["params"]}
        try:
            _check_group(group, devices)
            self._shards = self._find_shards()
        except ConfigurationError:
            self.param_groups.pop()
            raise
        for p in group["params"]:
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            self.state[p] = {
                "momentum_buffer": torch.zeros_like(p, dtype=dtype, requires_grad=False),
                "exp_avg": p.detach().to(dtype, copy=True),
            }
        distance_dtype = torch.float64 if any(p.dtype == torch.float64 for p in group["params"]) else torch.float32
        distance = torch.zeros((), dtype=distance_dtype, device=next(iter(devices), None))
        group.update(step=0, distance=distance, evaluating=False)
        self._lay_out(group)

    def _lay_out(self, group: Mapping[str, Any]) -> None:
        """Lists of the group's tensors, for steps that are functions of tensors."""
        distance: Tensor = group["distance"]
        if group["params"]:
            states = [self.state[p] for p in group["params"]]
            m, v = [state["momentum_buffer"] for state in states], [state["exp_avg"] for state in states]
            self._groups.append(GroupTensors(list(group["params"]), m, v, distance.view(1)))
            wide = any(each.distance.dtype == torch.float64 for each in self._groups)
            dtype = torch.float64 if wide else torch.float32
            self._written = None
            self._rows[:] = [torch.zeros(len(self._groups), len(SLOTS), dtype=dtype, device=distance.device)]
            if self._graphs is not None:
                self._graphs.settle([*m, *v, self._groups[-1].distance, *self._rows])
            self._plan()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @watchable
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step with the gradients at the displaced weights; returns the loss of `closure`, if there is one.

        Raises:
            EvaluationModeError: in `eval()` mode.
            SparseGradientError: a gradient is sparse.

        """
        if torch.compiler.is_compiling():
            if closure is not None:
                raise ConfigurationError("expected no closure in a compiled step: use Neumann(..., compile=True)")
            self._refuse_shards()
            plans, rows, grads = list(self._plans), self._rows[0], gradients_of(self._groups)
            begin_step_([rows], rows, self._number, _with_gradients(grads))
            step_groups_(self._groups, grads, plans, rows)
            return None
        if self.evaluating:
            raise EvaluationModeError("expected train() before step(), got eval() mode: the parameters hold w - mu m")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._opt_called = True  # what a scheduler's wrapper would note
        self._take_step()
        return loss

    @stage("step", payload=lambda optimizer: optimizer.param_groups[0]["step"])
    def _take_step(self) -> None:
        grads = gradients_of(self._groups)
        _refuse_sparse(grads)
        if self._graphs is not None:
            self._take_compiled_step(self._graphs, grads)
            return
        groups = [group for group in self.param_groups if group["params"]]
        distances = [group["distance"] for group in groups]
        if len(groups) > 1:
            distances = [norm(distances)] * len(groups)
        variables = self._variables()
        moved = [g for g, d in zip(groups, distances, strict=True) if self._step_group(g, d, variables)]
        if moved and self._shards is not None:
            _sum_over(self._shards, [group["distance"] for group in moved])
        self._plan()

    def _take_compiled_step(self, graphs: Graphs[None], grads: list[Gradients]) -> None:
        self._refuse_shards()
        plans = self._planned()  # somebody may have changed a group since the last step
        kind = *[plan.key() for plan in plans], *[grad is None for found in grads for grad in found]
        self._write(self._rows[0], _with_gradients(grads))
        self._plan()
        graphs(kind, self._groups, grads, plans, self._rows[0])

    def _refuse_shards(self) -> None:
        if self._shards is not None:
            raise ConfigurationError("a compiled step expects parameters that are whole on each rank, got DTensors")

    def _variables(self) -> int:
        return sum([p.numel() for group in self.param_groups for p in group["params"] if p.requires_grad])

    def _planned(self) -> list[Plan]:
        """What the next step of each group will be."""
        plans = []
        for group in self.param_groups:
            if group["params"]:
                t = group["step"] + 1 - group["warmup"]
                is_reset = t >= 1 and t == next_reset(t - 1, group["period"])
                phase: Phase = "warmup" if t < 1 else "reset" if is_reset else "main"
                decay = group["weight_decay"]
                decays = isinstance(decay, Tensor) or decay != 0
                plans.append(Plan(group["step"] == 0, phase, decays, bool(group["maximize"])))
        return plans

    def _plan(self) -> None:
        self._plans[:] = self._planned()

    def begin_step(self, written: Sequence[Tensor], pending: Tensor, with_gradients: Sequence[int]) -> None:
        """The host's share of a compiled step: write hyper-parameters, count the step, plan the next."""
        if self.evaluating:
            raise EvaluationModeError("expected train() before step(), got eval() mode: the parameters hold w - mu m")
        self._write(written[0], with_gradients)
        self._plan()

    def _write(self, rows: Tensor, with_gradients: Sequence[int]) -> None:
        """Count the step, and write its hyper-parameters."""
        values, variables = [], self._variables()
        for i, group in enumerate(g for g in self.param_groups if g["params"]):
            group["step"] += i in with_gradients
            mu = mu_at(group["step"] - group["warmup"], group["mu"], group["mu_steps"])
            of_update = [group["lr"], mu, group["alpha"], group["beta"] * variables, group["gamma"]]
            values.append([*of_update, group["weight_decay"]])
        self._written = write_rows_(rows, values, self._written)

    @stage("update", payload=lambda optimizer, group, *_: neumann_cost(group["params"]))
    def _step_group(self, group: dict[str, Any], distance: Tensor, variables: int) -> bool:
        """Lines 2 to 12 of Algorithm 2 for one group, given D over all groups; False if it has no gradients.

        Of parameters that FSDP2 shards, on this rank's shards; "distance" is that of these then.
        """
        every: list[Tensor] = group["params"]
        moving = [p for p in every if p.grad is not None]
        if not moving:
            return False
        params, whole = _local(moving), _local(every)
        grads = _gradients(params, _local([p.grad for p in moving if p.grad is not None]), group)
        momentum_buffers = _local([self.state[p]["momentum_buffer"] for p in moving])
        if group["step"] == 0:
            torch._foreach_copy_(self._exp_avgs(every), whole)
        group["step"] += 1
        t = group["step"] - group["warmup"]
        lr = _on_host_if_there(group["lr"])

        if t < 1 or t == next_reset(t - 1, group["period"]):
            wide = [g.to(m.dtype) for g, m in zip(grads, momentum_buffers, strict=True)]
            descent = torch._foreach_mul(wide, -lr)
            if t < 1:
                torch._foreach_add_(params, descent)
            else:
                torch._foreach_copy_(momentum_buffers, descent)
            group["distance"].copy_(norm(torch._foreach_sub(whole, self._exp_avgs(every))))
            return True

        mu = mu_at(t, group["mu"], group["mu_steps"])
        hyper = self._hyper(group, [lr, mu, group["alpha"], group["beta"] * variables, group["gamma"]])
        if distance is not group["distance"]:
            group["distance"].copy_(distance)
        neumann_update_(params, momentum_buffers, self._exp_avgs(moving), grads, group["distance"], hyper)
        if len(moving) < len(every):
            still = [p for p in every if p.grad is None]
            rest = norm(torch._foreach_sub(_local(still), self._exp_avgs(still)))
            torch.hypot(group["distance"], rest, out=group["distance"])
        return True

    def _hyper(self, group: dict[str, Any], values: list[float | Tensor]) -> Tensor:
        """`values` in one tensor on the group's device, last step's if they are the same; no wait for the device."""
        values = [_on_host_if_there(v) for v in values]
        floats = [0.0 if isinstance(v, Tensor) else v for v in values]
        distance: Tensor = group["distance"]
        last_floats, hyper = self._last_hyper.get(distance, (None, distance))
        if floats != last_floats:
            host = torch.tensor(floats, dtype=distance.dtype, pin_memory=distance.is_cuda)
            hyper = host.to(distance.device, non_blocking=True)
            self._last_hyper[distance] = floats, hyper
        for slot, value in enumerate(values):
            if isinstance(value, Tensor):
                hyper[slot].copy_(value)
        return hyper

    def _exp_avgs(self, params: Sequence[Tensor]) -> list[Tensor]:
        return _local([self.state[p]["exp_avg"] for p in params])

    def _find_shards(self) -> dist.ProcessGroup | None:
        """The ranks that hold the shards of a parameter, if FSDP2 has sharded them."""
        mesh = mesh_of(p for group in self.param_groups for p in group["params"])
        return None if mesh is None else mesh.get_group(mesh.ndim - 1)

    @torch.no_grad()
    def eval(self) -> None:
        """Put the true weights u = w - mu m (Algorithm 2 line 13) into the parameters; `train()` undoes it.

        Needs memory for one more copy of the weights until then. BatchNorm statistics are those of w: re-estimate them
        if they matter. A second call changes nothing.
        """
        if self.evaluating:
            return
        for group in self.param_groups:
            mu = mu_at(group["step"] - group["warmup"], group["mu"], group["mu_steps"])
            for p in group["params"]:
                state = self.state[p]
                state["displaced"] = p.detach().clone()
                p.copy_(torch.sub(p, state["momentum_buffer"], alpha=mu))
            group["evaluating"] = True

    @torch.no_grad()
    def train(self) -> None:
        """Put the displaced weights w back into the parameters, bit for bit as before `eval()`."""
        if not self.evaluating:
            return
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p].pop("displaced"))
            group["evaluating"] = False

    @torch.no_grad()
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load what `state_dict()` gave, in either mode, into the existing buffers; m and v keep their dtypes.

        The parameters are not touched: load the model's weights that were saved at the same moment. The mode becomes
        that of the checkpoint.

        Raises:
            StateMismatchError: a state dict of another optimizer or model; nothing is changed then.

        """
        saved_groups = state_dict["param_groups"]
        if not all({"step", "distance", "evaluating"} <= set(group) for group in saved_groups):
            raise StateMismatchError("expected the state dict of a Neumann optimizer, got one without its step")
        distances = [group["distance"] for group in self.param_groups]
        displaced = {p: state.pop("displaced") for p, state in self.state.items() if "displaced" in state}
        if any(group["evaluating"] for group in saved_groups):
            for p, state in self.state.items():
                state["displaced"] = torch.empty_like(p, requires_grad=False)
        try:
            load_state_in_place(self, state_dict)
        except StateMismatchError:
            for p, state in self.state.items():
                state.pop("displaced", None)
                if p in displaced:
                    state["displaced"] = displaced[p]
            raise
        for group, distance in zip(self.param_groups, distances, strict=True):
            group["distance"] = distance.copy_(group["distance"])
        self._plan()


def _with_gradients(grads: Sequence[Gradients]) -> list[int]:
    """The groups in which some parameter has a gradient; the others stand still."""
    return [i for i, found in enumerate(grads) if any(grad is not None for grad in found)]


def _refuse_sparse(grads: Sequence[Gradients]) -> None:
    for found in grads:
        for grad in found:
            if grad is not None and grad.layout != torch.strided:
                raise SparseGradientError(f"expected dense gradients, got one of layout {grad.layout}")


def _local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The shards that this rank holds, sharing memory; tensors that are not sharded themselves."""
    return [local_of(t) for t in tensors]


def _sum_over(shards: dist.ProcessGroup, distances: list[Tensor]) -> None:
    """The norms of whole vectors, in place, from those of the parts that each rank holds; one all-reduce."""
    squares = torch.stack(distances).square_()
    dist.all_reduce(squares, group=shards)
    torch._foreach_copy_(distances, list(squares.sqrt_().unbind()))


def _gradients(params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """Gradients of what is minimised, L2 term included."""
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    decay = _on_host_if_there(group["weight_decay"])
    if isinstance(decay, Tensor) or decay != 0:
        grads = list(torch._foreach_add(grads, torch._foreach_mul(params, decay)))
    return grads


def _on_host_if_there(value: float | Tensor) -> float | Tensor:
    """A float for a CPU tensor; a tensor on an accelerator stays there, since reading it would wait for the device."""
    return value.item() if isinstance(value, Tensor) and value.device.type == "cpu" else value


def _check_group(group: dict[str, Any], devices: set[torch.device]) -> None:
    if len(devices) > 1:
        raise ConfigurationError(f"expected all parameters on one device, got {sorted(map(str, devices))}")
    for p in group["params"]:
        if not p.is_floating_point():
            raise ConfigurationError(f"expected real floating-point parameters, got {p.dtype}")
    for name in ("lr", "alpha", "beta", "weight_decay"):
        value = group[name]
        if not (math.isfinite(value) and value >= 0):
            raise ConfigurationError(f"expected {name} >= 0, got {value}")
    if not 0 <= group["gamma"] <= 1:
        raise ConfigurationError(f"expected gamma in [0, 1], got {group['gamma']}")
    mu = tuple(group["mu"])
    if len(mu) != 2 or not 0 <= mu[0] <= mu[1] < 1:
        raise ConfigurationError(f"expected mu = (first, last) with 0 <= first <= last < 1, got {group['mu']}")
    if not group["mu_steps"] > 0:
        raise ConfigurationError(f"expected mu_steps > 0, got {group['mu_steps']}")
    for name, least in (("period", 1), ("warmup", 0)):
        if not isinstance(group[name], int) or group[name] < least:
            raise ConfigurationError(f"expected {name} to be an integer >= {least} (steps), got {group[name]!r}")
