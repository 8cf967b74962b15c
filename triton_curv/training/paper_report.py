"""The files of a paper's comparison: report.png, summary.csv, results.csv and run.json in one folder."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from triton_curv.training.chart import COLOURS, scale_losses
from triton_curv.training.compare import Comparison
from triton_curv.training.files import replaced_folder
from triton_curv.training.papers import Paper, Task
from triton_curv.training.report import REPORT_NAME, RESULTS_NAME, RUN_NAME, run_record, tidy_rows

SUMMARY_NAME = "summary.csv"
PAPER_FILE_NAMES = (REPORT_NAME, SUMMARY_NAME, RESULTS_NAME, RUN_NAME)


def write_paper_report(paper: Paper, comparisons: Sequence[Comparison], folder: Path) -> None:
    """Replace ``folder`` by one that holds the four files; on any failure it stays as it was."""
    with replaced_folder(folder) as new:
        draw_paper_chart(paper, comparisons, new / REPORT_NAME)
        _write_table(new / SUMMARY_NAME, list(summary_rows(paper, comparisons)))
        tidy = [
            {"task": task.name, **row}
            for task, comparison in zip(paper.tasks, comparisons, strict=True)
            for row in tidy_rows(comparison)
            if row["chosen"]
        ]
        _write_table(new / RESULTS_NAME, tidy)
        record = {
            "paper": paper.title,
            "tasks": [
                {"task": task.name, **run_record(comparison)}
                for task, comparison in zip(paper.tasks, comparisons, strict=True)
            ],
        }
        (new / RUN_NAME).write_text(json.dumps(record, indent=2) + "\n")


def summary_rows(paper: Paper, comparisons: Sequence[Comparison]) -> Iterator[dict[str, Any]]:
    """One row for each task and optimizer; `lowest` is 1 for the lowest final loss of the task."""
    for task, comparison in zip(paper.tasks, comparisons, strict=True):
        rows = comparison.rows()
        finite = [row.final_loss for row in rows if row.final_loss is not None]
        for row in rows:
            steps = comparison.steps * comparison.settings.factor(row.optimizer)
            yield {
                "task": task.name,
                **asdict(row),
                "steps": steps,
                "seconds": None if row.step_ms is None else steps * row.step_ms / 1e3,
                "lowest": int(row.final_loss is not None and row.final_loss == min(finite)),
            }


def draw_paper_chart(paper: Paper, comparisons: Sequence[Comparison], path: Path) -> None:
    """Write a PNG: a column for each task, final losses as bars above the loss by second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(comparisons), 8), dpi=100, layout="constrained")
    panels = figure.subplots(2, len(comparisons), squeeze=False)
    for task, comparison, (bars, curves) in zip(paper.tasks, comparisons, panels.T, strict=True):
        _draw_bars(bars, task, comparison)
        _draw_losses(curves, comparison)
    panels[0][0].set_ylabel("final training loss", fontsize=12)
    panels[1][0].set_ylabel("training loss (evaluated)", fontsize=12)
    settings = comparisons[0].settings
    spread = f"mean and range of {settings.seeds} seeds" if settings.seeds > 1 else "one seed"
    tuned = f"best of {settings.rates} rates each (SGN: step 1), options by scenario; SGD with momentum 0.9"
    protocol = f"{tuned}; {spread}; one CPU thread"
    figure.suptitle(f"{paper.title}\n{protocol}", fontsize=11)
    figure.savefig(path)


def _draw_bars(axes: Any, task: Task, comparison: Comparison) -> None:
    drawn = [(result, [run.final_loss for run in result.runs]) for result in comparison.results if result.runs]
    lost = [result.optimizer for result in comparison.results if not result.runs]
    for position, (result, losses) in enumerate(drawn):
        mean = statistics.fmean(losses)
        spread = [[mean - min(losses)], [max(losses) - mean]]
        axes.bar(position, mean, yerr=spread, color=COLOURS.get(result.optimizer), capsize=3)
        axes.annotate(
            f"{mean:.3g}" if mean >= 100 else f"{mean:.2g}",
            (position, max(losses)),
            ha="center",
            va="bottom",
            fontsize=10,
        )
    axes.set_xticks(range(len(drawn)), [result.optimizer for result, _ in drawn], rotation=20, fontsize=10)
    values = [loss for _, losses in drawn for loss in losses]
    axes.set_ylim(min(values, default=1.0) / 2, max(values, default=1.0) * 1.5)
    scale_losses(axes)
    steps, factor = comparison.steps, task.factor
    count = f"{steps} steps" if factor == 1 else f"{steps} steps, first order {steps * factor}"
    note = f"\nevery rate diverged: {', '.join(lost)}" if lost else ""
    axes.set_title(f"{task.scenario}\n{count}{note}", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_losses(axes: Any, comparison: Comparison) -> None:
    from matplotlib.ticker import NullFormatter

    for result in comparison.results:
        if not result.runs:
            continue
        cost = comparison.step_ms[result.optimizer] / 1e3
        seconds = [point.step * cost for point in result.runs[0].points[1:]]
        losses = list(zip(*([point.train_loss for point in run.points[1:]] for run in result.runs), strict=True))
        colour, rate = COLOURS.get(result.optimizer), result.rate
        mean = [statistics.fmean(values) for values in losses]
        axes.plot(seconds, mean, color=colour, linewidth=1.8, label=f"{result.optimizer}, {rate:g}")
        axes.fill_between(seconds, [min(v) for v in losses], [max(v) for v in losses], color=colour, alpha=0.18, lw=0)
    scale_losses(axes)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("compute time, seconds", fontsize=11)
    axes.legend(fontsize=9, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
