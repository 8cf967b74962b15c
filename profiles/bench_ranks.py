"""K-FAC on gloo ranks of this machine: bytes each rank sends for ResNet-50, counted, and strong scaling of a small net.

python -m profiles.bench_ranks [--world N ...] [--only bytes|scaling] [--csv-bytes FILE] [--csv-scaling FILE]

Bytes: a real ResNet-50 takes one step with everything due and one with nothing due, on ranks without a wrapper; what
the channels sent is counted by ring rules (all-reduce 2 (n - 1)/n of the buffer, reduce-scatter all but the own share,
all-gather all but the next rank's). Both steps, weighted by a schedule of stale statistics, give the mean step; next
to it stand the plan's numbers, and SGD's ring all-reduce. Of SP-NGD's adaptive schedule (arXiv 2002.06015 Table 2) only
the share of statistics that is still sent is known; it is applied to our statistics.

Scaling: the same batch on 1 and 2 processes of one thread. `cpu_ms` is processor time of the busiest rank in a mean
step, which other work on the machine does not change much; `wall_ms`, the fastest of some rounds, it does.
"""

import argparse
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional

import triton_curv as tc
from profiles.machine import append_rows
from profiles.models import resnet50
from triton_curv.schedules import osawa_growing, osawa_two_phases
from triton_curv.sharding.layers import layer_sizes
from triton_curv.sharding.plan import PlanOptions, make_plan
from triton_curv.sharding.traffic import Transfer, Wire, bytes_at_most, reducing, transfers

MIB = 2**20
EPOCHS, STEPS_PER_EPOCH = 45, 39  # batch 32,768: 1,760 steps (arXiv 1811.12019 Table 1)
SPNGD_SENT = {"4,096": 0.236, "8,192": 0.151, "16,384": 0.054, "32,768": 0.078}
ROUNDS, BATCH = 4, 64


@dataclass(frozen=True)
class ByteRow:
    """MiB that the busiest sender sends in a mean step under a schedule, and SGD's; shares of steps with statistics."""

    ranks: int
    schedule: str
    how: str
    due: float
    sent_mib: float
    sgd_mib: float
    ratio: float


@dataclass(frozen=True)
class ScalingRow:
    """Time of a mean step of K-FAC on one batch of 64, shared by the ranks."""

    net: str
    interval: int
    ranks: int
    cpu_ms: float
    wall_ms: float


def run_ranks(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`work(rank, world, *arguments)` in `world` processes of one thread in a gloo group; their results by rank."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    results: Any = multiprocessing.get_context("spawn").SimpleQueue()
    spawn(_start, (world, port, results, work, arguments), nprocs=world)
    return [value for _, value in sorted(results.get() for _ in range(world))]


def _start(rank: int, world: int, port: int, results: Any, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    results.put((rank, work(rank, world, *arguments)))
    dist.barrier()
    dist.destroy_process_group()


def count_bytes(rank: int, world: int) -> tuple[int, int, dict[str, dict[str, int]]]:
    """What this rank sends at a step with everything due, and with nothing due; and by kind."""
    torch.manual_seed(0)
    model = resnet50()
    kfac = tc.KFAC(model, factor_interval=20, inverse_interval=20)
    ledger = kfac._exchange.channels.ledger  # type: ignore[attr-defined]  # of several ranks
    counted: list[dict[str, int]] = []
    for step in range(2):
        torch.manual_seed(10 * step + rank)
        before = dict(ledger.sent)
        kfac.zero_grad()
        functional.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.randint(1000, (2,))).backward()
        kfac.step()
        counted.append({kind: count - before.get(kind, 0) for kind, count in ledger.sent.items()})
    due, idle = counted
    return sum(due.values()), sum(idle.values()), {"due": due, "idle": idle}


def planned(world: int) -> tuple[tuple[Transfer, ...], int]:
    """What the plan says for the same, and the parameters."""
    with torch.device("meta"):
        model = resnet50()
        kfac = tc.KFAC(model, process_group="alone")
    layers = layer_sizes({name: block.rule for name, block in kfac.blocks.items()})
    numbers = sum(p.numel() for p in model.parameters())
    plan = make_plan(layers, PlanOptions(world, inverse_interval=20))
    return transfers(plan, Wire(loose=numbers - plan.bucket_gradients.length)), numbers


def schedules() -> dict[str, float]:
    """The share of steps with statistics, by schedule."""

    def share(rule: Callable[[int], int]) -> float:
        step, taken = 0, 0
        while step < EPOCHS * STEPS_PER_EPOCH:
            taken += 1
            step += rule(step // STEPS_PER_EPOCH)
        return taken / (EPOCHS * STEPS_PER_EPOCH)

    return {
        "every step": 1.0,
        "every 20 steps (default)": 0.05,
        "epochs: min(20, 5 floor(e/5) + 1)": share(osawa_growing),
        "epochs: 1, from epoch 13 on 20": share(osawa_two_phases),
        **{f"adaptive, SP-NGD's share at batch {size}": sent for size, sent in SPNGD_SENT.items()},
    }


def byte_rows(world: int) -> list[ByteRow]:
    """Counted and planned, for every schedule."""
    answers = run_ranks(world, count_bytes)
    found, numbers = planned(world)
    sgd = reducing(numbers, world, 4)
    statistics = [t for t in found if t.stage.startswith("statistics") or t.stage == "inverses"]
    always = [t for t in found if t not in statistics]
    of_plan = max(bytes_at_most(found, world)), max(bytes_at_most(always, world))
    counted = max(due for due, _, _ in answers), max(idle for _, idle, _ in answers)
    print(f"{world} ranks, rank 0 by kind: {answers[0][2]}")
    rows = []
    for schedule, due in schedules().items():
        for how, (all_due, nothing_due) in (("counted on gloo", counted), ("plan", of_plan)):
            sent = nothing_due + due * (all_due - nothing_due)
            rows.append(ByteRow(world, schedule, how, due, sent / MIB, sgd / MIB, sent / sgd))
    return rows


def small_net() -> nn.Sequential:
    """2.5 million numbers, whose factors are worth sharing out."""
    torch.manual_seed(0)
    widths = [64, 768, 768, 768, 768, 10]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def time_steps(rank: int, world: int, interval: int) -> tuple[float, float]:
    """Processor and wall seconds of a mean step: the least of some rounds; rounds hold whole intervals."""
    model = small_net()
    kfac = tc.KFAC(model, factor_interval=interval, inverse_interval=interval)
    steps = max(interval, 5)
    torch.manual_seed(1)
    x, y = torch.randn(BATCH, 64), torch.randint(10, (BATCH,))
    own = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    cpu, wall = [], []
    for _ in range(ROUNDS):
        dist.barrier()
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        for _ in range(steps):
            kfac.zero_grad()
            functional.cross_entropy(model(x[own]), y[own]).backward()
            kfac.step()
        cpu.append((time.process_time() - cpu_start) / steps)
        wall.append((time.perf_counter() - wall_start) / steps)
    return min(cpu), min(wall)


def scaling_rows() -> list[ScalingRow]:
    """1 and 2 processes, with statistics and inverses at every step and every 20 steps."""
    rows = []
    for interval in (1, 20):
        for world in (1, 2):
            answers = run_ranks(world, time_steps, interval)
            cpu, wall = (1e3 * max(answer[i] for answer in answers) for i in range(2))
            rows.append(ScalingRow("MLP 64-4x768-10, batch 64", interval, world, cpu, wall))
    return rows


def main() -> None:
    """Count, time, print and append to the CSVs."""
    results = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--only", choices=["bytes", "scaling"])
    parser.add_argument("--csv-bytes", type=Path, default=results / "bytes.csv")
    parser.add_argument("--csv-scaling", type=Path, default=results / "ranks.csv")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cpu = torch.device("cpu")
    if arguments.only != "scaling":
        for world in arguments.world:
            counted = byte_rows(world)
            for row in counted:
                print(
                    f"{row.ranks} ranks  {row.schedule:42} {row.how:16} {row.due:6.3f} of steps due  "
                    f"{row.sent_mib:7.1f} MiB a step, SGD {row.sgd_mib:6.1f}, ratio {row.ratio:.3f}"
                )
            append_rows(arguments.csv_bytes, [asdict(row) for row in counted], cpu)
    if arguments.only != "bytes":
        timed = scaling_rows()
        for each in timed:
            print(
                f"{each.net}, everything every {each.interval} steps, {each.ranks} ranks: "
                f"{each.cpu_ms:.1f} ms processor time, {each.wall_ms:.1f} ms wall"
            )
        append_rows(arguments.csv_scaling, [asdict(each) for each in timed], cpu)


if __name__ == "__main__":
    main()
