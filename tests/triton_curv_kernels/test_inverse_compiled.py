"""`damped_inverse_` and `apply_damped_inverse`: binaries for GPUs that are not here, opcheck, and traces.

No register spills, tensor-core instructions, 16-byte loads, no atomics, shared memory that fits.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.offline import MACHINES, Arch, Report, TracedKernels, dry_launches, report, traced_kernels
from triton_curv_kernels import apply_inverse, damped_inverse
from triton_curv_kernels.apply_inverse import ApplyProblem, apply_damped_inverse, launch_apply_damped_inverse
from triton_curv_kernels.backend import DeviceLimits
from triton_curv_kernels.damped_inverse import DampedInverseProblem, damped_inverse_, launch_damped_inverse_

ops = torch.ops.triton_curv
every_arch = pytest.mark.parametrize("arch", MACHINES)


def limits(arch: Arch) -> DeviceLimits:
    machine = MACHINES[arch]
    return DeviceLimits("hip" if arch.startswith("gfx") else "cuda", machine.multiprocessors, machine.shared_memory)


def check(arch: Arch, launches: list[Any]) -> dict[str, list[Report]]:
    """Reports by the name of the kernel; each binary is read once."""
    binaries = {launch.compiled.hash: launch for launch in launches}
    reports: dict[str, list[Report]] = {}
    for launch in binaries.values():
        each = report(launch)
        assert each.arch == arch
        assert each.spills == 0, each
        assert each.fits_shared, each
        assert each.counts["ATOM"] == each.counts["atomic"] == 0, each
        reports.setdefault(each.name, []).append(each)
    return reports


@pytest.mark.parametrize(
    ("arch", "n", "order"),
    [*((arch, 577, 3) for arch in MACHINES), ("sm_90", 577, 2), ("sm_90", 20, 3), ("gfx942", 20, 3)],
)
def test_damped_inverse(arch: Arch, n: int, order: int) -> None:
    config = damped_inverse.default_config(DampedInverseProblem(n, limits(arch)))
    inverses, factors, shifts = ([torch.empty(s, device="meta")] for s in ((2, n, n), (2, n, n), (2,)))
    launches = dry_launches(arch, lambda: launch_damped_inverse_(inverses, factors, shifts, 1, order, config))
    assert [launch.name for launch in launches] == [
        *("bounds_kernel", "start_kernel", "residual_kernel", "decide_kernel", "correction_kernel", "update_kernel"),
        *("residual_kernel", "decide_kernel"),
    ]
    reports = check(arch, launches)
    if n == 577:
        assert reports["correction_kernel"][0].matrix_instructions > 0
    if arch in ("sm_80", "sm_90"):  # fp64 has tensor cores there
        assert reports["residual_kernel"][0].counts["HMMA"] > 0
    if arch != "gfx942":  # asynchronous 16-byte copies: 4-byte ones would be 4 times as many
        assert 0 < reports["residual_kernel"][0].counts["LDGSTS"] <= 8


@every_arch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_apply(arch: Arch, dtype: torch.dtype) -> None:
    config = apply_inverse.default_config(ApplyProblem(1 << 20, dtype, limits(arch)))

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    grads = [empty(512, 512), empty(100, 33), empty(300, 2, 1), empty(70, 1)]
    of_a = [empty(512, 512), empty(33, 33), empty(0), empty(0)]
    of_g = [empty(512, 512), empty(100, 100), empty(300, 2, 2), empty(70, 70)]
    kl_clip, lr = (torch.empty((), device="meta") for _ in range(2))
    launches = dry_launches(arch, lambda: launch_apply_damped_inverse(grads, grads, of_a, of_g, kl_clip, lr, config))
    assert [launch.name for launch in launches] == ["first_kernel", "second_kernel", "finish_kernel"]
    reports = check(arch, launches)
    for launch in launches[:2]:
        assert reports[launch.name][0].matrix_instructions > 0
        if arch != "gfx942":
            assert "cp.async.cg.shared.global" in launch.compiled.asm["ptx"]  # 16 bytes


def arguments(device: str = "cpu") -> tuple[list[Any], list[Any]]:
    """Arguments of both ops."""
    torch.manual_seed(0)
    f = [torch.randn(2, 40, 40, device=device), torch.randn(1, 7, 7, device=device)]
    factors = [x @ x.mT for x in f]
    shifts = [torch.ones(2, device=device), torch.ones(1, device=device)]
    grads = [torch.randn(40, 7, device=device), torch.randn(3, 2, 1, device=device)]
    of_a = [factors[1].squeeze(0), torch.zeros(0, device=device)]
    of_g = [factors[0].select(0, 0), torch.ones(3, 2, 2, device=device)]
    scalars = [torch.ones((), device=device), torch.ones((), device=device)]
    updates = [torch.zeros_like(d) for d in grads]
    inverses = [torch.zeros_like(x) for x in factors]
    return [inverses, factors, shifts, 2, 3], [updates, grads, of_a, of_g, *scalars]


def test_opcheck() -> None:
    of_inverse, of_apply = arguments()
    torch.library.opcheck(ops.damped_inverse_, tuple(of_inverse))
    torch.library.opcheck(ops.apply_damped_inverse, tuple(of_apply))


def step(of_inverse: list[Any], of_apply: list[Any]) -> tuple[Tensor, ...]:
    return (damped_inverse_(*of_inverse), *apply_damped_inverse(*of_apply))


def test_cpu_graph_equals_eager() -> None:
    eager, compiled = arguments(), arguments()
    torch._dynamo.reset()
    expected = step(*eager)
    results = torch.compile(step, backend="aot_eager", fullgraph=True)(*compiled)
    torch.testing.assert_close((results, *compiled), (expected, *eager), rtol=1e-4, atol=1e-5)


def test_cuda_graph_holds_the_kernels() -> None:
    """Two classes of matrices with 4 + 4 * 2 launches each; three for the layers; nothing opaque."""
    assert traced_kernels(step, lambda: list(arguments("cuda"))) == TracedKernels(2 * 12 + 3, [])
