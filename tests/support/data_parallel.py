"""Training on ranks and the same training in one process, for the optimizers that see curvature through products."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation
from torch.nn.parallel import DistributedDataParallel

import triton_curv as tc
from triton_curv.errors import ConfigurationError
from triton_curv.sharding.options import Sharding

STEPS, SAMPLES = 3, 12
SHARES = {1: (12,), 2: (6, 6), 3: (4, 4, 4), 4: (3, 3, 3, 3)}
UNEVEN = {1: (12,), 2: (9, 3), 3: (7, 0, 5), 4: (7, 0, 1, 4)}


class Case(NamedTuple):
    """An optimizer and its options, and how the model is wrapped: "none", "ddp", "fsdp" or "hsdp"."""

    optimizer: str
    wrapper: str
    options: tuple[tuple[str, Any], ...] = ()
    uneven: bool = False

    @property
    def name(self) -> str:
        """Readable."""
        options = ",".join(f"{key}={value}" for key, value in self.options)
        return f"{self.optimizer}({options}) {self.wrapper}{' uneven' if self.uneven else ''}"


def small_model() -> nn.Sequential:
    """Sizes that 2 and 3 ranks shard unevenly; the last layer leaves a third rank without any of it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    """All samples of a step."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(SAMPLES, 5, generator=generator, dtype=torch.float64)
    return x, torch.sin(x[:, :2] + x[:, 2:4])


def part_of(batch: tuple[Tensor, Tensor], rank: int, shares: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What one rank sees of it."""
    x, y = (t.split(list(shares))[rank] for t in batch)
    return x, y


def loss_of(output: Tensor, y: Tensor, shares: Sequence[int]) -> Tensor:
    """(ranks / all samples) times the rank's sum; its mean if all have as many."""
    return F.mse_loss(output, y, reduction="sum") * len(shares) / (sum(shares) * y.shape[1])


def wrapped(model: nn.Sequential, wrapper: str) -> nn.Module:
    """In DDP or FSDP2."""
    if wrapper in ("fsdp", "hsdp"):
        world = dist.get_world_size()
        two = (2, world // 2) if world % 2 == 0 else (1, world)
        names = ("replicate", "shard")
        mesh = (
            init_device_mesh("cpu", two, mesh_dim_names=names)
            if wrapper == "hsdp"
            else init_device_mesh("cpu", (world,))
        )
        fully_shard(model[2], mesh=mesh)
        fully_shard(model, mesh=mesh)
    return DistributedDataParallel(model) if wrapper == "ddp" else model


def optimizer_for(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    """As the case has it."""
    options = dict(case.options)
    if case.optimizer == "neumann":
        first, *others = model.parameters()
        groups: list[dict[str, Any]] = [{"params": [first]}, {"params": others, "lr": 0.05}]
        return tc.Neumann(groups, lr=0.1, warmup=1, period=2, **options)
    if case.optimizer == "newton-kfac":
        kfac = tc.KFAC(model, damping=0.1, factor_interval=1, sharding=Sharding(gather="inverses"))
        return tc.NewtonCG(model, preconditioner=kfac, **options)
    if case.optimizer == "inner":
        return tc.NeumannInner(model, **options)
    return tc.SGN(model, **options) if case.optimizer == "sgn" else tc.NewtonCG(model, **options)


def one_step(case: Case, model: nn.Module, opt: Any, part: tuple[Tensor, Tensor], shares: Sequence[int]) -> float:
    """The loss before it."""
    x, y = part
    if case.optimizer == "neumann":
        opt.zero_grad()
        loss = loss_of(model(x), y, shares)
        loss.backward()
        opt.step()
        return float(loss.detach())

    def closure() -> Any:
        output = model(x)
        loss = loss_of(output, y, shares)
        return (loss, output) if case.optimizer == "sgn" else loss

    return float(opt.step(closure))


def whole(tensors: Sequence[Tensor]) -> list[Any]:
    """As NumPy arrays, gathered if sharded."""
    return [(t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone().numpy() for t in tensors]


def train(case: Case, rank: int, shares: Sequence[int]) -> tuple[list[Any], list[float]]:
    """Weights after some steps, and all losses."""
    model = wrapped(small_model(), case.wrapper)
    opt = optimizer_for(case, model)
    losses = [one_step(case, model, opt, part_of(batch_of(s), rank, shares), shares) for s in range(STEPS)]
    return whole(list(model.parameters())), losses


def all_cases(rank: int, cases: Sequence[Case]) -> dict[str, Any]:
    """Each case twice."""
    shares = {False: SHARES, True: UNEVEN}
    world = dist.get_world_size()
    return {case.name: [train(case, rank, shares[case.uneven][world]) for _ in range(2)] for case in cases}


def failing(rank: int, what: str) -> list[Any]:
    """A step in which rank 1's closure raises or gives NaN, then a good one: errors, weights before and after."""
    builders: list[Callable[[nn.Module], Any]] = [
        lambda model: tc.NewtonCG(model),
        lambda model: tc.NewtonCG(model, data_parallel="average_updates"),
        lambda model: tc.SGN(model),
    ]
    return [_failing_step(build, what if rank == 1 else "nothing", rank) for build in builders]


def refused(rank: int) -> list[str]:
    """Errors of preconditioners that ranks can't share."""
    found = []
    for wrapper, sharding in (("none", Sharding()), ("fsdp", Sharding(gather="inverses"))):
        model = wrapped(small_model(), wrapper)
        try:
            tc.NewtonCG(model, preconditioner=tc.KFAC(model, sharding=sharding))
            found.append("none")
        except ConfigurationError as error:
            found.append(str(error))
    return found


def _failing_step(build: Callable[[nn.Module], Any], what: str, rank: int) -> tuple[str, bool, float]:
    model = small_model()
    opt = build(model)
    x, y = part_of(batch_of(0), rank, SHARES[dist.get_world_size()])
    planted = [what, "nothing"]

    def closure() -> Any:
        if planted[0] == "raises":
            raise RuntimeError("planted")
        output = model(x)
        loss = F.mse_loss(output, y) * (float("nan") if planted[0] == "nan" else 1.0)
        return (loss, output) if isinstance(opt, tc.SGN) else loss

    before = whole(list(model.parameters()))
    try:
        opt.step(closure)
        error = "none"
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    same = all((a == b).all() for a, b in zip(before, whole(list(model.parameters())), strict=True))
    planted.pop(0)
    return error, same, float(opt.step(closure))
