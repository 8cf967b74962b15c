"""Reading a flag on the host where that costs nothing, and only there."""

import torch
from torch import Tensor


def known_true(flags: Tensor) -> bool:
    """`bool(flags.all())` on CPU in eager mode; False elsewhere, where it would stall the device or break a graph.

    Callers take a short cut when it is True and must be right without it.
    """
    return on_host(flags) and bool(flags if flags.dim() == 0 else flags.all())


def on_host(tensor: Tensor) -> bool:
    """Whether a look at the tensor's numbers costs nothing: it lies in the host's memory, and nothing is traced."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
