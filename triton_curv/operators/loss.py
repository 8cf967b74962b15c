"""What a closure may return, checked."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_curv.operators.errors import ClosureError, NoGraphError, NonFiniteError


class LossAndOutput(NamedTuple):
    """A scalar loss and the model output that it is a function of."""

    loss: Tensor
    output: Tensor


def as_loss(result: Any) -> Tensor:
    """The loss of one closure result, checked.

    Raises:
        ClosureError: not a real scalar tensor.
        NoGraphError: without a graph although gradients are enabled.

    """
    if not isinstance(result, Tensor):
        raise ClosureError(
            f"expected the closure to return the loss, a scalar tensor (or a list or generator of them), got {result!r}"
        )
    if result.numel() != 1 or not result.is_floating_point():
        raise ClosureError(f"expected a scalar floating-point loss, got {result.dtype} of shape {tuple(result.shape)}")
    if torch.is_grad_enabled() and not result.requires_grad:
        raise NoGraphError(
            "expected a loss with a graph to the parameters, got one that requires no gradient: was it detached, "
            "turned into a number and back, or computed under torch.no_grad()?"
        )
    return result.reshape(())


def as_loss_and_output(result: Any) -> LossAndOutput:
    """The (loss, output) of one closure result, checked.

    Raises:
        ClosureError: not a pair of tensors, loss first.
        NoGraphError: either has no graph although gradients are enabled.

    """
    if not (isinstance(result, tuple) and len(result) == 2 and all(isinstance(t, Tensor) for t in result)):
        what = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
        raise ClosureError(
            "expected the closure to return (loss, output), two tensors (or a list or generator of such pairs), "
            f"got {what}"
        )
    loss, output = as_loss(result[0]), result[1]
    if not output.is_floating_point():
        raise ClosureError(f"expected a floating-point output, got {output.dtype}")
    if torch.is_grad_enabled() and not output.requires_grad:
        raise NoGraphError("expected an output with a graph to the parameters, got one that requires no gradient")
    return LossAndOutput(loss, output)


def check_finite(loss: Tensor, squared_norm: Tensor) -> None:
    """Raise NonFiniteError unless the loss and its gradient's squared norm are finite; one look from the host."""
    values = torch.stack((loss, squared_norm.to(loss.dtype))).tolist()
    if not all(torch.isfinite(torch.tensor(values))):
        what = "loss" if not torch.isfinite(torch.tensor(values[0])) else "gradient norm"
        raise NonFiniteError(f"expected a finite loss and gradient, got {what} {values}; nothing was changed")
