"""The kernel benchmark: what a row says, wrong results flagged, breakage and lack of time reported."""

import csv
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from profiles import bench_kernels
from profiles.bench_kernels import measure
from profiles.kernel_cases.case import Case
from triton_curv.profiling.roofs import Roofs
from triton_curv.profiling.stopwatch import CaptureError, CpuStopwatch, Times, peak_extra_bytes

CPU = torch.device("cpu")


class FakeStopwatch:
    """Seconds by name instead of a clock."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds

    def interleave(self, calls: dict[str, Callable[[], object]], eager: Collection[str] = ()) -> dict[str, Times]:
        return {name: Times((self.seconds[name],) * 3, "cpu") for name in calls}


def case() -> Case:
    return Case(
        op="op",
        name="a shape",
        ours=lambda: None,
        alternatives={"mm": lambda: None, "loop": lambda: None},
        error=lambda: 1e-7,
        allowed_error=lambda: 2e-7,
        flops=4e9,
        bytes=2e6,
        bound="fp32",
    )


ROOFS = Roofs(tensor=8e12, fp32=4e12, memory=1e9)


def test_a_row_compares_with_the_best_alternative_and_the_roof() -> None:
    row = measure(case(), CPU, FakeStopwatch(ours=4e-3, mm=9e-3, loop=8e-3), ROOFS)  # type: ignore[arg-type]  # a fake
    assert (row.best, row.right) == ("loop", True)
    assert row.speedup == pytest.approx(2.0)
    assert row.tflops == pytest.approx(1.0)
    assert row.gbs == pytest.approx(0.5)
    assert row.roof == pytest.approx(0.5)  # 2 MB at 1 GB/s take 2 ms, longer than the products' 1 ms


def test_a_wrong_result_is_flagged() -> None:
    wrong = replace(case(), error=lambda: float("nan"))
    row = measure(wrong, CPU, FakeStopwatch(ours=1.0, mm=1.0, loop=1.0), ROOFS)  # type: ignore[arg-type]  # a fake
    assert not row.right
    assert "WRONG" in bench_kernels.line_of(row)


def test_breakage_and_lack_of_time_are_reported_and_rows_are_appended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def cases(op: str, device: torch.device, quick: bool) -> Iterator[Case]:
        yield replace(case(), op=op)
        if op == "a":
            raise ValueError("no such shape")
        monkeypatch.setattr("time.monotonic", lambda: float("inf"))
        yield replace(case(), op=op, name="late")

    monkeypatch.setattr(bench_kernels, "op_names", lambda: ["a", "b"])
    monkeypatch.setattr(bench_kernels, "cases_of", cases)
    monkeypatch.setattr(bench_kernels, "measure_roofs", lambda *_: ROOFS)
    monkeypatch.setattr(bench_kernels, "stopwatch_for", lambda _, **__: CpuStopwatch(0.0, 1))
    monkeypatch.setattr("sys.argv", ["bench_kernels", "--device", "cpu", "--csv", str(tmp_path / "k.csv")])
    assert bench_kernels.main() == 1
    printed = capsys.readouterr().out
    assert "missing: a: ValueError: no such shape" in printed
    assert "missing: b: late and later: no time left" in printed
    with (tmp_path / "k.csv").open() as file:
        assert [row["op"] for row in csv.DictReader(file)] == ["a", "b"]


class Replaced(BaseException):
    """Raised in place of becoming another process."""


def test_what_spoils_cuda_costs_one_op_and_a_new_process_goes_on_with_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """a can't be captured, b reads a wrong address; of each a case comes before that. The third process ends."""
    graphs: dict[str, bool] = {}
    spoiled = False

    def cases(op: str, device: torch.device, quick: bool) -> Iterator[Case]:
        nonlocal spoiled
        yield replace(case(), op=op, name="first")
        if op == "a" and graphs["last"]:
            raise CaptureError("expected a call that can be captured, got 'mm'")
        if op == "b":
            spoiled = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered\n-- see the manual")
        yield replace(case(), op=op, name="second")

    def stopwatch(device: torch.device, **options: bool) -> CpuStopwatch:
        graphs["last"] = options.get("graphs", True)
        return CpuStopwatch(0.0, 1)

    def execv(path: str, command: list[str]) -> None:
        nonlocal spoiled
        spoiled = False
        assert (path, command[1:3]) == (sys.executable, ["-m", "profiles.bench_kernels"])
        monkeypatch.setattr("sys.argv", command[2:])
        raise Replaced

    monkeypatch.setattr(bench_kernels, "op_names", lambda: ["a", "b", "c"])
    monkeypatch.setattr(bench_kernels, "cases_of", cases)
    monkeypatch.setattr(bench_kernels, "measure_roofs", lambda *_: ROOFS)
    monkeypatch.setattr(bench_kernels, "stopwatch_for", stopwatch)
    monkeypatch.setattr(bench_kernels, "is_spoiled", lambda _: spoiled)
    monkeypatch.setattr("os.execv", execv)
    monkeypatch.setattr("sys.argv", ["bench_kernels", "--device", "cpu", "--csv", str(tmp_path / "k.csv")])
    for _ in range(2):
        with pytest.raises(Replaced):
            bench_kernels.main()
    assert bench_kernels.main() == 1
    missing = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing: ")]
    assert missing == [
        "missing: b: RuntimeError: CUDA error: an illegal memory access was encountered -- see the manual"
    ]
    with (tmp_path / "k.csv").open() as file:
        rows = [f"{row['op']} {row['case']}" for row in csv.DictReader(file)]
    assert rows == ["a first", "a second", "b first", "c first", "c second"]


def test_peak_extra_bytes_counts_what_lives_at_one_time() -> None:
    def call() -> None:
        a = torch.zeros(1000, 250)
        b = a + 1
        del a
        _c = b * 2

    assert peak_extra_bytes(call, CPU) == pytest.approx(2e6, rel=0.01)


def test_calls_take_turns() -> None:
    order: list[str] = []
    CpuStopwatch(0.0, 2).interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")})
    assert order[:6] == ["a", "b"] * 3
