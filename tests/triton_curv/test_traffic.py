"""Bytes that ranks send and times they are predicted to need, against collectives carried out number by number."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest

from tests.support.counted import CASES, counted
from tests.support.processes import on_ranks
from triton_curv.costs import Cost
from triton_curv.errors import ConfigurationError
from triton_curv.sharding import FactorSize, LayerSize, Machine, PlanOptions, make_plan
from triton_curv.sharding.plan import Plan
from triton_curv.sharding.report import machine_named, memory_of, shard_report
from triton_curv.sharding.timeline import Workload, timeline, timeline_of_sgd
from triton_curv.sharding.traffic import Transfer, Wire, bytes_of_layers, bytes_per_step, of_sgd, transfers

SIZES = [(5, 3), (8, 2), (3, 7), (6, 6), (2, 9)]
LAYERS = (
    *(
        LayerSize(f"layer{i}", (FactorSize("A", 1, n), FactorSize("G", 1, m)), (1, m, n))
        for i, (n, m) in enumerate(SIZES)
    ),
    LayerSize("norm", (FactorSize("F", 4, 2),), (4, 2, 1)),
)
GRIDS = [(1, None, 0.0), (2, None, 0.0), (3, None, 0.0), (4, None, 0.5), (4, None, 1.0), (8, 4, 0.5), (6, 3, 0.0)]
MACHINE = Machine(
    "test",
    inverse_flops=10**9,
    product_flops=10**9,
    memory_bytes=10**12,
    launch_ns=0,
    node=2,
    node_bytes=10**9,
    network_bytes=10**8,
    node_latency_ns=10,
    network_latency_ns=100,
)


def ring_scatter(splits: Sequence[int]) -> Counter[int]:
    """The share of rank c starts at rank c + 1 and is passed on, added to, until it is at c."""
    n, sent = len(splits), Counter[int]()
    for owner, length in enumerate(splits):
        for hop in range(1, n):
            sent[(owner + hop) % n] += length
    return sent


def ring_gather(splits: Sequence[int]) -> Counter[int]:
    """The share of rank c is passed on from c until the last rank has it."""
    n, sent = len(splits), Counter[int]()
    for owner, length in enumerate(splits):
        for hop in range(n - 1):
            sent[(owner + hop) % n] += length
    return sent


def by_hand(plan: Plan, parallel: str) -> Counter[int]:
    """Numbers that each rank of replica 0 sends within its replica, in all stages, each number looked at alone."""
    grid, sent = plan.grid, Counter[int]()
    owned = [sum(plan.layers[i].factors[f].packed for i, f in plan.factors_of(r)) for r in range(grid.size)]
    sent += ring_scatter(owned)
    for column in range(grid.columns):
        ranks = grid.column_group(column)
        shares = [sum(plan.layers[i].factors[f].packed for i, f in plan.factors_of(r)) for r in ranks]
        for place, numbers in ring_gather(shares).items():
            sent[ranks[place]] += numbers
    if parallel == "plain":
        for row in range(grid.rows):
            ranks = grid.row_group(grid.rank(0, row, 0))
            shares = [sum(plan.layers[i].gradient for i in plan.layers_of(r)) for r in ranks]
            scattered = ring_scatter(shares) if grid.rows == 1 else Counter[int]()  # else there is an all-reduce
            for place, numbers in (scattered + ring_gather(shares)).items():
                sent[ranks[place]] += numbers
    if parallel == "fsdp":
        total = sum(layer.gradient for layer in plan.layers)
        share = -(-total // grid.size)
        sent += ring_scatter([max(0, min(share, total - r * share)) for r in range(grid.size)])
        for i, layer in enumerate(plan.layers):
            share = -(-layer.gradient // grid.size)
            for number in range(layer.gradient):
                holder = number // share
                for worker in plan.workers(i):
                    sent[holder] += worker != holder
                    if worker in grid.row_group(holder):
                        sent[worker] += worker != holder
    return sent


@pytest.mark.parametrize(("world", "shards", "fraction"), GRIDS)
@pytest.mark.parametrize("parallel", ["plain", "fsdp"])
def test_bytes_are_those_of_messages_sent_one_by_one(
    world: int, shards: int | None, fraction: float, parallel: str
) -> None:
    plan = make_plan(LAYERS, PlanOptions(world, shards, fraction, bucket_elements=60))
    wire = Wire("fsdp" if parallel == "fsdp" else "plain", statistics=2, gradients=2)
    found = [t for t in transfers(plan, wire) if t.collective != "all-reduce"]
    counted = [sum(t.sent[i] for t in found) for i in range(plan.grid.size)]
    expected = by_hand(plan, parallel)
    assert counted == [2 * expected[i] for i in range(plan.grid.size)]


@pytest.mark.parametrize(("world", "shards", "fraction"), GRIDS)
@pytest.mark.parametrize("parallel", ["plain", "ddp", "fsdp"])
def test_layers_together_send_what_all_do(world: int, shards: int | None, fraction: float, parallel: str) -> None:
    plan = make_plan(LAYERS, PlanOptions(world, shards, fraction))
    wire = Wire(parallel, statistics=2, gradients=4)
    found = transfers(plan, wire)
    for rank in range(world):
        together, layers = sum(t.sent[rank % plan.grid.size] for t in found), bytes_of_layers(plan, wire, rank)
        assert len(layers) == len(LAYERS)
        # integer halves and thirds are cut for each layer here, for all of them there
        assert sum(layers) == pytest.approx(
            together, abs=0 if (parallel, fraction, shards) == ("plain", 0, None) else 80
        )


def test_the_paper_sends_gradients_and_updates_as_sgd_does() -> None:
    """Reduce-scatter and all-gather together are one ring all-reduce, but for uneven shares."""
    layers = tuple(LayerSize(f"{i}", (FactorSize("A", 1, 4), FactorSize("G", 1, 4)), (1, 4, 4)) for i in range(8))
    found = transfers(make_plan(layers, PlanOptions(4)), Wire())
    own = [t for t in found if not t.stage.startswith("statistics")]
    assert [t.stage for t in own] == ["gradients", "updates"]
    assert bytes_per_step(own, 4) == bytes_per_step(of_sgd(8 * 16, 4, 4, Wire()), 4) == (2 * 3 / 4 * 128 * 4,) * 4


def test_workers_everywhere_send_inverses_instead_of_updates() -> None:
    found = transfers(make_plan(LAYERS, PlanOptions(4, grad_worker_fraction=1.0)), Wire())
    assert [(t.stage, t.collective) for t in found] == [
        ("statistics A", "reduce-scatter"),
        ("statistics G", "reduce-scatter"),
        ("gradients", "all-reduce"),
        ("inverses", "all-gather"),
    ]


def test_replicas_and_loose_parameters() -> None:
    plan = make_plan(LAYERS, PlanOptions(8, 4))
    found = {t.stage: t for t in transfers(plan, Wire(loose=80, factor_interval=5, inverse_interval=10))}
    owned = [sum(LAYERS[i].factors[f].packed for i, f in plan.factors_of(r)) for r in range(4)]
    both = [found[f"statistics {kind} of replicas"] for kind in "AG"]
    assert [sum(t.sent[r] for t in both) for r in range(4)] == [4 * own for own in owned]  # 2 (n - 1)/n = 1
    assert {t.ranks for t in both} == {2}
    assert found["other gradients"].sent == (4 * 2 * 7 * 80 // 8,) * 4
    assert found["statistics A"].interval == 5
    ddp = [t for t in transfers(plan, Wire("ddp", loose=80)) if "gradients" in t.stage]
    assert ddp == list(of_sgd(80 + plan.bucket_gradients.length, 8, 4, Wire()))


def test_one_rank_sends_nothing() -> None:
    for parallel in ("plain", "ddp", "fsdp"):
        assert transfers(make_plan(LAYERS, PlanOptions(1)), Wire(parallel)) == ()


def test_time_of_a_transfer() -> None:
    def ns(collective: str, ranks: int, stride: int, sent: int) -> int:
        return Transfer("", collective, ranks, stride, (sent,), calls=1).nanoseconds(MACHINE)  # type: ignore[arg-type]

    assert ns("reduce-scatter", 2, 1, 1000) == 10 + 1000  # inside a node, 1 byte a ns
    assert ns("reduce-scatter", 8, 1, 1000) == 7 * 100 + 10_000
    assert ns("all-gather", 4, 2, 1000) == 3 * 100 + 20_000  # two rings share the node's adapters
    assert ns("all-reduce", 8, 1, 1000) == 2 * 3 * 100 + 10_000  # a tree
    assert ns("all-to-all", 8, 1, 1000) == 7 * 100 + 20_000
    assert ns("all-gather", 1, 1, 0) == 0


def test_timeline_hides_what_the_backward_pass_covers() -> None:
    plan = make_plan(LAYERS, PlanOptions(2, machine=MACHINE))
    sent = (
        Transfer("gradients", "all-reduce", 2, 1, (300, 300), early=True),
        Transfer("statistics A", "reduce-scatter", 2, 1, (900, 100), 10, early=True),
        Transfer("statistics G", "reduce-scatter", 2, 1, (500, 500), 10),
        Transfer("updates", "all-gather", 2, 1, (70, 70)),
    )
    wire = Wire("ddp", factor_interval=10, inverse_interval=20)
    found = timeline(plan, sent, wire, Workload(1500, Cost(600, 0), 10), MACHINE)
    ns = {stage.name: (stage.ns, stage.interval) for stage in found.stages}
    assert ns["forward"] == (500, 1)
    assert ns["backward"] == (1000, 1)
    assert ns["send gradients"] == (20 - 20 + 0, 1)  # 10 + 300 ns, all hidden
    assert ns["send statistics A"] == (910 - (1000 - 320), 10)
    assert ns["send statistics G"] == (510, 10)
    assert ns["statistics"] == (600, 10)
    assert ns["inverses"] == (max(load.inverse for load in plan.loads), 20)
    assert ns["preconditioning"] == (max(load.apply for load in plan.loads), 1)
    assert ns["send updates"] == (80, 1)
    assert found.longest == sum(value for value, _ in ns.values())
    assert found.mean == pytest.approx(sum(value / interval for value, interval in ns.values()))
    sgd = timeline_of_sgd(sent[:1], Workload(300, Cost(0, 0), 10), MACHINE)
    assert [s.ns for s in sgd.stages] == [100, 200, 320 - 200, sgd.stages[-1].ns]


def test_memory_shrinks_with_ranks_and_grows_with_workers() -> None:
    def most(fraction: float) -> int:
        plan = make_plan(LAYERS, PlanOptions(4, grad_worker_fraction=fraction))
        return max(memory.total for memory in memory_of(plan, Wire()))

    alone = memory_of(make_plan(LAYERS, PlanOptions(1)), Wire())
    dense = sum(f.dense for layer in LAYERS for f in layer.factors)
    packed = sum(f.packed for layer in LAYERS for f in layer.factors)
    gradients = sum(layer.gradient for layer in LAYERS)
    assert alone[0].total == 4 * (2 * dense + packed + 3 * gradients)
    totals = [most(fraction) for fraction in (0, 0.5, 1)]
    assert all(less < more for less, more in pairwise([*totals, alone[0].total]))
    plan = make_plan(LAYERS, PlanOptions(4))
    sharded = [memory.moments for memory in memory_of(plan, Wire("fsdp"))]
    assert sum(sharded) == 4 * 4 * gradients  # matrices of gradients and updates, and both as shards


def test_report_prints_and_is_json() -> None:
    workload = Workload(10**9, Cost(10**8, 10**6), 300)
    report = shard_report(LAYERS, PlanOptions(4), Wire(factor_interval=10, inverse_interval=10, loose=7), workload)
    text = str(report)
    for expected in (
        "4 ranks",
        "balance",
        "x SGD's",
        "memory of the fullest rank",
        "mean step",
        "assumed, not measured",
    ):
        assert expected in text
    content = json.loads(json.dumps(report.to_json()))
    assert content["sgd_bytes"] == 2 * 3 * (7 + sum(layer.gradient for layer in LAYERS)) * 4 // 4
    assert content["balance"] == report.plan.balance
    assert set(content["owners"]["layer0"]) == {"A", "G"}
    assert len(content["bytes_per_step"]) == 4
    alone = str(shard_report(LAYERS, PlanOptions(1), Wire()))
    assert "one rank sends nothing" in alone
    assert "predicted" not in alone


def test_ranks_send_what_the_plan_says() -> None:
    """Beside what the plan counts there are flags, counts, traces and status words: some numbers for each matrix."""
    answers = on_ranks(4, counted, timeout_s=120)
    assert all(isinstance(answer, dict) for answer in answers), answers
    for name, (wrapper, *_) in CASES.items():
        for sent, planned, matrices in (answer[name] for answer in answers):
            few = 8 * matrices
            slack = {"reduce-scatter": 0, "all-gather": 2 * few, "all-reduce": 9 * few, "all-to-all": 0}
            if wrapper == "fsdp":  # rows are cut, not numbers: shares differ by less than a row of each parameter
                assert sent["all-to-all"] == pytest.approx(planned["all-to-all"], rel=0.35)
            for kind in {*sent, *planned} - ({"all-to-all"} if wrapper == "fsdp" else set()):
                extra = sent.get(kind, 0) - planned.get(kind, 0)
                assert 0 <= extra <= slack[kind], (name, kind, sent, planned)


def test_named_errors() -> None:
    with pytest.raises(ConfigurationError, match="'plain', 'ddp' or 'fsdp', got 'tpu'"):
        Wire("tpu")
    with pytest.raises(ConfigurationError, match="at least 1"):
        Wire(statistics=0)
    with pytest.raises(ConfigurationError, match=r"expected a machine of .*'h100'.*, got 'z1'"):
        machine_named("z1")
