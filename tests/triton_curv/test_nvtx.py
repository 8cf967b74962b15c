"""Stage ranges: recorded by an NVTX tool of our own and by torch.profiler; nothing at all when they are off."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import triton_curv.nvtx as ranges

RECORDER = Path(__file__).parents[1] / "support" / "nvtx_recorder.c"


class Example:
    @ranges.stage("step", payload=lambda self, number: number)
    def step(self, number: int) -> int:
        return self.invert() + number

    @ranges.stage("inverse")
    def invert(self) -> int:
        return 1

    @ranges.stage("apply")
    def fail(self) -> None:
        raise ValueError("planned")


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    library = tmp_path / "recorder.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, RECORDER], check=True)
    return library


def recorded(recorder: Path, code: str) -> list[list[str]]:
    """The lines that the recorder writes while `code` runs in a process of its own."""
    log = recorder.with_name("log.tsv")
    environment = {**os.environ, "NVTX_INJECTION64_PATH": str(recorder), "NVTX_LOG": str(log)}
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (root, root / "kernels", root / "autotune")))
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
    return [line.split("\t") for line in log.read_text().splitlines()]


EXAMPLE = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("example", {str(Path(__file__))!r})
module = sys.modules["example"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.ranges.enable()
example = module.Example()
assert example.step(7) == 8
try:
    example.fail()
except ValueError:
    pass
module.ranges.disable()
example.step(8)
"""


def test_ranges_are_balanced_nested_and_say_stage_and_payload(recorder: Path) -> None:
    lines = recorded(recorder, EXAMPLE)
    categories = {line[2]: line[3] for line in lines if line[0] == "category"}
    events = [line for line in lines if line[0] in ("push", "pop")]
    assert {line[1] for line in lines} == {"triton_curv"}
    assert [e[2] if e[0] == "push" else "pop" for e in events] == ["step", "inverse", "pop", "pop", "apply", "pop"]
    for event in events:
        if event[0] == "push":
            assert categories[event[3]] == event[2]
            assert int(event[4], 16) == ranges.COLORS[event[2]]  # type: ignore[index]  # a stage's name
    assert events[0][5] == "7"


def test_the_same_names_reach_the_profiler() -> None:
    ranges.enable()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            Example().step(1)
    finally:
        ranges.disable()
    assert {"triton_curv::step", "triton_curv::inverse"} <= {event.key for event in profile.key_averages()}


def test_off_means_the_functions_themselves() -> None:
    before = Example.step
    ranges.enable()
    assert ranges.enabled()
    assert Example.step is not before
    ranges.disable()
    assert not ranges.enabled()
    assert Example.step is before


def test_ranges_stay_out_of_compiled_graphs() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * (1 + Example().invert())

    ranges.enable()
    try:
        compiled = torch.compile(double, fullgraph=True, backend="eager")
        assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    finally:
        ranges.disable()
        torch.compiler.reset()
