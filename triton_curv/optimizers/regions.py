"""The regions of a step of KFAC: statistics into averages, averages into inverses, gradients into new weights.

Functions of tensors without a look at any value: each compiles as one graph and can be captured in a CUDA graph.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from triton_curv.blocks import Block, FactorStore
from triton_curv.blocks.bank import FactorKey, Normalisation
from triton_curv.blocks.centre import Means, centre_, gradients_of_biases, means_of
from triton_curv.graphs import Graphs
from triton_curv.optimizers.apply import Work, apply_
from triton_curv.optimizers.exchange import Exchange
from triton_curv.optimizers.fallback import LooseGroup
from triton_curv.optimizers.graph_apply import apply_in_graph_
from triton_curv.optimizers.hyper import HyperParameters
from triton_curv.optimizers.hyper_slots import SLOT
from triton_curv.optimizers.kfac_options import KFACOptions
from triton_curv.optimizers.matrices import MatrixGroup

Region = Callable[..., Any]


class Folded(NamedTuple):
    """Blocks with second moments, blocks whose G is centred, and what the loss was multiplied with."""

    moving: Sequence[Block]
    centred: Sequence[Block]
    loss_scale: float


class Lambdas(NamedTuple):
    """Rows of hyper-parameters, which of them is each block's, and what the damping rule has made of lambda, (1,)."""

    rows: Tensor
    group_of_block: Tensor
    gain: Tensor

    def of_blocks(self) -> tuple[Tensor, Tensor]:
        """The absolute and the relative damping of each block."""
        factor = self.rows[0, SLOT["damping_factor"]] * self.gain
        absolute, relative = (self.rows[:, SLOT[name]] for name in ("damping", "relative_damping"))
        return absolute[self.group_of_block] * factor, relative[self.group_of_block] * factor


def fold_(
    store: FactorStore,
    folded: Folded,
    how: Normalisation,
    due: Tensor | None,
    exchange: Exchange,
    turn: Collection[int] | None = None,
) -> None:
    """Fold pending statistics into the moving averages, second moments included, and centre G.

    `turn`: the blocks that have some; None: any.
    """
    if turn is not None:
        folded = folded._replace(centred=[block for block in folded.centred if block.index in turn])
    means: Means | None = None
    before, moving = store.folds, folded.moving
    if folded.centred:
        gradients = gradients_of_biases(folded.centred, store.samples)
        counts = torch.stack((store.counts[:, 0], store.seen()))
        gradients, counts = exchange.centres(gradients, counts)
        means = means_of(folded.centred, gradients, counts, how, folded.loss_scale)
        before = store.folds.clone()
    if moving:
        scale, weight = store.pending(how)
        for block in moving:
            assert block.moments is not None
            rows = store.rows(block.keys["G"])
            block.moments.fold_(torch.where(weight[rows] > 0, scale[rows], 0.0), how.decay)
            block.renew_gains_()
    exchange.fold_(store, how, due, turn)
    if means is not None:
        centre_(store, means, before, how.decay)


def refresh_(
    store: FactorStore,
    turned: Sequence[Block],
    keys: Sequence[FactorKey] | None,
    lambdas: Lambdas | None,
    exchange: Exchange,
) -> None:
    """Renew damped inverses or eigenbases, all or those of some factors, and the gains of `turned` blocks.

    `lambdas` are split anew between the factors; None leaves that as it is.
    """
    if lambdas is not None:
        store.set_shifts_(*lambdas.of_blocks())
    exchange.invert_(store, keys)
    owners = {key.block for key in (store.keys if keys is None else keys)}
    for block in turned:
        if block.moments is not None and block.index in owners:
            block.moments.restart_()
        if lambdas is not None or block.index in owners:
            block.renew_gains_()


class Regions:
    """The three, as they are or, with arguments for `torch.compile`, each compiled when it first runs.

    On a CPU the first two are calls of the linear algebra library, which inductor would spend minutes on to leave as
    they are (28 layers: see docs/compile.md): "aot_eager" is the backend for them there, unless one is given.
    """

    def __init__(self, compiling: Mapping[str, Any] | None, device: torch.device) -> None:
        self.compiling = compiling
        chosen = compiling is not None and not {"backend", "mode", "options"}.isdisjoint(compiling)
        library = {"backend": "aot_eager"} if device.type == "cpu" and not chosen else {}
        self.fold = self._maybe_compiled(fold_, library)
        self.refresh = self._maybe_compiled(refresh_, library)
        self._apply = None if compiling is None else Graphs(apply_in_graph_, compiling)
        self._settled = False

    def apply(
        self,
        matrices: Sequence[MatrixGroup],
        loose: Sequence[LooseGroup],
        hyper: HyperParameters,
        samples: Tensor,
        skipped: Tensor,
        options: KFACOptions,
        exchange: Exchange,
    ) -> Tensor:
        """Region 3 with the gradients that there are; returns whether all are finite, ()."""
        of_group = hyper.rows.unbind()
        others = [group.active(row) for group, row in zip(loose, of_group[len(matrices) :], strict=True)]
        others = [group for group in others if group.params]
        with_blocks = zip(matrices, of_group, strict=False)
        finite: Tensor
        if torch.compiler.is_compiling() or self.compiling is not None:
            found = [group.in_graph(row) for group, row in with_blocks]
            in_graph = [each for each in found if each is not None]
            arguments = in_graph, others, hyper.steps, samples, skipped, options
            if torch.compiler.is_compiling() or self._apply is None:
                return apply_in_graph_(*arguments)
            if not self._settled:
                self._apply.settle(tensor for group in matrices for tensor in group.settled())
                self._settled = True
            blocks = tuple(tuple(row.number for row in each.rows) for each in in_graph)
            return self._apply((blocks, tuple(len(each.params) for each in others)), *arguments)
        in_place = options.update_size != "kl_clip"  # which multiplies updates with gradients
        active = [(group.active(in_place), row) for group, row in with_blocks]
        work = [Work(lists, [cast("Tensor", p.grad) for p in lists.leaves], row) for lists, row in active]
        finite = apply_([each for each in work if each.grads], others, hyper.steps, samples, skipped, options, exchange)
        return finite

    def _maybe_compiled(self, region: Region, default: Mapping[str, Any]) -> Region:
        if self.compiling is None:
            return region
        return partial(Graphs(region, {**default, **self.compiling}), None)
