"""Contiguous buffers for collectives: which piece of which layer lies where, rank by rank."""

from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Piece:
    """`length` numbers of layer number `layer` at `offset` of a bucket: the factor `name`, or its "gradient"."""

    layer: int
    name: str
    offset: int
    length: int


@dataclass(frozen=True)
class Bucket:
    """Pieces in the order of the ranks they belong to: rank i of the group owns the next `splits[i]` numbers.

    The group is that of the collective (see `Grid`); its ranks count from 0. The buffer can be reduce-scattered or
    gathered as it is by an uneven collective, or by an even one once each share is padded to `share` numbers.
    """

    pieces: tuple[Piece, ...]
    splits: tuple[int, ...]

    @property
    def length(self) -> int:
        """Numbers in the buffer."""
        return sum(self.splits)

    @property
    def share(self) -> int:
        """Numbers in each rank's share once all are padded to the longest."""
        return max(self.splits)

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each rank's share starts."""
        return tuple(accumulate(self.splits, initial=0))[:-1]

    def pieces_of(self, rank: int) -> tuple[Piece, ...]:
        """The pieces that a rank of the group owns, in their order; offsets are those in the whole bucket."""
        start = sum(self.splits[:rank])
        stop = start + self.splits[rank]
        return tuple(piece for piece in self.pieces if start <= piece.offset < stop)

    def of_layers(self, layers: Collection[int]) -> "Bucket":
        """The pieces of some layers, closed up."""
        stops = list(accumulate(self.splits))
        kept = [piece for piece in self.pieces if piece.layer in layers]
        return bucket_of(
            ((bisect_right(stops, p.offset), p.layer, p.name, p.length) for p in kept if p.length), len(stops)
        )

    def padded_offset(self, piece: Piece) -> int:
        """Where a piece lies once each share is padded to `share`."""
        stop = 0
        for rank, split in enumerate(self.splits):
            start, stop = stop, stop + split
            if piece.offset < stop:
                return rank * self.share + piece.offset - start
        raise IndexError(f"expected a piece of this bucket of {stop} numbers, got {piece}")


def bucket_of(contents: Iterable[tuple[int, int, str, int]], ranks: int) -> Bucket:
    """A bucket of (owner, layer, name, length): sorted by owner, and for one owner in the order they come in."""
    ordered = sorted(contents, key=lambda content: content[0])  # a stable sort
    splits, pieces, offset = [0] * ranks, [], 0
    for owner, layer, name, length in ordered:
        pieces.append(Piece(layer, name, offset, length))
        splits[owner] += length
        offset += length
    return Bucket(tuple(pieces), tuple(splits))


def even_splits(length: int, ranks: int) -> tuple[int, ...]:
    """Shares as torch.chunk makes them, ceil(length / ranks) each, the last ones shorter or empty (FSDP2, DTensor)."""
    share = -(-length // ranks)
    return tuple(max(0, min(share, length - rank * share)) for rank in range(ranks))


def even_share(length: int, ranks: int, start: int, stop: int) -> int:
    """What ranks start, ..., stop - 1 of `ranks` hold together: sum(even_splits(length, ranks)[start:stop])."""
    share = -(-length // ranks)
    return min(length, stop * share) - min(length, start * share)


def overlaps(source: Sequence[int], target: Sequence[int], rank: int) -> tuple[int, ...]:
    """What `rank` sends to each rank when a buffer shared out as `source` is to be shared out as `target`.

    These are the input splits of torch.distributed.all_to_all_single; the output splits are those of
    overlaps(target, source, rank). Raises ValueError if the buffers differ in length.
    """
    if sum(source) != sum(target):
        raise ValueError(f"expected shares of one buffer, got {sum(source)} and {sum(target)} numbers")
    start = sum(source[:rank])
    stop = start + source[rank]
    sent, first = [], 0
    for length in target:
        last = first + length
        sent.append(max(0, min(stop, last) - max(start, first)))
        first = last
    return tuple(sent)
