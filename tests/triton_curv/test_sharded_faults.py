"""Accidents on one rank: all ranks do the same about it, and what can be right stays right."""

from typing import Any

import pytest

from tests.support.processes import on_ranks
from tests.support.sharded import difference, unpacked
from tests.support.sharded_faults import accidents, expectations

WORLD = 3
TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    return [unpacked(answer) for answer in on_ranks(WORLD, accidents, WORLD, timeout_s=200)]


def test_shares_of_any_size_and_order_equal_one_process(answers: list[dict[str, Any]]) -> None:
    expected = expectations(WORLD)
    names = [name for name in answers[0] if name.split()[0] in expected]
    assert len(names) == 7
    for name in names:
        for answer in answers:
            assert difference(answer[name], expected[name.split()[0]]) < TOLERANCE, name


@pytest.mark.parametrize("wrapper", ["none", "ddp", "fsdp"])
def test_all_ranks_skip_a_step_that_one_of_them_cannot_take(answers: list[dict[str, Any]], wrapper: str) -> None:
    for answer in answers:
        found = answer[f"nan {wrapper}"]
        assert found["kept"]
        assert found["same"]
        assert found["finite"]
        assert found["health"]["skipped_steps"] == 1
        assert found["health"]["discarded_statistics"] > 0
        assert found["health"] == answers[0][f"nan {wrapper}"]["health"]


def test_fsdp_with_layers_in_bfloat16_learns(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        assert answer["mixed"][-1] < 0.5 * answer["mixed"][0]


def test_ranks_with_other_models_or_weights_are_told(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        assert answer["widths"].startswith("RankMismatchError: expected the same model")
        assert answer["weights"].startswith("RankMismatchError: expected the same weights")


def test_factors_are_where_the_plan_says(answers: list[dict[str, Any]]) -> None:
    for refusals in zip(*(answer["not owned"] for answer in answers), strict=True):
        assert sorted(text.split(":")[0] for text in refusals) == ["NotOwnedError", "NotOwnedError", "nothing raised"]
        (owner,) = [rank for rank, text in enumerate(refusals) if text == "nothing raised"]
        assert all(f"rank {owner} of the shard group" in text for text in refusals if text != "nothing raised")
