"""Augmentation of the paper as transforms of whole batches, on tensors of any device: running mixup, random erasing."""

import torch
from torch import Tensor

from triton_curv.errors import ConfigurationError


class RunningMixup:
    """x~_t = lam x_t + (1 - lam) x~_{t-1}, the same for targets; lam ~ Beta(alpha, alpha), one for each sample.

    lam is replaced by max(lam, 1 - lam), x~_0 = x_0. What is carried is the virtual batch as it was returned:
    transforms that work in place afterwards (random erasing in the authors' code) reach the next batch too. A smaller
    last batch is mixed with the first rows of the one before; rows of a larger one without a partner stay as they are.
    Source: arXiv 2002.06015 section 5.3 and chainerkfac.

    Args:
        alpha: of the Beta distribution, positive; 0 mixes nothing.
        generator: of the random numbers, on the CPU; torch's global one by default.

    Raises:
        ConfigurationError: alpha < 0, or inputs and targets of different length.

    """

    def __init__(self, alpha: float, generator: torch.Generator | None = None) -> None:
        if not alpha >= 0:
            raise ConfigurationError(f"expected alpha >= 0, got {alpha}")
        self.alpha = alpha
        self.generator = generator
        self.last: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """inputs (n, ...) and targets (n, classes) of a floating-point dtype -> fresh tensors of the same shapes."""
        if len(inputs) != len(targets) or not (inputs.is_floating_point() and targets.is_floating_point()):
            raise ConfigurationError(
                "expected as many floating-point targets (one-hot rows) as inputs, got "
                f"{tuple(inputs.shape)} {inputs.dtype} and {tuple(targets.shape)} {targets.dtype}"
            )
        mixed = (inputs.clone(), targets.clone())
        if self.last is not None and self.alpha > 0:
            rows = min(len(inputs), len(self.last[0]))
            lam = self._draw(rows)
            for fresh, old in zip(mixed, self.last, strict=True):
                weight = lam.to(fresh.device, fresh.dtype).view(-1, *[1] * (fresh.dim() - 1))
                fresh[:rows] = weight * fresh[:rows] + (1 - weight) * old[:rows]
        self.last = mixed
        return mixed

    def _draw(self, rows: int) -> Tensor:
        """max(lam, 1 - lam) of lam ~ Beta(alpha, alpha), (rows,)."""
        shape = torch.full((2, rows), self.alpha, dtype=torch.float64)
        # a Beta variable is a share of two Gamma variables; this is the one that takes a generator
        gamma = torch._standard_gamma(shape, generator=self.generator).clamp_min(torch.finfo(torch.float64).tiny)
        lam = gamma[0] / gamma.sum(0)
        return torch.maximum(lam, 1 - lam)

    def state_dict(self) -> dict[str, Tensor]:
        """The carried batch; the generator's state is its owner's."""
        return {} if self.last is None else {"inputs": self.last[0].clone(), "targets": self.last[1].clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`."""
        self.last = (state["inputs"].clone(), state["targets"].clone()) if state else None


class RandomErasing:
    """Sets a rectangle of each image to 0 with probability p: area share in `area`, aspect in `aspect`, in place.

    Height and width are swapped with probability 1/2; a rectangle larger than the image is cut to it, its place is
    uniform. Source: arXiv 2002.06015 section 5.3 (p = 0.5, area in [0.02, 0.25], aspect in [0.3, 1], zeros).

    Raises:
        ConfigurationError: a probability or range out of [0, 1], or inputs that are not (n, channels, height, width).

    """

    def __init__(
        self,
        p: float = 0.5,
        area: tuple[float, float] = (0.02, 0.25),
        aspect: tuple[float, float] = (0.3, 1.0),
        generator: torch.Generator | None = None,
    ) -> None:
        if not 0 <= p <= 1 or not 0 <= area[0] <= area[1] <= 1 or not 0 < aspect[0] <= aspect[1] <= 1:
            raise ConfigurationError(
                f"expected p and ranges in [0, 1] with positive aspects, got {p=}, {area=}, {aspect=}"
            )
        self.p, self.area, self.aspect, self.generator = p, area, aspect, generator

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """Erase in inputs (n, channels, height, width); returns them."""
        if inputs.dim() != 4:
            raise ConfigurationError(f"expected (n, channels, height, width), got {tuple(inputs.shape)}")
        samples, _, height, width = inputs.shape
        u = torch.rand(6, samples, generator=self.generator, dtype=torch.float64)
        share = self.area[0] + u[0] * (self.area[1] - self.area[0])
        aspect = self.aspect[0] + u[1] * (self.aspect[1] - self.aspect[0])
        long, short = (share * height * width / aspect).sqrt(), (share * height * width * aspect).sqrt()
        swap = u[2] < 0.5
        h = torch.where(swap, long, short).round().clamp(1, height)
        w = torch.where(swap, short, long).round().clamp(1, width)
        top, left = (u[3] * (height - h + 1)).floor(), (u[4] * (width - w + 1)).floor()
        rows, columns = torch.arange(height)[None], torch.arange(width)[None]
        inside_rows = (rows >= top[:, None]) & (rows < (top + h)[:, None]) & (u[5] < self.p)[:, None]
        inside_columns = (columns >= left[:, None]) & (columns < (left + w)[:, None])
        erased = (inside_rows[:, :, None] & inside_columns[:, None, :]).to(inputs.device)
        return inputs.masked_fill_(erased[:, None], 0.0)
