"""The benchmark of steps: rows of the optimizers named, and of what they are compared with, within a budget."""

import csv
from pathlib import Path

import pytest

from profiles import bench_steps


def test_named_optimizers_are_measured_as_long_as_there_is_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One round that counts, since there is no time for more."""
    monkeypatch.setattr(bench_steps, "CYCLE", 2)
    arguments = ["reg-bos", "--rounds", "3", "--budget", "0", "--optimizers", "kfac", "--csv", str(tmp_path / "s.csv")]
    monkeypatch.setattr("sys.argv", ["bench_steps", *arguments])
    bench_steps.main()
    assert "time is over after 1 of 3 rounds" in capsys.readouterr().out
    with (tmp_path / "s.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["optimizer"] for row in rows] == ["sgd", "adamw", "kfac"]
    assert all(float(row["step_ms"]) > 0 for row in rows)
