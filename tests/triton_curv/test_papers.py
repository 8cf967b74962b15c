"""The comparisons of papers: every optimizer its share of steps, four files, one figure."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from triton_curv.cli import main
from triton_curv.cli.compare import run_paper
from triton_curv.scenarios import SCENARIOS
from triton_curv.training import papers
from triton_curv.training.optimizers import CLOSURES, OPTIMIZERS
from triton_curv.training.papers import PAPERS, Paper, Task, planned_paper_work

TINY = Paper("tiny", "a paper", ("sgd", "newton-cg"), (Task("reg-lif-fb", steps=4), Task("reg-bos-fb", 2, factor=3)))


def test_papers_name_what_exists() -> None:
    for name, paper in PAPERS.items():
        assert name == paper.name
        assert name not in SCENARIOS
        assert set(paper.optimizers) <= set(OPTIMIZERS)
        assert {"sgd", "adamw"} < set(paper.optimizers)
        assert {task.scenario for task in paper.tasks} <= set(SCENARIOS)
        assert len({task.name for task in paper.tasks}) == len(paper.tasks)
    reiz = {"reg-lif", "reg-bos", "vae-mnist5k", "bnn-mnist5k", "resnet-transfer"}
    assert reiz <= {task.scenario for task in PAPERS["paper-newton-cg"].tasks}
    assert {"reg-bos", "sine10", "sine100"} <= {task.scenario for task in PAPERS["paper-sgn"].tasks}


def test_tables_figure_and_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run_paper(TINY, rates=1, seeds=1, out=out)
    shown = capsys.readouterr().out
    assert "reg-lif-fb, equal steps" in shown
    assert "reg-bos-fb, 3 x steps for first order" in shown
    assert sorted(path.name for path in out.iterdir()) == ["report.png", "results.csv", "run.json", "summary.csv"]
    with (out / "summary.csv").open() as file:
        summary = list(csv.DictReader(file))
    assert [(r["optimizer"], int(r["steps"])) for r in summary] == [
        ("sgd", 4),
        ("newton-cg", 4),
        ("sgd", 6),
        ("newton-cg", 2),
    ]
    for rows in (summary[:2], summary[2:]):
        lowest = min(rows, key=lambda row: float(row["final_loss"]))
        assert [row["lowest"] for row in rows] == [str(int(row is lowest)) for row in rows]
    for row in summary:
        assert float(row["seconds"]) == pytest.approx(int(row["steps"]) * float(row["step_ms"]) / 1e3)
    with (out / "results.csv").open() as file:
        results = list(csv.DictReader(file))
    last = {(r["task"], r["optimizer"]): int(r["step"]) for r in results}
    assert [last[r["task"], r["optimizer"]] for r in summary] == [4, 4, 6, 2]
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert [task["scenario"] for task in json.loads((out / "run.json").read_text())["tasks"]] == [
        "reg-lif-fb",
        "reg-bos-fb",
    ]


def test_planned_work_counts_the_longer_runs() -> None:
    one, three = (replace(TINY, tasks=(Task("reg-bos-fb", 5, factor=factor),)) for factor in (1, 3))
    first_order = [name for name in TINY.optimizers if name not in CLOSURES]
    longer = planned_paper_work(three, 2, 2) - planned_paper_work(one, 2, 2)
    assert longer == len(first_order) * (2 + 1) * 5 * 2


def test_a_paper_sets_its_own_optimizers_and_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(papers, "compare", lambda *arguments: pytest.fail("compared"))
    for option in (["--steps", "3"], ["--optimizers", "sgd"]):
        assert main(["compare", "paper-sgn", *option]) == 2
        assert "expected no --optimizers and --steps for paper-sgn" in capsys.readouterr().err
    assert main(["compare", "paper-sgn", "--rates", "0"]) == 2
    assert "rates of at least 1" in capsys.readouterr().err
