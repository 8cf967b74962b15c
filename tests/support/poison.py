"""Outputs filled with NaN, so that an element a kernel leaves unwritten shows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor


def poisoned(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor of NaN (floating dtypes) to hand to an op that writes in place, with beta = 0 say."""
    return torch.full(tuple(shape), float("nan"), dtype=dtype)


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Let `torch.empty`, `empty_like`, `Tensor.new_empty` return NaN, for outputs and workspaces a launcher allocates.

    Use it around the call under test only: `with poisoned_allocations(): result = launch_op(...)`.
    """

    def filling(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate_poisoned

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patch.setattr(owner, name, filling(getattr(owner, name)))
        yield
