"""One op on one real shape: our call, the calls a user would make instead, the oracle, the work it does."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from triton_curv.profiling.roofs import Bound


@dataclass(frozen=True)
class Case:
    """A benchmark of one op.

    `ours` and each of `alternatives` are calls without arguments on tensors made beforehand; they may be repeated any
    number of times. `error` is our largest error against a float64 oracle, relative to the oracle's largest value, and
    `allowed_error` what the best alternative in the same dtype reaches, times 2. `flops` and `bytes` are the least work
    that the result needs (symmetry used), whoever computes it; `bar` says what the issue asks for, in words.
    `peak_bytes` are calls like `ours` and `alternatives` whose extra memory is reported, if it matters. `eager` names
    alternatives that wait for the device or for its driver inside: no CUDA graph may be made of them.
    """

    op: str
    name: str
    ours: Callable[[], Any]
    alternatives: Mapping[str, Callable[[], Any]]
    error: Callable[[], float]
    allowed_error: Callable[[], float]
    flops: float
    bytes: float
    bound: Bound
    bar: str = ""
    peak_bytes: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    eager: tuple[str, ...] = ()
