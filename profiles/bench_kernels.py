"""Every op on named real shapes against the best call a user has instead, and against the roof of this machine.

python -m profiles.bench_kernels [OP ...] [--device cuda] [--quick] [--budget SECONDS] [--csv FILE]

A case counts only if it is right: its error against a float64 oracle must be at most the allowed one (twice that of the
library's own call). Calls take turns, with a cold L2 on a GPU; figures are medians. First come the cases of
`--quick`, of every op. Rows are appended to profiles/results/kernels.csv one by one; what is left out is named.

A wrong address or a capture that fails spoils CUDA for a whole process: the ops that are left then get a new one.
"""

import argparse
import gc
import importlib
import os
import pkgutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from profiles import kernel_cases
from profiles.kernel_cases.case import Case
from profiles.machine import append_rows, is_spoiled
from triton_curv.profiling.roofs import Roofs, measure_roofs
from triton_curv.profiling.stopwatch import CaptureError, Stopwatch, peak_extra_bytes, stopwatch_for
from triton_curv.training.timing import one_thread

NOT_OPS = ("case", "shapes")


@dataclass(frozen=True)
class Row:
    """One case, measured. Times in ms, rates in TFLOP/s and GB/s, `roof` the share of the roof that was reached."""

    op: str
    case: str
    right: bool
    how: str
    ours_ms: float
    best: str
    best_ms: float
    speedup: float
    tflops: float
    gbs: float
    roof: float
    error: float
    allowed_error: float
    extra_mib: str
    bar: str


def op_names() -> list[str]:
    """Ops that have cases, by their files."""
    return sorted(m.name for m in pkgutil.iter_modules(kernel_cases.__path__) if m.name not in NOT_OPS)


def cases_of(op: str, device: torch.device, quick: bool) -> Iterator[Case]:
    """The cases of one op, made one at a time."""
    module = importlib.import_module(f"profiles.kernel_cases.{op}")
    cases: Iterator[Case] = module.cases(device, quick)
    return cases


def measure(case: Case, device: torch.device, stopwatch: Stopwatch, roofs: Roofs) -> Row:
    """Check a case, then time it beside its alternatives."""
    error, allowed = case.error(), case.allowed_error()
    times = stopwatch.interleave({"ours": case.ours, **case.alternatives}, case.eager)
    medians = {name: statistics.median(t.seconds) for name, t in times.items()}
    ours = medians.pop("ours")
    best = min(medians, key=medians.__getitem__, default="")
    best_time = medians.get(best, float("nan"))
    extra = {name: peak_extra_bytes(call, device) / 2**20 for name, call in case.peak_bytes.items()}
    return Row(
        op=case.op,
        case=case.name,
        right=error <= allowed,
        how="/".join(sorted({t.how for t in times.values()})),
        ours_ms=ours * 1e3,
        best=best,
        best_ms=best_time * 1e3,
        speedup=best_time / ours,
        tflops=case.flops / ours / 1e12,
        gbs=case.bytes / ours / 1e9,
        roof=roofs.least_time(case.flops, case.bytes, case.bound) / ours,
        error=error,
        allowed_error=allowed,
        extra_mib=" ".join(f"{name} {mib:.2f}" for name, mib in extra.items()),
        bar=case.bar,
    )


def line_of(row: Row) -> str:
    """A row as one line of the table."""
    times = f"{row.ours_ms:10.3f} {row.best_ms:10.3f} {row.speedup:7.2f}"
    rates = f"{row.tflops:8.2f} {row.gbs:8.1f} {row.roof:6.0%}"
    wrong = "" if row.right else f"  WRONG: error {row.error:.1e}, allowed {row.allowed_error:.1e}"
    memory = f"  MiB: {row.extra_mib}" if row.extra_mib else ""
    return f"{row.op:26.26} {row.case:44.44} {times} {rates}  {row.best} [{row.how}]{memory}{wrong}"


@dataclass
class Progress:
    """What a run has behind it, and what a process that takes over must know.

    `done` holds "op: case" of all rows, `wrong` counts those that were not right, `missing` says what was left out or
    broke; `left` are the ops to go on with in a new process, `eager` those whose calls are to be timed without graphs.
    """

    done: list[str] = field(default_factory=list)
    wrong: int = 0
    missing: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    eager: list[str] = field(default_factory=list)

    def arguments(self) -> list[str]:
        """For the process that goes on."""
        named = (("--done", self.done), ("--missing", self.missing), ("--eager", self.eager))
        flags = [part for name, values in named for value in values for part in (name, value)]
        return [*self.left, "--wrong", str(self.wrong), *flags]


def run(
    ops: list[str],
    device: torch.device,
    quick: bool,
    budget: float,
    progress: Progress,
    keep: Callable[[Row], None] = lambda row: None,
) -> None:
    """Measure, printing each line as it comes; `keep` gets each row. If CUDA is spoiled, some ops stay `left`."""
    end = time.monotonic() + budget
    roofs = measure_roofs(device, stopwatch_for(device))
    print(
        f"roofs: {roofs.tensor / 1e12:.2f} TFLOP/s bf16, {roofs.fp32 / 1e12:.2f} TFLOP/s fp32, "
        f"{roofs.memory / 1e9:.0f} GB/s\n"
        f"{'op':26} {'case':44} {'ours ms':>10} {'best ms':>10} {'faster':>7} {'TFLOP/s':>8} {'GB/s':>8} {'roof':>6}",
        flush=True,
    )
    left = list(ops)
    for only_quick in (True,) if quick else (True, False):  # what has a bar comes first, of every op
        for position, op in enumerate(ops):
            share = time.monotonic() + (end - time.monotonic()) / (len(ops) - position)
            if op not in left:
                continue
            stopwatch = stopwatch_for(device, graphs=op not in progress.eager)
            try:
                for case in cases_of(op, device, only_quick):
                    if f"{case.op}: {case.name}" in progress.done:
                        continue
                    if time.monotonic() > share:
                        progress.missing.append(f"{op}: {case.name} and later: no time left")
                        left.remove(op)
                        break
                    row = measure(case, device, stopwatch, roofs)
                    print(line_of(row), flush=True)
                    progress.done.append(f"{case.op}: {case.name}")
                    progress.wrong += not row.right
                    keep(row)
                    del case
                    gc.collect()
            except KeyboardInterrupt:
                progress.missing.append(f"{op} and later: interrupted")
                return
            except Exception as error:  # one that breaks must not take the others' figures with it; it is reported
                print(f"{op:26} BROKE: {type(error).__name__}: {error}", flush=True)
                again = isinstance(error, CaptureError) and op not in progress.eager
                if again:
                    progress.eager.append(op)
                else:
                    progress.missing.append(f"{op}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
                    left.remove(op)
                if again or is_spoiled(device):
                    progress.left = left
                    return


def main() -> int:
    """Measure, print, append; 1 if a case was wrong, broke or was left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", choices=[[], *op_names()])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer cases of each op")
    parser.add_argument("--budget", type=float, default=600.0, metavar="SECONDS")
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "kernels.csv")
    for name in ("--done", "--missing", "--eager"):  # what a process before this one leaves to it
        parser.add_argument(name, action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--wrong", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    end = time.monotonic() + arguments.budget
    progress = Progress(arguments.done, arguments.wrong, arguments.missing, [], arguments.eager)
    with one_thread() if device.type == "cpu" else nullcontext():
        run(
            *(arguments.ops or op_names(), device, arguments.quick, arguments.budget, progress),
            keep=lambda row: append_rows(arguments.csv, [asdict(row)], device),
        )
    if progress.left:
        print(f"CUDA is spoiled; going on with {', '.join(progress.left)} in a new process", flush=True)
        options = ["--device", arguments.device, "--csv", str(arguments.csv), *["--quick"] * arguments.quick]
        budget = ["--budget", f"{end - time.monotonic():.0f}"]
        command = [sys.executable, "-m", "profiles.bench_kernels", *progress.arguments(), *options, *budget]
        os.execv(sys.executable, command)
    for line in progress.missing:
        print(f"missing: {line}")
    return int(bool(progress.missing) or progress.wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
