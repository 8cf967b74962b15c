"""Layers whose backward pass torch differentiates at needless cost, replaced for the length of a forward pass."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation
from torch.overrides import TorchFunctionMode

from triton_curv.operators.batch_norm import batch_norm_of_cheap_backward
from triton_curv.operators.convolution import convolution_of_cheap_backward

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


class CheapDerivatives(TorchFunctionMode):
    """Convolutions, and batch normalisation in training mode, with backward formulas of ours.

    A backward pass inside `linear()` is differentiable in the output gradient alone, all that J v asks for; its graph
    holds nothing else.
    """

    def __init__(self) -> None:
        super().__init__()
        self._curved = True

    def curved(self) -> bool:
        """Whether backward passes are differentiable in all they depend on."""
        return self._curved

    @contextmanager
    def linear(self) -> Iterator[None]:
        """Make the backward passes inside differentiable in the output gradient alone."""
        self._curved = False
        try:
            yield
        finally:
            self._curved = True

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Replace those calls, pass everything else on."""
        kwargs = kwargs or {}
        result: Tensor | None = None
        if func is F.batch_norm:
            result = batch_norm_of_cheap_backward(self.curved, *args, **kwargs)
        elif func in _CONVOLUTIONS:
            result = convolution_of_cheap_backward(self.curved, *args, **kwargs)
        return func(*args, **kwargs) if result is None else result
