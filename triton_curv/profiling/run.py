"""A scenario, or a script of the user's, under torch.profiler with the stage ranges on."""

import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from triton_curv import nvtx
from triton_curv.nvtx import Totals
from triton_curv.profiling.stages import StageTime
from triton_curv.profiling.torch_trace import read_trace
from triton_curv.scenarios import get_scenario
from triton_curv.training.trainer import Trainer

WARM_UP = 5


def profile_scenario(
    name: str, optimizer: str, steps: int, device: torch.device
) -> tuple[dict[str, StageTime], dict[str, Totals]]:
    """Seconds by stage over `steps` training steps after a warm-up, and the stages' costs."""
    scenario = get_scenario(name)
    trainer = Trainer(
        scenario,
        scenario.load(),
        optimizer,
        scenario.learning_rates.get(optimizer, 1e-3) / 10,
        seed=0,
        steps=steps + WARM_UP,
        device=device,
    )

    def train(count: int) -> None:
        for _ in range(count):
            trainer.step(trainer.draw())

    train(WARM_UP)
    return _profiled(lambda: train(steps), device)


def profile_script(path: Path, arguments: Sequence[str]) -> tuple[dict[str, StageTime], dict[str, Totals]]:
    """Seconds by stage while a script runs as `__main__` with `arguments`."""
    before = sys.argv
    sys.argv = [str(path), *arguments]
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return _profiled(lambda: runpy.run_path(str(path), run_name="__main__"), device)
    finally:
        sys.argv = before


def _profiled(run: Callable[[], object], device: torch.device) -> tuple[dict[str, StageTime], dict[str, Totals]]:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    on = nvtx.enabled()
    nvtx.enable()
    nvtx.reset_totals()
    try:
        with profile(activities=activities) as recorded:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
    finally:
        if not on:
            nvtx.disable()
    return read_trace(recorded), {str(name): total for name, total in nvtx.totals().items()}
