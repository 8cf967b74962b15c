"""One forward and backward pass without data (device "meta"): which layers ran, on what shapes, and its FLOPs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from triton_curv.blocks import Block, Rule
from triton_curv.capture import CaptureSwitch, attach_taps
from triton_curv.errors import ConfigurationError


class Call(NamedTuple):
    """Input and output gradient of one call, without data."""

    inputs: Tensor
    grad_output: Tensor


class Watch:
    """Stands where a tap expects a block, and keeps what it is handed."""

    due = True

    def __init__(self, name: str, rule: Rule) -> None:
        self.name = name
        self.rule = rule
        self.calls: list[Call] = []

    def accumulate_(self, inputs: Tensor, grad_output: Tensor, *_: object) -> None:
        """Keep the shapes of one call."""
        self.calls.append(Call(inputs, grad_output))


class Pass(NamedTuple):
    """What one pass showed: calls of each block, the shape and type of the input, forward and backward FLOPs."""

    calls: Mapping[str, Sequence[Call]]
    input_shape: tuple[int, ...]
    dtype: torch.dtype
    flops: int


def without_data(model: nn.Module) -> nn.Module:
    """The model on device "meta", in place; tied parameters stay tied (`Module.to` would untie them)."""
    places = [(m, name, id(p)) for m in model.modules() for name, p in m._parameters.items() if p is not None]
    model.to("meta")
    first: dict[int, nn.Parameter] = {}
    for module, name, before in places:
        module._parameters[name] = first.setdefault(before, cast("nn.Parameter", module._parameters[name]))
    return model


def floating_tensors(output: Any) -> Iterator[Tensor]:
    """All floating-point tensors with a graph in a model's output: tensor, sequence or mapping."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.requires_grad:
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from floating_tensors(value)
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for value in output:
            yield from floating_tensors(value)


def observe(model: nn.Module, rules: Mapping[str, Rule], shape: Sequence[int], dtypes: Sequence[torch.dtype]) -> Pass:
    """Run the model, on "meta", once; with the first of `dtypes` that it takes.

    Raises:
        ConfigurationError: the model takes no such input, or gives nothing that has a gradient.

    """
    failures: list[str] = []
    for dtype in dtypes:
        watches = [Watch(name, rule) for name, rule in rules.items()]
        switch = CaptureSwitch(enabled=True, device=torch.device("meta"))
        handles = attach_taps(model, cast("list[Block]", watches), switch)
        try:
            with FlopCounterMode(display=False) as counter:
                outputs = list(floating_tensors(model(torch.zeros(tuple(shape), dtype=dtype, device="meta"))))
                if not outputs:
                    raise ConfigurationError("expected a model whose output is a function of its parameters")
                torch.stack([output.sum() for output in outputs]).sum().backward()
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, NotImplementedError) as error:
            failures.append(f"{str(dtype).removeprefix('torch.')}: {error}")
            continue
        finally:
            for handle in handles:
                handle.remove()
            for p in model.parameters():
                p.grad = None
        calls = {watch.name: tuple(watch.calls) for watch in watches}
        return Pass(calls, tuple(shape), dtype, int(counter.get_total_flops()))
    raise ConfigurationError(
        f"the model does not take an input of shape {tuple(shape)} and the types tried, of which the command line sets "
        f"--input and --input-dtype: {'; '.join(failures)}"
    )
