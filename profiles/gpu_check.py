"""All that needs a GPU, in one call that ends in time: tests, tuning, kernel and step benchmarks, one summary.

python -m profiles.gpu_check --out DIR [--budget 540] [--only PART]

Parts: tests, kernels, resnet50, steps, tune, inverses, first_steps. Each runs in a process of its own, with its share
of the time that is left; what a part left undone is said. The budget counts from the start of this process, imports
included. DIR gets a log and the CSV of each part, row by row, summary.txt, and a tuning store of its own (unless
TRITON_CURV_CACHE_DIR names one).
Exit status: 0 if all is well, 1 if something failed, was cut off or skipped, 3 without a GPU.
"""

import argparse
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESERVE = 12.0
"""Seconds kept for the summary and for processes to stop."""
GRACE = 5.0
"""Seconds that a part which is cut off gets to say how far it came."""


@dataclass(frozen=True)
class Part:
    """One part: its share of the time that is left, and its command, given an output folder and its seconds."""

    name: str
    share: float
    command: Callable[[Path, float], list[str]]


def _python(*arguments: str | Path) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def _tests(out: Path, seconds: float) -> list[str]:
    """All of tests/gpu, by name, in several processes if pytest can: most of the time goes into compiling kernels."""
    processes = str(min(8, max(2, (os.cpu_count() or 2) // 2)))
    spread = ["-n", processes, "--dist", "worksteal"] if find_spec("xdist") else []
    limit = ["--timeout", "100", "--timeout-method", "thread"] if find_spec("pytest_timeout") else []
    return _python("-m", "pytest", "-v", "--no-header", "--tb=short", *spread, *limit, "-m", "gpu", "tests/gpu")


def _kernels(out: Path, seconds: float) -> list[str]:
    """Every op on its named shapes, each op with its share of the time."""
    return _python("-m", "profiles.bench_kernels", "--budget", f"{seconds - 20:.0f}", "--csv", out / "kernels.csv")


def _tune(out: Path, seconds: float) -> list[str]:
    """Configurations for the example shapes of all ops."""
    return _python(
        *("-m", "triton_curv.cli", "tune", "--budget", f"{seconds - 20:.0f}", "--export", out / "tuned.json")
    )


def _resnet50(out: Path, seconds: float) -> list[str]:
    """A training step at batch 256, without torch.compile: that alone would take the time."""
    budget = f"{0.5 * seconds:.0f}"
    return _python("-m", "profiles.bench_resnet50", "--no-compile", "--budget", budget, "--csv", out / "resnet50.csv")


def _inverses(out: Path, seconds: float) -> list[str]:
    """Accuracy by condition number."""
    return _python("-m", "profiles.bench_damped_inverse", "--seeds", "1", "--csv", out / "damped_inverse.csv")


def _first_steps(out: Path, seconds: float) -> list[str]:
    """Look-ups of configurations, and new processes to their first compiled step, with and without filled caches."""
    return _python("-m", "profiles.bench_resolve", "--csv", out / "resolve.csv")


def _steps(out: Path, seconds: float) -> list[str]:
    """A training step on a small net, of the optimizers whose step is no solve of many products."""
    return _python(
        *("-m", "profiles.bench_steps", "digits-cnn", "--device", "cuda", "--rounds", "5"),
        *("--budget", f"{0.5 * seconds:.0f}", "--optimizers", "neumann", "kfac", "--csv", out / "steps.csv"),
    )


PARTS = (
    Part("tests", 0.25, _tests),
    Part("kernels", 0.4, _kernels),
    Part("resnet50", 0.42, _resnet50),
    Part("steps", 0.3, _steps),
    Part("tune", 0.65, _tune),
    Part("inverses", 0.9, _inverses),
    Part("first_steps", 1.0, _first_steps),
)


@dataclass(frozen=True)
class Outcome:
    """How a part ended: "ok", "failed", "cut off" by its limit or "skipped"; its seconds and last lines."""

    part: str
    state: str
    seconds: float
    tail: tuple[str, ...]


def run_part(part: Part, out: Path, seconds: float) -> Outcome:
    """Run a part's command for at most `seconds`; everything it prints goes to its log."""
    log = out / f"{part.name}.log"
    start = time.monotonic()
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "autotune"), os.environ.get("PYTHONPATH", "")]
    store = os.environ.get("TRITON_CURV_CACHE_DIR") or str(out / "tuning-store")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CURV_CACHE_DIR": store,
    }
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background job; the part would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("w") as file:
        command = part.command(out, seconds)
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(seconds)
            state = "ok" if status == 0 else f"failed (exit {status})"
        except subprocess.TimeoutExpired:
            state = f"cut off after {seconds:.0f} s"
            os.killpg(process.pid, signal.SIGINT)  # pytest and the benchmarks then say what they have
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            _end(process)
    lines = log.read_text(errors="replace").splitlines()
    return Outcome(part.name, state, time.monotonic() - start, tuple(lines[-40:]))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a part, the processes that it started included: they would hold the GPU."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def age() -> float:
    """Seconds since this process began, of which importing torch takes some."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def summary_of(outcomes: list[Outcome], head: str) -> str:
    """The last lines that each part printed, then one line a part: the end is what a cut log keeps."""
    lines = [line for o in outcomes for line in (f"--- {o.part}", *o.tail, "")]
    lines += [head, *(f"{o.part:11} {o.state:24} {o.seconds:6.0f} s" for o in outcomes)]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the parts in order within the budget and print the summary last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS")
    parser.add_argument("--only", choices=[part.name for part in PARTS], action="append", metavar="PART")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_check needs a CUDA device and torch sees none; nothing was run", file=sys.stderr)
        return 3
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    end = time.monotonic() - age() + options.budget - RESERVE
    parts = [part for part in PARTS if not options.only or part.name in options.only]
    properties = torch.cuda.get_device_properties(0)
    versions = f"torch {torch.__version__}, triton {version('triton')}, Python {platform.python_version()}"
    head = f"{properties.name}, {properties.multi_processor_count} SMs, {versions}"
    print(head, flush=True)
    outcomes: list[Outcome] = []
    text = ""
    for position, part in enumerate(parts):
        left = end - time.monotonic()
        seconds = left if position == len(parts) - 1 else left * part.share
        if seconds < 30:
            outcomes.append(Outcome(part.name, f"skipped ({left:.0f} s left)", 0.0, ()))
        else:
            print(f"{part.name}: at most {seconds:.0f} s", flush=True)
            outcomes.append(run_part(part, out, seconds))
            print(f"{part.name}: {outcomes[-1].state}, {outcomes[-1].seconds:.0f} s", flush=True)
        text = summary_of(outcomes, head)
        (out / "summary.txt").write_text(text)
    print(text)
    return int(any(o.state != "ok" for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
