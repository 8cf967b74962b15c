"""``triton-curv scenarios``: what can be trained."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from triton_curv.scenarios import SCENARIOS


def show_scenarios() -> None:
    """Print name, summary, size, budget, target loss and metric of each scenario."""
    table = Table.grid(padding=(0, 2, 1, 0))
    for scenario in SCENARIOS.values():
        budget = f"{scenario.train_rows} rows, batch {scenario.batch_size}, {scenario.budget} steps"
        goal = f"target training loss {scenario.target_loss:g}, metric {scenario.metric.name}"
        table.add_row(f"[bold]{scenario.name}", f"{scenario.summary}\n{budget}\n{goal}")
    Console(highlight=False).print(table)
