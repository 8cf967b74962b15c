"""Which Fisher: the loss gradients that are sent back through the model to make G.

For one unit with output z and loss l(z), the Fisher of the model's own distribution is J^T H J with H = E[s s^T], the
Hessian of l for the losses here. "sampled" draws one s, "exact" sends back all columns of a root of H.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from triton_curv.errors import ConfigurationError

FisherName = Literal["empirical", "sampled", "exact"]
Loss = Literal["cross_entropy", "mse"] | Distribution


class Signal(NamedTuple):
    """A tensor of the model's graph and the gradient to send back from it; None for a scalar."""

    source: Tensor
    gradient: Tensor | None


class Signals(NamedTuple):
    """N, and what to send back, one backward pass each; their outer products add up to N E[s s^T]."""

    units: Tensor | float
    passes: Iterator[Signal]


def signals(
    output: Tensor, loss: Loss, *, exact: bool, mask: Tensor | None, dim: int, generator: torch.Generator
) -> Signals:
    """The signals of `loss` at `output`: see `KFAC.sample_fisher`."""
    if isinstance(loss, Distribution):
        if exact:
            raise ConfigurationError(
                f"expected fisher='sampled' for a distribution, got 'exact' and {type(loss).__name__}: the sum over "
                "outputs is known for 'cross_entropy' and 'mse' only"
            )
        return _of_distribution(loss, mask)
    if loss not in ("cross_entropy", "mse"):
        raise ConfigurationError(f"expected loss 'cross_entropy', 'mse' or a torch Distribution, got {loss!r}")
    if not output.requires_grad:
        raise ConfigurationError("expected the model's output with its graph, got one that requires no gradient")
    if loss == "cross_entropy":
        return _of_cross_entropy(output, mask, dim % output.dim(), exact, generator)
    return _of_mse(output, mask, exact, generator)


def _check_mask(mask: Tensor, shape: torch.Size, what: str) -> None:
    if mask.shape != shape[: mask.dim()] or mask.dim() == 0:
        raise ConfigurationError(
            f"expected a mask with the leading sizes of {what} {tuple(shape)}, got {tuple(mask.shape)}"
        )


def _of_cross_entropy(
    output: Tensor, mask: Tensor | None, dim: int, exact: bool, generator: torch.Generator
) -> Signals:
    logits = output.detach().movedim(dim, -1)
    probabilities = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    units = logits.shape[:-1]
    if mask is not None and mask.shape != units:
        raise ConfigurationError(f"expected a mask of the units' shape {tuple(units)}, got {tuple(mask.shape)}")
    weight = probabilities.new_ones(()) if mask is None else mask.to(probabilities.dtype)[..., None]
    classes = torch.arange(logits.shape[-1], device=output.device)

    def signal(chosen: Tensor, size: Tensor | float) -> Signal:
        s = (probabilities - (chosen[..., None] == classes).to(probabilities.dtype)) * weight * size
        return Signal(output, s.movedim(-1, dim).to(output.dtype))

    def passes() -> Iterator[Signal]:
        if not exact:
            race = torch.empty_like(probabilities).exponential_(generator=generator)
            yield signal((probabilities / race).argmax(-1), 1.0)
            return
        signs = _signs(units, probabilities, generator)
        for k in range(logits.shape[-1]):  # H = diag(p) - p p^T = sum_k p_k (e_k - p)(e_k - p)^T
            yield signal(classes[k].expand(units), probabilities[..., k : k + 1].sqrt() * signs)

    return Signals(float(units.numel()) if mask is None else mask.sum(), passes())


def _of_mse(output: Tensor, mask: Tensor | None, exact: bool, generator: torch.Generator) -> Signals:
    if mask is not None:
        _check_mask(mask, output.shape, "the output")
    units = output.shape[: 1 if mask is None else mask.dim()]
    numbers = max(output.numel() // max(units.numel(), 1), 1)  # the mean over them is one unit's loss
    wide = torch.promote_types(output.dtype, torch.float32)
    weight = torch.full(units, (2 / numbers) ** 0.5, dtype=wide, device=output.device)
    if mask is not None:
        weight = weight * mask

    def passes() -> Iterator[Signal]:
        shape = (*units, numbers)
        if not exact:
            noise = torch.empty(shape, dtype=wide, device=output.device).normal_(generator=generator)
            yield Signal(output, (noise * weight[..., None]).reshape(output.shape).to(output.dtype))
            return
        signs = _signs(units, weight, generator)
        for k in range(numbers):
            s = torch.zeros(shape, dtype=wide, device=output.device)
            s[..., k] = weight * signs[..., 0]
            yield Signal(output, s.reshape(output.shape).to(output.dtype))

    return Signals(float(units.numel()) if mask is None else mask.sum(), passes())


def _of_distribution(distribution: Distribution, mask: Tensor | None) -> Signals:
    with torch.no_grad():
        drawn = distribution.sample()
    with torch.enable_grad():
        scores: Tensor = distribution.log_prob(drawn)
        if not scores.requires_grad:
            raise ConfigurationError("expected a distribution of the model's output, got one that requires no gradient")
        if mask is not None:
            _check_mask(mask, scores.shape, "log_prob")
            scores = scores * mask.reshape(mask.shape + (1,) * (scores.dim() - mask.dim()))
        total = -scores.sum()
    return Signals(
        float(len(scores) if scores.dim() else 1) if mask is None else mask.sum(), iter([Signal(total, None)])
    )


def _signs(units: torch.Size, like: Tensor, generator: torch.Generator) -> Tensor:
    """(units..., 1) of 1; of random signs where a sample has several units: their cross terms vanish on average."""
    if len(units) == 1:
        return like.new_ones((*units, 1))
    return torch.empty((*units, 1), dtype=like.dtype, device=like.device).bernoulli_(0.5, generator=generator) * 2 - 1
