"""Reading a flag on the host where that costs nothing, and only there."""

import torch
from torch import Tensor


def known_true(flags: Tensor) -> bool:
    """`bool(flags.all())` on CPU in eager mode; False elsewhere, where it would stall the device or break a graph.

    Callers take a short cut when it is True and must be right without it.
    """
    if flags.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool(flags if flags.dim() == 0 else flags.all())
