"""What ranks do in the tests of sharded K-FAC: train on shares of one batch, and say what came out."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import triton_curv as tc

ROWS = 24  # of a batch over all ranks: shares of 2, 3 and 4 ranks are equal, and halves of them
Batch = tuple[Tensor, Tensor]


def net() -> nn.Sequential:
    """Linear, grouped convolution, LayerNorm, and a parameter without a block."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, groups=2, bias=False),
        nn.Flatten(),
        nn.LayerNorm(16),
        nn.Linear(16, 7),
        nn.PReLU(),
        nn.Linear(7, 3),
    ).double()


class Tied(nn.Module):
    """Pixels as tokens, an embedding and a head of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(7, 5), nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.tanh(self.hidden(self.embed((x.flatten(1) * 2).long().clamp(-3, 3) + 3))))
        return scores.mean(1)


def tied_net() -> nn.Module:
    torch.manual_seed(0)
    return Tied().double()


def batch(step: int, rows: int = ROWS) -> Batch:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 1, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (rows,), generator=generator)


def share(whole: Batch, rank: int, world: int) -> Batch:
    rows = len(whole[0]) // world
    part = slice(rank * rows, (rank + 1) * rows)
    return whole[0][part], whole[1][part]


@dataclass(frozen=True)
class Case:
    """One way to train: wrapper "none", "ddp" or "fsdp", options of KFAC, and of its sharding."""

    wrapper: str
    options: dict[str, Any] = field(default_factory=dict)
    sharding: dict[str, Any] = field(default_factory=dict)
    steps: int = 7
    net: Callable[[], nn.Module] = net

    def __str__(self) -> str:
        return f"{self.wrapper} {self.options} {self.sharding}"


SETTINGS: dict[str, Any] = {"lr": 0.05, "factor_interval": 2, "inverse_interval": 3}


def alone(case: Case) -> tuple[nn.Module, tc.KFAC]:
    """The model and optimizer of one process that sees whole batches."""
    model = case.net()
    return model, tc.KFAC(model, **{**SETTINGS, **case.options}, process_group="alone")


def together(case: Case) -> tuple[nn.Module, tc.KFAC]:
    """The wrapped model and the optimizer of one rank."""
    model: nn.Module = case.net()
    if case.wrapper == "ddp":
        model = DistributedDataParallel(model)
    elif case.wrapper in ("fsdp", "hsdp"):
        shards(model, case.wrapper)
    options = {**SETTINGS, **case.options}
    return model, tc.KFAC(model, **options, sharding=tc.Sharding(**case.sharding))


def shards(model: nn.Module, wrapper: str) -> None:
    """fully_shard of some layers and the rest, over all ranks or, "hsdp", over halves of them."""
    world = dist.get_world_size()
    sizes = (world,) if wrapper == "fsdp" else (2, world // 2)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])
    layers = [layer for layer in model.children() if isinstance(layer, nn.Linear | nn.Conv2d)]
    for layer in layers[1:]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def step(model: nn.Module, optimizer: tc.KFAC, data: Batch) -> None:
    """One step on this rank's share."""
    x, y = data
    summed = optimizer.options.reduction
    optimizer.zero_grad()
    output = model(x)
    if optimizer.options.fisher != "empirical":
        optimizer.sample_fisher(output, "cross_entropy")
    functional.cross_entropy(output, y, reduction=summed).backward()
    if optimizer.options.damping_rule.interval:
        optimizer.step(evaluate=lambda: functional.cross_entropy(model(x), y, reduction=summed))
    else:
        optimizer.step()


def outcome(model: nn.Module, optimizer: tc.KFAC) -> dict[str, Tensor]:
    """All weights and all state, by name: the union of what the ranks hold."""
    named = {name.removeprefix("module."): full(p.detach()) for name, p in model.named_parameters()}
    state = optimizer.state_dict()["state"]
    for index, entries in state.items():
        named |= {f"{index}.{name}": full(value) for name, value in entries.items()}
    return {name: value.clone() for name, value in named.items()}


def full(tensor: Tensor) -> Tensor:
    whole: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if whole is None else whole()


def single(case: Case) -> dict[str, Tensor]:
    model, optimizer = alone(case)
    for i in range(case.steps):
        step(model, optimizer, batch(i))
    return outcome(model, optimizer)


def trained(case: Case, rank: int, world: int) -> dict[str, Tensor]:
    model, optimizer = together(case)
    for i in range(case.steps):
        step(model, optimizer, share(batch(i), rank, world))
    found = outcome(model, optimizer)
    optimizer.detach()
    return found


def packed(value: Any) -> bytes:
    """As bytes: tensors in a pipe would need the process that sent them."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def unpacked(value: Any) -> Any:
    assert isinstance(value, bytes), value
    return torch.load(io.BytesIO(value), weights_only=False)


def same_everywhere(found: dict[str, Tensor]) -> bool:
    """Whether all ranks hold the very same bits."""
    flat = torch.cat([found[name].double().reshape(-1) for name in sorted(found)]).nan_to_num()
    ends = torch.stack((flat, -flat))
    dist.all_reduce(ends, dist.ReduceOp.MIN)
    return torch.equal(ends[0], -ends[1])


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest ||a - b|| / ||b|| (of ||b|| < 1, ||a - b||) of all tensors; the names must be the same."""
    assert set(found) == set(expected), set(found) ^ set(expected)
    errors = [
        float((found[name].double() - e.double()).norm() / e.double().norm().clamp_min(1.0))
        for name, e in expected.items()
    ]
    return max(errors)


@contextmanager
def quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---- batteries: one spawn of processes, many cases


def equality(rank: int, world: int, cases: list[Case]) -> Any:
    """The outcome of each case on rank 0, whether all ranks have it, and whether a second run gives the same bits."""
    results = []
    for i, case in enumerate(cases):
        found = trained(case, rank, world)
        again = trained(case, rank, world) if i < 2 else found
        repeats = all(torch.equal(found[name], again[name]) for name in found)
        results.append((found if rank == 0 else None, same_everywhere(found), repeats))
    return packed(results)
