"""Every default configuration of every kernel, compiled for the GPU that it is for, without that GPU.

python -m profiles.compile_defaults [--arch sm_90 ...] [--seconds 240] [--jobs 2] [--csv FILE]

The calls of `profiles.default_calls` are made for A100, H100, H200, B200, MI300X, eagerly and as torch.compile does
it. Launches that would compile to the same binary (kernel, constants, types and alignment of the arguments, target)
are one row: registers, spills and shared memory of the binary, matrix instructions and 16-byte loads of its assembly.
Rows of an unchanged kernel are kept, so that a run which stops at its limit goes on where it was; classes (the same but
for the alignment of arguments, and fp16 as bf16) that have no row yet come first. Exit status: 0 if all are compiled
and none spills, 1 if one is in want (it is named), 2 if time was too short.
"""

import argparse
import csv
import hashlib
import multiprocessing
import os
import queue
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import triton
from torch._library.triton import set_wrap_triton_enabled
from triton.runtime.jit import JITFunction, compute_cache_key

from profiles.default_calls import Call, calls
from profiles.tuned_tables import DEVICES
from tests.support.offline import MACHINES, Arch, Launch, Report, offline_target, quick_report, wide_loads
from triton_curv_autotune.registry import get_op
from triton_curv_kernels import (
    apply_inverse,
    cg,
    choice,
    factor_config,
    momentum,
    neumann,
    patch_config,
    patch_pixel_rows,
    symmetric,
)
from triton_curv_kernels.backend import DeviceLimits

CSV = Path(__file__).parent / "results" / "compiled_defaults.csv"
TRACED = (apply_inverse, cg, momentum, neumann, symmetric)
"""Modules whose launchers make other launches in a trace."""


def like(arch: str, op: str, kernel: str, constants: str, types: str) -> tuple[str, ...]:
    """Kernel, target, constants (not those that sizes and strides of 1 are) and dtypes, fp16 as bf16."""
    fixed = " ".join(word for word in constants.split() if word[0].isupper() or word.startswith("num_"))
    dtypes = " ".join(word.removesuffix(":16") for word in types.split() if word.startswith("*"))
    return (arch, op, kernel, fixed.replace("fp16", "bf16"), dtypes.replace("fp16", "bf16"))


@dataclass(frozen=True)
class Variant:
    """A launch that compiles to a binary of its own; `compile` makes it."""

    arch: Arch
    op: str
    case: str
    kernel: str
    constants: str
    types: str
    key: str
    source: str
    compile: Callable[[], Launch]

    @property
    def like(self) -> tuple[str, ...]:
        """The same for variants that differ in the alignment of their arguments only, or in fp16 for bf16."""
        return like(self.arch, self.op, self.kernel, self.constants, self.types)


@dataclass(frozen=True)
class Row:
    """What one binary holds. `case` is the first call that needs it; `key` and `source` say what was compiled."""

    arch: str
    op: str
    case: str
    kernel: str
    constants: str
    types: str
    registers: int
    spills: int
    shared: int
    fits: bool
    matrix: int
    wide_loads: int
    atomics: int
    key: str
    source: str
    triton: str

    @classmethod
    def of(cls, variant: Variant, found: Report, wide: int) -> "Row":
        """The row of a compiled variant."""
        return cls(
            *(variant.arch, variant.op, variant.case, variant.kernel, variant.constants, variant.types),
            registers=found.registers,
            spills=found.spills,
            shared=found.shared,
            fits=found.fits_shared,
            matrix=found.matrix_instructions,
            wide_loads=wide,
            atomics=found.counts["ATOM"] + found.counts["atomic"],
            key=variant.key,
            source=variant.source,
            triton=triton.__version__,
        )

    @property
    def is_fine(self) -> bool:
        """No spills, no atomics, and shared memory that there is."""
        return self.fits and self.spills == self.atomics == 0


@contextmanager
def defaults_for(limits: DeviceLimits) -> Iterator[None]:
    """Launchers take the analytic defaults of a device that is not here."""
    before = choice._chooser, choice._tables

    def default(op: str, problem: Any) -> Any:
        declared = get_op(op)
        return declared.default(declared.on(problem, limits))

    choice.set_chooser(default)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for module in (factor_config, patch_config, patch_pixel_rows):  # where a launcher decides without a chooser
                patch.setattr(module, "device_limits", lambda _: limits)
            yield
    finally:
        choice.set_chooser(*before)


def variants(archs: Sequence[Arch], made: Callable[[], Iterator[Call]] = calls) -> list[Variant]:
    """The distinct binaries that the calls need on the devices of `archs`; nothing is compiled."""
    found: dict[str, Variant] = {}
    for limits, traced in product([limits for limits, _ in DEVICES.values()], (False, True)):
        arch = next(arch for arch in MACHINES if arch == limits.arch)
        if arch in archs:
            with defaults_for(limits), intercepted(arch, found, traced) as at:
                for call in made():
                    at(call)
                    call.launch()
    return list(found.values())


@contextmanager
def intercepted(arch: Arch, found: dict[str, Variant], traced: bool) -> Iterator[Callable[[Call], None]]:
    """Launches inside are noted in `found`, by key, and compile nothing; tell the yielded function whose they are."""
    known: set[tuple[str, str]] = set()
    calling: list[Call] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        whole = {"debug": False, "instrumentation_mode": "", **options}
        _, keys, _, _, bind = self.device_caches[driver.get_current_device()]
        bound, specialization, parsed = bind(*args, **whole)
        full = compute_cache_key(keys, specialization, parsed)
        if (self.__name__, full) in known:
            return
        known.add((self.__name__, full))
        key = hashlib.sha256(f"{arch} {self.__module__} {self.__name__} {full}".encode()).hexdigest()[:12]
        constants, types = _described(specialization, bound, options)
        case = f"traced: {calling[-1].case}" if traced else calling[-1].case
        named = (arch, calling[-1].op, case, self.__name__, constants, types, key, self.cache_key[:12])
        found.setdefault(key, Variant(*named, _compiler(arch, self, args, options)))

    with offline_target(arch) as driver, set_wrap_triton_enabled(False), pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        if traced:
            for module in TRACED:
                patch.setattr(module, "is_traced", lambda *_: True)
        yield calling.append


def _described(specialization: Sequence[Any], bound: Any, options: dict[str, Any]) -> tuple[str, str]:
    """Constants and launch options; types of the other arguments, `:16` after what is a multiple of 16."""
    constants = {
        name: value
        for (name, value), (kind, _) in zip(bound.items(), specialization, strict=True)
        if kind == "constexpr"
    }
    constants |= {name: value for name, value in options.items() if name.startswith("num_")}
    words = [f"{kind}:16" if mark == "D" else str(kind) for kind, mark in specialization if kind != "constexpr"]
    return " ".join(f"{name}={value}" for name, value in constants.items() if value is not None), " ".join(words)


def _compiler(arch: Arch, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Callable[[], Launch]:
    """Compiles a kernel as a launch with these arguments does."""

    def compile() -> Launch:
        with offline_target(arch) as driver:
            kernel.run(*args, grid=(1,), warmup=True, **options)
            return driver.launches[-1]

    return compile


def measured(some: Sequence[Variant], jobs: int, end: float) -> Iterator[Row]:
    """Rows of variants as they are compiled, by `jobs` processes, until `end` on the monotonic clock."""
    context = multiprocessing.get_context("fork")
    rows: Any = context.Queue()

    def work(first: int) -> None:
        for variant in some[first::jobs]:
            if time.monotonic() > end:
                break
            launch = variant.compile()
            rows.put(Row.of(variant, quick_report(launch), wide_loads(launch)))
        rows.put(None)

    workers = [context.Process(target=work, args=(first,), daemon=True) for first in range(jobs)]
    for worker in workers:
        worker.start()
    running = jobs
    while running:
        try:
            row = rows.get(timeout=5)
        except queue.Empty:
            if not any(worker.is_alive() for worker in workers):
                raise RuntimeError("a process that compiles ended without a word") from None
            continue
        if row is None:
            running -= 1
        else:
            yield row


def in_order(some: Sequence[Variant], known: Collection[tuple[str, ...]]) -> list[Variant]:
    """One variant of each class that is not known, with the least aligned arguments, before all others."""
    least: dict[tuple[str, ...], Variant] = {}
    for variant in sorted(some, key=lambda v: ("float16" in v.case.split(), v.types.count(":16"))):
        if variant.like not in known:
            least.setdefault(variant.like, variant)
    first = list(least.values())
    keys = {variant.key for variant in first}
    return first + [variant for variant in some if variant.key not in keys]


def read_rows(path: Path) -> dict[str, Row]:
    """The rows of a CSV by key."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        texts = list(csv.DictReader(file))
    kinds: dict[Any, Callable[[str], Any]] = {int: int, bool: lambda text: text == "True", str: str}
    return {row["key"]: Row(**{f.name: kinds[f.type](row[f.name]) for f in fields(Row)}) for row in texts}


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """All rows, in a fixed order."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(
            asdict(row) for row in sorted(rows, key=lambda r: (r.arch, r.op, r.kernel, r.constants, r.types))
        )


def main(arguments: list[str] | None = None) -> int:
    """Compile what has no row yet, write all rows, name what is in want."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=list(MACHINES), action="append")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--csv", type=Path, default=CSV)
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    archs = options.arch or list(MACHINES)
    needed = variants(archs)
    of_others = [row for row in read_rows(options.csv).values() if row.arch not in archs]
    known = read_rows(options.csv)
    rows = {v.key: known[v.key] for v in needed if v.key in known and known[v.key].source == v.source}
    classes = {like(r.arch, r.op, r.kernel, r.constants, r.types) for r in rows.values()}
    left = in_order([v for v in needed if v.key not in rows], classes)
    print(f"{len(needed)} binaries, {len(left)} to compile", flush=True)
    for row in measured(left, options.jobs, end):
        rows[row.key] = row
        if not row.is_fine:
            print(f"IN WANT: {row}", flush=True)
        if len(rows) % 50 == 0:
            write_rows(options.csv, [*of_others, *rows.values()])
    write_rows(options.csv, [*of_others, *rows.values()])
    wanting = [row for row in rows.values() if not row.is_fine]
    missing = len(needed) - len(rows)
    print(f"{len(rows)} rows, {len(wanting)} in want, {missing} not compiled for lack of time")
    for row in wanting:
        print(
            f"{row.arch} {row.kernel} {row.case}: {row.spills} spills, {row.shared} bytes shared, {row.atomics} atomics"
        )
    return 1 if wanting else 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
