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
    dp.Case("sgn", "hsdp", (("product", "double_vjp"), *FEW)),
    dp.Case("inner", "fsdp", (("inner_lr", 0.1), ("inner_steps", 3))),
    dp.Case("neumann", "hsdp"),
    dp.Case("neumann", "ddp"),
    dp.Case("neumann", "fsdp"),
]
AVERAGED = [
    dp.Case(
        "newton",
        "none",
        (
            ("data_parallel", "average_updates"),
            ("cg_max_iter", 4),
            ("product", "reverse"),
            ("line_search", True),
            ("lr", 16.0),
        ),
    ),
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
    options = {key: value for key, value in case.options if key not in ("data_parallel", "line_search")}
    for step in range(dp.STEPS):
        copies = [copy.deepcopy(model) for _ in range(world)]
        own = []
        for rank, each in enumerate(copies):
            part = dp.part_of(dp.batch_of(step), rank, dp.SHARES[world])
            own.append(dp.one_step(case, each, tc.NewtonCG(each, **options), part, dp.SHARES[world]))
        losses.append(sum(own) / world)
        ways = [
            torch.stack(others).mean(0) - p
            for p, *others in zip(model.parameters(), *(each.parameters() for each in copies), strict=True)
        ]
        shorten = shortened(model, step, ways) if dict(case.options).get("line_search") else 1.0
        with torch.no_grad():
            for p, way in zip(model.parameters(), ways, strict=True):
                p.add_(way, alpha=shorten)
    return dp.whole(list(model.parameters())), losses


def shortened(model: torch.nn.Module, step: int, ways: list[torch.Tensor]) -> float:
    """Armijo's rule for the loss over all samples."""
    x, y = dp.batch_of(step)

    def loss(scale: float) -> torch.Tensor:
        moved = {n: p + scale * w for (n, p), w in zip(model.named_parameters(), ways, strict=True)}
        return dp.loss_of(torch.func.functional_call(model, moved, (x,)), y, dp.SHARES[1])

    before = loss(0.0)
    gradient = torch.autograd.grad(before, list(model.parameters()))
    slope = sum(float((g * w).sum()) for g, w in zip(gradient, ways, strict=True))
    scale, halvings = 1.0, 0
    while not float(loss(scale)) <= float(before) + 1e-4 * scale * slope and halvings < 10:
        scale, halvings = scale / 2, halvings + 1
    assert halvings > 0
    return scale


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


def test_preconditioners_that_ranks_can_not_share() -> None:
    for answer in on_ranks(2, dp.refused):
        assert "Sharding(gather='inverses'), got Sharding(gather='gradients'" in answer[0]
        assert "the wrapper 'fsdp'" in answer[1]


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
