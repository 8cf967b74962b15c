"""What is known of an op on one (bucketed) problem in one environment: a choice, and the measurements behind it."""

import datetime
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from triton_curv_autotune.errors import InvalidEntryError
from triton_curv_autotune.key import SCHEMA, Environment, canonical, digest, encode, file_of, full_key
from triton_curv_autotune.policy import MARGIN
from triton_curv_autotune.registry import Op
from triton_curv_autotune.validate import decode, member, parse
from triton_curv_kernels.backend import DeviceLimits

Kind = Literal["measured", "analytic"]


@dataclass(frozen=True)
class Measurement:
    """A config's median time in ms, and its ratio to the default's in the same rounds (sessions compare by ratio).

    `reason` says why a config is out (a wrong result, no room); its times are 0.
    """

    config: Any
    ms: float = 0.0
    ratio: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Provenance:
    """Day and versions an entry comes from."""

    date: str
    torch: str
    driver: str = ""


def provenance_now() -> Provenance:
    """Of what is measured now; SOURCE_DATE_EPOCH fixes the day."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH")
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.datetime.fromtimestamp(int(fixed), datetime.UTC) if fixed else now
    return Provenance(day.date().isoformat(), str(torch.__version__), _driver())


def _driver() -> str:
    if not torch.cuda.is_available():
        return ""
    runtime = f"rocm {torch.version.hip}" if torch.version.hip else f"cuda {torch.version.cuda}"
    read = getattr(torch._C, "_cuda_getDriverVersion", None)
    return runtime if read is None else f"{runtime}, driver {read()}"


@dataclass(frozen=True)
class Entry:
    """A choice for a problem, which is its own bucket, in an environment and for a version of the kernels."""

    op: Op[Any, Any]
    environment: Environment
    source: str
    problem: Any
    config: Any
    kind: Kind
    measurements: tuple[Measurement, ...]
    provenance: Provenance

    @property
    def key(self) -> dict[str, Any]:
        """The full key, as a file holds it."""
        return full_key(self.environment, self.op.name, self.source, encode(self.problem))

    @property
    def place(self) -> tuple[str, Any]:
        """The key inside one environment."""
        return self.op.name, self.problem

    def measurement(self, config: Any) -> Measurement | None:
        """What is known of a config that gave right results."""
        return next((m for m in self.measurements if m.config == config and not m.reason), None)

    @property
    def gain(self) -> float | None:
        """How many times as fast as the default the choice is."""
        chosen = self.measurement(self.config)
        return None if chosen is None else 1 / chosen.ratio

    def best(self, default: Any, like: Any = None) -> Any:
        """The fastest config if it beats `default` by the margin, else `default`; only such with numerics as `like`."""
        timed = [m for m in self.measurements if not m.reason]
        if like is not None:
            timed = [m for m in timed if self.op.same_numerics(m.config, like)]
        known = self.measurement(default)
        if not timed or known is None:
            return default
        fastest = min(timed, key=lambda m: m.ratio)  # of equals the first measured
        return fastest.config if fastest.ratio <= known.ratio * (1 - MARGIN) else default

    def with_measurements(self, new: Iterable[Measurement], provenance: Provenance) -> "Entry":
        """More measurements, of which the newest of a config counts, and the choice that follows from all."""
        merged = {m.config: m for m in self.measurements} | {m.config: m for m in new}
        entry = replace(self, measurements=tuple(merged.values()), kind="measured", provenance=provenance)
        return replace(entry, config=entry.best(self.op.default(self.problem)))

    def to_json(self) -> dict[str, Any]:
        """All of it, with a digest against damage."""
        content = {
            **self.key,
            "config": encode(self.config),
            "kind": self.kind,
            "measurements": [
                {"config": encode(m.config), "ms": m.ms, "ratio": m.ratio, "reason": m.reason}
                for m in self.measurements
            ],
            "provenance": encode(self.provenance),
        }
        return {**content, "digest": digest(content)}

    def to_bytes(self) -> bytes:
        """The content of its file."""
        return canonical(self.to_json()).encode()


def new_entry(op: Op[Any, Any], environment: Environment, problem: Any, kind: Kind = "measured") -> Entry:
    """An entry without measurements, for the analytic default."""
    return Entry(op, environment, op.source, problem, op.default(problem), kind, (), provenance_now())


def from_json(data: Any, op: Op[Any, Any], limits: DeviceLimits | None = None) -> Entry:
    """Decode and check an entry of `op`; for the device `limits` if given, its own otherwise.

    Raises:
        InvalidEntryError: of another schema or op, damaged, no bucket, or with a config that the problem refuses.

    """
    content = {name: item for name, item in data.items() if name != "digest"} if isinstance(data, dict) else data
    schema = member(content, "schema", int)
    if schema != SCHEMA or member(content, "op", str) != op.name:
        raise InvalidEntryError(f"expected schema {SCHEMA} and op {op.name}, got {schema} and {content['op']!r:.60}")
    if member(data, "digest", str) != digest(content):
        raise InvalidEntryError("the digest is not that of the content")
    environment = decode(Environment, member(content, "environment", dict))
    problem = decode(op.problem, member(content, "problem", dict), limits or environment.limits())
    kind = member(content, "kind", str)
    if kind not in get_args(Kind):
        raise InvalidEntryError(f"expected a kind out of {get_args(Kind)}, got {kind!r:.60}")
    measurements = tuple(_measurement(op, item) for item in member(content, "measurements", list))
    entry = Entry(
        op=op,
        environment=environment,
        source=member(content, "source", str),
        problem=problem,
        config=decode(op.config, member(content, "config", dict)),
        kind=kind,  # type: ignore[arg-type]  # compared above
        measurements=measurements,
        provenance=decode(Provenance, member(content, "provenance", dict)),
    )
    _check(entry)
    return entry


def _measurement(op: Op[Any, Any], data: Any) -> Measurement:
    ms, ratio, reason = member(data, "ms", float), member(data, "ratio", float), member(data, "reason", str)
    if not reason and not (ms > 0 and ratio > 0):
        raise InvalidEntryError(f"expected times above 0, got {ms} ms, ratio {ratio}")
    return Measurement(decode(op.config, member(data, "config", dict)), ms, ratio, reason)


def _check(entry: Entry) -> None:
    op, problem = entry.op, entry.problem
    try:
        own_bucket = op.bucket(problem) == problem
        supported = own_bucket and op.supports(entry.config, problem)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # of sizes that no tensor has
        raise InvalidEntryError(f"a problem that can't be: {error}") from None
    if not own_bucket or not supported:
        raise InvalidEntryError(f"{entry.config} is no config for {problem}")


def from_bytes(content: bytes, op: Op[Any, Any], expected: Environment) -> tuple[Entry, str]:
    """An entry of a store's file, and the name of the file that it belongs into.

    Raises:
        InvalidEntryError: as `from_json`, or of another environment or source than this process has.

    """
    entry = from_json(parse(content), op)
    if entry.environment != expected or entry.source != op.source:
        raise InvalidEntryError(f"expected an entry for {expected} and source {op.source}")
    return entry, file_of(entry.key).name
