"""The command line: exit codes, one clear line for bad input, Ctrl-C, and the README's example."""

from __future__ import annotations

import csv
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from triton_curv.cli import main
from triton_curv.scenarios import SCENARIOS
from triton_curv.training.checkpoint import RunConfig, load_checkpoint
from triton_curv.training.step_bench import NAMES
from triton_curv.training.train import train

ROOT = Path(__file__).parents[2]
TINY = ["--optimizers", "sgd,kfac", "--rates", "2", "--seeds", "2", "--steps", "6"]


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("train", "compare", "scenarios"))
    assert main([]) == 0
    assert capsys.readouterr().out == shown
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("optimizer", "lr", "epochs", "batch-size", "seed", "device", "dtype", "out", "resume"):
        assert f"--{option}" in shown


def test_scenarios_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scenarios"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in SCENARIOS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train mnist", "expected a scenario among digits-cnn, reg-bos, "),
        ("compare mnist", "expected a scenario among"),
        (
            "train reg-bos --optimizer adagrad",
            "expected an optimizer among sgd, adamw, neumann, kfac, newton-cg",
        ),
        ("compare reg-bos --optimizers sgd,adagrad", "expected an optimizer among"),
        ("train reg-bos --optimizer sgd --lr -0.1", "expected a positive learning rate, got -0.1"),
        ("train reg-bos --optimizer sgd --lr fast", "Invalid value for '--lr'"),
        ("train reg-bos --optimizer sgd --batch-size 0", "expected a batch size from 1 to 404"),
        ("train reg-bos --optimizer sgd --epochs 0", "expected at least 1 epoch, got 0"),
        ("train reg-bos --optimizer sgd --device cuda:99", "cuda:99 is not available"),
        ("train reg-bos --optimizer sgd --dtype int8", "expected a dtype among"),
        ("train reg-bos --optimizer sgd --seed -1", "expected a seed from 0"),
        ("train reg-bos --resume absent.pt", "expected a checkpoint at absent.pt, found none"),
        ("train reg-bos --resume notes.txt", "cannot be read as a checkpoint"),
        ("train reg-bos --optimizer sgd --out notes.txt/out", "cannot write into the folder notes.txt/out"),
        ("compare reg-bos --out notes.txt", "expected a folder at notes.txt, found a file"),
        ("compare reg-bos --out .", "holds other files"),
        ("compare reg-bos --rates 0", "expected rates of at least 1, got 0"),
        ("compare reg-bos --steps -1", "expected steps of at least 1, got -1"),
        ("train", "Missing argument 'SCENARIO'"),
        ("train reg-bos --speed 3", "No such option: --speed"),
        ("fly", "No such command 'fly'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("no checkpoint")
    assert main(arguments.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert shown.err.startswith("triton-curv: ")
    assert shown.err.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "runs"] == ["notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("explain digits-cnn --html {file}/page.html", "cannot write into the folder"),
        ("explain digits-cnn --html {folder}", "cannot write the page"),
        ("profile digits-cnn --steps 1 --out {file}/profile", "cannot write into the folder"),
        ("profile digits-cnn --steps 1 --out {folder}", "holds other files (mine.txt)"),
        ("profile digits-cnn --steps 0 --out {folder}/profile", "Invalid value for '--steps'"),
        ("profile {folder}/no.py --out {folder}/profile", "expected a script to profile"),
        ("bench step reg-bos --optimizers sgd --eager --out {file}/bench", "cannot write into the folder"),
    ],
)
def test_places_that_cannot_be_written_are_named_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("kept")
    assert main(arguments.format(folder=tmp_path, file=mine).split()) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert mine.read_text() == "kept"


def test_checkpoint_of_another_run_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    assert main(["train", "reg-bos", "--optimizer", "sgd", "--epochs", "1", "--out", out]) == 0
    capsys.readouterr()
    for arguments, message in (
        (["train", "reg-lif", "--resume", out], "expected scenario reg-lif, found reg-bos"),
        (["train", "reg-bos", "--optimizer", "kfac", "--resume", out], "expected optimizer kfac, found sgd"),
        (["train", "reg-bos", "--lr", "0.5", "--resume", out], "expected lr 0.5, found 0.03"),
        (["train", "reg-bos", "--optimizer", "sgd", "--out", out], "holds another run"),
    ):
        assert main(arguments) == 2
        shown = capsys.readouterr()
        assert message in shown.err
        assert shown.err.count("\n") == 1


@pytest.mark.parametrize("name", ["typer", "rich", "matplotlib", "jinja2"])
def test_missing_cli_packages_are_named_before_a_run(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["scenarios"]) == 2
    shown = capsys.readouterr()
    assert f'the package {name}: pip install "triton-curv[cli]"' in shown.err
    assert not shown.out


def test_missing_data_package_is_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    assert main(["train", "reg-bos", "--optimizer", "sgd", "--out", str(tmp_path / "out")]) == 2
    assert 'mlxtend: pip install "triton-curv[data]"' in capsys.readouterr().err


def test_train_then_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", "reg-bos", "--optimizer", "adamw", "--epochs", "2", "--seed", "3", "--out", str(out)]) == 0
    assert "epoch   2  step    24" in capsys.readouterr().out
    assert main(["train", "reg-bos", "--epochs", "3", "--resume", str(out)]) == 0
    assert "epoch   3  step    36" in capsys.readouterr().out
    checkpoint = load_checkpoint(out / "checkpoint.pt")
    assert (checkpoint.config.optimizer, checkpoint.config.seed, checkpoint.trainer["step"]) == ("adamw", 3, 36)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "metrics.csv", "run.json", "weights.pt"]


def test_compare_prints_the_table_and_leaves_three_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    for _ in range(2):  # the second replaces the first
        assert main(["compare", "reg-bos", *TINY, "--out", str(out)]) == 0
        shown = capsys.readouterr().out
        for words in ("optimizer", "best lr", "ms/step", "vs SGD", "sgd", "kfac", "(0/2)", "report.png"):
            assert words in shown
        assert sorted(path.name for path in out.iterdir()) == ["report.png", "results.csv", "run.json"]


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("optimizer", ["sgd", "kfac"])
def test_ctrl_c_leaves_a_checkpoint_that_resumes_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    out = tmp_path / "run"
    command = f"train reg-lif --optimizer {optimizer} --lr 0.001 --batch-size 8 --epochs 100000 --out {out}"
    environment = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    process = subprocess.Popen(
        [sys.executable, "-m", "triton_curv.cli", *command.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    path = out / "checkpoint.pt"
    wait_for(lambda: path.exists() and load_checkpoint(path).trainer["step"] > 0, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    said = re.fullmatch(r"stopped at step (\d+); continue with: .* reg-lif .*\ntriton-curv: interrupted\n", errors)
    assert said is not None, errors
    checkpoint = load_checkpoint(path)
    assert checkpoint.trainer["step"] == int(said[1])
    assert sorted(entry.name for entry in out.iterdir()) == ["checkpoint.pt"]

    config = checkpoint.config
    epochs = checkpoint.trainer["step"] // 170 + 2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(config, epochs, out, resume=path)
        train(RunConfig(**vars(config)), epochs, tmp_path / "whole")
    finally:
        torch.set_num_threads(threads)
    resumed, whole = (torch.load(folder / "weights.pt") for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert load_checkpoint(path).history == load_checkpoint(tmp_path / "whole" / "checkpoint.pt").history


def test_ctrl_c_in_a_comparison_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    environment = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "triton_curv.cli", "compare", "reg-bos", "--rates", "1", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # a test run started in the background (`pytest &`) has SIGINT ignored, and its children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("sgd")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "triton-curv: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_importing_the_command_line_loads_no_data_or_plot_package() -> None:
    script = "import sys, triton_curv.cli.app; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"},
    )
    loaded = set(done.stdout.split())
    assert not loaded & {"matplotlib", "sklearn", "scipy", "pandas", "mlxtend", "rich.progress"}


def test_the_example_in_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 100
    (example,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert len(example.strip().splitlines()) <= 14
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["loss"].item() < 0.1
    assert capsys.readouterr().out


def test_bench_step_keeps_rows_of_other_scenarios(tmp_path: Path) -> None:
    """Every optimizer, eagerly; a table, and a picture for each scenario."""
    for scenario in ("digits-cnn", "reg-bos"):
        arguments = ["bench", "step", scenario, "--eager", "--rounds", "1", "--block", "1", "--out", str(tmp_path)]
        assert main(arguments) == 0
        assert (tmp_path / f"steps-{scenario}.png").stat().st_size > 0
    with (tmp_path / "steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(NAMES)
    assert all(float(row["step_ms"]) > 0 and row["cpu"] for row in rows)
