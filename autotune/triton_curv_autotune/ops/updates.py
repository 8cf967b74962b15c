"""Updates of lists of tensors: `momentum_update_`, `neumann_update_`, `cg_update_`, `cg_direction_`, `cg_dots`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from triton_curv_autotune.registry import Inputs, Op, power_of_two, register
from triton_curv_kernels import cg, cg_kernels, momentum, momentum_kernels, neumann, pointer_table, pointer_table_device
from triton_curv_kernels.choice import ListProblem
from triton_curv_kernels.pointer_table import CONFIGS, ListConfig, default_for
from triton_curv_kernels.pointer_table import prune as prune_lists


def bucket(problem: ListProblem) -> ListProblem:
    """Elements down to a power of two."""
    return replace(problem, numel=power_of_two(problem.numel))


def _tensors(problem: ListProblem, device: torch.device, kinds: str) -> list[list[Tensor]]:
    """One list of one tensor for each letter: "p" of the problem's dtype, "m" fp32."""
    generator = torch.Generator(device).manual_seed(0)
    dtypes = {"p": problem.dtype, "m": torch.float32}
    return [[torch.randn(problem.numel, device=device, generator=generator).to(dtypes[kind])] for kind in kinds]


def momentum_inputs(problem: ListProblem, device: torch.device) -> Inputs:
    """(params, momentum_buffers, updates, scales, hyper)."""
    hyper = torch.tensor([0.1, 0.9, 1e-4, 1.0, 0.0], device=device)
    return (*_tensors(problem, device, "pmp"), [torch.ones((), device=device)], hyper)


def neumann_inputs(problem: ListProblem, device: torch.device) -> Inputs:
    """(params, momentum_buffers, exp_avgs, grads, distance, hyper)."""
    distance = torch.tensor(max(problem.numel, 1) ** 0.5, device=device)
    hyper = torch.tensor([0.1, 0.9, 1e-7, 1e-5, 0.99], device=device)
    return (*_tensors(problem, device, "pmmp"), distance, hyper)


def cg_update_inputs(problem: ListProblem, device: torch.device) -> Inputs:
    """(solution, residual, direction, product, step, square)."""
    return (*_tensors(problem, device, "mmmm"), torch.tensor(0.1, device=device), torch.zeros((), device=device))


def cg_dots_inputs(problem: ListProblem, device: torch.device) -> Inputs:
    """(a, b)."""
    return tuple(_tensors(problem, device, "mm"))


def cg_dots_reference(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """(<a, b>, <a, a>)."""
    return torch.stack([cg.cg_dot_reference(a, b), cg.cg_dot_reference(a, a)])


def cg_direction_inputs(problem: ListProblem, device: torch.device) -> Inputs:
    """(direction, residual, beta)."""
    return (*_tensors(problem, device, "mm"), torch.tensor(0.5, device=device))


def _results(call: Callable[..., Any], changed: Sequence[int]) -> Callable[..., list[Tensor]]:
    """`call` as a function of its inputs that returns those it changes, in order, or what it returns if none."""

    def run(inputs: Inputs, config: Any = None) -> list[Tensor]:
        returned = call(*inputs) if config is None else call(*inputs, config=config)
        found = [inputs[place] for place in changed] if changed else [returned]
        return [t for item in found for t in (item if isinstance(item, list) else [item])]

    return run


def _describing(name: str) -> Callable[[Inputs], list[tuple[str, Any]]]:
    """One problem a call, since the whole list is one launch; none for a list without elements."""

    def describe(inputs: Inputs) -> list[tuple[str, Any]]:
        tensors = inputs[0]
        return [(name, ListProblem.of(tensors))] if sum(t.numel() for t in tensors) else []

    return describe


EXAMPLES = tuple(ListProblem(1 << exponent, torch.float32) for exponent in (12, 16, 20, 24))


def prune(space: Sequence[ListConfig], problem: ListProblem) -> list[ListConfig]:
    """Configurations that fit the list's size and the device."""
    return prune_lists(space, problem.numel, problem.limits)


def _declare(
    name: str,
    modules: Sequence[ModuleType],
    numerics: tuple[str, ...],
    make_inputs: Callable[[ListProblem, torch.device], Inputs],
    launch: Callable[..., Any],
    reference: Callable[..., Any],
    changed: Sequence[int] = (),
) -> Op[ListProblem, ListConfig]:
    return register(
        Op(
            name=name,
            problem=ListProblem,
            config=ListConfig,
            configs=CONFIGS,
            prune=prune,
            default=default_for,
            bucket=bucket,
            numerics=numerics,
            modules=(*modules, pointer_table, pointer_table_device),
            make_inputs=make_inputs,
            launch=_results(launch, changed),
            reference=_results(reference, changed),
            describe=_describing(name),
            examples=EXAMPLES,
        )
    )


MOMENTUM_UPDATE = _declare(
    "momentum_update_",
    (momentum, momentum_kernels),
    momentum.NUMERICS,
    momentum_inputs,
    momentum.launch_momentum_update_,
    momentum.momentum_update_reference,
    changed=(0, 1),
)
NEUMANN_UPDATE = _declare(
    "neumann_update_",
    (neumann,),
    neumann.NUMERICS,
    neumann_inputs,
    neumann.launch_neumann_update_,
    neumann.neumann_update_reference,
    changed=(0, 1, 2, 4),
)
CG_UPDATE = _declare(
    "cg_update_",
    (cg, cg_kernels),
    cg.NUMERICS,
    cg_update_inputs,
    cg.launch_cg_update,
    cg.cg_update_reference,
    changed=(0, 1, 5),
)
CG_DOTS = _declare(
    "cg_dots",
    (cg, cg_kernels),
    cg.NUMERICS,
    cg_dots_inputs,
    cg.launch_cg_dots,
    cg_dots_reference,
)
CG_DIRECTION = _declare(
    "cg_direction_",
    (cg, cg_kernels),
    (),
    cg_direction_inputs,
    cg.launch_cg_direction,
    cg.cg_direction_reference,
    changed=(0,),
)
