"""neumann_update_ against Algorithm 2 written out in NumPy: reference, interpreted kernels, binaries, graphs."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.support.offline import Arch, dry_launches, report, traced_kernels
from tests.support.poison import poisoned_allocations
from triton_curv_kernels.backend import UnsupportedInputError
from triton_curv_kernels.neumann import (
    launch_neumann_update_,
    neumann_update_,
    neumann_update_reference,
    supports,
)
from triton_curv_kernels.pointer_table import CONFIGS, ListConfig, default_config, prune

Array = NDArray[np.float64]

LR, MU, ALPHA, BETA_N, GAMMA = 0.1, 0.8, 0.05, 3.0, 0.9
SHAPES = [(), (0,), (1,), (7,), (33, 5), (3, 0, 2), (257,), (16, 3, 3, 3)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One rounding to the stored dtype, and fp32 arithmetic before it, on values below 16.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}


class Case(NamedTuple):
    """Arguments of the op, in its order."""

    params: list[Tensor]
    momentum_buffers: list[Tensor]
    exp_avgs: list[Tensor]
    grads: list[Tensor]
    distance: Tensor
    hyper: Tensor


def make_case(
    shapes: Sequence[Sequence[int]] = SHAPES, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Case:
    buffer = torch.float64 if dtype == torch.float64 else torch.float32
    torch.manual_seed(0)
    w, m, v, g = ([torch.randn(s, device=device).to(t) for s in shapes] for t in (dtype, buffer, buffer, dtype))
    hyper = torch.tensor([LR, MU, ALPHA, BETA_N, GAMMA], dtype=torch.float64, device=device)
    return Case(w, m, v, g, torch.tensor(1.7, dtype=buffer, device=device), hyper)


def copy_case(case: Case) -> Case:
    w, m, v, g = ([t.clone() for t in tensors] for tensors in case[:4])
    return Case(w, m, v, g, case.distance.clone(), case.hyper.clone())


def numpy_step(case: Case) -> tuple[list[Array], list[Array], list[Array], float]:
    """Lines 9 to 12 of Algorithm 2 in float64; v and the norm see the weights rounded to the dtype of storage."""
    D = float(case.distance)
    ws: list[Array] = []
    ms: list[Array] = []
    vs: list[Array] = []
    for w_t, m_t, v_t, g_t in zip(*case[:4], strict=True):
        w, m, v, g = (t.double().numpy() for t in (w_t, m_t, v_t, g_t))
        d = g + (ALPHA * D**2 - BETA_N / D**2) * (w - v) / D if D > 0 else g
        m = MU * m - LR * d
        w = torch.from_numpy(np.asarray(w + MU * m - LR * d)).to(w_t.dtype).double().numpy()
        ws, ms, vs = [*ws, w], [*ms, m], [*vs, w + GAMMA * (v - w)]
    norm = sum(float(((w - v) ** 2).sum()) for w, v in zip(ws, vs, strict=True)) ** 0.5
    return ws, ms, vs, norm


def assert_step(case: Case, run: Callable[..., object]) -> None:
    dtype = case.params[0].dtype
    ws, ms, vs, norm = numpy_step(case)
    run(*case)
    assert case.distance.item() == pytest.approx(norm, rel=TOLERANCE[dtype])
    narrow, wide = TOLERANCE[dtype], TOLERANCE[case.exp_avgs[0].dtype]
    # v follows the stored weight, which may round the other way than the oracle's
    for got, want, tolerance in ((case[0], ws, narrow), (case[1], ms, wide), (case[2], vs, max(wide, narrow))):
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g.double().numpy(), w, rtol=0, atol=tolerance * 4)


launch_small = partial(launch_neumann_update_, config=ListConfig(BLOCK=128))


# the reference


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_reference_is_algorithm_2(dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype)
    assert_step(case, neumann_update_reference)


def test_no_regulariser_at_distance_zero() -> None:
    case = make_case(dtype=torch.float64)
    for w, v in zip(case.params, case.exp_avgs, strict=True):
        v.copy_(w)
    case.distance.zero_()
    assert_step(case, neumann_update_reference)
    assert case.distance > 0


def test_distance_is_the_norm_of_w_minus_v() -> None:
    case = make_case(dtype=torch.float64)
    neumann_update_(*case)
    flat = torch.cat([(w - v).flatten() for w, v in zip(case.params, case.exp_avgs, strict=True)])
    assert case.distance.item() == pytest.approx(flat.norm().item(), rel=1e-14)


def test_public_function_op_and_reference_agree() -> None:
    case = make_case(dtype=torch.float64)
    ops = copy_case(case)
    neumann_update_(*case)
    torch.ops.triton_curv.neumann_update_(*ops)
    for a, b in zip(case[:3], ops[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
    torch.testing.assert_close(case.distance, ops.distance, rtol=1e-14, atol=0)


@pytest.mark.parametrize("run", [neumann_update_, launch_neumann_update_], ids=["public", "triton"])
@pytest.mark.parametrize("shapes", [[], [(0,)], [(0,), (2, 0)]])
def test_nothing_to_update(run: Callable[..., None], shapes: list[tuple[int, ...]]) -> None:
    case = make_case(shapes)
    run(*case)
    assert case.distance.item() == 0


def test_arguments_that_do_not_fit_are_refused() -> None:
    case = make_case([(3,)])
    with pytest.raises(UnsupportedInputError, match=r"lists of one length, got 1 params.*0 grads"):
        neumann_update_(*case[:3], [], case.distance, case.hyper)
    with pytest.raises(UnsupportedInputError, match=r"got \(\) and \(4,\)"):
        neumann_update_(*case[:4], case.distance, torch.ones(4))
    with pytest.raises(UnsupportedInputError, match=r"one shape at place 0, got \(3,\), \(3,\), \(3,\), \(4,\)"):
        launch_neumann_update_(*case[:3], [torch.ones(4)], case.distance, case.hyper)
    wide = make_case([(3,)], dtype=torch.float64)
    assert supports(*case[:4])
    assert not supports(*wide[:4])
    with pytest.raises(UnsupportedInputError, match=r"expected fp32, fp16 or bf16 params.*float64"):
        launch_neumann_update_(*wide)


@pytest.mark.parametrize("numel", [1, 100, 10**6])
def test_prune_keeps_configs_for_every_size(numel: int) -> None:
    kept = prune(CONFIGS, numel)
    assert kept
    assert all(max(512, 2 * numel) >= c.BLOCK for c in kept)
    assert default_config(numel) in kept


# Triton, interpreted


@pytest.mark.interpreter
@pytest.mark.parametrize("launch", [launch_neumann_update_, launch_small], ids=["default", "block128"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_is_algorithm_2(dtype: torch.dtype, launch: Callable[..., None]) -> None:
    with poisoned_allocations():
        assert_step(make_case(dtype=dtype), launch)


@pytest.mark.interpreter
def test_kernel_takes_mixed_dtypes_and_fp32_scalars() -> None:
    case = make_case([(5, 7), (40,)])
    mixed = Case(
        [case.params[0].bfloat16(), case.params[1]],
        *case[1:3],
        [case.grads[0], case.grads[1].half()],
        case.distance,
        case.hyper.float(),
    )
    want = copy_case(mixed)
    launch_small(*mixed)
    neumann_update_reference(*want)
    for got, expected in zip(mixed[:3], want[:3], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(mixed.distance, want.distance)


@pytest.mark.interpreter
def test_kernel_has_no_regulariser_at_distance_zero() -> None:
    case = make_case()
    for w, v in zip(case.params, case.exp_avgs, strict=True):
        v.copy_(w)
    case.distance.zero_()
    assert_step(case, launch_small)


@pytest.mark.interpreter
@pytest.mark.parametrize("which", range(4), ids=["param", "momentum_buffer", "exp_avg", "grad"])
@pytest.mark.parametrize("layout", ["transposed", "channels_last", "sliced"])
def test_kernel_takes_any_strides(layout: str, which: int) -> None:
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
    assert_step(case, launch_small)
    assert case[which][0] is strided
    if room is not None:
        assert (room[..., 1::2] == 7).all()  # what lies between the elements is not touched


@pytest.mark.interpreter
def test_kernel_takes_hyper_with_gaps() -> None:
    case = make_case([(33, 5)])
    room = torch.full((5, 2), 7.0)
    room[:, 0] = case.hyper
    assert_step(case._replace(hyper=room[:, 0]), launch_small)


@pytest.mark.interpreter
def test_kernel_is_deterministic() -> None:
    first = make_case([(1000,), (33, 5)])
    second = copy_case(first)
    launch_small(*first)
    launch_small(*second)
    for a, b in zip(first[:3], second[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert first.distance.item() == second.distance.item()


# Triton, compiled for GPUs that are not here


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_binaries_neither_spill_nor_load_element_by_element(arch: Arch, dtype: torch.dtype) -> None:
    case = make_case([(4096, 1024), (33, 5), (0,)], dtype=dtype, device="meta")
    update, finish = map(report, dry_launches(arch, lambda: launch_neumann_update_(*case)))
    assert update.name == "_update_kernel"
    for kernel in (update, finish):
        assert kernel.spills == 0
        assert kernel.fits_shared
        assert kernel.registers <= 96  # three programs of 8 warps on a multiprocessor
        assert kernel.counts["ATOM"] == kernel.counts["atomic"] == 0
    # 8 elements a thread: two 16-byte accesses of fp32, one of 16-bit numbers
    assert "gfx" in arch or update.counts["LDG.128"] >= (8 if dtype == torch.float32 else 6)
    assert "gfx" in arch or update.counts["STG.128"] >= (6 if dtype == torch.float32 else 5)
    assert "gfx" not in arch or update.counts["load.128"] >= (4 if dtype == torch.float32 else 2)


# graphs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.triton_curv.neumann_update_.default, tuple(make_case(dtype=dtype)))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph_on_cpu(backend: str) -> None:
    torch._dynamo.reset()
    eager, compiled = make_case([(33, 5), (7,)]), make_case([(33, 5), (7,)])
    step = torch.compile(neumann_update_, backend=backend, fullgraph=True)
    for _ in range(2):
        neumann_update_(*eager)
        step(*compiled)
        eager.hyper.mul_(0.9)
        compiled.hyper.mul_(0.9)
    for a, b in zip(eager[:3], compiled[:3], strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(eager.distance, compiled.distance)


def test_changing_hyper_parameters_recompiles_nothing() -> None:
    torch._dynamo.reset()
    case = make_case([(33, 5), (7,)])
    step = torch.compile(neumann_update_, backend="aot_eager", fullgraph=True)
    step(*case)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lr in (0.3, 0.2):
            case.hyper[0] = lr
            step(*case)


def test_kernels_are_inlined_in_a_cuda_graph() -> None:
    shapes = [(33, 5), (7,), (64, 3, 3, 3)]
    found = traced_kernels(neumann_update_, lambda: list(make_case(shapes, device="cuda")))
    assert found.inlined == len(shapes) + 1
    assert found.opaque == []
