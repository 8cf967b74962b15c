"""Checkpoints that continue a run bit for bit, written atomically and read without running pickled code."""

from __future__ import annotations

import pickle
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from triton_curv.training.environment import versions
from triton_curv.training.errors import CheckpointError
from triton_curv.training.files import write_atomically
from triton_curv.training.trainer import Trainer

FORMAT = "triton_curv checkpoint 1"


@dataclass(frozen=True)
class RunConfig:
    """What makes a run the run it is; a checkpoint continues only a run of equal configuration."""

    scenario: str
    optimizer: str
    lr: float
    batch_size: int
    seed: int
    dtype: str
    planned_steps: int


@dataclass(frozen=True)
class Checkpoint:
    """A run's configuration, the trainer's state, random states, and the evaluations so far."""

    config: RunConfig
    trainer: dict[str, Any]
    random: dict[str, Any]
    history: list[dict[str, float]]


def random_state() -> dict[str, Any]:
    """States of the global generators of torch (each device), Python and NumPy, as tensors and numbers."""
    numpy_state: Any = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": {
            **numpy_state,
            "state": {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()},
        },
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set what ``random_state`` returned; states of more GPUs than this machine has are left out."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, cuda_state in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(cuda_state, device)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = state["numpy"]
    key = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})


def save_checkpoint(path: Path, config: RunConfig, trainer: Trainer, history: list[dict[str, float]]) -> None:
    """Write the run to ``path``; a failure or a kill at any moment leaves the previous checkpoint.

    On several ranks all call it, and the first writes.
    """
    content = {
        "format": FORMAT,
        "versions": versions(),
        "config": asdict(config),
        "trainer": trainer.state_dict(),
        "random": random_state(),
        "history": history,
    }
    if trainer.ranks is None or trainer.ranks.first:
        write_atomically(path, lambda file: torch.save(content, file))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, on the CPU, with ``torch.load(weights_only=True)``.

    Raises:
        CheckpointError: Where the file is missing, damaged, or no checkpoint of this library.

    """
    if not path.is_file():
        raise CheckpointError(f"expected a checkpoint at {path}, found none")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: damaged, or another format") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of `triton-curv train`")
    config = RunConfig(**content["config"])
    return Checkpoint(config, content["trainer"], content["random"], content["history"])


def require_same_run(path: Path, found: RunConfig, expected: RunConfig) -> None:
    """Check that the checkpoint at ``path`` is of the expected run.

    Raises:
        CheckpointError: Where its configuration differs.

    """
    for name, value in asdict(expected).items():
        if getattr(found, name) != value:
            raise CheckpointError(f"{path} is of another run: expected {name} {value}, found {getattr(found, name)}")


def restore(path: Path, checkpoint: Checkpoint, trainer: Trainer) -> None:
    """Put a checkpoint read from ``path`` into a fresh trainer and the global generators.

    Raises:
        CheckpointError: Where the checkpoint is of another model.

    """
    try:
        trainer.load_state_dict(checkpoint.trainer)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is of another model: {' '.join(str(error).split())[:200]}") from error
    set_random_state(checkpoint.random)
