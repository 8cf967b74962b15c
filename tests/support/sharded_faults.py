"""What ranks do in the tests of accidents: NaN, missing gradients, empty and uneven batches, other models."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import triton_curv as tc
from tests.support.sharded import (
    ROWS,
    SETTINGS,
    Case,
    alone,
    batch,
    net,
    outcome,
    packed,
    same_everywhere,
    share,
    together,
)
from triton_curv.sharding.local import local

STEPS = 5
BARE = Case("none", options={"update_size": "none", "damping": 0.3, "lr": 0.01})
BARE_DDP = Case("ddp", options=BARE.options)


class Branch(nn.Module):
    """A layer that only some samples pass through."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.some, self.last = nn.Linear(16, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor, through: int) -> Tensor:
        h = torch.tanh(self.first(x.flatten(1)))
        if through:
            h = torch.cat([h[:through] + self.some(h[:through]), h[through:]])
        out: Tensor = self.last(h)
        return out


def weighted(optimizer: tc.KFAC, output: Tensor, y: Tensor, world: int) -> Tensor:
    """The loss of a rank whose mean over ranks is the mean over all samples, whatever share each has."""
    optimizer.count(ROWS / world)
    return functional.cross_entropy(output, y, reduction="sum") * world / ROWS


def uneven_shares(world: int) -> list[int]:
    """The first rank has more rows, the last has none."""
    rows = [ROWS // world] * world
    return [rows[0] + rows[-1], *rows[1:-1], 0]


def on_uneven(model: nn.Module, optimizer: tc.KFAC, rank: int, world: int) -> dict[str, Tensor]:
    for i in range(STEPS):
        shares = uneven_shares(world) if world > 1 else [ROWS]
        start = sum(shares[:rank])
        x, y = (t[start : start + shares[rank]] for t in batch(i))
        optimizer.zero_grad()
        output = model(x)
        weighted(optimizer, output, y, world).backward()
        optimizer.step()
    return outcome(model, optimizer)


def through_branch(model: nn.Module, optimizer: tc.KFAC, rank: int, world: int, of_ranks: int) -> dict[str, Tensor]:
    """Only the samples of the first of `of_ranks` ranks pass the branch."""
    for i in range(STEPS):
        x, y = share(batch(i), rank, world)
        optimizer.zero_grad()
        optimizer.count(len(x))
        through = ROWS // of_ranks if rank == 0 else 0
        functional.cross_entropy(model(x, through), y).backward()
        optimizer.step()
    return outcome(model, optimizer)


def branch_pair(wrapper: str, world: int) -> tuple[nn.Module, tc.KFAC]:
    model: nn.Module = Branch()
    if wrapper == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    where: Any = "auto" if world > 1 else "alone"
    return model, tc.KFAC(model, **{**SETTINGS, **BARE.options}, process_group=where)


def in_micro_batches(model: nn.Module, optimizer: tc.KFAC, rank: int, world: int) -> dict[str, Tensor]:
    """Two halves of the share a step, the first without synchronisation where the model can."""
    for i in range(STEPS):
        x, y = share(batch(i), rank, world)
        optimizer.zero_grad()
        half = len(x) // 2
        if isinstance(model, DistributedDataParallel):
            with model.no_sync():
                (functional.cross_entropy(model(x[:half]), y[:half]) / 2).backward()
        else:
            (functional.cross_entropy(model(x[:half]), y[:half]) / 2).backward()
        (functional.cross_entropy(model(x[half:]), y[half:]) / 2).backward()
        optimizer.step()
    return outcome(model, optimizer)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()


def compiled(rank: int, world: int) -> dict[str, Tensor]:
    """The optimizer gets the module, not DDP's wrapper: that averages gradients, and to average again does no harm."""
    inner = small()
    where: Any = "auto" if world > 1 else "alone"
    optimizer = tc.KFAC(
        inner, **{**SETTINGS, **BARE.options}, process_group=where, sharding=tc.Sharding(gather="inverses")
    )
    model: nn.Module = inner
    if world > 1:
        model = DistributedDataParallel(torch.compile(inner, backend="aot_eager", fullgraph=True))
    for i in range(STEPS):
        x, y = share(batch(i), rank, world)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return outcome(inner, optimizer)


def with_nan(case: Case, rank: int, world: int) -> dict[str, Any]:
    """At step 2, which takes statistics, the loss of the last rank is NaN."""
    model, optimizer = together(case)
    before: list[Tensor] = []
    for i in range(STEPS):
        x, y = share(batch(i), rank, world)
        optimizer.zero_grad()
        if i == 2:
            before = [local(p.detach()).clone() for p in model.parameters()]
        loss = functional.cross_entropy(model(x), y)
        if i == 2:
            loss = loss * (torch.nan if rank == world - 1 else 1.0)
        loss.backward()
        optimizer.step()
        if i == 2:
            kept = all(torch.equal(a, local(b.detach())) for a, b in zip(before, model.parameters(), strict=True))
    return {
        "kept": kept,
        "same": same_everywhere(outcome(model, optimizer)),
        "finite": all(bool(local(p.detach()).isfinite().all()) for p in model.parameters()),
        "health": optimizer.health()["optimizer"],
    }


def mixed_precision(rank: int, world: int) -> list[float]:
    """Losses of a model whose layers compute in bfloat16 under FSDP2, its weights and factors in float32."""
    model = net().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)), mp_policy=policy)
    optimizer = tc.KFAC(model, **SETTINGS)
    losses = []
    x, y = share(batch(0), rank, world)
    for _ in range(12):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x.float()).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def refusal(build: Callable[[], object]) -> str:
    try:
        build()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def other_widths(rank: int) -> None:
    tc.KFAC(nn.Linear(3, 2 + (rank == 0)))


def other_weights(rank: int) -> None:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(rank)
    tc.KFAC(model)


def not_owned(rank: int, world: int) -> list[str]:
    model, optimizer = together(BARE)
    x, y = share(batch(0), rank, world)
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    return [refusal(block.factors) for block in optimizer.blocks.values()]


def accidents(rank: int, world: int) -> Any:
    found: dict[str, Any] = {
        "uneven none": on_uneven(*together(BARE), rank, world),
        "uneven ddp": on_uneven(*together(BARE_DDP), rank, world),
        "branch none": through_branch(*branch_pair("none", world), rank, world, world),
        "branch ddp": through_branch(*branch_pair("ddp", world), rank, world, world),
        "micro none": in_micro_batches(*together(BARE), rank, world),
        "micro ddp": in_micro_batches(*together(BARE_DDP), rank, world),
        "compiled": compiled(rank, world),
        "nan none": with_nan(BARE, rank, world),
        "nan ddp": with_nan(BARE_DDP, rank, world),
        "nan fsdp": with_nan(replace(BARE, wrapper="fsdp"), rank, world),
        "mixed": mixed_precision(rank, world),
        "widths": refusal(lambda: other_widths(rank)),
        "weights": refusal(lambda: other_weights(rank)),
        "not owned": not_owned(rank, world),
    }
    return packed(found)


def expectations(world: int) -> dict[str, dict[str, Tensor]]:
    """What one process makes of the same samples."""
    model, optimizer = alone(BARE)
    whole = on_uneven(model, optimizer, 0, 1)
    branched = through_branch(*branch_pair("none", 1), 0, 1, world)
    return {"uneven": whole, "micro": whole, "compiled": compiled(0, 1), "branch": branched}
