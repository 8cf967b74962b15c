"""A training step of ResNet-50 on ImageNet-shaped synthetic data: SGD, fused AdamW, and K-FAC by stage.

python -m profiles.bench_resnet50 [--batch 256] [--image 224] [--rounds 5] [--budget SECONDS] [--no-compile]
                                  [--csv FILE]

bf16 autocast, channels_last, compiled model. Blocks of one refresh cycle take turns; figures are medians of a block's
mean step, so K-FAC's is amortised over its refreshes. kfac-pytorch is measured beside it if it is importable. Needs a
GPU; on a CPU only small sizes end in time (that is what the test of this file runs).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

import triton_curv as tc
from profiles.machine import append_rows
from profiles.models import resnet50
from triton_curv import nvtx
from triton_curv.profiling.torch_trace import read_trace

CYCLE = 20
"""Steps between refreshes of K-FAC, and of a block: the steady interval of the stale schedule (arXiv 1811.12019)."""


@dataclass(frozen=True)
class Setup:
    """What is trained: sizes, device, and whether the model is compiled."""

    batch: int
    image: int
    device: torch.device
    compiled: bool = True
    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64


class Stepper(Protocol):
    """What a training loop asks of an optimizer."""

    def step(self) -> object:
        """Move the parameters."""

    def zero_grad(self) -> None:
        """Forget the gradients."""


class KFACPyTorch:
    """kfac-pytorch's preconditioner in front of SGD (it is not on PyPI)."""

    def __init__(self, model: nn.Module) -> None:
        from kfac.preconditioner import KFACPreconditioner

        self.preconditioner = KFACPreconditioner(model, factor_update_steps=CYCLE, inv_update_steps=CYCLE)
        self.sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(self) -> None:
        """Precondition the gradients, then SGD."""
        self.preconditioner.step()
        self.sgd.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.sgd.zero_grad()


def optimizers(device: torch.device) -> dict[str, Callable[[nn.Module], Stepper]]:
    """What is compared, by name."""
    compared: dict[str, Callable[[nn.Module], Stepper]] = {
        "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device.type == "cuda"),
        "kfac": lambda model: tc.KFAC(model, lr=1e-3, factor_interval=CYCLE, inverse_interval=CYCLE),
    }
    if find_spec("kfac") is not None:
        compared["kfac-pytorch"] = KFACPyTorch
    return compared


class Training:
    """One model with its optimizer; `run(steps)` trains on one fixed synthetic batch."""

    def __init__(self, setup: Setup, build: Callable[[nn.Module], Stepper]) -> None:
        torch.manual_seed(0)
        model = resnet50(depths=setup.depths, width=setup.width).to(setup.device)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stub
        self.optimizer = build(model)
        self.model = torch.compile(model) if setup.compiled else model
        images = torch.randn(setup.batch, 3, setup.image, setup.image, device=setup.device)
        self.images = images.to(memory_format=torch.channels_last)
        self.labels = torch.randint(1000, (setup.batch,), device=setup.device)
        self.device = setup.device

    def run(self, steps: int) -> None:
        """Train and wait for the device."""
        for _ in range(steps):
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = functional.cross_entropy(self.model(self.images), self.labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def stages(self, steps: int) -> dict[str, float]:
        """Seconds of each stage in a mean step, of the device where there is one."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        nvtx.enable()
        try:
            with torch.profiler.profile(activities=activities) as recorded:
                self.run(steps)
        finally:
            nvtx.disable()
        times = read_trace(recorded)
        on_device = any(t.device > 0 for t in times.values())
        return {name: (t.device if on_device else t.host) / steps for name, t in times.items()}


def measure(setup: Setup, rounds: int, budget: float = float("inf")) -> Iterator[dict[str, object]]:
    """Rows of milliseconds a step, as a ratio to SGD, then, by the profiler, of K-FAC's stages.

    The first round warms up. No further one begins once `budget` seconds are over, but one that counts.
    """
    end = time.monotonic() + budget
    trainings = {name: Training(setup, build) for name, build in optimizers(setup.device).items()}
    blocks: dict[str, list[float]] = {name: [] for name in trainings}
    for round_ in range(rounds + 1):
        if round_ > 1 and time.monotonic() > end:
            print(f"time is over after {round_ - 1} of {rounds} rounds")
            break
        for name, training in trainings.items():
            start = time.perf_counter()
            training.run(CYCLE)
            blocks[name].append((time.perf_counter() - start) / CYCLE)
    medians = {name: statistics.median(times[1:]) for name, times in blocks.items()}
    sizes = {"batch": setup.batch, "image": setup.image, "compiled": setup.compiled}
    for name, t in medians.items():
        yield {**sizes, "optimizer": name, "stage": "", "ms": t * 1e3, "ratio": t / medians["sgd"]}
    for stage, t in trainings["kfac"].stages(CYCLE).items():
        yield {**sizes, "optimizer": "kfac", "stage": stage, "ms": t * 1e3, "ratio": t / medians["sgd"]}


def main() -> int:
    """Measure; print and append to the CSV each row as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "resnet50.csv")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_resnet50 needs a CUDA device and torch sees none; nothing was measured", file=sys.stderr)
        return 3
    setup = Setup(arguments.batch, arguments.image, torch.device("cuda"), not arguments.no_compile)
    for row in measure(setup, arguments.rounds, arguments.budget):
        line = f"{row['optimizer']:8} {row['stage']:18} {row['ms']:10.2f} ms {row['ratio']:8.3f} x SGD's step"
        print(line, flush=True)
        append_rows(arguments.csv, [row], setup.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
