"""What a Hessian- or Gauss-Newton-vector product inside one CG solve costs beside a gradient, on a CPU, one thread.

    python -m profiles.bench_products [--rounds N] [--csv PATH]

The operator is built once, as in a solve, and its first product is not counted: what it builds is reused by all others
(`setup` tells what building took, in gradients, first product included). Gradient and products take turns, so that a
busy machine slows all of them alike; medians of paired ratios. The gradient is forward and backward of the same loss.
Bars (issue 5): the better Hessian product at most 2.2 gradients, the better Gauss-Newton product at most 1.6.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation

from triton_curv.operators import FrozenClosure, GaussNewtonOperator, HessianOperator
from triton_curv.scenarios.digits import digits_cnn

BARS = {"hvp": 2.2, "ggn": 1.6}


class Row(NamedTuple):
    """One line of the table; ratios are to one gradient."""

    model: str
    product: str
    method: str
    gradient_us: float
    ratio: float
    p20: float
    p80: float
    setup: float
    repetitions: int


class Task(NamedTuple):
    """A model, a batch and a loss."""

    model: nn.Module
    x: Tensor
    y: Tensor

    def loss(self) -> Tensor:
        """Cross-entropy of the batch."""
        return F.cross_entropy(self.model(self.x), self.y)

    def pair(self) -> tuple[Tensor, Tensor]:
        """The loss and the logits."""
        z = self.model(self.x)
        return F.cross_entropy(z, self.y), z


def cnn() -> Task:
    """The network of digits-cnn, batch 128."""
    return Task(digits_cnn(), torch.randn(128, 1, 8, 8), torch.randint(0, 10, (128,)))


def mlp() -> Task:
    """A 784-256-256-10 network, batch 256."""
    net = nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10))
    return Task(net, torch.randn(256, 784), torch.randint(0, 10, (256,)))


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds of one call: with one thread what a wall clock shows on a machine of one's own."""
    start = time.process_time()
    call()
    return time.process_time() - start


def rows(name: str, task: Task, rounds: int) -> list[Row]:
    """All products of one task."""
    params = [p for p in task.model.parameters() if p.requires_grad]
    vectors = [torch.randn_like(p) for p in params]

    def gradient() -> object:
        return torch.autograd.grad(task.loss(), params)

    builders: dict[tuple[str, str], Callable[[], Any]] = {
        ("hvp", "reverse"): lambda: HessianOperator(FrozenClosure(task.model, task.loss), params, "reverse"),
        ("hvp", "forward"): lambda: HessianOperator(FrozenClosure(task.model, task.loss), params, "forward"),
        ("ggn", "jvp"): lambda: GaussNewtonOperator(FrozenClosure(task.model, task.pair), params, "jvp"),
        ("ggn", "double_vjp"): lambda: GaussNewtonOperator(FrozenClosure(task.model, task.pair), params, "double_vjp"),
    }
    for _ in range(5):
        gradient()
    operators: dict[tuple[str, str], Any] = {}
    setups: dict[tuple[str, str], float] = {}
    for key, build in builders.items():
        build()(vectors)  # warm-up
        before = seconds(gradient)
        start = time.process_time()
        operators[key] = build()
        operators[key](vectors)
        setups[key] = 2 * (time.process_time() - start) / (before + seconds(gradient))
    gradients: list[float] = []
    ratios: dict[tuple[str, str], list[float]] = {key: [] for key in operators}
    for _ in range(rounds):
        for key, operator in operators.items():
            base = seconds(gradient)
            product = seconds(partial(operator, vectors))
            base = (base + seconds(gradient)) / 2
            gradients.append(base)
            ratios[key].append(product / base)
    median = 1e6 * statistics.median(gradients)
    table = []
    for (product_name, method), values in ratios.items():
        cuts = statistics.quantiles(values, n=5)
        ratio = statistics.median(values)
        setup = setups[product_name, method]
        table.append(Row(name, product_name, method, median, ratio, cuts[0], cuts[3], setup, len(values)))
    return table


def main() -> None:
    """Measure, print, and write the CSV file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="paired measurements of each product")
    parser.add_argument("--csv", type=Path, help="write the rows to this file, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = [
        row
        for name, task in {"digits-cnn": cnn(), "mlp-784-256-256-10": mlp()}.items()
        for row in rows(name, task, arguments.rounds)
    ]
    print(f"torch {torch.__version__}, 1 thread")
    print(
        f"{'model':20} {'product':8} {'method':11} {'gradient us':>11} {'ratio':>6} {'p20':>6} {'p80':>6} {'setup':>6}"
    )
    for r in table:
        print(
            f"{r.model:20} {r.product:8} {r.method:11} {r.gradient_us:11.0f} {r.ratio:6.2f} {r.p20:6.2f} {r.p80:6.2f} "
            f"{r.setup:6.2f}"
        )
    for model in sorted({r.model for r in table}):
        for product, bar in BARS.items():
            best = min((r for r in table if (r.model, r.product) == (model, product)), key=lambda r: r.ratio)
            verdict = "ok" if best.ratio <= bar else "OVER"
            print(f"{model}: {product} {best.ratio:.2f} gradients by {best.method}, bar {bar}: {verdict}")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*Row._fields, "torch"])
            writer.writerows([*r, torch.__version__] for r in table)


if __name__ == "__main__":
    main()
