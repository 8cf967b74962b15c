"""Which ranks train a model together, found from the model itself, and the channels between them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from triton_curv.errors import ConfigurationError, RankMismatchError
from triton_curv.sharding.exchange import Channel, Ledger
from triton_curv.sharding.grid import Grid
from triton_curv.sharding.options import Sharding

Wrapper = Literal["none", "ddp", "fsdp"]
Where = dist.ProcessGroup | DeviceMesh | Literal["auto", "alone"]


@dataclass(frozen=True)
class Found:
    """The ranks that train a model: `ranks` in the order of the plan, `shard_size` of them hold all factors once."""

    model: nn.Module
    wrapper: Wrapper
    ranks: tuple[int, ...]
    shard_size: int
    ddp: DistributedDataParallel | None = None
    mesh: DeviceMesh | None = None


def find_ranks(model: nn.Module, where: Where) -> Found:
    """The ranks that `model` is trained on: those of its DDP wrapper, of the mesh of its DTensors, or `where`.

    "auto" for a model that is not wrapped means all ranks, if torch.distributed is initialised; "alone" this process.
    A two-dimensional mesh is (replicate, shard): each of its rows holds all factors.

    Raises:
        ConfigurationError: parameters that are sharded another way than by FSDP2 over one mesh, or a mesh or group
            that contradicts the model's own.

    """
    ddp = model if isinstance(model, DistributedDataParallel) else None
    inner: nn.Module = model if ddp is None else ddp.module
    mesh = mesh_of(inner.parameters())
    if mesh is not None:
        if where == "alone" or (isinstance(where, DeviceMesh) and where != mesh):
            raise ConfigurationError(f"expected the mesh of the model's own parameters, {mesh}, got {where}")
        return _on_mesh(inner, "fsdp", mesh, None)
    wrapper: Wrapper = "none" if ddp is None else "ddp"
    if isinstance(where, DeviceMesh):
        return _on_mesh(inner, wrapper, where, ddp)
    if where == "alone" or not (dist.is_available() and dist.is_initialized()):
        return Found(inner, wrapper, (0,), 1, ddp)
    group = (ddp.process_group if ddp is not None else dist.group.WORLD) if where == "auto" else where
    assert group is not None
    ranks = tuple(dist.get_process_group_ranks(group))
    return Found(inner, wrapper, ranks, len(ranks), ddp)


def mesh_of(params: Iterable[Tensor]) -> DeviceMesh | None:
    """The mesh over which FSDP2 has sharded the parameters; None for ordinary tensors. Raises ConfigurationError."""
    params = list(params)
    meshes: list[DeviceMesh] = []
    for p in params:
        if isinstance(p, DTensor):
            last, *others = p.placements[::-1]
            if type(last) is not Shard or any(type(other) is not Replicate for other in others) or len(others) > 1:
                raise ConfigurationError(
                    f"expected parameters sharded by fully_shard over (shard) or (replicate, shard), got {p.placements}"
                )
            if p.device_mesh not in meshes:
                meshes.append(p.device_mesh)
    if not meshes:
        return None
    if len(meshes) > 1:
        raise ConfigurationError(f"expected all parameters on one mesh, got {meshes}")
    loose = [p for p in params if p.requires_grad and not isinstance(p, DTensor)]
    if loose:
        raise ConfigurationError(
            f"expected all trainable parameters sharded by fully_shard, got {len(loose)} that are not: apply it to the "
            "model itself, too"
        )
    return meshes[0]


def _on_mesh(model: nn.Module, wrapper: Wrapper, mesh: DeviceMesh, ddp: DistributedDataParallel | None) -> Found:
    if mesh.ndim > 2:
        raise ConfigurationError(f"expected a mesh (shard) or (replicate, shard), got {mesh}")
    ranks = tuple(int(r) for r in mesh.mesh.flatten().tolist())
    return Found(model, wrapper, ranks, mesh.size(mesh.ndim - 1), ddp, mesh)


@dataclass(frozen=True)
class Channels:
    """The groups of the plan that this rank is in. `everyone`: all; the others as in `Grid`.

    `early` has the ranks of `replica`, for what leaves during the backward pass: not every rank sends it that early, so
    that its place among other collectives would differ.
    """

    everyone: Channel
    early: Channel
    replica: Channel
    row: Channel
    column: Channel
    peers: Channel
    place: int

    @property
    def ledger(self) -> Ledger:
        """Bytes sent over all of them."""
        return self.everyone.ledger


def open_channels(found: Found, grid: Grid, sharding: Sharding, device: torch.device) -> Channels:
    """Groups of our own, so that our collectives never queue behind or between those of DDP. Called by all ranks."""
    me = dist.get_rank() if len(found.ranks) > 1 else found.ranks[0]
    place = found.ranks.index(me)
    ledger = Ledger()
    opened: dict[tuple[tuple[int, ...], str], Channel] = {}

    def channel(places: Sequence[int], purpose: str = "") -> Channel:
        members = tuple(found.ranks[i] for i in places)
        if (members, purpose) not in opened:
            group = None
            if len(members) > 1:
                if list(members) != sorted(members):
                    raise ConfigurationError(f"expected ranks of a group in ascending order, got {members}")
                group = dist.new_group(list(members), timeout=timeout(device), use_local_synchronization=True)
            opened[members, purpose] = Channel(
                group, len(members), members.index(me), sharding.wire, sharding.collectives, ledger
            )
        return opened[members, purpose]

    return Channels(
        everyone=channel(range(len(found.ranks))),
        early=channel(grid.replica_group(place), "early" if sharding.overlap else ""),
        replica=channel(grid.replica_group(place)),
        row=channel(grid.row_group(place)),
        column=channel(grid.column_group(place)),
        peers=channel(grid.peer_group(place)),
        place=place,
    )


def timeout(device: torch.device) -> timedelta:
    """How long the default group waits for a rank; new groups would wait for half an hour."""
    backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device(device.type))
    return backend.options._timeout


def require_equal(channel: Channel, device: torch.device, digest: str, weights: Sequence[Tensor]) -> None:
    """Check that all ranks plan the same for the same model, and start from the same `weights`.

    Raises RankMismatchError on all ranks otherwise.
    """
    if channel.size == 1:
        return
    number = int(digest[:15], 16)
    mine = torch.tensor([number, -number], dtype=torch.int64, device=device)
    low = channel.all_reduce(mine, dist.ReduceOp.MIN).wait()
    if int(low[0]) != -int(low[1]):
        raise RankMismatchError(
            "expected the same model and the same options of KFAC on every rank, got others on some: layers, shapes, "
            "order of parameters or arguments differ"
        )
    if not weights:
        return
    sums = torch.stack([torch.stack((w.double().sum(), w.double().abs().sum())) for w in weights])
    ends = channel.all_reduce(torch.stack((sums, -sums)), dist.ReduceOp.MIN).wait()
    if not torch.equal(ends[0], -ends[1]):
        raise RankMismatchError(
            "expected the same weights on every rank, got others on some: seed them alike, or broadcast them"
        )
