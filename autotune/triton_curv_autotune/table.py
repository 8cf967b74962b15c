"""Tables: many entries in one JSON file, to export, import, merge and ship."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from triton_curv_autotune.entry import Entry, from_json
from triton_curv_autotune.errors import InvalidEntryError, UnknownOpError
from triton_curv_autotune.key import SCHEMA, canonical
from triton_curv_autotune.registry import get_op
from triton_curv_autotune.validate import member, parse
from triton_curv_kernels.backend import DeviceLimits

LARGEST_TABLE = 64 << 20


@dataclass(frozen=True)
class Table:
    """Entries, and `devices`: names of the devices that they are for, beside the one that each entry has itself."""

    entries: tuple[Entry, ...]
    devices: tuple[str, ...] = ()

    def to_text(self) -> str:
        """JSON, one entry a line, in the order of their keys."""
        rows = sorted((canonical(entry.key), canonical(entry.to_json())) for entry in self.entries)
        header = f'{{"schema": {SCHEMA}, "devices": {json.dumps(list(self.devices))}, "entries": ['
        return "\n".join([header, ",\n".join(row for _, row in rows), "]}", ""])


@dataclass(frozen=True)
class Refused:
    """An entry of a file that was not taken, by its place in it, and why."""

    place: int
    reason: str


def read_table(content: bytes) -> tuple[Table, list[Refused]]:
    """Decode a table; entries that don't pass every check are named, not taken.

    Raises:
        InvalidEntryError: no table at all.

    """
    if len(content) > LARGEST_TABLE:
        raise InvalidEntryError(f"expected a table of at most {LARGEST_TABLE} bytes, got {len(content)}")
    data = parse(content)
    if member(data, "schema", int) != SCHEMA:
        raise InvalidEntryError(f"expected a table of schema {SCHEMA}, got {data['schema']}")
    devices = member(data, "devices", list)
    if not all(isinstance(name, str) for name in devices):
        raise InvalidEntryError(f"expected names of devices, got {devices!r:.60}")
    entries: list[Entry] = []
    refused: list[Refused] = []
    for place, row in enumerate(member(data, "entries", list)):
        try:
            entries.append(from_json(row, get_op(member(row, "op", str))))
        except (InvalidEntryError, UnknownOpError) as error:
            refused.append(Refused(place, str(error)))
    return Table(tuple(entries), tuple(devices)), refused


def merge(tables: Sequence[Iterable[Entry]]) -> list[Entry]:
    """The union: of one key all measurements, of one config the last table's."""
    merged: dict[str, Entry] = {}
    for entry in (entry for table in tables for entry in table):
        name = canonical(entry.key)
        known = merged.get(name)
        if known is None or known.kind == "analytic":
            merged[name] = entry
        elif entry.kind == "measured":
            merged[name] = known.with_measurements(entry.measurements, entry.provenance)
    return list(merged.values())


def write_table(path: Path, table: Table) -> None:
    """Write to a file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(table.to_text(), encoding="utf-8")
    temporary.replace(path)


@lru_cache(maxsize=8)
def shipped_tables(device: str = "") -> tuple[Table, ...]:
    """`tuned/*.json` of this package, of all devices or of one alone: to check all rows takes a third of a second."""
    folder = resources.files("triton_curv_autotune") / "tuned"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".json")), key=lambda file: file.name)
    contents = [file.read_bytes() for file in files]
    return tuple(read_table(content)[0] for content in contents if not device or device in _shipped_devices(content))


def _shipped_devices(content: bytes) -> list[str]:
    """The names in the first line, which is all but the entries."""
    return member(parse(content.partition(b"\n")[0] + b"]}"), "devices", list)


def shipped_entries(limits: DeviceLimits, tables: Sequence[Table]) -> list[Entry]:
    """Shipped entries for exactly this device; measured ones only if the kernels have not changed since."""
    rows = [(table, entry) for table in tables for entry in table.entries]
    return [
        _on(entry, limits)
        for table, entry in rows
        if limits in _devices(table, entry) and (entry.kind == "analytic" or entry.source == entry.op.source)
    ]


def _devices(table: Table, entry: Entry) -> list[DeviceLimits]:
    own = entry.environment.limits()
    names = dict.fromkeys((own.name, *table.devices))
    return [DeviceLimits(own.platform, own.multiprocessors, own.shared_memory, name, own.arch) for name in names]


def _on(entry: Entry, limits: DeviceLimits) -> Entry:
    moved: Any = entry.op.on(entry.problem, limits)
    return Entry(**{**vars(entry), "problem": moved})
