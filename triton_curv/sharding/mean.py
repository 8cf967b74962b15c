"""Means over the ranks that train one model, and agreement between them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from triton_curv.errors import PeerFailedError
from triton_curv.sharding.exchange import Channel
from triton_curv.sharding.ranks import Found, timeout


class RankMean:
    """Means over ranks, one all-reduce each; all ranks get the same bits. A world of one communicates nothing.

    All methods are collectives: every rank calls them, in the same order.
    """

    def __init__(self, found: Found, device: torch.device) -> None:
        self.size = len(found.ranks)
        self.device = device
        group, rank = None, 0
        if self.size > 1:
            group = dist.new_group(sorted(found.ranks), timeout=timeout(device), use_local_synchronization=True)
            rank = sorted(found.ranks).index(dist.get_rank())
        self.channel = Channel(group, self.size, rank)

    def vectors(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each tensor, as new tensors of the same shapes and dtypes; one all-reduce for each dtype."""
        if self.size == 1:
            return list(tensors)
        found: list[Tensor] = list(tensors)
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            places = [i for i, t in enumerate(tensors) if t.dtype == dtype]
            flat = torch.cat([tensors[i].reshape(-1) for i in places])
            parts = (self.channel.all_reduce(flat).wait() / self.size).split([tensors[i].numel() for i in places])
            for i, part in zip(places, parts, strict=True):
                found[i] = part.view_as(tensors[i])
        return found

    def number(self, value: float) -> float:
        """The mean of one number."""
        if self.size == 1:
            return value
        return float(self.vectors([torch.tensor(value, dtype=torch.float64, device=self.device)])[0])

    def first_of(self, choice: int) -> int:
        """The smallest of the ranks' numbers."""
        mine = torch.tensor(choice, dtype=torch.int64, device=self.device)
        return int(self.channel.all_reduce(mine, dist.ReduceOp.MIN).wait())

    @contextmanager
    def agreeing(self, what: str) -> Iterator[None]:
        """Raise on all ranks if the block, which holds no collective, raises on one.

        That rank raises its own error, the others PeerFailedError.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            if self.size == 1:
                raise
            error = raised
        if self.size == 1:
            return
        failed = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        failed[self.channel.rank] = error is not None
        ranks = self.channel.all_reduce(failed).wait().nonzero().flatten().tolist()
        if error is not None:
            raise error
        if ranks:
            raise PeerFailedError(
                f"expected all ranks to {what}, but ranks {ranks} raised an error; nothing was changed"
            )
