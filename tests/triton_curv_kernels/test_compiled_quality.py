"""The binaries of all kernels in their default configurations, for GPUs that are not here.

No register spills, matrix instructions where there is a product of 16-bit numbers, shared memory within the limit,
no atomics (results must not vary from run to run). Sizes: multiples of 16, and odd ones, whose loads are narrow.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.support.offline import MACHINES, Arch, Report, dry_launches, report
from triton_curv_kernels.backend import DeviceLimits
from triton_curv_kernels.factor import (
    CONFIGS,
    FactorConfig,
    FactorProblem,
    default_config,
    launch_accumulate_factor_,
    prune,
)
from triton_curv_kernels.momentum import launch_momentum_update_
from triton_curv_kernels.symmetric import launch_pack_symmetric, launch_unpack_symmetric

empty = partial(torch.empty, device="meta")
every_arch = pytest.mark.parametrize("arch", MACHINES)


def limits(arch: Arch) -> DeviceLimits:
    machine = MACHINES[arch]
    return DeviceLimits("hip" if arch.startswith("gfx") else "cuda", machine.multiprocessors, machine.shared_memory)


def check(arch: Arch, launch: Callable[[], object]) -> list[Report]:
    """No spills, no atomics, shared memory that fits, in each kernel that `launch` launches; their reports."""
    reports = [report(each) for each in dry_launches(arch, launch)]
    for each in reports:
        assert each.arch == arch
        assert each.spills == 0, each
        assert each.fits_shared, each
        assert each.counts["ATOM"] == each.counts["atomic"] == 0, each
        assert each.counts["total"] > 20
    return reports


def accumulate(arch: Arch, rows: Tensor, ones: bool) -> Report:
    """Check the default configuration for `rows`; return the report of the kernel that multiplies."""
    problem = replace(FactorProblem.of(rows, ones), limits=limits(arch))
    config = default_config(problem)
    n = problem.n + ones
    factor = empty(*rows.shape[:-2], n, n)
    multiply, *finish = check(arch, lambda: launch_accumulate_factor_(factor, rows, 0.5, 0.9, ones, config))
    assert multiply.name == "_accumulate_kernel"
    assert [each.name for each in finish] == ["_finish_kernel"] * (config.SPLIT_K > 1)
    return multiply


# (K, n): large and aligned; split; a small split batch; odd; one tile
FACTORS = [(4096, 8192), (32768, 1024), (8, 4096, 144), (1024, 4097), (700, 27), (64, 13)]


@every_arch
@pytest.mark.parametrize("shape", FACTORS, ids=str)
def test_factor_of_16_bits(arch: Arch, shape: tuple[int, ...]) -> None:
    multiply = accumulate(arch, empty(shape, dtype=torch.bfloat16), ones=True)
    # tiles of 16 and 32 are too small for a warp group: mma.sync in place of wgmma and tcgen05
    assert multiply.matrix_instructions or (shape[-1] <= 32 and multiply.counts["HMMA"])


@every_arch
def test_factor_of_16_bits_without_ones(arch: Arch) -> None:
    assert accumulate(arch, empty(FACTORS[0], dtype=torch.float16), ones=False).matrix_instructions


@every_arch
@pytest.mark.parametrize("shape", [FACTORS[i] for i in (0, 2, 3, 4, 5)], ids=str)
def test_factor_of_float32(arch: Arch, shape: tuple[int, ...]) -> None:
    multiply = accumulate(arch, empty(shape), ones=True)
    assert arch == "gfx942" or (multiply.matrix_instructions == 0 and multiply.counts["FFMA"] > 0)


@every_arch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factor_of_transposed_rows(arch: Arch, dtype: torch.dtype) -> None:
    accumulate(arch, empty(1024, 4096, dtype=dtype).mT, ones=True)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_tf32x3_uses_tensor_cores(arch: Arch) -> None:
    config = FactorConfig(64, 32, num_stages=2, input_precision="tf32x3")
    rows, factor = empty(4096, 1024), empty(1024, 1024)
    (multiply,) = check(arch, lambda: launch_accumulate_factor_(factor, rows, config=config))
    assert multiply.matrix_instructions > 0


@every_arch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hungriest_config_that_prune_keeps_fits(arch: Arch, dtype: torch.dtype) -> None:
    """Triton raises OutOfResources where a launch on the device would."""
    rows, factor = empty(32768, 1024, dtype=dtype), empty(1024, 1024)
    kept = prune(CONFIGS, replace(FactorProblem.of(rows, ones=False), limits=limits(arch)))
    hungriest = max(kept, key=lambda c: (c.BLOCK_N * c.BLOCK_K * c.num_stages, c.BLOCK_N))
    assert all(
        report(x).fits_shared
        for x in dry_launches(arch, lambda: launch_accumulate_factor_(factor, rows, config=hungriest))
    )


@every_arch
@pytest.mark.parametrize("n", [4096, 301])
def test_packing(arch: Arch, n: int) -> None:
    def round_trip() -> None:
        packed = launch_pack_symmetric([empty(n, n)], torch.bfloat16, 0.5)
        launch_unpack_symmetric(packed, [n], torch.float32, 2.0)

    assert len(check(arch, round_trip)) == 2


@every_arch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_momentum(arch: Arch, dtype: torch.dtype) -> None:
    """A long vector, a matrix in a larger one, a convolution whose momentum is in another order, a scalar."""
    momenta = [
        empty(1 << 20),
        empty(512, 513)[:, :512],
        empty(64, 289)[:, :288].view(64, 3, 3, 32).movedim(-1, 1),
        empty(()),
    ]
    params = [torch.empty(m.shape, dtype=dtype, device="meta") for m in momenta]
    scales = [empty(()) for _ in params]
    reports = check(arch, lambda: launch_momentum_update_(params, momenta, momenta, scales, empty(5)))
    assert len(reports) == 1
    # three tensors in 16-byte accesses; on AMD, with twice the threads, 4 elements a thread: 8 bytes of bf16
    wide = {"float32": (3, 2), "bfloat16": (2, 1)}[str(dtype).removeprefix("torch.")]
    loads, stores = ("load.128", "store.128") if arch == "gfx942" else ("LDG.128", "STG.128")
    assert reports[0].counts[loads] >= wide[0]
    assert reports[0].counts[stores] >= wide[1]
    assert reports[0].registers <= 96
