"""``triton-curv tune`` itself: problems, a progress bar with the time left, what was found."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from triton_curv.cli import INTERRUPTED
from triton_curv.cli.problems import Problems, examples, from_file, from_scenario, from_spec
from triton_curv.cli.tables import describe_problem, print_json, show_entries
from triton_curv.errors import ConfigurationError
from triton_curv_autotune.entry import Entry
from triton_curv_autotune.key import environment
from triton_curv_autotune.resolve import process
from triton_curv_autotune.store import default_store
from triton_curv_autotune.table import Table, write_table
from triton_curv_autotune.tune import Job, plan, tune
from triton_curv_kernels.backend import device_limits

NO_GPU = 3
SECONDS_PER_CONFIG = 1.0
"""Assumed for an estimate: compiling takes longest, and happens in parallel."""


@dataclass(frozen=True)
class TuneOptions:
    """The options as given."""

    model: str | None
    scenario: str | None
    shapes: Path | None
    batch: int
    input_shape: str
    channels_last: bool
    dtype: str
    budget: float
    export: Path | None
    dry_run: bool
    json: bool

    def problems(self) -> Problems:
        """What to tune, on the current device."""
        limits = device_limits(torch.device("cuda"))
        given = [name for name in ("model", "scenario", "shapes") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigurationError(f"expected one of --model, --scenario and --shapes, got {' and '.join(given)}")
        if self.budget <= 0 or self.batch < 1:
            raise ConfigurationError(f"expected a budget and a batch above 0, got {self.budget:g} and {self.batch}")
        if self.model is not None:
            return from_spec(self.model, self.batch, self.input_shape, self.dtype, limits, self.channels_last)
        if self.scenario is not None:
            return from_scenario(self.scenario, self.dtype, limits)
        return examples(limits) if self.shapes is None else from_file(self.shapes, limits)


class _TimeLeft(ProgressColumn):
    """Of the budget, which is the total."""

    def render(self, task: Task) -> Text:
        """Minutes and seconds."""
        left = round(max(0.0, (task.total or 0.0) - (task.elapsed or 0.0)))
        return Text(f"{left // 60}:{left % 60:02} left")


class _Bar:
    """A progress bar as tuning's watcher."""

    def __init__(self, bar: Progress, budget_s: float) -> None:
        self._bar = bar
        self._budget_s = budget_s
        self._task = bar.add_task("compiling", total=budget_s)

    def advanced(self, entry: Entry, measured: int, left: int, seconds_left: float) -> None:
        """Name the problem and its best so far."""
        gain = "" if entry.gain is None else f", best x{entry.gain:.2f}"
        text = f"{entry.op.name} {describe_problem(entry.problem)}: {measured} measured, {left} left{gain}"
        self._bar.update(self._task, completed=self._budget_s - seconds_left, description=text)


def run_tune(options: TuneOptions) -> int:
    """Tune; 0, 1 if a problem's default fails, 3 without a GPU, 130 after Ctrl-C (what is finished is kept)."""
    problems = options.problems()
    if options.dry_run:
        _show_plan(plan(problems), options)
        return 0
    if not torch.cuda.is_available():
        print(
            "triton-curv: tuning measures on a GPU, and torch sees none; --dry-run lists what it would", file=sys.stderr
        )
        return NO_GPU
    console = Console(stderr=options.json)
    columns = (TextColumn("{task.description}"), BarColumn(), _TimeLeft())
    jobs, status = plan(problems), 0
    try:
        with Progress(*columns, console=console, transient=True) as bar:
            jobs = tune(problems, options.budget, watcher=_Bar(bar, options.budget))
    except KeyboardInterrupt:
        jobs, status = plan(problems), INTERRUPTED
    except OSError as error:
        raise ConfigurationError(f"cannot write the store {default_store().root}: {error}") from None
    places = {(job.op.name, job.problem) for job in jobs}
    limits = device_limits(torch.device("cuda"))
    known = [entry for entry in process.entries(limits) if entry.place in places]
    entries = [entry for entry in known if entry.environment == environment(limits)]
    show_entries([("process", entry) for entry in entries], options.json, sum(len(job.todo) for job in jobs))
    for job in jobs:
        if job.failure:
            print(f"{job.op.name} {describe_problem(job.problem)}: {job.failure}", file=sys.stderr)
            status = status or 1
    if options.export is not None:
        write_table(options.export, Table(tuple(entries)))
    return status


def _show_plan(jobs: list[Job], options: TuneOptions) -> None:
    count = sum(len(job.todo) for job in jobs)
    rows: list[dict[str, Any]] = [
        {"op": job.op.name, "problem": describe_problem(job.problem), "candidates": len(job.todo)} for job in jobs
    ]
    seconds = min(options.budget, count * SECONDS_PER_CONFIG)
    if options.json:
        print_json({"problems": rows, "candidates": count, "estimated_seconds": seconds})
        return
    for row in rows:
        print(f"{row['op']:22} {row['problem']:60} {row['candidates']:4} candidates")
    print(
        f"{len(rows)} problems, {count} candidates: about {seconds:.0f} s, the budget being {options.budget:g} s "
        f"and {SECONDS_PER_CONFIG:g} s a candidate assumed"
    )
