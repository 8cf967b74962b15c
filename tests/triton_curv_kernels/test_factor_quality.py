"""The binaries of packed and grouped factor kernels and of list packing, for GPUs that are not here.

As test_compiled_quality.py: no register spills, no atomics, tensor cores, shared memory that fits; and 16-byte loads
through addresses that a kernel reads from a table.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.support.offline import MACHINES, Arch, Launch, Report, dry_launches, report, wide_loads
from triton_curv_kernels.backend import DeviceLimits
from triton_curv_kernels.factor import FactorConfig, FactorProblem, default_config, launch_accumulate_factor_
from triton_curv_kernels.factor_group import launch_accumulate_factors_
from triton_curv_kernels.factor_group_config import GroupProblem, default_group_config
from triton_curv_kernels.packed import packed_length
from triton_curv_kernels.symmetric import launch_pack_symmetric, launch_unpack_symmetric

empty = partial(torch.empty, device="meta")
every_arch = pytest.mark.parametrize("arch", MACHINES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def limits(arch: Arch) -> DeviceLimits:
    machine = MACHINES[arch]
    return DeviceLimits("hip" if arch.startswith("gfx") else "cuda", machine.multiprocessors, machine.shared_memory)


def check(launches: list[Launch]) -> list[Report]:
    reports = [report(each) for each in launches]
    for each in reports:
        assert each.spills == 0, each
        assert each.fits_shared, each
        assert each.counts["ATOM"] == each.counts["atomic"] == 0, each
    return reports


@every_arch
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((4096, 8192), torch.bfloat16), ((32768, 1000), torch.bfloat16), ((4096, 8192), torch.float32)],
    ids=str,
)
def test_packed_factor(arch: Arch, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """One pass, and parts of K with columns that are a multiple of 8 but not of 16; with the default configuration."""
    rows = empty(shape, dtype=dtype)
    config = default_config(replace(FactorProblem.of(rows, True), limits=limits(arch)))
    factor = empty(packed_length(shape[1] + 1))
    launches = dry_launches(arch, lambda: launch_accumulate_factor_(factor, rows, 0.5, 0.9, True, config))
    multiply, *finish = check(launches)
    assert bool(finish) == (config.SPLIT_K > 1)
    assert wide_loads(launches[0])
    assert multiply.matrix_instructions or dtype == torch.float32


@every_arch
def test_bf16x6_uses_tensor_cores(arch: Arch) -> None:
    config = FactorConfig(64, 32, num_stages=2, input_precision="bf16x6")
    factor, rows = empty(1024, 1024), empty(4096, 1024)
    (multiply,) = check(dry_launches(arch, lambda: launch_accumulate_factor_(factor, rows, config=config)))
    assert multiply.matrix_instructions


# (K, n, ones): large and small tiles, any strides, borders
LAYERS = [(100_000, 147, False), (200_000, 64, True), (50_000, 576, False), (3000, 512, True), (32, 2049, True)]


def grouped(arch: Arch, dtype: torch.dtype, packed: Callable[[int], bool], longest: int) -> list[Launch]:
    """The launches of LAYERS, K no longer than `longest`, in the default configuration."""
    rows = [empty(min(k, longest), n, dtype=dtype) for k, n, _ in LAYERS]
    sizes = [n + ones for _, n, ones in LAYERS]
    factors = [empty(packed_length(n)) if packed(place) else empty(n, n) for place, n in enumerate(sizes)]
    config = default_group_config(
        GroupProblem(GroupProblem.count((x.shape[0], x.shape[1]) for x in rows), dtype, limits(arch))
    )
    ones = [one for _, _, one in LAYERS]
    alphas, betas, traces = (empty(len(rows)) for _ in range(3))
    return dry_launches(
        arch, lambda: launch_accumulate_factors_(factors, rows, alphas, betas, ones, traces, None, config)
    )


@every_arch
@every_dtype
def test_group(arch: Arch, dtype: torch.dtype) -> None:
    """All kinds of programs in one pair of kernels, dense and packed factors, parts of K, statistics."""
    launches = grouped(arch, dtype, lambda place: place % 2 == 0, 1 << 20)
    multiply, finish = check(launches)
    assert [multiply.name, finish.name] == ["multiply_group_kernel", "finish_group_kernel"]
    assert wide_loads(launches[0]) >= 8
    assert multiply.matrix_instructions or dtype == torch.float32
    if arch == "sm_90" and dtype == torch.bfloat16:
        assert multiply.registers <= 128  # two programs on a multiprocessor
        assert multiply.counts["HGMMA"] >= 8


@every_arch
def test_group_that_is_stored_at_once(arch: Arch) -> None:
    """No K is cut: tiles go to the factors from the kernel that multiplies."""
    multiply, _ = check(grouped(arch, torch.bfloat16, lambda place: True, 512))
    assert multiply.matrix_instructions


@every_arch
@pytest.mark.parametrize(("matrix", "buffer"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_packing_of_a_list(arch: Arch, matrix: torch.dtype, buffer: torch.dtype) -> None:
    sizes = [4096, 768, 301]

    def round_trip() -> None:
        packed = launch_pack_symmetric([empty(n, n, dtype=matrix) for n in sizes], buffer, empty(()))
        launch_unpack_symmetric(packed, sizes, matrix, 2.0)

    launches = dry_launches(arch, round_trip)
    assert len(check(launches)) == 2
    assert all(wide_loads(each) >= 2 for each in launches)
