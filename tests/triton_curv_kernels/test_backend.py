"""Choice of the implementation, and that the interpreter's bfloat16 repair is in place."""

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses import FakeTensorMode

import triton_curv_kernels
from tests.support.poison import poisoned, poisoned_allocations
from triton_curv_kernels.backend import (
    VARIABLE,
    BackendError,
    DeviceLimits,
    device_limits,
    is_traced,
    on_own_device,
    use_reference,
)

CPU = torch.empty(0)
META = torch.empty(0, device="meta")


@pytest.mark.parametrize(
    ("value", "on_cpu", "elsewhere"),
    [
        (None, True, False),
        ("", True, False),
        ("auto", True, False),
        ("reference", True, True),
        (" Triton ", False, False),
    ],
)
def test_variable_decides(value: str | None, on_cpu: bool, elsewhere: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, value)
    assert (use_reference(CPU), use_reference(META)) == (on_cpu, elsewhere)


def test_variable_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for value in ("reference", "triton", "reference"):
        monkeypatch.setenv(VARIABLE, value)
        seen.append(use_reference(CPU))
    assert seen == [True, False, True]


def test_unknown_value_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(BackendError, match=r"TRITON_CURV_BACKEND .*'reference'.* got 'cuda'"):
        use_reference(CPU)


def test_limits_where_there_is_no_gpu() -> None:
    assert device_limits(torch.device("cpu")) == DeviceLimits("cuda", 132, 227 * 1024)


class OnCuda(torch.Tensor):
    """A tensor that says it is on the second GPU, where there is none."""

    @staticmethod
    def __new__(cls: type["OnCuda"]) -> "OnCuda":
        made: OnCuda = torch.Tensor._make_wrapper_subclass(cls, (3,), device=torch.device("cuda:1"))
        return made

    @classmethod
    def __torch_dispatch__(cls, *args: object, **kwargs: object) -> None:
        raise AssertionError("expected no operation")


@pytest.mark.parametrize("place", range(4))
def test_launchers_run_on_the_device_of_their_tensors(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device: with tensors on another one it would read that one's memory."""
    current: list[torch.device] = []

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            current.append(self.device)

        def __exit__(self, *_: object) -> None:
            current.pop()

    @on_own_device
    def launch(*_: object, **__: object) -> list[torch.device]:
        return list(current)

    monkeypatch.setattr(torch.cuda, "device", Guard)
    far, near = OnCuda(), torch.empty(0)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((far, near), {}),
        (([far], near), {}),
        (([], 1.0, (far,)), {}),
        ((), {"rows": [far]}),
    ]
    args, kwargs = calls[place]
    assert launch(*args, **kwargs) == [torch.device("cuda", 1)]
    assert launch(near) == launch() == launch([]) == []
    assert current == []


def test_every_launcher_is_guarded() -> None:
    """By its name: whatever begins with `launch_` in a file of the package."""
    folder = Path(triton_curv_kernels.__file__).parent
    launchers = [
        value
        for file in sorted(folder.glob("*.py"))
        for name, value in vars(import_module(f"triton_curv_kernels.{file.stem}")).items()
        if name.startswith("launch_") and name != "launch_finish"  # part of another launch
    ]
    assert len(launchers) >= 11
    for launcher in launchers:
        assert launcher.__code__.co_name == "launch", launcher
        assert launcher.__wrapped__.__name__ == launcher.__name__


def test_tensors_of_a_trace_are_told_apart() -> None:
    with FakeTensorMode():
        fake = torch.empty(3, device="cuda")
    assert is_traced(fake)
    assert is_traced(CPU, [CPU, fake])
    assert not is_traced(CPU, [CPU], [])


def test_poison() -> None:
    assert poisoned((2, 3), torch.float16).isnan().all()
    with poisoned_allocations():
        assert all(t.isnan().all() for t in (torch.empty(3), torch.empty_like(CPU), CPU.new_empty(2, 2)))
        assert torch.empty(3, dtype=torch.int32).shape == (3,)
    assert torch.empty.__name__ == "empty"


@triton.jit  # type: ignore[untyped-decorator]  # Triton is untyped
def _bf16_arithmetic(X: Any, Y: Any, OUT: Any, N: tl.constexpr) -> None:
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(X + at)
    y = tl.load(Y + at)
    tl.store(OUT + at, x * y - x)
    tl.store(OUT + N * N + at, tl.dot(x, y).to(tl.bfloat16))


@pytest.mark.interpreter
def test_interpreter_computes_bfloat16() -> None:
    """Without `interp_bf16` both results are off by many orders of magnitude."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(16, 16, generator=generator).bfloat16() for _ in range(2))
    out = poisoned((2, 16, 16), torch.bfloat16)
    _bf16_arithmetic[(1,)](x, y, out, N=16)
    assert torch.equal(out[0], x * y - x)
    torch.testing.assert_close(out[1], (x.double() @ y.double()).bfloat16(), rtol=2**-7, atol=0)
