"""K-FAC at its defaults beside its peers on the ten tasks of the baselines: steps, seconds, final loss, memory.

python -m profiles.bench_peers [TASK ...] [--peers NAME,...] [--seeds N] [--keep N]

Same models, data, batches and evaluations for all, as many learning rates for each (5, neighbours sqrt(10) apart), all
run on seed 0; the lowest final loss goes on to the further seeds. With `--keep N` all rates run for a third of the
budget and only the best N of them to its end. Targets are the scenarios'. A step's cost is process CPU time,
interleaved block by block on one thread, the minimum over rounds; K-FAC's covers its first 40 steps, where its
statistics are renewed most often, so that time to the target is not flattered. Runs are kept in `--runs`, so that a
second call continues. A peer that is not installed or fails has a row with the error. Writes
profiles/results/peers.csv and peers.png.
"""

import argparse
import csv
import importlib.metadata
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from profiles.machine import machine_of
from profiles.peers.catalogue import PEERS, Peer
from profiles.peers.trials import Found, PeerTrainer, Trials, final_loss
from triton_curv.scenarios import Data, Scenario, get_scenario
from triton_curv.training.timing import one_thread

TASKS = (
    "reg-bos",
    "reg-bos-fb",
    "reg-lif",
    "reg-lif-fb",
    "digits-cnn",
    "mnist5k-mlp",
    "mnist5k-resnet",
    "vae-mnist5k",
    "autoencoder-mnist5k",
    "bnn-mnist5k",
)

RESULTS = Path(__file__).parent / "results"
CYCLE = 20


def state_bytes(optimizer: Any) -> int:
    """Bytes of all tensors that an optimizer holds, parameters and gradients not counted."""
    seen: dict[int, int] = {}
    params = {
        p.untyped_storage().data_ptr() for group in getattr(optimizer, "param_groups", []) for p in group["params"]
    }

    def walk(thing: Any, depth: int) -> None:
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            if not isinstance(thing, torch.nn.Parameter) and storage.data_ptr() not in params:
                seen[storage.data_ptr()] = storage.nbytes()
        elif depth < 8 and isinstance(thing, Mapping):
            for value in thing.values():
                walk(value, depth + 1)
        elif depth < 8 and isinstance(thing, list | tuple):
            for value in thing:
                walk(value, depth + 1)
        elif depth < 8 and hasattr(thing, "__dict__") and not isinstance(thing, torch.nn.Module | type):
            for value in vars(thing).values():
                walk(value, depth + 1)

    walk(optimizer.__dict__, 0)
    return sum(seen.values())


def step_costs(
    task: Scenario, data: Data, peers: Mapping[str, float], rounds: int
) -> tuple[dict[str, float], dict[str, int]]:
    """CPU milliseconds of a step: minimum over rounds of the mean over a block; and bytes of state at the end.

    A round builds each peer anew, at its rate / 1000 so that weights stay where they are, and times its first two
    cycles.
    """
    best: dict[str, float] = {}
    memory: dict[str, int] = {}
    with one_thread():
        for _ in range(rounds):
            trainers = {n: PeerTrainer(task, data, PEERS[n], rate / 1000, 0) for n, rate in peers.items()}
            totals = dict.fromkeys(trainers, 0.0)
            for _ in range(2):
                for name, trainer in trainers.items():
                    for _ in range(CYCLE):
                        batch = trainer.draw()
                        start = time.process_time()
                        trainer.step(batch)
                        totals[name] += time.process_time() - start
            for name, total in totals.items():
                best[name] = min(best.get(name, float("inf")), total / (2 * CYCLE) * 1e3)
            memory = {name: state_bytes(trainer.optimizer) for name, trainer in trainers.items()}
    return best, memory


def search(trials: Trials, peer: Peer, rates: int, seeds: int, keep: int | None) -> tuple[Found | None, str]:
    """What was found, or the error that a user would see."""
    try:
        return trials.search(peer, rates, seeds, keep), ""
    except Exception as error:  # whatever a peer raises is its result
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def measure(task: Scenario, names: Sequence[str], arguments: argparse.Namespace) -> list[dict[str, object]]:
    """One row for each peer."""
    data = task.load()
    trials = Trials(task, data, arguments.runs)
    found: dict[str, tuple[Found | None, str]] = {}
    with one_thread():
        for name in names:
            found[name] = search(trials, PEERS[name], arguments.rates, arguments.seeds, arguments.keep)
            print(f"{task.name:20} {name:16} {_line(*found[name], task)}", flush=True)
    rates = {name: f.rate for name, (f, _) in found.items() if f is not None and f.rate is not None}
    rates.setdefault("sgd", task.learning_rates["sgd"])
    costs, memory = step_costs(task, data, rates, arguments.rounds) if arguments.rounds else ({}, {})
    return [_row(task, name, *found[name], costs, memory, arguments.seeds) for name in names]


def _line(found: Found | None, error: str, task: Scenario) -> str:
    if found is None:
        return error
    if found.rate is None:
        return "every rate diverged"
    steps, reached = found.steps_to(task.target_loss)
    losses = [final_loss(run) for run in found.runs]
    shown = "-" if steps is None else f"{steps:.1f}"
    return f"lr {found.rate:<8g} steps {shown} ({reached}/{len(losses)}) loss {statistics.fmean(losses):.4g}"


def _row(
    task: Scenario,
    name: str,
    found: Found | None,
    error: str,
    costs: Mapping[str, float],
    memory: Mapping[str, int],
    seeds: int,
) -> dict[str, object]:
    peer = PEERS[name]
    row: dict[str, object] = dict.fromkeys(FIELDS, "")
    row.update(task=task.name, peer=name, package=peer.package, version=peer.version, target=task.target_loss)
    if found is None or found.rate is None:
        return {**row, "error": error or "every rate diverged"}
    steps, reached = found.steps_to(task.target_loss)
    losses = [final_loss(run) for run in found.runs]
    cost = costs.get(name)
    row.update(
        lr=found.rate,
        at_edge=found.at_edge,
        reached=f"{reached}/{seeds}",
        steps="" if steps is None else round(steps, 1),
        step_ms="" if cost is None else f"{cost:.4g}",
        step_ratio="" if cost is None else f"{cost / costs['sgd']:.3f}",
        seconds="" if cost is None or steps is None else f"{steps * cost / 1e3:.4g}",
        final_loss=f"{statistics.fmean(losses):.4g}",
        final_loss_sd=f"{statistics.stdev(losses) if len(losses) > 1 else 0.0:.2g}",
        metric=f"{statistics.fmean(run[-1][2] for run in found.runs):.4g}",
        state_bytes=memory.get(name, ""),
    )
    return row


FIELDS = (
    "task",
    "peer",
    "package",
    "version",
    "lr",
    "at_edge",
    "target",
    "reached",
    "steps",
    "seconds",
    "step_ms",
    "step_ratio",
    "final_loss",
    "final_loss_sd",
    "metric",
    "state_bytes",
    "error",
)


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Rows of the tasks measured now; those of other tasks and peers stay."""
    machine = machine_of(torch.device("cpu"))
    kept: list[dict[str, object]] = []
    if path.exists():
        now = {(row["task"], row["peer"]) for row in rows}
        with path.open(newline="") as file:
            kept = [dict(row) for row in csv.DictReader(file) if (row["task"], row["peer"]) not in now]
    every = kept + [{**machine, **row} for row in rows]
    every.sort(key=lambda row: (TASKS.index(str(row["task"])), list(PEERS).index(str(row["peer"]))))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*machine, *FIELDS])
        writer.writeheader()
        writer.writerows(every)


def draw(path: Path) -> None:
    """Steps and CPU seconds to the target of every peer on every task, coloured by their ratio to AdamW's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LogNorm

    with path.open(newline="") as file:
        rows = {(row["task"], row["peer"]): row for row in csv.DictReader(file)}
    tasks = [task for task in TASKS if any(task == of for of, _ in rows)]
    peers = [peer for peer in PEERS if any(peer == of for _, of in rows)]
    figure, axes = plt.subplots(1, 2, figsize=(19, 1.6 + 0.42 * len(peers)), constrained_layout=True)
    for axis, field in zip(axes, ("steps", "seconds"), strict=True):
        ratios = [[_ratio(rows, task, peer, field) for task in tasks] for peer in peers]
        image = axis.imshow(ratios, norm=LogNorm(0.2, 5), cmap="RdYlGn_r", aspect="auto")
        for y, peer in enumerate(peers):
            for x, task in enumerate(tasks):
                shown = _cell(rows.get((task, peer)), field)
                dark = ratios[y][x] < 0.35 or ratios[y][x] > 3
                size = 9 if shown[:1].isdigit() else 7
                axis.text(x, y, shown, ha="center", va="center", fontsize=size, color="white" if dark else "black")
        axis.set_xticks(range(len(tasks)), tasks, rotation=20, ha="right")
        axis.set_yticks(range(len(peers)), peers)
        axis.set_title("steps to the target" if field == "steps" else "CPU seconds to the target")
        bar = figure.colorbar(image, ax=axis, label="times AdamW's", pad=0.01, ticks=[0.2, 0.5, 1, 2, 5], format="%g")
        bar.minorticks_off()
    figure.savefig(path.with_suffix(".png"), dpi=90)


def _ratio(rows: Mapping[tuple[str, str], Mapping[str, str]], task: str, peer: str, field: str) -> float:
    """To AdamW's; NaN where one of them has none."""
    ours, adamw = (rows.get((task, name), {}).get(field) for name in (peer, "adamw"))
    return float(ours) / float(adamw) if ours and adamw else float("nan")


def _cell(row: Mapping[str, str] | None, field: str) -> str:
    """The number, or why there is none."""
    if row is None:
        return ""
    if not row["lr"]:
        error = row["error"].partition(":")[0]
        return {"ModuleNotFoundError": "not on PyPI", "UnsupportedTaskError": "not for it"}.get(error, error)
    reached, _, seeds = row["reached"].partition("/")
    some = "" if reached == seeds else f" ({row['reached']})"
    return f"{float(row[field]):.3g}{some}" if row[field] else "-" if row["steps"] else "missed"


def main() -> None:
    """Search, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--rates", type=int, default=5)
    parser.add_argument("--keep", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs") / "peers")
    parser.add_argument("--csv", type=Path, default=RESULTS / "peers.csv")
    arguments = parser.parse_args()
    names = arguments.peers.split(",")
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        parser.error(f"expected peers among {', '.join(PEERS)}, got {', '.join(unknown)}")
    print(f"torch {importlib.metadata.version('torch')}")
    for name in arguments.tasks or TASKS:
        write(arguments.csv, measure(get_scenario(name), names, arguments))
        draw(arguments.csv)
    print(arguments.csv.absolute(), arguments.csv.with_suffix(".png").absolute(), sep="\n")


if __name__ == "__main__":
    main()
