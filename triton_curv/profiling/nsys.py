"""Time by stage from an Nsight Systems export: `nsys export --type sqlite FILE.nsys-rep`."""

import sqlite3
from pathlib import Path

from triton_curv.errors import TritonCurvError
from triton_curv.nvtx import DOMAIN
from triton_curv.profiling.stages import Launch, Range, StageTime, time_by_stage

PUSH_POP, DOMAIN_CREATE = 59, 75
"""Values of NVTX_EVENTS.eventType: a pushed and popped range, the creation of a domain."""
NS = 1e-9


class TraceError(TritonCurvError):
    """A file that is not an Nsight Systems export, or one without our ranges."""


def read_export(path: Path) -> dict[str, StageTime]:
    """Seconds by stage of our domain; kernels, copies and fills belong to the range in which they were launched.

    Raises TraceError if the file is no export or holds no range of ours.
    """
    if not path.is_file():
        raise TraceError(f"expected an Nsight Systems export (SQLite), got no file at {path}")
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
        try:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not {"NVTX_EVENTS", "StringIds"} <= tables:
                raise TraceError(f"{path}: expected the tables NVTX_EVENTS and StringIds, got {sorted(tables)}")
            ranges = _ranges(database)
            launches = _launches(database, tables)
        except sqlite3.DatabaseError as error:
            raise TraceError(f"{path}: expected an Nsight Systems export (SQLite): {error}") from error
    if not ranges:
        raise TraceError(
            f"{path}: no range of the domain {DOMAIN!r}; profile with TRITON_CURV_NVTX=1 and nsys --trace=cuda,nvtx"
        )
    return time_by_stage(ranges, launches)


def _ranges(database: sqlite3.Connection) -> list[Range]:
    rows = database.execute(
        """
        SELECT coalesce(event.text, string.value), event.globalTid, event.start, event.end
        FROM NVTX_EVENTS AS event
        LEFT JOIN StringIds AS string ON string.id = event.textId
        JOIN NVTX_EVENTS AS domain
            ON domain.eventType = ? AND domain.domainId = event.domainId
            AND domain.globalTid / 16777216 = event.globalTid / 16777216
        WHERE event.eventType = ? AND event.end IS NOT NULL AND domain.text = ?
        """,
        (DOMAIN_CREATE, PUSH_POP, DOMAIN),
    )
    return [Range(name, thread, start * NS, end * NS) for name, thread, start, end in rows]


def _launches(database: sqlite3.Connection, tables: set[str]) -> list[Launch]:
    """Device activities with the thread and time of the runtime call that launched them."""
    if "CUPTI_ACTIVITY_KIND_RUNTIME" not in tables:
        return []
    launches = []
    for kind in ("KERNEL", "MEMCPY", "MEMSET"):
        table = f"CUPTI_ACTIVITY_KIND_{kind}"
        if table in tables:
            launches += database.execute(
                f"""
                SELECT call.globalTid, call.start, activity.end - activity.start
                FROM {table} AS activity
                JOIN CUPTI_ACTIVITY_KIND_RUNTIME AS call
                    ON call.correlationId = activity.correlationId
                    AND call.globalTid / 16777216 = activity.globalPid / 16777216
                """
            ).fetchall()
    return [Launch(thread, start * NS, duration * NS) for thread, start, duration in launches]
