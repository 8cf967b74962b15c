"""A function of tensors as graphs of torch.compile, one for each kind of call, called at little cost on the host."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from types import FunctionType
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")

# parts of a renewal are a graph each
ARGUMENTS: Mapping[str, Any] = {"recompile_limit": 64}
# graphs are guarded on the sizes and strides of tensors that may change; inductor would look at all a second time
OPTIONS: Mapping[str, Any] = {"size_asserts": False}


class Graphs(Generic[T]):
    """`torch.compile(function, fullgraph=True, dynamic=False)`, which says so to torch at first calls only.

    Both arguments make torch change its configuration and back at every call, which takes longer than the update of a
    small model. They matter while a graph is made. A graph that has to be made anew at a later call, because gradients
    come in another memory format, say, is made as torch would by itself. Graphs go when this object goes, and count for
    no other one's limit of recompiles: the function's code is copied, to which torch ties them.

    Args:
        function: what is compiled.
        arguments: for `torch.compile`. "fullgraph" and "dynamic" are handed on where they are there.

    """

    def __init__(self, function: Callable[..., T], arguments: Mapping[str, Any]) -> None:
        chosen = not {"backend", "mode", "options"}.isdisjoint(arguments)
        options = {} if chosen else {"options": dict(OPTIONS)}
        source = cast("FunctionType", function)
        copied = FunctionType(source.__code__.replace(), source.__globals__, source.__name__)
        self._compiled: Callable[..., T] = torch.compile(copied, **{**ARGUMENTS, **options, **arguments})
        self._strict = bool(arguments.get("fullgraph", True))
        self._known: set[Hashable] = set()

    def __call__(self, kind: Hashable, *args: Any) -> T:
        """`function(*args)`; calls of the same `kind` are those that one graph is expected to serve."""
        if kind in self._known:
            return self._compiled(*args)
        config = torch._dynamo.config.patch(automatic_dynamic_shapes=False, assume_static_by_default=True)
        with torch._dynamo.error_on_graph_break(self._strict), config:
            result = self._compiled(*args)
        self._known.add(kind)
        return result

    @staticmethod
    def settle(tensors: Iterable[Tensor]) -> None:
        """Say that these are the same tensors at every call: graphs hold them, and are guarded on who they are."""
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor, guard=True)
