"""Predicted time of an iteration of K-FAC on ResNet-50, 1 to 4096 GPUs, beside what the papers measured.

python -m profiles.scaling [--csv FILE] [--png FILE]

Nothing is measured here. Predictions come from a plan for each number of ranks (`triton_curv.sharding`), FLOPs and
bytes counted on the meta device, and a machine's stated rates (`Machine`: assumed, not fitted to the curves). 32 images
a GPU, as in the papers. Measured curves, read off figures: arXiv 1811.12019 figure 2 (+-0.002 s); 2002.06015 figure 5
(empirical Fisher, unit-wise BatchNorm, no stale statistics).
"""

import argparse
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

import triton_curv as tc
from profiles.machine import append_rows
from profiles.models import resnet50
from triton_curv.explanation import explain
from triton_curv.sharding.costs import H100, V100, Machine
from triton_curv.sharding.layers import LayerSize, layer_sizes
from triton_curv.sharding.plan import PlanOptions
from triton_curv.sharding.report import ShardReport, shard_report
from triton_curv.sharding.timeline import Workload
from triton_curv.sharding.traffic import Wire

RANKS = tuple(2**i for i in range(13))
IMAGES = 32
MILLION = 10**6
MEASURED: dict[str, dict[int, float]] = {
    "1811.12019, figure 2": {
        4: 0.724,
        8: 0.746,
        16: 0.661,
        32: 0.598,
        64: 0.552,
        128: 0.568,
        256: 0.569,
        512: 0.659,
        1024: 0.690,
        2048: 0.744,
    },
    "2002.06015, figure 5": {1: 0.57, 64: 0.235, 1024: 0.263},
}


@dataclass(frozen=True)
class Curve:
    """A setting to predict: intervals are steps between statistics and between inverses; bytes on the wire."""

    name: str
    machine: Machine
    interval: int = 1
    wire: int = 4


CURVES = (
    Curve("everything at every step, V100", V100),
    Curve("every 20 steps, V100", V100, 20),
    Curve("everything at every step, H100, half precision on the wire", H100, 1, 2),
    Curve("every 20 steps, H100, half precision on the wire", H100, 20, 2),
)


@dataclass(frozen=True)
class Row:
    """One point: times in ms (empty where measured), MiB that the busiest sender sends in a mean step."""

    curve: str
    how: str
    ranks: int
    mean_ms: float
    longest_ms: float | str = ""
    sgd_ms: float | str = ""
    sent_mib: float | str = ""
    sgd_mib: float | str = ""
    balance: float | str = ""
    memory_mib: float | str = ""


@cache
def resnet50_work() -> tuple[tuple[LayerSize, ...], Workload]:
    """Layers of ResNet-50 and what one rank computes for its 32 images, from shapes alone."""
    with torch.device("meta"):
        model = resnet50()
    explanation = explain(model, "resnet50", (IMAGES, 3, 224, 224))
    with torch.device("meta"):
        optimizer = tc.KFAC(resnet50())
    layers = layer_sizes({name: block.rule for name, block in optimizer.blocks.items()})
    numbers = sum(row.numbers for row in explanation.rows)
    return layers, Workload(explanation.model_flops, explanation.total("statistics"), numbers)


def reports(curve: Curve) -> Iterable[ShardReport]:
    """One for each number of ranks."""
    layers, workload = resnet50_work()
    for ranks in RANKS:
        options = PlanOptions(ranks, inverse_interval=curve.interval, machine=curve.machine)
        wire = Wire("plain", curve.wire, curve.wire, 0, curve.interval, curve.interval)
        yield shard_report(layers, options, wire, workload)


def predicted(curve: Curve) -> list[Row]:
    """The points of one curve."""
    rows = []
    for report in reports(curve):
        assert report.times is not None
        assert report.sgd_times is not None
        rows.append(
            Row(
                curve.name,
                "predicted",
                report.plan.grid.world_size,
                report.times.mean / MILLION,
                report.times.longest / MILLION,
                report.sgd_times.mean / MILLION,
                report.bytes_per_step / 2**20,
                report.sgd_bytes / 2**20,
                report.plan.balance,
                max(memory.total for memory in report.memory) / 2**20,
            )
        )
    return rows


def measured() -> list[Row]:
    """The papers' points."""
    return [
        Row(name, "read off the figure", ranks, 1e3 * s)
        for name, points in MEASURED.items()
        for ranks, s in points.items()
    ]


def draw(rows: list[Row], path: Path) -> None:
    """Write a 1600 x 700 PNG: time of a mean step, and bytes sent against SGD's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 7), dpi=100, layout="constrained")
    times, sent = figure.subplots(1, 2)
    for name in dict.fromkeys(row.curve for row in rows):
        own = [row for row in rows if row.curve == name]
        x = [row.ranks for row in own]
        if own[0].how == "predicted":
            (line,) = times.plot(x, [row.mean_ms for row in own], "-", linewidth=2.2, label=f"predicted: {name}")
            beyond = [row for row in own if row.ranks > 1]
            x = [row.ranks for row in beyond]
            ratios = [float(row.sent_mib) / float(row.sgd_mib) for row in beyond]
            sent.plot(x, ratios, "-", linewidth=2.2, color=line.get_color(), label=name)
        else:
            times.plot(x, [row.mean_ms for row in own], "o", markersize=8, label=f"measured: arXiv {name}")
    for axes in (times, sent):
        axes.set_xscale("log", base=2)
        axes.set_xticks([4**i for i in range(7)], [str(4**i) for i in range(7)])
        axes.set_xlabel("GPUs", fontsize=14)
        axes.tick_params(labelsize=12)
        axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    times.set_yscale("log")
    times.set_ylabel("ms per iteration (mean)", fontsize=14)
    times.set_ylim(bottom=0.6)
    times.legend(fontsize=11, frameon=False)
    sent.axhline(1, color="black", linestyle=(0, (4, 3)), linewidth=1.2)
    sent.set_ylim(bottom=0)
    sent.set_ylabel("bytes sent by a rank, relative to SGD's all-reduce", fontsize=14)
    sent.legend(fontsize=11, frameon=False)
    figure.suptitle("K-FAC on ResNet-50, 32 images a GPU: predictions from stated rates, not measured", fontsize=16)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Predict, print, write the CSV anew and draw."""
    results = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=results / "scaling.csv")
    parser.add_argument("--png", type=Path, default=results / "scaling.png")
    arguments = parser.parse_args()
    rows = [*measured(), *(row for curve in CURVES for row in predicted(curve))]
    print(f"{'curve':60} {'GPUs':>5} {'mean ms':>9} {'longest':>9} {'SGD ms':>8} {'MiB':>8} {'SGD MiB':>8}")
    for row in rows:
        cells = [
            f"{c:.1f}" if isinstance(c, float) else "" for c in (row.longest_ms, row.sgd_ms, row.sent_mib, row.sgd_mib)
        ]
        print(
            f"{row.curve:60} {row.ranks:5} {row.mean_ms:9.1f} {cells[0]:>9} {cells[1]:>8} {cells[2]:>8} {cells[3]:>8}"
        )
    arguments.csv.unlink(missing_ok=True)
    append_rows(arguments.csv, [asdict(row) for row in rows], torch.device("cpu"))
    draw(rows, arguments.png)


if __name__ == "__main__":
    main()
