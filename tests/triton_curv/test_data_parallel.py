"""NewtonCG, SGN and Neumann on several gloo ranks against one process on all batches together, in float64."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

import triton_curv as tc
from tests.support import data_parallel as dp
from tests.support.processes import on_ranks

# Few iterations of CG: after ten, one process that sees its samples in another order already differs by 2e-5 from
# itself (SGN on this model), since rounding costs CG its conjugacy.
FEW = (("cg_max_iter", 4), ("cg_first_iter", 4))
EXACT = [
    dp.Case("newton", "none", (("cg_max_iter", 6), ("product", "reverse"))),
    dp.Case("newton", "ddp", (("cg_max_iter", 6), ("product", "reverse"), ("line_search", True))),
    dp.Case("newton", "fsdp", (("cg_max_iter", 6), ("product", "forward"), ("warm_start", 0.5))),
    dp.Case("newton", "fsdp", (("hessian", "per_tensor"), ("cg_max_iter", 2), ("product", "reverse"), ("lr", 0.3))),
    dp.Case("newton", "none", (("preconditioner", "diagonal"), ("cg_max_iter", 4), ("product", "reverse")), True),
    dp.Case("newton-kfac", "none", (("cg_max_iter", 3), ("product", "reverse"))),
    dp.Case("newton-kfac", "ddp", (("cg_max_iter", 3), ("product", "reverse"))),
    dp.Case("sgn", "none", (("product", "jvp"), *FEW), True),
    dp.Case("sgn", "ddp", (("product", "double_vjp"), *FEW)),
    dp.Case("sgn", "fsdp", (("product", "jvp"), ("momentum", 0.5), *FEW)),
    dp.Case("neumann", "ddp"),
    dp.Case("neumann", "fsdp"),
]
AVERAGED = [
    dp.Case("newton", "none", (("data_parallel", "average_updates"), ("cg_max_iter", 4), ("product", "reverse"))),
    dp.Case("newton", "fsdp", (("data_parallel", "average_updates"), ("cg_max_iter", 4), ("product", "reverse"))),
]


def close(found: tuple[list[Any], list[float]], expected: tuple[list[Any], list[float]], losses: bool = True) -> None:
    for ours, one in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(ours, one, rtol=1e-12, atol=1e-12)
    if losses:
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-12)


def averaged_by_hand(case: dp.Case, world: int) -> tuple[list[Any], list[float]]:
    """Each rank's step from the same weights, on a copy of its own; then the mean of the weights."""
    model, losses = dp.small_model(), []
    options = {key: value for key, value in case.options if key != "data_parallel"}
    for step in range(dp.STEPS):
        copies = [copy.deepcopy(model) for _ in range(world)]
        own = []
        for rank, each in enumerate(copies):
            part = dp.part_of(dp.batch_of(step), rank, dp.SHARES[world])
            own.append(dp.one_step(case, each, tc.NewtonCG(each, **options), part, dp.SHARES[world]))
        losses.append(sum(own) / world)
        with torch.no_grad():
            for p, *others in zip(model.parameters(), *(each.parameters() for each in copies), strict=True):
                p.copy_(torch.stack(others).mean(0))
    return dp.whole(list(model.parameters())), losses


@pytest.mark.parametrize("world", [2, 3])
def test_steps_are_those_of_one_process_on_all_batches(world: int) -> None:
    answers = on_ranks(world, dp.all_cases, [*EXACT, *AVERAGED], timeout_s=240)
    assert all(isinstance(answer, dict) for answer in answers), answers
    for case in [*EXACT, *AVERAGED]:
        results = [answer[case.name] for answer in answers]
        for first, again in results:  # bit for bit, from run to run and from rank to rank
            for left, right in zip(first[0], again[0], strict=True):
                np.testing.assert_array_equal(left, right)
            for left, right in zip(first[0], results[0][0][0], strict=True):
                np.testing.assert_array_equal(left, right)
        if case in AVERAGED:
            expected = averaged_by_hand(case, world)
        else:
            expected = dp.train(case._replace(wrapper="none"), 0, dp.SHARES[1])
        for first, _ in results:
            close(first, expected, losses=case.optimizer != "neumann")  # its losses are the rank's own


def test_all_ranks_stop_where_one_fails() -> None:
    for what, own, others in (
        ("raises", "RuntimeError: planted", "PeerFailedError: expected all ranks to run their closures, but ranks [1]"),
        ("nan", "NonFiniteError", "NonFiniteError"),
    ):
        answers = on_ranks(2, dp.failing, what)
        assert all(isinstance(answer, list) for answer in answers), answers
        for rank, wanted in enumerate((others, own)):
            for error, same, loss in answers[rank]:
                assert error.startswith(wanted)
                assert same
                assert np.isfinite(loss)
        assert [loss for *_, loss in answers[0]] == [loss for *_, loss in answers[1]]
