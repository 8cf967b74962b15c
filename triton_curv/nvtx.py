"""Stages of a step as ranges in Nsight Systems and torch.profiler: one domain, a category and colour for each stage.

Off by default, and then nothing is on the hot path at all: `enable()` puts a wrapper around each function marked with
`stage`, `disable()` takes it off again. TRITON_CURV_NVTX=1 enables the ranges when triton_curv is imported.
Without the nvtx package, torch.profiler alone gets them, and a warning says so.
"""

import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch

from triton_curv.costs import NOTHING, Cost

Stage = Literal[
    "step",
    "factor A",
    "factor G",
    "factors",
    "fold",
    "reduce-scatter",
    "inverse",
    "apply",
    "all-gather",
    "update",
    "product",
    "cg",
    "line search",
]
COLORS: dict[Stage, int] = {
    "step": 0x9E9E9E,
    "factor A": 0x1F77B4,
    "factor G": 0x17BECF,
    "factors": 0x3F51B5,
    "fold": 0x1B5E20,
    "reduce-scatter": 0xFF7F0E,
    "inverse": 0xD62728,
    "apply": 0x2CA02C,
    "all-gather": 0xFBC02D,
    "update": 0x9467BD,
    "product": 0xE91E63,
    "cg": 0x8C564B,
    "line search": 0xF8BBD0,
}
DOMAIN = "triton_curv"
VARIABLE = "TRITON_CURV_NVTX"

F = TypeVar("F", bound=Callable[..., Any])
Payload = Callable[..., Cost | int]


class Totals(NamedTuple):
    """What the calls of a stage did, as far as its marks tell."""

    calls: int
    cost: Cost


class Marked(NamedTuple):
    """A function that is a stage: where it is found, itself, and what its range says."""

    module: str
    owners: tuple[str, ...]
    name: str
    function: Callable[..., Any]
    stage: Stage | Callable[..., Stage]
    payload: Payload | None


_marked: list[Marked] = []
_totals: dict[Stage, Totals] = {}
_enabled = False


def stage(name: Stage | Callable[..., Stage], payload: Payload | None = None) -> Callable[[F], F]:
    """Mark a method, or a function that its own module calls, as a stage.

    It must be the outermost decorator. `name` may be a function of the call's arguments. `payload` takes the arguments
    and returns the call's cost, of which the range shows the FLOPs, or the bytes where there are none; or it returns a
    number to show (of "step": which step it is).
    """

    def mark(function: F) -> F:
        *owners, last = function.__qualname__.split(".")
        marked = Marked(function.__module__, tuple(owners), last, function, name, payload)
        _marked.append(marked)
        return cast("F", _with_range(marked)) if _enabled else function

    return mark


def enable() -> None:
    """Put a range around every stage from now on, in all optimizers of this process."""
    global _enabled
    if not _enabled:
        _enabled = True
        for marked in _marked:
            setattr(_owner_of(marked), marked.name, _with_range(marked))


def disable() -> None:
    """Take all ranges off again."""
    global _enabled
    if _enabled:
        _enabled = False
        for marked in _marked:
            setattr(_owner_of(marked), marked.name, marked.function)


def enabled() -> bool:
    """Whether ranges are on."""
    return _enabled


def totals() -> dict[Stage, Totals]:
    """Calls and cost of each stage since `reset_totals()`, counted while ranges are on."""
    return dict(_totals)


def reset_totals() -> None:
    """Count from zero again."""
    _totals.clear()


def enable_if_asked() -> None:
    """`enable()` if the environment says TRITON_CURV_NVTX=1."""
    if os.environ.get(VARIABLE, "0") not in ("", "0"):
        enable()


def _owner_of(marked: Marked) -> Any:
    owner: Any = sys.modules[marked.module]
    for name in marked.owners:
        owner = getattr(owner, name)
    return owner


@functools.cache
def _domain() -> Any:
    """NVTX's domain; None where the package is missing, as on machines that got this one without its requirements."""
    try:
        import nvtx
    except ModuleNotFoundError:
        warnings.warn("the package nvtx is missing: stages show in torch.profiler only, not in Nsight", stacklevel=4)
        return None
    return nvtx.get_domain(DOMAIN)


def _with_range(marked: Marked) -> Callable[..., Any]:
    """The function inside a range named like its stage; in a graph that torch.compile traces, the bare function."""
    function, payload, stage_of = marked.function, marked.payload, marked.stage
    domain = _domain()
    category = {name: domain.get_category_id(name) if domain else 0 for name in COLORS}

    @contextmanager  # apart from `ranged`, into which torch.compile looks: it does not know NVTX's domains
    def in_range(*args: Any, **kwargs: Any) -> Iterator[None]:
        name = stage_of(*args, **kwargs) if callable(stage_of) else stage_of
        told = payload(*args, **kwargs) if payload is not None else 0
        cost = told if isinstance(told, Cost) else NOTHING
        number = (told.flops or told.bytes) if isinstance(told, Cost) else told
        before = _totals.get(name, Totals(0, NOTHING))
        _totals[name] = Totals(before.calls + 1, before.cost + cost)
        if domain:
            domain.push_range(
                domain.get_event_attributes(message=name, color=COLORS[name], category=category[name], payload=number)
            )
        try:
            with torch.profiler.record_function(f"{DOMAIN}::{name}"):
                yield
        finally:
            if domain:
                domain.pop_range()

    @functools.wraps(function)
    def ranged(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with in_range(*args, **kwargs):
            return function(*args, **kwargs)

    return ranged
