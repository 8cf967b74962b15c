"""The tap: an identity after a layer whose backward folds the layer's input and output gradient into its block.

Both statistics are taken in backward, so nothing is counted twice under activation checkpointing, and the input is
alive there anyway for the weight gradient. Module backward hooks would break `torch.compile(fullgraph=True)`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.hooks import RemovableHandle

from triton_curv.blocks import Block


class CaptureSwitch:
    """Whether forward passes are tapped; a plain attribute, so compiled models keep one graph for each state.

    `calls` counts the calls of each layer since the model's forward began: a layer called again in one forward adds
    positions, not samples. Where only parts of the model are ever called, each call counts as a first one.

    `recording` is read in backward: whether this pass gives statistics. A compiled backward always does (`traced`).
    `mask`, where positions count, is read in backward, too, and not by compiled ones.
    """

    def __init__(self, enabled: bool, records: bool = True, device: torch.device | None = None) -> None:
        self.recording = records
        self.traced = False
        self.mask: Tensor | None = None
        # A root of every tapped graph: a backward pass to it alone visits all taps and makes no weight gradient.
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.begin_step(enabled)

    def begin_step(self, enabled: bool) -> None:
        """A new step starts, with taps on or off."""
        self.enabled = enabled
        self.saw_model = False
        self.calls: dict[str, int] = {}

    def begin_forward(self) -> None:
        """The model's own forward starts."""
        self.saw_model = True
        self.calls = {}

    def next_use(self, name: str) -> int:
        """Number of this call of a layer in the current forward, from 0."""
        use = self.calls.get(name, 0)
        self.calls[name] = use + 1
        return use if self.saw_model else 0


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        inputs: Tensor,
        anchor: Tensor,
        block: Block,
        switch: CaptureSwitch,
        training: bool,
        use: int,
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.block = block
        ctx.switch = switch
        ctx.training = training
        ctx.use = use
        # An alias autograd does not call a view: a view made here would forbid an in-place ReLU after the layer.
        alias: Tensor = torch.ops.aten._unsafe_view(output, output.shape)
        return alias

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        if torch.compiler.is_compiling():
            (inputs,) = ctx.saved_tensors
            ctx.block.accumulate_(inputs, grad_output, ctx.training, ctx.use)
        elif ctx.switch.recording:
            (inputs,) = ctx.saved_tensors
            ctx.block.accumulate_(inputs, grad_output, ctx.training, ctx.use, mask=ctx.switch.mask)
        return grad_output, None, None, None, None, None, None


class _ModelHook:
    """Tells the switch that the model's forward begins."""

    def __init__(self, switch: CaptureSwitch) -> None:
        self.switch = switch

    def __call__(self, module: Module, args: tuple[Any, ...]) -> None:
        if self.switch.enabled:
            self.switch.begin_forward()

    def __reduce__(self) -> tuple[Callable[[], "_NoHook"], tuple[()]]:
        return _NoHook, ()


class _LayerHook:
    """Taps the output of one layer while the switch is on."""

    def __init__(self, block: Block, switch: CaptureSwitch) -> None:
        self.block = block
        self.switch = switch

    def __call__(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        if not (self.switch.enabled and torch.is_grad_enabled() and output.requires_grad):
            return None
        inputs: Tensor = args[0] if args else kwargs["input"]
        use = self.switch.next_use(self.block.name)
        if torch.compiler.is_compiling():
            self.switch.traced = True
        elif not self.block.due:
            return None
        anchor = self.switch.anchor
        tapped: Tensor = _Tap.apply(output, inputs.detach(), anchor, self.block, self.switch, module.training, use)  # type: ignore[no-untyped-call]  # torch's
        return tapped

    def __reduce__(self) -> tuple[Callable[[], "_NoHook"], tuple[()]]:
        return _NoHook, ()


class _NoHook:
    """What a tap becomes in a copied or unpickled model: the copy's gradients are not this optimizer's statistics."""

    def __call__(self, *_: object) -> None:
        return None


def attach_taps(model: Module, blocks: Iterable[Block], switch: CaptureSwitch) -> list[RemovableHandle]:
    """Register the forward hooks that tap every block's layer while `switch.enabled`."""
    hooks = [block.rule.module.register_forward_hook(_LayerHook(block, switch), with_kwargs=True) for block in blocks]
    return [model.register_forward_pre_hook(_ModelHook(switch)), *hooks]
