"""K-FAC on several ranks is K-FAC of one process on the batches of all ranks together."""

from functools import cache

import pytest
from torch import Tensor

import triton_curv as tc
from tests.support.processes import on_ranks
from tests.support.sharded import Case, difference, equality, single, tied_net, unpacked

TOLERANCE = 1e-12

BARE = {"update_size": "none", "damping": 0.3, "lr": 0.01, "fallback": "sgd"}  # feels the length of the gradient
EVEN = {"refresh_budget": "even", "factor_interval": 3, "inverse_interval": 3}
EQUAL = [
    Case("ddp", options={"fisher": "exact"}),
    Case("none", sharding={"gather": "inverses"}, options={"inverse": "eigen"}),
    Case("fsdp", options={"inverse": "eigen", "update_size": "kl_clip"}),
    Case("hsdp"),
    Case("hsdp", options=BARE),
    Case("ddp", options=BARE, net=tied_net),
    Case("fsdp", options=EVEN),
    Case("fsdp", options={**BARE, "rescale": "paper"}),
    Case("fsdp", sharding={"gather": "inverses"}, options={"update_size": "kl_clip"}),
    Case("fsdp", sharding={"grad_worker_fraction": 0.5}, options={"refresh_budget": 3}),
    Case("none"),
    Case("ddp", options=EVEN),
    Case("ddp", sharding={"gradients": "reduce_scatter"}, options=BARE),
    Case("none", sharding={"gather": "inverses"}, options={"reduction": "sum", "fallback": "sgd"}),
    Case("ddp", sharding={"grad_worker_fraction": 0.5, "collectives": "padded"}, options={"refresh_budget": 3}),
    Case("none", sharding={"collectives": "padded"}, options={"inverse": "neumann", "update_size": "kl_clip"}),
    Case("none", sharding={"gather": "inverses"}, options=BARE),
    Case("none", options={"factor_interval": tc.AdaptiveInterval(0.5), "rescale": "paper"}),
    Case("ddp", options={"damping_rule": tc.LevenbergMarquardt(interval=2, reject=True), "weight_decay": 0.1}),
]


@cache
def expected(index: int) -> dict[str, Tensor]:
    return single(EQUAL[index])


def is_unique(name: str, case: Case) -> bool:
    """Eigenvectors are not: their signs, and any turn where eigenvalues are equal."""
    return case.options.get("inverse") != "eigen" or not name.endswith("_inverse")


def cases(world: int) -> list[int]:
    """Which cases a world takes part in: a mesh of two replicas needs an even one."""
    return [i for i, case in enumerate(EQUAL) if case.wrapper != "hsdp" or world == 4]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_together_equal_one_process_and_repeat_themselves(world: int) -> None:
    chosen = cases(world)
    work = [EQUAL[i] for i in chosen]
    answers = [unpacked(answer) for answer in on_ranks(world, equality, world, work, timeout_s=240)]
    for at, i in enumerate(chosen):
        case = EQUAL[i]
        for _, same, repeats in (answer[at] for answer in answers):
            assert same, f"{case}: ranks differ"
            assert repeats, f"{case}: two runs differ"
        found, wanted = ({n: v for n, v in o.items() if is_unique(n, case)} for o in (answers[0][at][0], expected(i)))
        error = difference(found, wanted)
        assert error < TOLERANCE, f"{case}: {error}"
