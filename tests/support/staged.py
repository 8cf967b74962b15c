"""A few steps of each optimizer with stage ranges on, for a process whose ranges are recorded."""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import triton_curv as tc
from triton_curv import nvtx

STEPS = 3


def net() -> nn.Module:
    """Two layers with a block and a parameter without one."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.PReLU(), nn.Linear(3, 2))


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(6, 4), torch.randint(2, (6,))


def by_gradient(optimizer: Any, model: nn.Module) -> None:
    x, y = batch()
    for _ in range(STEPS):
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def by_closure(optimizer: Any, model: nn.Module, with_output: bool) -> None:
    x, y = batch()

    def closure() -> Any:
        output = model(x)
        loss = functional.cross_entropy(output, y)
        return (loss, output) if with_output else loss

    for _ in range(STEPS):
        optimizer.step(closure)


def run(name: str) -> None:
    """STEPS steps of one optimizer: kfac, neumann, newton-cg, sgn or neumann-inner."""
    model = net()
    if name == "kfac":
        by_gradient(tc.KFAC(model, factor_interval=2, inverse_interval=2), model)
    elif name == "neumann":
        by_gradient(tc.Neumann(model.parameters(), lr=0.1, warmup=1), model)
    elif name == "newton-cg":
        by_closure(tc.NewtonCG(model, cg_max_iter=2, line_search=True, product="reverse"), model, False)
    elif name == "sgn":
        by_closure(tc.SGN(model, cg_max_iter=2, cg_first_iter=2, product="double_vjp"), model, True)
    else:
        by_closure(tc.NeumannInner(model, inner_steps=2), model, False)


def run_rank() -> None:
    """One of two ranks of K-FAC, by the variables that torchrun sets; TRITON_CURV_NVTX=1 has turned ranges on."""
    dist.init_process_group("gloo")
    run("kfac")
    nvtx.disable()
    dist.destroy_process_group()


def main() -> None:
    """The optimizers that the command line names, ranges on and then off; or one rank."""
    if os.environ.get("WORLD_SIZE"):
        run_rank()
    for name in sys.argv[1:]:
        nvtx.enable()
        run(name)
        nvtx.disable()
        run(name)


if __name__ == "__main__":
    main()
