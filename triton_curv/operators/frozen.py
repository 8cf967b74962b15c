"""A closure that can be run again as if for the first time: same random numbers, buffers untouched."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from triton_curv.sharding.weights import Weights

Closure = Callable[[], Any]
Consumer = Callable[[Any], None]


class DifferentiableOps(TorchFunctionMode):
    """`F.mse_loss(z, t)` as `(z - t).square()` and its reduction.

    torch's own backward formula writes into a tangent that may be an immutable zero tensor under forward AD
    (pytorch#123996).
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Replace `F.mse_loss`, pass everything else on."""
        kwargs = kwargs or {}
        return plain_mse_loss(*args, **kwargs) if func is F.mse_loss else func(*args, **kwargs)


def plain_mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """`F.mse_loss` in elementary ops, with the same arguments."""
    if size_average is not None or reduce is not None:
        reduction = nn._reduction.legacy_get_string(size_average, reduce, emit_warning=False)
    squares = (input - target).square()
    if weight is not None:
        squares = squares * weight
        if reduction == "mean":
            return squares.sum() / weight.expand_as(squares).sum()
    return squares if reduction == "none" else squares.mean() if reduction == "mean" else squares.sum()


@contextmanager
def replaced(model: nn.Module, replacements: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Let the model work with other tensors in place of some of its parameters and buffers, wherever they occur.

    `torch.func.functional_call`, which does this by name, leaves the replacements behind in a submodule that is
    registered under two names (2.13).
    """
    slots: list[tuple[dict[str, Any], str, Tensor]] = [
        (tensors, name, tensor)
        for module in model.modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None and tensor in replacements
    ]
    try:
        for tensors, name, tensor in slots:
            tensors[name] = replacements[tensor]
        yield
    finally:
        for tensors, name, tensor in slots:
            tensors[name] = tensor


class FrozenClosure:
    """`closure()` for the length of one solve.

    `first` runs it as it is: buffers of the model (BatchNorm's running statistics) move on, random numbers are drawn.
    `again` repeats that run: torch's generators on CPU and on the parameters' device start where they started the first
    time and are put back afterwards, and the model works on clones of its buffers. So every run has the same dropout
    masks, running statistics are touched once, and later random numbers do not depend on how often it was run. Other
    sources of randomness (Python's `random`, own generators, a data loader) must be kept out of the closure.

    scaled_dot_product_attention takes the math backend: the others have no second derivatives. For the same reason
    functions that `torch.compile` made, the model itself perhaps, run uncompiled while `eager`: aot_autograd has no
    double backward.

    A closure may return one result, a list of results or a generator of them, one for each micro-batch; their losses
    add up. The graphs of a list are all kept and reused. A generator (`streams`) is run again for each product, so
    only one micro-batch's graph is alive at a time.

    `weights` say what stands in the place of parameters in all passes (`Weights`); none by default.

    After the first run `streams` and `several` (a list or a generator) tell what it returned, `draws` whether it drew
    random numbers.
    """

    def __init__(self, model: nn.Module, closure: Closure, weights: Weights | None = None, eager: bool = True) -> None:
        self.model = model
        self.closure = closure
        self.weights = Weights([]) if weights is None else weights
        self.eager = eager
        self._devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
        self._start: list[Tensor] = []
        self.streams = False
        self.several = False
        self.draws = False

    def first(self, consume: Consumer) -> None:
        """Run the closure for real and hand every result to `consume`."""
        self._start = self._random_state()
        weights = self.weights
        inside = replaced(self.model, weights.stand_ins) if weights.stand_ins else nullcontext()
        with weights.around_first(), inside, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            self._run(consume)
        now = self._random_state()
        self.draws = any(not torch.equal(a, b) for a, b in zip(self._start, now, strict=True))

    def again(self, consume: Consumer, replacements: Mapping[Tensor, Tensor] | None = None) -> None:
        """Repeat the first run, with other tensors in place of some that it was run with, if given."""
        given = replacements or {}
        tensors = {buffer: buffer.clone() for buffer in self.model.buffers()}
        tensors.update({p: given.get(tensor, tensor) for p, tensor in self.weights.stand_ins.items()})
        tensors.update(given)
        with (
            self.weights.around_again(),
            self._rewound(),
            sdpa_kernel(SDPBackend.MATH),
            replaced(self.model, tensors),
        ):
            self._run(consume)

    def _run(self, consume: Consumer) -> None:
        with torch.compiler.set_stance("force_eager") if self.eager else nullcontext():
            self._consume(consume)

    def _consume(self, consume: Consumer) -> None:
        results = self.closure()
        self.streams = isinstance(results, GeneratorType)
        self.several = isinstance(results, list | GeneratorType)
        for result in results if self.several else [results]:
            consume(result)

    def _random_state(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]

    @staticmethod
    def _set_random_state(states: Sequence[Tensor], devices: Sequence[torch.device]) -> None:
        torch.set_rng_state(states[0])
        for state, device in zip(states[1:], devices, strict=True):
            torch.cuda.set_rng_state(state, device)

    @contextmanager
    def _rewound(self) -> Iterator[None]:
        now = self._random_state()
        self._set_random_state(self._start, self._devices)
        try:
            yield
        finally:
            self._set_random_state(now, self._devices)
