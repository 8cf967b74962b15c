"""Which configuration a launcher takes where its caller names none: the op's analytic default, or a chooser's answer.

A launcher asks `config or choose("accumulate_factor_", problem, default_config)`, or `choose_once` where describing the
problem takes longer than looking it up. The tuner's package installs the chooser, so that kernels import nothing of it.
"""

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from triton_curv_kernels.backend import NO_DEVICE, DeviceLimits, device_limits

Problem = TypeVar("Problem")
Config = TypeVar("Config")

Chooser = Callable[[str, Any], Any]
"""(op, problem) -> config; a look-up, whatever runs around it: tracing, or the capture of a CUDA graph."""

MOST_ANSWERS = 4096

_chooser: Chooser | None = None
_tables: Callable[[], str] | None = None
_answers: dict[Hashable, Any] = {}


@dataclass(frozen=True)
class ListProblem:
    """What the best configuration of an elementwise op over tensors depends on.

    `numel`: elements of one launch; `dtype`: of the parameters (their buffers are fp32).
    """

    numel: int
    dtype: torch.dtype
    limits: DeviceLimits = NO_DEVICE

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "ListProblem":
        """Describe a launch over all of `tensors`, one at least."""
        return cls(sum(t.numel() for t in tensors), tensors[0].dtype, device_limits(tensors[0].device))


def set_chooser(chooser: Chooser | None, tables: Callable[[], str] | None = None) -> None:
    """Let `chooser` decide from now on, None: the analytic defaults. `tables` names the state of what it knows."""
    global _chooser, _tables
    _chooser, _tables = chooser, tables
    forget_answers()


def forget_answers() -> None:
    """Let `choose_once` ask anew: a chooser calls it where its answers may have changed.

    A fresh dict instead of a cleared one: an answer that is under way in another thread ends in the old one.
    """
    global _answers
    _answers = {}


def choose(op: str, problem: Problem, default: Callable[[Problem], Config]) -> Config:
    """The configuration for `op` on `problem`, a frozen dataclass.

    Sizes that torch.compile keeps symbolic count as those it traces with: no guard, the choice is about speed alone.
    """
    if _chooser is None:
        return default(problem)
    return _chooser(op, with_hints(problem))  # type: ignore[no-any-return]  # the op's own kind of config


def choose_once(
    op: str, call: Hashable, describe: Callable[[], Problem], default: Callable[[Problem], Config]
) -> Config:
    """`choose(op, describe(), default)`, asked once for each `call`: shapes, strides, dtypes and device, say.

    A `call` with sizes that torch.compile keeps symbolic is asked each time.
    """
    answers = _answers
    try:
        key = (op, call, torch.are_deterministic_algorithms_enabled())
        config = answers.get(key)
    except TypeError:  # symbolic sizes have no hash
        return choose(op, describe(), default)
    if config is None:
        if len(answers) >= MOST_ANSWERS:
            answers.clear()
        config = answers[key] = choose(op, describe(), default)
    return config


def with_hints(problem: Problem) -> Problem:
    """The problem, with the sizes that torch.compile traces with for those that it keeps symbolic: it has a hash."""
    try:
        hash(problem)
    except TypeError:
        symbolic = {f.name: v for f in fields(problem) if isinstance(v := getattr(problem, f.name), torch.SymInt)}  # type: ignore[arg-type]  # a dataclass
        hints = {name: int(v) if v.node.hint is None else v.node.hint for name, v in symbolic.items()}
        return replace(problem, **hints)  # type: ignore[type-var]  # as above
    return problem


def tables_key() -> str:
    """What the chooser knows and how ops are written, as a constant of the graph while torch.compile traces, else "".

    Compiled graphs hold the configurations that were chosen and the references' operations, but torch looks for them
    in its caches before any op runs, by the op's name. A public function hands this to its op, whose body ignores it:
    so it is a part of the caches' keys, and another version of this package finds nothing of this one.
    """
    return _constant_tables_key() if torch.compiler.is_compiling() else ""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it unannotated
def _constant_tables_key() -> str:
    return f"{_source()}:{'' if _tables is None else _tables()}"


@cache
def _source() -> str:
    """A digest of this package's files."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
