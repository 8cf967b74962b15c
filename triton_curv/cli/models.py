"""MODEL on the command line: a scenario, `module:factory`, or a name that torchvision or timm knows."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from triton_curv.errors import ConfigurationError
from triton_curv.scenarios import SCENARIOS, Scenario

IMAGE = (3, 224, 224)
INPUT_DTYPES = {"float32": (torch.float32,), "int64": (torch.int64,), "auto": (torch.float32, torch.int64)}


@dataclass(frozen=True)
class NamedModel:
    """A model to look at: how to build it, the shape of a batch, and input types to try in turn."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    scenario: Scenario | None = None


def find_model(spec: str, batch: int | None, input_shape: str | None, input_dtype: str) -> NamedModel:
    """The model that `spec` names, with the batch size and the shape of one sample as given.

    Raises:
        ConfigurationError: no such model, or a shape, batch or type that is none.

    """
    if input_dtype not in INPUT_DTYPES:
        raise ConfigurationError(f"expected --input-dtype among {', '.join(INPUT_DTYPES)}, got {input_dtype!r}")
    if batch is not None and batch < 1:
        raise ConfigurationError(f"expected a batch of at least 1, got {batch}")
    if spec in SCENARIOS:
        scenario = SCENARIOS[spec]
        if input_shape is not None:
            raise ConfigurationError(f"expected no --input for {spec}, whose data has a shape, got {input_shape}")
        x = scenario.load().train_x
        shape = (scenario.batch_size if batch is None else batch, *x.shape[1:])
        return NamedModel(spec, scenario.model, shape, (x.dtype,), scenario)
    sample = IMAGE if input_shape is None else parse_shape(input_shape)
    return NamedModel(spec, _factory(spec), (32 if batch is None else batch, *sample), INPUT_DTYPES[input_dtype])


def parse_shape(text: str) -> tuple[int, ...]:
    """(3, 224, 224) of "3x224x224".

    Raises:
        ConfigurationError: no such shape.

    """
    parts = text.lower().split("x")
    if not all(part.isdigit() and int(part) for part in parts):
        raise ConfigurationError(f"expected the shape of one sample like 3x224x224 or 128, got {text!r}")
    return tuple(int(part) for part in parts)


def build_without_data(named: NamedModel) -> nn.Module:
    """The model on device "meta": built there if it can be, else built on the CPU and emptied."""
    from triton_curv.explanation.observe import without_data

    if named.scenario is None:
        try:
            with torch.device("meta"):
                return without_data(built(named))
        except (RuntimeError, ValueError):
            pass  # a factory that looks at its weights
    return without_data(built(named))


def built(named: NamedModel) -> nn.Module:
    """The model with its weights.

    Raises:
        ConfigurationError: the factory gives something else.

    """
    try:
        model = named.build()
    except TypeError as error:
        raise ConfigurationError(f"expected {named.name!r} to build a model without arguments: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"expected {named.name!r} to give a torch.nn.Module, got {type(model).__name__}")
    return model


def _factory(spec: str) -> Callable[[], Any]:
    module_name, colon, attribute = spec.partition(":")
    if not colon:
        return _from_libraries(spec)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does: a factory in the user's own folder
    try:
        found: Any = importlib.import_module(module_name)
        for name in attribute.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"expected module:factory, got {spec!r}: {error}") from None
    if not callable(found):
        raise ConfigurationError(f"expected {spec!r} to be a function that builds a model, got {type(found).__name__}")
    return found  # type: ignore[no-any-return]  # callable, which mypy can't keep for Any


LIBRARIES = {"torchvision": ("torchvision.models", "get_model"), "timm": ("timm", "create_model")}


def _from_libraries(spec: str) -> Callable[[], Any]:
    """`torchvision.models.get_model` or `timm.create_model`, without pretrained weights; "timm/NAME" asks only timm."""
    prefix, slash, rest = spec.partition("/")
    asked, name = ([prefix], rest) if slash and prefix in LIBRARIES else ([*LIBRARIES], spec)
    tried: list[str] = []
    for library in asked:
        module_name, factory = LIBRARIES[library]
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # a build for another torch raises RuntimeError or OSError while it is imported
            tried.append(f"{library}: {error}")
            continue
        if name.partition(".")[0] in module.list_models():  # timm's names may go on with a tag of weights
            create = getattr(module, factory)
            return lambda: create(name)
        tried.append(f"{library} has no model of this name")
    raise ConfigurationError(
        f"expected a scenario ({', '.join(SCENARIOS)}), module:factory, or a model of torchvision or timm, "
        f"got {spec!r} ({'; '.join(tried)})"
    )
