"""The tap: an identity after a layer whose backward folds the layer's input and output gradient into its block.

Both statistics are taken in backward, so nothing is counted twice under activation checkpointing, and the input is
alive there anyway for the weight gradient. Module backward hooks would break `torch.compile(fullgraph=True)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn import Module

from triton_curv.blocks import Block, MaskedSource, Source
from triton_curv.blocks.cost import statistics_work


class CallCounter:
    """Counts the calls of each layer since the model's forward began.

    A layer called again in one forward adds positions, not samples. Where only parts of the model are ever called, each
    call counts as a first one.
    """

    def __init__(self) -> None:
        self.begin_step()

    def begin_step(self) -> None:
        """A new step starts."""
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


# `torch.compile` counts while it traces and keeps the numbers: a count that changes inside a region under activation
# checkpointing would be a side effect that it refuses. Before torch 2.13 such functions take constants only, hence a
# switch by name; a number that changes would become a symbol.
@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]  # torch's
def begin_forward(switch: str) -> bool:
    """`counter.begin_forward()` of a switch."""
    _switches[switch].counter.begin_forward()
    return True


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]  # torch's
def next_use(switch: str, layer: str) -> int:
    """`counter.next_use(layer)` of a switch."""
    return _switches[switch].counter.next_use(layer)


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]  # torch's
def note_trace(switch: str) -> bool:
    """`switch.traced = True`."""
    _switches[switch].traced = True
    return True


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]  # torch's
def note_mask(switch: str, layer: str, fits: bool) -> bool:
    """Whether the mask of `count` fits the positions of a layer; of graphs it is known when they are traced."""
    _switches[switch].mask_fits |= fits
    if not fits:
        _switches[switch].misfits.add(layer)
    return True


class Watch(Protocol):
    """Is told of the taps of eager passes."""

    def forward(self, block: Block) -> None:
        """One was made in forward."""

    def backward(self, block: Block) -> None:
        """One has taken its statistics in backward."""


class CaptureSwitch:
    """Whether forward passes are tapped; a plain attribute, so compiled models keep one graph for each state.

    `mask` tells the real positions of the coming forward, see `KFAC.count`. `recording` is read in backward: whether
    this pass gives statistics; a compiled backward always does, which `traced` notes. `meter`, if there is one, adds up
    the work of each block's statistics, by its number. `misfits` are layers whose positions the mask does not fit,
    `mask_fits` is whether it fits those of some layer.
    """

    def __init__(self, enabled: bool, records: bool = True, device: torch.device | None = None) -> None:
        self.name = str(next(_numbers))
        _switches[self.name] = self
        self.recording = records
        self.traced = False
        self.watch: Watch | None = None
        self.on_forward: Callable[[], None] | None = None  # called before the model's eager forwards
        self.meter: dict[int, float] | None = None
        # A root of every tapped graph: a backward pass to it alone visits all taps and makes no weight gradient.
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.anchor_node = get_gradient_edge(self.anchor).node
        self.counter = CallCounter()
        self.begin_step(enabled)

    def begin_step(self, enabled: bool) -> None:
        """A new step starts, with taps on or off."""
        self.enabled = enabled
        self.mask: Tensor | None = None
        self.counter.begin_step()
        if not self.traced:
            self.mask_fits, self.misfits = False, set[str]()


_switches: WeakValueDictionary[str, CaptureSwitch] = WeakValueDictionary()
_numbers = count()


@dataclass(frozen=True)
class Site:
    """Where a tap sits: the block, the part of it that takes the statistics, and whether calls here count its uses."""

    block: Block
    source: Source
    counted: bool = True


def _executes(node: Node) -> bool:
    """Whether the backward pass under way gets to a leaf."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # what torch has for a leaf that `torch.autograd.grad` was asked for
        return True


def trains(switch: CaptureSwitch, block: Block) -> bool:
    """Whether the eager backward pass under way makes gradients of the block's parameters, or is `sample_fisher`'s.

    One to other leaves alone, for gradients of inputs (penalties, attacks), says nothing about this step. `backward()`
    gets to all leaves, so to the anchor, which tells it without a look at the parameters: those that FSDP2 shards are
    not the ones it differentiates by.
    """
    if _executes(switch.anchor_node):
        return True
    return any(_executes(get_gradient_edge(p).node) for p in block.rule.params.values() if p.requires_grad)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        inputs: Tensor,
        mask: Tensor | None,
        anchor: Tensor,
        site: Site,
        switch: CaptureSwitch,
        training: bool,
        use: int,
    ) -> Tensor:
        ctx.save_for_backward(*((inputs,) if mask is None else (inputs, mask)))
        ctx.site = site
        ctx.switch = switch
        ctx.training = training
        ctx.use = use
        # An alias autograd does not call a view: a view made here would forbid an in-place ReLU after the layer.
        alias: Tensor = torch.ops.aten._unsafe_view(output, output.shape)
        return alias

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None, None, None, None]:
        if torch.compiler.is_compiling():
            inputs, *rest = ctx.saved_tensors
            site = ctx.site
            site.block.accumulate_(inputs, grad_output, ctx.training, ctx.use, site.source, rest[0] if rest else None)
        elif ctx.switch.recording and grad_output.numel() and trains(ctx.switch, ctx.site.block):  # may be empty
            inputs, *rest = ctx.saved_tensors
            site, mask = ctx.site, rest[0] if rest else ctx.switch.mask
            site.block.accumulate_(inputs, grad_output, ctx.training, ctx.use, site.source, mask)
            if ctx.switch.meter is not None:
                work, index = statistics_work(site.block.rule, inputs, grad_output), site.block.index
                ctx.switch.meter[index] = ctx.switch.meter.get(index, 0.0) + work
            if ctx.switch.watch is not None:
                ctx.switch.watch.backward(site.block)
        return grad_output, None, None, None, None, None, None, None


def tap(output: Tensor, inputs: Tensor, site: Site, switch: CaptureSwitch, training: bool) -> Tensor:
    """The output, whose backward hands `inputs` and its gradient to the site."""
    if torch.compiler.is_compiling():
        note_trace(switch.name)
    elif not site.block.due or torch._C._functorch.is_functorch_wrapped_tensor(output):
        return output  # what torch.func differentiates by is not this pass of training
    elif switch.watch is not None:
        switch.watch.forward(site.block)
    if switch.mask is not None and isinstance(site.source, MaskedSource):
        note_mask(switch.name, site.block.name, site.source.fits(switch.mask, inputs))
    use = next_use(switch.name, site.block.name) if site.counted else 0
    args = (output, inputs.detach(), switch.mask, switch.anchor, site, switch, training, use)
    tapped: Tensor = _Tap.apply(*args)  # type: ignore[no-untyped-call]  # torch's
    return tapped


class ModelHook:
    """Tells the switch that the model's forward begins."""

    def __init__(self, switch: CaptureSwitch) -> None:
        self.switch = switch

    def __call__(self, module: Module, args: tuple[Any, ...]) -> None:
        """Before the model's forward."""
        if self.switch.enabled:
            if self.switch.on_forward is not None and not torch.compiler.is_compiling():
                self.switch.on_forward()
            begin_forward(self.switch.name)

    def __reduce__(self) -> tuple[Callable[[], "NoHook"], tuple[()]]:
        return NoHook, ()


class LayerHook:
    """Taps the output of one layer while the switch is on."""

    def __init__(self, site: Site, switch: CaptureSwitch) -> None:
        self.site = site
        self.switch = switch

    def __call__(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        """After the layer's forward."""
        if not (self.switch.enabled and torch.is_grad_enabled() and output.requires_grad):
            return None
        inputs: Tensor = args[0] if args else kwargs["input"] if "input" in kwargs else next(iter(kwargs.values()))
        return tap(output, inputs, self.site, self.switch, module.training)

    def __reduce__(self) -> tuple[Callable[[], "NoHook"], tuple[()]]:
        return NoHook, ()


class NoHook:
    """What a tap becomes in a copied or unpickled model: the copy's gradients are not this optimizer's statistics."""

    def __call__(self, *_: object) -> None:
        """Nothing."""
