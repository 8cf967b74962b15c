"""Time of a training step by stage, eager and compiled: optimizers in rotation, medians of blocks of steps."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from triton_curv.graphs import with_own_code
from triton_curv.optimizers.kfac import KFAC
from triton_curv.optimizers.neumann import Neumann
from triton_curv.optimizers.newton_cg import NewtonCG
from triton_curv.optimizers.sgn import SGN
from triton_curv.scenarios import get_scenario
from triton_curv.scenarios.scenario import Scenario
from triton_curv.training.timing import one_thread

NAMES = ("sgd", "adamw", "muon", "neumann", "kfac", "newton-cg", "sgn")
BY_CLOSURE = ("newton-cg", "sgn")  # they run the passes themselves, some dozens in a step
WARM_UP = 8  # steps before the first block: statistics, inverses and every graph come in them
Action = Callable[[], object]
T = TypeVar("T")


def apart(function: Callable[..., T], **arguments: Any) -> Callable[..., T]:
    """`torch.compile(function)` with graphs that no other model of the class, one without taps, say, takes for its own.

    `isolate_recompiles=True` where torch has it (2.13; not 2.11). Before, a caller with code of its own has the graphs.
    """
    if "isolate_recompiles" in signature(torch.compile).parameters:
        arguments["isolate_recompiles"] = True
        return cast("Callable[..., T]", torch.compile(function, **arguments))

    def call(*args: Any) -> T:
        return function(*args)

    return cast("Callable[..., T]", torch.compile(with_own_code(call), **arguments))


class StepTime(NamedTuple):
    """Milliseconds of one optimizer, median over blocks: passes are forward, loss and backward.

    Of an optimizer that runs the passes itself all counts as update. `first_s` are the seconds of the steps before the
    measured ones, in which everything is compiled, from the clock.
    """

    optimizer: str
    compiled: bool
    passes_ms: float
    update_ms: float
    first_s: float

    @property
    def step_ms(self) -> float:
        """Passes and update."""
        return self.passes_ms + self.update_ms


class Run(NamedTuple):
    """One optimizer with a model of its own: what takes the passes, what takes the step, steps of a block."""

    passes: Action
    update: Action
    block: int


def update_of(name: str, model: nn.Module, lr: float, compiled: bool) -> Action:
    """What takes a step, K-FAC between two renewals.

    AdamW is the fused one, and the one for lists of tensors where it is compiled: torch.compile leaves the fused one
    out. Muon has AdamW for what is no matrix.
    """
    params = list(model.parameters())
    if name == "kfac":
        kfac = KFAC(model, lr=lr, factor_interval=10**6, inverse_interval=10**6, compile=compiled)
        return kfac.step
    if name == "neumann":
        # without the repulsive term, which throws weights far away so soon after the start: passes would take longer
        return Neumann(params, lr=lr, beta=0.0, warmup=2, period=10**6, compile=compiled).step
    kind: dict[str, Any] = {"foreach": True} if compiled else {"fused": True}
    optimizers: list[torch.optim.Optimizer]
    if name == "muon":
        rest = [p for p in params if p.dim() != 2]
        optimizers = [torch.optim.Muon([p for p in params if p.dim() == 2], lr=lr)]
        optimizers += [torch.optim.AdamW(rest, lr=lr, **kind)] if rest else []
    elif name == "adamw":
        optimizers = [torch.optim.AdamW(params, lr=lr, **kind)]
    else:
        optimizers = [torch.optim.SGD(params, lr=lr, momentum=0.9, foreach=True)]
    steps = [apart(each.step) if compiled else each.step for each in optimizers]

    def take() -> None:
        for step in steps:
            step()

    return take


def run_of(scenario: Scenario, name: str, compiled: bool, block: int, x: Tensor, y: Tensor) -> Run:
    """An optimizer at a small rate, so that passes of all see much the same numbers; the model compiled where it is."""
    torch.manual_seed(0)
    model = scenario.model()
    if name in BY_CLOSURE:
        build = NewtonCG if name == "newton-cg" else SGN
        optimizer = build(model, lr=1e-4, compile=compiled)

        def closure() -> object:
            output = model(x)
            loss = scenario.objective(model, output, y)
            return loss if name == "newton-cg" else (loss, output)

        return Run(lambda: None, lambda: optimizer.step(closure), max(1, block // 20))
    update = update_of(name, model, 1e-4, compiled)
    forward = apart(cast("Callable[..., Tensor]", model)) if compiled else model

    def passes() -> None:
        for p in model.parameters():
            p.grad = None
        scenario.objective(model, forward(x), y).backward()

    return Run(passes, update, block)


def bench_steps(
    scenario_name: str, names: Sequence[str], compiled: Sequence[bool], rounds: int, block: int
) -> list[StepTime]:
    """CPU time of one thread; common steps of K-FAC, between renewals; models are compiled where the step is."""
    scenario = get_scenario(scenario_name)
    data = scenario.load()
    x, y = data.train_x[: scenario.batch_size], data.train_y[: scenario.batch_size]
    with one_thread():
        runs: dict[tuple[str, bool], Run] = {}
        first: dict[tuple[str, bool], float] = {}
        for name in names:
            for mode in compiled:
                start = time.perf_counter()
                runs[name, mode] = run = run_of(scenario, name, mode, block, x, y)
                for _ in range(WARM_UP if run.block > 1 else 2):
                    run.passes()
                    run.update()
                first[name, mode] = time.perf_counter() - start
        times: dict[tuple[str, bool], list[tuple[float, float]]] = {key: [] for key in runs}
        turns = random.Random(0)
        for _ in range(rounds):
            for key in turns.sample(list(runs), len(runs)):  # no one always after the same other
                times[key].append(_block(runs[key]))
    return [
        StepTime(*key, statistics.median(a for a, _ in found), statistics.median(b for _, b in found), first[key])
        for key, found in times.items()
    ]


def _block(run: Run) -> tuple[float, float]:
    """Milliseconds of a step in passes and in the update."""
    in_passes = in_update = 0.0
    for _ in range(run.block):
        start = time.process_time()
        run.passes()
        middle = time.process_time()
        run.update()
        in_passes, in_update = in_passes + middle - start, in_update + time.process_time() - middle
    return in_passes / run.block * 1e3, in_update / run.block * 1e3
