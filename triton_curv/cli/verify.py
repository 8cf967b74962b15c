"""``triton-curv verify``: a small copy of the user's model against definitions in float64; exit code 1 if one fails."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from triton_curv.cli.explain import WIDTH
from triton_curv.cli.models import built, find_model
from triton_curv.verification import Verdict, shrink, verify

SAMPLES = 5
"""Rows of a batch unless one is asked for: enough for every mean to differ from every sum."""


@dataclass(frozen=True)
class VerifyOptions:
    """The options as given."""

    model: str
    batch: int | None
    input_shape: str | None
    input_dtype: str
    json: bool


def run_verify(options: VerifyOptions) -> int:
    """Verify and print; 0 if all that could be compared is right, else 1."""
    batch = SAMPLES if options.batch is None else options.batch
    named = find_model(options.model, batch, options.input_shape, options.input_dtype)
    verdict = verify(shrink(built(named), named.shape, named.dtypes), named.name)
    if options.json:
        print(json.dumps({**asdict(verdict), "ok": verdict.ok}, indent=1))
    else:
        _show(verdict)
    return 0 if verdict.ok else 1


def _show(verdict: Verdict) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    narrowed = f"widths divided by {verdict.divisor}" if verdict.divisor > 1 else "widths as they are"
    title = f"{verdict.model}: float64, input {' x '.join(map(str, verdict.input_shape))}, {narrowed}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left")
    table.add_column("block", overflow="fold")
    table.add_column("kind")
    for name in ("factors,\nrel. error", "solve,\nrel. error", "gap to the\nexact Fisher"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for row in verdict.blocks:
        compared = row.factors is not None
        told = "wrong" if not row.ok else "right" if compared else "not compared"
        table.add_row(
            row.block,
            row.kind,
            _error(row.factors),
            _error(row.solve),
            "" if row.gap is None else f"{row.gap:.2f}",
            f"{told}: {row.note}" if row.note else told,
            style="red" if not row.ok else None,
        )
    console.print(table)
    for product in verdict.products:
        if product.op:
            layers = f" (layers: {', '.join(product.layers)})" if product.layers else ""
            line = f"{product.product}: not available, {product.op} has no second derivative{layers}"
        else:
            line = f"{product.product}: relative error {_error(product.error)} against central differences"
        console.print(line if product.ok or product.op else f"{line}: wrong", highlight=False, soft_wrap=True)
    for parameter, why in verdict.loose.items():
        console.print(f"no block: {parameter}: {why}", highlight=False, soft_wrap=True)
    known = [row for row in verdict.blocks if row.factors is not None]
    right = sum(row.ok for row in known)
    counts = f"{right} of {len(known)} blocks compared are right, of {len(verdict.blocks)} in all"
    console.print(counts, highlight=False)


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
