"""Target loss = best-of-grid AdamW's evaluated training loss at 60 % of a scenario's budget, mean of 3 seeds.

python -m profiles.targets [SCENARIO ...]     prints the constant that belongs into each scenario file
"""

from __future__ import annotations

import argparse
import statistics

from triton_curv.scenarios import SCENARIOS, Scenario, get_scenario
from triton_curv.training.search import Run, search_rate, train_run
from triton_curv.training.timing import one_thread

SHARE_OF_BUDGET = 0.6
SEEDS = (0, 1, 2)
RATES = 5


def measure_target(scenario: Scenario, optimizer: str = "adamw") -> tuple[float, float]:
    """(target loss, the rate that gave it); prints the final loss of every rate tried."""
    data = scenario.load()
    at = round(SHARE_OF_BUDGET * scenario.budget)

    def run(name: str, rate: float, seed: int) -> Run:
        return train_run(scenario, data, name, rate, seed, scenario.budget)

    with one_thread():
        result = search_rate(optimizer, scenario.rate_grid(optimizer, RATES), SEEDS, run)
    for tried in result.search:
        print(f"  {scenario.name} {optimizer} lr {tried.rate:<8g} final loss {tried.final_loss:.4g}")
    if result.rate is None:
        raise RuntimeError(f"{optimizer} diverged at every rate of {scenario.name}")
    losses = [point.train_loss for r in result.runs for point in r.points if point.step == at]
    return statistics.fmean(losses), result.rate


def main() -> None:
    """Print the target of each named scenario, or of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO")
    for name in parser.parse_args().scenarios or SCENARIOS:
        target, rate = measure_target(get_scenario(name))
        print(f"{name}: target_loss={target:.4g}  (adamw, lr {rate:g}, at {SHARE_OF_BUDGET:.0%} of the budget)")


if __name__ == "__main__":
    main()
