"""What went wrong and was survived: counted on the device, warned about once a kind, never waited for."""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from triton_curv.inverse import RUNGS

if TYPE_CHECKING:
    from triton_curv.blocks import Block, FactorStore

EVENTS: Mapping[str, str] = {
    "skipped_steps": "a step was skipped: gradients or their preconditioned form are not finite",
    "discarded_statistics": "statistics of a factor were dropped: they are not finite",
    "failed_inverses": "a factor could not be inverted: its previous inverse, more damping, or its diagonal serve",
    "rejected_steps": "a step was taken back: it raised the loss",
}


def health_of(
    blocks: Mapping[str, "Block"], store: "FactorStore", events: Tensor, damping_gain: float
) -> dict[str, dict[str, Any]]:
    """What `KFAC.health` returns."""
    report: dict[str, dict[str, Any]] = {}
    for name, block in blocks.items():
        rows = [store.rows(key) for key in block.keys.values()]
        report[name] = {
            "residual": max(float(store.residuals[r].max()) for r in rows),
            "failures": max(int(store.failures[r].max()) for r in rows),
            "rung": RUNGS[max(int(store.rungs[r].max()) for r in rows)],
            "ranks": {factor: form.rank for factor, form in block.forms().items()},
        }
    counts = dict(zip(EVENTS, events.tolist(), strict=True))
    report["optimizer"] = {**counts, "damping_gain": damping_gain}
    return report


class NumericalWarning(RuntimeWarning):
    """Training goes on, but something in it was not finite or not invertible; see `health()`."""


class HealthMonitor:
    """Warns once for each kind of event in `counts`, an int64 tensor on any device, in the order of `EVENTS`.

    A `quiet` one warns about nothing: all ranks count the same, and the first warns. A CPU tensor is read where it
    lies. From a GPU the counts are copied without waiting, and read by a later call once that copy has arrived.
    """

    def __init__(self, counts: Tensor, quiet: bool = False) -> None:
        self.counts = counts
        self.warned: set[str] = set(EVENTS) if quiet else set()
        self._copy: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def watch(self) -> None:
        """Look at the counts as far as that costs no wait; warn about kinds that are new."""
        if torch.compiler.is_compiling():
            return
        if self.counts.device.type == "cpu":
            self.warn(self.counts)
        elif self.counts.device.type == "cuda":
            if self._copy is None:
                self._copy = torch.zeros(self.counts.shape, dtype=self.counts.dtype, pin_memory=True)
                self._arrived = torch.cuda.Event()
            assert self._arrived is not None
            if torch.cuda.is_current_stream_capturing():
                return
            if self._arrived.query():
                self.warn(self._copy)
                self._copy.copy_(self.counts, non_blocking=True)
                self._arrived.record()

    def warn(self, counts: Tensor) -> None:
        """Warn about each kind that has been counted and not been warned about."""
        for (kind, text), count in zip(EVENTS.items(), counts.tolist(), strict=True):
            if count and kind not in self.warned:
                self.warned.add(kind)
                warnings.warn(f"KFAC: {text}; said once, health() counts", NumericalWarning, stacklevel=4)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_copy": None, "_arrived": None}
