"""Cost of a look-up, and of the first step of a process with an empty and with a filled tuning store.

python -m profiles.bench_resolve [--csv FILE] [--entries N]     appends to profiles/results/resolve.csv by default

`hit`: `resolve` of a problem seen before, by an equal, not identical, problem; CPU time, medians of rounds in turn with
a bare dict look-up of the same key. `first`: a problem's first look-up in a process that has read the store, and
`reading`: that of a store of N entries. With a GPU also `first step` of `accumulate_factor_`, from its call to its end,
in a new process each: Triton's own cache is empty (`cold`) or filled (`warm`), the tuning store is empty or filled.
"""

import argparse
import csv
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import torch

from triton_curv.training.environment import commit, hardware
from triton_curv_autotune import Resolver, TuningWarning
from triton_curv_autotune.entry import Measurement, new_entry, provenance_now
from triton_curv_autotune.key import environment
from triton_curv_autotune.registry import get_op
from triton_curv_autotune.store import Store
from triton_curv_kernels.backend import DeviceLimits, device_limits
from triton_curv_kernels.factor import FactorProblem

OP = "accumulate_factor_"
STAND_IN = DeviceLimits(name="bench_resolve", arch="sm_90")
ROUNDS, CALLS = 25, 4000
FIELDS = ["date", "commit", "cpu", "gpu", "torch", "figure", "value", "unit"]

FIRST_STEP = """
import time, torch, triton_curv
from triton_curv_kernels import accumulate_factor_
factor, rows = torch.zeros(576, 576, device="cuda"), torch.randn(8192, 576, device="cuda", dtype=torch.bfloat16)
torch.cuda.synchronize()
start = time.perf_counter()
accumulate_factor_(factor, rows)
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


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


def look_ups(entries: int) -> dict[str, tuple[float, str]]:
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
        asked = problem(4096, STAND_IN)
        bare = {(OP, problem(4096, STAND_IN)): resolver.resolve(OP, problem(4096, STAND_IN))}
        rounds: list[tuple[float, float]] = []
        for _ in range(ROUNDS):
            hit = timeit.timeit(lambda: resolver.resolve(OP, asked), timer=time.process_time, number=CALLS)
            base = timeit.timeit(lambda: bare[OP, asked], timer=time.process_time, number=CALLS)
            rounds.append((hit, base))
    hits, bares = ([pair[side] / CALLS * 1e6 for pair in rounds] for side in (0, 1))
    return {
        "hit": (statistics.median(hits), "us"),
        "hit, fastest round": (min(hits), "us"),
        "hit / bare dict look-up": (statistics.median(a / b for a, b in zip(hits, bares, strict=True)), "ratio"),
        "first look-up of a problem": (statistics.median(first) * 1e6, "us"),
        f"reading a store of {entries} entries": (load * 1e3, "ms"),
    }


def first_steps() -> dict[str, tuple[float, str]]:
    """Figures of new processes on a GPU: from nothing to the end of the first step."""
    figures = {}
    for tuned in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            if tuned:
                fill(Store(Path(folder, "tuned")), device_limits(torch.device("cuda")), 90)
            caches = {"TRITON_CURV_CACHE_DIR": f"{folder}/tuned", "TRITON_CACHE_DIR": f"{folder}/triton"}
            for state in ("cold", "warm"):
                command = [sys.executable, "-W", "ignore", "-c", FIRST_STEP]
                path = {"PYTHONPATH": os.pathsep.join(sys.path)}
                done = subprocess.run(
                    command, env=os.environ | path | caches, capture_output=True, text=True, check=True
                )
                name = f"first step, {'filled' if tuned else 'empty'} tuning store, {state} Triton cache"
                figures[name] = (float(done.stdout) * 1e3, "ms")
    return figures


def main() -> None:
    """Measure, print, append the rows to a CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=90)
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "resolve.csv")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", TuningWarning)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    machine: dict[str, Any] = {
        "date": date.today().isoformat(),
        "commit": commit() or "",
        "cpu": hardware()["cpu"],
        "gpu": gpu,
        "torch": torch.__version__,
    }
    figures = look_ups(arguments.entries) | (first_steps() if gpu else {})
    is_new = not arguments.csv.exists()
    with arguments.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if is_new:
            writer.writeheader()
        for name, (value, unit) in figures.items():
            print(f"{name:60} {value:10.3f} {unit}")
            writer.writerow({**machine, "figure": name, "value": f"{value:.4g}", "unit": unit})


if __name__ == "__main__":
    main()
