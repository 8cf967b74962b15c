"""Program: what each region of a step launches in one graph on fake CUDA tensors, as JSON. Needs g++.

`python tests/support/traced_regions.py FOLDER` builds a guard library in FOLDER; it is for this process alone.
"""

import ctypes
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx

import triton_curv as tc
from tests.support.offline import offline_target
from triton_curv.operators.recurrences import Rules, Scalars, move_, scaled, turn_, update_
from triton_curv.optimizers.graph_apply import apply_in_graph_
from triton_curv.optimizers.neumann_step import gradients_of, step_groups_
from triton_curv.optimizers.regions import fold_, refresh_

LAUNCH = "triton_kernel_wrapper_functional"
Found = dict[str, int | list[str]]


def load_guard(folder: Path) -> None:
    """Torch without CUDA asks for no device when it indexes a fake tensor on "cuda"."""
    if torch.version.cuda is not None:
        torch._C._ensureCUDADeviceGuardSet()
        return
    root, library = Path(torch.__file__).parent, folder / "fake_cuda.so"
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{root / 'include'}"]
    command += [str(Path(__file__).with_name("fake_cuda.cpp")), "-o", str(library), f"-L{root / 'lib'}", "-lc10"]
    subprocess.run(command, check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def launches(function: Callable[..., Any], *args: Any) -> Found:
    """Launches in the one graph that the function makes, and what of ours is opaque in it."""
    graphs: list[tuple[torch.fx.GraphModule, Sequence[Tensor]]] = []

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        graphs.append((graph, inputs))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*args)
    ((graph, inputs),) = graphs
    flat = make_fx(dispatch_functionalize(lambda *tensors: graph(*tensors)))(*inputs)
    calls = Counter(str(node.target) for node in flat.graph.nodes if node.op == "call_function")
    return {"launches": calls[LAUNCH], "opaque": [name for name in calls if name.startswith("triton_curv")]}


def network() -> nn.Module:
    """A convolution, its norm layer and a linear layer, with gradients: six parameters, three blocks."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 10))
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                on_device = nn.Parameter(torch.empty(p.shape, device="cuda"))
                on_device.grad = torch.empty(p.shape, device="cuda")
                module._parameters[name] = on_device
        for name, b in list(module._buffers.items()):
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cuda")
    return model


def regions_of_kfac(**options: Any) -> dict[str, Found]:
    """The three regions of a step, with the arguments that a step gives them; and a whole common step."""
    optimizer = tc.KFAC(network(), **options)
    curvature, rows, exchange = optimizer._curvature, optimizer._hyper.rows, optimizer._exchange
    store, of_fold = curvature.store, curvature.normalisation(rows)
    work = [group.in_graph(row) for group, row in zip(optimizer._matrices, rows.unbind(), strict=False)]
    of_model = (optimizer._hyper.steps, store.samples, curvature.events[0], optimizer.options)
    found = {
        "fold": launches(fold_, store, curvature.folded, of_fold, None, exchange),
        "refresh": launches(refresh_, store, curvature.turned, None, curvature.lambdas(rows), exchange),
        "apply": launches(apply_in_graph_, work, [], *of_model),
    }
    optimizer._plan.fold, optimizer._plan.part = False, "-1"
    return {**found, "common step": launches(lambda: optimizer.step())}


def neumann() -> Found:
    """A step of the main loop."""
    optimizer = tc.Neumann(network().parameters(), warmup=0)
    for plan in optimizer._plans:
        plan.fresh, plan.phase = False, "main"
    grads = gradients_of(optimizer._groups)
    return launches(step_groups_, optimizer._groups, grads, optimizer._plans, optimizer._rows[0])


def conjugate_gradients() -> dict[str, Found]:
    """What lies between two products, for two tensors."""
    x, r, p, product = ([torch.empty(4, 3, device="cuda"), torch.empty(5, device="cuda")] for _ in range(4))
    rz, size, largest, limit = (torch.empty((), device="cuda") for _ in range(4))
    active, end = torch.empty((), dtype=torch.bool, device="cuda"), torch.empty((), dtype=torch.int64, device="cuda")
    scalars, rules = Scalars(rz, size, largest, active, end, end), Rules(True, False, True)
    return {
        "update": launches(update_, x, r, p, product, scalars, limit, rules),
        "turn": launches(turn_, p, x, r, scalars, size, rules),
        "move": launches(move_, x, r, p, size),
        "scaled": launches(scaled, x, [size, size]),
    }


if __name__ == "__main__":
    load_guard(Path(sys.argv[1]))
    with offline_target("sm_90"), FakeTensorMode(), torch.no_grad():
        everything: dict[str, Any] = {f"kfac {name}": regions_of_kfac(inverse=name) for name in ("cholesky", "neumann")}
        everything["neumann"] = neumann()
        everything["cg"] = conjugate_gradients()
    print(json.dumps(everything))
