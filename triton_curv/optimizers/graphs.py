"""A function of tensors as graphs of torch.compile, one for each kind of call, called at little cost on the host."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch

T = TypeVar("T")

# Recompiles of one optimizer's regions don't count for another's, and parts of a renewal are a graph each.
ARGUMENTS: Mapping[str, Any] = {"isolate_recompiles": True, "recompile_limit": 64}


class Graphs:
    """`torch.compile(function, fullgraph=True, dynamic=False)`, which says so to torch at first calls only.

    Both arguments make torch change its configuration and back at every call, which takes longer than the update of a
    small model. They matter while a graph is made. A graph that has to be made anew at a later call, because gradients
    come in another memory format, say, is made as torch would by itself.

    Args:
        function: what is compiled. Nothing it returns or changes but tensors may differ from call to call of a kind.
        arguments: for `torch.compile`. "fullgraph" and "dynamic" are handed on where they are there.

    """

    def __init__(self, function: Callable[..., T], arguments: Mapping[str, Any]) -> None:
        self._compiled: Callable[..., T] = torch.compile(function, **{**ARGUMENTS, **arguments})
        self._strict = bool(arguments.get("fullgraph", True))
        self._known: set[Hashable] = set()

    def __call__(self, kind: Hashable, *args: Any) -> T:
        """`function(*args)`; calls of the same `kind` are those that a graph is made for once."""
        if kind in self._known:
            return self._compiled(*args)
        config = torch._dynamo.config.patch(automatic_dynamic_shapes=False, assume_static_by_default=True)
        with torch._dynamo.error_on_graph_break(self._strict), config:
            result = self._compiled(*args)
        self._known.add(kind)
        return result
