"""Preconditioners of CG for lists of tensors."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_curv.errors import ConfigurationError
from triton_curv.operators.frozen import FrozenClosure
from triton_curv.operators.vectors import Vectors
from triton_curv.optimizers.kfac import KFAC
from triton_curv.sharding.ranks import Found

Preconditioner = Callable[[Vectors], Vectors]


def diagonal_preconditioner(gradient: Sequence[Tensor], damping: float | Tensor, exponent: float) -> Preconditioner:
    """r -> r / (g^2 + damping)^exponent, element by element.

    Source: Martens 2010 section 4.7 (exponent 3/4); arXiv 2006.02409, the authors' code.
    """
    scales = [(g.square() + damping).pow(-exponent) for g in gradient]
    return lambda vectors: list(torch._foreach_mul(vectors, scales))


def require_all_inverses(kfac: KFAC, found: Found) -> None:
    """Raise ConfigurationError unless K-FAC works on the ranks found, and gives each of them all inverses."""
    if kfac._found.ranks != found.ranks:
        raise ConfigurationError(f"expected a KFAC on ranks {list(found.ranks)}, got one on {list(kfac._found.ranks)}")
    if found.wrapper == "fsdp" or (len(found.ranks) > 1 and kfac._sharding.fraction < 1):
        raise ConfigurationError(
            "expected preconditioner 'identity' or 'diagonal' on several ranks, or without FSDP2 a KFAC with "
            f"Sharding(gather='inverses'), got {kfac._sharding} and the wrapper '{found.wrapper}'"
        )


class KFACPreconditioner:
    """r -> (A (x) G + damping)^-1 r, block by block of a KFAC optimizer of the same model; the identity elsewhere.

    The KFAC instance only serves its blocks: do not call its `step`. Its statistics come from an extra backward pass
    every `factor_interval` steps, its inverses are renewed right after; in all other passes its taps are off.
    """

    def __init__(self, kfac: KFAC, names: Mapping[Tensor, str]) -> None:
        self._kfac = kfac
        self.interval = kfac.factor_interval
        self.uncovered = sorted(set(names.values()) - {names[p] for b in kfac.blocks.values() for p in _params(b)})
        self.taps_off()

    def taps_off(self) -> None:
        """Let no pass through the model count as statistics."""
        self._kfac.capture(False)

    def refresh(self, closure: FrozenClosure, loss_of: Callable[[Any], Tensor], params: Sequence[Tensor]) -> None:
        """Take statistics at the weights as they are, and renew the inverses."""
        self._kfac.capture(True)
        try:
            with torch.enable_grad():
                closure.again(lambda result: _backward(loss_of(result), params))
        finally:
            self.taps_off()
        self._kfac.refresh()

    def on(self, params: Sequence[Tensor]) -> Preconditioner:
        """The preconditioner for vectors shaped as `params`; a block with frozen parameters sees zeros for them."""
        index = {p: i for i, p in enumerate(params)}
        blocks = [b for b in self._kfac.blocks.values() if any(p in index for p in _params(b))]

        def precondition(vectors: Vectors) -> Vectors:
            out = list(vectors)
            for block in blocks:
                own = block.rule.params
                given = {k: vectors[index[p]] if p in index else torch.zeros_like(p) for k, p in own.items()}
                for key, tensor in block.precondition(given).items():
                    if own[key] in index:
                        out[index[own[key]]] = tensor
            return out

        return precondition


def _params(block: Any) -> list[Tensor]:
    return list(block.rule.params.values())


def _backward(loss: Tensor, params: Sequence[Tensor]) -> None:
    torch.autograd.grad(loss, params, allow_unused=True)
