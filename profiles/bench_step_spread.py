"""What steps of K-FAC cost beside SGD's, and is one with a refresh a spike? By its options.

python -m profiles.bench_step_spread [SCENARIO ...] [--cases NAME,...] [--steps N] [--repeats N] [--csv FILE]
    appends to profiles/results/step_spread.csv

p99 / median of the time of a step, and the same of times divided by SGD's at that moment, the median of nine steps,
which leaves the machine's slow minutes out; mean of the first 40 steps, where statistics are renewed most often, and of
all, over SGD's mean of the same run.

Process CPU time of forward, backward, step() and zero_grad(), one thread. Optimizers take turns, step by step, and all
run `--repeats` times from the same start; a step's time is the minimum over the repeats: what else the machine does
drops out, what the schedule does at that step stays. SGD has no schedule: its p99 is what the machine does.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from profiles.machine import append_rows
from triton_curv import KFAC
from triton_curv.scenarios import get_scenario
from triton_curv.training.timing import one_thread
from triton_curv.training.trainer import Trainer

START = 40
WINDOW = 9
CASES: Mapping[str, Mapping[str, Any] | None] = {
    "sgd": None,
    "all": {},
    "even": {"refresh_budget": "even"},
    "4": {"refresh_budget": 4},
    "4/32": {"refresh_budget": 4, "conv_samples": 32},
    "even/64": {"refresh_budget": "even", "conv_samples": 64},
    "even/32": {"refresh_budget": "even", "conv_samples": 32},
}


def step_milliseconds(scenario: str, cases: Sequence[str], steps: int) -> dict[str, Tensor]:
    """CPU time of each step from the start of training, of each case, (steps,)."""
    task = get_scenario(scenario)
    data = task.load()
    trainers = {case: Trainer(task, data, "sgd", 1e-3, 0, steps) for case in cases}
    for case, trainer in trainers.items():
        options = CASES[case]
        if options is not None:
            trainer.optimizer = KFAC(trainer.model, lr=task.learning_rate("kfac"), **options)
    times: dict[str, list[float]] = {case: [] for case in cases}
    for _ in range(steps):
        for case, trainer in trainers.items():
            batch = trainer.draw()
            start = time.process_time()
            trainer.step(batch)
            times[case].append((time.process_time() - start) * 1e3)
    return {case: torch.tensor(each) for case, each in times.items()}


def around(times: Tensor) -> Tensor:
    """The median of the `WINDOW` steps around each."""
    half = WINDOW // 2
    return (
        torch.nn.functional.pad(times[None, None], (half, half), mode="replicate")[0, 0]
        .unfold(0, WINDOW, 1)
        .median(1)[0]
    )


def spread(times: Tensor) -> float:
    """p99 / median."""
    return float(times.quantile(0.99) / times.median())


def measure(scenario: str, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """One row for each case; prints it."""
    best: dict[str, Tensor] = {}
    beside: dict[str, Tensor] = {}
    for _ in range(arguments.repeats):
        found = step_milliseconds(scenario, arguments.cases.split(","), arguments.steps)
        local = around(found["sgd"]) if "sgd" in found else torch.full((arguments.steps,), torch.nan)
        for case, times in found.items():
            best[case] = torch.minimum(best.get(case, times), times)
            beside[case] = torch.minimum(beside.get(case, times / local), times / local)
    of_sgd = float(best["sgd"].mean()) if "sgd" in best else float("nan")
    rows: list[dict[str, object]] = []
    for case, times in best.items():
        options = CASES[case]
        median, p99, mean = float(times.median()), float(times.quantile(0.99)), float(times.mean())
        start, whole = float(times[:START].mean()) / of_sgd, mean / of_sgd
        print(
            f"{scenario} {case:8} mean {mean:.2f} ms  median {median:.2f} ms  p99 {p99:.2f} ms  "
            f"p99/median {p99 / median:.2f}  beside SGD {spread(beside[case]):.2f}  "
            f"longest/median {float(times.max()) / median:.2f}  "
            f"SGD steps, first {START}: {start:.2f}, all: {whole:.2f}",
            flush=True,
        )
        rows.append(
            {
                "scenario": scenario,
                "refresh_budget": "" if options is None else options.get("refresh_budget", "all"),
                "steps": arguments.steps,
                "repeats": arguments.repeats,
                "median_ms": median,
                "p99_ms": p99,
                "p99_over_median": p99 / median,
                "longest_over_median": float(times.max()) / median,
                "conv_samples": "" if options is None else options.get("conv_samples", 0),
                "mean_ms": mean,
                "optimizer": "sgd" if options is None else "kfac",
                f"first_{START}_over_sgd": start,
                "all_over_sgd": whole,
                "p99_over_median_beside_sgd": spread(beside[case]),
            }
        )
    return rows


def main() -> None:
    """Measure, print, append rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", default=["mnist5k-resnet"], metavar="SCENARIO")
    parser.add_argument("--cases", default="sgd,all,even", help=f"of {', '.join(CASES)}")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "step_spread.csv")
    arguments = parser.parse_args()
    with one_thread():
        rows = [row for scenario in arguments.scenarios for row in measure(scenario, arguments)]
    append_rows(arguments.csv, rows, torch.device("cpu"))


if __name__ == "__main__":
    main()
