"""Finding autograd functions that can be differentiated only once, which a second backward pass ignores silently."""

from typing import Any

from torch import Tensor
from torch.autograd.function import once_differentiable

_WRAPPED = once_differentiable(lambda ctx: None).__code__


def once_differentiable_function(result: Tensor, stop: Tensor | None = None) -> str | None:
    """Name of an autograd.Function with `@once_differentiable` that `result` depends on; None if there is none.

    torch promises an error when such a function is differentiated twice, but the node that would raise it leads
    nowhere: where only gradients of given tensors are asked for it is left out, and their second derivatives are wrong.
    Walks the whole graph, but not beyond `stop`.
    """
    seen: set[Any] = {None} if stop is None else {None, stop.grad_fn}
    nodes: list[Any] = [result.grad_fn]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        function = getattr(node, "_forward_cls", None)
        if getattr(getattr(function, "backward", None), "__code__", None) is _WRAPPED:
            return getattr(function, "__name__", "an autograd.Function")
        nodes += [follower for follower, _ in node.next_functions]
    return None
