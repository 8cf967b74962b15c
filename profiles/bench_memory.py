"""Memory of optimizers on models of real size: bytes they hold between steps, counted on the meta device.

python -m profiles.bench_memory [MODEL ...] [--measure] [--csv FILE]

Optimizers are built for a model on torch's meta device, where tensors have sizes but no storage, and every tensor that
building brought to life is counted. `--measure` also takes a step on the CPU with one small batch and reports what the
state then holds and the most that step() had allocated at one time, K-FAC's renewal of inverses included. Those of
others are computed from their published layouts (the row says "formula").
"""

import argparse
import gc
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import triton_curv as tc
from profiles.machine import append_rows
from profiles.models import gpt2, resnet50, vit_b16
from triton_curv.profiling.stopwatch import peak_extra_bytes

MIB = 2**20
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "resnet50": (resnet50, lambda: torch.randn(2, 3, 64, 64)),
    "gpt2": (gpt2, lambda: torch.randint(50257, (1, 16))),
    "vit-b16": (vit_b16, lambda: torch.randn(1, 3, 224, 224)),
}
SOAP_LARGEST = 10_000
"""Sides of a weight above this have no preconditioner in SOAP (arXiv 2409.11321, its default)."""


@dataclass(frozen=True)
class Row:
    """MiB that an optimizer holds, as a multiple of the parameters; `how` it was found."""

    model: str
    optimizer: str
    how: Literal["meta", "formula", "measured"]
    parameters_mib: float
    steady_mib: float
    times_parameters: float
    peak_step_mib: float | None = None


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages under `tensors`."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def living_tensors() -> list[Tensor]:
    """Every tensor that Python knows of."""
    gc.collect()
    return [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]


def held_by(build: Callable[[nn.Module], object], model: nn.Module) -> int:
    """Bytes that building an optimizer for `model` brings to life."""
    before = {t.untyped_storage()._cdata for t in living_tensors()}
    optimizer = build(model)
    after = [t for t in living_tensors() if t.untyped_storage()._cdata not in before]
    held = storage_bytes(after)
    del optimizer
    return held


def soap_bytes(model: nn.Module) -> int:
    """Two moments, and for each side of each matrix a statistic and its eigenbasis (conv weights as matrices)."""
    total = 0
    for p in model.parameters():
        sides = [p.shape[0], p[0].numel()] if p.dim() > 1 else []
        total += 2 * p.numel() + sum(2 * n * n for n in sides if n <= SOAP_LARGEST)
    return 4 * total


def kfac_pytorch_bytes(model: nn.Module) -> int:
    """A and G with their inverses for Linear and Conv2d layers, dense; momentum of SGD (kfac-pytorch 0.4)."""
    total = sum(p.numel() for p in model.parameters())
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            outputs, inputs = module.weight.shape[0], module.weight[0].numel() + (module.bias is not None)
            total += 2 * (outputs**2 + inputs**2)
    return 4 * total


def _moments(count: int) -> Callable[[nn.Module], int]:
    return lambda model: count * 4 * sum(p.numel() for p in model.parameters())


FORMULAS: dict[str, Callable[[nn.Module], int]] = {
    "sgd": _moments(1),
    "adamw": _moments(2),
    "soap": soap_bytes,
    "kfac-pytorch": kfac_pytorch_bytes,
}
OURS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "kfac": lambda model: tc.KFAC(model),
    "neumann": lambda model: tc.Neumann(model.parameters(), lr=1e-3),
    "newton-cg": lambda model: tc.NewtonCG(model),
    "sgn": lambda model: tc.SGN(model),
}


def counted(name: str) -> list[Row]:
    """Rows of one model without any storage of its size."""
    with torch.device("meta"):
        model = MODELS[name][0]()
    parameters = storage_bytes(model.parameters())

    def row(optimizer: str, how: Literal["meta", "formula"], held: int) -> Row:
        return Row(name, optimizer, how, parameters / MIB, held / MIB, held / parameters)

    rows = [row(optimizer, "formula", formula(model)) for optimizer, formula in FORMULAS.items()]
    return rows + [row(optimizer, "meta", held_by(build, model)) for optimizer, build in OURS.items()]


def measured(name: str, optimizer: str) -> Row:
    """One real step on the CPU: what is held after it, and the most that step() allocated on top."""
    build, batch = MODELS[name]
    torch.manual_seed(0)
    model = build()
    parameters = storage_bytes(model.parameters())
    before = {t.untyped_storage()._cdata for t in living_tensors()}
    builders: dict[str, Callable[[nn.Module], torch.optim.Optimizer]]
    builders = {
        **OURS,
        "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4),
        "kfac": lambda model: tc.KFAC(model, factor_interval=1, inverse_interval=1),  # every step renews the inverses
    }
    stepping = builders[optimizer](model)
    x = batch()
    model(x).square().mean().backward()
    peak = peak_extra_bytes(stepping.step, torch.device("cpu"))
    stepping.zero_grad()
    after = [t for t in living_tensors() if t.untyped_storage()._cdata not in before and t is not x]
    held = storage_bytes(after)
    return Row(name, optimizer, "measured", parameters / MIB, held / MIB, held / parameters, peak / MIB)


def main() -> None:
    """Count, and measure if asked; print and append to the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", choices=[[], *MODELS])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "memory.csv")
    arguments = parser.parse_args()
    rows = [row for name in arguments.models or MODELS for row in counted(name)]
    if arguments.measure:
        rows += [measured(name, o) for name in arguments.models or MODELS for o in ("adamw", "kfac", "neumann")]
    print(f"{'model':10} {'optimizer':14} {'how':9} {'MiB':>10} {'x params':>9} {'peak MiB in step()':>20}")
    for r in rows:
        peak = "" if r.peak_step_mib is None else f"{r.peak_step_mib:.0f}"
        print(f"{r.model:10} {r.optimizer:14} {r.how:9} {r.steady_mib:10.1f} {r.times_parameters:9.2f} {peak:>20}")
    append_rows(arguments.csv, [asdict(row) for row in rows], torch.device("cpu"))


if __name__ == "__main__":
    main()
