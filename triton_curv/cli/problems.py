"""What there is to tune for: the calls that a model's layers and parameters make, or a file that lists problems."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from triton_curv.blocks import FactorShape, LayerOptions, rule_for
from triton_curv.errors import ConfigurationError
from triton_curv.explanation.observe import without_data
from triton_curv.optimizers.groups import rules_of
from triton_curv.scenarios import get_scenario
from triton_curv_autotune.errors import AutotuneError
from triton_curv_autotune.registry import get_op, op_names
from triton_curv_autotune.validate import decode, parse
from triton_curv_kernels.backend import DeviceLimits

Problems = list[tuple[str, Any]]

OPTIONS = LayerOptions(norm_fisher="full")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Recording(TorchDispatchMode):
    """Notes which problems our ops are called with, and does not run them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.problems: Problems = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace != "triton_curv":
            return func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name in op_names():
            self.problems += get_op(name).describe(args)
        return None


def examples(limits: DeviceLimits) -> Problems:
    """Every op's own examples."""
    return [(name, get_op(name).on(p, limits)) for name in op_names() for p in get_op(name).examples]


def from_file(path: Path, limits: DeviceLimits) -> Problems:
    """A JSON list of {"op": name, "problem": {field: value}}; fields with a default may be left out.

    Raises:
        ConfigurationError: no such list.

    """
    try:
        rows = parse(path.read_bytes())
        if not isinstance(rows, list):
            raise ConfigurationError(f"expected a list in {path}, got {type(rows).__name__}")
        found = []
        for row in rows:
            op = get_op(row["op"])
            defaults = {name: item for name, item in vars(op.problem).items() if name in op.problem.__annotations__}
            fields = {k: v for k, v in defaults.items() if not isinstance(v, DeviceLimits)} | row["problem"]
            found.append((op.name, decode(op.problem, fields, limits)))
    except (OSError, AutotuneError, KeyError, TypeError) as error:
        raise ConfigurationError(f"expected a list of {{'op': ..., 'problem': ...}} in {path}: {error}") from None
    return found


def from_scenario(name: str, dtype: str, limits: DeviceLimits) -> Problems:
    """The problems of a scenario's model on its batches."""
    scenario = get_scenario(name)
    shape = scenario.load().train_x.shape[1:]
    return from_module(scenario.model(), (scenario.batch_size, *shape), dtype, limits)


def from_spec(
    spec: str, batch: int, input_shape: str, dtype: str, limits: DeviceLimits, channels_last: bool = False
) -> Problems:
    """The problems of a model: `module:factory`, a scenario's name, or a name in torchvision.models if installed.

    Raises:
        ConfigurationError: no such model, or a shape that it does not take.

    """
    if spec in _scenario_names():
        return from_scenario(spec, dtype, limits)
    try:
        shape = [int(size) for size in input_shape.split("x")]
    except ValueError:
        raise ConfigurationError(f"expected an input shape like 3x224x224, got {input_shape!r}") from None
    return from_module(_make_model(spec), (batch, *shape), dtype, limits, channels_last)


def _scenario_names() -> Sequence[str]:
    from triton_curv.scenarios import SCENARIOS

    return tuple(SCENARIOS)


def _make_model(spec: str) -> nn.Module:
    module_name, _, factory = spec.rpartition(":")
    try:
        module = importlib.import_module(module_name or "torchvision.models")
        model = getattr(module, factory)()
    except (ImportError, AttributeError, TypeError) as error:
        kinds = f"module:factory, a scenario ({', '.join(_scenario_names())}) or a torchvision model"
        raise ConfigurationError(f"expected {kinds}, got {spec!r}: {error}") from None
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"expected {spec!r} to give a torch.nn.Module, got {type(model).__name__}")
    return model


def from_module(
    model: nn.Module, shape: Sequence[int], dtype: str, limits: DeviceLimits, channels_last: bool = False
) -> Problems:
    """Problems of one training step on inputs of `shape`, by a pass over tensors without data (device "meta").

    Raises:
        ConfigurationError: the model does not take such inputs.

    """
    if dtype not in DTYPES:
        raise ConfigurationError(f"expected a dtype among {', '.join(DTYPES)}, got {dtype!r}")
    if channels_last and len(shape) != 4:
        raise ConfigurationError(f"expected samples of three sizes for --channels-last, got {tuple(shape[1:])}")
    model = without_data(model.to(DTYPES[dtype]))
    inputs = torch.empty(shape, device="meta", dtype=DTYPES[dtype])
    if channels_last:
        inputs = inputs.to(memory_format=torch.channels_last)
    uses: list[tuple[nn.Module, Tensor, Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, output: uses.append((layer, inputs[0], output)))
        for layer in model.modules()
        if not list(layer.children())
    ]
    try:
        with torch.no_grad():
            model(inputs)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise ConfigurationError(f"the model does not take an input of shape {tuple(shape)}: {error}") from None
    finally:
        for hook in hooks:
            hook.remove()
    rules, _ = rules_of(model, OPTIONS)
    with _Recording() as recording, torch.no_grad():
        for use in uses:
            _call_factor_ops(*use)
        updating = _update_problems([p for p in model.parameters() if p.requires_grad])
    found = recording.problems + updating + _inverse_problems([rule.factor_shapes for rule in rules.values()])
    placed = [(name, get_op(name).on(problem, limits)) for name, problem in found]
    return list(dict.fromkeys(placed))


def _call_factor_ops(layer: nn.Module, inputs: Tensor, output: Tensor) -> None:
    rule = rule_for(layer, dict(layer.named_parameters(recurse=False)), OPTIONS)
    if not isinstance(rule, str):
        sums = {name: torch.empty(s.batch, s.size, s.size, device="meta") for name, s in rule.factor_shapes.items()}
        rule.accumulate_(sums, inputs, torch.empty_like(output), layer.training)


def _inverse_problems(layers: Sequence[Mapping[str, FactorShape]]) -> Problems:
    """Of a refresh and an exchange of all factors, and of an application of their inverses."""
    banks = [torch.empty(s.batch, s.size, s.size, device="meta") for shapes in layers for s in shapes.values()]
    banks = [bank for bank in banks if bank.shape[-1] > 1]  # others are diagonals
    pairs = [(s["A"], s["G"]) for s in layers if set(s) == {"A", "G"} and s["A"].batch == s["G"].batch]
    found: Problems = []
    if banks:
        matrices = [matrix for bank in banks for matrix in bank]
        sizes = [len(matrix) for matrix in matrices]
        buffer = torch.empty(sum(n * (n + 1) // 2 for n in sizes), device="meta")
        found += get_op("damped_inverse_").describe((banks, banks, [bank[:, 0, 0] for bank in banks]))
        found += get_op("pack_symmetric").describe((matrices, torch.float32))
        found += get_op("unpack_symmetric").describe((buffer, sizes, torch.float32))
    if pairs:
        grads = [torch.empty(a.batch, g.size, a.size, device="meta") for a, g in pairs]
        inverse_a, inverse_g = (
            [torch.empty(s.batch, s.size, s.size, device="meta") for s in side] for side in zip(*pairs, strict=True)
        )
        found += get_op("apply_damped_inverse").describe((grads, grads, inverse_a, inverse_g))
    return found


def _update_problems(params: list[Tensor]) -> Problems:
    """Of updates of all parameters at once, by each optimizer."""
    if not params:
        return []
    buffers = [torch.empty_like(p, dtype=torch.float32) for p in params]
    of_params, of_buffers = ("momentum_update_", "neumann_update_"), ("cg_update_", "cg_direction_", "cg_dots")
    lists = [(name, params) for name in of_params] + [(name, buffers) for name in of_buffers]
    return [asked for name, tensors in lists for asked in get_op(name).describe((tensors,))]
