"""Layers take turns: at which step of an interval the statistics and inverses of each are renewed."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from triton_curv.optimizers.kfac_options import KFACOptions

Compiled = Literal["", "model", "step"]  # what torch.compile has been seen to trace; "step" includes the model
PERIODS = {"fold_from": 0, "inverse_from": 0, "compiled": ""}  # saved with the first parameter group


def parts_of(work: Sequence[float], most: int) -> list[int]:
    """The part, counted from 0, that each layer belongs to: at most `most` parts of about equal work.

    There are ceil(total / heaviest) parts if that is fewer, because more of them would not make the longest shorter.
    Heaviest layer first, each to the part with the least work: no part has more than
    total / parts + (1 - 1 / parts) heaviest (Graham 1969, longest processing time first).
    """
    heaviest = max(work, default=0.0)
    count = max(1, min(most, math.ceil(sum(work) / heaviest) if heaviest > 0 else 1))
    parts, loads = [0] * len(work), [0.0] * count
    for layer in sorted(range(len(work)), key=lambda i: -work[i]):
        parts[layer] = part = loads.index(min(loads))
        loads[part] += work[layer]
    return parts


def turns_of(work: Sequence[float], steps: int) -> list[int]:
    """The step of an interval, 0, ..., steps - 1, at which each layer has its turn: parts at even distances."""
    parts = parts_of(work, steps)
    count = max(parts, default=0) + 1
    return [part * steps // count for part in parts]


class Turns:
    """Whose turn it is, for `refresh_budget="even"`; None as an answer stands for all layers at the interval's start.

    `clock` holds "next_fold" and "next_inverse", where the next intervals start, and `PERIODS`, where these ones did.
    `work` (blocks,) is what statistics of each block cost, 0 until they are known, and `inversions` what its inverses
    do. With one schedule for both, a block's inverses have their turn at the step of its statistics.
    """

    def __init__(
        self, clock: dict[str, Any], options: KFACOptions, work: Tensor, inversions: Sequence[float], graphs: bool
    ) -> None:
        self.clock = clock
        self.options = options
        self.work = work
        self.inversions = list(inversions)
        self.wanted = options.refresh_budget == "even"
        self._graphs = graphs  # regions are compiled
        self._known: list[float] | None = None
        self._turns: dict[tuple[str, int], list[int]] = {}

    def forget(self) -> None:
        """`work` may have changed."""
        self._known = None
        self._turns = {}

    @property
    def known(self) -> bool:
        """Whether it is known what statistics cost."""
        if self._known is None:
            self._known = self.work.tolist()
        return any(self._known)

    @property
    def of_inverses(self) -> bool:
        """Whether inverses take turns."""
        return self.wanted and not self._graphs and self.clock["compiled"] != "step"

    @property
    def of_statistics(self) -> bool:
        """Whether statistics take turns."""
        plain = not self.clock["compiled"] and self.options.fisher == "empirical"
        return self.of_inverses and plain and self.known

    def note_compiled(self, what: Compiled) -> None:
        """A graph has been traced; "step" is never taken back."""
        if self.clock["compiled"] not in ("step", what):
            self.clock["compiled"] = what
            self.forget()

    def statistics(self, steps: int) -> frozenset[int] | None:
        """The blocks whose statistics have their turn at a step."""
        return self._blocks("fold", steps) if self.of_statistics else None

    def inverses(self, steps: int) -> frozenset[int] | None:
        """The blocks whose inverses have their turn at a step."""
        return self._blocks("inverse", steps) if self.of_inverses else None

    def begin(self, what: Literal["fold", "inverse"], steps: int) -> None:
        """An interval starts."""
        self.clock[f"{what}_from"], self.clock[f"next_{what}"] = steps, steps + self._interval(what, steps)

    def _interval(self, what: str, steps: int) -> int:
        options = self.options
        return options.steps_to_next_fold(steps) if what == "fold" else options.steps_to_next_inverse(steps)

    def _blocks(self, what: str, steps: int) -> frozenset[int]:
        start, stop = self.clock[f"{what}_from"], self.clock[f"next_{what}"]
        if steps >= stop:
            start, stop = steps, steps + self._interval(what, steps)
        turns = self.turns(what, stop - start)
        return frozenset(block for block, turn in enumerate(turns) if turn == steps - start)

    def turns(self, what: str, length: int) -> list[int]:
        """At which step of an interval of `length` each block has its turn."""
        if (what, length) not in self._turns:
            work = self.inversions
            if self.of_statistics:
                assert self._known is not None
                both = self.options.factor_interval == self.options.inverse_interval
                work = [a + b for a, b in zip(self._known, self.inversions, strict=True)] if both else work
                work = self._known if what == "fold" and not both else work
            self._turns[what, length] = turns_of(work, length)
        return self._turns[what, length]

    def notes(self) -> list[str]:
        """What `explain()` says of turns that were asked for and are not taken."""
        if not self.wanted:
            return []
        if self._graphs or self.clock["compiled"] == "step":
            return ["refresh_budget='even': all layers at once, because the step is compiled and each turn is a graph"]
        reason = "the model is compiled, and its taps are on or off together" if self.clock["compiled"] else ""
        if self.options.fisher != "empirical":
            reason = f"each step with statistics of fisher='{self.options.fisher}' costs backward passes of its own"
        return [f"refresh_budget='even': statistics of all layers in one step: {reason}"] if reason else []
