"""Collectives on contiguous buffers that are shared out unevenly: counted, asynchronous, free in a world of one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from triton_curv.nvtx import stage

Collectives = Literal["fewest", "padded", "uneven"]
# torch 2.13 renames them and warns about the old names
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Ledger:
    """Bytes this rank has sent, by kind of collective, as ring algorithms send them (one copy leaves for each hop)."""

    sent: dict[str, int] = field(default_factory=dict)

    def note(self, kind: str, count: int) -> None:
        """Add to one kind."""
        self.sent[kind] = self.sent.get(kind, 0) + count

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.sent.values())


class Pending:
    """A collective under way. `wait()` returns its result, the same at every call."""

    def __init__(self, works: Sequence[Any], finish: Callable[[], Tensor]) -> None:
        self._works = list(works)
        self._finish = finish
        self._result: Tensor | None = None

    def wait(self) -> Tensor:
        """The result; on a GPU the current stream waits, not the host. Raises what the collective failed with."""
        if self._result is None:
            for work in self._works:
                work.wait()
            self._result = self._finish()
            self._works.clear()
        return self._result


def done(result: Tensor) -> Pending:
    """Nothing to wait for."""
    return Pending((), lambda: result)


@dataclass(frozen=True)
class Channel:
    """A group of ranks that exchange flat buffers.

    Args:
        group: of torch.distributed; None for a group of one, which communicates nothing.
        size: ranks in the group.
        rank: this process's number in it.
        wire: dtype that numbers have on the way; None: their own.
        collectives: "padded" fills all shares up to the longest; "uneven" sends them as they are; "fewest" takes
            whichever moves fewer bytes: padded for equal shares, which are one fast call, uneven for others.
        ledger: counts the bytes.

    """

    group: dist.ProcessGroup | None
    size: int
    rank: int
    wire: torch.dtype | None = None
    collectives: Collectives = "fewest"
    ledger: Ledger = field(default_factory=Ledger)

    def padded(self, splits: Sequence[int]) -> bool:
        """Whether shares of these lengths are padded."""
        if self.collectives != "fewest":
            return self.collectives == "padded"
        return max(splits) * len(splits) <= sum(splits)

    def _sent(self, tensor: Tensor) -> Tensor:
        return tensor if self.wire is None or not tensor.is_floating_point() else tensor.to(self.wire)

    def _root(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank) if self.group is not None else 0

    @stage("reduce-scatter", payload=lambda channel, buffer, splits: buffer.nbytes)
    def reduce_scatter(self, buffer: Tensor, splits: Sequence[int]) -> Pending:
        """Sum over ranks of `buffer` (sum(splits),); this rank gets its own share (splits[rank],).

        `torch.distributed.reduce_scatter`. Sums are formed in the wire's dtype.
        """
        if self.size == 1:
            return done(buffer)
        out_dtype, own = buffer.dtype, splits[self.rank]
        sent = self._sent(buffer)
        if self.padded(splits):
            share = max(splits)
            if share * self.size > sum(splits):
                whole = sent.new_zeros(self.size, share)
                for row, part in zip(whole, sent.split(list(splits)), strict=True):
                    row[: len(part)].copy_(part)
                sent = whole.view(-1)
            out = sent.new_empty(share)
            work = _reduce_scatter(out, sent, group=self.group, async_op=True)
            count = (self.size - 1) * share
        else:
            out = sent.new_empty(own)
            work = dist.reduce_scatter(out, list(sent.split(list(splits))), group=self.group, async_op=True)
            count = sum(splits) - own
        self.ledger.note("reduce-scatter", count * sent.element_size())
        return Pending([work], lambda: out[:own].to(out_dtype))

    def all_gather(self, own: Tensor, splits: Sequence[int]) -> Pending:
        """The shares of all ranks, one after another: (sum(splits),) from `own` (splits[rank],).

        `torch.distributed.all_gather`. Every rank, the sender too, gets what came over the wire: ranks stay equal.
        """
        if self.size == 1:
            return done(own)
        out_dtype, sent = own.dtype, self._sent(own)
        if self.padded(splits):
            share = max(splits)
            if len(sent) < share:
                sent = torch.cat([sent, sent.new_zeros(share - len(sent))])
            out = sent.new_empty(share * self.size)
            works = [_all_gather(out, sent, group=self.group, async_op=True)]
            count = (self.size - 1) * share

            def finish() -> Tensor:
                if share * self.size == sum(splits):
                    return out.to(out_dtype)
                rows = out.view(self.size, share)
                return torch.cat([row[:length] for row, length in zip(rows, splits, strict=True)]).to(out_dtype)
        else:
            out = sent.new_empty(sum(splits))
            parts = out.split(list(splits))
            parts[self.rank].copy_(sent)
            works = [
                dist.broadcast(part, src=self._root(rank), group=self.group, async_op=True)
                for rank, part in enumerate(parts)
                if len(part)
            ]
            count = sum(splits) - splits[(self.rank + 1) % self.size]

            def finish() -> Tensor:
                return out.to(out_dtype)

        self.ledger.note("all-gather", count * sent.element_size())
        return Pending(works, finish)

    def all_to_all(self, buffer: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Pending:
        """`torch.distributed.all_to_all_single`: `sends[r]` numbers to rank r, `receives[r]` from it."""
        if self.size == 1:
            return done(buffer)
        out_dtype, sent = buffer.dtype, self._sent(buffer)
        out = sent.new_empty(sum(receives))
        work = dist.all_to_all_single(out, sent, list(receives), list(sends), group=self.group, async_op=True)
        self.ledger.note("all-to-all", (sum(sends) - sends[self.rank]) * sent.element_size())
        return Pending([work], lambda: out.to(out_dtype))

    def all_reduce(
        self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM, exact: bool = True
    ) -> Pending:
        """`torch.distributed.all_reduce` of a copy, in its own dtype if `exact`, else in the wire's."""
        if self.size == 1:
            return done(tensor)
        out = (tensor if exact else self._sent(tensor)).clone()
        work = dist.all_reduce(out, op=op, group=self.group, async_op=True)
        self.ledger.note("all-reduce", 2 * (self.size - 1) * out.numel() * out.element_size() // self.size)
        return Pending([work], lambda: out.to(tensor.dtype))


def gather_pieces(
    channel: Channel, own: Sequence[Tensor], sizes: Sequence[Sequence[int]], like: Tensor
) -> list[list[Tensor]]:
    """Every rank's list of tensors, flat, on all ranks: `sizes[r]` are the lengths of those of rank r.

    On a float16 wire each is divided by its largest number, which travels beside it as it is. `like` has the dtype.
    """
    flat = [piece.reshape(-1) for piece in own]
    if channel.size == 1:
        return [flat]
    scales: Tensor | None = None
    if channel.wire == torch.float16 and any(map(len, sizes)):
        most = torch.stack([piece.abs().amax() for piece in flat]) if flat else like.new_zeros(0)
        most = torch.where(most == 0, 1.0, most)
        scales = replace(channel, wire=None).all_gather(most, [len(each) for each in sizes]).wait()
        flat = [piece / most[i] for i, piece in enumerate(flat)]
    share = torch.cat(flat) if flat else like.new_zeros(0)
    whole = channel.all_gather(share, [sum(each) for each in sizes]).wait()
    pieces = iter(whole.split([size for each in sizes for size in each]))
    found = [[next(pieces) for _ in each] for each in sizes]
    if scales is not None:
        factors = iter(scales.unbind())
        found = [[piece * next(factors) for piece in each] for each in found]
    return found
