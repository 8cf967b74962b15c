"""Seconds of calls, measured fairly: in rotation, with cold caches, after a warm-up; on a GPU inside CUDA graphs."""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

Call = Callable[[], Any]


class CaptureError(RuntimeError):
    """A call could not be captured. CUDA's state in this process is spoiled: random numbers and captures fail now."""


@dataclass(frozen=True)
class Times:
    """Seconds of each round, and how the call was made: as a CUDA graph, eagerly on a GPU, or on the CPU."""

    seconds: tuple[float, ...]
    how: Literal["graph", "eager", "cpu"]


class Stopwatch(Protocol):
    """Measures calls side by side."""

    def interleave(self, calls: Mapping[str, Call], eager: Collection[str] = ()) -> dict[str, Times]:
        """Times of each call over rounds in which all take turns; those named `eager` wait for the device inside."""


class CpuStopwatch:
    """Process CPU time; rounds until `seconds` have passed, `least` at least."""

    def __init__(self, seconds: float = 1.0, least: int = 7) -> None:
        self.seconds = seconds
        self.least = least

    def interleave(self, calls: Mapping[str, Call], eager: Collection[str] = ()) -> dict[str, Times]:
        """One call of each, round after round; one round more, not counted, comes first."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        end = None
        while end is None or time.perf_counter() < end or min(map(len, times.values())) <= self.least:
            for name, call in calls.items():
                start = time.process_time()
                call()
                times[name].append(time.process_time() - start)
            end = end or time.perf_counter() + self.seconds
        return {name: Times(tuple(t[1:]), "cpu") for name, t in times.items()}


class CudaStopwatch:
    """CUDA events around one call with a cold L2, `rounds` of them; calls run as CUDA graphs but for `eager` ones.

    A graph takes the launch gaps out of both sides: what is compared is the device's work. A call that synchronises
    can't be captured, and must not be tried: after a capture that failed, torch (2.11 to 2.13) stays on the capture's
    stream, makes no random numbers on the device and begins no other capture. Such a call is timed eagerly.
    """

    def __init__(self, rounds: int = 21, graphs: bool = True) -> None:
        self.rounds = rounds
        self.graphs = graphs
        size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
        self._l2 = torch.empty(max(size, 1 << 26), dtype=torch.int8, device="cuda")

    def interleave(self, calls: Mapping[str, Call], eager: Collection[str] = ()) -> dict[str, Times]:
        """One call of each, round after round, the L2 overwritten before every one.

        Raises:
            CaptureError: a call that is not among `eager` cannot be captured.

        """
        ready = {name: self._prepare(name, call, name not in eager) for name, call in calls.items()}
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
        for _ in range(self.rounds + 2):
            for name, (run, _how) in ready.items():
                self._l2.zero_()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                run()
                end.record()
                events[name].append((start, end))
        torch.cuda.synchronize()
        return {
            name: Times(tuple(start.elapsed_time(end) / 1e3 for start, end in pairs[2:]), ready[name][1])
            for name, pairs in events.items()
        }

    def _prepare(self, name: str, call: Call, captured: bool) -> tuple[Call, Literal["graph", "eager"]]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        if not (self.graphs and captured):
            return call, "eager"
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):  # which knows the tables of our kernels by now
                call()
        except RuntimeError as error:
            raise CaptureError(f"expected a call that can be captured, got {name!r}: {error}") from error
        return graph.replay, "graph"


def stopwatch_for(device: torch.device, seconds: float = 1.0, graphs: bool = True) -> Stopwatch:
    """The stopwatch of a device; `seconds` bounds a CPU measurement, `graphs` is of GPUs."""
    return CudaStopwatch(graphs=graphs) if device.type == "cuda" else CpuStopwatch(seconds)


def peak_extra_bytes(call: Call, device: torch.device) -> int:
    """Most memory that tensors made inside `call` take at one time, beyond what was there before."""
    if device.type == "cuda":
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    now = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak
