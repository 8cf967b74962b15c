"""Time of a training step by stage, eager and compiled: optimizers in rotation, medians of blocks of steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from triton_curv.optimizers.kfac import KFAC
from triton_curv.optimizers.neumann import Neumann
from triton_curv.scenarios import get_scenario
from triton_curv.scenarios.scenario import Scenario
from triton_curv.training.timing import one_thread

NAMES = ("sgd", "adamw", "muon", "neumann", "kfac")
WARM_UP = 25  # steps before the first block: statistics, inverses and every graph come in them
Action = Callable[[], object]


class StepTime(NamedTuple):
    """Milliseconds of one optimizer, median over blocks: passes are forward, loss and backward."""

    optimizer: str
    compiled: bool
    passes_ms: float
    update_ms: float

    @property
    def step_ms(self) -> float:
        """Passes and update."""
        return self.passes_ms + self.update_ms


def update_of(name: str, model: nn.Module, lr: float, compiled: bool) -> Action:
    """What takes a step: fused AdamW, Muon for matrices with AdamW for the rest, K-FAC between two renewals."""
    params = list(model.parameters())
    if name == "kfac":
        kfac = KFAC(model, lr=lr, factor_interval=10**6, inverse_interval=10**6, compile=compiled)
        return kfac.step
    if name == "neumann":
        # without the repulsive term, which throws weights far away so soon after the start: passes would take longer
        return Neumann(params, lr=lr, beta=0.0, warmup=5, period=10**6, compile=compiled).step
    optimizers: list[torch.optim.Optimizer]
    if name == "muon":
        rest = [p for p in params if p.dim() != 2]
        optimizers = [torch.optim.Muon([p for p in params if p.dim() == 2], lr=lr)]
        optimizers += [torch.optim.AdamW(rest, lr=lr, fused=True)] if rest else []
    elif name == "adamw":
        optimizers = [torch.optim.AdamW(params, lr=lr, fused=True)]
    else:
        optimizers = [torch.optim.SGD(params, lr=lr, momentum=0.9, foreach=True)]
    steps = [torch.compile(each.step) if compiled else each.step for each in optimizers]

    def take() -> None:
        for step in steps:
            step()

    return take


def passes(scenario: Scenario, model: nn.Module, forward: Callable[..., Tensor], x: Tensor, y: Tensor) -> None:
    """Forward, loss and backward; gradients of the last step are dropped."""
    for p in model.parameters():
        p.grad = None
    scenario.objective(model, forward(x), y).backward()


def bench_steps(
    scenario_name: str, names: Sequence[str], compiled: Sequence[bool], rounds: int, block: int
) -> list[StepTime]:
    """CPU time of one thread; common steps of K-FAC, between renewals; models are compiled where the step is."""
    scenario = get_scenario(scenario_name)
    data = scenario.load()
    x, y = data.train_x[: scenario.batch_size], data.train_y[: scenario.batch_size]
    runs: dict[tuple[str, bool], tuple[Action, Action]] = {}
    for mode in compiled:
        for name in names:
            torch.manual_seed(0)
            model = scenario.model()
            update = update_of(name, model, 1e-4, mode)

            forward = torch.compile(model) if mode else model
            runs[name, mode] = (partial(passes, scenario, model, forward, x, y), update)
    times: dict[tuple[str, bool], list[tuple[float, float]]] = {key: [] for key in runs}
    # torch would take the graph of the model without taps for the same model with taps
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False), one_thread():
        for passes_of, update in runs.values():
            for _ in range(WARM_UP):
                passes_of()
                update()
        for _ in range(rounds):
            for key, (passes_of, update) in runs.items():
                in_passes = in_update = 0.0
                for _ in range(block):
                    start = time.process_time()
                    passes_of()
                    middle = time.process_time()
                    update()
                    in_passes, in_update = in_passes + middle - start, in_update + time.process_time() - middle
                times[key].append((in_passes / block * 1e3, in_update / block * 1e3))
    return [
        StepTime(name, mode, statistics.median(a for a, _ in found), statistics.median(b for _, b in found))
        for (name, mode), found in times.items()
    ]
