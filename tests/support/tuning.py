"""Stand-ins for a GPU: named devices, a bench with planted times, entries made by hand."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from triton_curv_autotune.entry import Entry, Measurement, new_entry, provenance_now
from triton_curv_autotune.key import environment
from triton_curv_autotune.registry import Op, get_op
from triton_curv_autotune.resolve import Resolver
from triton_curv_autotune.store import Store
from triton_curv_kernels.backend import DeviceLimits
from triton_curv_kernels.choice import ListProblem
from triton_curv_kernels.factor import FactorProblem

H100 = DeviceLimits("cuda", 132, 227 * 1024, "NVIDIA H100 80GB HBM3", "sm_90")
H200 = DeviceLimits("cuda", 132, 227 * 1024, "NVIDIA H200", "sm_90")
H20 = DeviceLimits("cuda", 78, 227 * 1024, "NVIDIA H20", "sm_90")
MIG = DeviceLimits("cuda", 16, 227 * 1024, "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "sm_90")
FAKE = DeviceLimits("cuda", 100, 227 * 1024, "Fake GPU", "sm_90")

FACTOR = "accumulate_factor_"
MOMENTUM = "momentum_update_"


def factor_problem(k: int = 4096, n: int = 576, limits: DeviceLimits = FAKE) -> FactorProblem:
    return FactorProblem(1, k, n, torch.bfloat16, limits=limits)


def list_problem(numel: int = 1 << 20, limits: DeviceLimits = FAKE) -> ListProblem:
    return ListProblem(numel, torch.float32, limits)


def resolver_on(root: Path, *extra: Path) -> Resolver:
    """A fresh resolver, as a new process has it, over a store; nothing is shipped."""
    return Resolver(lambda: Store(root, extra), lambda: ())


def entry_for(name: str, problem: Any, config: Any, ratio: float = 0.5) -> Entry:
    """A measured entry in which `config` takes `ratio` times the default's time."""
    op = get_op(name)
    bucket = op.bucket(problem)
    default = op.default(bucket)
    times = [Measurement(default, 1.0, 1.0), Measurement(config, ratio, ratio)]
    return new_entry(op, environment(bucket.limits), bucket).with_measurements(times, provenance_now())


def other_config(name: str, problem: Any) -> Any:
    """A config that fits the problem and is not its default."""
    op = get_op(name)
    bucket = op.bucket(problem)
    return next(c for c in op.candidates(bucket)[1:] if op.supports(c, problem) and c != op.default(problem))


class FakeBench:
    """Planted times and faults; remembers what was asked of it."""

    def __init__(
        self, ms: Callable[[Any], float], wrong: Callable[[Any], str] = lambda config: "", stop_at: int | None = None
    ) -> None:
        self.ms, self.wrong, self.stop_at = ms, wrong, stop_at
        self.timed: list[tuple[str, Any, Any]] = []
        self.turns = self.released = 0

    def check(self, op: Op[Any, Any], problem: Any, configs: Sequence[Any]) -> list[str]:
        self.turns += 1
        if self.turns == self.stop_at:
            raise KeyboardInterrupt
        return [self.wrong(config) for config in configs]

    def medians(self, op: Op[Any, Any], problem: Any, configs: Sequence[Any]) -> list[float]:
        self.timed += [(op.name, problem, config) for config in configs]
        return [self.ms(config) for config in configs]

    def release(self) -> None:
        self.released += 1
