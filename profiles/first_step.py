"""A new process to the end of its first compiled step: `python -m profiles.first_step`, a child of bench_resolve.

The step is an accumulation of two factors and an update of parameters, `torch.compile(fullgraph=True)`. On a CPU, where
no kernel has a configuration, the tuner's tables for a stand-in device are a part of the graph's key all the same.
Printed as JSON: seconds of the first call (wall, and CPU of this process and its children), of reading the tables, and
how often torch found the graph in its caches.
"""

import json
import resource
import time
import warnings

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import triton_curv_autotune
from profiles.bench_resolve import STAND_IN
from triton_curv_autotune import Resolver, TuningWarning
from triton_curv_kernels import accumulate_factor_, momentum_update_
from triton_curv_kernels.choice import set_chooser


def cpu_seconds() -> float:
    """Of this process and the children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def step(factors: list[Tensor], rows: list[Tensor], params: list[Tensor], buffers: list[Tensor], hyper: Tensor) -> None:
    """What is compiled."""
    for factor, x in zip(factors, rows, strict=True):
        accumulate_factor_(factor, x, 1 / len(x), 0.95)
    scale = torch.ones((), device=hyper.device)
    momentum_update_(params, buffers, rows, [scale] * len(params), hyper)


def main() -> None:
    """Build the tensors, then time the first call."""
    warnings.simplefilter("ignore", TuningWarning)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        triton_curv_autotune.install()
        read = triton_curv_autotune.state_digest
    else:
        resolver = Resolver(devices=lambda: [STAND_IN])
        set_chooser(resolver.resolve, resolver.state_digest)
        read = resolver.state_digest
    widths, k = ((256, 576), 4096) if device.type == "cuda" else ((16, 36), 256)
    factors = [torch.zeros(n, n, device=device) for n in widths]
    rows, params, buffers = ([torch.randn(k, n, device=device) for n in widths] for _ in range(3))
    hyper = torch.tensor([0.1, 0.9, 0.0, 1.0, 0.0], device=device)
    start = time.process_time()
    read()
    reading = time.process_time() - start
    wall, cpu = time.perf_counter(), cpu_seconds()
    torch.compile(step, fullgraph=True)(factors, rows, params, buffers, hyper)
    if device.type == "cuda":
        torch.cuda.synchronize()
    found = {
        "wall": time.perf_counter() - wall,
        "cpu": cpu_seconds() - cpu,
        "reading": reading,
        "hits": counters["aot_autograd"]["autograd_cache_hit"],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
