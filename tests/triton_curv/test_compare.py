"""Comparisons: the search protocol, fair timing, and the three files."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from triton_curv.scenarios import SCENARIOS, get_scenario
from triton_curv.scenarios.scenario import UNTUNED
from triton_curv.training import report
from triton_curv.training.compare import Comparison, Settings, compare, planned_work
from triton_curv.training.errors import OutputError, SettingError
from triton_curv.training.files import require_replaceable
from triton_curv.training.optimizers import CLOSURES, OPTIMIZERS
from triton_curv.training.report import FILE_NAMES, tidy_rows, write_report
from triton_curv.training.search import Point, Result, Run, search_rate, train_run
from triton_curv.training.timing import one_thread, step_times
from triton_curv.training.trainer import Trainer


class Silence:
    """Counts what a comparison reports."""

    def __init__(self) -> None:
        self.done = 0
        self.phases: list[str] = []
        self.results: list[Result] = []

    def advance(self, amount: int = 1) -> None:
        self.done += amount

    def phase(self, text: str) -> None:
        self.phases.append(text)

    def found(self, result: Result) -> None:
        self.results.append(result)


def curve(rate: float, seed: int, *losses: float) -> Run:
    return Run("sgd", rate, seed, tuple(Point(step, loss, 0.5) for step, loss in enumerate(losses)))


def planted(table: dict[tuple[float, int], float]) -> tuple[Callable[[str, float, int], Run], list[tuple[float, int]]]:
    """A run function with the final losses of ``table``, and the list of its calls."""
    calls: list[tuple[float, int]] = []

    def run(optimizer: str, rate: float, seed: int) -> Run:
        calls.append((rate, seed))
        return curve(rate, seed, 1.0, table[rate, seed])

    return run, calls


def test_lowest_final_loss_runs_on_the_other_seeds() -> None:
    run, calls = planted({(0.1, 0): 0.5, (0.2, 0): 0.3, (0.4, 0): 0.4, (0.2, 1): 0.35, (0.2, 2): 0.25})
    result = search_rate("sgd", (0.1, 0.2, 0.4), range(3), run)
    assert calls == [(0.1, 0), (0.2, 0), (0.4, 0), (0.2, 1), (0.2, 2)]
    assert result.rate == 0.2
    assert [r.final_loss for r in result.runs] == [0.3, 0.35, 0.25]
    assert result.note == ""
    assert not result.at_edge


def test_runner_up_takes_over_and_this_is_said() -> None:
    table = {(0.1, 0): 0.5, (0.2, 0): 0.3, (0.2, 1): math.nan, (0.1, 1): 0.6, (0.1, 2): 0.6}
    run, calls = planted(table)
    result = search_rate("sgd", (0.1, 0.2), range(3), run)
    assert calls[2:] == [(0.2, 1), (0.1, 1), (0.1, 2)]
    assert result.rate == 0.1
    assert result.note == "sgd: rate 0.2 diverged on seed 1, the runner-up took over"
    assert result.at_edge


def test_all_rates_diverged_is_said() -> None:
    run, _ = planted({(0.1, 0): math.inf, (0.2, 0): 1.0})
    result = search_rate("sgd", (0.1, 0.2), range(3), run)
    assert (result.rate, result.runs, result.note) == (None, (), "sgd: every rate diverged")


def test_run_summaries() -> None:
    run = curve(0.1, 0, *(1.0 - 0.01 * step for step in range(51)))
    assert run.final_loss == pytest.approx(sum(1.0 - 0.01 * step for step in range(45, 51)) / 6)
    assert run.steps_to(0.755) == 25
    assert run.steps_to(0.1) is None
    assert not run.diverged
    assert curve(0.1, 0, 1.0, math.nan).diverged
    assert curve(0.1, 0, 1.0, 1.5).diverged


def test_a_diverging_run_stops_and_is_marked() -> None:
    scenario = get_scenario("reg-bos")
    run = train_run(scenario, scenario.load(), "sgd", 1e3, 0, 60)
    assert run.diverged
    assert run.points[-1].step < 60


def test_same_seed_same_start_for_every_optimizer_and_same_run_twice() -> None:
    scenario = get_scenario("digits-cnn")
    data = scenario.load()
    starts = {train_run(scenario, data, name, 1e-3, 1, 1).points[0] for name in OPTIMIZERS}
    assert len(starts) == 1
    first, second = (train_run(scenario, data, "kfac", 3e-3, 1, 6) for _ in range(2))
    assert first == second


def test_batches_do_not_depend_on_the_optimizer() -> None:
    scenario = get_scenario("reg-lif")
    data = scenario.load()
    trainers = [Trainer(scenario, data, name, 1e-3, 2, 40) for name in OPTIMIZERS]
    for _ in range(25):  # over the end of an epoch
        batches = [trainer.draw() for trainer in trainers]
        for trainer, batch in zip(trainers, batches, strict=True):
            assert torch.equal(batch[0], batches[0][0])
            trainer.step(batch)


def test_evaluation_uses_at_most_2000_fixed_rows() -> None:
    scenario = get_scenario("reg-lif")
    data = scenario.load()
    data = replace(data, train_x=data.train_x.repeat(2, 1), train_y=data.train_y.repeat(2, 1))
    sizes, loss = list[int](), scenario.loss

    def noted_loss(output: Tensor, target: Tensor) -> Tensor:
        sizes.append(len(target))
        return loss(output, target)

    scenario = replace(scenario, loss=noted_loss)
    first, second = (Trainer(scenario, data, "sgd", 1e-2, 0, 10).evaluate() for _ in range(2))
    assert sizes == [2000, 2000]
    assert first == second


class FakeTrainer:
    """Moves a fake clock: a step takes ``cost`` seconds, drawing a batch takes a hundred."""

    def __init__(self, name: str, cost: float, clock: list[float], calls: list[str]) -> None:
        self.name, self.cost, self.clock, self.calls = name, cost, clock, calls

    def draw(self) -> None:
        self.clock[0] += 100.0

    def step(self, batch: None) -> None:
        self.calls.append(self.name)
        self.clock[0] += self.cost * (1000 if len(self.calls) <= 4 else 1)  # slow while warming up


def test_steps_are_timed_in_rotation_without_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], list[str]()
    monkeypatch.setattr(time, "process_time", lambda: clock[0])
    trainers = {name: FakeTrainer(name, cost, clock, calls) for name, cost in (("a", 2.0), ("b", 3.0))}
    times = step_times(trainers, rounds=3, block_steps=2)  # type: ignore[arg-type]  # what step_times uses of a Trainer
    assert times == {"a": pytest.approx(2000.0), "b": pytest.approx(3000.0)}
    assert calls == ["a", "a", "b", "b"] * 4

    calls.clear()
    times = step_times(trainers, rounds=1, block_steps=2)  # type: ignore[arg-type]  # as above
    assert times == {"a": pytest.approx(2000.0), "b": pytest.approx(3000.0)}  # the first round is not counted


def test_one_thread_is_undone() -> None:
    threads = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == threads
    with pytest.raises(RuntimeError, match="planted"), one_thread():
        raise RuntimeError("planted")
    assert torch.get_num_threads() == threads


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    scenario = replace(get_scenario("reg-bos"), target_loss=0.9)
    settings = Settings(tuple(OPTIMIZERS), rates=2, seeds=2, steps=30)
    progress = Silence()
    found = compare(scenario, settings, progress)
    assert [result.optimizer for result in progress.results] == list(OPTIMIZERS)
    assert progress.done == planned_work(scenario, settings)
    assert progress.phases[-1] == "timing steps, in rotation"
    return found


def test_every_optimizer_gets_the_same(comparison: Comparison) -> None:
    for result in comparison.results:
        assert len(result.grid) == len(result.search) == (1 if result.optimizer in UNTUNED else 2)
        assert len(result.runs) == 2
        assert [run.seed for run in result.runs] == [0, 1]
        for run in (*result.search, *result.runs):
            assert [point.step for point in run.points] == list(range(0, 31, 3))


def test_rows_follow_from_the_runs(comparison: Comparison) -> None:
    by_name = {row.optimizer: row for row in comparison.rows()}
    assert by_name["sgd"].step_ratio == 1.0
    for result in comparison.results:
        row = by_name[result.optimizer]
        losses = [run.final_loss for run in result.runs]
        assert row.final_loss == pytest.approx(sum(losses) / 2)
        assert row.final_loss_sd == pytest.approx(abs(losses[0] - losses[1]) / math.sqrt(2))
        steps = [run.steps_to(0.9) for run in result.runs]
        reached = [step for step in steps if step is not None]
        assert row.reached == len(reached) > 0
        assert row.steps_to_target == pytest.approx(sum(reached) / len(reached))
        assert row.step_ms is not None
        assert row.steps_to_target is not None
        assert row.seconds_to_target == pytest.approx(row.steps_to_target * row.step_ms / 1e3)


def test_the_three_files(comparison: Comparison, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_report(comparison, out)
    assert sorted(entry.name for entry in out.iterdir()) == sorted(FILE_NAMES)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out"]
    picture = (out / "report.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert (int.from_bytes(picture[16:20], "big"), int.from_bytes(picture[20:24], "big")) == (1600, 700)

    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    keys = {(r["optimizer"], r["seed"], r["learning_rate"], r["step"]) for r in rows}
    runs = sum(len(result.grid) + 1 for result in comparison.results)  # a further seed
    assert len(rows) == len(keys) == runs * 11
    for row in rows:
        assert (row["seconds"] != "") == (row["chosen"] == "1")

    run = json.loads((out / "run.json").read_text())
    assert set(run["versions"]) >= {"python", "torch", "triton", "numpy", "triton-curv"}
    assert run["hardware"]["threads"] == 1
    assert run["seeds"] == [0, 1]
    assert run["grid"]["kfac"] == list(comparison.results[3].grid)
    assert "commit" in run
    assert [line["optimizer"] for line in run["summary"]] == list(OPTIMIZERS)


def test_a_failed_report_leaves_the_old_one(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(comparison, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(report, "run_record", lambda comparison: {"no": object()})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_report(comparison, tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_report_of_an_optimizer_that_failed(comparison: Comparison, tmp_path: Path) -> None:
    sgd, adamw, *others = comparison.results
    failed = Result(adamw.optimizer, adamw.grid, adamw.search, None, (), "adamw: every rate diverged")
    broken = replace(comparison, results=(sgd, failed, *others))
    write_report(broken, tmp_path / "out")
    assert broken.rows()[1].rate is None
    assert all(row["seconds"] == "" for row in tidy_rows(broken) if row["optimizer"] == "adamw")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["notes"] == ["adamw: every rate diverged"]


def test_bad_settings_are_named(tmp_path: Path) -> None:
    for settings, message in (
        (Settings(("sgd", "adagrad")), "got 'adagrad'"),
        (Settings(("sgd", "sgd")), "different optimizers, got sgd, sgd"),
        (Settings(()), "different optimizers, got none"),
        (Settings(("sgd",), rates=0), "rates of at least 1, got 0"),
        (Settings(("sgd",), seeds=-1), "seeds of at least 1, got -1"),
        (Settings(("sgd",), steps=0), "steps of at least 1, got 0"),
    ):
        with pytest.raises(SettingError, match=message):
            settings.check()
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match=r"holds other files \(mine.txt\)"):
        require_replaceable(tmp_path, FILE_NAMES)
    with pytest.raises(OutputError, match="found a file"):
        require_replaceable(tmp_path / "mine.txt", FILE_NAMES)


@pytest.mark.parametrize("name", ["digits-cnn", "reg-bos", "reg-lif"])
def test_every_optimizer_learns_at_its_default_rate(name: str) -> None:
    scenario = get_scenario(name)
    data = scenario.load()
    with one_thread():
        for optimizer in set(OPTIMIZERS) - set(CLOSURES):
            run = train_run(scenario, data, optimizer, scenario.learning_rate(optimizer), 0, scenario.budget // 2)
            assert run.final_loss < 0.5 * run.points[0].train_loss, optimizer


@pytest.mark.parametrize("optimizer", CLOSURES)
@pytest.mark.parametrize("name", ["reg-bos-fb", "reg-lif-fb"])
def test_optimizers_with_closures_learn_at_their_default_rate(name: str, optimizer: str) -> None:
    scenario = get_scenario(name)
    with one_thread():
        run = train_run(scenario, scenario.load(), optimizer, scenario.learning_rate(optimizer), 0, 30)
    assert run.final_loss < 0.5 * run.points[0].train_loss


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_is_learnt_by_first_and_second_derivatives(name: str) -> None:
    """On one small batch again and again, evaluated with the same random numbers."""
    scenario = get_scenario(name)
    data = scenario.load()
    data = replace(data, train_x=data.train_x[:16], train_y=data.train_y[:16])
    data = replace(data, val_x=data.val_x[:16], val_y=data.val_y[:16])
    for optimizer, steps in (("adamw", 6), ("sgn", 1)):
        run = train_run(replace(scenario, batch_size=16), data, optimizer, scenario.learning_rate(optimizer), 0, steps)
        if optimizer == "adamw" or not any(isinstance(m, nn.BatchNorm2d) for m in scenario.model().modules()):
            assert run.points[-1].train_loss < run.points[0].train_loss, optimizer
        assert math.isfinite(run.points[-1].metric)


def test_a_refused_step_is_a_diverged_run() -> None:
    scenario = get_scenario("reg-bos")
    run = train_run(
        replace(scenario, loss=lambda output, target: (output - target).exp().exp().exp().sum()),
        scenario.load(),
        "newton-cg",
        1.0,
        0,
        20,
    )
    assert run.diverged
