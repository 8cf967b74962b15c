"""A process that compiles an op whose result shows its config: `python -m tests.support.compiled_choice FACTOR ...`.

For each FACTOR the store's entry is replaced, as a tuning run between two trainings would do, and the function compiled
anew. Printed: by what the op multiplied, and how often torch found the graph in its caches.
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.library import triton_op

from tests.support.tuning import FAKE, entry_for
from triton_curv_autotune import Resolver
from triton_curv_autotune.registry import Op, register
from triton_curv_autotune.store import default_store
from triton_curv_kernels import choice
from triton_curv_kernels.backend import DeviceLimits


@dataclass(frozen=True)
class ScaleProblem:
    numel: int
    limits: DeviceLimits = FAKE


@dataclass(frozen=True)
class ScaleConfig:
    factor: int


SPACE = [ScaleConfig(factor) for factor in range(1, 10)]


@triton_op("triton_curv_tests::scale", mutates_args=())
def scale_op(x: Tensor, tables: str = "") -> Tensor:
    factor = choice.choose("scale", ScaleProblem(4), lambda problem: SPACE[0]).factor
    return torch.addmm(x, x, x, beta=0, alpha=factor)  # a library call: no C++ to compile


def scale(x: Tensor) -> Tensor:
    return torch.ops.triton_curv_tests.scale(x, choice.tables_key())  # type: ignore[no-any-return]  # untyped


def main() -> None:
    op = Op(
        name="scale",
        problem=ScaleProblem,
        config=ScaleConfig,
        configs=SPACE,
        prune=lambda space, problem: list(space),
        default=lambda problem: SPACE[0],
        bucket=lambda problem: problem,
        numerics=(),
        modules=(),
        make_inputs=lambda problem, device: (),
        launch=lambda inputs, config: [],
        reference=lambda inputs: [],
        describe=lambda inputs: [],
        examples=(),
    )
    register(op)
    resolver = Resolver(shipped=lambda: (), devices=lambda: [FAKE])
    choice.set_chooser(resolver.resolve, resolver.state_digest)
    for factor in sys.argv[1:]:
        default_store().write(entry_for("scale", ScaleProblem(4), ScaleConfig(int(factor))))
        resolver.reload()
        torch._dynamo.reset()
        counters.clear()
        result = torch.compile(scale, fullgraph=True)(torch.eye(2))
        print(int(result[0, 0]), counters["aot_autograd"]["autograd_cache_hit"])


if __name__ == "__main__":
    main()
