"""What ranks do in the tests of agreement: each has a store of its own below `folder`."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.support.tuning import FACTOR, FAKE, MOMENTUM, FakeBench, entry_for, factor_problem, list_problem, resolver_on
from triton_curv_autotune.agree import sync, tune_together
from triton_curv_autotune.key import canonical
from triton_curv_autotune.registry import get_op
from triton_curv_autotune.resolve import Resolver
from triton_curv_autotune.store import Store

PROBLEMS: list[tuple[str, Any]] = [
    *[(FACTOR, factor_problem(k=k, n=n)) for k in (1024, 4096) for n in (64, 128)],
    *[(MOMENTUM, list_problem(1 << exponent)) for exponent in (12, 16, 20)],
]

TUNED: list[tuple[str, Any]] = [
    (name, list_problem(1 << exponent)) for name in (MOMENTUM, "cg_update_") for exponent in (12, 16, 20)
]


def config_of(rank: int, problem: Any = PROBLEMS[0][1]) -> Any:
    return get_op(FACTOR).candidates(problem)[1 + rank]


def plan_of(resolver: Resolver) -> tuple[list[Any], str]:
    """All choices, and all entries to the last byte."""
    choices = [resolver.resolve(name, problem) for name, problem in PROBLEMS]
    return choices, canonical(sorted(canonical(entry.to_json()) for entry in resolver.entries(FAKE)))


def disagreeing(rank: int, folder: str, cold: int | None) -> Any:
    """Each rank has found another winner for one problem, and has one entry that no other has; `cold` has nothing."""
    root = Path(folder, str(rank))
    if rank != cold:
        name, problem = PROBLEMS[0]
        Store(root).write(entry_for(name, problem, config_of(rank), ratio=0.5 + rank / 10))
        name, problem = PROBLEMS[1 + rank]
        Store(root).write(entry_for(name, problem, get_op(name).candidates(problem)[1]))
    resolver = resolver_on(root)
    before = plan_of(resolver)
    count = sync(devices=[FAKE], resolver=resolver)
    again = sync(devices=[FAKE], resolver=resolver)  # nothing to exchange
    return before, count, again, plan_of(resolver)


def tuning(rank: int, folder: str, failing: int | None) -> Any:
    """Problems are shared out; times differ from rank to rank, as they do."""
    bench = FakeBench(lambda config: 1.0 + (hash(str(config)) + rank) % 7)
    if rank == failing:
        bench.check = planted_failure  # type: ignore[assignment]  # the fault
    resolver = resolver_on(Path(folder, str(rank)))
    options: dict[str, Any] = {"bench": bench, "store": Store(Path(folder, str(rank)))}
    tune_together(reversed(TUNED), 1e9, timeout=timedelta(seconds=20), devices=[FAKE], resolver=resolver, **options)
    return {(name, problem) for name, problem, _ in bench.timed}, plan_of(resolver)


def planted_failure(*arguments: Any) -> Any:
    raise RuntimeError("planted")


def absent(rank: int, folder: str, missing: int) -> Any:
    if rank == missing:
        return "absent"
    return sync(timeout=timedelta(seconds=1), devices=[FAKE], resolver=resolver_on(Path(folder)))


def other_kernels(rank: int, folder: str, changed: int) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        if rank == changed:
            patch.setitem(vars(get_op(FACTOR)), "modules", ())
        return sync(timeout=timedelta(seconds=20), devices=[FAKE], resolver=resolver_on(Path(folder)))
