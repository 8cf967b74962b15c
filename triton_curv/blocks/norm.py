"""Normalisation layers: the Fisher of scale and shift, per channel (2x2), diagonal or full."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import GroupNorm, LayerNorm, Module, Parameter, RMSNorm, functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from triton_curv.blocks.options import LayerOptions
from triton_curv.blocks.rows import samples_first
from triton_curv.blocks.rule import FactorShape, Uses
from triton_curv.costs import Cost, factor_cost
from triton_curv.nvtx import stage


def norm_cost(total: Tensor, inputs: Tensor) -> Cost:
    """Of F += sum_n v_n v_n^T, (batch, n, n): input and gradient read, a product and a sum a number for v."""
    fisher = factor_cost(len(inputs), total.shape[-1], len(total))
    return Cost(fisher.flops + 2 * inputs.numel(), fisher.bytes + 2 * inputs.numel() * inputs.element_size())


class NormRule(ABC):
    """F = E[v v^T], v = (sum_t g xhat, sum_t g) per channel, of a layer y = gamma xhat + beta.

    "unit" keeps the 2x2 block of each channel's scale and shift, "diagonal" only squares, "full" the whole (2c, 2c)
    matrix in the order [scale; shift]. Source: arXiv 2002.06015 section 4.2 (unit-wise), 1811.12019 section 4.
    Subclasses say what xhat is; channels are dimension 1 unless they say otherwise in `vectors`.
    """

    def __init__(self, module: Module, params: Mapping[str, Parameter], options: LayerOptions | None = None) -> None:
        self.module = module
        self.params = params
        self.options = options or LayerOptions()
        self.fisher = self.options.norm_fisher
        self.channels = next(iter(params.values())).numel()
        parts = len(params)
        note = f"empirical Fisher, {parts}x{parts} per channel" if parts > 1 else "empirical Fisher, diagonal"
        if self.fisher == "full" and parts * self.channels > self.options.max_factor_dim:
            self.fisher = "unit"
            note += f" (full has more than {self.options.max_factor_dim} rows)"
        if self.fisher == "unit":
            shape = FactorShape(self.channels, parts)
        elif self.fisher == "diagonal":
            shape, note = FactorShape(parts * self.channels, 1), "empirical Fisher, diagonal"
        else:
            shape, note = FactorShape(1, parts * self.channels), "empirical Fisher, exact"
        self.factor_shapes = {"F": shape}
        self.matrix_shape = (shape.batch, shape.size, 1)
        self.approximation = note

    @abstractmethod
    def normalised(self, inputs: Tensor, training: bool) -> Tensor:
        """xhat as the layer computed it."""

    def samples_and_signal(self, inputs: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """Both with the samples in dimension 0."""
        return inputs, grad_output

    def per_sample(self, values: Tensor) -> Tensor:
        """Values of the layer's output summed over positions, (samples, channels)."""
        spatial = list(range(2, values.dim()))
        return values.sum(spatial) if spatial else values

    @stage("factor G", payload=lambda rule, sums, inputs, *_: norm_cost(sums["F"], inputs))
    def accumulate_(self, sums: Mapping[str, Tensor], inputs: Tensor, grad_output: Tensor, training: bool) -> Uses:
        """F += sum_n v_n v_n^T."""
        total = sums["F"]
        inputs, signal = self.samples_and_signal(inputs.to(total.dtype), grad_output.to(total.dtype))
        parts = [signal * self.normalised(inputs, training) if name == "weight" else signal for name in self.params]
        vectors = torch.stack([self.per_sample(part) for part in parts])  # (parts, n, c)
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
        if self.fisher == "unit":
            flat = {name: matrix[:, i, 0] for i, name in enumerate(self.params)}
        else:
            whole, c = matrix.view(-1), self.channels
            flat = {name: whole[i * c : (i + 1) * c] for i, name in enumerate(self.params)}
        return {name: part.unflatten(0, self.params[name].shape) for name, part in flat.items()}

    def present(self, name: str, factor: Tensor) -> Tensor:
        """Unit (c, 2, 2); diagonal (2c,); full (2c, 2c)."""
        return {"unit": factor, "diagonal": factor.flatten(), "full": factor[0]}[self.fisher]


class BatchNormRule(NormRule):
    """`torch.nn.BatchNorm1d/2d/3d`: batch statistics in training, running ones in evaluation."""

    module: _BatchNorm

    def normalised(self, inputs: Tensor, training: bool) -> Tensor:
        """xhat as the layer computed it."""
        mean, variance = self.module.running_mean, self.module.running_var
        if training or mean is None or variance is None:
            return functional.batch_norm(inputs, None, None, training=True, eps=self.module.eps)
        return functional.batch_norm(
            inputs, mean.to(inputs.dtype), variance.to(inputs.dtype), training=False, eps=self.module.eps
        )


class InstanceNormRule(NormRule):
    """`torch.nn.InstanceNorm1d/2d/3d` with `affine=True`; an input without a batch dimension is one sample."""

    module: _InstanceNorm

    def samples_and_signal(self, inputs: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """Both as (samples, channels, *spatial)."""
        lone = inputs.dim() == self.module._get_no_batch_dim()
        return (inputs[None], grad_output[None]) if lone else (inputs, grad_output)

    def normalised(self, inputs: Tensor, training: bool) -> Tensor:
        """xhat as the layer computed it."""
        mean, variance = self.module.running_mean, self.module.running_var
        if training or mean is None or variance is None:
            return functional.instance_norm(inputs, eps=self.module.eps)
        mean, variance = mean.to(inputs.dtype), variance.to(inputs.dtype)
        return functional.instance_norm(inputs, mean, variance, use_input_stats=False, eps=self.module.eps)


class GroupNormRule(NormRule):
    """`torch.nn.GroupNorm`."""

    module: GroupNorm

    def normalised(self, inputs: Tensor, training: bool) -> Tensor:
        """xhat as the layer computed it."""
        return functional.group_norm(inputs, self.module.num_groups, eps=self.module.eps)


class LayerNormRule(NormRule):
    """`torch.nn.LayerNorm` and `torch.nn.RMSNorm`: all of `normalized_shape` are channels, what is before it positions.

    A sample's positions are summed, which is exact, whatever `weight_sharing` says.
    """

    module: LayerNorm | RMSNorm

    def samples_and_signal(self, inputs: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """Both as (samples, positions..., *normalized_shape)."""
        features, batch_dim = len(self.module.normalized_shape), self.options.batch_dim
        return samples_first(inputs, batch_dim, features), samples_first(grad_output, batch_dim, features)

    def per_sample(self, values: Tensor) -> Tensor:
        """Values of the layer's output summed over positions, (samples, channels)."""
        samples, *positions = values.shape[: values.dim() - len(self.module.normalized_shape)]
        return values.reshape(samples, math.prod(positions), self.channels).sum(1)

    def normalised(self, inputs: Tensor, training: bool) -> Tensor:
        """xhat as the layer computed it."""
        shape = list(self.module.normalized_shape)
        if isinstance(self.module, RMSNorm):
            eps = self.module.eps if self.module.eps is not None else torch.finfo(self.module.weight.dtype).eps
            return functional.rms_norm(inputs, shape, eps=eps)
        return functional.layer_norm(inputs, shape, eps=self.module.eps)
