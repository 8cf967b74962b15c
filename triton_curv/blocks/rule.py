"""What differs between layer families: which statistics a layer gives, and how its gradient becomes a matrix."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor
from torch.nn import Module, Parameter


class FactorShape(NamedTuple):
    """`batch` symmetric matrices of `size` x `size`.

    Every `blocks` of them that follow one another are the diagonal blocks of one factor: a diagonal factor of n numbers
    is FactorShape(n, 1, blocks=n). They share one damping. `order` says which captured coordinate is the
    weight's i-th, where `accumulate_` takes them in another order.
    """

    batch: int
    size: int
    blocks: int = 1
    order: Tensor | None = None


class Uses(NamedTuple):
    """Units (samples) that one call of a layer contributed, and what A is divided by: rows (samples x positions).

    `shared`: the call had no samples of its own, its output served all of the batch.
    """

    samples: int
    rows: int | Tensor
    shared: bool = False


class Source(Protocol):
    """What takes the statistics of one call: a layer's rule, or the part of it that belongs to one of its layers."""

    def accumulate_(self, sums: Mapping[str, Tensor], inputs: Tensor, grad_output: Tensor, training: bool) -> Uses:
        """Add one call's uncentred second moments to `sums`, unnormalised; return how much was added."""


class MaskedSource(ABC):
    """A source whose inputs can hold positions that are padding: base class, since it is told apart from the others."""

    @abstractmethod
    def fits(self, mask: Tensor, inputs: Tensor) -> bool:
        """Whether the mask has the shape of the inputs' positions; else it is ignored."""

    @abstractmethod
    def masked(self, mask: Tensor) -> Source:
        """The same source, whose A leaves out positions where `mask`, of the shape of all positions, is False."""


class Rule(Protocol):
    """One layer's curvature, stateless: statistics in, shapes out.

    The curvature of a block is F = A (x) G with P = G^-1 D A^-1, or a single factor F with P = F^-1 D, where D, of
    shape `matrix_shape` (batch, rows, columns), is the gradient of the block's parameters laid out as matrices. A rule
    is a `Source` too.
    """

    @property
    def module(self) -> Module:
        """The layer."""

    @property
    def params(self) -> Mapping[str, Parameter]:
        """Its trainable parameters, by the layer's own names."""

    @property
    def factor_shapes(self) -> Mapping[str, FactorShape]:
        """{"A", "G"} or {"F"}; a factor in blocks of two sizes is {"A.0", "A.1"}, in the order of the coordinates."""

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """(batch, rows, columns) of the gradient matrix D."""

    @property
    def approximation(self) -> str:
        """Which curvature it is and when it is exact, for `explain()`."""

    def accumulate_(self, sums: Mapping[str, Tensor], inputs: Tensor, grad_output: Tensor, training: bool) -> Uses:
        """Add one call's uncentred second moments to `sums`, unnormalised; return how much was added."""

    def views(self, matrix: Tensor) -> dict[str, Tensor]:
        """The parts of a (batch, rows, columns) matrix that belong to each parameter, in the parameter's shape."""

    def present(self, name: str, factor: Tensor) -> Tensor:
        """A factor (batch, size, size) in the shape that the user is shown."""
