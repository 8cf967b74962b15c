"""Ops that can be tuned: one declaration each, in the files of `ops/`."""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from triton_curv_autotune.errors import UnknownOpError
from triton_curv_autotune.key import source_digest
from triton_curv_kernels.backend import NO_DEVICE, DeviceLimits

P = TypeVar("P")
C = TypeVar("C")
Inputs = tuple[Any, ...]
"""Arguments of an op: tensors, lists of tensors, numbers."""


@dataclass(frozen=True)
class Op(Generic[P, C]):
    """All that choosing and tuning need to know of an op.

    Attributes:
        name: as in `torch.ops.triton_curv`.
        problem: frozen dataclass, what the best config depends on; it has a field `limits: DeviceLimits`.
        config: frozen dataclass of numbers, strings and Literals.
        configs: the space, in a fixed order.
        prune: which configs fit a problem.
        default: analytic choice for a problem.
        bucket: the problem that stands for all problems like this one; the same for tuning and look-up, and
            `bucket(bucket(p)) == bucket(p)`. What fits it should fit them.
        numerics: config fields that change results; in deterministic mode they follow from the shape alone.
        modules: hold the kernels: their files' content is a part of the key.
        make_inputs: (problem, device) -> the op's arguments, seeded; called again, it gives the same.
        launch: runs the kernels on such arguments with a config; returns the tensors that hold the results.
        reference: the same in plain torch, on arguments of any floating dtype.
        describe: (op, problem) of all choices that a call with these arguments asks for, whatever the tensors' device.
        examples: problems to tune where nobody says which, on the default device.
        instruction: which matrix instruction a config compiles to, where that is not the same for all: it may round in
            another way, so it counts as one of the `numerics`.

    """

    name: str
    problem: type[P]
    config: type[C]
    configs: Sequence[C]
    prune: Callable[[Sequence[C], P], list[C]]
    default: Callable[[P], C]
    bucket: Callable[[P], P]
    numerics: tuple[str, ...]
    modules: tuple[ModuleType, ...]
    make_inputs: Callable[[P, torch.device], Inputs]
    launch: Callable[[Inputs, C], list[Tensor]]
    reference: Callable[[Inputs], list[Tensor]]
    describe: Callable[[Inputs], list[tuple[str, Any]]]
    examples: tuple[P, ...]
    instruction: Callable[[C], Hashable] = lambda config: None
    _spaces: dict[int, frozenset[C]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def source(self) -> str:
        """Digest of the kernel files."""
        return source_digest(tuple(Path(str(module.__file__)) for module in self.modules))

    def candidates(self, problem: P) -> list[C]:
        """The default, then all others that fit the problem."""
        return list(dict.fromkeys([self.default(problem), *self.prune(self.configs, problem)]))

    def supports(self, config: C, problem: P) -> bool:
        """Whether a config from anywhere may run on the problem."""
        if type(config) is not self.config:
            return False
        return config == self.default(problem) or (config in self._space and bool(self.prune([config], problem)))

    @property
    def _space(self) -> frozenset[C]:
        """The configs, made once: a large space takes milliseconds to go through."""
        known = self._spaces.get(id(self.configs))
        if known is None:
            self._spaces.clear()
            known = self._spaces[id(self.configs)] = frozenset(self.configs)
        return known

    def pinned(self, problem: P) -> C:
        """The default with its `numerics` chosen by shape alone: as on a device that is always the same.

        Where this device can't run such a config at all, its own default.
        """
        neutral = self.default(self.on(problem, NO_DEVICE))
        fields = {name: getattr(neutral, name) for name in self.numerics}
        config: C = dataclasses.replace(self.default(problem), **fields)  # type: ignore[type-var]  # a dataclass
        if self.supports(config, problem) and self.instruction(config) == self.instruction(neutral):
            return config
        fitting = (c for c in self.prune([neutral, *self.configs], problem) if self.same_numerics(c, neutral))
        return next(fitting, self.default(problem))

    def same_numerics(self, config: C, other: C) -> bool:
        """Whether two configs give equal results, bit for bit."""
        same_fields = all(getattr(config, name) == getattr(other, name) for name in self.numerics)
        return same_fields and self.instruction(config) == self.instruction(other)

    def on(self, problem: P, limits: DeviceLimits) -> P:
        """The same problem on another device."""
        return dataclasses.replace(problem, limits=limits)  # type: ignore[type-var]  # a dataclass

    def distance(self, problem: P, other: P) -> float:
        """Octaves between the sizes of two problems; infinite if they differ in more than sizes."""
        names = [part.name for part in dataclasses.fields(problem)]  # type: ignore[arg-type]  # a dataclass
        return sum(_octaves(getattr(problem, name), getattr(other, name)) for name in names)


def _octaves(one: Any, two: Any) -> float:
    """Between numbers, or the farthest of numbers in tuples; infinite between other things that differ."""
    if type(one) is int and type(two) is int:
        return abs(math.log2(max(one, 1) / max(two, 1)))
    if type(one) is tuple and type(two) is tuple and len(one) == len(two):
        return max((_octaves(*pair) for pair in zip(one, two, strict=True)), default=0.0)
    return 0.0 if one == two else math.inf


_ops: dict[str, Op[Any, Any]] = {}


def register(op: Op[P, C]) -> Op[P, C]:
    """Make an op known by its name; the last of that name counts."""
    _ops[op.name] = op
    return op


def get_op(name: str) -> Op[Any, Any]:
    """The op of that name.

    Raises:
        UnknownOpError: there is none.

    """
    try:
        return _ops[name]
    except KeyError:
        raise UnknownOpError(f"expected one of {sorted(_ops)}, got {name!r}") from None


def op_names() -> list[str]:
    """Names of all ops, sorted."""
    return sorted(_ops)


def power_of_two(size: int) -> int:
    """The largest power of two that is not above `size`; 0 for 0."""
    return 1 << (size.bit_length() - 1) if size > 0 else 0


def width_bucket(n: int) -> int:
    """Exact up to multiples of 16 (to 64), of 64 (to 4096), then of an eighth of the power of two below; upwards."""
    step = 16 if n <= 64 else 64 if n <= 4096 else power_of_two(n) // 8
    return -(-n // step) * step
