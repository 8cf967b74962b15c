"""Ranks as replicas of rows and columns."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """World = `replicas` x (`rows` x `columns`); rank = (replica * rows + row) * columns + column.

    A replica is what holds every factor once: the shard dimension of an HSDP mesh, or the whole world. Inside it each
    layer belongs to one column, whose `rows` ranks all precondition it; a row holds every layer once. Hence:

    * rows = 1: one rank preconditions a layer and sends the result to all (gather="gradients", the paper),
    * columns = 1: all ranks hold all inverses and nobody sends preconditioned gradients (gather="inverses").
    """

    replicas: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Ranks in a replica."""
        return self.rows * self.columns

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.replicas * self.size

    def rank(self, replica: int, row: int, column: int) -> int:
        """The rank at a place."""
        return (replica * self.rows + row) * self.columns + column

    def place(self, rank: int) -> tuple[int, int, int]:
        """(replica, row, column) of a rank."""
        replica, position = divmod(rank, self.size)
        return replica, *divmod(position, self.columns)

    def replica_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold every factor once between them: statistics are reduce-scattered among them."""
        start = rank - rank % self.size
        return tuple(range(start, start + self.size))

    def row_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold every layer once between them: preconditioned gradients are gathered among them."""
        start = rank - rank % self.columns
        return tuple(range(start, start + self.columns))

    def column_group(self, rank: int) -> tuple[int, ...]:
        """Ranks of a replica that precondition the same layers: inverses are gathered among them."""
        replica, _, column = self.place(rank)
        return tuple(self.rank(replica, row, column) for row in range(self.rows))

    def peer_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that own the same factors, one a replica: statistics are all-reduced among them."""
        return tuple(range(rank % self.size, self.world_size, self.size))


def grid_for(world_size: int, shard_size: int, grad_worker_fraction: float) -> Grid:
    """The grid whose number of rows is the divisor of `shard_size` nearest to fraction * shard_size, at least 1."""
    wanted = grad_worker_fraction * shard_size
    small = [n for n in range(1, int(shard_size**0.5) + 1) if shard_size % n == 0]
    rows = min({*small, *(shard_size // n for n in small)}, key=lambda n: (abs(n - wanted), n))
    return Grid(world_size // shard_size, rows, shard_size // rows)
