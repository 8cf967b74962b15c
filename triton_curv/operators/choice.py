"""Which of several ways to compute the same product is the fastest that works, measured once."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from triton_curv.operators.errors import UnsupportedOpError
from triton_curv.operators.vectors import Vectors

Product = Callable[[Vectors], Vectors]

REPETITIONS = 3


@dataclass(frozen=True)
class Choice:
    """A chosen method's name, the seconds a product of each took, and why others can't be used."""

    name: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        times = ", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in self.seconds.items())
        failures = "; ".join(f"not {name}: {why}" for name, why in self.failed.items())
        notes = "; ".join(filter(None, (times, failures)))
        return f"{self.name} ({notes or 'as asked for'})"


def fastest(products: Mapping[str, Product], vectors: Vectors) -> Choice:
    """Time a product by each method, the least of a few after one that also builds what it reuses.

    Raises:
        UnsupportedOpError: none of them works.

    """
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    error: UnsupportedOpError | None = None
    for name, product in products.items():
        try:
            product(vectors)
        except UnsupportedOpError as unsupported:
            error = unsupported
            failed[name] = f"{unsupported.op} can't be differentiated so"
            continue
        seconds[name] = min(_seconds(product, vectors) for _ in range(REPETITIONS))
    if not seconds:
        assert error is not None, "no methods given"
        raise error
    return Choice(min(seconds, key=lambda name: seconds[name]), seconds, failed)


def _seconds(product: Product, vectors: Vectors) -> float:
    _wait(vectors)
    start = time.perf_counter()
    product(vectors)
    _wait(vectors)
    return time.perf_counter() - start


def _wait(vectors: Vectors) -> None:
    if vectors[0].device.type == "cuda":
        torch.cuda.synchronize(vectors[0].device)
