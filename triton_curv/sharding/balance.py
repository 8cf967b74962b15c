"""Scheduling: layers to columns of ranks, factors to the ranks of a column, and how well it can be done at best.

A column is some ranks, `rows` of them. All precondition the column's layers; each factor is inverted by one of them.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

MULTIFIT_TRIES = 12


class Work(NamedTuple):
    """Time of preconditioning one layer and of inverting each of its factors."""

    apply: int
    inverses: tuple[int, ...]


class Column(NamedTuple):
    """Time of preconditioning all layers of a column, of all their inverses, and of the longest inverse."""

    apply: int = 0
    inverses: int = 0
    longest: int = 0

    def with_(self, work: Work) -> "Column":
        """The column with one more layer."""
        return Column(self.apply + work.apply, self.inverses + sum(work.inverses), max(self.longest, *work.inverses))

    def time(self, rows: int) -> int:
        """Until the busiest of the column's ranks is done, if the inverses share out as well as they can."""
        return self.apply + max(self.longest, -(-self.inverses // rows))


def longest_first(costs: Sequence[int], bins: int) -> list[int]:
    """The bin of each item: from the longest to the shortest, each goes where least is (Graham 1969: within 4/3)."""
    heap = [(0, place) for place in range(bins)]
    chosen = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):  # stable: equal items in their order
        load, place = heap[0]
        heapq.heapreplace(heap, (load + costs[item], place))
        chosen[item] = place
    return chosen


def share_out(works: Sequence[Work], rows: int, columns: int) -> list[int]:
    """The column of each layer, so that the busiest column is done soon.

    The longest layers first, each to the column that then is done first. Where columns have several ranks, a shorter
    time is also sought in which first-fit puts layers with long inverses together (MULTIFIT, Coffman et al. 1978).
    """
    filled = [Column()]  # those with layers, and one empty one
    chosen = [0] * len(works)
    for layer in sorted(range(len(works)), key=lambda layer: -Column().with_(works[layer]).time(rows)):
        after = [column.with_(works[layer]) for column in filled]
        place = min(range(len(filled)), key=lambda column: after[column].time(rows))
        chosen[layer], filled[place] = place, after[place]
        if place == len(filled) - 1 and len(filled) < columns:
            filled.append(Column())
    if rows == 1 or columns == 1:
        return chosen
    reached, too_short = max(column.time(rows) for column in filled), 0
    for _ in range(MULTIFIT_TRIES):
        target = (reached + too_short) // 2
        found = first_fit(works, rows, columns, target)
        if found is None:
            too_short = target
        else:
            chosen, reached = found, target
    return chosen


def first_fit(works: Sequence[Work], rows: int, columns: int, target: int) -> list[int] | None:
    """Layers with the longest inverses first, each to the first column that is done by `target` then; None if none."""
    filled: list[Column] = []
    chosen = [0] * len(works)
    for layer in sorted(range(len(works)), key=lambda layer: (-max(works[layer].inverses), -works[layer].apply)):
        for place, column in enumerate(filled):
            if (after := column.with_(works[layer])).time(rows) <= target:
                chosen[layer], filled[place] = place, after
                break
        else:
            alone = Column().with_(works[layer])
            if len(filled) == columns or alone.time(rows) > target:
                return None
            chosen[layer] = len(filled)
            filled.append(alone)
    return chosen


def pigeonhole(costs: Sequence[int], bins: int) -> int:
    """The most that j + 1 items which must share a bin can weigh at least: of the j * bins + 1 longest, the last."""
    longest = sorted(costs, reverse=True)
    return max(sum(longest[j * bins - j : j * bins + 1]) for j in range(-(-len(costs) // bins)))


def least_time(works: Sequence[Work], rows: int, columns: int) -> int:
    """A time that the busiest rank of no assignment undercuts: the largest of several bounds."""
    applies, inverses = sum(work.apply for work in works), [ns for work in works for ns in work.inverses]
    mean = -(-(sum(inverses) + rows * applies) // (rows * columns))
    alone = max(work.apply + max(work.inverses) for work in works)
    bound = max(mean, alone, pigeonhole([work.apply + sum(work.inverses) // rows for work in works], columns))
    if columns == 1:
        return max(bound, applies + pigeonhole(inverses, rows))
    return bound if rows == 1 else max(bound, _with_longest(works, columns))


def _with_longest(works: Sequence[Work], columns: int) -> int:
    """The least T in which columns have the time to precondition, each after the longest of its inverses.

    Layers with an inverse of at least t fill n >= (their preconditioning) / (T - t) columns, which have T - t for it;
    all columns together must have the time for all layers.
    """
    ordered = sorted(works, key=lambda work: -max(work.inverses))
    applies, held = sum(work.apply for work in works), 0
    thresholds = []
    for work in ordered:
        held += work.apply
        thresholds.append((max(work.inverses), held))

    def enough(time: int) -> bool:
        for longest, apply in thresholds:
            if time <= longest:
                return False
            used = -(-apply // (time - longest))
            if used > columns or columns * time - used * longest < applies:
                return False
        return True

    low, high = 0, applies + thresholds[0][0] + 1
    while high - low > 1:  # too short, long enough
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
