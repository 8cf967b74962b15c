"""The tap: an identity after a layer whose backward folds the layer's input and output gradient into its block.

Both statistics are taken in backward, so nothing is counted twice under activation checkpointing, and the input is
alive there anyway for the weight gradient. Module backward hooks would break `torch.compile(fullgraph=True)`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.hooks import RemovableHandle

from triton_curv.blocks import Block


class CaptureSwitch:
    """Whether forward passes are tapped; a plain attribute, so compiled models keep one graph for each state.

    `uses` counts the calls of each block's layer since the model's forward began: a layer called again in the same
    forward adds positions, not samples. Where only parts of the model are ever called, each call counts its samples.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.saw_model = False
        self.uses: dict[str, int] = {}

    def begin_forward(self) -> None:
        """The model's own forward starts."""
        self.saw_model = True
        self.uses = {}

    def begin_step(self, enabled: bool) -> None:
        """A new step starts, with taps on or off."""
        self.enabled = enabled
        self.saw_model = False
        self.uses = {}

    def first_use(self, name: str) -> bool:
        """Whether this call of a layer brings new samples."""
        count = self.uses.get(name, 0)
        self.uses[name] = count + 1
        return count == 0 or not self.saw_model


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, block: Block, training: bool, first: bool) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.block = block
        ctx.training = training
        ctx.first = first
        # An alias autograd does not call a view: a view made here would forbid an in-place ReLU after the layer.
        alias: Tensor = torch.ops.aten._unsafe_view(output, output.shape)
        return alias

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inputs,) = ctx.saved_tensors
        ctx.block.accumulate_(inputs, grad_output, ctx.training, ctx.first)
        return grad_output, None, None, None, None


def attach_taps(model: Module, blocks: Iterable[Block], switch: CaptureSwitch) -> list[RemovableHandle]:
    """Register the forward hooks that tap every block's layer while `switch.enabled`."""

    def begin(module: Module, args: tuple[Any, ...]) -> None:
        if switch.enabled:
            switch.begin_forward()

    return [model.register_forward_pre_hook(begin), *(_attach(block, switch) for block in blocks)]


def _attach(block: Block, switch: CaptureSwitch) -> RemovableHandle:
    def tap(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        if not (switch.enabled and torch.is_grad_enabled() and output.requires_grad):
            return None
        inputs: Tensor = args[0] if args else kwargs["input"]
        first = switch.first_use(block.name)
        tapped: Tensor = _Tap.apply(output, inputs.detach(), block, module.training, first)  # type: ignore[no-untyped-call]  # torch's
        return tapped

    return block.rule.module.register_forward_hook(tap, with_kwargs=True)
