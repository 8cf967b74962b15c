"""``triton-curv tune show | export | import | merge | verify | clear``: what was measured, and files of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table as Grid

from triton_curv.errors import ConfigurationError
from triton_curv_autotune.bench import GpuBench
from triton_curv_autotune.entry import Entry
from triton_curv_autotune.errors import InvalidEntryError
from triton_curv_autotune.key import encode, environment, local_devices
from triton_curv_autotune.policy import MARGIN
from triton_curv_autotune.store import Store, default_store
from triton_curv_autotune.table import Refused, Table, merge, read_table, shipped_tables, write_table
from triton_curv_autotune.tune import Verdict, verify

Row = tuple[str, Entry]
"""Source and entry."""


def describe_problem(problem: Any) -> str:
    """The fields, without the device."""
    return _fields(encode(problem))


def _fields(values: Mapping[str, Any]) -> str:
    """name=1 name=8x8 name=8192x768x12,8192x3072x12, those of a part behind its own fields' names."""
    parts = [_fields(v) if isinstance(v, Mapping) else f"{name}={_written(v, ',')}" for name, v in values.items()]
    return " ".join(parts)


def _written(value: Any, between: str) -> str:
    if not isinstance(value, list):
        return str(value)
    nested = any(isinstance(part, list) for part in value)
    return (between if nested else "x").join(_written(part, between) for part in value)


def print_json(data: Any) -> None:
    """To stdout, indented."""
    print(json.dumps(data, indent=1))


def run_show(as_json: bool) -> None:
    """Show the store's entries and the shipped ones, for this machine's GPUs; without a GPU for all devices."""
    here = local_devices()
    rows: list[Row] = [("store", entry) for entry in stored_entries(default_store())]
    rows += [(f"shipped, {entry.kind}", entry) for table in shipped_tables() for entry in table.entries]
    show_entries([row for row in rows if not here or row[1].environment.limits() in here], as_json)


def stored_entries(store: Store) -> list[Entry]:
    """All entries that kernels of these sources can use, for any device and version."""
    return [entry for found in store.environments() for entry in store.entries(found)]


def show_entries(rows: Sequence[Row], as_json: bool, left: int = 0) -> None:
    """A table of choices; `left` candidates of them are not measured yet."""
    if as_json:
        print_json({"entries": [_row(source, entry) for source, entry in rows], "candidates_left": left})
        return
    for device in dict.fromkeys(entry.environment.device for _, entry in rows):
        mine = [row for row in rows if row[1].environment.device == device]
        Console(highlight=False).print(_grid(device, mine))
    print(f"{len(rows)} entries" + (f", {left} candidates not measured yet" if left else ""))


def _grid(device: str, rows: Sequence[Row]) -> Grid:
    grid = Grid(title=device, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("op", "problem", "config", "source", "ms", "gain"):
        grid.add_column(column, justify="right" if column in ("ms", "gain") else "left", no_wrap=column == "op")
    for source, entry in rows:
        row = _row(source, entry)
        config = _fields(row["config"])
        ms = "-" if row["ms"] is None else f"{row['ms']:.4g}"
        gain = "-" if row["gain"] is None else f"x{row['gain']:.3f}"
        grid.add_row(row["op"], describe_problem(entry.problem), config, source, ms, gain)
    return grid


def _row(source: str, entry: Entry) -> dict[str, Any]:
    chosen = entry.measurement(entry.config)
    return {
        "device": entry.environment.device,
        "op": entry.op.name,
        "problem": encode(entry.problem),
        "config": encode(entry.config),
        "source": source,
        "ms": None if chosen is None else chosen.ms,
        "gain": entry.gain,
        "measured": len(entry.measurements),
        **encode(entry.provenance),
    }


def _read(files: Sequence[Path]) -> tuple[list[Table], list[Refused]]:
    tables, refused = [], []
    for file in files:
        try:
            table, wrong = read_table(file.read_bytes())
        except (OSError, InvalidEntryError) as error:
            raise ConfigurationError(f"{file} is no table: {error}") from None
        tables.append(table)
        refused += [Refused(item.place, f"{file}: {item.reason}") for item in wrong]
    return tables, refused


def _report(as_json: bool, text: str, refused: Sequence[Refused] = (), **found: Any) -> None:
    if as_json:
        print_json({**found, "refused": [{"place": item.place, "reason": item.reason} for item in refused]})
        return
    print(text)
    for item in refused:
        print(f"not taken: entry {item.place} of {item.reason}")


def run_export(file: Path, as_json: bool) -> None:
    """Write the store's entries to a table."""
    entries = stored_entries(default_store())
    _write(file, Table(tuple(entries)))
    _report(as_json, f"{file}: {len(entries)} entries", entries=len(entries))


def _write(file: Path, table: Table) -> None:
    try:
        write_table(file, table)
    except OSError as error:
        raise ConfigurationError(f"cannot write {file}: {error}") from None


def run_import(files: Sequence[Path], as_json: bool) -> None:
    """Put measured entries of tables into the store, together with what it has."""
    tables, refused = _read(files)
    store = default_store()
    measured = [entry for table in tables for entry in table.entries if entry.kind == "measured"]
    current = [entry for entry in measured if entry.source == entry.op.source]
    keys = [entry.key for entry in current]
    known = [entry for entry in stored_entries(store) if entry.key in keys]
    merged = merge([known, current])
    try:
        for entry in merged:
            store.write(entry)
    except OSError as error:
        raise ConfigurationError(f"cannot write the store {store.root}: {error}") from None
    other = len(measured) - len(current)
    text = f"{store.root}: {len(merged)} entries taken, {other} left out: measured with other kernels"
    _report(as_json, text, refused, taken=len(merged), other_kernels=other)


def run_merge(files: Sequence[Path], out: Path, as_json: bool) -> None:
    """Write the union of tables."""
    tables, refused = _read(files)
    merged = merge([table.entries for table in tables])
    devices = tuple(dict.fromkeys(name for table in tables for name in table.devices))
    _write(out, Table(tuple(merged), devices))
    _report(as_json, f"{out}: {len(merged)} entries", refused, entries=len(merged))


def run_verify(files: Sequence[Path], as_json: bool) -> int:
    """Check files; measure again what belongs to this GPU. 1 if anything is wrong or lost the margin."""
    tables, refused = _read(files)
    entries = [e for t in tables for e in t.entries] if files else stored_entries(default_store())
    here = {environment(limits) for limits in local_devices()}
    mine = [e for e in entries if e.kind == "measured" and e.environment in here and e.source == e.op.source]
    verdicts = verify(mine, GpuBench(torch.device("cuda"))) if mine else []
    bad = [verdict for verdict in verdicts if not _holds(verdict)]
    told = f"{len(mine)} measured again" if here else "nothing measured again: torch sees no GPU"
    _report(
        as_json,
        f"{len(entries)} entries are valid, {told}; {len(bad)} do not hold",
        refused,
        valid=len(entries),
        measured=len(mine),
        bad=len(bad),
        lost=[
            {"op": v.entry.op.name, "problem": encode(v.entry.problem), "reason": v.reason, "gain": v.gain} for v in bad
        ],
    )
    if not as_json:
        for verdict in bad:
            found = verdict.reason or f"x{verdict.gain:.3f} of the default's speed"
            print(f"{verdict.entry.op.name} {describe_problem(verdict.entry.problem)}: {found}")
    return 1 if refused or bad else 0


def _holds(verdict: Verdict) -> bool:
    is_default = verdict.entry.config == verdict.entry.op.default(verdict.entry.problem)
    return not verdict.reason and (is_default or verdict.gain * (1 - MARGIN) >= 1)


def run_clear(everything: bool, as_json: bool) -> None:
    """Delete the entries of this machine's GPUs and versions, or all."""
    store = default_store()
    removed = store.clear() if everything else sum(store.clear(environment(limits)) for limits in local_devices())
    hint = "" if everything or local_devices() else "; torch sees no GPU: --all deletes those of other machines"
    _report(as_json, f"{store.root}: {removed} entries deleted{hint}", removed=removed)
