"""A narrow copy of a model: every width divided by one number, so that dense float64 oracles are cheap."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from triton_curv.blocks import LayerOptions
from triton_curv.errors import ConfigurationError
from triton_curv.explanation.observe import floating_tensors
from triton_curv.optimizers.groups import rules_of

DIVISORS = (1, 2, 4, 8, 16, 32, 64)
LARGEST_FACTOR = 256
"""Rows of the largest factor that is sought; a wider copy is taken if none is narrow enough and runs."""
SIDE, LENGTH = 32, 8
"""Pixels of an image's side and tokens of a sequence that are tried before the shape as given."""

WIDTHS: Mapping[type[nn.Module], Sequence[str]] = {
    nn.Linear: ("in_features", "out_features"),
    nn.Embedding: ("embedding_dim",),
    nn.LayerNorm: ("normalized_shape",),
    nn.RMSNorm: ("normalized_shape",),
    nn.GroupNorm: ("num_channels",),
    nn.MultiheadAttention: ("embed_dim", "kdim", "vdim", "head_dim"),
}
CHANNELS = ("in_channels", "out_channels")


@dataclass(frozen=True)
class Shrunken:
    """The copy in float64, inputs that it takes, and what its widths were divided by."""

    model: nn.Module
    inputs: Tensor
    divisor: int


def shrink(model: nn.Module, shape: Sequence[int], dtypes: Sequence[torch.dtype], seed: int = 0) -> Shrunken:
    """The narrowest useful copy of a model that runs forward and backward.

    Layers and the model's own parameters, and whole-number attributes that equal a divided width, are divided by the
    same power of two where it divides them; layers that see the input itself keep their input width. The first divisor
    is taken with which no factor has more than `LARGEST_FACTOR` rows, else the largest that runs. Inputs are small
    images or short sequences if the model takes them; tokens lie below 2, classes that every vocabulary has.

    Args:
        model: with its weights, in any floating type; it is not changed.
        shape: of a whole batch.
        dtypes: of the input, in the order of trial.
        seed: of the inputs.

    Raises:
        ConfigurationError: it runs with no divisor, 1 included; says with what message it failed undivided.

    """
    candidates = [_inputs(small, dtype, seed) for dtype in dtypes for small in _small_shapes(shape, dtype)]
    best: Shrunken | None = None
    reasons: list[str] = []
    for divisor in DIVISORS:
        found = _first_that_runs(model, divisor, candidates, reasons)
        if found is not None:
            if best is not None and _largest_factor(found.model) == _largest_factor(best.model):
                break  # what is left is a kernel or the input's own width
            best = found
            if _largest_factor(found.model) <= LARGEST_FACTOR:
                break
    if best is None:
        raise ConfigurationError(
            f"the model does not run on an input of shape {tuple(shape)}; give --input and --input-dtype "
            f"({'; '.join(reasons[: len(candidates)])})"
        )
    return best


def _first_that_runs(
    model: nn.Module, divisor: int, candidates: Sequence[Tensor], reasons: list[str]
) -> Shrunken | None:
    """The copy for one divisor with the first inputs that it takes; adds why others failed to `reasons`."""
    for inputs in candidates:
        try:
            narrow = _divided(model, divisor, inputs)
            _run(narrow, inputs)
        except Exception as error:  # whatever a user's forward raises on a width or shape it doesn't expect
            reasons.append(f"{tuple(inputs.shape)} {inputs.dtype}: {type(error).__name__}: {error}")
            continue
        return Shrunken(narrow, inputs, divisor)
    return None


def _small_shapes(shape: Sequence[int], dtype: torch.dtype) -> Iterator[tuple[int, ...]]:
    batch, *sample = shape
    least = SIDE if dtype.is_floating_point and len(sample) > 2 else LENGTH
    kept = 1 if dtype.is_floating_point and len(sample) > 2 else 0
    if dtype.is_floating_point and len(sample) == 1:
        small = list(sample)  # features, not positions
    else:
        small = [*sample[:kept], *(min(size, least) for size in sample[kept:])]
    if small != sample:
        yield (batch, *small)
    yield (batch, *sample)


def _inputs(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(tuple(shape), dtype=torch.float64, generator=generator)
    return torch.randint(2, tuple(shape), dtype=dtype, generator=generator)


def _run(model: nn.Module, inputs: Tensor) -> None:
    state = copy.deepcopy(dict(model.named_buffers()))
    outputs = list(floating_tensors(model(inputs)))
    if not outputs:
        raise ConfigurationError("expected a model whose output is a function of its parameters")
    torch.stack([output.sum() for output in outputs]).sum().backward()
    model.zero_grad()
    for name, buffer in model.named_buffers():
        buffer.copy_(state[name])


def _largest_factor(model: nn.Module) -> int:
    rules, _ = rules_of(model, LayerOptions())
    return max((shape.size for rule in rules.values() for shape in rule.factor_shapes.values()), default=0)


def _divided(model: nn.Module, divisor: int, inputs: Tensor) -> nn.Module:
    """A float64 copy with widths divided."""
    if divisor == 1:
        return copy.deepcopy(model).double()
    first = _layers_at_the_input(model, inputs)
    sizes = {size for p in model.parameters() for size in p.shape if size % divisor == 0}
    memo: dict[int, Tensor] = {}

    def smaller(size: int) -> int:
        return size // divisor if size in sizes else size

    def cut(tensor: Tensor, keep: Sequence[int]) -> Tensor:
        """The leading part along each divided dimension; one cut for each tensor, so that tied ones stay tied."""
        if id(tensor) not in memo:
            places = tuple(slice(n if i in keep else smaller(n)) for i, n in enumerate(tensor.shape))
            part = tensor.detach()[places].clone()
            wide = part.double() if part.is_floating_point() else part
            memo[id(tensor)] = nn.Parameter(wide, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else wide
        return memo[id(tensor)]

    names = {id(module): name for name, module in model.named_modules()}
    with torch.no_grad():
        skeleton = _skeleton(model)
        twins = dict(skeleton.named_modules())
        for module in model.modules():
            twin, keep = twins[names[id(module)]], _kept(module, names[id(module)] in first)
            for name, p in module._parameters.items():
                twin._parameters[name] = None if p is None else cut(p, keep)
            own = not type(module).__module__.startswith("torch.nn")
            for name, buffer in module._buffers.items():
                part = buffer if buffer is None or own else cut(buffer, keep)
                twin._buffers[name] = part.double() if part is not None and part.is_floating_point() else part
            _divide_attributes(module, twin, smaller, names[id(module)] in first)
    return skeleton


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy whose parameters are still the model's own: they are replaced next."""
    memo: dict[int, Any] = {id(p): p for p in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def _layers_at_the_input(model: nn.Module, inputs: Tensor) -> set[str]:
    """Names of layers that are handed the model's input, reshaped at most."""
    found: set[str] = set()
    storage = inputs.untyped_storage().data_ptr()
    twin = copy.deepcopy(model).double()

    def look(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            if given and isinstance(given[0], Tensor) and given[0].untyped_storage().data_ptr() == storage:
                found.add(name)

        return hook

    handles = [m.register_forward_pre_hook(look(name)) for name, m in twin.named_modules() if not list(m.children())]
    with torch.no_grad():
        twin(inputs)
    for handle in handles:
        handle.remove()
    return found


def _kept(module: nn.Module, at_input: bool) -> tuple[int, ...]:
    """Dimensions of a layer's parameters that are no widths: kernels, vocabularies, the input's own features."""
    if isinstance(module, nn.Embedding):
        return (0,)
    if isinstance(module, nn.modules.conv._ConvNd):
        return (*((0 if module.transposed else 1,) if at_input else ()), *range(2, module.weight.dim()))
    return (1,) if at_input and isinstance(module, nn.Linear) else ()


def _divide_attributes(module: nn.Module, twin: nn.Module, smaller: Any, at_input: bool) -> None:
    """Widths that the layer's forward reads from its attributes."""
    names = next((names for kind, names in WIDTHS.items() if isinstance(module, kind)), ())
    if isinstance(module, nn.modules.conv._ConvNd):
        names = CHANNELS
        if module.groups > 1 and smaller(module.groups) != module.groups and module.groups == module.in_channels:
            twin.groups = smaller(module.groups)  # depthwise
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        names = ("num_features",)
    elif not type(module).__module__.startswith("torch.nn"):
        names = [name for name, value in vars(module).items() if type(value) is int and value > 1]
    for name in names:
        value = getattr(module, name)
        if at_input and name in ("in_features", "in_channels"):
            continue
        if name == "head_dim" and isinstance(module, nn.MultiheadAttention):
            setattr(twin, name, twin.embed_dim // module.num_heads)
        elif isinstance(value, tuple):
            setattr(twin, name, tuple(smaller(size) for size in value))
        elif isinstance(value, int):
            setattr(twin, name, smaller(value))
