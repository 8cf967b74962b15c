"""Steps without torch's wrapper around `Optimizer.step` where it has nothing to do: no hooks, no profiler."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer, optimizer

F = TypeVar("F", bound=Callable[..., Any])


def hooked(step: F) -> F:
    """`step` inside the range and the hooks that torch puts around it.

    `torch.optim.Optimizer` wraps the `step` of a class when the first optimizer is made. The public `step` of a class
    that calls this itself has the attribute `hooked`, by which torch knows that.
    """
    wrapped: F = Optimizer.profile_hook_step(step)
    return wrapped


def watched(of: Optimizer) -> bool:
    """Whether anything looks at the steps of an optimizer: a hook, the profiler, or torch.compile tracing it."""
    return bool(
        torch.compiler.is_compiling()
        or torch.autograd.profiler._is_profiler_enabled
        or of._optimizer_step_pre_hooks
        or of._optimizer_step_post_hooks
        or optimizer._global_optimizer_pre_hooks
        or optimizer._global_optimizer_post_hooks
    )
