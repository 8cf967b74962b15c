"""State that lies on one rank only, brought to all of them for checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from triton_curv.sharding.exchange import Channel, gather_pieces

SUFFIXES = ("", "_inverse", "_failures", "_shift", "_spectrum", "_last", "_before")
"""What the owner of a factor alone knows: names in the optimizer's state, after the factor's."""


class Entry(NamedTuple):
    """A tensor of the optimizer's state: the rank of the replica that has it, and where it stands."""

    owner: int
    param: int
    name: str


def entries_of(state: Mapping[int, Mapping[str, Tensor]], factors: Sequence[tuple[int, int, str]]) -> list[Entry]:
    """The entries of `factors`, (owner, number of the parameter that holds them, "A" or another name)."""
    return [
        Entry(owner, index, name + suffix)
        for owner, index, name in factors
        for suffix in SUFFIXES
        if name + suffix in state[index]
    ]


def whole_state(
    state: Mapping[int, Mapping[str, Tensor]], entries: Sequence[Entry], channel: Channel, like: Tensor
) -> dict[int, dict[str, Tensor]]:
    """The state with all `entries` from their owners, on every rank. A collective: all ranks must call it."""
    exact = replace(channel, wire=None)
    by_owner: list[list[Entry]] = [[] for _ in range(channel.size)]
    for entry in entries:
        by_owner[entry.owner].append(entry)
    own = [state[e.param][e.name].to(like.dtype) for e in by_owner[channel.rank]]
    sizes = [[state[e.param][e.name].numel() for e in each] for each in by_owner]
    whole = {index: dict(values) for index, values in state.items()}
    for each, pieces in zip(by_owner, gather_pieces(exact, own, sizes, like), strict=True):
        for entry, piece in zip(each, pieces, strict=True):
            old = state[entry.param][entry.name]
            whole[entry.param][entry.name] = piece.to(old.dtype).view(old.shape)
    return whole
