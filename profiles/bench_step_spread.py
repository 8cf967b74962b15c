"""Is a step with a refresh a spike? p99 / median of K-FAC's step time, by `refresh_budget` and `conv_samples`.

python -m profiles.bench_step_spread [SCENARIO] [--steps N] [--csv FILE]     appends to profiles/results/step_spread.csv

Process CPU time of forward, backward, step() and zero_grad(), one thread. Optimizers take turns, and each runs
`--repeats` times from the same start; a step's time is the minimum over the repeats: what else the machine does drops
out, what the schedule does at that step stays.
"""

import argparse
import time
from pathlib import Path

import torch

from profiles.machine import append_rows
from triton_curv import KFAC
from triton_curv.scenarios import get_scenario
from triton_curv.training.timing import one_thread
from triton_curv.training.trainer import Trainer

CASES: tuple[tuple[int | None, int], ...] = ((None, 0), (4, 0), (4, 32), (2, 16))


def step_milliseconds(scenario: str, budget: int | None, conv_samples: int, steps: int) -> list[float]:
    """CPU time of each step from the start of training."""
    task = get_scenario(scenario)
    trainer = Trainer(task, task.load(), "sgd", 1e-3, 0, steps)
    trainer.optimizer = KFAC(
        trainer.model, lr=task.learning_rate("kfac"), refresh_budget=budget, conv_samples=conv_samples
    )
    times = []
    for _ in range(steps):
        batch = trainer.draw()
        start = time.process_time()
        trainer.step(batch)
        times.append((time.process_time() - start) * 1e3)
    return times


def main() -> None:
    """Measure, print, append rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", nargs="?", default="mnist5k-resnet")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "step_spread.csv")
    arguments = parser.parse_args()
    best: dict[tuple[int | None, int], torch.Tensor] = {}
    with one_thread():
        for _ in range(arguments.repeats):
            for case in CASES:
                times = torch.tensor(step_milliseconds(arguments.scenario, *case, arguments.steps))
                best[case] = torch.minimum(best.get(case, times), times)
    rows: list[dict[str, object]] = []
    for (budget, conv_samples), times in best.items():
        median, p99 = float(times.median()), float(times.quantile(0.99))
        told = f"refresh_budget={budget!s:5} conv_samples={conv_samples:<3}"
        print(f"{told} median {median:.2f} ms  p99 {p99:.2f} ms  p99/median {p99 / median:.2f}")
        rows.append(
            {
                "scenario": arguments.scenario,
                "refresh_budget": "all" if budget is None else budget,
                "steps": arguments.steps,
                "repeats": arguments.repeats,
                "median_ms": median,
                "p99_ms": p99,
                "p99_over_median": p99 / median,
                "longest_over_median": float(times.max()) / median,
                "conv_samples": conv_samples,
            }
        )
    append_rows(arguments.csv, rows, torch.device("cpu"))


if __name__ == "__main__":
    main()
