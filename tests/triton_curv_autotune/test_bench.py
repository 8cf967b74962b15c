"""Candidates against the float64 oracle, and deterministic mode: kernels in the interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tuning import FACTOR, list_problem
from triton_curv_autotune.bench import Oracle, bytes_of, copied, try_config
from triton_curv_autotune.registry import get_op, op_names
from triton_curv_kernels.backend import NO_DEVICE
from triton_curv_kernels.factor import FactorProblem

CPU = torch.device("cpu")


def small_problem(name: str, dtype: torch.dtype = torch.float32) -> Any:
    if name == FACTOR:
        return FactorProblem(1, 1030, 40, dtype, ones=True, aligned=False)
    problem = list_problem(3000, NO_DEVICE)
    return type(problem)(problem.numel, dtype if name.startswith(("momentum", "neumann")) else torch.float32)


def bits(tensors: list[Tensor]) -> list[list[int]]:
    return [t.reshape(-1).view(torch.uint8).tolist() for t in tensors]


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", op_names())
def test_right_configs_pass_and_inputs_stay(name: str, dtype: torch.dtype) -> None:
    op, problem = get_op(name), small_problem(name, dtype)
    inputs = op.make_inputs(problem, CPU)
    before = bits([t for t in copied(inputs) if isinstance(t, Tensor)])
    oracle = Oracle.of(op, inputs)
    default, *_, last = op.candidates(problem)
    assert [try_config(op, inputs, oracle, config) for config in (default, last)] == ["", ""]
    assert bits([t for t in inputs if isinstance(t, Tensor)]) == before
    assert bytes_of(inputs) >= 3000 * 4


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
            largest = results[place].view(-1)[results[place].abs().argmax()]
            largest.mul_(fault)
            assert oracle.verdict(results).startswith(f"result {place} is off by")
    assert try_config(op, inputs, oracle, "no config").startswith(("AttributeError", "TypeError"))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [FACTOR, "cg_direction_"])
def test_configs_of_one_numerics_class_agree_bit_for_bit(name: str) -> None:
    """Tiles, warps and stages may differ. For the factor, another BLOCK_K or SPLIT_K shows: the test can fail.

    The other updates add up norms: their whole configuration is pinned.
    """
    op, problem = get_op(name), small_problem(name)
    pinned = op.pinned(problem)
    same = [c for c in op.candidates(problem) if op.same_numerics(c, pinned)]
    tiles = list({getattr(c, "BLOCK_N", None) or getattr(c, "BLOCK", None) or c.block: c for c in same}.values())
    assert len(tiles) > 2
    inputs = op.make_inputs(problem, CPU)
    results = [bits(op.launch(copied(inputs), config)) for config in tiles]
    assert all(result == results[0] for result in results)
    if name == FACTOR:
        assert pinned.SPLIT_K > 1
        for other in ("BLOCK_K", "SPLIT_K"):
            config = next(c for c in op.candidates(problem) if getattr(c, other) != getattr(pinned, other))
            assert bits(op.launch(copied(inputs), config)) != results[0]
