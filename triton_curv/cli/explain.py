"""``triton-curv explain``: what K-FAC covers, holds and costs on a model, as a table, JSON or a page."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from triton_curv.cli.models import build_without_data, find_model
from triton_curv.explanation import Explanation, Ranks, explain, on_ranks, write_page
from triton_curv.explanation.units import readable_bytes, readable_flops
from triton_curv.training.errors import OutputError
from triton_curv.training.files import require_folder

WIDTH = 150
LONGEST_NAME = 48
"""Characters of a layer's name that a table keeps on one line."""


@dataclass(frozen=True)
class ExplainOptions:
    """The options as given."""

    model: str
    batch: int | None
    input_shape: str | None
    input_dtype: str
    factor_interval: int
    inverse_interval: int
    max_factor_dim: int
    json: bool
    html: Path | None
    ranks: Ranks | None = None


def run_explain(options: ExplainOptions) -> None:
    """Explain, print, and write the page if asked for."""
    named = find_model(options.model, options.batch, options.input_shape, options.input_dtype)
    explanation = explain(
        build_without_data(named),
        named.name,
        named.shape,
        named.dtypes,
        factor_interval=options.factor_interval,
        inverse_interval=options.inverse_interval,
        max_factor_dim=options.max_factor_dim,
    )
    shared = None if options.ranks is None else on_ranks(explanation, options.ranks)
    if options.html is not None:
        require_folder(options.html.absolute().parent)
        try:
            write_page(explanation, options.html, "" if shared is None else str(shared))
        except OSError as error:
            raise OutputError(f"cannot write the page {options.html}: {error.strerror}") from error
    if options.json:
        content = explanation.to_json()
        print(json.dumps(content if shared is None else {**content, "ranks": shared.to_json()}, indent=1))
        return
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)  # a file or a pipe has no edge to wrap at
    console.print(_layers(explanation))
    console.print(_stages(explanation))
    for line in _summary(explanation):
        console.print(line, highlight=False, soft_wrap=True)
    if shared is not None:
        console.print(f"\n{shared}", highlight=False, markup=False, soft_wrap=True)
    if options.html is not None:
        console.print(str(options.html.absolute()), soft_wrap=True, highlight=False)


def _layers(explanation: Explanation) -> Table:
    shape = " x ".join(map(str, explanation.input_shape))
    title = f"{explanation.model}: input {shape} {explanation.input_dtype}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left")
    longest = max((len(row.layer) for row in explanation.rows), default=0)
    table.add_column("layer", overflow="fold", min_width=min(longest, LONGEST_NAME))
    table.add_column("kind", overflow="fold")
    table.add_column("numbers", justify="right")
    for name in ("trained by", "curvature", "factors"):
        table.add_column(name, overflow="fold")
    for name in ("state", "statistics\nFLOP", "inverses\nFLOP", "precond.\nFLOP"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in explanation.rows:
        costs = (readable_flops(c.flops) if c.flops else "" for c in (row.statistics, row.inverse, row.apply))
        memory = readable_bytes(row.memory)
        curvature = row.exact if row.trainer == "kfac" else f"{row.exact}: {row.note}"
        table.add_row(
            row.layer, row.kind, f"{row.numbers:,}", row.trainer, curvature, row.factors or "-", memory, *costs
        )
    return table


def _stages(explanation: Explanation) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("stage")
    for name in ("every", "FLOP", "moved", "FLOP a step", "share of forward + backward"):
        table.add_column(name, justify="right")
    for stage in explanation.stages:
        table.add_row(
            stage.stage,
            "step" if stage.interval == 1 else f"{stage.interval} steps",
            readable_flops(stage.cost.flops),
            readable_bytes(stage.cost.bytes),
            readable_flops(stage.flops_per_step),
            f"{stage.flops_per_step / max(explanation.model_flops, 1):.2%}",
        )
    return table


def _summary(explanation: Explanation) -> list[str]:
    memory = explanation.memory()
    state, parameters = sum(memory.values()), max(explanation.parameter_bytes, 1)
    kinds = ", ".join(f"{name} {readable_bytes(held)}" for name, held in memory.items())
    share = explanation.flops_per_step / max(explanation.model_flops, 1)
    return [
        f"{explanation.covered:.1%} of the trained numbers have a curvature block.",
        f"Memory: {kinds}; together {state / parameters:.1f} x the parameters ({readable_bytes(parameters)}).",
        f"A mean step adds {readable_flops(explanation.flops_per_step)}FLOP, {share:.1%} of forward + backward "
        f"({readable_flops(explanation.model_flops)}FLOP); one renewal of all inverses is "
        f"{readable_flops(explanation.total('inverse').flops)}FLOP.",
    ]
