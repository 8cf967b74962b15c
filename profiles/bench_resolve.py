"""Cost of a look-up, and of the first compiled step of a process with and without what earlier runs left.

python -m profiles.bench_resolve [--csv FILE] [--entries N] [--look-ups]     appends to profiles/results/resolve.csv

`hit`: `resolve` of a problem seen before, by an equal, not identical, problem, for every op; CPU time, medians of
rounds in turn with a bare dict look-up of the same key. `launcher`: all that `accumulate_factor_` does to get its
config, beside what it would do without `choose_once`: describe the problem, then ask. `first`: a problem's first
look-up in a process that has read the store, and `reading`: that of a store of N entries.

`first step`: profiles/first_step.py in a new process, on the GPU if there is one. torch's and Triton's caches are
empty (`cold`) or filled (`warm`); the tuning store is empty, holds N entries, or has one more than when the caches were
filled (`changed`): then torch must compile anew.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from operator import truediv
from pathlib import Path
from typing import Any

import torch

from profiles.machine import append_rows
from triton_curv_autotune import Resolver, TuningWarning
from triton_curv_autotune.entry import Measurement, new_entry, provenance_now
from triton_curv_autotune.key import environment
from triton_curv_autotune.registry import get_op, op_names
from triton_curv_autotune.store import Store
from triton_curv_kernels.backend import DeviceLimits, device_limits
from triton_curv_kernels.choice import choose, choose_once, set_chooser
from triton_curv_kernels.factor import FactorProblem, default_config

OP = "accumulate_factor_"
STAND_IN = DeviceLimits(name="bench_resolve", arch="sm_90")
ROUNDS, CALLS = 25, 1000
Figures = dict[str, tuple[float, str]]
"""Value and unit by name."""


def problem(k: int, limits: DeviceLimits, n: int = 576) -> FactorProblem:
    """A new object each time."""
    return FactorProblem(1, k, n, torch.bfloat16, limits=dataclasses.replace(limits))


def fill(store: Store, limits: DeviceLimits, count: int) -> None:
    """Publish entries for `count` problems."""
    op = get_op(OP)
    for index in range(count):
        bucket = op.bucket(problem(1 << (8 + index % 9), limits, 64 * (1 + index // 9)))
        default, other, *_ = op.candidates(bucket)
        times = [Measurement(default, 1.0, 1.0), Measurement(other, 0.5, 0.5)]
        store.write(new_entry(op, environment(limits), bucket).with_measurements(times, provenance_now()))


def look_ups(entries: int) -> Figures:
    """Figures that need no GPU."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        fill(store, STAND_IN, entries)
        resolver = Resolver(lambda: store, lambda: ())
        load = timeit.timeit(lambda: resolver.table(STAND_IN), timer=time.process_time, number=1)
        ks = range(3000, 3200)
        first = []
        for k in ks:
            start = time.process_time()
            resolver.resolve(OP, problem(k, STAND_IN))
            first.append(time.process_time() - start)
    figures = {
        "first look-up of a problem": (statistics.median(first) * 1e6, "us"),
        f"reading a store of {entries} entries": (load * 1e3, "ms"),
    }
    for name in op_names():
        op = get_op(name)
        asked, again = (op.on(op.examples[0], dataclasses.replace(STAND_IN)) for _ in range(2))
        bare = {(name, again): resolver.resolve(name, again)}
        hit, base = in_turn(partial(resolver.resolve, name, asked), partial(bare.__getitem__, (name, asked)))
        figures[f"hit, {name}"] = (statistics.median(hit), "us")
        figures[f"hit, fastest round, {name}"] = (min(hit), "us")
        figures[f"hit / bare dict look-up, {name}"] = (statistics.median(map(truediv, hit, base)), "ratio")
    return figures


def in_turn(*calls: Callable[[], Any]) -> list[list[float]]:
    """CPU time of each call in us, by round; the calls take turns."""
    rounds = [[timeit.timeit(c, timer=time.process_time, number=CALLS) for c in calls] for _ in range(ROUNDS)]
    return [[seconds / CALLS * 1e6 for seconds in times] for times in zip(*rounds, strict=True)]


def launcher() -> Figures:
    """How `accumulate_factor_` gets its config, with tensors as a training step has them."""
    rows = torch.empty(4096, 576, dtype=torch.bfloat16)

    def describe() -> FactorProblem:
        return FactorProblem.of(rows, False)

    def once() -> Any:
        return choose_once(OP, (rows.shape, rows.stride(), rows.dtype, rows.device, False), describe, default_config)

    resolver = Resolver(shipped=lambda: ())
    set_chooser(resolver.resolve)
    every, kept = in_turn(lambda: choose(OP, describe(), default_config), once)
    set_chooser(None)
    return {
        "launcher, described at each call": (statistics.median(every), "us"),
        "launcher, asked once": (statistics.median(kept), "us"),
    }


def first_steps(entries: int) -> Iterator[Figures]:
    """Figures of new processes, one after another: from nothing to the end of the first compiled step."""
    limits = device_limits(torch.device("cuda")) if torch.cuda.is_available() else STAND_IN
    for store, count in (("empty store", 0), (f"store of {entries}", entries)):
        with tempfile.TemporaryDirectory() as folder:
            fill(Store(Path(folder, "tuned")), limits, count)
            yield _first_step(folder, f"{store}, cold")
            yield _first_step(folder, f"{store}, warm")
            if count:
                fill(Store(Path(folder, "tuned")), limits, count + 1)
                yield _first_step(folder, f"{store}, changed")


def _first_step(folder: str, name: str) -> Figures:
    caches = {
        "TRITON_CURV_CACHE_DIR": f"{folder}/tuned",
        "TRITON_CACHE_DIR": f"{folder}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
    }
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "profiles.first_step"]
    done = subprocess.run(command, env=os.environ | path | caches, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        f"first step, {name}, wall": (found["wall"], "s"),
        f"first step, {name}, CPU": (found["cpu"], "s"),
        f"first step, {name}, reading the tables": (found["reading"] * 1e3, "ms"),
        f"first step, {name}, graphs found": (found["hits"], "count"),
    }


def main() -> None:
    """Measure, print, append the rows to a CSV as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=90)
    parser.add_argument("--look-ups", action="store_true", help="no first steps, which take minutes on a CPU")
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "resolve.csv")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", TuningWarning)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = () if arguments.look_ups else first_steps(arguments.entries)
    for figures in chain([look_ups(arguments.entries) | launcher()], steps):
        for name, (value, unit) in figures.items():
            print(f"{name:60} {value:10.3f} {unit}", flush=True)
        rows = [{"figure": name, "value": value, "unit": unit} for name, (value, unit) in figures.items()]
        append_rows(arguments.csv, rows, device)


if __name__ == "__main__":
    main()
