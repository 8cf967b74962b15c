"""Tuning with planted times: who wins, what is measured, what a budget and Ctrl-C leave."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tuning import FACTOR, FAKE, MOMENTUM, FakeBench, factor_problem, list_problem, resolver_on
from triton_curv_autotune import AutotuneError, NoDeviceError
from triton_curv_autotune.bench import GpuBench
from triton_curv_autotune.entry import Entry
from triton_curv_autotune.key import environment
from triton_curv_autotune.policy import MARGIN
from triton_curv_autotune.registry import get_op
from triton_curv_autotune.store import Store
from triton_curv_autotune.tune import TURN, Job, Verdict, config_distance, plan, tune, verify
from triton_curv_kernels.symmetric import SymmetricProblem

PROBLEM = list_problem()
OP = get_op(MOMENTUM)
DEFAULT = OP.default(PROBLEM)
OTHERS = OP.candidates(PROBLEM)[1:]


def run(root: Path, bench: FakeBench, *problems: tuple[str, Any], budget_s: float = 1e9, **options: Any) -> list[Job]:
    given = problems or ((MOMENTUM, PROBLEM),)
    return tune(given, budget_s, bench=bench, store=Store(root), resolver=resolver_on(root), **options)


def stored(root: Path) -> list[Entry]:
    return list(Store(root).entries(environment(FAKE)))


def ticking(seconds: float) -> Any:
    """A clock that goes on by so much at each look."""
    now = iter(range(1 << 30))
    return lambda: next(now) * seconds


@pytest.mark.parametrize(("ms", "wins"), [(0.96, True), (0.9701, False), (1 - MARGIN, True), (1.5, False)])
def test_the_default_gives_way_to_a_gain_above_the_margin(ms: float, wins: bool, tmp_path: Path) -> None:
    (job,) = run(tmp_path, FakeBench(lambda config: ms if config == OTHERS[2] else 1.0))
    assert job.entry.config == (OTHERS[2] if wins else DEFAULT)
    assert stored(tmp_path) == [job.entry]
    resolver = resolver_on(tmp_path)
    assert resolver.resolve(MOMENTUM, PROBLEM) == job.entry.config
    assert resolver.explain_choice(MOMENTUM, PROBLEM).source == "store"


def test_a_wrong_candidate_never_wins(tmp_path: Path) -> None:
    fast, wrong = OTHERS[0], OTHERS[1]
    times = {fast: 0.5, wrong: 0.1}
    bench = FakeBench(lambda c: times.get(c, 1.0), lambda c: "result 0 is off" if c == wrong else "")
    (job,) = run(tmp_path, bench)
    assert job.entry.config == fast
    assert wrong not in [config for _, _, config in bench.timed]
    assert [m.reason for m in job.entry.measurements if m.config == wrong] == ["result 0 is off"]
    again = FakeBench(lambda c: 1.0)
    run(tmp_path, again)
    assert again.turns == 0  # it is remembered as wrong


def test_a_default_that_fails_ends_its_problem_and_says_so(tmp_path: Path) -> None:
    bad = FakeBench(lambda c: 1.0, lambda c: "no room" if c == DEFAULT else "")
    packing = SymmetricProblem(1024, 1 << 20, torch.float32, torch.float32, FAKE)
    first, second = run(tmp_path, bad, (MOMENTUM, PROBLEM), ("pack_symmetric", packing))
    assert first.failure == "the default fails: no room"
    assert second.entry.measurements
    assert [entry.op.name for entry in stored(tmp_path)] == ["pack_symmetric"]


def test_only_a_new_config_of_the_space_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the default beside it, whose time says how to compare with what was measured before."""
    run(tmp_path, FakeBench(lambda config: 1.0))
    new = dataclasses.replace(OTHERS[0], BLOCK=256, num_warps=2)
    monkeypatch.setitem(vars(OP), "configs", [*OP.configs, new])
    bench = FakeBench(lambda config: 1.8 if config == new else 2.0)  # the clocks are half as fast today
    (job,) = run(tmp_path, bench)
    assert [config for _, _, config in bench.timed] == [DEFAULT, new]
    assert job.entry.config == new
    assert job.entry.gain == pytest.approx(1 / 0.9)
    assert len(job.entry.measurements) == len(OTHERS) + 2


def test_problems_take_turns_and_the_budget_ends_it(tmp_path: Path) -> None:
    """Looks at the clock: one for the start, one before each turn; the fourth turn would begin too late."""
    problems = [(FACTOR, factor_problem(k=k)) for k in (1024, 4096)]
    bench = FakeBench(lambda config: 1.0)
    jobs = run(tmp_path, bench, *problems, budget_s=35.0, clock=ticking(10.0))
    assert [job.measured for job in jobs] == [2 * TURN, TURN]
    assert bench.released == 1
    assert all(job.todo for job in jobs)
    more = run(tmp_path, FakeBench(lambda config: 1.0), *problems, budget_s=15.0, clock=ticking(10.0))
    assert len(more[0].entry.measurements) == 3 * TURN + 1  # it continued


def test_candidates_near_to_what_is_good_come_first(tmp_path: Path) -> None:
    bench = FakeBench(config_distance_to_target)
    (job,) = run(tmp_path, bench, (FACTOR, factor_problem()), budget_s=15.0, clock=ticking(10.0))
    default = job.op.default(job.problem)
    measured = [m.config for m in job.entry.measurements if m.config != default]
    assert max(config_distance(c, default) for c in measured) <= min(config_distance(c, default) for c in job.todo)


def config_distance_to_target(config: Any) -> float:
    return 1.0 + config_distance(config, get_op(FACTOR).configs[0])


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path) -> None:
    bench = FakeBench(lambda config: 0.5 if config == OTHERS[0] else 1.0, stop_at=2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, bench, (MOMENTUM, PROBLEM), ("cg_update_", PROBLEM))
    assert bench.released == 1
    (entry,) = stored(tmp_path)
    assert (entry.op.name, entry.config) == (MOMENTUM, OTHERS[0])


def test_the_same_times_give_the_same_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    problems = [(FACTOR, factor_problem(n=64)), (MOMENTUM, PROBLEM)]
    files = []
    for name in "ab":
        run(
            tmp_path / name,
            FakeBench(lambda config: 1.0 + len(str(config)) % 5),
            *problems,
            budget_s=95,
            clock=ticking(10),
        )
        root = tmp_path / name
        files.append({str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.json")})
    assert files[0] == files[1]
    assert len(files[0]) == 2


def test_one_bucket_is_measured_once(tmp_path: Path) -> None:
    jobs = plan([(MOMENTUM, list_problem(n)) for n in (1 << 20, (1 << 20) + 5, 1 << 21)], resolver_on(tmp_path))
    assert [job.problem.numel for job in jobs] == [1 << 20, 1 << 21]


def test_the_watcher_hears_of_every_turn(tmp_path: Path) -> None:
    heard: list[tuple[int, int, float]] = []

    class Watching:
        def advanced(self, entry: Entry, measured: int, left: int, seconds_left: float) -> None:
            heard.append((measured, left, seconds_left))

    (job,) = run(tmp_path, FakeBench(lambda config: 1.0), watcher=Watching(), budget_s=1000, clock=ticking(1.0))
    assert heard[-1][:2] == (len(OTHERS), 0)
    assert [seconds for *_, seconds in heard] == sorted((s for *_, s in heard), reverse=True)
    assert job.measured == len(OTHERS)


def test_verify_measures_choices_again(tmp_path: Path) -> None:
    (job,) = run(tmp_path, FakeBench(lambda config: 0.5 if config == OTHERS[0] else 1.0))

    def again(ms: float, reason: str = "") -> Verdict:
        (verdict,) = verify([job.entry], FakeBench(lambda c: ms if c == OTHERS[0] else 1.0, lambda c: reason))
        return verdict

    kept, lost, wrong = again(0.8), again(0.99), again(0.5, "off")
    assert (kept.reason, kept.gain) == ("", 1.25)
    assert lost.gain < 1 / (1 - MARGIN)
    assert wrong.reason == "off"


def test_without_a_gpu_nothing_can_be_measured(tmp_path: Path, no_gpu: None) -> None:
    with pytest.raises(NoDeviceError, match="torch sees no GPU"):
        GpuBench(torch.device("cuda"))
    with pytest.raises(NoDeviceError):
        tune([(MOMENTUM, PROBLEM)], resolver=resolver_on(tmp_path))


def test_nothing_is_tuned_while_torch_traces_or_captures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for busy in ((torch.compiler, "is_compiling"), (torch.cuda, "is_current_stream_capturing")):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(*busy, lambda: True)
            with pytest.raises(AutotuneError, match=r"outside torch\.compile and the capture of CUDA graphs"):
                run(tmp_path, FakeBench(lambda config: 1.0))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
