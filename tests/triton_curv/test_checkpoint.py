"""Checkpoints: a resumed run equals an uninterrupted one bit for bit; files are whole or unchanged."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation

from triton_curv.scenarios import Data, Scenario, get_scenario
from triton_curv.scenarios.scenario import ACCURACY
from triton_curv.training.checkpoint import RunConfig, load_checkpoint, require_same_run, restore, save_checkpoint
from triton_curv.training.errors import CheckpointError, DeviceError, OutputError, SettingError
from triton_curv.training.files import replaced_folder, write_atomically
from triton_curv.training.optimizers import OPTIMIZERS
from triton_curv.training.train import train
from triton_curv.training.trainer import Trainer

STEPS = 40
SAVED_AT = 17  # in the middle of the third epoch of seven steps, and of every refresh interval


class Noise(nn.Module):
    """Multiplies by a draw of Python's and of NumPy's global generator, in training."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand())) if self.training else x


def noisy_net() -> nn.Module:
    """A net that needs every random state: dropout (torch), noise (Python, NumPy), and BatchNorm's buffers."""
    hidden = [nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3)]
    return nn.Sequential(nn.Conv2d(1, 3, 2), Noise(), *hidden, nn.Linear(8, 3))


def noisy_data() -> Data:
    x = torch.randn(64, 1, 3, 3, generator=torch.Generator().manual_seed(5))
    y = (x.sum(dim=(1, 2, 3)) > 0).long() + (x[:, 0, 0, 0] > 1).long()
    return Data(x, y, x[:8], y[:8])


NOISY = Scenario(
    name="noisy",
    summary="",
    train_rows=64,
    load=noisy_data,
    model=noisy_net,
    loss=F.cross_entropy,
    metric=ACCURACY,
    batch_size=9,
    budget=STEPS,
    evaluate_every=4,
    target_loss=0.1,
    learning_rates=dict.fromkeys(OPTIMIZERS, 1e-2),
)


def noisy_config(optimizer: str) -> RunConfig:
    return RunConfig("noisy", optimizer, 1e-2, NOISY.batch_size, 3, "float32", STEPS)


def new_trainer(optimizer: str, scenario: Scenario = NOISY) -> Trainer:
    random.seed(11)
    np.random.seed(12)
    return Trainer(scenario, scenario.load(), optimizer, 1e-2, 3, STEPS)


def continue_to(trainer: Trainer, steps: int) -> list[float]:
    losses = []
    while trainer.step_count < steps:
        losses.append(float(trainer.step(trainer.draw())))
        if trainer.step_count % 7 == 0:
            losses.append(trainer.evaluate().train_loss)
    return losses


def assert_equal(found: Any, expected: Any, where: str = "") -> None:
    """Equality of nested state without any tolerance."""
    assert type(found) is type(expected), where
    if isinstance(found, Tensor):
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), where
    elif isinstance(found, dict):
        assert found.keys() == expected.keys(), where
        for key in found:
            assert_equal(found[key], expected[key], f"{where}.{key}")
    elif isinstance(found, (list, tuple)):
        assert len(found) == len(expected), where
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_equal(a, b, f"{where}[{index}]")
    else:
        assert found == expected, where


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_in_mid_epoch_is_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    whole = new_trainer(optimizer)
    continue_to(whole, SAVED_AT)
    save_checkpoint(tmp_path / "c.pt", noisy_config(optimizer), whole, [{"epoch": 2.0}])
    expected = continue_to(whole, STEPS)

    torch.manual_seed(99)
    resumed = new_trainer(optimizer)
    checkpoint = load_checkpoint(tmp_path / "c.pt")
    restore(tmp_path / "c.pt", checkpoint, resumed)
    assert checkpoint.history == [{"epoch": 2.0}]
    assert resumed.step_count == SAVED_AT
    assert continue_to(resumed, STEPS) == expected
    assert_equal(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_saving_and_evaluating_disturb_nothing(tmp_path: Path, optimizer: str) -> None:
    plain = new_trainer(optimizer)
    while plain.step_count < STEPS:
        plain.step(plain.draw())
    watched = new_trainer(optimizer)
    while watched.step_count < STEPS:
        watched.step(watched.draw())
        watched.evaluate()
        watched.true_weights()
        save_checkpoint(tmp_path / "c.pt", noisy_config(optimizer), watched, [])
    assert_equal(watched.state_dict(), plain.state_dict())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_train_command_resumes_bit_for_bit(tmp_path: Path, optimizer: str, dtype: str) -> None:
    config = RunConfig("reg-bos", optimizer, 1e-2, 64, 1, dtype, 24)
    train(config, 4, tmp_path / "whole")
    train(config, 2, tmp_path / "half")
    train(config, 4, tmp_path / "rest", resume=tmp_path / "half" / "checkpoint.pt")
    whole, rest = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "rest"))
    assert_equal(rest.trainer, whole.trainer)
    assert rest.history == whole.history
    assert len(whole.history) == 4
    for name in ("weights.pt", "metrics.csv", "run.json"):
        assert (tmp_path / "rest" / name).is_file()
    assert (tmp_path / "rest" / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()


def test_weights_file_holds_the_evaluated_weights(tmp_path: Path) -> None:
    config = RunConfig("reg-bos", "neumann", 3e-2, 32, 0, "float32", 24)
    outcome = train(config, 2, tmp_path)
    scenario = get_scenario("reg-bos")
    model, data = scenario.model(), scenario.load()
    model.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    with torch.no_grad():
        loss = float(scenario.loss(model(data.train_x), data.train_y))
    assert loss == pytest.approx(outcome.history[-1]["train_loss"], rel=1e-5)
    displaced = load_checkpoint(tmp_path / "checkpoint.pt").trainer["model"]
    assert not torch.equal(displaced["0.weight"], model.state_dict()["0.weight"])


def test_failed_write_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, trainer = tmp_path / "c.pt", new_trainer("sgd")
    save_checkpoint(path, noisy_config("sgd"), trainer, [])
    continue_to(trainer, 5)

    def disk_full(content: object, file: IO[bytes]) -> None:
        file.write(b"half of a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, noisy_config("sgd"), trainer, [])
    assert load_checkpoint(path).trainer["step"] == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.pt"]


def test_killed_write_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, noisy_config("sgd"), new_trainer("sgd"), [])
    script = """
        import os, sys
        from pathlib import Path
        from triton_curv.training.files import write_atomically
        def write(file):
            file.write(b"half of a checkpoint")
            file.flush()
            os._exit(9)
        write_atomically(Path(sys.argv[1]), write)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(path)], env=child_environment())
    assert done.returncode == 9
    assert load_checkpoint(path).trainer["step"] == 0


def child_environment() -> dict[str, str]:
    """The environment for a child process that imports what this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def test_written_file_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    sync, rename = os.fsync, os.replace

    def noted_sync(handle: int) -> None:
        calls.append("fsync")
        sync(handle)

    def noted_rename(source: Path, target: Path) -> None:
        calls.append("replace")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_rename)
    write_atomically(tmp_path / "f", lambda file: file.write(b"new"))
    assert (tmp_path / "f").read_bytes() == b"new"
    assert calls == ["fsync", "replace", "fsync"]  # the file, then its name, then the folder


def test_failed_folder_is_not_seen(tmp_path: Path) -> None:
    def fill(text: str, fail: bool) -> None:
        with replaced_folder(tmp_path / "out") as folder:
            (folder / "a.txt").write_text(text)
            if fail:
                raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        fill("first", fail=True)
    assert list(tmp_path.iterdir()) == []
    fill("second", fail=False)
    with pytest.raises(RuntimeError, match="planted"):
        fill("third", fail=True)
    assert (tmp_path / "out" / "a.txt").read_text() == "second"
    fill("fourth", fail=False)
    assert (tmp_path / "out" / "a.txt").read_text() == "fourth"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_failed_exchange_of_folders_brings_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with replaced_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("old")
    rename, calls = os.replace, list[Path]()

    def second_rename_fails(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("planted")
        rename(source, target)

    monkeypatch.setattr(os, "replace", second_rename_fails)
    with pytest.raises(OSError, match="planted"), replaced_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("new")
    assert (tmp_path / "out" / "a.txt").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "changes",
    [
        {"scenario": "reg-bos"},
        {"optimizer": "adamw"},
        {"lr": 0.5},
        {"batch_size": 8},
        {"seed": 4},
        {"dtype": "float64"},
    ],
)
def test_checkpoint_of_another_run_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    save_checkpoint(tmp_path / "c.pt", noisy_config("sgd"), new_trainer("sgd"), [])
    (name,) = changes
    with pytest.raises(CheckpointError, match=f"of another run: expected {name}"):
        require_same_run(
            tmp_path / "c.pt",
            load_checkpoint(tmp_path / "c.pt").config,
            replace(noisy_config("sgd"), **changes),
        )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_checkpoint_of_another_model_is_refused(tmp_path: Path, optimizer: str) -> None:
    save_checkpoint(tmp_path / "c.pt", noisy_config(optimizer), new_trainer(optimizer), [])
    wider = replace(NOISY, model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 3)))
    with pytest.raises(CheckpointError, match="of another model"):
        restore(tmp_path / "c.pt", load_checkpoint(tmp_path / "c.pt"), new_trainer(optimizer, wider))


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.target),))


def test_no_checkpoint_is_named_and_runs_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found none"):
        load_checkpoint(tmp_path / "absent.pt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no checkpoint of"):
        load_checkpoint(tmp_path / "other.pt")
    save_checkpoint(tmp_path / "c.pt", noisy_config("sgd"), new_trainer("sgd"), [])
    (tmp_path / "short.pt").write_bytes((tmp_path / "c.pt").read_bytes()[:900])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(tmp_path / "short.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(tmp_path / "text.pt")
    target = tmp_path / "owned"
    torch.save({"format": Hostile(target)}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"format": Hostile(target)}, protocol=2))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(tmp_path / name)
    assert not target.exists()


def test_bad_settings_are_named(tmp_path: Path) -> None:
    config = RunConfig("reg-bos", "sgd", 1e-2, 32, 0, "float32", 12)
    changes: dict[str, Any]
    for changes, message in (
        ({"lr": -1.0}, "positive learning rate, got -1.0"),
        ({"lr": float("nan")}, "positive learning rate, got nan"),
        ({"batch_size": 0}, "batch size from 1 to 404"),
        ({"batch_size": 405}, "batch size from 1 to 404"),
        ({"seed": -1}, "seed from 0"),
        ({"dtype": "int8"}, "dtype among float32, float64, bfloat16"),
        (
            {"optimizer": "adagrad"},
            "optimizer among sgd, adamw, neumann, kfac, .*, got 'adagrad'",
        ),
    ):
        with pytest.raises(SettingError, match=message):
            train(replace(config, **changes), 1, tmp_path / "out")
    with pytest.raises(SettingError, match="at least 1 epoch"):
        train(config, 0, tmp_path / "out")
    for device, message in (("gpu", "such as cpu, cuda"), ("meta", "the cpu or a cuda"), ("cuda:99", "not available")):
        with pytest.raises(DeviceError, match=message):
            train(config, 1, tmp_path / "out", device=device)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write into the folder"):
        train(config, 1, tmp_path / "file" / "out")
    train(config, 1, tmp_path / "out")
    with pytest.raises(OutputError, match="holds another run: continue it with --resume"):
        train(config, 1, tmp_path / "out")
