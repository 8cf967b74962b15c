"""The comparisons of two papers, redone: their scenarios, SGD and Adam beside their optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from triton_curv.scenarios import get_scenario
from triton_curv.training.compare import Comparison, Progress, Settings, compare, planned_work


@dataclass(frozen=True)
class Task:
    """One scenario of a paper.

    Attributes:
        scenario: Its name.
        steps: Steps of the optimizers with second derivatives; the scenario's budget by default.
        factor: How many times as many steps SGD and Adam take: 1 is equal steps, what takes equal time is above 1.

    """

    scenario: str
    steps: int | None = None
    factor: int = 1

    @property
    def name(self) -> str:
        """The scenario, and what is equal."""
        return f"{self.scenario}, {'equal steps' if self.factor == 1 else f'{self.factor} x steps for first order'}"


@dataclass(frozen=True)
class Paper:
    """What a paper compares.

    Attributes:
        name: The name used on the command line.
        title: Authors, year, arXiv number.
        optimizers: Names, in the order of the bars.
        tasks: In the order of the panels.

    """

    name: str
    title: str
    optimizers: tuple[str, ...]
    tasks: tuple[Task, ...]

    def settings(self, task: Task, rates: int, seeds: int) -> Settings:
        """A block of the step clock is short: a step with second derivatives costs tens of gradients."""
        return Settings(
            self.optimizers, rates, seeds, task.steps, first_order_factor=task.factor, rounds=5, block_steps=2
        )


PAPERS: Mapping[str, Paper] = {
    paper.name: paper
    for paper in (
        Paper(
            "paper-newton-cg",
            "the scenarios of Reiz, Neckel, Bungartz 2022 (arXiv 2208.02017)",
            ("sgd", "adamw", "newton-cg", "sgn"),
            (
                Task("reg-lif"),
                Task("reg-lif-fb"),
                Task("reg-bos"),
                Task("reg-bos-fb"),
                Task("reg-bos-fb", factor=40),
                Task("vae-mnist5k", steps=50),
                Task("bnn-mnist5k", steps=60),
                Task("resnet-transfer", steps=30),
            ),
        ),
        Paper(
            "paper-sgn",
            "the regressions of Gargiani, Zanelli, Diehl, Hutter 2020 (arXiv 2006.02409)",
            ("sgd", "adamw", "sgn"),
            (
                Task("reg-bos"),
                Task("reg-bos-fb"),
                Task("sine10", steps=300, factor=20),
                Task("sine100", steps=300, factor=20),
            ),
        ),
    )
}


def planned_paper_work(paper: Paper, rates: int, seeds: int) -> int:
    """Amount of work ``compare_paper`` reports to its ``Progress``, where no rate diverges."""
    return sum(planned_work(get_scenario(t.scenario), paper.settings(t, rates, seeds)) for t in paper.tasks)


def compare_paper(
    paper: Paper, rates: int, seeds: int, progress: Progress, on_task: Callable[[Task], None] = lambda task: None
) -> tuple[Comparison, ...]:
    """One comparison for each task, by the protocol of ``compare``."""
    found = []
    for task in paper.tasks:
        on_task(task)
        found.append(compare(get_scenario(task.scenario), paper.settings(task, rates, seeds), progress))
    return tuple(found)
