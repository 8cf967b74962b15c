"""What a step decides on the host, as one operation in the graph of somebody who compiles `opt.step`.

A graph holds tensors and launches; which regions of a step run is decided before, by `Plan`, whose fields the graph is
guarded on. When the graph runs, `begin_step_` does on the host what an eager step does there: it writes
hyper-parameters to the device, counts the step and makes the next plan. So no number of a schedule is in any guard.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from triton_curv.blocks import FactorStore
from triton_curv.errors import ConfigurationError

IDLE = -1  # no renewal of inverses is under way
ALL = -2  # a renewal of all of them at once

ONE_RANK = (
    "expected an eager step on several ranks, got a compiled one: torch.compile does not trace asynchronous "
    "collectives; compile the model on each rank instead"
)


@dataclass
class Plan:
    """What the next step does before it moves: fold statistics, and invert a part of the factors, `ALL` or none.

    The part is written as a string: graphs are guarded on its value, while a number that changes would become a symbol.
    """

    fold: bool = True
    part: str = str(ALL)


class Host(Protocol):
    """An optimizer's decisions."""

    def begin_step(self, written: Sequence[Tensor], pending: Tensor, with_gradients: Sequence[int]) -> None:
        """Numbers of this step into `written`; everything else that a planned step does without tensors."""


_hosts: WeakValueDictionary[int, Host] = WeakValueDictionary()
_stores: WeakValueDictionary[str, FactorStore] = WeakValueDictionary()
_numbers = itertools.count()


def register(host: Host) -> int:
    """A number for an optimizer, by which a graph finds it as long as it lives."""
    number = next(_numbers)
    _hosts[number] = host
    return number


@torch.library.custom_op("triton_curv::begin_step_", mutates_args={"written"}, tags=(torch.Tag.cudagraph_unsafe,))
def _begin_step(written: list[Tensor], pending: Tensor, number: int, with_gradients: list[int]) -> None:
    host = _hosts.get(number)
    if host is None:
        raise RuntimeError("a compiled step was called after its optimizer was deleted")
    host.begin_step(written, pending, with_gradients)


@_begin_step.register_fake
def _(written: list[Tensor], pending: Tensor, number: int, with_gradients: list[int]) -> None:
    return None


def register_store(store: FactorStore) -> str:
    """A name for a store, likewise."""
    name = str(next(_numbers))
    _stores[name] = store
    return name


def begin_step_(written: list[Tensor], pending: Tensor, number: int, with_gradients: Sequence[int]) -> None:
    """`host.begin_step` of optimizer `number`, whenever the graph runs."""
    torch.ops.triton_curv.begin_step_(written, pending, number, list(with_gradients))


def require_gradients(names: Mapping[Any, str], params: Sequence[Tensor]) -> None:
    """While a CUDA graph is captured, raise ConfigurationError naming parameters without a gradient.

    A replay would leave them out for ever, and gradients that come later would lie elsewhere.
    """
    if torch.compiler.is_compiling() or not params[0].is_cuda or not torch.cuda.is_current_stream_capturing():
        return
    missing = [names[p] for p in params if p.grad is None]
    if missing:
        raise ConfigurationError(
            f"expected a gradient of every parameter while a CUDA graph is captured, got none of {missing}"
        )


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]  # torch's
def _stay_dense(store: str) -> bool:
    """By name: before torch 2.13 such a function takes constants only."""
    with unset_fake_temporarily(), torch.no_grad():
        _stores[store].stay_dense_()
    return True


def stay_traceable(store: str, blind: bool, alone: bool) -> None:
    """The store of this name makes no low-rank forms from now on, whose ranks are chosen on the host.

    Raises ConfigurationError for a step in a graph that has to look at values or to wait for other ranks.
    """
    _stay_dense(store)
    if not alone:
        raise ConfigurationError(ONE_RANK)
    if not blind:
        raise ConfigurationError(
            "expected no closure, no AdaptiveInterval and no damping rule that measures in a compiled step, which "
            "looks at no values: compile the regions instead, KFAC(..., compile=True)"
        )
