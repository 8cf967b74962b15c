"""`momentum_update_` on whole parameter lists, beside foreach calls and the AdamW a user has."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from profiles.kernel_cases.case import Case
from profiles.parameter_lists import Shapes, largest_error, named_shapes, random_lists
from triton_curv_kernels.momentum import momentum_update_, momentum_update_reference

DTYPES = {"cuda": (torch.float32, torch.bfloat16), "cpu": (torch.float32,)}


def adamw(params: list[Tensor], grads: list[Tensor]) -> Callable[[], None]:
    """A step of torch.optim.AdamW: fused on a GPU, foreach on a CPU."""
    leaves = [torch.nn.Parameter(p.clone()) for p in params]
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = grad
    fused = leaves[0].is_cuda
    optimizer = torch.optim.AdamW(leaves, lr=1e-4, fused=fused, foreach=not fused, capturable=fused)

    def step() -> None:
        optimizer.step()

    return step


def case(name: str, shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Case:
    """The case of one parameter list."""
    params, updates = random_lists(shapes, (dtype, dtype), device)
    (momenta,) = random_lists(shapes, (torch.float32,), device, seed=1)
    scales = list(torch.full((len(shapes),), 0.5, device=device).unbind())
    hyper = torch.tensor([1e-3, 0.9, 1e-2, 1.0, 0.0], device=device)

    def copies(kind: torch.dtype | None = None) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        p, m, u = ([t.to(kind or t.dtype, copy=True) for t in ts] for ts in (params, momenta, updates))
        return p, m, u

    def error(update: Callable[..., None]) -> float:
        exact = copies(torch.float64)
        momentum_update_reference(*exact, [s.double() for s in scales], hyper.double())
        found = copies()
        update(*found, scales, hyper)
        return largest_error([*found[0], *found[1]], [*exact[0], *exact[1]])

    theirs = copies()
    numel, width = sum(p.numel() for p in params), params[0].element_size()
    return Case(
        op="momentum_update_",
        name=f"{name} {str(dtype).removeprefix('torch.')}",
        ours=lambda: momentum_update_(params, momenta, updates, scales, hyper),
        alternatives={
            "foreach": lambda: momentum_update_reference(*theirs, scales, hyper),
            "fused AdamW" if device.type == "cuda" else "foreach AdamW": adamw(params, updates),
        },
        error=lambda: error(momentum_update_),
        allowed_error=lambda: 2 * error(momentum_update_reference),
        flops=8.0 * numel,
        bytes=float(numel * (3 * width + 8)),
        bound="memory",
        bar="at least 88 % of HBM",
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Parameter lists of real networks."""
    for name, shapes in named_shapes(device, quick):
        for dtype in DTYPES[device.type][: 1 if quick else None]:
            yield case(name, shapes, dtype, device)
