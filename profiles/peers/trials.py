"""Runs of peers, kept as small files so that a comparison can be continued, and the search for the best rate."""

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from profiles.peers.catalogue import OwnStep, Peer, centre
from triton_curv.scenarios import Data, Scenario
from triton_curv.scenarios.scenario import RATE_RATIO
from triton_curv.training.trainer import Trainer

Point = tuple[int, float, float]
"""(step, evaluated training loss, validation metric)"""


class PeerTrainer(Trainer):
    """A `Trainer` whose optimizer is a peer."""

    def __init__(self, task: Scenario, data: Data, peer: Peer, lr: float, seed: int) -> None:
        super().__init__(task, data, "sgd", lr, seed, task.budget)
        torch.manual_seed(seed)
        self.model = self.module = task.model()
        self.optimizer: Any = peer.build(self.model, lr, task)

    def step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """As `Trainer.step`; a peer that makes its own passes is given the batch."""
        if not isinstance(self.optimizer, OwnStep):
            return super().step(batch)
        x, y = batch
        self.step_count += 1
        return self.optimizer.train_on(x, y, lambda output: self.scenario.objective(self.model, output, y)).detach()


@dataclass(frozen=True)
class Trials:
    """Runs on one task; each is kept in `folder` and not made twice."""

    task: Scenario
    data: Data
    folder: Path

    def run(self, peer: Peer, rate: float, seed: int, steps: int) -> list[Point]:
        """Evaluated losses up to `steps`; fewer where the loss is no longer finite, or curvature can't be inverted."""
        path = self.folder / f"{peer.name}.{self.task.name}.{rate:.3g}.{seed}.json"
        if path.exists():
            points: list[Point] = [(s, float(a), float(b)) for s, a, b in json.loads(path.read_text())["points"]]
            if points[-1][0] >= steps or not math.isfinite(points[-1][1]):
                return [p for p in points if p[0] <= steps]
        trainer, start, points = PeerTrainer(self.task, self.data, peer, rate, seed), time.process_time(), []

        def evaluate() -> bool:
            found = trainer.evaluate()
            points.append((trainer.step_count, found.train_loss, found.metric))
            return math.isfinite(found.train_loss)

        finite = evaluate()
        while finite and trainer.step_count < steps:
            try:
                trainer.step(trainer.draw())
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # public, but not in its __all__
                points.append((trainer.step_count, math.nan, math.nan))
                break
            if trainer.step_count % self.task.evaluate_every == 0 or trainer.step_count == steps:
                finite = evaluate()
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"points": points, "cpu": time.process_time() - start}))
        return points

    def rates(self, peer: str, count: int) -> list[float]:
        """`count` rates around the peer's centre, neighbours sqrt(10) apart."""
        first = -(count // 2)
        return [float(f"{centre(peer, self.task) * RATE_RATIO**k:.3g}") for k in range(first, first + count)]

    def search(self, peer: Peer, count: int, seeds: int, keep: int | None = None) -> "Found":
        """The protocol: all rates on seed 0, of which the one with the lowest final loss goes on to further seeds.

        With `keep` rates run for a third of the budget, and the best `keep` of them to its end. A rate that diverges on
        a further seed gives way to the runner-up.
        """
        rates = self.rates(peer.name, count)
        if keep is not None and keep < count:
            third = -(-self.task.budget // 3)
            third -= third % self.task.evaluate_every
            early = sorted(rates, key=lambda rate: number(self.run(peer, rate, 0, third)[-1][1]))
            rates_left = early[:keep]
        else:
            rates_left = rates
        whole = {rate: self.run(peer, rate, 0, self.task.budget) for rate in rates_left}
        for rate in sorted(whole, key=lambda r: final_loss(whole[r])):
            if diverged(whole[rate]):
                break
            runs = [whole[rate]]
            for seed in range(1, seeds):
                runs.append(self.run(peer, rate, seed, self.task.budget))
            if not any(diverged(run) for run in runs):
                return Found(rate, rate in (rates[0], rates[-1]), runs)
        return Found(None, False, [])


@dataclass(frozen=True)
class Found:
    """The best rate (None where all diverged), whether it is at the edge of the grid, and one run a seed."""

    rate: float | None
    at_edge: bool
    runs: Sequence[list[Point]]

    def steps_to(self, target: float) -> tuple[float | None, int]:
        """Mean steps to a loss over the seeds that reached it, and how many did."""
        steps = [s for run in self.runs if (s := first_below(run, target)) is not None]
        return (statistics.fmean(steps) if steps else None), len(steps)


def number(loss: float) -> float:
    """Infinity for what is no number: it sorts last."""
    return loss if math.isfinite(loss) else math.inf


def final_loss(points: Sequence[Point]) -> float:
    """Mean over the last tenth of the steps."""
    if not math.isfinite(points[-1][1]):
        return math.inf
    return statistics.fmean(loss for step, loss, _ in points if step >= 0.9 * points[-1][0])


def diverged(points: Sequence[Point]) -> bool:
    """No finite loss at the end, or none lower than at the start."""
    return not final_loss(points) < points[0][1]


def first_below(points: Sequence[Point], target: float) -> int | None:
    """First evaluated step with a loss of at most `target`."""
    return next((step for step, loss, _ in points if loss <= target), None)
