"""Time by stage: ranges and device work, whoever recorded them, become exclusive seconds of each stage."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

OTHER = "other"


@dataclass(frozen=True)
class Range:
    """A named stretch of one thread; times in any one unit."""

    name: str
    thread: int
    start: float
    end: float


@dataclass(frozen=True)
class Launch:
    """Device work of `duration`, launched by `thread` at `time`."""

    thread: int
    time: float
    duration: float


@dataclass(frozen=True)
class StageTime:
    """Calls of a stage, and its time without that of stages inside it: on the host, and of device work it launched."""

    calls: int
    host: float
    device: float


def time_by_stage(ranges: Iterable[Range], launches: Iterable[Launch] = ()) -> dict[str, StageTime]:
    """Exclusive time of each name, largest first; device work outside all ranges goes to "other".

    Ranges of one thread must be nested or apart, as push and pop make them.
    """
    calls: dict[str, int] = defaultdict(int)
    host: dict[str, float] = defaultdict(float)
    device: dict[str, float] = defaultdict(float)
    by_thread: dict[int, list[Range]] = defaultdict(list)
    for each in ranges:
        by_thread[each.thread].append(each)
        calls[each.name] += 1
    innermost: dict[int, list[tuple[float, str]]] = {}
    for thread, own in by_thread.items():
        innermost[thread] = _innermost(own, host)
    queues = {thread: iter(edges) for thread, edges in innermost.items()}
    current: dict[int, str] = {}
    upcoming = {thread: next(queue, None) for thread, queue in queues.items()}
    for launch in sorted(launches, key=attrgetter("time")):
        thread = launch.thread
        while (edge := upcoming.get(thread)) is not None and edge[0] <= launch.time:
            current[thread] = edge[1]
            upcoming[thread] = next(queues[thread], None)
        device[current.get(thread, OTHER)] += launch.duration
    names = calls.keys() | device.keys()
    times = {name: StageTime(calls[name], host[name], device[name]) for name in names}
    return dict(sorted(times.items(), key=lambda item: -max(item[1].host, item[1].device)))


def _innermost(ranges: list[Range], host: dict[str, float]) -> list[tuple[float, str]]:
    """Moments of one thread at which the innermost range changes, with its name; adds exclusive times to `host`."""
    edges: list[tuple[float, str]] = []
    stack: list[Range] = []
    at = 0.0

    def move(time: float) -> None:
        nonlocal at
        if stack:
            host[stack[-1].name] += time - at
        at = time

    def leave_until(time: float) -> None:
        while stack and stack[-1].end <= time:
            move(stack[-1].end)
            stack.pop()
            edges.append((at, stack[-1].name if stack else OTHER))

    for each in sorted(ranges, key=lambda r: (r.start, -r.end)):
        leave_until(each.start)
        move(each.start)
        stack.append(each)
        edges.append((at, each.name))
    leave_until(float("inf"))
    return edges
