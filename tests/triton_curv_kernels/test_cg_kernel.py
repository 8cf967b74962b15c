"""cg_update_ and cg_direction_ against the recurrences in NumPy: reference, interpreted kernels, binaries, graphs."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled

from tests.support.offline import Arch, dry_launches, report, traced_kernels
from tests.support.poison import poisoned_allocations
from triton_curv_kernels.backend import UnsupportedInputError
from triton_curv_kernels.cg import (
    cg_direction_,
    cg_direction_reference,
    cg_dot,
    cg_dots,
    cg_update_,
    cg_update_reference,
    launch_cg_direction,
    launch_cg_dots,
    launch_cg_update,
    supports,
)
from triton_curv_kernels.pointer_table import CONFIGS, ListConfig, default_config, prune

STEP, BETA = 0.3, 0.8
SHAPES = [(), (0,), (1,), (7,), (33, 5), (3, 0, 2), (257,), (16, 3, 3, 3)]
# two roundings of values below 8 in the stored dtype, and the norm's sum
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6}
SMALL = ListConfig(BLOCK=128, num_warps=4)


class Case(NamedTuple):
    """Arguments of cg_update_, in its order."""

    solution: list[Tensor]
    residual: list[Tensor]
    direction: list[Tensor]
    product: list[Tensor]
    step: Tensor
    square: Tensor


def make_case(
    shapes: Sequence[Sequence[int]] = SHAPES, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Case:
    torch.manual_seed(0)
    x, r, p, Ap = ([torch.randn(s, dtype=dtype, device=device) for s in shapes] for _ in range(4))
    step = torch.tensor(STEP, dtype=dtype, device=device)
    return Case(x, r, p, Ap, step, torch.full((), float("nan"), dtype=dtype, device=device))


def copy_case(case: Case) -> Case:
    x, r, p, Ap = ([t.clone() for t in tensors] for tensors in case[:4])
    return Case(x, r, p, Ap, case.step.clone(), case.square.clone())


def assert_update(case: Case, run: Callable[..., object]) -> None:
    a = float(case.step)
    x, r, p, Ap = ([t.double().numpy().copy() for t in tensors] for tensors in case[:4])
    run(*case)
    tolerance = TOLERANCE[case.square.dtype]
    square = 0.0
    for x_got, r_got, x_old, r_old, p_i, Ap_i in zip(case.solution, case.residual, x, r, p, Ap, strict=True):
        r_new = r_old - a * Ap_i
        np.testing.assert_allclose(x_got.double().numpy(), x_old + a * p_i, rtol=0, atol=tolerance)
        np.testing.assert_allclose(r_got.double().numpy(), r_new, rtol=0, atol=tolerance)
        square += float((r_new**2).sum())
    assert case.square.item() == pytest.approx(square, rel=tolerance)


def assert_direction(case: Case, run: Callable[..., object]) -> None:
    p, z = ([t.double().numpy().copy() for t in tensors] for tensors in (case.direction, case.residual))
    run(case.direction, case.residual, torch.tensor(BETA, dtype=case.square.dtype))
    for got, p_i, z_i in zip(case.direction, p, z, strict=True):
        np.testing.assert_allclose(got.double().numpy(), z_i + BETA * p_i, rtol=0, atol=TOLERANCE[got.dtype])


launch_small = partial(launch_cg_update, config=SMALL)
launch_direction_small = partial(launch_cg_direction, config=SMALL)


# the reference


@pytest.mark.parametrize("host_scalars", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reference_is_the_recurrence(dtype: torch.dtype, host_scalars: bool) -> None:
    assert_update(make_case(dtype=dtype), lambda *args: cg_update_reference(*args, host_scalars=host_scalars))
    assert_direction(make_case(dtype=dtype), cg_direction_reference)


def assert_untouched(run: Callable[..., object]) -> None:
    case = make_case([(33, 5), (7,)])
    case.step.zero_()
    for t in case.product:
        t.fill_(float("nan"))
    before = copy_case(case)
    run(*case)
    torch.testing.assert_close(case[:2], before[:2], rtol=0, atol=0)
    expected = sum(float(t.double().square().sum()) for t in before.residual)
    assert case.square.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("host_scalars", [True, False])
def test_a_step_of_zero_does_not_look_at_the_product(host_scalars: bool) -> None:
    assert_untouched(lambda *args: cg_update_reference(*args, host_scalars=host_scalars))


def test_public_functions_ops_and_references_agree() -> None:
    case = make_case(dtype=torch.float64)
    ops = copy_case(case)
    cg_update_(*case)
    torch.ops.triton_curv.cg_update_(*ops)
    torch.testing.assert_close(case, ops, rtol=0, atol=1e-14)
    beta = torch.tensor(BETA, dtype=torch.float64)
    cg_direction_(case.direction, case.residual, beta)
    torch.ops.triton_curv.cg_direction_(ops.direction, ops.residual, beta)
    torch.testing.assert_close(case.direction, ops.direction, rtol=0, atol=1e-14)


@pytest.mark.parametrize("run", [cg_update_, launch_cg_update], ids=["public", "triton"])
@pytest.mark.parametrize("shapes", [[], [(0,)], [(0,), (2, 0)]])
def test_nothing_to_update(run: Callable[..., None], shapes: list[tuple[int, ...]]) -> None:
    case = make_case(shapes)
    run(*case)
    assert case.square.item() == 0
    launch_cg_direction(case.direction, case.residual, case.step)
    cg_direction_(case.direction, case.residual, case.step)


def test_arguments_that_do_not_fit_are_refused() -> None:
    case = make_case([(3,)])
    with pytest.raises(UnsupportedInputError, match=r"four lists of one length.*\(1, 1, 1, 0\)"):
        cg_update_(*case[:3], [], case.step, case.square)
    with pytest.raises(UnsupportedInputError, match=r"shape \(\), got .*\(1,\)"):
        cg_update_(*case[:4], torch.ones(1), case.square)
    with pytest.raises(UnsupportedInputError, match="two lists of one length"):
        cg_direction_(case.direction, [], case.step)
    wide = make_case([(3,)], dtype=torch.float64)
    assert supports(*case[:4])
    assert not supports(*wide[:4])
    with pytest.raises(UnsupportedInputError, match="float64"):
        launch_cg_update(*wide)
    with pytest.raises(UnsupportedInputError, match="float64"):
        launch_cg_direction(wide.direction, wide.residual, wide.step)


def test_prune_keeps_a_config_for_every_size() -> None:
    for numel in (1, 100, 10**9):
        kept = prune(CONFIGS, numel)
        assert kept
        assert set(kept) <= set(CONFIGS)
        assert default_config(numel) in kept
    assert len(prune(CONFIGS, 100)) < len(prune(CONFIGS, 10**6))


def test_dots_by_reference() -> None:
    case = make_case(dtype=torch.float64)
    assert_dots(case, cg_dots)
    torch.testing.assert_close(cg_dot(case.direction, case.product), cg_dots(case.direction, case.product)[0])
    with pytest.raises(UnsupportedInputError, match="two lists of one length > 0, got 0 and 0"):
        cg_dots([], [])
    with pytest.raises(UnsupportedInputError, match=r"one shape at place 0, got \(3,\), \(4,\)"):
        launch_cg_dots([torch.ones(3)], [torch.ones(4)])


def assert_dots(case: Case, run: Callable[..., Any]) -> None:
    a, b = (torch.cat([t.flatten() for t in tensors]).double() for tensors in (case.direction, case.product))
    ab, aa = run(case.direction, case.product)
    tolerance = 1e-14 if case.square.dtype == torch.float64 else 1e-5
    assert ab.item() == pytest.approx((a @ b).item(), rel=tolerance, abs=tolerance)
    assert aa.item() == pytest.approx((a @ a).item(), rel=tolerance)


# Triton, interpreted


@pytest.mark.interpreter
@pytest.mark.parametrize("launch", [launch_cg_dots, partial(launch_cg_dots, config=SMALL)], ids=["default", "block128"])
def test_dots_kernel_is_the_sum(launch: Callable[..., Tensor]) -> None:
    case = make_case()
    case.product[-1] = case.product[-1].contiguous(memory_format=torch.channels_last)
    with poisoned_allocations():
        assert_dots(case, launch)
    assert torch.equal(launch(case.direction, case.product), launch(case.direction, case.product))
    assert launch([torch.ones(0)], [torch.ones(0)]).tolist() == [0, 0]


@pytest.mark.interpreter
@pytest.mark.parametrize("launch", [launch_cg_update, launch_small], ids=["default", "block128"])
def test_update_kernel_is_the_recurrence(launch: Callable[..., None]) -> None:
    with poisoned_allocations():
        assert_update(make_case(), launch)


@pytest.mark.interpreter
@pytest.mark.parametrize("launch", [launch_cg_direction, launch_direction_small], ids=["default", "block128"])
def test_direction_kernel_is_the_recurrence(launch: Callable[..., None]) -> None:
    assert_direction(make_case(), launch)


@pytest.mark.interpreter
def test_kernel_does_not_look_at_the_product_at_a_step_of_zero() -> None:
    assert_untouched(launch_small)


@pytest.mark.interpreter
@pytest.mark.parametrize("which", range(4), ids=["solution", "residual", "direction", "product"])
@pytest.mark.parametrize("layout", ["transposed", "channels_last", "sliced"])
def test_kernels_take_any_strides(layout: str, which: int) -> None:
    case = make_case([(4, 6, 3, 5), (9,)])
    tensor, room = case[which][0], None
    if layout == "transposed":
        strided = tensor.transpose(0, 2).contiguous().transpose(0, 2)
    elif layout == "channels_last":
        strided = tensor.contiguous(memory_format=torch.channels_last)
    else:
        room = torch.full((4, 6, 3, 10), 7.0)
        strided = room[..., ::2]
        strided.copy_(tensor)
    case[which][0] = strided
    assert not strided.is_contiguous()
    assert_update(case, launch_small)
    assert_direction(case, launch_direction_small)
    assert case[which][0] is strided
    if room is not None:
        assert (room[..., 1::2] == 7).all()  # what lies between the elements is not touched


@pytest.mark.interpreter
def test_kernel_is_deterministic() -> None:
    first = make_case([(1000,), (33, 5)])
    second = copy_case(first)
    launch_small(*first)
    launch_small(*second)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.interpreter
def test_kernels_solve_a_system() -> None:
    """CG on the kernels alone: A = 2I on one tensor, 5I on another needs two iterations."""
    b = [torch.randn(50), torch.randn(3, 4)]
    x, r, p = [torch.zeros_like(t) for t in b], [t.clone() for t in b], [t.clone() for t in b]
    rr = sum((t * t).sum() for t in r)
    square = torch.empty(())
    for _ in range(2):
        Ap = [2 * p[0], 5 * p[1]]
        pAp = sum((u * v).sum() for u, v in zip(p, Ap, strict=True))
        launch_small(x, r, p, Ap, torch.as_tensor(rr / pAp), square)
        launch_direction_small(p, r, square / rr)
        rr = square.clone()
    torch.testing.assert_close(x, [b[0] / 2, b[1] / 5], rtol=1e-5, atol=1e-6)


# Triton, compiled for GPUs that are not here


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_binaries_neither_spill_nor_load_element_by_element(arch: Arch) -> None:
    case = make_case([(4096, 1024), (33, 5), (0,)], device="meta")
    with set_wrap_triton_enabled(False):  # outside an op, `wrap_triton` would leave meta tensors to a fake kernel
        launches = dry_launches(arch, lambda: launch_cg_update(*case))
        launches += dry_launches(arch, lambda: launch_cg_direction(case.direction, case.residual, case.step))
        launches += dry_launches(arch, lambda: launch_cg_dots(case.direction, case.product))
    update, finish, direction, dots, _ = map(report, launches)
    assert update.name == "cg_update_kernel"
    assert direction.name == "cg_direction_kernel"
    assert dots.name == "cg_dots_kernel"
    for kernel in (update, finish, direction, dots):
        assert kernel.spills == 0
        assert kernel.fits_shared
        assert kernel.registers <= 96  # three programs of 8 warps on a multiprocessor
        assert kernel.counts["ATOM"] == kernel.counts["atomic"] == 0
    # 8 elements a thread in 16-byte loads (4 on AMD, where a warp has twice the threads), of four tensors or two
    for kernel, tensors in ((update, 4), (direction, 2), (dots, 2)):
        assert kernel.counts["LDG.128"] >= 2 * tensors or kernel.counts["load.128"] >= tensors


# graphs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype)
    torch.library.opcheck(torch.ops.triton_curv.cg_update_.default, tuple(copy_case(case)))
    torch.library.opcheck(torch.ops.triton_curv.cg_direction_.default, (case.direction, case.residual, case.step))
    torch.library.opcheck(torch.ops.triton_curv.cg_dots.default, (case.direction, case.residual))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph_on_cpu(backend: str) -> None:
    torch._dynamo.reset()
    eager, compiled = make_case([(33, 5), (7,)]), make_case([(33, 5), (7,)])

    def iterate(case: Case) -> None:
        cg_update_(*case)
        cg_direction_(case.direction, case.residual, case.step)

    step = torch.compile(iterate, backend=backend, fullgraph=True)
    for _ in range(2):
        iterate(eager)
        step(compiled)
        eager.step.mul_(0.9)
        compiled.step.mul_(0.9)
    torch.testing.assert_close(eager, compiled)


def test_kernels_are_inlined_in_a_cuda_graph() -> None:
    shapes = [(33, 5), (7,), (64, 3, 3, 3)]
    found = traced_kernels(cg_update_, lambda: list(make_case(shapes, device="cuda")))
    assert found.inlined == len(shapes) + 1
    assert found.opaque == []

    def direction_arguments() -> list[Any]:
        case = make_case(shapes, device="cuda")
        return [case.direction, case.residual, case.step]

    found = traced_kernels(cg_direction_, direction_arguments)
    assert found.inlined == len(shapes)
    assert found.opaque == []
    found = traced_kernels(lambda a, b: cg_dots(a, b), lambda: direction_arguments()[:2])
    assert found.inlined == len(shapes) + 1
    assert found.opaque == []
