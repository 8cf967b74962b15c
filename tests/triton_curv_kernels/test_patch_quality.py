"""The binaries of `accumulate_patch_factor_` in its default configurations, for GPUs that are not here."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.support.offline import MACHINES, Arch, Report, dry_launches, report
from triton_curv_kernels.backend import DeviceLimits
from triton_curv_kernels.patch import (
    CONFIGS,
    PatchConfig,
    PatchProblem,
    default_config,
    launch_accumulate_patch_factor_,
    prune,
)
from triton_curv_kernels.patch_geometry import PatchGeometry

empty = partial(torch.empty, device="meta")
every_arch = pytest.mark.parametrize("arch", MACHINES)


def limits(arch: Arch) -> DeviceLimits:
    machine = MACHINES[arch]
    return DeviceLimits("hip" if arch.startswith("gfx") else "cuda", machine.multiprocessors, machine.shared_memory)


def images(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(samples, channels, height, width) in channels_last."""
    return empty(sizes, dtype=dtype).to(memory_format=torch.channels_last)


def kernel3(input: Tensor, stride: int = 1) -> PatchGeometry:
    return PatchGeometry.of(input.shape[2:], (3, 3), (stride, stride), (1, 1, 1, 1), (1, 1))


def check(
    arch: Arch, input: Tensor, geometry: PatchGeometry, config: PatchConfig | None = None
) -> tuple[PatchConfig, list[Report]]:
    """No spills, no atomics, shared memory that fits, in each kernel of the (default) configuration."""
    problem = replace(PatchProblem.of(input, 1, geometry, ones=True), limits=limits(arch))
    config = config or default_config(problem)
    n = problem.n + 1
    launches = dry_launches(
        arch, lambda: launch_accumulate_patch_factor_(empty(1, n, n), input, geometry, 0.5, 0.9, True, config)
    )
    reports = [report(each) for each in launches]
    for each in reports:
        assert each.arch == arch
        assert each.spills == 0, (config, each)
        assert each.fits_shared, each
        assert each.counts["ATOM"] == each.counts["atomic"] == 0, each
    second = {"gather": "_finish_gather_kernel"}.get(config.algorithm, "_blocks_kernel")
    assert [each.name for each in reports[1:]] == [second] * (config.SPLIT_K > 1 or config.algorithm == "displacement")
    return config, reports


LONG, SHORT = (32, 64, 56, 56), (32, 512, 7, 7)


@pytest.mark.parametrize(
    ("arch", "sizes"),
    [*((arch, LONG) for arch in MACHINES), ("sm_80", SHORT), ("sm_90", SHORT), ("gfx942", SHORT)],
)
def test_3x3_of_16_bits_by_displacement(arch: Arch, sizes: tuple[int, ...]) -> None:
    """ResNet-50: long sums, split, of few channels; short ones of many channels, stored at once."""
    input = images(*sizes)
    config, reports = check(arch, input, kernel3(input))
    assert config.algorithm == "displacement"
    assert (config.SPLIT_K > 1) == (sizes[1] == 64)
    assert all(each.matrix_instructions > 0 for each in reports)
    if arch != "gfx942":
        assert reports[0].counts["LDGSTS"] > 0  # wide asynchronous loads: channels are neighbours


@every_arch
def test_3x3_of_16_bits_with_stride(arch: Arch) -> None:
    input = images(32, 128, 56, 56)
    config, reports = check(arch, input, kernel3(input, stride=2))
    assert config.algorithm == "implicit"
    assert reports[0].matrix_instructions > 0


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_3x3_of_float32(arch: Arch) -> None:
    input = images(256, 256, 14, 14, dtype=torch.float32)
    config, reports = check(arch, input, kernel3(input))
    assert config.input_precision == "ieee"
    assert arch == "gfx942" or (reports[0].matrix_instructions == 0 and reports[0].counts["FFMA"] > 0)


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [*((arch, torch.bfloat16) for arch in MACHINES), ("sm_80", torch.float32), ("gfx942", torch.float32)],
)
def test_stem_by_gathering(arch: Arch, dtype: torch.dtype) -> None:
    input = images(32, 3, 224, 224, dtype=dtype)
    config, _ = check(arch, input, PatchGeometry.of((224, 224), (7, 7), (2, 2), (3, 3, 3, 3), (1, 1)))
    assert config.algorithm == "gather"


@every_arch
def test_channels_that_are_no_multiple_of_16(arch: Arch) -> None:
    input = images(32, 24, 28, 28)
    check(arch, input, kernel3(input))


@pytest.mark.parametrize("arch", ["sm_90"])
def test_tf32x3_uses_tensor_cores(arch: Arch) -> None:
    input = images(32, 64, 56, 56, dtype=torch.float32)
    config = PatchConfig("displacement", 64, 16, 4, num_warps=8, num_stages=2, input_precision="tf32x3")
    assert check(arch, input, kernel3(input), config)[1][0].matrix_instructions > 0


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_hungriest_config_that_prune_keeps_fits(arch: Arch) -> None:
    """Triton raises OutOfResources where a launch on the device would."""
    input = images(256, 256, 14, 14)
    geometry = kernel3(input)
    kept = prune(CONFIGS, replace(PatchProblem.of(input, 1, geometry, ones=False), limits=limits(arch)))
    hungriest = max(kept, key=lambda c: (c.BLOCK_N * c.BLOCK_K * c.num_stages, c.BLOCK_N))
    factor = empty(1, 2304, 2304)
    launches = dry_launches(arch, lambda: launch_accumulate_patch_factor_(factor, input, geometry, config=hungriest))
    assert all(report(each).fits_shared for each in launches)


def test_other_layouts_are_copied_in_small_parts() -> None:
    """Five parts for a 3x3 kernel: 7 of 32 samples are 1/41 of the patches. Each is read as channels_last."""
    input = empty(32, 64, 56, 56, dtype=torch.bfloat16)
    config = PatchConfig("displacement", 64, 64)
    launches = dry_launches(
        "sm_90",
        lambda: launch_accumulate_patch_factor_(empty(1, 576, 576), input, kernel3(input), config=config),
    )
    assert [each.name for each in launches] == ["_products_kernel", "_blocks_kernel"] * 5
    assert all(report(each).counts["LDGSTS"] > 0 for each in launches[:2])


def test_one_pixel_kernels_are_products_of_rows() -> None:
    input, geometry = images(32, 64, 56, 56), PatchGeometry.of((56, 56), (1, 1), (1, 1), (0, 0, 0, 0), (1, 1))
    launches = dry_launches("sm_90", lambda: launch_accumulate_patch_factor_(empty(1, 64, 64), input, geometry))
    assert launches[0].name == "_accumulate_kernel"


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_one_pixel_kernels_read_other_layouts_in_place(arch: Arch) -> None:
    """Pixels are neighbours there: loads are as wide as of neighbouring channels, and nothing is copied first."""
    input, geometry = (
        empty(32, 64, 56, 56, dtype=torch.bfloat16),
        PatchGeometry.of((56, 56), (1, 1), (1, 1), (0,) * 4, (1, 1)),
    )
    launches = dry_launches(arch, lambda: launch_accumulate_patch_factor_(empty(1, 65, 65), input, geometry, ones=True))
    assert [each.name for each in launches] == ["_pixels_kernel", "_finish_kernel"]
    for each in map(report, launches):
        assert each.spills == 0, each
        assert each.fits_shared
        assert each.counts["ATOM"] == each.counts["atomic"] == 0
    assert arch == "gfx942" or report(launches[0]).counts["LDGSTS"] > 0
