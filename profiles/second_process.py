"""Seconds until the first steps are taken: in a first process, in a second one, in one with the first one's artifacts.

python -m profiles.second_process [SCENARIO] [--csv FILE]

Model and `KFAC(compile=True)` are compiled in a process of its own each time. The second finds what the first left in
inductor's and AOTAutograd's caches on disk, and compiles nothing anew, or this fails; traces are made in every process.
The third has an empty cache, and loads what the first wrote by `torch.compiler.save_cache_artifacts()`, as one would
ship it to other machines. On a CPU that saves little: torch 2.13 leaves the libraries that its C++ became out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

import triton_curv as tc
from profiles.machine import append_rows
from triton_curv.scenarios import get_scenario

STEPS = 3  # with statistics and inverses, with both again, with none
COUNTED = ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass")
OF_AUTOGRAD = ("autograd_cache_hit", "autograd_cache_miss", "autograd_cache_bypass")


def take_first_steps(scenario_name: str, artifacts: Path, load: bool) -> dict[str, Any]:
    """In this process."""
    torch.set_num_threads(1)
    scenario = get_scenario(scenario_name)
    data = scenario.load()
    x, y = data.train_x[: scenario.batch_size], data.train_y[: scenario.batch_size]
    model = scenario.model()
    optimizer = tc.KFAC(model, factor_interval=2, inverse_interval=2, compile=True)
    start = time.perf_counter()
    if load:
        torch.compiler.load_cache_artifacts(artifacts.read_bytes())
    compiled = torch.compile(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        scenario.objective(model, compiled(x), y).backward()
        optimizer.step()
    end = time.perf_counter()
    if not artifacts.exists():
        saved = torch.compiler.save_cache_artifacts()
        artifacts.write_bytes(saved[0] if saved is not None else b"")
    return {
        "first_steps_s": round(end - start, 2),
        "graphs": counters["stats"]["unique_graphs"],
        **{name: counters["inductor"][name] for name in COUNTED},
        **{name: counters["aot_autograd"][name] for name in OF_AUTOGRAD},
    }


def in_process(scenario: str, cache: Path, artifacts: Path, load: bool) -> dict[str, Any]:
    """`take_first_steps` in a process of its own, whose caches are in `cache`."""
    command = [sys.executable, "-m", "profiles.second_process", scenario, "--artifacts", str(artifacts)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    start = time.perf_counter()
    done = subprocess.run([*command, *["--load"] * load], env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"process_s": round(seconds, 2), **found}


def main() -> None:
    """Measure the three, print and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", nargs="?", default="digits-cnn")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--artifacts", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.artifacts is not None:
        print(json.dumps(take_first_steps(given.scenario, given.artifacts, given.load)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        artifacts = Path(folder, "artifacts")
        for process, cache, load in (("first", "a", False), ("second", "a", False), ("with artifacts", "b", True)):
            found = in_process(given.scenario, Path(folder, cache), artifacts, load)
            rows.append({"scenario": given.scenario, "process": process, **found})
            print(process, found)
    if given.csv is not None:
        append_rows(given.csv, rows, torch.device("cpu"))
    if rows[1]["fxgraph_cache_miss"]:
        raise SystemExit(f"expected a second process to compile nothing, got {rows[1]['fxgraph_cache_miss']} graphs")


if __name__ == "__main__":
    main()
