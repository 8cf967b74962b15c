"""Every op on the device: launches, CUDA graphs, streams, first call as second; tables of addresses in all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

import triton_curv_kernels as kernels
from triton_curv_kernels.pointer_table import pointer_table

SHAPES = [(300, 257), (1000,), (64, 3, 3, 3), (), (0, 4), (17, 31)]


@dataclass(frozen=True)
class Call:
    """A call that changes tensors in place or returns some; how often it launches a kernel of ours."""

    run: Callable[[], Sequence[Tensor]]
    launches: int
    changed: list[Tensor] = field(default_factory=list)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda")


def lists(count: int, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    torch.manual_seed(0)
    return [[random(*shape).to(dtype) for shape in SHAPES] for _ in range(count)]


def positive(batch: int, n: int) -> Tensor:
    x = random(batch, n, 2 * n)
    return x @ x.mT / (2 * n)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, device="cuda")


def nothing(run: Callable[[], None]) -> Callable[[], Sequence[Tensor]]:
    def returning() -> Sequence[Tensor]:
        run()
        return []

    return returning


def accumulate_factor() -> Call:
    factor, rows = positive(1, 130)[0], random(5000, 129)
    return Call(nothing(lambda: kernels.accumulate_factor_(factor, rows, 0.1, 0.9, ones=True)), 2, [factor])


def accumulate_factors() -> Call:
    sizes = [(3000, 64, False), (200, 129, True), (70, 5, True)]
    factors = [positive(1, n + one)[0] for _, n, one in sizes]
    rows, ones = [random(k, n) for k, n, _ in sizes], [one for *_, one in sizes]
    traces = torch.zeros(3, device="cuda")
    run = nothing(lambda: kernels.accumulate_factors_(factors, rows, 0.1, 0.9, ones, traces))
    return Call(run, 2, [*factors, traces])


def accumulate_patch_factor() -> Call:
    input = random(4, 16, 20, 20).to(memory_format=torch.channels_last)
    factor = torch.zeros(144, 144, device="cuda")
    return Call(nothing(lambda: kernels.accumulate_patch_factor_(factor, input, 3, padding=1)), 2, [factor])


def pack() -> Call:
    matrices = [positive(1, n)[0] for n in (64, 33, 1)]
    return Call(lambda: [kernels.pack_symmetric(matrices, torch.bfloat16, 0.5)], 1)


def unpack() -> Call:
    packed = random(64 * 65 // 2 + 33 * 17)
    return Call(lambda: kernels.unpack_symmetric(packed, [64, 33], torch.float32), 1)


def damped_inverse() -> Call:
    factors, shifts = [positive(2, 70), positive(1, 20)], [scalar(0.1).expand(2).contiguous(), scalar(0.1).view(1)]
    inverses = [torch.zeros_like(f) for f in factors]
    return Call(lambda: [kernels.damped_inverse_(inverses, factors, shifts, 6)], 2 * (4 + 4 * 6), inverses)


def apply_damped_inverse() -> Call:
    grads = [random(2, 40, 33), random(1, 128, 64), random(50, 2, 1)]
    of_a = [positive(2, 33), positive(1, 64), torch.empty(0, device="cuda")]
    of_g = [positive(2, 40), positive(1, 128), positive(50, 2)]
    updates = [torch.empty_like(d) for d in grads]
    limits = (scalar(1e-3), scalar(0.1))
    return Call(lambda: kernels.apply_damped_inverse(updates, grads, of_a, of_g, *limits), 3, updates)


def momentum_update(rescale: bool = False) -> Call:
    params, momenta, updates = lists(3)
    scales = list(torch.full((len(SHAPES),), 0.5, device="cuda").unbind())
    hyper = torch.tensor([1e-2, 0.9, 1e-2, 0.9, 1.0], device="cuda")
    lengths = [1.0] * len(SHAPES) if rescale else None
    run = nothing(lambda: kernels.momentum_update_(params, momenta, updates, scales, hyper, rescale=lengths))
    return Call(run, 2 if rescale else 1, [*params, *momenta])


def neumann_update() -> Call:
    params, momenta, exp_avgs, grads = lists(4)
    distance, hyper = scalar(3.0), torch.tensor([1e-3, 0.9, 1e-7, 1e-5, 0.99], device="cuda")
    run = nothing(lambda: kernels.neumann_update_(params, momenta, exp_avgs, grads, distance, hyper))
    return Call(run, 2, [*params, *momenta, *exp_avgs, distance])


def cg_update() -> Call:
    x, r, p, Ap = lists(4)
    step, square = scalar(0.5), scalar(0.0)
    return Call(nothing(lambda: kernels.cg_update_(x, r, p, Ap, step, square)), 2, [*x, *r, square])


def cg_direction() -> Call:
    p, z = lists(2)
    beta = scalar(0.5)
    return Call(nothing(lambda: kernels.cg_direction_(p, z, beta)), 1, p)


def cg_dots() -> Call:
    a, b = lists(2)
    return Call(lambda: kernels.cg_dots(a, b), 2)


CALLS: dict[str, Callable[[], Call]] = {
    "accumulate_factor_": accumulate_factor,
    "accumulate_factors_": accumulate_factors,
    "accumulate_patch_factor_": accumulate_patch_factor,
    "pack_symmetric": pack,
    "unpack_symmetric": unpack,
    "damped_inverse_": damped_inverse,
    "apply_damped_inverse": apply_damped_inverse,
    "momentum_update_": momentum_update,
    "momentum_update_ and rescale": lambda: momentum_update(rescale=True),
    "neumann_update_": neumann_update,
    "cg_update_": cg_update,
    "cg_direction_": cg_direction,
    "cg_dots": cg_dots,
}
every_op = pytest.mark.parametrize("name", CALLS)


def results(call: Call, run: Callable[[], Sequence[Tensor]], start: list[Tensor], times: int) -> list[list[Tensor]]:
    """What there is after each of several runs from one start."""
    for tensor, value in zip(call.changed, start, strict=True):
        tensor.copy_(value)
    found = []
    for _ in range(times):
        returned = run()
        found.append([t.clone() for t in (*call.changed, *returned)])
    return found


def assert_same_bits(ours: list[list[Tensor]], theirs: list[list[Tensor]]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@every_op
def test_launches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, names = CALLS[name](), []
    run = JITFunction.run

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.__name__)
        return run(self, *args, **kwargs)

    call.run()
    monkeypatch.setattr(JITFunction, "run", counting)
    call.run()
    assert len(names) <= call.launches, names


@every_op
def test_runs_repeat_bit_for_bit_on_any_stream(name: str) -> None:
    call = CALLS[name]()
    start = [t.clone() for t in call.changed]
    first, second = (results(call, call.run, start, 2) for _ in "ab")
    assert_same_bits(first, second)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        elsewhere = results(call, call.run, start, 2)
    torch.cuda.synchronize()
    assert_same_bits(first, elsewhere)


@every_op
@pytest.mark.parametrize("warm", [True, False], ids=["tables known", "tables made while capturing"])
def test_a_cuda_graph_repeats_the_call(name: str, warm: bool) -> None:
    """Other tables come and go, and memory is used anew, between the replays."""
    call = CALLS[name]()
    start = [t.clone() for t in call.changed]
    expected = results(call, call.run, start, 3)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    if warm:
        with torch.cuda.stream(stream):
            call.run()
    with torch.cuda.graph(graph, stream=stream):
        returned = list(call.run())
    for other in range(40):
        pointer_table([[torch.ones(8 + other, device="cuda")]], 512, lambda: None)
        kernels.pack_symmetric([positive(1, 3 + other)[0]], torch.float32)

    def replay() -> Sequence[Tensor]:
        _ = [torch.full((1 << 14,), torch.nan, device="cuda") for _ in range(16)]
        graph.replay()
        return returned

    assert_same_bits(results(call, replay, start, 3), expected)


def test_apply_takes_at_most_three_launches_for_any_number_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    run = JITFunction.run

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counting)
    grads = [random(1, 20 + i, 30 + i) for i in range(60)]
    of_g, of_a = [positive(1, 20 + i) for i in range(60)], [positive(1, 30 + i) for i in range(60)]
    kernels.apply_damped_inverse([torch.empty_like(d) for d in grads], grads, of_a, of_g)
    assert len(names) <= 3


def test_another_stream_gets_its_own_table() -> None:
    a = torch.ones(10, device="cuda")
    table = pointer_table([[a]], 512, lambda: None)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert pointer_table([[a]], 512, lambda: None) is not table
