"""Accuracy of damped inverses by condition number, against float64: Cholesky in fp32 and hyperpower steps.

python -m profiles.bench_damped_inverse [--n 128] [--seeds 3] [--device cuda] [--csv FILE]

Matrices A = F + s I with eigenvalues log-spaced from 1 to 1 / kappa, F and s fp32 numbers, the truth exact: that all
methods round the sum to fp32 first counts as theirs. `error` is ||X - A^-1||_F / ||A^-1||_F and `residual`
||I - A X||_F as the op reports it (for Cholesky as float64 gives it), medians over seeds; `steps` are the fewest that
reach 1.1 times the error of `MOST` steps. A warm start is the inverse before 5 % of the average were replaced. Rows are
appended to profiles/results/damped_inverse.csv.
"""

import argparse
import statistics
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from profiles.machine import append_rows
from triton_curv.training.timing import one_thread
from triton_curv_kernels import damped_inverse_

KAPPAS = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8)
MOST = 24
CHANGE = 0.05


@dataclass(frozen=True)
class Row:
    """One way to invert one kind of matrix."""

    n: int
    kappa: float
    method: str
    start: str
    steps: int
    error: float
    residual: float


class Damped(NamedTuple):
    """F (1, n, n) and s (1,) in fp32; A = F + s I, its inverse and a warm start, in float64."""

    factor: Tensor
    shift: Tensor
    damped: Tensor
    inverse: Tensor
    before: Tensor


def damped_of(kappa: float, n: int, seed: int, device: torch.device) -> Damped:
    """A matrix of condition number `kappa` in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    values = torch.logspace(0, -torch.tensor(kappa).log10().item(), n, dtype=torch.float64)
    low = values.min() * 0.999
    factor = (basis * (values - low)) @ basis.mT
    factor = ((factor + factor.mT) / 2).float().to(device)
    shift = low.float().to(device)
    damped = factor.double() + shift.double() * torch.eye(n, dtype=torch.float64, device=device)
    samples = torch.randn(n, 2 * n, dtype=torch.float64, generator=generator).to(device)
    half = torch.linalg.cholesky(damped) @ samples
    before = (damped - CHANGE * half @ half.mT / (2 * n)) / (1 - CHANGE)
    return Damped(factor[None], shift[None], damped, torch.linalg.inv(damped), torch.linalg.inv(before))


def error_of(x: Tensor, made: Damped) -> float:
    """Relative, in the Frobenius norm; infinite where x is not finite."""
    error = float((x.double() - made.inverse).norm() / made.inverse.norm())
    return error if error == error else float("inf")


def by_cholesky(made: Damped) -> tuple[int, float, float]:
    """(0, error, residual)."""
    x = torch.cholesky_inverse(torch.linalg.cholesky_ex(made.damped.float())[0])
    identity = torch.eye(len(x), dtype=torch.float64, device=x.device)
    return 0, error_of(x, made), float((identity - made.damped @ x.double()).norm())


def by_hyperpower(made: Damped, order: int, warm: bool) -> tuple[int, float, float]:
    """(steps, error, residual)."""
    results = []
    for steps in range(1, MOST + 1):
        x = made.before.float()[None].clone() if warm else torch.zeros_like(made.factor)
        residual = damped_inverse_([x], [made.factor], [made.shift], steps, order)
        results.append((steps, error_of(x[0], made), float(residual)))
    enough = 1.1 * results[-1][1]
    return next(result for result in results if result[1] <= enough)


def rows(n: int, seeds: int, device: torch.device, kappas: tuple[float, ...] = KAPPAS) -> Iterator[Row]:
    """All methods for each condition number."""
    for kappa in kappas:
        made = [damped_of(kappa, n, seed, device) for seed in range(seeds)]
        ways = [("cholesky", "", [by_cholesky(each) for each in made])]
        for order in (2, 3):
            for start in ("cold", "warm"):
                found = [by_hyperpower(each, order, start == "warm") for each in made]
                ways.append((f"hyperpower order {order}", start, found))
        for method, start, found in ways:
            steps, error, residual = (statistics.median(column) for column in zip(*found, strict=True))
            yield Row(n, kappa, method, start, int(steps), error, residual)


def main() -> None:
    """Measure; print and append each row as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "damped_inverse.csv")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"{'kappa':>7} {'method':20} {'start':6} {'steps':>5} {'error':>9} {'residual':>9}")
    with one_thread() if device.type == "cpu" else nullcontext():
        for row in rows(options.n, options.seeds, device):
            print(
                f"{row.kappa:7.0e} {row.method:20} {row.start:6} {row.steps:5} {row.error:9.1e} {row.residual:9.1e}",
                flush=True,
            )
            append_rows(options.csv, [asdict(row)], device)


if __name__ == "__main__":
    main()
