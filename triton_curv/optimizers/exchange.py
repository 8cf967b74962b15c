"""Where the ranks of a distributed run tell one another something in a step; one rank alone has nothing to tell."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from triton_curv.blocks.bank import FactorKey, FactorStore


class Exchange(Protocol):
    """What a step of KFAC asks of the others, in the order of the step. Functions of tensors, so that they compile."""

    def statistics_(self, store: FactorStore) -> None:
        """Before statistics are folded: pending sums and counts of all ranks together, where they are folded."""

    def owned(self, keys: Sequence[FactorKey] | None) -> Sequence[FactorKey] | None:
        """Which of the factors due (None: all) are inverted here; None: all of them."""

    def inverses_(self, store: FactorStore, keys: Sequence[FactorKey] | None) -> None:
        """After inversion: the inverses due, where they are applied."""

    def applied(self, blocks: Sequence[int]) -> Sequence[bool]:
        """Whether the gradient of each block, given by its number, is preconditioned here."""

    def updates_(self, updates: Sequence[Tensor]) -> None:
        """Before momentum: preconditioned gradients of all blocks, one flat buffer for each parameter group."""

    def agreed(self, fine: Tensor) -> Tensor:
        """Whether all ranks found the gradients of this step finite, ()."""


class Alone:
    """One rank."""

    def statistics_(self, store: FactorStore) -> None:
        """Nothing to add."""

    def owned(self, keys: Sequence[FactorKey] | None) -> Sequence[FactorKey] | None:
        """All."""
        return keys

    def inverses_(self, store: FactorStore, keys: Sequence[FactorKey] | None) -> None:
        """Where they are."""

    def applied(self, blocks: Sequence[int]) -> Sequence[bool]:
        """Every one."""
        return [True] * len(blocks)

    def updates_(self, updates: Sequence[Tensor]) -> None:
        """Complete."""

    def agreed(self, fine: Tensor) -> Tensor:
        """As found."""
        return fine
