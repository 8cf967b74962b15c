"""`resolve(op, problem) -> config`: a dict look-up that never measures (DESIGN section 11)."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from triton_curv_kernels import factor

Config = Any
"""A kernel's own frozen config dataclass; this package only carries it."""

_DEFAULTS: dict[str, Callable[[Any], Config]] = {"accumulate_factor_": factor.default_config}
_overrides: dict[str, Config] = {}
_learned: dict[tuple[str, Hashable], Config] = {}


class UnknownOpError(KeyError):
    """An op that has no configurations to choose from."""


def resolve(op: str, problem: Hashable) -> Config:
    """The config for `op` on `problem` (the op's frozen problem dataclass).

    Order: `override`, a config given to `learn` for exactly this problem, the kernel's analytic default, which is then
    remembered. Raises UnknownOpError for an op without configs.
    """
    if op in _overrides:
        return _overrides[op]
    key = (op, problem)
    config = _learned.get(key)
    if config is None:
        _check(op)
        config = _learned[key] = _DEFAULTS[op](problem)
    return config


def learn(op: str, problem: Hashable, config: Config) -> None:
    """Use `config` for `op` on `problem` from now on, in this process."""
    _check(op)
    _learned[op, problem] = config


@contextmanager
def override(op: str, config: Config) -> Iterator[None]:
    """Use `config` for every problem of `op` inside the `with` block, whatever was learned."""
    _check(op)
    missing = object()
    before = _overrides.get(op, missing)
    _overrides[op] = config
    try:
        yield
    finally:
        if before is missing:
            del _overrides[op]
        else:
            _overrides[op] = before


def _check(op: str) -> None:
    if op not in _DEFAULTS:
        raise UnknownOpError(f"expected one of {sorted(_DEFAULTS)}, got {op!r}")
