"""Narrow dtypes on the way stay within their tolerance, bytes are what the plan says, and a dead rank hangs nobody."""

from typing import Any

import pytest

from tests.support.processes import on_ranks
from tests.support.sharded import Case, difference, single, unpacked
from tests.support.sharded_wires import counted, dying, wires

GATHERS = ("gradients", "inverses")
# of the wire: half a unit in the last place, times a few for sums and for what inverses amplify
TOLERANCES = {"own": 1e-12, "float32": 1e-4, "bfloat16": 0.2, "float16": 0.03}


def of_weights(outcome: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in outcome.items() if not name[0].isdigit() or name.endswith(("weight", "bias"))
    }


def test_each_dtype_on_the_way_is_within_its_tolerance_and_makes_a_difference() -> None:
    found = unpacked(on_ranks(2, wires, 2, timeout_s=120)[0])
    expected = of_weights(single(Case("none", steps=3)))
    for name, outcome in found.items():
        wire = name.split()[1]
        error = difference(of_weights(outcome), expected)
        assert error < TOLERANCES[wire], name
        assert wire == "own" or error > 1e-12, name


@pytest.mark.parametrize("world", [3])
def test_bytes_are_those_of_rings(world: int) -> None:
    answers = [unpacked(answer) for answer in on_ranks(world, counted, world, timeout_s=120)]
    numbers = sum(answers[0]["matrices"].values())
    gathered = sum(answer["gradients 1"]["all-gather"] for answer in answers)
    assert gathered == (world - 1) * numbers * 8  # every preconditioned gradient passes every other rank once
    for answer in answers:
        assert answer["inverses 1"].get("all-gather", 0) == 0
        assert answer["gradients 1"].get("reduce-scatter", 0) == 0
    factors = {sum(answer[f"{gather} 0"]["reduce-scatter"] for answer in answers) for gather in GATHERS}
    assert factors == {(world - 1) * answers[0]["triangles"] * 8}  # every triangle passes every other rank once


def test_a_dead_rank_ends_the_step_of_the_others() -> None:
    answers = on_ranks(3, dying, 3, timeout_s=40)
    for answer in answers[:2]:
        assert answer.startswith("RuntimeError after "), answers
        assert float(answer.split()[2]) < 30
