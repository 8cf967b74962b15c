"""Statistics of all ranks become those of one batch: each factor's sum goes to the rank that owns it."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from triton_curv.blocks import Block, FactorStore
from triton_curv.blocks.bank import FactorKey, Normalisation
from triton_curv.blocks.samples import samples_of
from triton_curv.nvtx import stage
from triton_curv.packing import pack
from triton_curv.sharding.buckets import Bucket
from triton_curv.sharding.exchange import Channel, Pending
from triton_curv.sharding.plan import Plan
from triton_curv.sharding.ranks import Channels


class Totals(NamedTuple):
    """Over all ranks: `counts` for the store, traces of the sums in the order of rows, whether a share is stale."""

    counts: Tensor
    traces: Tensor
    stale: Tensor


def signal_weights(store: FactorStore, how: Normalisation, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Units n of this rank for each block, and n^2: what makes sums of g g^T for a mean loss those of a summed one.

    A rank's gradients are those of the mean over its own n units; of the mean over all N = sum n they are N/n times
    too large. With n^2 the sums over ranks are those of the summed loss of all.
    """
    units = store.units.expand_as(store.samples) if store.units_known else samples
    return units, torch.ones_like(units) if how.summed else units.square()


def wire_scales(store: FactorStore, traces: Tensor, wire: torch.dtype | None) -> Tensor:
    """What each matrix is multiplied with on its way: for float16 size / trace, a mean eigenvalue of 1; else 1."""
    if wire != torch.float16:
        return torch.ones_like(traces)
    sizes = torch.cat([traces.new_full((len(bank.sums),), float(bank.size)) for bank in store.banks])
    return torch.where((traces > 0) & traces.isfinite(), sizes / traces, 1.0)


def pack_bucket(store: FactorStore, bucket: Bucket, scale: Tensor | None) -> Tensor:
    """The packed sums of a bucket's factors as one contiguous buffer; `scale` has one number for each row."""
    parts = []
    for piece in bucket.pieces:
        key = FactorKey(piece.layer, piece.name)
        packed = pack(store.sums_in_weight_order(key))
        parts.append((packed if scale is None else packed * scale[store.rows(key), None]).view(-1))
    return torch.cat(parts)


class StatisticsExchange:
    """Sums of the factors, this rank's in `store`, to the ranks that own them.

    With `may_send`, buckets of A leave during the backward pass: in their order, each as soon as the taps of all its
    layers have run as often in backward as in forward and `may_send()` agrees; the rest at the fold.
    """

    def __init__(
        self, store: FactorStore, plan: Plan, channels: Channels, may_send: Callable[[], bool] | None = None
    ) -> None:
        self.store = store
        self.channels = channels
        self.wire = channels.replica.wire
        self.buckets_A, self.buckets_G = plan.buckets_A, plan.buckets_G
        self.place = channels.replica.rank
        self._may_send = may_send if self.wire != torch.float16 else None  # it needs the traces of all ranks first
        self._bucket_of = {p.layer: i for i, bucket in enumerate(self.buckets_A) for p in bucket.pieces}
        self._layers = [{p.layer for p in bucket.pieces} for bucket in self.buckets_A]
        rows = [row for key in store.keys for row in range(len(store.owner))[store.rows(key)]]
        self._canonical = torch.tensor(rows, device=store.owner.device)  # rows in an order that all ranks share
        self._order = torch.argsort(self._canonical)
        self.forget()

    def forget(self) -> None:
        """Nothing is under way."""
        self._open: dict[int, int] = {}
        self._seen: set[int] = set()
        self._sent: list[Pending] = []
        self._stale = False

    def across(self, rows: Tensor, channel: Channel) -> Tensor:
        """Sums over ranks of numbers for each factor matrix, whose order of rows differs from rank to rank."""
        return channel.all_reduce(rows[self._canonical]).wait()[self._order]

    # ---- during the backward pass

    def forward(self, block: Block) -> None:
        """A tap of the block was made."""
        self._open[block.index] = self._open.get(block.index, 0) + 1

    def backward(self, block: Block) -> None:
        """A tap of the block has run: its bucket may be complete."""
        index = block.index
        self._open[index] = self._open.get(index, 0) - 1
        self._seen.add(index)
        bucket = self._bucket_of.get(index)
        if bucket is None or self._may_send is None:
            return
        if bucket < len(self._sent):
            self._stale = True
            return
        while len(self._sent) < len(self.buckets_A) and self._complete(len(self._sent)) and self._may_send():
            self._send(len(self._sent))

    def _complete(self, bucket: int) -> bool:
        return all(i in self._seen and self._open.get(i, 0) == 0 for i in self._layers[bucket])

    def _send(self, bucket: int) -> None:
        buffer = pack_bucket(self.store, self.buckets_A[bucket], None)
        self._sent.append(self.channels.early.reduce_scatter(buffer, self.buckets_A[bucket].splits))

    # ---- at the fold

    def totals(self, how: Normalisation) -> tuple[Totals, Tensor]:
        """Counts and traces over all ranks by one all-reduce, and the scale of this rank's sums for each row."""
        store = self.store
        samples = samples_of(store.counts, store.shared, store.samples, self.channels.everyone.size)
        units, squares = signal_weights(store, how, samples)
        weights = torch.where(store.is_input, 1.0, squares[store.owner])
        traces = store.traces(sums=True) * weights
        stale = store.samples.new_tensor([float(self._stale)])
        local = torch.cat((store.counts[:, 0], samples, units, traces[self._canonical], stale))
        total = self.channels.everyone.all_reduce(local).wait()
        blocks = len(store.samples)
        rows, samples, units, traces, stale = total.split([blocks, blocks, blocks, len(store.owner), 1])
        counts = torch.zeros_like(store.counts)
        counts[:, 0], counts[:, 1] = rows, torch.where(samples > 0, units, 0.0)
        return Totals(counts, traces[self._order], stale), weights

    def _of_turn(self, buckets: Sequence[Bucket], turn: Collection[int]) -> tuple[Bucket, ...]:
        """What the layers of a turn have in some buckets; empty ones left out."""
        parts = [bucket.of_layers(turn) for bucket in buckets]
        return tuple(part for part in parts if part.length)

    def fold(self, how: Normalisation, due: Tensor | None, turn: Collection[int] | None = None) -> None:
        """`store.fold_` of the sums over all ranks. Of a `turn`, buckets that left early hold its layers alone."""
        store = self.store
        totals, weights = self.totals(how)
        if self._may_send is not None and bool(totals.stale > 0):
            for pending in self._sent:
                pending.wait()
            self._sent = []
        ahead = len(self._sent)
        buckets_A, buckets_G = self.buckets_A[ahead:], self.buckets_G
        if turn is not None:
            buckets_A, buckets_G = self._of_turn(buckets_A, turn), self._of_turn(buckets_G, turn)
        on_wire = wire_scales(store, totals.traces, self.wire)
        of_A = on_wire if self.wire == torch.float16 else None
        for bucket in buckets_A:
            buffer = pack_bucket(store, bucket, of_A)
            self._sent.append(self.channels.early.reduce_scatter(buffer, bucket.splits))
        for bucket in buckets_G:
            buffer = pack_bucket(store, bucket, weights * on_wire)
            self._sent.append(self.channels.replica.reduce_scatter(buffer, bucket.splits))
        received: dict[FactorKey, Tensor] = {}
        buckets = (*self.buckets_A[:ahead], *buckets_A, *buckets_G)
        for bucket, pending in zip(buckets, self._sent, strict=True):
            self._unpack(bucket, self._over_replicas(pending), received, on_wire)
        store.counts.copy_(totals.counts)
        store.units_known = False
        store.fold_packed_(received, how._replace(summed=True), due, totals.traces, turn)
        self.forget()

    @stage("reduce-scatter")  # the wait for one that was started
    def _over_replicas(self, pending: Pending) -> Tensor:
        return self.channels.peers.all_reduce(pending.wait(), dist.ReduceOp.SUM, exact=False).wait()

    def _unpack(self, bucket: Bucket, share: Tensor, into: dict[FactorKey, Tensor], on_wire: Tensor) -> None:
        start = bucket.starts[self.place]
        for piece in bucket.pieces_of(self.place):
            key = FactorKey(piece.layer, piece.name)
            packed = share[piece.offset - start : piece.offset - start + piece.length]
            if self.wire == torch.float16:
                rows = on_wire[self.store.rows(key), None]
                packed = (packed.view(len(rows), -1) / rows).view(-1)
            into[key] = packed
