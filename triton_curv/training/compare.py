"""Compare optimizers on one scenario: search a rate for each, repeat over seeds, time the steps, sum up."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from triton_curv.scenarios import Data, Scenario
from triton_curv.training.errors import SettingError
from triton_curv.training.optimizers import get_optimizer
from triton_curv.training.search import Result, Run, search_rate, train_run
from triton_curv.training.timing import ROUNDS, one_thread, step_times
from triton_curv.training.trainer import Trainer

YARDSTICK = "sgd"
"""The optimizer whose step cost is 1; timed also where it is not compared."""


class Progress(Protocol):
    """Who watches a comparison."""

    def advance(self, amount: int = 1) -> None:
        """``amount`` more of ``Comparison``'s planned work is done."""

    def phase(self, text: str) -> None:
        """What is being done from now on."""

    def found(self, result: Result) -> None:
        """One optimizer has been searched and repeated."""


@dataclass(frozen=True)
class Settings:
    """What is compared, and how much is spent on it.

    Attributes:
        optimizers: Names, in the order of the table.
        rates: Learning rates tried for each.
        seeds: Number of seeds; the rates are tried on seed 0.
        steps: Steps of each run; the scenario's budget by default.

    """

    optimizers: tuple[str, ...]
    rates: int = 5
    seeds: int = 3
    steps: int | None = None

    def check(self) -> None:
        """Raise ``SettingError`` for an unknown or repeated optimizer, or a number below 1."""
        for name in self.optimizers:
            get_optimizer(name)
        if not self.optimizers or len(set(self.optimizers)) != len(self.optimizers):
            raise SettingError(f"expected different optimizers, got {', '.join(self.optimizers) or 'none'}")
        for name, value in (("rates", self.rates), ("seeds", self.seeds), ("steps", self.steps)):
            if value is not None and value < 1:
                raise SettingError(f"expected {name} of at least 1, got {value}")


@dataclass(frozen=True)
class Row:
    """One optimizer's line of the final table; None where it was not reached or every rate diverged.

    Attributes:
        rate: Chosen learning rate.
        at_edge: Whether the rate is the first or last tried.
        reached: Number of seeds that reached the target.
        steps_to_target: Mean over those seeds.
        seconds_to_target: ``steps_to_target`` times the measured cost of a step.
        final_loss: Mean over seeds of the training loss over the last tenth of the steps.
        final_loss_sd: Its standard deviation over seeds; 0 for one seed.
        metric: Mean over seeds of the validation metric after the last step.
        step_ms: Median cost of a step.
        step_ratio: ``step_ms`` over SGD's.

    """

    optimizer: str
    rate: float | None
    at_edge: bool
    reached: int
    steps_to_target: float | None
    seconds_to_target: float | None
    final_loss: float | None
    final_loss_sd: float | None
    metric: float | None
    step_ms: float | None
    step_ratio: float | None


@dataclass(frozen=True)
class Comparison:
    """Everything a comparison found."""

    scenario: Scenario
    settings: Settings
    steps: int
    results: tuple[Result, ...]
    step_ms: dict[str, float]

    def rows(self) -> list[Row]:
        """The final table, one row per optimizer."""
        return [_row(result, self.scenario.target_loss, self.step_ms) for result in self.results]


def planned_work(scenario: Scenario, settings: Settings) -> int:
    """Amount of work ``compare`` reports to its ``Progress``, where no rate diverges."""
    steps = settings.steps or scenario.budget
    grids = [scenario.rate_grid(name, settings.rates) for name in settings.optimizers]
    training = sum(len(grid) + settings.seeds - 1 for grid in grids) * steps
    timing = len({*settings.optimizers, YARDSTICK}) * (ROUNDS + 1)
    return training + timing


def compare(scenario: Scenario, settings: Settings, progress: Progress) -> Comparison:
    """Run the whole protocol on the CPU with one thread.

    Every learning rate of every optimizer runs for all steps on seed 0; the rate with the lowest final loss
    runs on the other seeds. Then steps are timed, all optimizers in rotation, each at its chosen rate.

    Raises:
        SettingError: Where the settings are out of range.
        ScenarioError: Where the scenario's data is not installed.

    """
    settings.check()
    steps = settings.steps or scenario.budget
    data = scenario.load()
    seeds = range(settings.seeds)

    def run(optimizer: str, rate: float, seed: int) -> Run:
        progress.phase(f"{optimizer}  rate {rate:g}  seed {seed}")
        return train_run(scenario, data, optimizer, rate, seed, steps, progress.advance)

    results = []
    with one_thread():
        for name in settings.optimizers:
            results.append(search_rate(name, scenario.rate_grid(name, settings.rates), seeds, run))
            progress.found(results[-1])
        progress.phase("timing steps, in rotation")
        step_ms = step_times(_timed_trainers(scenario, data, results, steps), on_block=progress.advance)
    return Comparison(scenario, settings, steps, tuple(results), step_ms)


def _timed_trainers(scenario: Scenario, data: Data, results: Sequence[Result], steps: int) -> dict[str, Trainer]:
    rates = {result.optimizer: result.rate for result in results if result.rate is not None}
    rates.setdefault(YARDSTICK, scenario.learning_rate(YARDSTICK))
    return {name: Trainer(scenario, data, name, rate, 0, steps) for name, rate in rates.items()}


def _row(result: Result, target: float, step_ms: dict[str, float]) -> Row:
    name = result.optimizer
    if result.rate is None:
        return Row(name, None, False, 0, None, None, None, None, None, None, None)
    reached = [steps for run in result.runs if (steps := run.steps_to(target)) is not None]
    mean_steps = statistics.fmean(reached) if reached else None
    losses = [run.final_loss for run in result.runs]
    cost = step_ms[name]
    return Row(
        optimizer=name,
        rate=result.rate,
        at_edge=result.at_edge,
        reached=len(reached),
        steps_to_target=mean_steps,
        seconds_to_target=None if mean_steps is None else mean_steps * cost / 1e3,
        final_loss=statistics.fmean(losses),
        final_loss_sd=statistics.stdev(losses) if len(losses) > 1 else 0.0,
        metric=statistics.fmean(run.points[-1].metric for run in result.runs),
        step_ms=cost,
        step_ratio=cost / step_ms[YARDSTICK],
    )
