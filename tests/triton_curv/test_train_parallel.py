"""`triton-curv train --parallel` under torchrun: what it prints, and that a run survives the death of a rank."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.killed_rank import run_command
from tests.support.processes import free_port, light_processes
from triton_curv.cli import BAD_INPUT, main

TRAIN = ["train", "digits-cnn", "--optimizer", "kfac", "--epochs", "2", "--batch-size", "128"]
LIMIT_S = 240  # of a whole run, after which it counts as hung


def as_ranks(folder: Path, world: int, arguments: list[str]) -> list[str]:
    """The command on `world` ranks, with the environment that torchrun gives them: what each printed."""
    context = light_processes()
    port = free_port()
    ranks = [
        context.Process(target=run_command, args=(rank, world, port, str(folder), arguments)) for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(LIMIT_S)
        if process.is_alive():
            process.kill()
    printed = [(folder / f"{rank}.txt").read_text() for rank in range(world)]
    assert [process.exitcode for process in ranks] == [0] * world, printed
    return printed


def results(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / "weights.pt", weights_only=True)
    return found


def test_a_run_that_loses_a_rank_restarts_and_reaches_the_same_result(tmp_path: Path) -> None:
    whole, broken, marker = tmp_path / "whole", tmp_path / "broken", tmp_path / "died"
    first, *others = as_ranks(tmp_path, 2, [*TRAIN, "--parallel", "ddp", "--out", str(whole)])
    assert first.count("epoch   1") == 1
    assert not any(others), "rank 0 alone prints"

    program = [str(Path(__file__).parents[1] / "support" / "killed_rank.py"), str(marker), *TRAIN]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    run = subprocess.run(
        [*launcher, *program, "--parallel", "ddp", "--out", str(broken), "--timeout", "100"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert marker.exists()
    assert run.stdout.count("epoch   1") == 1, "it went on from the checkpoint of the first epoch"
    for name, weight in results(whole).items():
        assert torch.equal(weight, results(broken)[name]), name


def test_fsdp_trains_and_resumes_what_ddp_began(tmp_path: Path) -> None:
    as_ranks(tmp_path, 2, [*TRAIN, "--parallel", "ddp", "--epochs", "1", "--out", str(tmp_path / "ddp1")])
    resumed = ["train", "digits-cnn", "--parallel", "fsdp", "--epochs", "2", "--resume", str(tmp_path / "ddp1")]
    as_ranks(tmp_path, 4, [*resumed, "--out", str(tmp_path / "fsdp4")])
    assert set(results(tmp_path / "fsdp4")) == set(results(tmp_path / "ddp1"))


def test_parallel_without_a_launcher_is_an_error_that_says_how(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main([*TRAIN, "--parallel", "ddp"]) == BAD_INPUT
    assert "torchrun --nproc-per-node N -m triton_curv train" in capsys.readouterr().err
    assert main([*TRAIN, "--parallel", "tp"]) == BAD_INPUT
    assert "expected --parallel to be ddp or fsdp, got 'tp'" in capsys.readouterr().err
