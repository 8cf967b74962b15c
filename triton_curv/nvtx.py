"""Stages of a step as ranges in Nsight Systems and torch.profiler: one domain, a category and colour for each stage.

Off by default, and then nothing is on the hot path at all: `enable()` puts a wrapper around each function marked with
`stage`, `disable()` takes it off again. TRITON_CURV_NVTX=1 enables the ranges when triton_curv is imported.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeVar

import nvtx
import torch

Stage = Literal[
    "step",
    "factor A",
    "factor G",
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


class Marked(NamedTuple):
    """A function that is a stage: where it is found, itself, and what its range says."""

    module: str
    owners: tuple[str, ...]
    name: str
    function: Callable[..., Any]
    stage: Stage
    payload: Callable[..., int] | None


_marked: list[Marked] = []
_enabled = False


def stage(name: Stage, payload: Callable[..., int] | None = None) -> Callable[[F], F]:
    """Mark a method, or a function called through its module, as a stage.

    `payload` takes the arguments of the call and returns bytes or FLOPs (of "step": the number of the step).
    """

    def mark(function: F) -> F:
        *owners, last = function.__qualname__.split(".")
        _marked.append(Marked(function.__module__, tuple(owners), last, function, name, payload))
        return function

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


def enable_if_asked() -> None:
    """`enable()` if the environment says TRITON_CURV_NVTX=1."""
    if os.environ.get(VARIABLE, "0") not in ("", "0"):
        enable()


def _owner_of(marked: Marked) -> Any:
    owner: Any = sys.modules[marked.module]
    for name in marked.owners:
        owner = getattr(owner, name)
    return owner


def _with_range(marked: Marked) -> Callable[..., Any]:
    """The function inside a range named like its stage; in a graph that torch.compile traces, the bare function."""
    function, name, payload = marked.function, marked.stage, marked.payload
    domain = nvtx.get_domain(DOMAIN)
    category = domain.get_category_id(name)

    @contextmanager  # apart from `ranged`, into which torch.compile looks: it does not know NVTX's domains
    def in_range(*args: Any, **kwargs: Any) -> Iterator[None]:
        number = payload(*args, **kwargs) if payload is not None else 0
        domain.push_range(
            domain.get_event_attributes(message=name, color=COLORS[name], category=category, payload=number)
        )
        try:
            with torch.profiler.record_function(f"{DOMAIN}::{name}"):
                yield
        finally:
            domain.pop_range()

    @functools.wraps(function)
    def ranged(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with in_range(*args, **kwargs):
            return function(*args, **kwargs)

    return ranged
