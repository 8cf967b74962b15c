"""Batch normalisation: the Fisher of scale and shift, per channel (2x2), diagonal or full."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter, functional
from torch.nn.modules.batchnorm import _BatchNorm

from triton_curv.blocks.rule import FactorShape, Uses

NormFisher = Literal["unit", "diagonal", "full"]


class BatchNormRule:
    """F = E[v v^T], v = (sum_t g xhat, sum_t g) per channel, for `torch.nn.BatchNorm1d/2d/3d`.

    "unit" keeps the 2x2 block of each channel's scale and shift, "diagonal" only squares, "full" the whole (2c, 2c)
    matrix in the order [scale; shift]. Source: arXiv 2002.06015 section 4.2 (unit-wise), 1811.12019 section 4.
    """

    def __init__(self, module: _BatchNorm, params: Mapping[str, Parameter], fisher: NormFisher) -> None:
        self.module = module
        self.params = params
        self.fisher = fisher
        channels, parts = module.num_features, len(params)
        if fisher == "unit":
            shape = FactorShape(channels, parts)
        elif fisher == "diagonal":
            shape = FactorShape(parts * channels, 1)
        else:
            shape = FactorShape(1, parts * channels)
        self.factor_shapes = {"F": shape}
        self.matrix_shape = (shape.batch, shape.size, 1)
        self.approximation = {
            "unit": "empirical Fisher, 2x2 per channel",
            "diagonal": "empirical Fisher, diagonal",
            "full": "empirical Fisher, exact",
        }[fisher]

    def normalised(self, inputs: Tensor, training: bool) -> Tensor:
        """xhat as the layer computed it: batch statistics in training, running ones in evaluation."""
        mean, variance = self.module.running_mean, self.module.running_var
        if training or mean is None or variance is None:
            return functional.batch_norm(inputs, None, None, training=True, eps=self.module.eps)
        return functional.batch_norm(
            inputs, mean.to(inputs.dtype), variance.to(inputs.dtype), training=False, eps=self.module.eps
        )

    def accumulate_(self, sums: Mapping[str, Tensor], inputs: Tensor, grad_output: Tensor, training: bool) -> Uses:
        """F += sum_n v_n v_n^T."""
        total = sums["F"]
        inputs, signal = inputs.to(total.dtype), grad_output.to(total.dtype)
        spatial = list(range(2, inputs.dim()))
        wanted = {
            "weight": lambda: signal * self.normalised(inputs, training),
            "bias": lambda: signal,
        }
        parts = [wanted[name]() for name in self.params]
        vectors = torch.stack([part.sum(spatial) if spatial else part for part in parts])  # (parts, n, c)
        if self.fisher == "unit":
            rows = vectors.permute(2, 1, 0)  # (c, n, parts)
            total.baddbmm_(rows.mT, rows)
        elif self.fisher == "diagonal":
            total.view(len(parts), -1).add_(vectors.square().sum(1))
        else:
            rows = vectors.transpose(0, 1).flatten(1)  # (n, parts * c)
            total[0].addmm_(rows.mT, rows)
        return Uses(samples=inputs.shape[0], rows=inputs.shape[0])

    def views(self, matrix: Tensor) -> dict[str, Tensor]:
        """Unit: (c, parts, 1); otherwise all scales, then all shifts."""
        channels = self.module.num_features
        if self.fisher == "unit":
            return {name: matrix[:, i, 0] for i, name in enumerate(self.params)}
        flat = matrix.view(-1)
        return {name: flat[i * channels : (i + 1) * channels] for i, name in enumerate(self.params)}

    def present(self, name: str, factor: Tensor) -> Tensor:
        """Unit (c, 2, 2); diagonal (2c,); full (2c, 2c)."""
        return {"unit": factor, "diagonal": factor.flatten(), "full": factor[0]}[self.fisher]
