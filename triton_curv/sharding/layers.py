"""What the plan knows of a layer: names and integers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from triton_curv.blocks.rule import Rule
from triton_curv.costs import triangle
from triton_curv.errors import ConfigurationError


@dataclass(frozen=True)
class FactorSize:
    """`batch` symmetric matrices `size` x `size`, which one rank inverts together. `name` starts with A, G or F."""

    name: str
    batch: int
    size: int

    def __post_init__(self) -> None:
        if self.batch < 1 or self.size < 1 or self.name[:1] not in ("A", "G", "F"):
            raise ConfigurationError(f"expected a factor A, G or F of at least one 1x1 matrix, got {self}")

    @property
    def packed(self) -> int:
        """Numbers in its triangles, batch * n (n + 1) / 2."""
        return self.batch * triangle(self.size)

    @property
    def dense(self) -> int:
        """Numbers in its matrices, batch * n^2."""
        return self.batch * self.size**2


@dataclass(frozen=True)
class LayerSize:
    """One curvature block: its factors and its gradient as matrices, (batch, rows, columns)."""

    name: str
    factors: tuple[FactorSize, ...]
    matrix: tuple[int, int, int]

    def __post_init__(self) -> None:
        if not self.factors or len({f.name for f in self.factors}) < len(self.factors) or min(self.matrix) < 1:
            raise ConfigurationError(f"expected factors of different names and a gradient matrix, got {self}")

    @property
    def gradient(self) -> int:
        """Numbers in the gradient."""
        return math.prod(self.matrix)

    @property
    def apply_flops(self) -> int:
        """FLOPs of G^-1 D A^-1: each factor times what it faces."""
        _, rows, columns = self.matrix
        across = {"A": rows, "G": columns, "F": columns}
        return sum(2 * f.dense * across[f.name[0]] for f in self.factors)


def layer_sizes(rules: Mapping[str, Rule]) -> tuple[LayerSize, ...]:
    """The sizes of blocks, in their order: `layer_sizes({name: block.rule for name, block in opt.blocks.items()})`."""
    return tuple(
        LayerSize(
            name,
            tuple(FactorSize(key, shape.batch, shape.size) for key, shape in rule.factor_shapes.items()),
            rule.matrix_shape,
        )
        for name, rule in rules.items()
    )
