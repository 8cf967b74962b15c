"""``triton-curv profile``: where the time of a training step goes, as a table, a CSV and a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from triton_curv.errors import ConfigurationError
from triton_curv.nvtx import DOMAIN, VARIABLE, Totals
from triton_curv.profiling.chart import draw_stages
from triton_curv.profiling.nsys import read_export
from triton_curv.profiling.roofs import Roofs, measure_roofs
from triton_curv.profiling.run import profile_scenario, profile_script
from triton_curv.profiling.stages import StageTime
from triton_curv.profiling.stopwatch import stopwatch_for
from triton_curv.profiling.table import StageRow, rows_of
from triton_curv.training.files import replaced_folder, require_replaceable

WIDTH = 110
PICTURE, TABLE = "stages.png", "stages.csv"


def run_profile(
    target: str | None,
    arguments: Sequence[str],
    optimizer: str,
    steps: int,
    device: str,
    nsys: Path | None,
    out: Path,
) -> None:
    """Profile, print the table and write its files into `out`."""
    if (target is None) == (nsys is None):
        raise ConfigurationError(
            "expected a scenario or script.py to profile, or --nsys FILE.sqlite to read: one of them"
        )
    if target is not None and target.endswith(".py") and not Path(target).is_file():
        raise ConfigurationError(f"expected a script to profile, got no file at {target}")
    require_replaceable(out, (PICTURE, TABLE))
    totals: dict[str, Totals] = {}
    roofs: Roofs | None = None
    times: dict[str, StageTime]
    if nsys is not None:
        times = read_export(nsys)
        steps = times["step"].calls if "step" in times else 1
        title = nsys.name
    else:
        assert target is not None
        where = torch.device(device)
        if target.endswith(".py"):
            times, totals = profile_script(Path(target), arguments)
            steps = totals["step"].calls if "step" in totals else 1
            title = Path(target).name
        else:
            times, totals = profile_scenario(target, optimizer, steps, where)
            title = f"{target}, {optimizer}"
        if any(time.device > 0 for time in times.values()):
            where = torch.device("cuda")  # a script's own choice
        roofs = measure_roofs(where, stopwatch_for(where, seconds=0.5))
    rows = rows_of(times, totals, roofs)
    title = f"{title}: {steps} steps"
    with replaced_folder(out) as new:
        draw_stages(rows, steps, title, new / PICTURE)
        _write(rows, new / TABLE)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)  # a file or a pipe has no edge to wrap at
    console.print(_table(rows, steps, title))
    if roofs is not None:
        console.print(f"roofs of this machine: {roofs.fp32 / 1e12:.3g} TFLOP/s fp32, {roofs.memory / 1e9:.3g} GB/s")
    console.print(f"{out}: {PICTURE}, {TABLE}", soft_wrap=True)
    if target is not None:
        timeline, kernels = gpu_commands(target, arguments, optimizer)
        console.print(f"on a GPU machine: {timeline}", f"kernels of one stage: {kernels}", sep="\n", soft_wrap=True)


def gpu_commands(target: str, arguments: Sequence[str], optimizer: str) -> tuple[str, str]:
    """What records the same under Nsight Systems, ready for --nsys, and one stage's kernels under Nsight Compute.

    A scenario is trained: both tools and torch.profiler want the same counters of the device for themselves.
    """
    if target.endswith(".py"):
        program = " ".join(["python", target, *arguments])
    else:
        program = f"triton-curv train {target} --optimizer {optimizer} --device cuda"
    record = f"{VARIABLE}=1 nsys profile --trace=cuda,nvtx --output=stages {program}"
    read = "nsys export --type=sqlite stages.nsys-rep && triton-curv profile --nsys stages.sqlite"
    kernels = f'{VARIABLE}=1 ncu --set full --nvtx --nvtx-include "{DOMAIN}@inverse/" {program}'
    return f"{record} && {read}", kernels


def _table(rows: Sequence[StageRow], steps: int, title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("stage", no_wrap=True)
    for name in ("calls", "ms a\nstep", "share", "MFLOP\na step", "MB a\nstep", "GFLOP/s", "GB/s", "roof"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.stage,
            str(row.calls),
            f"{row.seconds / steps * 1e3:.4g}",
            f"{row.share:.1%}",
            f"{row.flops / steps / 1e6:.3g}" if row.flops else "",
            f"{row.bytes / steps / 1e6:.3g}" if row.bytes else "",
            f"{row.tflops * 1e3:.3g}" if row.tflops else "",
            f"{row.gbs:.3g}" if row.gbs else "",
            f"{row.roof:.0%}" if row.roof is not None else "",
        )
    return table


def _write(rows: Sequence[StageRow], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(StageRow.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
