"""Bytes that ranks send in a step of K-FAC, as their channels count them, beside the plan's."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import triton_curv as tc
from tests.support.sharded import batch, net, share
from triton_curv.sharding.options import Sharding
from triton_curv.sharding.traffic import Wire, transfers

CASES: dict[str, tuple[str, float, bool]] = {  # wrapper, grad_worker_fraction, whether there are two replicas
    "plain": ("plain", 0.0, False),
    "two workers a layer": ("plain", 0.5, False),
    "all ranks work": ("plain", 1.0, False),
    "replicas": ("plain", 0.0, True),
    "ddp": ("ddp", 0.0, False),
    "fsdp": ("fsdp", 0.0, False),
    "fsdp, two workers a layer": ("fsdp", 0.5, False),
}


def counted(rank: int) -> dict[str, Any]:
    """By case and kind of collective: bytes sent by this rank when everything is due, and by the plan."""
    return {name: _counted(rank, *case) for name, case in CASES.items()}


def _counted(rank: int, wrapper: str, fraction: float, replicas: bool) -> tuple[dict[str, int], dict[str, int], int]:
    world = dist.get_world_size()
    model: Any = net()
    where: Any = init_device_mesh("cpu", (2, world // 2)) if replicas else "auto"
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    if wrapper == "fsdp":
        fully_shard(model)
    kfac = tc.KFAC(
        model, process_group=where, sharding=Sharding(grad_worker_fraction=fraction, collectives="uneven"), momentum=0.0
    )
    before = dict(kfac._exchange.channels.ledger.sent)  # type: ignore[attr-defined]  # of several ranks
    x, y = share(batch(0), rank, world)
    functional.cross_entropy(model(x), y).backward()
    kfac.step()
    sent = {k: n - before.get(k, 0) for k, n in kfac._exchange.channels.ledger.sent.items()}  # type: ignore[attr-defined]
    plan = kfac._exchange.plan  # type: ignore[attr-defined]
    numbers = sum(p.numel() for p in model.parameters())
    loose = numbers - plan.bucket_gradients.length
    planned: dict[str, int] = {}
    for t in transfers(plan, Wire(wrapper, 8, 8, loose)):
        if not (t.early and t.stage.startswith("gradients")):  # these are the wrapper's own
            planned[t.collective] = planned.get(t.collective, 0) + t.sent[rank % plan.grid.size]
    of_blocks = sum(row.bytes_sent for row in kfac.explain().rows)
    assert abs(of_blocks - sum(t.sent[rank % plan.grid.size] for t in transfers(plan, Wire(wrapper, 8, 8)))) < 700
    matrices = sum(f.batch for layer in plan.layers for f in layer.factors)
    torch.manual_seed(0)
    return sent, planned, matrices
