"""Memory for one dense factor at a time, kept: new pages take longer than what fills them."""

from torch import Tensor

WIDEST = 2048  # rows of the largest factor that memory is kept for


class Workspace:
    """(1, n, n) of whatever numbers, the same memory at each call, of the dtype and on the device of `like`."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._memory: Tensor | None = None

    def of(self, n: int) -> Tensor | None:
        """None for a factor that no memory is kept for."""
        if n > WIDEST:
            return None
        if self._memory is None or self._memory.numel() < n * n:
            self._memory = self._like.new_empty(n * n)
        return self._memory[: n * n].view(1, n, n)
