"""Time of each stage of a layer from FLOPs, bytes and a machine's rates, in whole nanoseconds."""

from dataclasses import dataclass

from triton_curv.costs import apply_cost, inverse_cost
from triton_curv.sharding.layers import FactorSize, LayerSize


@dataclass(frozen=True)
class Machine:
    """Rates that a cost is made of; assumptions, not measurements. Integers, so that all ranks compute the same.

    Args:
        inverse_flops: FLOP/s of a Cholesky inverse of a large matrix.
        product_flops: FLOP/s of matrix products, fp32 in and out.
        memory_bytes: bytes/s of device memory.
        launch_ns: the least time of one operation on one layer, in ns.
        node: ranks that share a node.
        node_bytes: bytes/s that one rank sends inside its node.
        network_bytes: bytes/s that all ranks of a node together send to other nodes.
        node_latency_ns, network_latency_ns: time of one hop of a ring, in ns.

    """

    name: str
    inverse_flops: int
    product_flops: int
    memory_bytes: int
    launch_ns: int
    node: int
    node_bytes: int
    network_bytes: int
    node_latency_ns: int
    network_latency_ns: int


TERA, GIGA = 10**12, 10**9
HOP_NS = {"node_latency_ns": 3_000, "network_latency_ns": 5_000}
V100 = Machine(
    "V100, 4 a node, 2 x EDR InfiniBand",
    inverse_flops=2 * TERA,
    product_flops=12 * TERA,
    memory_bytes=800 * GIGA,
    launch_ns=20_000,
    node=4,
    node_bytes=40 * GIGA,
    network_bytes=20 * GIGA,
    **HOP_NS,
)
A100 = Machine(
    "A100, 8 a node, 8 x HDR InfiniBand",
    inverse_flops=4 * TERA,
    product_flops=60 * TERA,
    memory_bytes=1_400 * GIGA,
    launch_ns=15_000,
    node=8,
    node_bytes=200 * GIGA,
    network_bytes=160 * GIGA,
    **HOP_NS,
)
H100 = Machine(
    "H100, 8 a node, 8 x NDR InfiniBand",
    inverse_flops=8 * TERA,
    product_flops=200 * TERA,
    memory_bytes=2_600 * GIGA,
    launch_ns=12_000,
    node=8,
    node_bytes=350 * GIGA,
    network_bytes=320 * GIGA,
    **HOP_NS,
)


def nanoseconds(amount: int, per_second: int) -> int:
    """Time for an amount of work at a rate, rounded up."""
    return -(-amount * GIGA // per_second)


def inverse_ns(factor: FactorSize, machine: Machine, itemsize: int = 4) -> int:
    """Time of the damped inverses of one factor: FLOPs or bytes, whichever takes longer, and one launch."""
    cost = inverse_cost(factor.size, factor.batch, itemsize)
    busy = max(nanoseconds(cost.flops, machine.inverse_flops), nanoseconds(cost.bytes, machine.memory_bytes))
    return machine.launch_ns + busy


def apply_ns(layer: LayerSize, machine: Machine, itemsize: int = 4) -> int:
    """Time of G^-1 D A^-1 of one layer."""
    batch, rows, columns = layer.matrix
    moved = apply_cost(rows, columns, batch, itemsize).bytes - batch * (rows**2 + columns**2) * itemsize
    moved += sum(factor.dense for factor in layer.factors) * itemsize
    busy = max(nanoseconds(layer.apply_flops, machine.product_flops), nanoseconds(moved, machine.memory_bytes))
    return machine.launch_ns + busy
