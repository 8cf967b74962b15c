"""Stand-ins for a GPU: named devices, a bench with planted times, entries made by hand."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from triton_curv_autotune.entry import Entry, Measurement, new_entry, provenance_now
from triton_curv_autotune.key import environment
from triton_curv_autotune.registry import Op, get_op
from triton_curv_autotune.resolve import Resolver
from triton_curv_autotune.store import Store
from triton_curv_kernels.apply_inverse import ApplyProblem
from triton_curv_kernels.backend import DeviceLimits
from triton_curv_kernels.choice import ListProblem
from triton_curv_kernels.damped_inverse import DampedInverseProblem
from triton_curv_kernels.factor import FactorProblem
from triton_curv_kernels.factor_group_config import GroupProblem
from triton_curv_kernels.patch import PatchProblem
from triton_curv_kernels.patch_geometry import PatchGeometry
from triton_curv_kernels.symmetric import SymmetricProblem

H100 = DeviceLimits("cuda", 132, 227 * 1024, "NVIDIA H100 80GB HBM3", "sm_90")
H200 = DeviceLimits("cuda", 132, 227 * 1024, "NVIDIA H200", "sm_90")
H20 = DeviceLimits("cuda", 78, 227 * 1024, "NVIDIA H20", "sm_90")
MIG = DeviceLimits("cuda", 16, 227 * 1024, "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "sm_90")
FAKE = DeviceLimits("cuda", 100, 227 * 1024, "Fake GPU", "sm_90")

FACTOR = "accumulate_factor_"
FACTORS = "accumulate_factors_"
PATCH = "accumulate_patch_factor_"
MOMENTUM = "momentum_update_"


def factor_problem(k: int = 4096, n: int = 576, limits: DeviceLimits = FAKE) -> FactorProblem:
    return FactorProblem(1, k, n, torch.bfloat16, limits=limits)


def list_problem(numel: int = 1 << 20, limits: DeviceLimits = FAKE) -> ListProblem:
    return ListProblem(numel, torch.float32, limits)


def conv_problem(
    samples: int = 8, channels: int = 64, size: int = 14, dtype: torch.dtype = torch.bfloat16, **others: Any
) -> PatchProblem:
    """A 3 x 3 convolution with padding."""
    geometry = PatchGeometry.of((size, size), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    return PatchProblem(samples, channels, 1, geometry, dtype, aligned=channels % 16 == 0, **others)


def small_problem(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """One that the interpreter runs quickly, on no device, with unaligned rows and borders where the op has any."""
    pair = PatchGeometry.of((2, 3), (1, 2), (1, 1), (0, 0, 1, 1), (1, 1))  # two pixels that lie side by side
    problems: dict[str, Any] = {
        FACTOR: FactorProblem(1, 1030, 40, dtype, ones=True, aligned=False),
        FACTORS: GroupProblem(((40, 20, 1), (1100, 72, 2)), dtype, ones=True, packed=True, aligned=False),
        PATCH: PatchProblem(2, 16, 1, pair, dtype, ones=True),
        "damped_inverse_": DampedInverseProblem(40, batch=2),
        "apply_damped_inverse": ApplyProblem(3000, dtype, side=40, aligned=False),
        "pack_symmetric": SymmetricProblem(40, 2000, dtype, torch.float32),
        "unpack_symmetric": SymmetricProblem(40, 2000, torch.float32, dtype),
    }
    is_update = name.startswith(("momentum", "neumann"))
    return problems.get(name) or ListProblem(3000, dtype if is_update else torch.float32)


def varied_problems(name: str, limits: DeviceLimits = FAKE) -> Iterator[Any]:
    """Sizes around the edges of buckets."""
    sizes = (1, 2, 15, 16, 17, 33, 64, 65, 100, 576, 4095, 4097, 10_000)
    for size, k in product(sizes, (1, 100, 4095, 4096, 70_000)):
        aligned = size % 16 == 0
        if name == FACTOR:
            yield FactorProblem(3, k, size, torch.float32, True, aligned, limits)
        elif name == FACTORS:
            yield GroupProblem(((k, size, 3), (4096, 64, 1)), torch.float32, limits, aligned=aligned)
        elif name == PATCH:
            yield conv_problem(k // 50 + 1, size, dtype=torch.float32, limits=limits)
        elif name == "damped_inverse_":
            yield DampedInverseProblem(size, limits, k // 50 + 1)
        elif name == "apply_damped_inverse":
            yield ApplyProblem(size * k, torch.float32, limits, size, aligned)
        elif name.endswith("pack_symmetric"):
            yield SymmetricProblem(size, size * k, torch.float32, torch.bfloat16, limits)
        else:
            yield ListProblem(size * k, torch.float32, limits)


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
