"""What this machine can do at most, measured: products and memory, the roofs that benchmarks are compared with."""

import statistics
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from triton_curv.profiling.stopwatch import Stopwatch

Bound = Literal["tensor", "fp32", "memory"]
"""The roof something stands under: tensor-core products of 16-bit inputs, fp32 products, or memory bandwidth."""

GPU_SIZE, CPU_SIZE = 8192, 1024
GPU_COPY, CPU_COPY = 1 << 29, 1 << 26
"""Edge of the square products; elements of the float32 copy, far more than any cache holds."""


@dataclass(frozen=True)
class Roofs:
    """FLOP/s of `torch.mm` in bf16 (`tensor`) and in float32 without tf32 (`fp32`), bytes/s of `Tensor.copy_`."""

    tensor: float
    fp32: float
    memory: float

    def least_time(self, flops: float, moved: float, bound: Bound) -> float:
        """Seconds that `flops` operations and `moved` bytes need at least, whichever takes longer."""
        products = self.fp32 if bound == "fp32" else self.tensor
        return max(flops / products, moved / self.memory)


def measure_roofs(device: torch.device, stopwatch: Stopwatch) -> Roofs:
    """Medians of large calls of the library's own; on a CPU, bf16 counts as float32."""
    n, numel = (GPU_SIZE, GPU_COPY) if device.type == "cuda" else (CPU_SIZE, CPU_COPY)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        rates = {}
        for name, dtype in (("tensor", torch.bfloat16), ("fp32", torch.float32)):
            if device.type == "cuda" or dtype == torch.float32:
                a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
                out = torch.empty_like(a)
                times = stopwatch.interleave({"mm": partial(torch.mm, a, b, out=out)})["mm"]
                rates[name] = 2 * n**3 / statistics.median(times.seconds)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    source, target = (torch.randn(numel, device=device) for _ in range(2))
    copied = stopwatch.interleave({"copy": partial(target.copy_, source)})["copy"]
    return Roofs(rates.get("tensor", rates["fp32"]), rates["fp32"], 8 * numel / statistics.median(copied.seconds))
