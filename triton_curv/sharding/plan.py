"""Which rank inverts which factor and preconditions which layer. Integers in, integers out."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from triton_curv.errors import ConfigurationError
from triton_curv.sharding.balance import Work, least_time, longest_first, share_out
from triton_curv.sharding.buckets import Bucket, bucket_of
from triton_curv.sharding.costs import A100, Machine, apply_ns, inverse_ns
from triton_curv.sharding.grid import Grid, grid_for
from triton_curv.sharding.layers import LayerSize


@dataclass(frozen=True)
class PlanOptions:
    """What a plan is made for.

    Args:
        world_size: ranks, all of them data-parallel.
        shard_size: ranks that hold every factor once: the shard dimension of an HSDP mesh. None: all ranks.
        grad_worker_fraction: share of these ranks that hold a layer's inverses and precondition it. 0: one rank, which
            sends the result to the others (least memory); 1: all of them, and no preconditioned gradient is sent.
            Rounded to the nearest divisor of shard_size.
        inverse_interval: steps from one inversion to the next: preconditioning counts so many times in the balance.
        bucket_elements: a bucket is closed when it holds so many numbers, so that it can leave while the backward pass
            goes on; None: one bucket for each kind.
        machine: rates of the cost model. Only their ratios change the plan.

    Raises:
        ConfigurationError: a number out of range.

    """

    world_size: int
    shard_size: int | None = None
    grad_worker_fraction: float = 0.0
    inverse_interval: int = 1
    bucket_elements: int | None = None
    machine: Machine = A100

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ConfigurationError(f"expected a world of at least one rank, got {self.world_size}")
        if self.shard_size is not None and (self.shard_size < 1 or self.world_size % self.shard_size):
            raise ConfigurationError(
                f"expected shard_size to divide the world of {self.world_size} ranks, got {self.shard_size}"
            )
        if not 0 <= self.grad_worker_fraction <= 1:
            raise ConfigurationError(f"expected grad_worker_fraction in [0, 1], got {self.grad_worker_fraction}")
        if self.inverse_interval < 1 or (self.bucket_elements is not None and self.bucket_elements < 1):
            raise ConfigurationError(
                "expected inverse_interval and bucket_elements of at least 1, got "
                f"{self.inverse_interval} and {self.bucket_elements}"
            )


@dataclass(frozen=True)
class Load:
    """Work of one rank in ns: `inverse` once every `inverse_interval` steps, `apply` at every step."""

    inverse: int
    apply: int


@dataclass(frozen=True)
class Plan:
    """The owners of all layers and factors.

    Args:
        layers: in the order of the model.
        options: what the plan was made for.
        grid: the ranks; every replica is planned alike.
        columns: for each layer, the column of ranks that precondition it.
        inverters: for each layer and each of its factors, the row of the rank in that column that inverts it.

    """

    layers: tuple[LayerSize, ...]
    options: PlanOptions
    grid: Grid
    columns: tuple[int, ...]
    inverters: tuple[tuple[int, ...], ...]

    # ---- who

    def owner(self, layer: int, factor: int, replica: int = 0) -> int:
        """The rank that keeps and inverts a factor: exactly one in each replica."""
        return self.grid.rank(replica, self.inverters[layer][factor], self.columns[layer])

    def workers(self, layer: int, replica: int = 0) -> tuple[int, ...]:
        """The ranks that hold the inverses of a layer and precondition it: one in each row."""
        return self.grid.column_group(self.grid.rank(replica, 0, self.columns[layer]))

    def layers_of(self, rank: int) -> tuple[int, ...]:
        """The layers that a rank preconditions, in the order of the model."""
        return self._layers_of_column[self.grid.place(rank)[2]]

    def factors_of(self, rank: int) -> tuple[tuple[int, int], ...]:
        """(layer, number of the factor) that a rank inverts, in the order of the model."""
        return self._factors_of_position[rank % self.grid.size]

    @cached_property
    def _layers_of_column(self) -> tuple[tuple[int, ...], ...]:
        found: list[list[int]] = [[] for _ in range(self.grid.columns)]
        for layer, column in enumerate(self.columns):
            found[column].append(layer)
        return tuple(map(tuple, found))

    @cached_property
    def _factors_of_position(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        found: list[list[tuple[int, int]]] = [[] for _ in range(self.grid.size)]
        for layer, rows in enumerate(self.inverters):
            for factor in range(len(rows)):
                found[self.owner(layer, factor)].append((layer, factor))
        return tuple(map(tuple, found))

    @cached_property
    def digest(self) -> str:
        """A hash of everything: ranks that hold the same have the same plan."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    # ---- where it lies

    @cached_property
    def buckets_A(self) -> tuple[Bucket, ...]:  # noqa: N802
        """Packed triangles of the A factors, over a replica's ranks, for reduce-scatter; last layers first."""
        return self._factor_buckets("A")

    @cached_property
    def buckets_G(self) -> tuple[Bucket, ...]:  # noqa: N802
        """Packed triangles of the G factors and of the norm layers' F, over a replica's ranks; last layers first."""
        return self._factor_buckets("GF")

    @cached_property
    def bucket_gradients(self) -> Bucket:
        """Gradient matrices over a row's ranks: to the workers before preconditioning, to everyone after it."""
        contents = ((column, i, "gradient", self.layers[i].gradient) for i, column in enumerate(self.columns))
        return bucket_of(contents, self.grid.columns)

    def bucket_inverses(self, column: int) -> Bucket:
        """Packed inverses of a column's layers over its ranks: everyone of the column gets them all."""
        contents = (
            (row, i, factor.name, factor.packed)
            for i in self._layers_of_column[column]
            for row, factor in zip(self.inverters[i], self.layers[i].factors, strict=True)
        )
        return bucket_of(contents, self.grid.rows)

    def _factor_buckets(self, kinds: str) -> tuple[Bucket, ...]:
        """Buckets of about `bucket_elements` numbers, each of layers that follow one another in the backward pass."""
        limit = self.options.bucket_elements
        buckets: list[Bucket] = []
        contents: list[tuple[int, int, str, int]] = []
        held = 0
        for i in reversed(range(len(self.layers))):
            for number, factor in enumerate(self.layers[i].factors):
                if factor.name[0] in kinds:
                    contents.append((self.owner(i, number), i, factor.name, factor.packed))
                    held += factor.packed
            if limit is not None and held >= limit:
                buckets.append(bucket_of(contents, self.grid.size))
                contents, held = [], 0
        if contents:
            buckets.append(bucket_of(contents, self.grid.size))
        return tuple(buckets)

    # ---- how well it is shared out

    @cached_property
    def loads(self) -> tuple[Load, ...]:
        """The work of each rank of a replica."""
        machine = self.options.machine
        inverse, apply = [0] * self.grid.size, [0] * self.grid.columns
        for i, layer in enumerate(self.layers):
            apply[self.columns[i]] += apply_ns(layer, machine)
            for number, factor in enumerate(layer.factors):
                inverse[self.owner(i, number)] += inverse_ns(factor, machine)
        return tuple(Load(inverse[i], apply[i % self.grid.columns]) for i in range(self.grid.size))

    @cached_property
    def critical_path(self) -> int:
        """ns of inverses and preconditioning of the busiest rank, over one inverse_interval."""
        return max(load.inverse + self.options.inverse_interval * load.apply for load in self.loads)

    @cached_property
    def lower_bound(self) -> int:
        """ns that the busiest rank of any plan on this grid needs, over one inverse_interval."""
        return least_time(_works(_costs(self.layers, self.options), self.options), self.grid.rows, self.grid.columns)

    @property
    def balance(self) -> float:
        """Critical path over its lower bound; 1 is perfect. With one row longest-first is within 4/3 of the best."""
        return self.critical_path / self.lower_bound


def make_plan(layers: Sequence[LayerSize], options: PlanOptions) -> Plan:
    """Layers to columns and factors to rows, longest processing time first (Graham 1969), ties to the lowest number.

    Raises ConfigurationError if there is no layer.
    """
    if not layers:
        raise ConfigurationError("expected at least one layer, got none")
    grid = grid_for(options.world_size, options.shard_size or options.world_size, options.grad_worker_fraction)
    costs = _costs(layers, options)
    columns = share_out(_works(costs, options), grid.rows, grid.columns)
    members: dict[int, list[tuple[int, int]]] = {}
    for i, column in enumerate(columns):
        members.setdefault(column, []).extend((i, factor) for factor in range(len(layers[i].factors)))
    inverters = [[0] * len(layer.factors) for layer in layers]
    for factors in members.values():
        rows = longest_first([costs[i][1][factor] for i, factor in factors], grid.rows)
        for (i, factor), row in zip(factors, rows, strict=True):
            inverters[i][factor] = row
    return Plan(tuple(layers), options, grid, tuple(columns), tuple(map(tuple, inverters)))


def _costs(layers: Sequence[LayerSize], options: PlanOptions) -> list[tuple[int, tuple[int, ...]]]:
    """For each layer the ns of preconditioning it, and of inverting each of its factors."""
    machine = options.machine
    return [
        (apply_ns(layer, machine), tuple(inverse_ns(factor, machine) for factor in layer.factors)) for layer in layers
    ]


def _works(costs: Sequence[tuple[int, tuple[int, ...]]], options: PlanOptions) -> list[Work]:
    return [Work(options.inverse_interval * apply, inverses) for apply, inverses in costs]
