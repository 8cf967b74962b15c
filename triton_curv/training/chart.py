"""report.png: evaluated training loss by step and by second."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from triton_curv.training.compare import Comparison
from triton_curv.training.search import Result

COLOURS = {
    "sgd": "#8c8c8c",
    "adamw": "#e08214",
    "neumann": "#35978f",
    "kfac": "#2166ac",
    "newton-cg": "#762a83",
    "sgn": "#c51b7d",
    "neumann-inner": "#5aae61",
}


def draw_chart(comparison: Comparison, path: Path) -> None:
    """Write a 1600 x 700 PNG: lines are means over seeds, bands minimum to maximum, the target is dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 7), dpi=100, layout="constrained")
    by_step, by_second = figure.subplots(1, 2, sharey=True)
    for result in comparison.results:
        if result.rate is not None:
            _draw_curves(by_step, result, 1.0)
            _draw_curves(by_second, result, comparison.step_ms[result.optimizer] / 1e3)
    scenario, seeds = comparison.scenario, comparison.settings.seeds
    for axes, label in ((by_step, "step"), (by_second, "compute time, seconds (one CPU thread)")):
        target = f"target {scenario.target_loss:g}"
        axes.axhline(scenario.target_loss, color="black", linestyle=(0, (4, 3)), linewidth=1.2, label=target)
        axes.set_xlim(left=0)
        axes.set_xlabel(label, fontsize=14)
        axes.tick_params(labelsize=12)
        axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    _scale_losses(by_step)  # and by_second, which shares the axis
    by_step.set_ylabel("training loss (evaluated)", fontsize=14)
    by_second.legend(fontsize=13, frameon=False, loc="upper right")
    spread = f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"
    figure.suptitle(
        f"{scenario.name}: each optimizer at its best of {comparison.settings.rates} rates, {spread}",
        fontsize=16,
    )
    figure.savefig(path)


def _scale_losses(axes: Any) -> None:
    """Logarithmic, with round numbers in between where the curves span less than two decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high / low < 100:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_curves(axes: Any, result: Result, step_cost: float) -> None:
    steps = [point.step for point in result.runs[0].points]
    losses = list(zip(*([point.train_loss for point in run.points] for run in result.runs), strict=True))
    x = [step * step_cost for step in steps]
    colour = COLOURS.get(result.optimizer)
    mean = [statistics.fmean(values) for values in losses]
    label = f"{result.optimizer}, rate {result.rate:g}"
    (line,) = axes.plot(x, mean, color=colour, linewidth=2.2, label=label)
    axes.fill_between(x, [min(v) for v in losses], [max(v) for v in losses], color=line.get_color(), alpha=0.18, lw=0)
