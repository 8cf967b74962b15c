"""Where the receptive fields of a convolution lie: sizes, paddings and the displacements between kernel positions."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import Literal

from triton_curv_kernels.backend import UnsupportedInputError

PaddingMode = Literal["zeros", "circular", "reflect", "replicate"]


def per_dimension(value: int | Sequence[int], dims: int, name: str) -> list[int]:
    """One integer for each spatial dimension, as `torch.nn.Conv` spreads a single one."""
    values = [value] * dims if isinstance(value, int) else list(value)
    if len(values) != dims:
        raise UnsupportedInputError(f"expected {name} of {dims} integers, one a spatial dimension, got {value}")
    return values


def padding_sides(padding: str | int | Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """(left, right) per spatial dimension, first dimension first; 'same' puts the odd one to the right."""
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        return [side for total in totals for side in (total // 2, total - total // 2)]
    if isinstance(padding, str) and padding != "valid":
        raise UnsupportedInputError(f"expected padding of integers, 'same' or 'valid', got {padding!r}")
    amounts = (
        [0] * len(kernel_size) if isinstance(padding, str) else per_dimension(padding, len(kernel_size), "padding")
    )
    return [amount for amount in amounts for _ in range(2)]


@dataclass(frozen=True)
class PatchGeometry:
    """Spatial sizes of an input, zero-padded by `before` (and behind), and of the kernel that moves over it."""

    sizes: tuple[int, ...]
    outputs: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(
        cls,
        sizes: Sequence[int],
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> "PatchGeometry":
        """`padding` holds (left, right) of each dimension.

        Raises UnsupportedInputError if the kernel does not fit into the padded input, or a number is out of range.
        """
        kernel = tuple(kernel_size)
        sizes = [int(size) for size in sizes]  # a traced size becomes a number
        dims = len(kernel)
        if not (len(sizes) == len(stride) == len(dilation) == dims and len(padding) == 2 * dims and 1 <= dims <= 3):
            raise UnsupportedInputError(
                f"expected 1 to 3 spatial dimensions with kernel, stride and dilation of one integer each and padding "
                f"of two, got {len(sizes)} dimensions, kernel {kernel}, stride {tuple(stride)}, dilation "
                f"{tuple(dilation)}, padding {tuple(padding)}"
            )
        if min(*kernel, *stride, *dilation) < 1 or min(padding) < 0:
            raise UnsupportedInputError(
                f"expected kernel, stride and dilation of 1 or more and no negative padding, got kernel {kernel}, "
                f"stride {tuple(stride)}, dilation {tuple(dilation)}, padding {tuple(padding)}"
            )
        spans = [
            size + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel[i] - 1) for i, size in enumerate(sizes)
        ]
        if min(spans) < 1:
            raise UnsupportedInputError(
                f"expected a kernel that fits into the padded input, got kernel {kernel}, dilation {tuple(dilation)}, "
                f"padding {tuple(padding)} and input {tuple(sizes)}"
            )
        outputs = tuple((span - 1) // s + 1 for span, s in zip(spans, stride, strict=True))
        return cls(tuple(sizes), outputs, kernel, tuple(stride), tuple(padding[::2]), tuple(dilation))

    @property
    def positions(self) -> int:
        """Output positions of a sample."""
        return prod(self.outputs)

    @property
    def kernel_positions(self) -> int:
        """Kernel positions: patches have as many pixels."""
        return prod(self.kernel)

    @property
    def sees_pixels(self) -> bool:
        """Whether patches are pixels of the input: a kernel of one pixel, which sees no padding."""
        reach = zip(self.sizes, self.outputs, self.stride, self.before, strict=True)
        return self.kernel_positions == 1 and all(
            before == 0 and (out - 1) * step < size for size, out, step, before in reach
        )

    @property
    def gaps(self) -> tuple[int, ...]:
        """Distance between the first and the last kernel position."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))

    @property
    def shares_displacements(self) -> bool:
        """Whether all pairs of kernel positions with one displacement share most of their products.

        Stride 1, and along each dimension some input is seen from all kernel positions.
        """
        return all(s == 1 for s in self.stride) and all(
            out >= gap for out, gap in zip(self.outputs, self.gaps, strict=True)
        )


@lru_cache(maxsize=64)
def displacements(kernel: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Differences of kernel positions, zero and one of each pair d, -d: the lexicographically positive, in order."""
    every = list(product(*(range(1 - k, k) for k in kernel)))
    return tuple(every[len(every) // 2 :])
