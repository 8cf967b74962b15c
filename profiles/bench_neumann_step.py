"""What a Neumann step costs beside `torch.optim.AdamW(foreach=True)`, on a CPU, one thread.

    python profiles.bench_bench_neumann_step.py [--rounds N] [--csv PATH]

Two figures for each model: the optimizer's step alone, on fixed gradients, and the whole training step (zero_grad,
forward, backward, step). The optimizers take turns in rounds of a few repetitions, each timed by itself, so that a
busy machine slows all of them alike; medians over all repetitions. Neumann is past its warm-up and never resets:
the costly kind of step.
"""

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from triton_curv.optimizers.neumann import Neumann

REPETITIONS_A_ROUND = 10


class Row(NamedTuple):
    """One line of the table; times in microseconds."""

    model: str
    part: str
    optimizer: str
    median_us: float
    p20_us: float
    p80_us: float
    ratio_to_adamw: float
    repetitions: int


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    """The 13-64-64-1 network of reg-bos, batch 32."""
    net = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    return net, torch.randn(32, 13), torch.randn(32, 1)


def conv() -> tuple[nn.Module, Tensor, Tensor]:
    """Three conv-BatchNorm-ReLU layers and a linear one on 8x8 images, batch 128."""
    layers: list[nn.Module] = []
    for c_in, c_out, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1)):
        layers += [nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, 10))
    return net, torch.randn(128, 1, 8, 8), torch.randn(128, 10)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adamw": lambda net: AdamW(net.parameters(), lr=1e-4, foreach=True),
    "sgd": lambda net: SGD(net.parameters(), lr=1e-4, momentum=0.9, foreach=True),
    "neumann": lambda net: Neumann(net.parameters(), lr=1e-4, warmup=20, period=10**9),
}


def make_step(build: Callable[[], tuple[nn.Module, Tensor, Tensor]], optimizer: str, part: str) -> Callable[[], object]:
    """A function that makes one step, warmed up."""
    torch.manual_seed(0)
    net, x, y = build()
    opt = OPTIMIZERS[optimizer](net)

    def train() -> None:
        opt.zero_grad()
        (net(x) - y).square().mean().backward()
        opt.step()

    for _ in range(40):
        train()
    return opt.step if part == "step" else train


def measure(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Microseconds of every repetition, the optimizers taking turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()  # brings code and data back into the cache
            for _ in range(REPETITIONS_A_ROUND):
                start = time.perf_counter_ns()
                step()
                times[name].append((time.perf_counter_ns() - start) / 1e3)
    return times


def rows(rounds: int) -> list[Row]:
    """The whole table."""
    table = []
    for (model, build), part in product({"mlp-13-64-64-1": mlp, "conv-bn-relu": conv}.items(), ("step", "training")):
        times = measure({name: make_step(build, name, part) for name in OPTIMIZERS}, rounds)
        adamw = statistics.median(times["adamw"])
        for name, values in times.items():
            median, cuts = statistics.median(values), statistics.quantiles(values, n=5)
            table.append(Row(model, part, name, median, cuts[0], cuts[3], median / adamw, len(values)))
    return table


def main() -> None:
    """Measure, print, and write the CSV file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help=f"rounds of {REPETITIONS_A_ROUND} repetitions")
    parser.add_argument("--csv", type=Path, help="write the rows to this file, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = rows(arguments.rounds)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, 1 thread")
    print(f"{'model':16} {'part':9} {'optimizer':10} {'median us':>10} {'p20':>9} {'p80':>9} {'/ adamw':>8}")
    for r in table:
        print(
            f"{r.model:16} {r.part:9} {r.optimizer:10} {r.median_us:10.1f} {r.p20_us:9.1f} {r.p80_us:9.1f} "
            f"{r.ratio_to_adamw:8.2f}"
        )
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*Row._fields, "torch"])
            writer.writerows([*r, torch.__version__] for r in table)


if __name__ == "__main__":
    main()
