"""What a GradScaler does between steps: it leaves out steps whose gradients overflow."""

import torch


class LeftOut:
    """Notices that a GradScaler has left out a step: its scale was updated, and no step was taken.

    Reads no value: `GradScaler.update` writes to its scale in place, and a tensor counts writes.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        self._scaler = scaler
        self._seen: int | None = None

    def note_step(self) -> None:
        """A step is taken."""
        self._seen = None

    def seen(self) -> bool:
        """Whether a step was left out since the last call."""
        scale = getattr(self._scaler, "_scale", None)  # None before its first use, and of one that is disabled
        writes = 0 if scale is None else int(scale._version)
        before, self._seen = self._seen, writes
        return before is not None and writes != before
