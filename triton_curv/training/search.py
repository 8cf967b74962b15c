"""The protocol of a comparison: as many learning rates for each optimizer, the best one on more seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from triton_curv.operators.errors import NonFiniteError
from triton_curv.scenarios import Data, Scenario
from triton_curv.training.trainer import Trainer


@dataclass(frozen=True)
class Point:
    """One evaluation of a run, after ``step`` steps."""

    step: int
    train_loss: float
    metric: float


@dataclass(frozen=True)
class Run:
    """One training run; it stops early where the evaluated loss is no longer finite."""

    optimizer: str
    rate: float
    seed: int
    points: tuple[Point, ...]

    @property
    def final_loss(self) -> float:
        """Mean evaluated training loss over the last tenth of the run: one lucky step decides little."""
        last = self.points[-1].step
        return statistics.fmean(point.train_loss for point in self.points if point.step >= 0.9 * last)

    @property
    def diverged(self) -> bool:
        """Whether the loss became infinite or NaN, or ended no lower than it began."""
        return not math.isfinite(self.final_loss) or self.final_loss >= self.points[0].train_loss

    def steps_to(self, target: float) -> int | None:
        """First evaluated step with a training loss of at most ``target``; None where there is none."""
        return next((point.step for point in self.points if point.train_loss <= target), None)


@dataclass(frozen=True)
class Result:
    """What the protocol found for one optimizer.

    Attributes:
        optimizer: Its name.
        grid: Learning rates tried on the first seed, ascending.
        search: One run per rate, on the first seed.
        rate: The chosen rate; None where every rate diverged.
        runs: One run per seed at the chosen rate.
        note: Why the best rate was not chosen, or why none was; empty otherwise.

    """

    optimizer: str
    grid: tuple[float, ...]
    search: tuple[Run, ...]
    rate: float | None
    runs: tuple[Run, ...]
    note: str

    @property
    def at_edge(self) -> bool:
        """Whether the chosen rate is the first or last of the grid, so that a better one may lie outside."""
        return len(self.grid) > 1 and self.rate in (self.grid[0], self.grid[-1])


RunFunction = Callable[[str, float, int], Run]
"""(optimizer, learning rate, seed) -> run"""


def train_run(
    scenario: Scenario,
    data: Data,
    optimizer: str,
    rate: float,
    seed: int,
    steps: int,
    on_step: Callable[[], None] = lambda: None,
) -> Run:
    """Train for ``steps`` steps; evaluate before the first, every ``evaluate_every``, and after the last."""
    trainer = Trainer(scenario, data, optimizer, rate, seed, steps)
    points: list[Point] = []

    def evaluate() -> bool:
        evaluation = trainer.evaluate()
        points.append(Point(trainer.step_count, evaluation.train_loss, evaluation.metric))
        return math.isfinite(evaluation.train_loss)

    finite = evaluate()
    while finite and trainer.step_count < steps:
        try:
            trainer.step(trainer.draw())
        except NonFiniteError:  # the optimizer refused to go on from a loss that is not finite
            points.append(Point(trainer.step_count, math.nan, math.nan))
            break
        on_step()
        if trainer.step_count % scenario.evaluate_every == 0 or trainer.step_count == steps:
            finite = evaluate()
    return Run(optimizer, rate, seed, tuple(points))


def search_rate(optimizer: str, grid: Sequence[float], seeds: Sequence[int], run: RunFunction) -> Result:
    """Run every rate on ``seeds[0]``, then the one with the lowest final loss on the other seeds.

    A rate that diverges on a further seed gives way to the runner-up.
    """
    search = tuple(run(optimizer, rate, seeds[0]) for rate in grid)
    notes: list[str] = []
    for first in sorted((r for r in search if not r.diverged), key=lambda r: r.final_loss):
        runs = [first]
        for seed in seeds[1:]:
            runs.append(run(optimizer, first.rate, seed))
            if runs[-1].diverged:
                notes.append(f"{optimizer}: rate {first.rate:g} diverged on seed {seed}, the runner-up took over")
                break
        else:
            return Result(optimizer, tuple(grid), search, first.rate, tuple(runs), "; ".join(notes))
    note = "; ".join([*notes, f"{optimizer}: every rate diverged"])
    return Result(optimizer, tuple(grid), search, None, (), note)
