"""Cost of a training step of every optimizer on every scenario, as a ratio to SGD: interleaved, medians.

python -m profiles.bench_steps [SCENARIO ...] [--device cuda] [--rounds N] [--budget SECONDS] [--optimizers NAME ...]
                               [--csv FILE]                   appends to profiles/results/steps.csv by default

A step is forward, backward, step() and zero_grad(), in process CPU time or, on a GPU, in seconds of the clock; a block
of steps holds whole refresh cycles, so the figure of K-FAC is the mean over a cycle. `optimizer_ms` is the time in
step() and zero_grad() alone; for optimizers that take a closure, whose step() makes all passes, that is the whole. On a
GPU it comes from blocks of their own, in which the host waits for the device before and after it.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import date
from pathlib import Path

import torch

from triton_curv.scenarios import SCENARIOS, get_scenario
from triton_curv.schedules import GROWING
from triton_curv.training.environment import commit, hardware
from triton_curv.training.optimizers import CLOSURES, OPTIMIZERS
from triton_curv.training.timing import one_thread
from triton_curv.training.trainer import Trainer

ROUNDS = 25
CYCLE = GROWING.most  # steps from one renewal to the next, once training has begun
FIELDS = ["date", "commit", "cpu", "torch", "scenario", "optimizer", "step_ms", "step_ratio", "optimizer_ms"]


def cpu_block(name: str, trainer: Trainer, steps: int) -> tuple[float, float]:
    """Mean CPU seconds of a whole step, and of the optimizer's part of it, over `steps` steps."""
    return _timed(name, trainer, steps, time.process_time)


def cuda_block(name: str, trainer: Trainer, steps: int) -> tuple[float, float]:
    """The same by the clock: whole steps without a wait between them, then steps with one around each part."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    _timed(name, trainer, steps, time.perf_counter)
    torch.cuda.synchronize()
    whole = (time.perf_counter() - start) / steps

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return whole, _timed(name, trainer, steps, clock)[1]


def _timed(name: str, trainer: Trainer, steps: int, clock: Callable[[], float]) -> tuple[float, float]:
    whole = part = 0.0
    for _ in range(steps):
        x, y = trainer.draw()
        start = clock()
        if name in CLOSURES:
            trainer.step((x, y))
            whole += clock() - start
            part = whole
            continue
        trainer.scenario.objective(trainer.model, trainer.model(x), y).backward()
        middle = clock()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        end = clock()
        whole += end - start
        part += end - middle
    return whole / steps, part / steps


def measure(
    name: str,
    device: torch.device,
    rounds: int = ROUNDS,
    optimizers: Sequence[str] = tuple(OPTIMIZERS),
    budget: float = float("inf"),
) -> dict[str, tuple[float, float]]:
    """Median (step, optimizer part) in ms of optimizers on one scenario, blocks taken in rotation.

    The first round warms up. No further one begins once `budget` seconds are over, but one that counts.
    """
    end = time.monotonic() + budget
    scenario = get_scenario(name)
    data = scenario.load()
    cuda = device.type == "cuda"
    steps = CYCLE * (rounds + 1) * (1 + cuda)
    trainers = {
        n: Trainer(scenario, data, n, scenario.learning_rate(n) / 10, 0, steps, device=device) for n in optimizers
    }
    blocks: dict[str, list[tuple[float, float]]] = {n: [] for n in trainers}
    with nullcontext() if cuda else one_thread():
        for round_ in range(rounds + 1):
            if round_ > 1 and time.monotonic() > end:
                print(f"time is over after {round_ - 1} of {rounds} rounds")
                break
            for n, trainer in trainers.items():
                blocks[n].append((cuda_block if cuda else cpu_block)(n, trainer, CYCLE))
    return {
        n: (statistics.median(w for w, _ in b[1:]) * 1e3, statistics.median(p for _, p in b[1:]) * 1e3)
        for n, b in blocks.items()
    }


def main() -> None:
    """Measure, print a table, append the rows to a CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="blocks of each optimizer, behind a first one")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="for each scenario")
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS), metavar="NAME")
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "steps.csv")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    optimizers = list(dict.fromkeys(["sgd", "adamw", *arguments.optimizers]))  # the others are ratios to these
    machine = {
        "date": date.today().isoformat(),
        "commit": commit() or "",
        "cpu": torch.cuda.get_device_name(device) if device.type == "cuda" else hardware()["cpu"],
        "torch": torch.__version__,
    }
    rows = []
    for scenario in arguments.scenarios or SCENARIOS:
        times = measure(scenario, device, arguments.rounds, optimizers, arguments.budget)
        print(f"{scenario:12} {'step ms':>9} {'x SGD':>7} {'x AdamW':>8} {'step() ms':>10}")
        for name, (step, part) in times.items():
            ratio = step / times["sgd"][0]
            print(f"  {name:10} {step:9.3f} {ratio:7.2f} {step / times['adamw'][0]:8.2f} {part:10.3f}")
            values = (scenario, name, f"{step:.4f}", f"{ratio:.3f}", f"{part:.4f}")
            rows.append({**machine, **dict(zip(FIELDS[4:], values, strict=True))})
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    fresh = not arguments.csv.exists()
    with arguments.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
