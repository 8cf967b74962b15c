"""Configurations of `damped_inverse_` in Triton: which there are, which fit a problem, which is the default."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

InputPrecision = Literal["ieee", "tf32x3"]
INPUT_PRECISIONS: tuple[InputPrecision, ...] = ("ieee", "tf32x3")


@dataclass(frozen=True)
class DampedInverseConfig:
    """Tiles of BLOCK_N x BLOCK_N, BLOCK_K columns at a time; `input_precision` is how fp32 products are made."""

    BLOCK_N: int = 64
    BLOCK_K: int = 32
    num_warps: int = 4
    num_stages: int = 3
    input_precision: InputPrecision = "ieee"

    def to_ints(self) -> list[int]:
        """The form in which a configuration goes through the op's schema."""
        tiling = [self.BLOCK_N, self.BLOCK_K, self.num_warps, self.num_stages]
        return [*tiling, INPUT_PRECISIONS.index(self.input_precision)]

    @classmethod
    def from_ints(cls, values: Sequence[int]) -> "DampedInverseConfig":
        """Inverse of `to_ints`."""
        *tiling, precision = values
        return cls(*tiling, INPUT_PRECISIONS[precision])
