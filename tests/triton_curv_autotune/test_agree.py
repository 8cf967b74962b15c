"""Ranks in gloo groups: one table for all, and errors that name who is to blame."""

from pathlib import Path

import pytest

from tests.support import ranks
from tests.support.processes import on_ranks
from triton_curv_autotune import AgreementError
from triton_curv_autotune.agree import split, sync
from triton_curv_autotune.tune import plan


@pytest.mark.filterwarnings("ignore::triton_curv_autotune.TuningWarning")
def test_shares_are_disjoint_and_whole_for_any_order_of_problems() -> None:
    jobs, reversed_jobs = plan(ranks.PROBLEMS), plan(reversed(ranks.PROBLEMS))
    for world in (1, 2, 3, 16):
        shares = [[(job.op.name, job.problem) for job in split(jobs, rank, world)] for rank in range(world)]
        assert sorted(str(item) for share in shares for item in share) == sorted(str(item) for item in ranks.PROBLEMS)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert shares[0] == [(job.op.name, job.problem) for job in split(reversed_jobs, 0, world)]


@pytest.mark.parametrize("cold", [None, 0, 2])
def test_a_planted_disagreement_ends_with_the_lowest_ranks_choice(tmp_path: Path, cold: int | None) -> None:
    results = on_ranks(3, ranks.disagreeing, str(tmp_path), cold)
    before, after = [r[0] for r in results], [r[3] for r in results]
    assert before[0] != before[1] != before[2]
    assert after[0] == after[1] == after[2]
    lowest = 1 if cold == 0 else 0
    assert after[0][0][0] == ranks.config_of(lowest)
    entries = 4 if cold is None else 3
    assert [r[1:3] for r in results] == [(entries, entries)] * 3


def test_tuning_is_shared_out_and_all_know_the_result(tmp_path: Path) -> None:
    results = on_ranks(3, ranks.tuning, str(tmp_path), None)
    measured = [share for share, _ in results]
    assert all(measured)
    assert sum(map(len, measured)) == len(set.union(*measured)) == len(ranks.TUNED)
    assert results[0][1] == results[1][1] == results[2][1]


def test_a_rank_that_fails_is_named_with_its_error(tmp_path: Path) -> None:
    results = on_ranks(3, ranks.tuning, str(tmp_path), 1)
    assert results[1] == "RuntimeError: planted"
    for rank in (0, 2):
        assert results[rank] == "AgreementError: 'tuning': rank 1 failed: RuntimeError: planted"


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    results = on_ranks(3, ranks.absent, str(tmp_path), 2)
    for rank in (0, 1):
        assert results[rank].startswith(f"AgreementError: 'digest': rank {rank} waited 1 s for ranks [2] of 3")


def test_a_rank_with_other_kernels_is_named(tmp_path: Path) -> None:
    results = on_ranks(2, ranks.other_kernels, str(tmp_path), 1)
    assert results == ["AgreementError: ranks [1] have other kernel files or Triton version than rank 0"] * 2


def test_without_a_process_group() -> None:
    with pytest.raises(AgreementError, match="init_process_group first"):
        sync()
