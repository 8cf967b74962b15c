"""Order of the look-up, buckets, warnings, deterministic mode, threads."""

import dataclasses
import random
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import triton_curv_kernels
from tests.support.tuning import (
    FACTOR,
    FAKE,
    H20,
    H100,
    H200,
    MIG,
    MOMENTUM,
    entry_for,
    factor_problem,
    list_problem,
    other_config,
    resolver_on,
    varied_problems,
)
from triton_curv_autotune import Resolver, TuningWarning, UnknownOpError, explain_choice, learn, override, resolve
from triton_curv_autotune.entry import Measurement, provenance_now
from triton_curv_autotune.key import environment, file_of
from triton_curv_autotune.registry import get_op, op_names
from triton_curv_autotune.store import Store
from triton_curv_autotune.table import Table
from triton_curv_kernels.backend import DeviceLimits
from triton_curv_kernels.choice import choose, set_chooser, tables_key
from triton_curv_kernels.factor import FactorConfig, FactorProblem, default_config

PROBLEM = factor_problem()
HIP = DeviceLimits("hip", 304, 64 * 1024, "AMD Instinct MI300X", "gfx942")


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def quiet(resolver: Resolver, op: str, problem: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TuningWarning)
        return resolver.explain_choice(op, problem)


def test_default_then_learned_then_override() -> None:
    problem = FactorProblem(batch=1, k=4096, n=513, dtype=torch.bfloat16)
    default = default_config(problem)
    assert resolve(FACTOR, problem) == default
    assert resolve(FACTOR, problem) is resolve(FACTOR, dataclasses.replace(problem))
    better = dataclasses.replace(default, num_stages=default.num_stages + 1)
    best = dataclasses.replace(default, num_warps=1)
    learn(FACTOR, problem, better)
    assert resolve(FACTOR, problem) is better
    assert explain_choice(FACTOR, problem).source == "process"
    assert resolve(FACTOR, dataclasses.replace(problem, k=8192)) is not better
    with override(FACTOR, best):
        with override(FACTOR, default):
            assert resolve(FACTOR, problem) is default
        assert resolve(FACTOR, problem) is best
        assert explain_choice(FACTOR, problem).source == "override"
    assert resolve(FACTOR, problem) is better


def test_an_op_without_configs_is_named() -> None:
    with pytest.raises(UnknownOpError, match="flash_attention"):
        resolve("flash_attention", 0)
    with pytest.raises(UnknownOpError, match="expected one of"), override("gemm", None):
        pass
    with pytest.raises(TypeError, match="expected a FactorProblem"):
        resolve(FACTOR, 3)


def test_every_source_gives_way_to_the_one_before(tmp_path: Path) -> None:
    """Sources appear one after the other, from the last in the order to the first."""
    op = get_op(FACTOR)
    five = [c for c in op.candidates(op.bucket(PROBLEM)) if op.supports(c, PROBLEM)][1:6]
    analytic = dataclasses.replace(
        entry_for(FACTOR, PROBLEM, five[0]), kind="analytic", config=five[0], measurements=()
    )
    nearby = entry_for(FACTOR, factor_problem(k=8192), five[1])
    shipped = entry_for(FACTOR, PROBLEM, five[2])
    stored = entry_for(FACTOR, PROBLEM, five[3])

    def with_shipped(*entries: Any) -> Resolver:
        return Resolver(lambda: Store(tmp_path), lambda: (Table(entries),))

    def source(resolver: Resolver, config: Any) -> str:
        choice = quiet(resolver, FACTOR, PROBLEM)
        assert choice.config == config == resolver.resolve(FACTOR, PROBLEM)
        return str(choice.source)

    assert source(with_shipped(), default_config(PROBLEM)) == "default"
    assert source(with_shipped(analytic), five[0]) == "analytic"
    assert source(with_shipped(analytic, nearby), five[1]) == "nearest"
    assert source(with_shipped(analytic, nearby, shipped), five[2]) == "shipped"
    Store(tmp_path).write(stored)
    resolver = with_shipped(analytic, nearby, shipped)
    assert source(resolver, five[3]) == "store"
    resolver.add([entry_for(FACTOR, PROBLEM, five[4])])
    assert source(resolver, five[4]) == "process"
    with resolver.override(FACTOR, five[0]):
        assert source(resolver, five[0]) == "override"
    assert source(resolver, five[4]) == "process"
    assert resolver.explain_choice(FACTOR, PROBLEM).gain == 2.0
    resolver.reload()
    assert source(resolver, five[3]) == "store"


def test_a_folder_to_read_comes_after_the_users_own(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    op = get_op(FACTOR)
    _, one, two, *_ = op.candidates(op.bucket(PROBLEM))
    Store(theirs).write(entry_for(FACTOR, PROBLEM, one))
    assert quiet(resolver_on(mine, theirs), FACTOR, PROBLEM).config == one
    Store(mine).write(entry_for(FACTOR, PROBLEM, two))
    assert quiet(resolver_on(mine, theirs), FACTOR, PROBLEM).config == two


def test_a_neighbour_counts_up_to_two_octaves_and_only_of_the_same_kind(tmp_path: Path) -> None:
    config = other_config(MOMENTUM, list_problem())
    Store(tmp_path).write(entry_for(MOMENTUM, list_problem(), config))
    resolver = resolver_on(tmp_path)
    for numel, source in ((1 << 20, "store"), (1 << 22, "nearest"), (1 << 18, "nearest"), (1 << 23, "default")):
        assert quiet(resolver, MOMENTUM, list_problem(numel)).source == source
    half = dataclasses.replace(list_problem(1 << 21), dtype=torch.bfloat16)
    assert quiet(resolver, MOMENTUM, half).source == "default"


def test_where_the_default_won_nearby_the_problems_own_default_is_taken(tmp_path: Path) -> None:
    far, near = factor_problem(k=4096), factor_problem(k=1024)
    assert default_config(far) != default_config(near)
    Store(tmp_path).write(entry_for(FACTOR, far, other_config(FACTOR, far), ratio=0.99))
    choice = quiet(resolver_on(tmp_path), FACTOR, near)
    assert (choice.source, choice.config) == ("nearest", default_config(near))


def test_devices_do_not_alias(tmp_path: Path) -> None:
    """H100, H200, H20 and a MIG slice share an architecture, some even all limits; each has its own entries."""
    limits = dict(zip("abcd", (H100, H200, H20, MIG), strict=True))
    op, problems = get_op(MOMENTUM), {name: list_problem(limits=device) for name, device in limits.items()}
    fitting = [c for c in op.configs if all(op.supports(c, p) and c != op.default(p) for p in problems.values())]
    configs = dict(zip(problems, fitting, strict=False))
    for name, problem in problems.items():
        Store(tmp_path).write(entry_for(MOMENTUM, problem, configs[name]))
    resolver = resolver_on(tmp_path)
    found = {name: resolver.resolve(MOMENTUM, list_problem(limits=device)) for name, device in limits.items()}
    assert found == configs
    assert len(set(found.values())) == 4
    assert len({file_of(entry_for(MOMENTUM, list_problem(limits=d), configs["a"]).key) for d in limits.values()}) == 4


def test_a_changed_kernel_file_invalidates_its_own_entries_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, problem in ((FACTOR, PROBLEM), (MOMENTUM, list_problem())):
        Store(tmp_path).write(entry_for(name, problem, other_config(name, problem)))
    op = get_op(FACTOR)
    changed = ModuleType("changed")
    changed.__file__ = str(tmp_path / "factor.py")
    Path(changed.__file__).write_text("# another kernel")
    monkeypatch.setitem(vars(op), "modules", (changed,))
    resolver = resolver_on(tmp_path)
    assert quiet(resolver, FACTOR, PROBLEM).source == "default"
    assert quiet(resolver, MOMENTUM, list_problem()).source == "store"


@pytest.mark.parametrize("field", ["triton", "assembler", "policy"])
def test_entries_of_another_environment_are_not_used(field: str, tmp_path: Path) -> None:
    entry = entry_for(MOMENTUM, list_problem(), other_config(MOMENTUM, list_problem()))
    foreign = dataclasses.replace(entry.environment, **{field: "other"})  # type: ignore[arg-type]  # a field of strings
    Store(tmp_path).write(dataclasses.replace(entry, environment=foreign))
    assert quiet(resolver_on(tmp_path), MOMENTUM, list_problem()).source == "default"
    assert environment(FAKE) == entry.environment


@pytest.mark.parametrize("name", op_names())
def test_buckets_stand_for_themselves_and_fit_their_problems(name: str) -> None:
    """What fits a bucket fits what is in it, for look-up and tuning alike, but for widths that go up to a bucket."""
    op = get_op(name)
    some = random.Random(0).sample(list(op.configs), min(len(op.configs), 40))
    for problem in varied_problems(name):
        bucket = op.bucket(problem)
        assert op.bucket(bucket) == bucket
        assert op.supports(op.default(bucket), bucket)
        assert op.supports(op.pinned(problem), problem)
        assert [c for c in some if op.supports(c, bucket)] == op.prune(some, bucket)
        if not (hasattr(problem, "n") and bucket.n > problem.n):
            assert set(op.prune(some, bucket)) <= set(op.prune(some, problem))


@pytest.mark.parametrize("name", op_names())
def test_pinned_configs_run_on_every_device_and_depend_on_the_shape_alone_on_nvidias(name: str) -> None:
    op = get_op(name)
    small = DeviceLimits("cuda", 7, 163 * 1024, "Small GPU", "sm_80")
    for problem in varied_problems(name):
        pinned = op.pinned(problem)
        assert op.same_numerics(op.pinned(op.on(problem, small)), pinned)
        on_hip = op.on(problem, HIP)
        assert op.prune([op.pinned(on_hip)], on_hip) or op.pinned(on_hip) == op.default(on_hip)


def resolve_often(resolver: Resolver) -> None:
    for k in (4096, 4096, 4100):  # one bucket
        resolver.resolve(FACTOR, factor_problem(k=k))
        resolver.reload()


def test_a_guess_is_announced_once_a_key(tmp_path: Path) -> None:
    resolver = resolver_on(tmp_path)
    with pytest.warns(TuningWarning, match="nothing measured.*'default'.*Fake GPU.*triton-curv tune") as caught:
        resolve_often(resolver)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolver.resolve(FACTOR, dataclasses.replace(PROBLEM, limits=DeviceLimits()))  # no device to tune for


def test_hits_ask_no_file_and_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    class Counting(Store):
        def entries(self, here: Any) -> Any:
            reads.append(here)
            return super().entries(here)

    resolver = Resolver(lambda: Counting(tmp_path), lambda: ())
    quiet(resolver, FACTOR, PROBLEM)
    for k in range(4096, 4110):
        quiet(resolver, FACTOR, factor_problem(k=k))
    assert len(reads) == 1


def test_deterministic_mode_follows_from_the_shape_alone(tmp_path: Path, deterministic: None) -> None:
    """The fastest config with the pinned numerics is taken, on any device, whatever else was measured faster."""
    op = get_op(FACTOR)
    pinned = op.pinned(PROBLEM)
    like = [c for c in op.candidates(op.bucket(PROBLEM)) if op.same_numerics(c, pinned) and c != pinned]
    other = next(c for c in op.candidates(op.bucket(PROBLEM)) if not op.same_numerics(c, pinned))
    times = [Measurement(c, 1.0, 1.0) for c in (pinned, op.default(op.bucket(PROBLEM)))]
    times += [Measurement(other, 0.1, 0.1), Measurement(like[0], 0.5, 0.5), Measurement(like[1], 0.6, 0.6)]
    entry = entry_for(FACTOR, PROBLEM, other).with_measurements(times, provenance_now())
    Store(tmp_path).write(entry)
    resolver = resolver_on(tmp_path)
    assert quiet(resolver, FACTOR, PROBLEM).config == like[0]
    small = DeviceLimits("cuda", 7, 100 * 1024, "Small GPU", "sm_80")
    guessed = quiet(resolver, FACTOR, factor_problem(limits=small)).config
    assert op.same_numerics(guessed, pinned)
    torch.use_deterministic_algorithms(False)
    assert resolver.resolve(FACTOR, PROBLEM) == other
    assert quiet(resolver, FACTOR, factor_problem(limits=small)).config != guessed


def test_threads_see_whole_choices(tmp_path: Path) -> None:
    """Look-ups run beside overrides, new entries and reloads; each gives one of the configs that were ever right."""
    op = get_op(MOMENTUM)
    problem = list_problem()
    allowed = set(op.candidates(problem))
    Store(tmp_path).write(entry_for(MOMENTUM, problem, other_config(MOMENTUM, problem)))
    resolver = resolver_on(tmp_path)
    errors: list[object] = []
    done = threading.Event()

    def look_up() -> None:
        try:
            while not done.is_set():
                found = resolver.resolve(MOMENTUM, problem)
                if found not in allowed:
                    errors.append(found)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=look_up) for _ in range(3)]
    for thread in threads:
        thread.start()
    for index in range(50):
        config = op.candidates(problem)[index % len(allowed)]
        with resolver.override(MOMENTUM, config):
            assert resolver.resolve(MOMENTUM, problem) == config
        resolver.add([entry_for(MOMENTUM, problem, config)])
        if index % 10 == 0:
            resolver.reload()
    done.set()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.fixture
def chooser() -> Iterator[list[Any]]:
    asked: list[Any] = []

    def answer(op: str, problem: Any) -> Any:
        asked.append((op, problem))
        return FactorConfig(16, 16)

    set_chooser(answer, lambda: "tables")
    yield asked
    set_chooser(None)


def test_launchers_ask_the_chooser(chooser: list[Any]) -> None:
    assert choose(FACTOR, PROBLEM, default_config) == FactorConfig(16, 16)
    assert chooser == [(FACTOR, PROBLEM)]
    assert tables_key() == ""  # outside torch.compile
    set_chooser(None)
    assert choose(FACTOR, PROBLEM, default_config) == default_config(PROBLEM)


def test_every_op_that_asks_is_declared() -> None:
    files = Path(triton_curv_kernels.__file__).parent.glob("*.py")
    calls = [call for file in files for call in re.findall(r"\bchoose(?:_once)?\(([^)]*)", file.read_text())]
    asked = {name for call in calls for name in re.findall(r'"(\w+)"', call)}
    assert asked == set(op_names())
