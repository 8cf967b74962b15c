"""`neumann_update_` on whole parameter lists, beside foreach calls and the AdamW a user has."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from profiles.kernel_cases.case import Case
from profiles.kernel_cases.momentum_update import DTYPES, adamw
from profiles.parameter_lists import Shapes, largest_error, named_shapes, random_lists
from triton_curv_kernels.neumann import neumann_update_, neumann_update_reference

Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def case(name: str, shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Case:
    """The case of one parameter list."""
    params, grads = random_lists(shapes, (dtype, dtype), device)
    momenta, exp_avgs = random_lists(shapes, (torch.float32,) * 2, device, seed=1)
    numel, width = sum(p.numel() for p in params), params[0].element_size()
    start = (2 * numel) ** 0.5
    hyper = torch.tensor([1e-4, 0.9, 1e-7, 1e-5 * numel, 0.99], device=device)
    distance = torch.tensor(start, device=device)

    def copies(kind: torch.dtype | None = None) -> Lists:
        p, m, v, g = ([t.to(kind or t.dtype, copy=True) for t in ts] for ts in (params, momenta, exp_avgs, grads))
        return p, m, v, g

    def error(update: Callable[..., None]) -> float:
        exact, found = copies(torch.float64), copies()
        neumann_update_reference(*exact, torch.tensor(start, dtype=torch.float64, device=device), hyper.double())
        update(*found, torch.tensor(start, device=device), hyper)
        return largest_error([*found[0], *found[1], *found[2]], [*exact[0], *exact[1], *exact[2]])

    theirs, their_distance = copies(), distance.clone()
    return Case(
        op="neumann_update_",
        name=f"{name} {str(dtype).removeprefix('torch.')}",
        ours=lambda: neumann_update_(params, momenta, exp_avgs, grads, distance, hyper),
        alternatives={
            "foreach": lambda: neumann_update_reference(*theirs, their_distance, hyper),
            "fused AdamW" if device.type == "cuda" else "foreach AdamW": adamw(params, grads),
        },
        error=lambda: error(neumann_update_),
        allowed_error=lambda: 2 * error(neumann_update_reference),
        flops=14.0 * numel,
        bytes=float(numel * (3 * width + 16)),
        bound="memory",
        bar="at least 88 % of HBM",
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Parameter lists of real networks."""
    for name, shapes in named_shapes(device, quick):
        for dtype in DTYPES[device.type][: 1 if quick else None]:
            yield case(name, shapes, dtype, device)
