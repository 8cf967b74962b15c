"""gpu_check's parts, time limits and summary, with commands that need no GPU."""

import sys
from pathlib import Path

import pytest
import torch

from profiles import gpu_check
from profiles.gpu_check import Part, main, run_part


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


def test_a_part_past_its_limit_is_cut_off_with_what_it_printed(tmp_path: Path) -> None:
    outcome = run_part(part("import time; print('begun', flush=True); time.sleep(60)"), tmp_path, 2)
    assert outcome.state == "cut off after 2 s"
    assert outcome.tail == ("begun",)


def test_the_summary_names_every_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Properties:
        name = "Some GPU"
        multi_processor_count = 7

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(gpu_check, "PARTS", (part("print('fine')", "tests", 0.5), part("1/0", "kernels")))
    assert main(["--out", str(tmp_path), "--budget", "80"]) == 1
    summary = (tmp_path / "summary.txt").read_text()
    assert summary.splitlines()[0].startswith("Some GPU, 7 SMs")
    assert "tests      ok" in summary
    assert "kernels    failed (exit 1)" in summary
    assert "ZeroDivisionError" in summary
    assert summary in capsys.readouterr().out


def test_a_part_without_time_is_named_as_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Properties:
        name = "Some GPU"
        multi_processor_count = 7

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(gpu_check, "PARTS", (part("print(1)", "tests"),))
    assert main(["--out", str(tmp_path), "--budget", "20"]) == 1
    assert "tests      skipped" in (tmp_path / "summary.txt").read_text()
