"""``triton-curv compare``: a live progress bar, the final table, and where the files are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from triton_curv.scenarios import get_scenario
from triton_curv.training.compare import Comparison, Row, Settings, compare, planned_work
from triton_curv.training.errors import SettingError
from triton_curv.training.files import require_replaceable
from triton_curv.training.paper_report import PAPER_FILE_NAMES, write_paper_report
from triton_curv.training.papers import PAPERS, Paper, compare_paper, planned_paper_work
from triton_curv.training.report import FILE_NAMES, REPORT_NAME, write_report
from triton_curv.training.search import Result

DEFAULT_OPTIMIZERS = "sgd,adamw,neumann,kfac"


class ProgressBar:
    """A rich progress bar as a comparison's watcher; prints a line for each optimizer that is done."""

    def __init__(self, bar: Progress, total: int) -> None:
        self._bar = bar
        self._total = total
        self._task = bar.add_task("loading data", total=total)

    def advance(self, amount: int = 1) -> None:
        """Move the bar."""
        self._bar.advance(self._task, amount)

    def phase(self, text: str) -> None:
        """Name what runs now, beside the bar."""
        self._bar.update(self._task, description=text)

    def finish(self) -> None:
        """Fill the bar: runs that diverged have stopped early."""
        self._bar.update(self._task, completed=self._total, description="done")

    def found(self, result: Result) -> None:
        """Print the chosen rate above the bar."""
        if result.rate is None:
            line = result.note
        else:
            losses = ", ".join(f"{run.final_loss:.3g}" for run in result.runs)
            best = f"best of {len(result.grid)} rates {result.rate:<8g}"
            line = f"{result.optimizer:<8} {best} final loss by seed {losses}"
        self._bar.console.print(line, highlight=False, soft_wrap=True)


def run_compare(
    scenario_name: str, optimizers: str | None, rates: int, seeds: int, steps: int | None, out: Path | None
) -> None:
    """Compare, print the table, write report.png, results.csv and run.json into ``out``; or a paper's comparisons."""
    if scenario_name in PAPERS:
        if optimizers is not None or steps is not None:
            raise SettingError(f"expected no --optimizers and --steps for {scenario_name}, which sets its own")
        run_paper(PAPERS[scenario_name], rates, seeds, out)
        return
    scenario = get_scenario(scenario_name)
    chosen = DEFAULT_OPTIMIZERS if optimizers is None else optimizers
    names = tuple(name.strip() for name in chosen.split(",") if name.strip())
    settings = Settings(names, rates, seeds, steps)
    settings.check()
    folder = out or Path("runs") / f"compare-{scenario.name}"
    require_replaceable(folder, FILE_NAMES)
    console = Console()
    with _progress(console) as bar:
        progress = ProgressBar(bar, planned_work(scenario, settings))
        comparison = compare(scenario, settings, progress)
        progress.finish()
    console.print(summary_table(comparison))
    write_report(comparison, folder)
    _name_files(console, folder, FILE_NAMES)


def run_paper(paper: Paper, rates: int, seeds: int, out: Path | None) -> None:
    """Compare on all tasks of a paper, print their tables, write the four files into ``out``."""
    for task in paper.tasks:
        paper.settings(task, rates, seeds).check()
    folder = out or Path("runs") / paper.name
    require_replaceable(folder, PAPER_FILE_NAMES)
    console = Console()
    with _progress(console) as bar:
        progress = ProgressBar(bar, planned_paper_work(paper, rates, seeds))
        comparisons = compare_paper(
            paper, rates, seeds, progress, lambda task: bar.console.print(task.name, style="bold")
        )
        progress.finish()
    for comparison in comparisons:
        console.print(summary_table(comparison))
    write_paper_report(paper, comparisons, folder)
    _name_files(console, folder, PAPER_FILE_NAMES)


def _progress(console: Console) -> Progress:
    columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description:<32}"), *columns, console=console)


def _name_files(console: Console, folder: Path, names: Sequence[str]) -> None:
    for name in reversed(names):  # the picture last
        style = "bold" if name == REPORT_NAME else None
        console.print(str((folder / name).absolute()), style=style, highlight=False, soft_wrap=True)


def summary_table(comparison: Comparison) -> Table:
    """The final table: one line per optimizer, with a caption that says how it was measured."""
    scenario, seeds = comparison.scenario, comparison.settings.seeds
    budget = f"{comparison.steps} steps of {scenario.batch_size} rows"
    title = f"{scenario.name}: {budget}, target loss {scenario.target_loss:g}"
    table = Table(title=title, caption=_caption(comparison), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    table.add_column("optimizer", style="bold", no_wrap=True)
    for column in (
        "best lr",
        "steps to\ntarget",
        "seconds\nto target",
        "final\ntrain loss",
        f"val {scenario.metric.name}".replace(" (", "\n(")
        if "(" in scenario.metric.name
        else f"val\n{scenario.metric.name}",
        "ms/step\nvs SGD",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for row in comparison.rows():
        table.add_row(row.optimizer, *_cells(row, seeds))
    return table


def _cells(row: Row, seeds: int) -> list[str]:
    if row.rate is None:
        return ["diverged", *["-"] * 5]
    reached = f"({row.reached}/{seeds})"
    return [
        f"{row.rate:g}{'*' if row.at_edge else ''}",
        f"- {reached}" if row.steps_to_target is None else f"{row.steps_to_target:.0f} {reached}",
        "-" if row.seconds_to_target is None else f"{row.seconds_to_target:.3g}",
        f"{row.final_loss:.2g} ± {row.final_loss_sd:.1g}",
        f"{row.metric:.4g}",
        f"{row.step_ratio:.2f}",
    ]


def _caption(comparison: Comparison) -> str:
    settings, metric = comparison.settings, comparison.scenario.metric
    lines = [
        f"{settings.rates} rates each, every one for all steps on seed 0; the best on {settings.seeds} seeds "
        "(reached/seeds). ms/step: forward, backward, step, zero_grad; CPU time, one thread, blocks in "
        "rotation, median; evaluation is outside the clock. Seconds = steps x that median. "
        f"{metric.name}: {'higher' if metric.higher_is_better else 'lower'} is better.",
    ]
    if any(row.at_edge for row in comparison.rows()):
        lines.append("* at the edge of the grid: a better rate may lie outside.")
    return "\n".join([*lines, *(result.note for result in comparison.results if result.note)])
