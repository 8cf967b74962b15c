"""``triton-curv train``: options to a run, a progress bar, a table of epochs, the exit code."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from triton_curv.cli import BAD_INPUT, INTERRUPTED
from triton_curv.errors import TritonCurvError
from triton_curv.scenarios import Scenario, get_scenario
from triton_curv.training.batches import steps_per_epoch
from triton_curv.training.checkpoint import RunConfig, load_checkpoint
from triton_curv.training.optimizers import get_optimizer
from triton_curv.training.ranks import Ranks
from triton_curv.training.train import CHECKPOINT_NAME, METRICS_NAME, RUN_NAME, WEIGHTS_NAME, train


@dataclass(frozen=True)
class TrainOptions:
    """The options as given; None where one was left out."""

    scenario: str
    optimizer: str | None
    lr: float | None
    epochs: int | None
    batch_size: int | None
    seed: int | None
    device: str
    dtype: str | None
    out: Path | None
    resume: Path | None
    parallel: str | None = None
    timeout: float = 600.0


def run_train(options: TrainOptions) -> int:
    """Train as the options say, alone or with the ranks that torchrun started; returns 0, or 130 after Ctrl-C."""
    if options.parallel is None:
        return _run(options, None)
    from triton_curv.training.ranks import joined

    wait = timedelta(seconds=options.timeout)
    with joined(options.parallel, options.optimizer or "kfac", options.device, wait) as ranks:
        try:
            return _run(options, ranks)
        except TritonCurvError:
            if ranks.first:
                raise
            return BAD_INPUT  # all ranks fail alike, the first says why


def _run(options: TrainOptions, ranks: Ranks | None) -> int:
    scenario = get_scenario(options.scenario)
    if ranks is not None:
        options = _restarted(options)
    if options.resume is None:
        resume, config = None, _new_config(options, scenario)
        out = _folder(options, config)
    else:
        resume = options.resume / CHECKPOINT_NAME if options.resume.is_dir() else options.resume
        config, out = _resumed_config(options, resume), options.out or resume.parent

    console = Console(quiet=ranks is not None and not ranks.first)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
    task = bar.add_task(f"{config.scenario}  {config.optimizer}  lr {config.lr:g}")

    def show_step(step: int, total: int) -> None:
        bar.start()  # not before the first step: what is wrong with the request is known by then
        bar.update(task, completed=step, total=total)

    def show_epoch(row: dict[str, float]) -> None:
        numbers = f"train loss {row['train_loss']:.4g}  {scenario.metric.name} {row['metric']:.4g}"
        bar.console.print(f"epoch {row['epoch']:>3.0f}  step {row['step']:>5.0f}  {numbers}", highlight=False)

    try:
        outcome = train(
            config,
            options.epochs,
            out,
            device=options.device if ranks is None else str(ranks.device),
            ranks=ranks,
            resume=resume,
            on_step=show_step,
            on_epoch=show_epoch,
        )
    finally:
        if bar.live.is_started:
            bar.stop()
    if outcome.interrupted:
        command = f"triton-curv train {config.scenario} --epochs {outcome.epochs} --resume {outcome.checkpoint}"
        if ranks is None or ranks.first:
            print(f"stopped at step {outcome.step}; continue with: {command}", file=sys.stderr)
        return INTERRUPTED
    console.print(
        f"{out}: {CHECKPOINT_NAME}, {WEIGHTS_NAME}, {METRICS_NAME}, {RUN_NAME}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _restarted(options: TrainOptions) -> TrainOptions:
    """After a restart by torchrun: continue from the last checkpoint, if there is one."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0 or options.resume is not None:
        return options
    config = _new_config(options, get_scenario(options.scenario))
    checkpoint = _folder(options, config) / CHECKPOINT_NAME
    return replace(options, resume=checkpoint) if checkpoint.exists() else options


def _folder(options: TrainOptions, config: RunConfig) -> Path:
    return options.out or Path("runs") / f"{config.scenario}-{config.optimizer}-{config.seed}"


def _new_config(options: TrainOptions, scenario: Scenario) -> RunConfig:
    optimizer = options.optimizer or "kfac"
    get_optimizer(optimizer)
    batch_size = scenario.batch_size if options.batch_size is None else options.batch_size
    per_epoch = steps_per_epoch(scenario.train_rows, batch_size)
    steps = scenario.budget if options.epochs is None else options.epochs * per_epoch
    return RunConfig(
        scenario=options.scenario,
        optimizer=optimizer,
        lr=scenario.learning_rate(optimizer) if options.lr is None else options.lr,
        batch_size=batch_size,
        seed=options.seed or 0,
        dtype=options.dtype or "float32",
        planned_steps=max(1, math.ceil(steps / per_epoch)) * per_epoch,
    )


def _resumed_config(options: TrainOptions, resume: Path) -> RunConfig:
    """The checkpoint's configuration, with the options given put over it: a difference is an error later."""
    found = load_checkpoint(resume).config
    return RunConfig(
        scenario=options.scenario,
        optimizer=found.optimizer if options.optimizer is None else options.optimizer,
        lr=found.lr if options.lr is None else options.lr,
        batch_size=found.batch_size if options.batch_size is None else options.batch_size,
        seed=found.seed if options.seed is None else options.seed,
        dtype=found.dtype if options.dtype is None else options.dtype,
        planned_steps=found.planned_steps,
    )
