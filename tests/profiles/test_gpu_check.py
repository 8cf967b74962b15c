"""gpu_check's parts, time limits and summary, with commands that need no GPU."""

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from profiles import bench_damped_inverse, bench_kernels, bench_resnet50, bench_resolve, bench_steps, gpu_check
from profiles.gpu_check import Part, age, main, run_part
from triton_curv.cli import tuning
from triton_curv.cli.app import app


def part(code: str, name: str = "p", share: float = 1.0) -> Part:
    return Part(name, share, lambda out, seconds: [sys.executable, "-c", code])


def test_without_a_gpu_it_says_so_and_exits_with_3(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["--out", str(tmp_path / "out")]) == 3
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_part_that_ends_is_logged(tmp_path: Path) -> None:
    outcome = run_part(part("print('fine')"), tmp_path, 60)
    assert (outcome.state, outcome.tail) == ("ok", ("fine",))
    assert (tmp_path / "p.log").read_text() == "fine\n"


def test_a_part_that_fails_is_reported(tmp_path: Path) -> None:
    assert run_part(part("raise SystemExit(5)"), tmp_path, 60).state == "failed (exit 5)"


def test_parts_have_a_tuning_store_in_the_folder_unless_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os; print(os.environ['TRITON_CURV_CACHE_DIR'])"
    monkeypatch.delenv("TRITON_CURV_CACHE_DIR", raising=False)
    assert run_part(part(code), tmp_path, 60).tail == (str(tmp_path / "tuning-store"),)
    monkeypatch.setenv("TRITON_CURV_CACHE_DIR", "/named")
    assert run_part(part(code), tmp_path, 60).tail == ("/named",)


def test_what_has_ended_is_in_the_summary_while_later_parts_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Properties:
        name = "Some GPU"
        multi_processor_count = 7

    look = f"print(open({str(tmp_path / 'summary.txt')!r}).read())"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(gpu_check, "PARTS", (part("print('fine')", "tests", 0.5), part(look, "kernels")))
    monkeypatch.setattr(gpu_check, "age", lambda: 5.0)
    assert main(["--out", str(tmp_path), "--budget", "90"]) == 0
    assert "tests       ok" in (tmp_path / "kernels.log").read_text()


SPOILING = """
import torch
from tests.gpu import conftest
from tests.gpu.conftest import pytest_runtest_makereport
spoiled = []
conftest.is_spoiled = lambda device: bool(spoiled)
"""
TESTS = """
import conftest, pytest
@pytest.mark.parametrize("i", range(6))
def test_one(i):
    if i == 0:
        conftest.spoiled.append(1)
    assert not conftest.spoiled, "an illegal memory access"
"""


def test_a_test_that_spoils_cuda_is_told_and_spoils_no_other(tmp_path: Path) -> None:
    """Its process ends; the other tests run in a new one."""
    (tmp_path / "conftest.py").write_text(SPOILING)
    (tmp_path / "test_some.py").write_text(TESTS)
    command = ["-m", "pytest", "-v", "-p", "no:cacheprovider", "-n", "1", "--rootdir", str(tmp_path), str(tmp_path)]
    some = Part("p", 1.0, lambda out, seconds: [sys.executable, *command])
    outcome = run_part(some, tmp_path, 90)
    log = (tmp_path / "p.log").read_text()
    assert outcome.state == "failed (exit 1)"
    assert "1 failed, 5 passed" in log
    assert "crashed while running 'test_some.py::test_one[0]'" in log
    assert "test_one[0] has spoiled CUDA" in log
    assert "AssertionError: an illegal memory access" in log


def test_a_part_past_its_limit_is_cut_off_with_what_it_printed(tmp_path: Path) -> None:
    outcome = run_part(part("import time; print('begun', flush=True); time.sleep(60)"), tmp_path, 2)
    assert outcome.state == "cut off after 2 s"
    assert outcome.tail[0] == "begun"


def test_a_part_past_its_limit_may_say_how_far_it_came(tmp_path: Path) -> None:
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('half', flush=True)"
    outcome = run_part(part(code), tmp_path, 4)
    assert outcome.state == "cut off after 4 s"
    assert outcome.tail == ("half",)


def test_the_age_of_this_process_counts() -> None:
    assert 0 < age() < 3600
    first = age()
    time.sleep(0.1)
    assert age() - first == pytest.approx(0.1, abs=0.1)


def test_the_summary_names_every_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Properties:
        name = "Some GPU"
        multi_processor_count = 7

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(gpu_check, "PARTS", (part("print('fine')", "tests", 0.5), part("1/0", "kernels")))
    monkeypatch.setattr(gpu_check, "age", lambda: 5.0)
    assert main(["--out", str(tmp_path), "--budget", "90"]) == 1
    summary = (tmp_path / "summary.txt").read_text()
    head, *ends = summary.splitlines()[-3:]
    assert head.startswith("Some GPU, 7 SMs, torch ")
    assert [end[: -len("    60 s")].rstrip() for end in ends] == ["tests       ok", "kernels     failed (exit 1)"]
    assert "ZeroDivisionError" in summary
    assert summary in capsys.readouterr().out


def test_a_part_without_time_is_named_as_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Properties:
        name = "Some GPU"
        multi_processor_count = 7

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(gpu_check, "PARTS", (part("print(1)", "tests"),))
    monkeypatch.setattr(gpu_check, "age", lambda: 100.0)
    assert main(["--out", str(tmp_path), "--budget", "120"]) == 1
    assert "tests       skipped" in (tmp_path / "summary.txt").read_text()


def arguments_of(part: Part, out: Path) -> list[str]:
    """What comes behind `python -m MODULE`."""
    _, dash, _, *arguments = part.command(out, 100.0)
    assert dash == "-m"
    return arguments


@pytest.mark.parametrize("name", [part.name for part in gpu_check.PARTS])
def test_every_part_runs_a_command_with_arguments_that_it_knows(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the work of each command taken out: on a GPU, a wrong argument would cost the part."""
    part = next(part for part in gpu_check.PARTS if part.name == name)
    module = part.command(tmp_path, 100.0)[2]
    is_package = module == "triton_curv.cli"
    assert find_spec(f"{module}.__main__" if is_package else module) is not None
    monkeypatch.setattr("sys.argv", [module, *arguments_of(part, tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    called: list[object] = []

    def work(*arguments: object, **_: object) -> list[object]:
        called.append(arguments)
        return []

    if name == "tests":
        assert arguments_of(part, tmp_path)[-1] == "tests/gpu"
        return
    if name == "kernels":
        monkeypatch.setattr(bench_kernels, "run", work)
        assert bench_kernels.main() == 0
    elif name == "tune":
        monkeypatch.setattr(tuning, "run_tune", lambda options: len(work(options)))
        assert CliRunner().invoke(app, arguments_of(part, tmp_path)).exit_code == 0
    elif name == "resnet50":
        monkeypatch.setattr(bench_resnet50, "measure", work)
        assert bench_resnet50.main() == 0
    elif name == "inverses":
        monkeypatch.setattr(bench_damped_inverse, "rows", work)
        bench_damped_inverse.main()
    elif name == "first_steps":
        monkeypatch.setattr(bench_resolve, "look_ups", lambda entries: {})
        monkeypatch.setattr(bench_resolve, "launcher", dict)
        monkeypatch.setattr(bench_resolve, "first_steps", work)
        bench_resolve.main()
    else:
        times = {"sgd": (1.0, 1.0), "adamw": (1.0, 1.0)}
        monkeypatch.setattr(bench_steps, "measure", lambda *arguments: [times, work(*arguments)][0])
        bench_steps.main()
    assert len(called) == 1


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_part_takes_the_processes_that_it_started_with_it(tmp_path: Path) -> None:
    child = "import time; time.sleep(60)"
    code = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True)"
    outcome = run_part(part(code + "; import time; time.sleep(60)"), tmp_path, 3)
    assert outcome.state == "cut off after 3 s"
    until = time.monotonic() + 20  # a kill is carried out when the system comes to it; the child would live for 60 s
    while running(int(outcome.tail[0])):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_parts_need_none_of_what_a_machine_lent_for_a_while_lacks() -> None:
    """The tuning store has a folder there; stages show in the profiler."""
    modules = ["bench_kernels", "bench_resnet50", "bench_steps", "bench_damped_inverse", "bench_resolve", "gpu_check"]
    code = f"""
import os
import subprocess
import sys
sys.modules["nvtx"] = sys.modules["platformdirs"] = None
import importlib
for name in {modules}:
    importlib.import_module("profiles." + name)
import triton_curv.cli.app
from triton_curv_autotune.store import default_store
print(default_store().root)
"""
    environment = {**os.environ, "TRITON_CURV_CACHE_DIR": "/named", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["/named"], done.stderr
