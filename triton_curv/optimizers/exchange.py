"""Where the ranks of a distributed run tell one another something in a step; one rank alone has nothing to tell."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from triton_curv.blocks import Block, FactorStore
from triton_curv.blocks.bank import FactorKey, Held, Normalisation
from triton_curv.blocks.operator import Sums
from triton_curv.capture import CaptureSwitch
from triton_curv.optimizers.matrices import Lists, MatrixGroup, momentum_squares, squared_norms


class Exchange(Protocol):
    """What a step of KFAC asks of the others, in the order of the step. Functions of tensors, so that they compile."""

    @property
    def place(self) -> int:
        """Number of this rank among all that train the model."""

    @property
    def held(self) -> Held | None:
        """Which factors this rank holds; None: all."""

    def attach(self, store: FactorStore, switch: CaptureSwitch) -> None:
        """Once, before the first step: this rank's factors and taps."""

    def matrices_of(self, blocks: Sequence[Block], like: Tensor) -> MatrixGroup:
        """Once, for each parameter group: buffers for the gradients, updates and momenta of its blocks."""

    def gradients_(self, params: Sequence[Parameter]) -> None:
        """At the start of a step: agree which parameters have gradients, and average what nobody else averages."""

    def seen(self, store: FactorStore, how: Normalisation) -> Tensor:
        """Which blocks have pending statistics, on any rank: (blocks,)."""

    def centres(self, gradients: Sequence[Tensor], counts: Tensor) -> tuple[list[Tensor], Tensor]:
        """Before a fold: gradients of some parameters and `counts`, a sum, as they are over all ranks."""

    def fold_(
        self, store: FactorStore, how: Normalisation, due: Tensor | None, turn: Collection[int] | None = None
    ) -> None:
        """Fold the pending statistics of all ranks into the averages, where these are.

        `turn`: the blocks that have some, the same on all ranks; None: any.
        """

    def changes(self, store: FactorStore) -> Tensor:
        """`store.changes()` of all factors."""

    def invert_(self, store: FactorStore, keys: Sequence[FactorKey] | None) -> None:
        """Renew inverses, all or those of some factors, and bring them where they are applied."""

    def matrices_(self, lists: Sequence[Lists], grads: Sequence[Sequence[Tensor]]) -> None:
        """Before preconditioning: gradients as matrices, where they are preconditioned."""

    def applied(self, blocks: Sequence[int]) -> Sequence[bool]:
        """Whether the gradient of each block, given by its number, is preconditioned here."""

    def updates_(self, lists: Sequence[Lists]) -> None:
        """After preconditioning: the updates, where the weights are."""

    def norms(self, lists: Sequence[Lists], sums: Sequence[Sums | None]) -> list[Tensor]:
        """||P|| of each block, one vector for each parameter group; `sums`: of each group on this rank, if known."""

    def momentum_norms(self, lists: Sequence[Lists]) -> list[Tensor]:
        """Norm of the momentum of each block, one vector for each parameter group."""

    def products(self, lists: Sequence[Lists], sums: Sequence[Sums | None]) -> list[Tensor]:
        """<P, D> over all blocks of each parameter group, ()."""

    def whole_norms(self, norms: Tensor) -> Tensor:
        """||w|| of weights, from those of what lies here."""

    def total(self, number: Tensor) -> Tensor:
        """Sum over ranks of what each knows of its own blocks."""

    def mean(self, number: Tensor) -> Tensor:
        """Mean over ranks."""

    def everywhere(self, numbers: Tensor) -> Tensor:
        """Sum over all ranks of what each has done."""

    def agreed(self, fine: Tensor) -> Tensor:
        """Whether all ranks found the gradients of this step finite, ()."""

    def whole(self, state: Mapping[int, Mapping[str, Any]], factors: Mapping[FactorKey, int]) -> dict[int, Any]:
        """The optimizer's state, whole: `factors` says which parameter holds each factor's."""

    def bytes_sent(self) -> Sequence[int] | None:
        """What this rank sends for each block in a step in which everything is due; None: nothing."""

    def require_equal(self, names: Sequence[str], params: Sequence[Tensor]) -> None:
        """Raise RankMismatchError unless all ranks have the same model, options and weights."""


class Alone:
    """One rank."""

    place: int = 0
    held: Held | None = None

    def bytes_sent(self) -> None:
        """There is nobody to send to."""

    def attach(self, store: FactorStore, switch: CaptureSwitch) -> None:
        """Nothing to do with them."""

    def matrices_of(self, blocks: Sequence[Block], like: Tensor) -> MatrixGroup:
        """Of all blocks."""
        return MatrixGroup(blocks, like.dtype, like.device)

    def gradients_(self, params: Sequence[Parameter]) -> None:
        """As they are."""

    def seen(self, store: FactorStore, how: Normalisation) -> Tensor:
        """On this rank."""
        return store.seen() > 0

    def centres(self, gradients: Sequence[Tensor], counts: Tensor) -> tuple[list[Tensor], Tensor]:
        """As they are."""
        return list(gradients), counts

    def fold_(
        self, store: FactorStore, how: Normalisation, due: Tensor | None, turn: Collection[int] | None = None
    ) -> None:
        """Here."""
        store.fold_(how, due, turn)

    def changes(self, store: FactorStore) -> Tensor:
        """All are here."""
        return store.changes()

    def invert_(self, store: FactorStore, keys: Sequence[FactorKey] | None) -> None:
        """Here."""
        store.invert_(keys)

    def matrices_(self, lists: Sequence[Lists], grads: Sequence[Sequence[Tensor]]) -> None:
        """Copied."""
        for each, given in zip(lists, grads, strict=True):
            torch._foreach_copy_(each.grads, list(given))

    def applied(self, blocks: Sequence[int]) -> Sequence[bool]:
        """Every one."""
        return [True] * len(blocks)

    def updates_(self, lists: Sequence[Lists]) -> None:
        """Complete."""

    def norms(self, lists: Sequence[Lists], sums: Sequence[Sums | None]) -> list[Tensor]:
        """Of what is here."""
        return [
            squared_norms(each.row_updates).sqrt() if known is None else known.squares.sqrt()
            for each, known in zip(lists, sums, strict=True)
        ]

    def momentum_norms(self, lists: Sequence[Lists]) -> list[Tensor]:
        """Of what is here."""
        return [momentum_squares(each).sqrt() for each in lists]

    def products(self, lists: Sequence[Lists], sums: Sequence[Sums | None]) -> list[Tensor]:
        """Of what is here."""
        return [
            torch.dot(each.flat_updates, each.flat_grads) if known is None else known.products.sum()
            for each, known in zip(lists, sums, strict=True)
        ]

    def whole_norms(self, norms: Tensor) -> Tensor:
        """All of them are here."""
        return norms

    def total(self, number: Tensor) -> Tensor:
        """That of one rank."""
        return number

    def mean(self, number: Tensor) -> Tensor:
        """That of one rank."""
        return number

    def everywhere(self, numbers: Tensor) -> Tensor:
        """Those of one rank."""
        return numbers

    def agreed(self, fine: Tensor) -> Tensor:
        """As found."""
        return fine

    def whole(self, state: Mapping[int, Mapping[str, Any]], factors: Mapping[FactorKey, int]) -> dict[int, Any]:
        """As it is."""
        return dict(state)

    def require_equal(self, names: Sequence[str], params: Sequence[Tensor]) -> None:
        """There is only one."""
