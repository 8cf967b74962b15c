"""`triton-curv bench`: what a training step costs with each optimizer, as a table, a CSV and a picture."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from triton_curv.training.step_bench import StepTime

app = typer.Typer(help="Measure what training steps cost.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure what training steps cost."""


@app.command()
def step(
    scenario: Annotated[str, typer.Argument(metavar="SCENARIO", help="See `triton-curv scenarios`.")],
    optimizers: Annotated[
        str, typer.Option(help="Names, separated by commas.")
    ] = "sgd,adamw,muon,neumann,kfac,newton-cg,sgn",
    compiled: Annotated[bool, typer.Option("--compile/--eager", help="Compiled steps too (minutes).")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Blocks of steps for each, in rotation.")] = 15,
    block: Annotated[int, typer.Option(min=1, help="Steps of a block.")] = 20,
    out: Annotated[
        Path, typer.Option(help="Folder for steps.csv, which keeps the rows of other scenarios, and a picture.")
    ] = Path("runs/bench-step"),
) -> None:
    """CPU milliseconds of a step by stage, one thread; the common step of K-FAC, between two renewals."""
    import torch

    from triton_curv.training.environment import hardware
    from triton_curv.training.files import require_folder
    from triton_curv.training.step_bench import NAMES, bench_steps

    names = optimizers.split(",") if optimizers else list(NAMES)
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise typer.BadParameter(f"expected names out of {', '.join(NAMES)}, got {', '.join(unknown)}")
    require_folder(out)
    times = bench_steps(scenario, names, [False, True] if compiled else [False], rounds, block)
    print(f"{scenario}: {'optimizer':12} {'mode':9} {'passes ms':>10} {'update ms':>10} {'step ms':>9} {'first s':>8}")
    for row in times:
        mode = "compiled" if row.compiled else "eager"
        print(
            f"{'':{len(scenario) + 2}}{row.optimizer:12} {mode:9} {row.passes_ms:10.3f} {row.update_ms:10.3f} "
            f"{row.step_ms:9.3f} {row.first_s:8.1f}"
        )
    table = out / "steps.csv"
    machine = {"cpu": hardware()["cpu"], "torch": torch.__version__}
    kept = []
    if table.exists():
        with table.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["scenario"] != scenario]
    fresh = [
        {
            "scenario": scenario,
            "optimizer": t.optimizer,
            "compiled": str(t.compiled),
            "passes_ms": f"{t.passes_ms:.4f}",
            "update_ms": f"{t.update_ms:.4f}",
            "step_ms": f"{t.step_ms:.4f}",
            "first_s": f"{t.first_s:.1f}",
            **machine,
        }
        for t in times
    ]
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(fresh[0]))
        writer.writeheader()
        writer.writerows([*kept, *fresh])
    picture = out / f"steps-{scenario}.png"
    draw(scenario, times, picture)
    print(f"{table} {picture}")


def draw(scenario: str, times: Sequence[StepTime], path: Path) -> None:
    """Bars of the stages; optimizers that run the passes themselves, dozens in a step, on an axis of their own."""
    from matplotlib.figure import Figure

    from triton_curv.training.step_bench import BY_CLOSURE

    parts = [[t for t in times if (t.optimizer in BY_CLOSURE) == own] for own in (False, True)]
    parts = [part for part in parts if part]
    figure = Figure(figsize=(10, 0.4 * len(times) + 2), dpi=100, layout="constrained")
    ratios = [len(part) for part in parts]
    every = figure.subplots(len(parts), squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
    for axes, part in zip(every, parts, strict=True):
        labels = [f"{t.optimizer} {'compiled' if t.compiled else 'eager'}" for t in part]
        passes = [t.passes_ms for t in part]
        axes.barh(labels, passes, color="#90a4ae", label="forward, loss, backward")
        axes.barh(labels, [t.update_ms for t in part], left=passes, label="update")
        axes.invert_yaxis()
    every[0].legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    every[-1].set_xlabel(f"{scenario}: CPU ms of a step, one thread")
    figure.savefig(path)
