"""What tuning asks of a device: whether configs give right results, and how long they take."""

import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from triton.runtime import driver

from triton_curv_autotune.errors import NoDeviceError
from triton_curv_autotune.policy import POLICY, MeasurementPolicy
from triton_curv_autotune.registry import Inputs, Op

SCRATCH = 2 << 30
"""Bytes that copies of one problem's inputs may take at a time."""


class Bench(Protocol):
    """A device, or a test's stand-in for one."""

    def check(self, op: Op[Any, Any], problem: Any, configs: Sequence[Any]) -> list[str]:
        """For each config why it is out, "" if it gives right results."""

    def medians(self, op: Op[Any, Any], problem: Any, configs: Sequence[Any]) -> list[float]:
        """Median time of each config in ms, rounds interleaved."""

    def release(self) -> None:
        """Free what is left of scratch memory."""


@dataclass(frozen=True)
class Oracle:
    """Results of the reference in float64, and the error that each may have, relative to its largest element.

    Allowed are 4 times what the plain-torch reference errs in the op's own dtypes, and one rounding.
    """

    expected: tuple[Tensor, ...]
    allowed: tuple[float, ...]

    @classmethod
    def of(cls, op: Op[Any, Any], inputs: Inputs) -> "Oracle":
        """By the op's reference, on copies."""
        expected = op.reference(copied(inputs, torch.float64))
        plain = op.reference(copied(inputs))
        allowed = [4 * relative_error(p, e) + torch.finfo(p.dtype).eps for p, e in zip(plain, expected, strict=True)]
        return cls(tuple(expected), tuple(allowed))

    def verdict(self, results: Sequence[Tensor]) -> str:
        """What is wrong with results, "" if nothing."""
        for place, (result, expected, allowed) in enumerate(zip(results, self.expected, self.allowed, strict=True)):
            error = relative_error(result, expected)
            if not error <= allowed:  # NaN is not
                return f"result {place} is off by {error:.2g}, allowed are {allowed:.2g}"
        return ""


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Largest deviation over the largest expected element; 0 for no elements."""
    if expected.numel() == 0:
        return 0.0
    scale = max(float(expected.abs().amax()), torch.finfo(torch.float32).tiny)
    return float((result.double() - expected).abs().amax()) / scale


def copied(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """Inputs whose tensors are copies with the same strides, floating ones in another dtype if given."""

    def copy(item: Any) -> Any:
        if isinstance(item, Tensor):
            same = torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device=item.device).copy_(item)
            return same if dtype is None or not same.is_floating_point() else same.to(dtype)
        return [copy(part) for part in item] if isinstance(item, list) else item

    return tuple(copy(item) for item in inputs)


def bytes_of(inputs: Inputs) -> int:
    """Memory of all tensors."""
    flat = (t for item in inputs for t in (item if isinstance(item, list) else [item]))
    return sum(t.numel() * t.element_size() for t in flat if isinstance(t, Tensor))


def try_config(op: Op[Any, Any], inputs: Inputs, oracle: Oracle, config: Any) -> str:
    """Compile and run a config on a copy of the inputs; why it is out, "" if it is right.

    Without torch's dispatch of wrapped Triton kernels, which costs 1 ms and is set for each thread by itself.
    """
    try:
        with set_wrap_triton_enabled(False):
            return oracle.verdict(op.launch(copied(inputs), config))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class GpuBench:
    """Checks on copies in several threads, since compiling releases the lock; times in CUDA graphs, one after another.

    A graph holds `calls` launches, each on a copy of the inputs of its own as far as memory allows, and L2 is flushed
    before each replay: no launch finds its inputs in L2.
    """

    def __init__(self, device: torch.device, policy: MeasurementPolicy = POLICY) -> None:
        if device.type != "cuda" or not torch.cuda.is_available():
            raise NoDeviceError(f"expected a CUDA device to measure on, got {device}: torch sees no GPU")
        self.device = device
        self.policy = policy
        properties: Any = torch.cuda.get_device_properties(device)
        driver.active.get_current_device()  # made once, here: the threads of `check` would each make it
        self._flush = 2 * int(getattr(properties, "L2_cache_size", 0) or 256 << 20)

    def check(self, op: Op[Any, Any], problem: Any, configs: Sequence[Any]) -> list[str]:
        """In parallel: most of it is compilation."""
        with torch.cuda.device(self.device):
            inputs = op.make_inputs(problem, self.device)
            oracle = Oracle.of(op, inputs)

        def run(config: Any) -> str:
            with torch.cuda.device(self.device):
                return try_config(op, inputs, oracle, config)

        room = max(1, SCRATCH // max(1, 4 * bytes_of(inputs)))
        with ThreadPoolExecutor(min(room, os.cpu_count() or 1, 16)) as pool:
            return list(pool.map(run, configs))

    def medians(self, op: Op[Any, Any], problem: Any, configs: Sequence[Any]) -> list[float]:
        """Replays in turn, timed by events, after the clocks are warm."""
        policy = self.policy
        with torch.cuda.device(self.device), set_wrap_triton_enabled(False):
            inputs = op.make_inputs(problem, self.device)
            count = max(2, min(policy.calls, SCRATCH // max(1, bytes_of(inputs))))
            scratch, stream = [copied(inputs) for _ in range(count)], torch.cuda.Stream()
            graphs = [_graph(op, scratch, config, policy.calls, stream) for config in configs]
            flush = torch.empty(self._flush, dtype=torch.int8, device=self.device)
            _warm_clocks(self.device, policy.warm_ms)
            rounds = [[_replay(graph, flush) for graph in graphs] for _ in range(policy.rounds)]
            return [statistics.median(times) / policy.calls for times in zip(*rounds, strict=True)]

    def release(self) -> None:
        """Give cached blocks back to the driver."""
        torch.cuda.empty_cache()


def _graph(
    op: Op[Any, Any], scratch: Sequence[Inputs], config: Any, calls: int, stream: torch.cuda.Stream
) -> torch.cuda.CUDAGraph:
    """Calls in turn on the inputs, whose tables the capture's stream knows by then: a graph would copy new ones."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for inputs in scratch:
            op.launch(inputs, config)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            op.launch(scratch[i % len(scratch)], config)
    return graph


def _replay(graph: torch.cuda.CUDAGraph, flush: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    flush.zero_()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds


def _warm_clocks(device: torch.device, milliseconds: float) -> None:
    matrix = torch.ones(2048, 2048, device=device, dtype=torch.bfloat16)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    start.record()
    while True:
        for _ in range(20):
            matrix @ matrix
        end.record()
        end.synchronize()
        if start.elapsed_time(end) >= milliseconds:
            return
