"""What each process of the race does: publish the same entries and its own, and read what the others publish."""

import random
from pathlib import Path

from tests.support.tuning import MOMENTUM, entry_for, list_problem
from triton_curv_autotune.entry import Entry
from triton_curv_autotune.key import file_of
from triton_curv_autotune.registry import get_op
from triton_curv_autotune.store import Store

SHARED = [list_problem(1 << exponent) for exponent in (10, 12, 14)]


def own_problem(worker: int) -> object:
    return list_problem(1 << (20 + worker))


def published(problem: object, worker: int, turn: int) -> Entry:
    """Each worker publishes another config and time for the same problem, so that files differ in length, too."""
    configs = get_op(MOMENTUM).candidates(problem)
    return entry_for(MOMENTUM, problem, configs[1 + worker % (len(configs) - 1)], ratio=0.9 / (turn + 1))


def race(root: str, worker: int, rounds: int) -> int:
    """Returns how many reads found no entry or one that nobody wrote."""
    store, choose = Store(Path(root)), random.Random(worker)
    faults = 0
    allowed = {(p, e.config) for p in SHARED for w in range(8) for e in [published(p, w, 0)]}
    shared = [[published(p, worker, turn) for turn in range(3)] for p in SHARED]
    own = published(own_problem(worker), worker, 0)
    for turn in range(rounds):
        entry = choose.choice(choose.choice(shared))
        store.write(entry if turn % 10 else own)
        wanted = choose.choice(shared)[0]
        path = store.root / file_of(wanted.key)
        found = store.read(path, MOMENTUM, wanted.environment)
        faults += found is None or (found.problem, found.config) not in allowed
    return faults
