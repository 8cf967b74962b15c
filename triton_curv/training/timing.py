"""Milliseconds of one step, measured fairly: one thread, optimizers in rotation, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from triton_curv.training.trainer import Trainer

ROUNDS = 21
BLOCK_STEPS = 20
"""Steps of a block: whole refresh cycles of an optimizer that works harder every 5, 10 or 20 steps."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one CPU thread: a cost that does not depend on how small work is divided."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def step_times(
    trainers: Mapping[str, Trainer],
    rounds: int = ROUNDS,
    block_steps: int = BLOCK_STEPS,
    on_block: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Median over rounds of the mean step of a block, in ms of the process's CPU time.

    A round runs one block of ``block_steps`` steps of each trainer in turn, so that whatever else the machine
    does falls on all of them. A step is forward, backward, ``step()`` and ``zero_grad()``; drawing the batch
    is outside the clock. One more round, not counted, comes first.
    """
    blocks: dict[str, list[float]] = {name: [] for name in trainers}
    with one_thread():
        for _ in range(rounds + 1):
            for name, trainer in trainers.items():
                blocks[name].append(_block_time(trainer, block_steps) / block_steps * 1e3)
                on_block()
    return {name: statistics.median(times[1:]) for name, times in blocks.items()}


def _block_time(trainer: Trainer, steps: int) -> float:
    total = 0.0
    for _ in range(steps):
        batch = trainer.draw()
        start = time.process_time()
        trainer.step(batch)
        total += time.process_time() - start
    return total
