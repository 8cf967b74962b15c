"""`triton-curv bench`: what a training step costs with each optimizer, as a table, a CSV and a picture."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import typer

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
    from triton_curv.training.step_bench import NAMES, bench_steps

    names = optimizers.split(",") if optimizers else list(NAMES)
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise typer.BadParameter(f"expected names out of {', '.join(NAMES)}, got {', '.join(unknown)}")
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
    out.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(fresh[0]))
        writer.writeheader()
        writer.writerows([*kept, *fresh])
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.5 * len(times) + 1.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    labels = [f"{t.optimizer} {'compiled' if t.compiled else 'eager'}" for t in times]
    axes.barh(labels, [t.passes_ms for t in times], color="#90a4ae", label="forward, loss, backward")
    axes.barh(labels, [t.update_ms for t in times], left=[t.passes_ms for t in times], label="update")
    axes.invert_yaxis()
    axes.set_xlabel(f"{scenario}: CPU ms of a step, one thread")
    axes.legend(frameon=False)
    picture = out / f"steps-{scenario}.png"
    figure.savefig(picture)
    print(f"{table} {picture}")
