"""A function of tensors as graphs of torch.compile, one for each kind of call, called at little cost on the host."""

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from types import FunctionType
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")

# while a graph is made: sizes and numbers are constants, and parts of a renewal of inverses may be a graph each
TRACING: Mapping[str, Any] = {
    "automatic_dynamic_shapes": False,
    "assume_static_by_default": True,
    "recompile_limit": 64,
}
# graphs are guarded on the sizes and strides of tensors that may change; inductor would look at all a second time
OPTIONS: Mapping[str, Any] = {"size_asserts": False}


class Graphs(Generic[T]):
    """`torch.compile(function, fullgraph=True, dynamic=False)`, which says so to torch at first calls only.

    Both arguments make torch change its configuration and back at every call, which takes longer than the update of a
    small model. They matter while a graph is made. A graph that has to be made anew at a later call, because gradients
    come in another memory format, say, is made as torch would by itself. Graphs go when this object goes, and count for
    no other one's limit of recompiles: torch ties them to the function's code, which is copied.

    Args:
        function: what is compiled.
        arguments: for `torch.compile`. "fullgraph" and "dynamic" are handed on where they are there.

    """

    def __init__(self, function: Callable[..., T], arguments: Mapping[str, Any]) -> None:
        chosen = not {"backend", "mode", "options"}.isdisjoint(arguments)
        options = {} if chosen else {"options": dict(OPTIONS)}
        copied = with_own_code(function)
        self._compiled: Callable[..., T] = torch.compile(copied, **{**options, **arguments})
        reset_code = torch._dynamo.reset_code  # type: ignore[attr-defined]  # a re-export
        weakref.finalize(self, reset_code, copied.__code__).atexit = False
        self._strict = bool(arguments.get("fullgraph", True))
        self._known: set[Hashable] = set()

    def __call__(self, kind: Hashable, *args: Any) -> T:
        """`function(*args)`; calls of the same `kind` are those that one graph is expected to serve. None: unknown."""
        if kind in self._known:
            return self._compiled(*args)
        with torch._dynamo.error_on_graph_break(self._strict), torch._dynamo.config.patch(**TRACING):
            result = self._compiled(*args)
        if kind is not None:
            self._known.add(kind)
        return result

    @staticmethod
    def settle(tensors: Iterable[Tensor]) -> None:
        """Say that these are the same tensors at every call: graphs hold them, and are guarded on who they are."""
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor, guard=True)


def with_own_code(function: Callable[..., Any]) -> FunctionType:
    """The function with a code object of its own, to which torch.compile ties its graphs."""
    of = cast("FunctionType", function)
    return FunctionType(of.__code__.replace(), of.__globals__, of.__name__, of.__defaults__, of.__closure__)
