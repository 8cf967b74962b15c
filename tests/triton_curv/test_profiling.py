"""Time by stage: exclusive times by brute force, an Nsight export of the same schema, the command and its files."""

import csv
import random
import sqlite3
from pathlib import Path

import pytest

from triton_curv.cli import main
from triton_curv.costs import Cost, apply_cost, factor_cost, inverse_cost
from triton_curv.nvtx import Totals
from triton_curv.profiling.nsys import TraceError, read_export
from triton_curv.profiling.roofs import Roofs
from triton_curv.profiling.stages import Launch, Range, StageTime, time_by_stage
from triton_curv.profiling.table import rows_of

ROOFS = Roofs(tensor=4e12, fp32=1e12, memory=1e11)


def nested(rng: random.Random, start: int, end: int, depth: int, thread: int) -> list[Range]:
    """Random ranges with integer times, nested or apart, inside [start, end)."""
    ranges = []
    at = start
    while depth and end - at >= 2:
        first = rng.randrange(at, end - 1)
        last = rng.randrange(first + 1, end)
        ranges.append(Range(rng.choice("abc"), thread, first, last))
        ranges += nested(rng, first, last, depth - 1, thread)
        at = last
    return ranges


@pytest.mark.parametrize("seed", range(20))
def test_exclusive_times_equal_a_count_of_moments(seed: int) -> None:
    rng = random.Random(seed)
    ranges = [r for thread in range(2) for r in nested(rng, 0, 60, 3, thread)]
    launches = [Launch(rng.randrange(3), rng.randrange(60) + 0.5, rng.random()) for _ in range(40)]

    def innermost(thread: int, moment: float) -> str | None:
        inside = [r for r in ranges if r.thread == thread and r.start < moment < r.end]
        shortest = min((r.end - r.start for r in inside), default=0)
        return [r.name for r in inside if r.end - r.start == shortest][-1] if inside else None

    host: dict[str, float] = {}
    device: dict[str, float] = {}
    for thread in range(2):
        for moment in range(60):
            name = innermost(thread, moment + 0.5)
            if name:
                host[name] = host.get(name, 0) + 1
    for launch in launches:
        name = innermost(launch.thread, launch.time) or "other"
        device[name] = device.get(name, 0) + launch.duration
    times = time_by_stage(ranges, launches)
    for name, time in times.items():
        assert time.host == pytest.approx(host.get(name, 0))
        assert time.device == pytest.approx(device.get(name, 0))
        assert time.calls == sum(r.name == name for r in ranges)
    assert host.keys() | device.keys() <= times.keys()


def export(path: Path) -> None:
    """A file as `nsys export --type=sqlite` writes it: two steps, a kernel and a copy, another library's range."""
    thread, process = 5 << 24 | 7, 5 << 24
    with sqlite3.connect(path) as database:
        database.executescript(
            """
            CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT NOT NULL);
            CREATE TABLE NVTX_EVENTS (start INTEGER, end INTEGER, eventType INTEGER, text TEXT, textId INTEGER,
                domainId INTEGER, globalTid INTEGER);
            CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER, end INTEGER, globalTid INTEGER,
                correlationId INTEGER);
            CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER, end INTEGER, globalPid INTEGER,
                correlationId INTEGER);
            CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INTEGER, end INTEGER, globalPid INTEGER,
                correlationId INTEGER);
            INSERT INTO StringIds VALUES (1, 'step'), (2, 'inverse');
            """
        )
        events = [
            (0, None, 75, "triton_curv", None, 3, thread),
            (0, None, 75, "another", None, 4, thread),
            (1000, 5000, 59, None, 1, 3, thread),
            (2000, 3000, 59, None, 2, 3, thread),
            (6000, 9000, 59, "step", None, 3, thread),
            (6000, 9000, 59, "not ours", None, 4, thread),
        ]
        database.executemany("INSERT INTO NVTX_EVENTS VALUES (?, ?, ?, ?, ?, ?, ?)", events)
        calls = [(2500, 2600, thread, 1), (4000, 4100, thread, 2), (9500, 9600, thread, 3)]
        database.executemany("INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, ?, ?)", calls)
        kernels = [(8000, 8700, process, 1), (9700, 9900, process, 3)]
        database.executemany("INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, ?, ?)", kernels)
        database.execute("INSERT INTO CUPTI_ACTIVITY_KIND_MEMCPY VALUES (4200, 4250, ?, 2)", (process,))


def test_an_nsight_export_gives_host_and_device_time_by_stage(tmp_path: Path) -> None:
    export(tmp_path / "a.sqlite")
    times = read_export(tmp_path / "a.sqlite")
    expected = {
        "step": StageTime(2, 6e-6, 0.05e-6),
        "inverse": StageTime(1, 1e-6, 0.7e-6),
        "other": StageTime(0, 0.0, 0.2e-6),
    }
    assert times.keys() == expected.keys()
    for name, time in expected.items():
        assert times[name].calls == time.calls
        assert times[name].host == pytest.approx(time.host)
        assert times[name].device == pytest.approx(time.device)


def test_what_is_no_export_gets_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="got no file"):
        read_export(tmp_path / "none.sqlite")
    (tmp_path / "text.sqlite").write_text("not a database, though long enough to have a header " * 20)
    with pytest.raises(TraceError, match="expected an Nsight Systems export"):
        read_export(tmp_path / "text.sqlite")
    with sqlite3.connect(tmp_path / "empty.sqlite") as database:
        database.execute("CREATE TABLE something (x)")
    with pytest.raises(TraceError, match="NVTX_EVENTS"):
        read_export(tmp_path / "empty.sqlite")
    export(tmp_path / "others.sqlite")
    with sqlite3.connect(tmp_path / "others.sqlite") as database:
        database.execute("UPDATE NVTX_EVENTS SET text = 'x' WHERE text = 'triton_curv'")
    with pytest.raises(TraceError, match="TRITON_CURV_NVTX=1"):
        read_export(tmp_path / "others.sqlite")


def test_rows_tell_rates_and_the_share_of_the_roof() -> None:
    times = {"apply": StageTime(2, 3.0, 0.0), "step": StageTime(1, 1.0, 0.0)}
    apply, step = rows_of(times, {"apply": Totals(2, Cost(10**12, 6 * 10**10))}, ROOFS)
    assert (apply.stage, apply.share, apply.gbs) == ("apply", 0.75, 20.0)
    assert apply.tflops == pytest.approx(1 / 3)
    assert apply.roof == pytest.approx(1 / 3)  # 10^12 FLOPs take 1 s at least, the bytes 0.6 s
    assert (step.share, step.tflops, step.roof) == (0.25, None, None)


def test_costs_are_those_of_the_formulas() -> None:
    assert factor_cost(rows=10, n=3).flops == 2 * 10 * 6
    assert inverse_cost(n=4, batch=2).flops == 2 * 64
    assert apply_cost(rows=2, columns=3).flops == 2 * (2 * 2 * 3) + 2 * (2 * 3 * 3)


def test_the_command_profiles_a_scenario(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "profile"
    assert main(["profile", "reg-bos", "--steps", "20", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "roofs of this machine" in printed
    assert "nsys profile --trace=cuda,nvtx --output=stages triton-curv train reg-bos --optimizer kfac" in printed
    assert 'ncu --set full --nvtx --nvtx-include "triton_curv@inverse/" triton-curv train reg-bos' in printed
    assert (out / "stages.png").read_bytes().startswith(b"\x89PNG")
    with (out / "stages.csv").open() as file:
        rows = {row["stage"]: row for row in csv.DictReader(file)}
    assert {"backward", "step", "inverse", "apply", "update"} <= rows.keys()
    assert rows["step"]["calls"] == "20"
    assert float(rows["inverse"]["flops"]) > 0


def test_the_command_profiles_a_script_with_its_arguments(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, torch, triton_curv as tc\n"
        "assert sys.argv[1:] == ['--width', '3'] and __name__ == '__main__'\n"
        "model = torch.nn.Linear(3, 2)\n"
        "opt = tc.KFAC(model)\n"
        "model(torch.randn(5, 3)).square().mean().backward()\n"
        "opt.step()\n"
    )
    out = tmp_path / "profile"
    assert main(["profile", str(script), "--out", str(out), "--width", "3"]) == 0
    assert "step," in (out / "stages.csv").read_text()


def test_the_command_reads_an_export(tmp_path: Path) -> None:
    export(tmp_path / "a.sqlite")
    assert main(["profile", "--nsys", str(tmp_path / "a.sqlite"), "--out", str(tmp_path / "out")]) == 0
    assert "inverse," in (tmp_path / "out" / "stages.csv").read_text()


def test_nothing_to_profile_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile"]) == 2
    assert "one of them" in capsys.readouterr().err
