"""The files of a comparison: report.png, results.csv and run.json, in one folder that appears as a whole."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from triton_curv.training.chart import draw_chart
from triton_curv.training.compare import Comparison
from triton_curv.training.environment import commit, hardware, versions
from triton_curv.training.files import replaced_folder
from triton_curv.training.search import Run
from triton_curv.training.timing import BLOCK_STEPS, ROUNDS, one_thread

REPORT_NAME = "report.png"
RESULTS_NAME = "results.csv"
RUN_NAME = "run.json"
FILE_NAMES = (REPORT_NAME, RESULTS_NAME, RUN_NAME)

PROTOCOL = (
    "Every rate of every optimizer runs for all steps on seed 0; the lowest final loss chooses the rate, "
    "which then runs on the other seeds. Training loss is evaluated in eval mode at the true weights, out of "
    "the clock; the final loss is its mean over the last tenth of the steps, and a run reaches the target at "
    "its first evaluation at or below it. ms per step is CPU time of forward, backward, step() and "
    f"zero_grad(), without evaluation and batch drawing: blocks of {BLOCK_STEPS} steps of each optimizer in "
    f"rotation, one thread, median of {ROUNDS} rounds. Seconds to target = steps to target x that median."
)


def write_report(comparison: Comparison, folder: Path) -> None:
    """Replace ``folder`` by one that holds the three files; on any failure it stays as it was."""
    with replaced_folder(folder) as new:
        draw_chart(comparison, new / REPORT_NAME)
        with (new / RESULTS_NAME).open("w", newline="") as file:
            rows = list(tidy_rows(comparison))
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        (new / RUN_NAME).write_text(json.dumps(run_record(comparison), indent=2) + "\n")


def tidy_rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """One row for each optimizer, rate, seed and evaluated step; ``seconds`` only for the timed rates."""
    for result in comparison.results:
        further = [run for run in result.runs if run not in result.search]
        for run in (*result.search, *further):
            chosen = run.rate == result.rate
            cost = comparison.step_ms.get(run.optimizer) if chosen else None
            yield from _run_rows(comparison.scenario.name, run, chosen, cost)


def run_record(comparison: Comparison) -> dict[str, Any]:
    """Content of run.json: what was run, with what, on what, and the table."""
    scenario, settings = comparison.scenario, comparison.settings
    with one_thread():  # as in the comparison
        machine = hardware()
    return {
        "scenario": scenario.name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "hardware": machine,
        "seeds": list(range(settings.seeds)),
        "steps": comparison.steps,
        "batch_size": scenario.batch_size,
        "target_loss": scenario.target_loss,
        "metric": scenario.metric.name,
        "protocol": PROTOCOL,
        "grid": {result.optimizer: list(result.grid) for result in comparison.results},
        "step_ms": comparison.step_ms,
        "summary": [asdict(row) for row in comparison.rows()],
        "notes": [result.note for result in comparison.results if result.note],
    }


def _run_rows(scenario: str, run: Run, chosen: bool, step_ms: float | None) -> Iterator[dict[str, Any]]:
    for point in run.points:
        yield {
            "scenario": scenario,
            "optimizer": run.optimizer,
            "seed": run.seed,
            "learning_rate": run.rate,
            "chosen": int(chosen),
            "step": point.step,
            "seconds": "" if step_ms is None else f"{point.step * step_ms / 1e3:.6g}",
            "train_loss": point.train_loss,
            "val_metric": point.metric,
        }
