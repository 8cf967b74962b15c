"""`tune(problems, budget_s)`: measure configs until the time is up; what is finished is published at once.

Problems take turns. A turn takes the next few configs that were never measured, those nearest to what is known to be
good first, checks their results, and times those that are right in rounds interleaved with the analytic default's.
"""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from triton_curv_autotune.bench import Bench, GpuBench
from triton_curv_autotune.entry import Entry, Measurement, new_entry, provenance_now
from triton_curv_autotune.errors import AutotuneError
from triton_curv_autotune.key import environment
from triton_curv_autotune.registry import Op, get_op
from triton_curv_autotune.resolve import Resolver, process
from triton_curv_autotune.store import Store, default_store

TURN = 7
"""Configs of one turn, beside the default."""

Problems = Iterable[tuple[str, Any]]


class Watcher(Protocol):
    """Follows a tuning run, to show a progress bar say."""

    def advanced(self, entry: Entry, measured: int, left: int, seconds_left: float) -> None:
        """A turn is over: `measured` configs of this problem in this run, `left` are left of it."""


@dataclass
class Job:
    """A bucketed problem on its way: its entry so far, the configs not yet measured."""

    op: Op[Any, Any]
    problem: Any
    entry: Entry
    todo: list[Any]
    seeds: list[Any] = field(default_factory=list)
    measured: int = 0
    failure: str = ""

    def turn(self, bench: Bench) -> None:
        """Check and time the default and the next configs."""
        default = self.op.default(self.problem)
        near = [*self.seeds, default, self.entry.config]
        self.todo.sort(key=lambda config: min(config_distance(config, seed) for seed in near))
        chunk, self.todo = self.todo[:TURN], self.todo[TURN:]
        reasons = bench.check(self.op, self.problem, [default, *chunk])
        if reasons[0]:
            self.failure, self.todo = f"the default fails: {reasons[0]}", []
            return
        right = [config for config, reason in zip(chunk, reasons[1:], strict=True) if not reason]
        wrong = [
            Measurement(config, reason=reason) for config, reason in zip(chunk, reasons[1:], strict=True) if reason
        ]
        times = bench.medians(self.op, self.problem, [default, *right])
        timed = [Measurement(c, ms, ms / times[0]) for c, ms in zip([default, *right], times, strict=True)]
        self.entry = self.entry.with_measurements([*timed, *wrong], provenance_now())
        self.measured += len(chunk)


def tune(
    problems: Problems,
    budget_s: float = 120.0,
    *,
    bench: Bench | None = None,
    store: Store | None = None,
    resolver: Resolver = process,
    watcher: Watcher | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Job]:
    """Measure configs of (op, problem) pairs for `budget_s` seconds, and let `resolver` use what is found.

    Every problem gets one turn before any gets a second. After Ctrl-C, or any other error, all turns that were finished
    are in the store and in use. Configs that were measured before, by any run in this environment, are not measured
    again, so that a run continues where the last one ended.

    Returns:
        A job for each distinct bucket, in the order given.

    Raises:
        AutotuneError: torch.compile traces, or a CUDA graph is captured.
        NoDeviceError: there is no GPU, and no `bench` was given.
        OSError: the store can't be written.

    """
    if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        raise AutotuneError("expected a call outside torch.compile and the capture of CUDA graphs: tuning runs kernels")
    jobs = plan(problems, resolver)
    bench = bench or GpuBench(torch.device("cuda"))
    store = store or default_store()
    deadline = clock() + budget_s
    waiting = deque(job for job in jobs if job.todo or not job.entry.measurements)
    try:
        while waiting and (left := deadline - clock()) > 0:
            job = waiting.popleft()
            job.turn(bench)
            if not job.failure:
                store.write(job.entry)
                resolver.add([job.entry])
            if watcher is not None:
                watcher.advanced(job.entry, job.measured, len(job.todo), left)
            if job.todo:
                waiting.append(job)
    finally:
        bench.release()
    return jobs


def plan(problems: Problems, resolver: Resolver = process) -> list[Job]:
    """What there is to measure: one job for each distinct bucket, seeded with the winners of problems nearby."""
    jobs: dict[Any, Job] = {}
    for name, problem in problems:
        op = get_op(name)
        bucket = op.bucket(problem)
        if (name, bucket) not in jobs:
            entry, seeds = _start(op, bucket, resolver)
            known = {op.default(bucket), *(m.config for m in entry.measurements)}
            todo = [config for config in op.candidates(bucket) if config not in known]
            jobs[name, bucket] = Job(op, bucket, entry, todo, seeds)
    return list(jobs.values())


def _start(op: Op[Any, Any], bucket: Any, resolver: Resolver) -> tuple[Entry, list[Any]]:
    here = environment(bucket.limits)
    found = [entry for entry in resolver.entries(bucket.limits) if entry.op.name == op.name]
    near = [entry.config for entry in found if math.isfinite(op.distance(entry.problem, bucket))]
    same = [e for e in found if e.problem == bucket and e.environment == here and e.source == op.source]
    return same[0] if same else new_entry(op, here, bucket), near


def config_distance(one: Any, two: Any) -> float:
    """Octaves between the numbers of two configs, and 1 for every other field that differs."""
    total = 0.0
    for part in dataclasses.fields(one):
        a, b = getattr(one, part.name), getattr(two, part.name)
        if type(a) is int and type(b) is int:
            total += abs(math.log2(max(a, 1) / max(b, 1)))
        else:
            total += a != b
    return total


@dataclass(frozen=True)
class Verdict:
    """What measuring an entry again shows: why its config is out ("" if it is right), its gain now."""

    entry: Entry
    reason: str
    gain: float


def verify(entries: Sequence[Entry], bench: Bench) -> list[Verdict]:
    """Check and time the choices of entries again, beside the defaults."""
    verdicts = []
    try:
        for entry in entries:
            default = entry.op.default(entry.problem)
            (reason,) = bench.check(entry.op, entry.problem, [entry.config])
            gain = 0.0
            if not reason:
                base, chosen = bench.medians(entry.op, entry.problem, [default, entry.config])
                gain = base / chosen
            verdicts.append(Verdict(entry, reason, gain))
    finally:
        bench.release()
    return verdicts
