"""stages.png: where the time of a step goes, and how near each stage comes to the roof."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from triton_curv.nvtx import COLORS
from triton_curv.profiling.table import StageRow
from triton_curv.profiling.torch_trace import BACKWARD, FORWARD

AROUND = {FORWARD: "#cfd8dc", BACKWARD: "#90a4ae"}


def color_of(stage: str) -> str:
    """The stage's colour in Nsight, or a grey for what is not ours."""
    stages: Mapping[str, int] = {str(name): number for name, number in COLORS.items()}
    return f"#{stages[stage]:06x}" if stage in stages else AROUND.get(stage, "#bdbdbd")


def draw_stages(rows: Sequence[StageRow], steps: int, title: str, path: Path) -> None:
    """Write a 1600 x 600 PNG: one stacked bar of a mean step, and bars of percent of the roof."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 6), dpi=100, layout="constrained")
    times, roofs = figure.subplots(1, 2, width_ratios=(2, 1))
    left = 0.0
    for row in rows:
        width = row.seconds / steps * 1e3
        label = f"{row.stage}  {width:.3g} ms  {row.share:.0%}"
        times.barh(0, width, left=left, color=color_of(row.stage), edgecolor="white", label=label)
        left += width
    times.set_yticks([])
    times.set_xlim(0, left)
    times.set_xlabel("mean step, ms", fontsize=13)
    times.legend(fontsize=11, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    times.spines[["top", "right", "left"]].set_visible(False)
    known = [row for row in rows if row.roof is not None][::-1]
    percents = [100 * (row.roof or 0.0) for row in known]
    bars = roofs.barh([row.stage for row in known], percents, color=[color_of(row.stage) for row in known])
    roofs.bar_label(bars, fmt="%.0f %%", padding=4, fontsize=12)
    roofs.set_xlim(0, max([100.0, *percents]) * 1.12)
    roofs.set_xlabel("percent of the roof measured on this machine", fontsize=13)
    roofs.tick_params(labelsize=12)
    roofs.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=15)
    figure.savefig(path)
