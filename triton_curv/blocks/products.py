"""Products X^T X of several layers in one pair of launches.

A layer's rows exist while its part of the backward pass runs, and no longer. On a GPU, where small products leave most
of the device idle, they wait for one another until the pass ends or their rows hold `LIMIT` bytes: rows are kept alive
for that long, which is why there is a limit; 0 means that none waits. Nothing waits from one backward pass to the next,
since a caller may write to its inputs in between. In a graph of torch.compile each product is a kernel of its own.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Variable

from triton_curv.costs import NOTHING, Cost, factor_cost
from triton_curv.errors import ChangedInputError
from triton_curv.nvtx import stage
from triton_curv_kernels import accumulate_factor_, accumulate_factors_
from triton_curv_kernels.backend import use_reference
from triton_curv_kernels.factor import supports

LIMIT = 256 << 20  # bytes of rows


class Product(NamedTuple):
    """factor += scale X^T X, with one more column of `ones` in X = rows, of this `version`, or without."""

    factor: Tensor
    rows: Tensor
    scale: float
    ones: bool
    version: int


class ProductQueue:
    """Products that wait. `taking` sends those of a layer here; whoever reads factors calls `flush` first."""

    def __init__(self) -> None:
        self._waiting: list[Product] = []
        self._factors: set[int] = set()
        self._bytes = 0
        self._pass = -1  # backward pass whose end empties the queue
        self._stream: torch.cuda.Stream | None = None

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Inside, `add_product_` puts products that can be grouped into this queue."""
        token = _taking.set(self)
        try:
            yield
        finally:
            _taking.reset(token)

    def add(self, product: Product) -> None:
        """Let a product wait; several of one factor would write it at the same time, so the first ones go ahead."""
        current = torch._C._current_graph_task_id()
        stream = torch.cuda.current_stream(product.rows.device) if product.rows.device.type == "cuda" else None
        address = product.factor.data_ptr()
        if address in self._factors or self._bytes > LIMIT or stream != self._stream or current != self._pass:
            self.flush()
        self._stream = stream
        self._waiting.append(product)
        self._factors.add(address)
        self._bytes += product.rows.numel() * product.rows.itemsize
        if current == -1:  # outside of a backward pass
            self.flush()
        elif current != self._pass:
            Variable._execution_engine.queue_callback(self.flush)
        self._pass = current

    def flush(self) -> None:
        """Add all products to their factors."""
        if self._waiting:
            self._add_all()

    @stage("factors", payload=lambda queue: sum((cost_of(p) for p in queue._waiting), NOTHING))
    def _add_all(self) -> None:
        factors, rows, scales, ones, versions = (list(column) for column in zip(*self._waiting, strict=True))
        self.clear()
        if any(x._version != version for x, version in zip(rows, versions, strict=True)):
            raise ChangedInputError(
                "expected the inputs of layers and the gradients of their outputs to stay as they are during a "
                "backward pass, got one that was changed in place; triton_curv.blocks.products.LIMIT = 0 takes "
                "statistics at once"
            )
        alphas = scales[0] if len(set(scales)) == 1 else scales
        if self._stream is None or self._stream == (now := torch.cuda.current_stream(self._stream.device)):
            accumulate_factors_(factors, rows, alphas, 1.0, ones)
            return
        with torch.cuda.stream(self._stream):  # where rows are made, and freed
            accumulate_factors_(factors, rows, alphas, 1.0, ones)
        now.wait_stream(self._stream)

    def clear(self) -> None:
        """Forget all products."""
        if self._waiting:
            self._waiting, self._factors, self._bytes = [], set(), 0


_taking: ContextVar[ProductQueue | None] = ContextVar("taking", default=None)


def cost_of(product: Product) -> Cost:
    """Of one product."""
    rows, factor = product.rows, product.factor
    return factor_cost(rows.shape[-2], factor.shape[-1], math.prod(rows.shape[:-2]), rows.element_size())


def waiting() -> bool:
    """Whether products that are added now wait for others: they cost something later."""
    return _taking.get() is not None


def add_product_(factor: Tensor, rows: Tensor, scale: float = 1.0, ones: bool = False) -> None:
    """`accumulate_factor_(factor, rows, scale, ones=ones)`, now or, within `ProductQueue.taking`, with others."""
    queue = None if torch.compiler.is_compiling() else _taking.get()
    if queue is None or not supports(factor, rows):
        accumulate_factor_(factor, rows, scale, ones=ones)
    else:
        queue.add(Product(factor, rows.detach(), scale, ones, rows._version))


def waits_for_others(tensor: Tensor) -> bool:
    """Whether products on the tensor's device are grouped: where kernels run, and outside of traces."""
    return LIMIT > 0 and not torch.compiler.is_compiling() and not use_reference(tensor)
