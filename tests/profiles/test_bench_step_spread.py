"""The benchmark of single steps: a row for each scenario and case, costs beside SGD's."""

import csv
from pathlib import Path

import pytest

from profiles import bench_step_spread


def test_rows_hold_costs_beside_sgd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of step times that are given: the least of the repeats, the mean of the first ones and of all."""
    times = iter([[9.0, 1.0, 1.0], [6.0, 2.0, 2.0], [1.0, 9.0, 1.0], [6.0, 4.0, 2.0]])
    monkeypatch.setattr(bench_step_spread, "step_milliseconds", lambda *_: next(times))
    monkeypatch.setattr(bench_step_spread, "START", 2)
    path = tmp_path / "s.csv"
    monkeypatch.setattr("sys.argv", ["bench", "reg-bos", "--cases", "sgd,even", "--repeats", "2", "--csv", str(path)])
    bench_step_spread.main()
    with path.open() as file:
        sgd, even = csv.DictReader(file)
    assert (sgd["optimizer"], sgd["mean_ms"], sgd["all_over_sgd"]) == ("sgd", "1", "1")
    assert (even["refresh_budget"], even["first_2_over_sgd"], even["all_over_sgd"]) == ("even", "4", "3.3333")
    assert even["longest_over_median"] == "3"


def test_a_step_is_timed() -> None:
    """From the start of training, one number each."""
    assert len(bench_step_spread.step_milliseconds("reg-bos", {}, 3)) == 3
