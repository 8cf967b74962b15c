"""Loss curves of K-FAC and its peers on the ten tasks, against steps and against CPU seconds.

python -m profiles.peer_curves [TASK ...] [--peers NAME,...] [--seeds N] [--runs DIR]

Each peer runs at its best rate, which `profiles.bench_peers` has found and put into profiles/results/peers.csv; runs
that `--runs` holds are not made again. A line is the geometric mean over seeds; seconds are steps times the cost of a
step in that file. Draws profiles/results/peers-curves.png.
"""

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from profiles.bench_peers import RESULTS, TASKS
from profiles.peers.catalogue import PEERS
from profiles.peers.trials import Point, Trials
from triton_curv.scenarios import get_scenario
from triton_curv.training.timing import one_thread

SHOWN = ("adamw", "soap", "muon", "kfac")
COLUMNS = 5

Curves = Mapping[tuple[str, str], Sequence[Sequence[Point]]]
Rows = Mapping[tuple[str, str], Mapping[str, str]]


def curves(rows: Rows, tasks: Sequence[str], peers: Sequence[str], seeds: int, runs: Path) -> Curves:
    """The runs of each (task, peer) that has a best rate."""
    found = {}
    for name in tasks:
        task = get_scenario(name)
        trials = Trials(task, task.load(), runs)
        for peer in peers:
            rate = rows.get((name, peer), {}).get("lr")
            if rate:
                found[name, peer] = [trials.run(PEERS[peer], float(rate), seed, task.budget) for seed in range(seeds)]
                print(name, peer, rate, flush=True)
    return found


def draw(found: Curves, rows: Rows, tasks: Sequence[str], peers: Sequence[str], path: Path) -> None:
    """Above each task against steps, below against seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(COLUMNS, len(tasks))
    lines = -(-len(tasks) // columns)
    figure, axes = plt.subplots(
        2 * lines, columns, figsize=(4 * columns, 6 * lines), constrained_layout=True, squeeze=False
    )
    for place, task in enumerate(tasks):
        line, column = divmod(place, columns)
        for axis, unit in ((axes[line][column], "steps"), (axes[lines + line][column], "CPU seconds")):
            for number, peer in enumerate(peers):
                if (task, peer) not in found:
                    continue
                runs = found[task, peer]
                whole = [run for run in runs if len(run) == max(map(len, runs))]
                steps = np.array([step for step, _, _ in whole[0]], dtype=float)
                losses = np.exp(np.mean([[np.log(loss) for _, loss, _ in run] for run in whole], axis=0))
                cost = 1.0 if unit == "steps" else float(rows[task, peer]["step_ms"]) / 1e3
                axis.plot(steps * cost, losses, label=peer, color=f"C{number}", linewidth=1.4)
            axis.axhline(get_scenario(task).target_loss, color="black", linewidth=0.8, linestyle=":")
            axis.set_yscale("log")
            axis.set_title(task, fontsize=10)
            axis.set_xlabel(unit, fontsize=8)
        ends = sorted(_end(found[task, peer], rows[task, peer]) for peer in peers if (task, peer) in found)
        if len(ends) > 1:
            axes[lines + line][column].set_xlim(0, ends[-2])  # the slowest would hide the others
    axes[0][0].legend(fontsize=8)
    for place in range(len(tasks), columns * lines):
        for line in (place // columns, lines + place // columns):
            axes[line][place % columns].axis("off")
    figure.suptitle("Training loss at each optimizer's best rate; dotted: the target")
    figure.savefig(path, dpi=75)
    plt.close(figure)


def _end(runs: Sequence[Sequence[Point]], row: Mapping[str, str]) -> float:
    """CPU seconds of the longest run."""
    return max(run[-1][0] for run in runs) * float(row["step_ms"]) / 1e3


def main() -> None:
    """Run what is missing, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK")
    parser.add_argument("--peers", default=",".join(SHOWN))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs") / "peers")
    parser.add_argument("--csv", type=Path, default=RESULTS / "peers.csv")
    parser.add_argument("--out", type=Path, default=RESULTS / "peers-curves.png")
    arguments = parser.parse_args()
    with arguments.csv.open(newline="") as file:
        rows = {(row["task"], row["peer"]): row for row in csv.DictReader(file)}
    tasks, peers = arguments.tasks or TASKS, arguments.peers.split(",")
    with one_thread():
        found = curves(rows, tasks, peers, arguments.seeds, arguments.runs)
    draw(found, rows, tasks, peers, arguments.out)
    print(arguments.out.absolute())


if __name__ == "__main__":
    main()
