"""Stage ranges: recorded by an NVTX tool of our own and by torch.profiler; nothing at all when they are off."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
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


Lines = list[list[str]]


def recorded(recorder: Path, arguments: Sequence[str], ranks: Sequence[dict[str, str]] = ({},)) -> list[Lines]:
    """The lines that the recorder writes in each of some Python processes, one for each set of variables."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join(map(str, (root, root / "kernels", root / "autotune")))
    logs = [recorder.with_name(f"log{rank}.tsv") for rank in range(len(ranks))]
    processes = []
    for log, own in zip(logs, ranks, strict=True):
        tool = {"NVTX_INJECTION64_PATH": str(recorder), "NVTX_LOG": str(log)}
        environment = {**os.environ, **tool, "PYTHONPATH": path, **own}
        processes.append(subprocess.Popen([sys.executable, *arguments], env=environment))
    for process in processes:
        assert process.wait(timeout=240) == 0
    return [[line.split("\t") for line in log.read_text().splitlines()] for log in logs]


def tree(lines: Lines) -> str:
    """Ranges one a line, indented as they are nested, with their payloads; domain, category and colour are right.

    Every range is closed.
    """
    categories = {line[2]: line[3] for line in lines if line[0] == "category"}
    shown, depth = [], 0
    assert {line[1] for line in lines} == {"triton_curv"}
    for kind, _, *rest in lines:
        if kind == "push":
            name, category, color, payload = rest
            assert categories[category] == name
            assert int(color, 16) == ranges.COLORS[name]  # type: ignore[index]  # a stage's name
            shown.append(f"{'  ' * depth}{name} {payload}")
        depth += {"push": 1, "pop": -1}.get(kind, 0)
        assert depth >= 0
    assert depth == 0
    return "\n".join(shown)


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
    assert tree(recorded(recorder, ["-c", EXAMPLE])[0]) == "step 7\n  inverse 0\napply 0"


# (rows 6, factors 5, 3 and 4, 2; 23 numbers with a block and 1 without) FLOPs, or bytes of a product's vectors
STATISTICS = """
factor A 120
factor G 36
factor A 180
factor G 72
"""
REFRESH = """
  fold 68
  inverse 224
"""
MOVE = """
  apply 336
  update 138
  update 6
"""
SOLVE = """
  cg 480
    product 192
    product 192
  update 144
  line search 10
"""
OPTIMIZERS = {
    "kfac": f"{STATISTICS} step 0 {REFRESH} {MOVE} step 1 {MOVE} {STATISTICS} step 2 {REFRESH} {MOVE}",
    "neumann": "".join(f"step {i}\n  update 336\n" for i in range(3)),
    "newton-cg": "".join(f"step {i}\n{SOLVE}" for i in range(3)),
    "sgn": "".join(f"step {i}\n{SOLVE}" for i in range(3)),
    "neumann-inner": "".join(f"step {i}\n" for i in range(3)),
}


def test_all_optimizers_show_their_stages_in_order_and_none_when_off(recorder: Path) -> None:
    (lines,) = recorded(recorder, ["-m", "tests.support.staged", *OPTIMIZERS])
    expected = "\n".join(text.replace(" step", "\nstep") for text in OPTIMIZERS.values())
    assert tree(lines).splitlines() == [line.rstrip() for line in expected.splitlines() if line.strip()]


def test_two_ranks_show_what_they_exchange(recorder: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    of_all = {ranges.VARIABLE: "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    logs = recorded(recorder, ["-m", "tests.support.staged"], [{**of_all, "RANK": str(rank)} for rank in range(2)])
    # triangles of both A leave during backward, those of G at the fold, each followed by the wait for a share
    taken = f"{STATISTICS}reduce-scatter {4 * (10 + 15)}\n"
    for lines, fold, inverse, apply in zip(logs, (2 * 21, 2 * 13), (125 + 27, 64 + 8), (240, 96), strict=True):
        waits = "    reduce-scatter 0\n" * 2
        refresh = f"  fold {fold}\n    reduce-scatter {4 * (3 + 6)}\n{waits}  inverse {inverse}\n"
        move = f"  reduce-scatter 92\n  apply {apply}\n  all-gather 92\n  update 138\n  update 6\n"
        expected = f"{taken}step 0\n{refresh}{move}step 1\n{move}{taken}step 2\n{refresh}{move}"
        assert tree(lines).splitlines() == [line for line in expected.splitlines() if line]


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


def test_a_stage_defined_while_ranges_are_on_has_one_until_they_are_off() -> None:
    ranges.enable()
    try:

        class Late:
            @ranges.stage("step")
            def step(self) -> None:
                pass

        marked = ranges._marked.pop()  # it is no part of a module that `disable` could find
        assert Late.step is not marked.function
        assert Late.step.__wrapped__ is marked.function  # type: ignore[attr-defined]  # of functools.wraps
    finally:
        ranges.disable()


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


def test_a_region_costs_nothing_when_off() -> None:
    """Marked and unmarked calls in turn, CPU time, the least of many: less than 50 ns apart."""

    class Pair:
        @ranges.stage("step", payload=lambda self: 1)
        def marked(self) -> None:
            pass

        def plain(self) -> None:
            pass

    def cost(call: Callable[[], None]) -> float:
        start = time.process_time_ns()
        for _ in range(20_000):
            call()
        return (time.process_time_ns() - start) / 20_000

    ranges._marked.pop()  # it is no part of a module that `enable` could find
    pair = Pair()
    times = [(cost(pair.marked), cost(pair.plain)) for _ in range(15)]
    marked, plain = (min(column) for column in zip(*times, strict=True))
    assert marked - plain < 50


def test_without_the_package_the_profiler_alone_has_the_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine to which the code was copied: nothing else may need the package."""
    monkeypatch.setitem(sys.modules, "nvtx", None)
    ranges._domain.cache_clear()
    ranges.reset_totals()
    try:
        with pytest.warns(UserWarning, match="package nvtx is missing"):
            ranges.enable()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
            assert Example().step(3) == 4
        assert {"triton_curv::step", "triton_curv::inverse"} <= {event.name for event in recorded.events()}
        assert ranges.totals()["step"].calls == 1
    finally:
        ranges.disable()
        ranges.reset_totals()
        ranges._domain.cache_clear()
