"""One run of one optimizer: epochs, checkpoints, Ctrl-C, and the files it leaves."""

from __future__ import annotations

import csv
import io
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from triton_curv.scenarios import get_scenario
from triton_curv.training.checkpoint import RunConfig, load_checkpoint, require_same_run, restore, save_checkpoint
from triton_curv.training.environment import commit, hardware, versions
from triton_curv.training.errors import DeviceError, OutputError, SettingError
from triton_curv.training.files import require_folder, write_atomically
from triton_curv.training.ranks import Ranks
from triton_curv.training.trainer import Trainer

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
CHECKPOINT_NAME = "checkpoint.pt"
WEIGHTS_NAME = "weights.pt"
METRICS_NAME = "metrics.csv"
RUN_NAME = "run.json"


@dataclass(frozen=True)
class TrainOutcome:
    """How a run ended: epochs wanted, steps done, whether by Ctrl-C, its checkpoint, an evaluation per epoch."""

    epochs: int
    step: int
    interrupted: bool
    checkpoint: Path
    history: list[dict[str, float]]


def get_device(name: str) -> torch.device:
    """``torch.device(name)``, checked to be usable.

    Raises:
        DeviceError: Where it is neither the CPU nor a CUDA device of this machine.

    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"expected a device such as cpu, cuda or cuda:1, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"expected the cpu or a cuda device, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"{name} is not available: torch sees {torch.cuda.device_count()} CUDA devices here")
    return device


def train(
    config: RunConfig,
    epochs: int | None,
    out: Path,
    device: str = "cpu",
    resume: Path | None = None,
    on_step: Callable[[int, int], None] = lambda step, total: None,
    on_epoch: Callable[[dict[str, float]], None] = lambda row: None,
    ranks: Ranks | None = None,
) -> TrainOutcome:
    """Train until the run has ``epochs`` epochs behind it; write into the folder ``out``.

    ``checkpoint.pt`` is replaced after every epoch and on Ctrl-C. A finished run adds ``weights.pt`` (the
    true weights), ``metrics.csv`` and ``run.json``. From ``resume`` the run continues bit for bit
    (on a GPU, as far as torch's own kernels there are deterministic).

    Args:
        config: The run; equal to the checkpoint's when resuming.
        epochs: Epochs in all; None: those of ``config.planned_steps``.
        out: Folder of the results, made if absent.
        device: As torch names it.
        resume: Checkpoint file to continue from.
        on_step: Called with (steps done, steps in all).
        on_epoch: Called with each row of the history.
        ranks: Processes that run this together; the first of them writes and is called.

    Raises:
        TrainingError: For a bad setting, device, checkpoint or folder.
        ScenarioError: Where the scenario is unknown or its data not installed.

    """
    scenario = get_scenario(config.scenario)
    if epochs is not None and epochs < 1:
        raise SettingError(f"expected at least 1 epoch, got {epochs}")
    if config.dtype not in DTYPES:
        raise SettingError(f"expected a dtype among {', '.join(DTYPES)}, got {config.dtype!r}")
    place = get_device(device)
    found = None
    if resume is not None:
        found = load_checkpoint(resume)
        require_same_run(resume, found.config, config)
    trainer = Trainer(
        scenario,
        scenario.load(),
        config.optimizer,
        config.lr,
        config.seed,
        config.planned_steps,
        batch_size=config.batch_size,
        device=place,
        dtype=DTYPES[config.dtype],
        ranks=ranks,
    )
    history: list[dict[str, float]] = []
    if resume is not None and found is not None:
        restore(resume, found, trainer)
        history = found.history
    checkpoint = out / CHECKPOINT_NAME

    def check_output() -> None:
        require_folder(out)
        if checkpoint.exists() and not (resume is not None and resume.samefile(checkpoint)):
            raise OutputError(
                f"{out} holds another run: continue it with --resume {checkpoint}, or choose another --out"
            )

    check_output() if ranks is None else ranks.on_first(check_output)
    first = ranks is None or ranks.first

    per_epoch = trainer.order.steps_per_epoch
    epochs = config.planned_steps // per_epoch if epochs is None else epochs
    total = epochs * per_epoch
    save_checkpoint(checkpoint, config, trainer, history)
    with _interrupt_flag() as interrupted:
        while trainer.step_count < total and not (interrupted() if ranks is None else ranks.any(interrupted())):
            trainer.step(trainer.draw())
            if first:
                on_step(trainer.step_count, total)
            if trainer.step_count % per_epoch == 0:
                evaluation = trainer.evaluate()
                row = {
                    "epoch": trainer.step_count // per_epoch,
                    "step": trainer.step_count,
                    **asdict(evaluation),
                }
                history.append(row)
                save_checkpoint(checkpoint, config, trainer, history)
                if first:
                    on_epoch(row)
        stopped = trainer.step_count < total
        if stopped:
            save_checkpoint(checkpoint, config, trainer, history)
        else:
            weights = trainer.true_weights()
            if first:
                _write_results(out, config, trainer, weights, history)
    return TrainOutcome(epochs, trainer.step_count, stopped, checkpoint, history)


def _write_results(
    out: Path, config: RunConfig, trainer: Trainer, weights: dict[str, Tensor], history: list[dict[str, float]]
) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, ["epoch", "step", "train_loss", "metric"])
    writer.writeheader()
    writer.writerows(history)
    run = {
        "config": asdict(config),
        "metric": trainer.scenario.metric.name,
        "result": history[-1] if history else None,
        "versions": versions(),
        "hardware": hardware(),
        "commit": commit(),
    }
    write_atomically(out / WEIGHTS_NAME, lambda file: torch.save(weights, file))
    write_atomically(out / METRICS_NAME, lambda file: file.write(table.getvalue().encode()))
    write_atomically(out / RUN_NAME, lambda file: file.write(json.dumps(run, indent=2).encode()))


@contextmanager
def _interrupt_flag() -> Iterator[Callable[[], bool]]:
    """The first SIGINT sets a flag that the caller asks for between steps; the second interrupts at once."""
    seen = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, before)
