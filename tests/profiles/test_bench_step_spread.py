"""The benchmark of single steps: a row for each scenario and case, costs beside SGD's."""

import csv
from pathlib import Path

import pytest
import torch

from profiles import bench_step_spread


def test_rows_hold_costs_beside_sgd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of step times that are given: the least of the repeats, the mean of the first ones and of all."""
    times = iter([([9.0, 1.0, 1.0], [6.0, 2.0, 2.0]), ([1.0, 9.0, 1.0], [6.0, 4.0, 2.0])])
    found = (dict(zip(("sgd", "even"), map(torch.tensor, pair), strict=True)) for pair in times)
    monkeypatch.setattr(bench_step_spread, "step_milliseconds", lambda *_: next(found))
    monkeypatch.setattr(bench_step_spread, "START", 2)
    path = tmp_path / "s.csv"
    monkeypatch.setattr("sys.argv", ["bench", "reg-bos", "--cases", "sgd,even", "--repeats", "2", "--csv", str(path)])
    bench_step_spread.main()
    with path.open() as file:
        sgd, even = csv.DictReader(file)
    assert (sgd["optimizer"], sgd["mean_ms"], sgd["all_over_sgd"]) == ("sgd", "1", "1")
    assert (even["refresh_budget"], even["first_2_over_sgd"], even["all_over_sgd"]) == ("even", "4", "3.3333")
    assert even["longest_over_median"] == "3"


def test_slow_minutes_of_the_machine_drop_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Twice the time for all from step 50 on is no spread; every sixth step of one optimizer is."""
    slow = torch.ones(100).index_fill(0, torch.arange(50, 100), 2.0)
    uneven = torch.ones(100).index_fill(0, torch.arange(0, 100, 6), 1.3)
    monkeypatch.setattr(bench_step_spread, "step_milliseconds", lambda *_: {"sgd": slow, "even": slow * uneven})
    path = tmp_path / "s.csv"
    monkeypatch.setattr("sys.argv", ["bench", "--cases", "sgd,even", "--repeats", "1", "--csv", str(path)])
    bench_step_spread.main()
    with path.open() as file:
        sgd, even = csv.DictReader(file)
    assert float(sgd["p99_over_median"]) > 1.9
    assert (sgd["p99_over_median_beside_sgd"], even["p99_over_median_beside_sgd"]) == ("1", "1.3")


def test_steps_are_timed() -> None:
    """From the start of training, one number each."""
    found = bench_step_spread.step_milliseconds("reg-bos", ["sgd", "even"], 3)
    assert [len(times) for times in found.values()] == [3, 3]
    assert all(bool((times > 0).all()) for times in found.values())
