"""JSON from outside to our dataclasses, strictly: nothing is executed, converted or guessed."""

import dataclasses
import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch

from triton_curv_autotune.errors import InvalidEntryError
from triton_curv_kernels.backend import DeviceLimits

T = TypeVar("T")

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
LARGEST = 2**62


def parse(text: bytes) -> Any:
    """JSON without NaN, infinities and repeated names.

    Raises:
        InvalidEntryError: whatever is wrong with it.

    """
    try:
        return json.loads(
            text.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_unique,
        )
    except (ValueError, RecursionError) as error:
        raise InvalidEntryError(f"expected JSON, got {text[:40]!r}...: {error}") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.20} is too large")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def decode(cls: type[T], data: Any, limits: DeviceLimits | None = None) -> T:
    """A frozen dataclass of numbers, strings, dtypes, Literals, and of tuples and dataclasses of such.

    A `limits` field is given, not read.

    Raises:
        InvalidEntryError: a field missing, unknown or of another type.

    """
    hints = _hints(cls)  # type: ignore[arg-type]  # a class is hashable
    expected = {name for name, hint in hints.items() if hint is not DeviceLimits}
    if not isinstance(data, Mapping) or set(data) != expected:
        found = sorted(data) if isinstance(data, Mapping) else type(data).__name__
        raise InvalidEntryError(f"expected {cls.__name__} with {sorted(expected)}, got {found}")
    values = {name: _value(f"{cls.__name__}.{name}", hints[name], data[name]) for name in expected}
    if limits is not None:
        values |= dict.fromkeys(set(hints) - expected, limits)
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise InvalidEntryError(f"{cls.__name__}: {error}") from None


@lru_cache(maxsize=256)
def _hints(cls: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _value(name: str, hint: Any, value: Any) -> Any:
    if hint is torch.dtype and isinstance(value, str) and value in DTYPES:
        return DTYPES[value]
    if get_origin(hint) is Literal and any(
        value == option and type(value) is type(option) for option in get_args(hint)
    ):
        return value
    if hint is int and type(value) is int and abs(value) < LARGEST:
        return value
    if hint is float and type(value) in (int, float) and abs(value) < LARGEST:
        return float(value)
    if hint in (bool, str) and type(value) is hint:
        return value
    if get_origin(hint) is tuple and type(value) is list:
        return _tuple(name, get_args(hint), value)
    if dataclasses.is_dataclass(hint):
        return decode(hint, value)  # type: ignore[arg-type]  # a class
    raise InvalidEntryError(f"expected {name} of {hint}, got {value!r:.60}")


def _tuple(name: str, hints: tuple[Any, ...], values: list[Any]) -> tuple[Any, ...]:
    if hints[-1] is Ellipsis:
        hints = hints[:1] * len(values)
    if len(hints) != len(values):
        raise InvalidEntryError(f"expected {name} of {len(hints)} items, got {len(values)}")
    return tuple(_value(f"{name}[{place}]", *pair) for place, pair in enumerate(zip(hints, values, strict=True)))


def member(data: Any, name: str, kind: type[T]) -> T:
    """`data[name]`, of exactly this type.

    Raises:
        InvalidEntryError: not so.

    """
    if not isinstance(data, Mapping) or type(data.get(name)) is not kind:
        raise InvalidEntryError(f"expected '{name}' of {kind.__name__}, got {data!r:.60}")
    found: T = data[name]
    return found
