"""Candidates against the float64 oracle, and deterministic mode: kernels in the interpreter."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.tuning import FACTOR, FACTORS, small_problem
from triton_curv_autotune.bench import Oracle, _graph, bytes_of, copied, try_config
from triton_curv_autotune.registry import Inputs, Op, get_op, op_names

CPU = torch.device("cpu")


def bits(tensors: list[Tensor]) -> list[list[int]]:
    return [t.contiguous().reshape(-1).view(torch.uint8).tolist() for t in tensors]


def all_tensors(inputs: Inputs) -> list[Tensor]:
    parts = [part for item in inputs for part in (item if isinstance(item, list) else [item])]
    return [part for part in parts if isinstance(part, Tensor)]


def candidates(op: Op[Any, Any], problem: Any) -> list[Any]:
    """Those that the interpreter can run: it knows products of fp32 alone."""
    return [c for c in op.candidates(problem) if getattr(c, "input_precision", "ieee") != "bf16x6"]


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", op_names())
def test_right_configs_pass_and_inputs_stay(name: str, dtype: torch.dtype) -> None:
    op, problem = get_op(name), small_problem(name, dtype)
    inputs = op.make_inputs(problem, CPU)
    before = bits(all_tensors(copied(inputs)))
    oracle = Oracle.of(op, inputs)
    default, *others = candidates(op, problem)
    last = ([c for c in others if getattr(c, "BLOCK_N", 0) <= 32] or others)[-1]
    assert [try_config(op, inputs, oracle, config) for config in (default, last)] == ["", ""]
    assert bits(all_tensors(inputs)) == before
    assert bits(all_tensors(op.make_inputs(problem, CPU))) == before
    assert [t.stride() for t in all_tensors(copied(inputs))] == [t.stride() for t in all_tensors(inputs)]
    assert bytes_of(inputs) == sum(t.numel() * t.element_size() for t in all_tensors(inputs))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", op_names())
def test_wrong_results_are_seen(name: str) -> None:
    """Planted: one element off by a thousandth of the largest, or NaN; an error instead of a result."""
    op, problem = get_op(name), small_problem(name)
    inputs = op.make_inputs(problem, CPU)
    oracle = Oracle.of(op, inputs)
    for place in range(len(oracle.expected)):
        for fault in (1.001, float("nan")):
            results = op.launch(copied(inputs), op.default(problem))
            largest = np.unravel_index(int(results[place].abs().argmax()), results[place].shape)
            results[place][largest] *= fault
            assert oracle.verdict(results).startswith(f"result {place} is off by")
    assert try_config(op, inputs, oracle, "no config").startswith(("AttributeError", "TypeError"))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [FACTOR, FACTORS, "cg_direction_", "pack_symmetric", "unpack_symmetric"])
def test_configs_of_one_numerics_class_agree_bit_for_bit(name: str) -> None:
    """Tiles, warps and stages may differ. For factors, another BLOCK_K or part of K shows: the test can fail.

    Other ops pin their tiles, too: what they add up follows from these.
    """
    op, problem = get_op(name), small_problem(name)
    if name == FACTOR:
        problem = dataclasses.replace(problem, n=100)  # for tiles of 64 and 128: smaller ones are of another class
    elif name == FACTORS:
        problem = dataclasses.replace(problem, shapes=((40, 20, 1), (2200, 136, 1)))
    pinned = op.pinned(problem)
    same = [c for c in candidates(op, problem) if op.same_numerics(c, pinned)]
    tiles = list({getattr(c, "BLOCK_N", None) or c.BLOCK: c for c in same}.values())
    assert len(tiles) >= 2
    inputs = op.make_inputs(problem, CPU)
    results = [bits(op.launch(copied(inputs), config)) for config in tiles]
    assert all(result == results[0] for result in results)
    for other in [field for field in op.numerics if field != "input_precision"]:
        config = next(c for c in candidates(op, problem) if getattr(c, other) != getattr(pinned, other))
        assert bits(op.launch(copied(inputs), config)) != results[0], other


def test_a_graph_is_captured_where_the_tables_of_all_inputs_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of addresses are kept for each stream; one that is made in a capture is copied again at each replay."""
    streams: list[Any] = ["main"]
    seen: list[Any] = []

    class Stream:
        def wait_stream(self, other: object) -> None:
            """Nothing to wait for."""

    @contextmanager
    def on(stream: Any) -> Iterator[None]:
        streams.append(stream)
        yield
        streams.pop()

    @contextmanager
    def graph(of: object, *, stream: Any) -> Iterator[None]:
        with on(stream):
            seen.append("captured")
            yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream())
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)

    class Example:
        def launch(self, inputs: Any, config: str) -> None:
            seen.append((streams[-1], inputs, config))

    side: Any = Stream()
    _graph(cast(Any, Example()), [("a",), ("b",)], "config", 4, side)
    first, second = (side, ("a",), "config"), (side, ("b",), "config")
    assert seen == [first, second, "captured", first, second, first, second]
