"""`resolve(op, problem) -> config`: a dict look-up that never measures (DESIGN section 11).

The first look-up of a problem goes through these sources, in order:

    override       `with override(op, config)`
    process        `learn`, what `tune` found in this process, what `sync` made all ranks agree on
    store          files that a tuning run left on this machine, for this very device, compiler and kernel source
    shipped        measured rows of `tuned/*.json` for this device
    nearest        measured for a problem of other sizes, at most 4 times apart in all, on this device
    analytic       analytic rows of `tuned/*.json`
    default        the op's analytic default

The last three are guesses, announced by one `TuningWarning` a key where there is a device to tune for. All that a file
says is checked against the op before use. In deterministic mode (`torch.use_deterministic_algorithms(True)`) the fields
that change results follow from the shape alone, for all sources but override and `learn`.
"""

import threading
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from triton_curv_autotune.entry import Entry, Provenance
from triton_curv_autotune.errors import TuningWarning
from triton_curv_autotune.key import digest, encode, environment, local_devices
from triton_curv_autotune.registry import Op, get_op
from triton_curv_autotune.store import Store, default_store
from triton_curv_autotune.table import Table, shipped_entries, shipped_tables
from triton_curv_kernels.backend import DeviceLimits
from triton_curv_kernels.choice import forget_answers, set_chooser

Config = Any
"""A kernel's own frozen config dataclass; this package only carries it."""

Source = Literal["override", "process", "store", "shipped", "nearest", "analytic", "default"]
GUESSES: tuple[Source, ...] = ("nearest", "analytic", "default")
FARTHEST = 2.0
"""Octaves between sizes beyond which a neighbour's config is no better guess than the default."""


@dataclass(frozen=True)
class Choice:
    """A config and where it comes from; `ms` and `gain` over the default as measured, on `problem` if it is another."""

    op: str
    config: Config
    source: Source
    problem: Hashable
    ms: float | None = None
    gain: float | None = None
    provenance: Provenance | None = None

    def __str__(self) -> str:
        measured = "" if self.ms is None else f", {self.ms:.4g} ms, {self.gain:.3f} times as fast as the default"
        origin = "" if self.provenance is None else f" ({self.provenance.date}, torch {self.provenance.torch})"
        return f"{self.op}: {self.config} from {self.source}{origin}{measured}; for {self.problem}"


@dataclass(frozen=True)
class _Known:
    source: Source
    entry: Entry


class Resolver:
    """Choices of a process. Hits are single dict look-ups, safe from any thread; misses and changes take a lock."""

    def __init__(
        self,
        store: Callable[[], Store] = default_store,
        shipped: Callable[[], Sequence[Table]] | None = None,
        devices: Callable[[], Sequence[DeviceLimits]] = local_devices,
    ) -> None:
        self._make_store = store
        self._make_shipped = shipped
        self._find_devices = devices
        self._lock = threading.RLock()
        self._choices: tuple[dict[Any, Choice], dict[Any, Choice]] = ({}, {})  # deterministic: the second
        self._overrides: dict[str, Config] = {}
        self._learned: dict[tuple[str, Hashable], Config] = {}
        self._tables: dict[DeviceLimits, dict[Any, _Known]] = {}
        self._warned: set[Any] = set()

    def resolve(self, op: str, problem: Hashable) -> Config:
        """The config for `op` on `problem` (the op's frozen problem dataclass). Raises UnknownOpError."""
        choice = self._choices[torch.are_deterministic_algorithms_enabled()].get((op, problem))
        return (choice or self.explain_choice(op, problem)).config

    def explain_choice(self, op: str, problem: Hashable) -> Choice:
        """What `resolve` gives, and why."""
        deterministic = torch.are_deterministic_algorithms_enabled()
        choices = self._choices[deterministic]
        choice = choices.get((op, problem))
        if choice is None:
            declared = get_op(op)
            if type(problem) is not declared.problem:
                raise TypeError(f"expected a {declared.problem.__name__} for {op}, got {problem!r}")
            with self._lock:
                choice = choices[op, problem] = self._look_up(declared, problem, deterministic)
                warn = self._guessed(declared, choice, problem)
            if warn:
                message = f"nothing measured, source '{choice.source}', for {op} on {problem}: run `triton-curv tune`"
                warnings.warn(message, TuningWarning, stacklevel=3)
        return choice

    def _guessed(self, op: Op[Any, Any], choice: Choice, problem: Any) -> bool:
        """Whether to say so: once a key, and not where there is no device to tune for."""
        key = (op.name, op.bucket(problem))
        new = choice.source in GUESSES and bool(problem.limits.name) and key not in self._warned
        if new:
            self._warned.add(key)
        return new

    def _look_up(self, op: Op[Any, Any], problem: Any, deterministic: bool) -> Choice:
        if op.name in self._overrides:
            return Choice(op.name, self._overrides[op.name], "override", problem)
        if (op.name, problem) in self._learned:
            return Choice(op.name, self._learned[op.name, problem], "process", problem)
        pinned = op.pinned(problem) if deterministic else None
        for known in self._candidates(op, problem):
            config = _taken(known, problem) if pinned is None else known.entry.best(pinned, like=pinned)
            if op.supports(config, problem) or config == pinned:
                return _choice(known, config)
        return Choice(op.name, op.default(problem) if pinned is None else pinned, "default", problem)

    def _candidates(self, op: Op[Any, Any], problem: Any) -> Iterator[_Known]:
        """Entries that may decide, best source first."""
        table = self.table(problem.limits)
        bucket = op.bucket(problem)
        exact = table.get((op.name, bucket))
        if exact is not None and exact.entry.kind == "measured":
            yield exact
        yield from self._neighbours(op, bucket, table)
        if exact is not None and exact.entry.kind == "analytic":
            yield exact

    def _neighbours(self, op: Op[Any, Any], bucket: Any, table: dict[Any, _Known]) -> Iterator[_Known]:
        near = []
        for (name, _), known in table.items():
            if name == op.name and known.entry.kind == "measured":
                distance = op.distance(bucket, known.entry.problem)
                if 0 < distance <= FARTHEST:
                    near.append((distance, digest(encode(known.entry.problem)), known.entry))
        for _, _, entry in sorted(near, key=lambda item: item[:2]):
            yield _Known("nearest", entry)

    def table(self, limits: DeviceLimits) -> dict[Any, _Known]:
        """All that is known for a device; its files are read at the first call. A device without a name has none."""
        with self._lock:
            table = self._tables.get(limits)
            if table is None:
                table = {}
                if limits.name:
                    _add(table, "shipped", self._shipped_entries(limits))
                    _add(table, "store", reversed(list(self._make_store().entries(environment(limits)))))
                self._tables[limits] = table
            return table

    def _shipped_entries(self, limits: DeviceLimits) -> list[Entry]:
        tables = shipped_tables(limits.name) if self._make_shipped is None else self._make_shipped()
        return shipped_entries(limits, tables)

    def entries(self, limits: DeviceLimits) -> list[Entry]:
        """Measured entries that are known for a device."""
        return [known.entry for known in self.table(limits).values() if known.entry.kind == "measured"]

    def learn(self, op: str, problem: Hashable, config: Config) -> None:
        """Use `config` for `op` on exactly `problem` from now on, in this process."""
        get_op(op)
        with self._lock:
            self._learned[op, problem] = config
            self._forget_choices()

    def add(self, entries: Iterable[Entry]) -> None:
        """Take measured entries into this process' table, over what files say."""
        with self._lock:
            for entry in entries:
                _add(self.table(entry.environment.limits()), "process", [entry])
            self._forget_choices()

    def replace(self, limits: DeviceLimits, entries: Iterable[Entry]) -> None:
        """Let the table of a device be these measured entries and what is shipped, nothing else."""
        with self._lock:
            table: dict[Any, _Known] = {}
            _add(table, "shipped", self._shipped_entries(limits))
            _add(table, "process", entries)
            self._tables[limits] = table
            self._forget_choices()

    def reload(self) -> None:
        """Read files anew at the next look-up; what `tune` and `sync` put into the process' table is in files, too."""
        with self._lock:
            self._tables.clear()
            self._forget_choices()

    @contextmanager
    def override(self, op: str, config: Config) -> Iterator[None]:
        """Use `config` for every problem of `op` inside the `with` block, in all threads."""
        get_op(op)
        with self._lock:
            before = self._overrides.copy()
            self._overrides[op] = config
            self._forget_choices()
        try:
            yield
        finally:
            with self._lock:
                self._overrides.pop(op)
                if op in before:
                    self._overrides[op] = before[op]
                self._forget_choices()

    def state_digest(self) -> str:
        """Digest of everything that choices for this process' GPUs follow from: a part of compile caches' keys."""
        with self._lock:
            known = [known for limits in self._find_devices() for known in self.table(limits).values()]
            entries = sorted(digest([k.source, k.entry.to_json()]) for k in known)
            explicit = sorted(repr(item) for item in (*self._overrides.items(), *self._learned.items()))
            return digest([entries, explicit])[:16] if entries or explicit else ""

    def _forget_choices(self) -> None:
        """Fresh dicts instead of cleared ones: a look-up that is under way in another thread ends in the old ones."""
        self._choices = ({}, {})
        forget_answers()


def _add(table: dict[Any, _Known], source: Source, entries: Iterable[Entry]) -> None:
    for entry in entries:
        known = table.get(entry.place)
        if known is None or entry.kind == "measured":
            table[entry.place] = _Known("analytic" if entry.kind == "analytic" else source, entry)


def _taken(known: _Known, problem: Any) -> Config:
    """What an entry says about a problem: where the default won nearby, that is the problem's own default."""
    op, entry = known.entry.op, known.entry
    if known.source == "nearest" and entry.config == op.default(entry.problem):
        return op.default(problem)
    return entry.config


def _choice(known: _Known, config: Config) -> Choice:
    entry = known.entry
    chosen, default = entry.measurement(config), entry.measurement(entry.op.default(entry.problem))
    ms = None if chosen is None else chosen.ms
    gain = None if chosen is None or default is None else default.ratio / chosen.ratio
    return Choice(entry.op.name, config, known.source, entry.problem, ms, gain, entry.provenance)


def install() -> None:
    """Let kernels ask this process' resolver where their caller names no config."""
    set_chooser(resolve, state_digest)


process = Resolver()
resolve = process.resolve
explain_choice = process.explain_choice
learn = process.learn
override = process.override
reload = process.reload
state_digest = process.state_digest
