"""A run on the ranks that torchrun started: one model on all of them, a share of each batch on every one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from triton_curv.training.errors import SettingError

Parallel = Literal["ddp", "fsdp"]
SHARING = ("sgd", "adamw", "kfac")
"""Optimizers of the command line that train one model on several ranks."""
WANTED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """A process among those that train together, and how they share the model."""

    parallel: Parallel
    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this one prints and writes files."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """DDP around the model, or its parameters sharded, layer by layer and the rest together."""
        if self.parallel == "ddp":
            return DistributedDataParallel(model)
        mesh = init_device_mesh(self.device.type, (self.world,))
        for child in model.children():
            if any(True for _ in child.parameters()):
                fully_shard(child, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def share(self, rows: Tensor) -> Tensor:
        """The part of a batch that is this rank's. Raises SettingError unless all get as many."""
        if len(rows) % self.world:
            raise SettingError(f"expected a batch that {self.world} ranks can share evenly, got {len(rows)} rows")
        part = len(rows) // self.world
        return rows[self.rank * part : (self.rank + 1) * part]

    def any(self, flag: bool) -> bool:
        """Whether it is raised on some rank."""
        flags = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())

    def on_first(self, work: Callable[[], T]) -> T | None:
        """What rank 0's `work` returns, None elsewhere; what it raises is raised on all ranks."""
        result, error = None, None
        if self.first:
            try:
                result = work()
            except Exception as raised:
                error = raised
        sent = [error]
        dist.broadcast_object_list(sent, src=0)
        if sent[0] is not None:
            raise sent[0]
        return result

    # ---- whole states, on every rank, for one file

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Parameters and buffers by the names of the bare model."""
        inner = bare(model)
        return {name: _whole(tensor) for name, tensor in inner.state_dict().items()}

    def set_weights(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Raises RuntimeError, as torch's load_state_dict does, where names or shapes differ."""
        inner = bare(model)
        own = inner.state_dict()
        cut = {name: _like(tensor, own[name]) if name in own else tensor for name, tensor in weights.items()}
        inner.load_state_dict(cut)

    def optimizer_state(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Whole tensors, by the names of parameters."""
        options = StateDictOptions(full_state_dict=True)
        return get_optimizer_state_dict(bare(model), optimizer, options=options)

    def set_optimizer_state(self, model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """What `optimizer_state` returned, on any number of ranks."""
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(bare(model), optimizer, state, options=options)


def bare(model: nn.Module) -> nn.Module:
    """The model without DDP's wrapper."""
    if isinstance(model, DistributedDataParallel):
        inner: nn.Module = model.module
        return inner
    return model


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(tensor: Tensor, own: Tensor) -> Tensor:
    if not isinstance(own, DTensor) or tensor.shape != own.shape:
        return tensor
    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


@contextmanager
def joined(parallel: str, optimizer: str, device: str, timeout: timedelta) -> Iterator[Ranks]:
    """The process group of the ranks that torchrun started, for as long as the context lasts.

    Raises:
        SettingError: Where there are none, or `parallel` or the optimizer does not share a model.

    """
    if parallel not in get_args(Parallel):
        raise SettingError(f"expected --parallel to be ddp or fsdp, got {parallel!r}")
    if optimizer not in SHARING:
        raise SettingError(
            f"expected an optimizer that trains on several ranks, {', '.join(SHARING)}, got {optimizer!r}"
        )
    missing = [name for name in WANTED if name not in os.environ]
    if missing:
        raise SettingError(
            f"expected --parallel under a launcher that sets {', '.join(missing)}: start it with "
            "`torchrun --nproc-per-node N -m triton_curv train ...`"
        )
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    # torchrun may hand a restarted run the store of the run that died: addresses of dead ranks must not be found there
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "nccl" if place.type == "cuda" else "gloo",
        store=PrefixStore(f"attempt {attempt}", store),
        rank=rank,
        world_size=world,
        timeout=timeout,
    )
    try:
        yield Ranks("ddp" if parallel == "ddp" else "fsdp", dist.get_rank(), dist.get_world_size(), place)
    finally:
        dist.destroy_process_group()
