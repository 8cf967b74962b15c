"""What a matrix-free product can't do, by name; says which op is to blame where torch says so."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from triton_curv.errors import TritonCurvError


class ClosureError(TritonCurvError, TypeError):
    """A closure returned something else than the optimizer documents."""


class NoGraphError(TritonCurvError, RuntimeError):
    """A loss or an output that autograd can't follow back to the parameters."""


class NonFiniteError(TritonCurvError, ArithmeticError):
    """The loss or its gradient is not finite; nothing was changed."""


class UnsupportedOpError(TritonCurvError, RuntimeError):
    """An op without the derivative that a product needs. `op` is its name as torch gives it."""

    def __init__(self, op: str, product: str, cause: BaseException | str) -> None:
        super().__init__(f"{product}: expected ops with second derivatives, got {op}, which has none: {cause}")
        self.op = op


_PATTERNS = (
    re.compile(r"derivative for '?(?:aten::)?([\w.]+)'? is not implemented"),
    re.compile(r"Trying to use forward AD with (?:aten::)?(\S+) that does not support it"),
    re.compile(r"(?:jvp|vmap) (?:function )?(?:is not|has not been) implemented.*?(?:for|:)\s*([\w.]+)"),
    re.compile(r"(torch\.compile) with aot_autograd does not currently support double backward"),
)
_UNNAMED = (
    (
        re.compile(r"forward mode AD.*custom|custom.*(?:jvp|forward mode)|jvp.*custom"),
        "an autograd.Function without jvp",
    ),
    (re.compile("ZeroTensors are immutable"), "an op that writes into a zero tangent"),
    (re.compile("checkpoint.*torch.autograd.grad|not compatible with .grad"), "a reentrant activation checkpoint"),
)


def blamed_op(error: BaseException) -> str | None:
    """The op that torch's message names as not differentiable, or a description of it; None for another error."""
    text = " ".join(str(error).split())
    for pattern in _PATTERNS:
        if found := pattern.search(text):
            return found[1]
    return next((what for pattern, what in _UNNAMED if pattern.search(text)), None)


@contextmanager
def no_backward_inside() -> Iterator[None]:
    """Turn torch's complaint about a used-up graph into a ClosureError."""
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise ClosureError(
            "expected a closure that leaves the loss's graph as it is, got one that calls backward() or autograd.grad()"
        ) from error


@contextmanager
def named_ops(product: str) -> Iterator[None]:
    """Turn torch's complaint about a missing derivative into an UnsupportedOpError; other errors pass through."""
    try:
        yield
    except UnsupportedOpError:
        raise
    except RuntimeError as error:  # NotImplementedError included
        op = blamed_op(error)
        if op is None:
            raise
        raise UnsupportedOpError(op, product, error) from error
