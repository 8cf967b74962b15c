"""Second moments of per-sample gradients in a Kronecker eigenbasis: what EKFAC scales its directions with."""

from collections.abc import Mapping

import torch
from torch import Tensor

from triton_curv.blocks.conv import ConvRule
from triton_curv.blocks.dense import DenseRule
from triton_curv.blocks.patches import patch_rows
from triton_curv.blocks.rule import Rule

CHUNK = 1 << 22  # numbers of per-sample gradients alive at a time


def has_sample_rows(rule: Rule) -> bool:
    """Whether `sample_rows` knows the layer family: its rows are those of A and G, samples first."""
    if isinstance(rule, DenseRule):
        return rule.options.weight_sharing == "expand" and rule.options.batch_dim == 0
    return type(rule) is ConvRule


def sample_rows(rule: Rule, inputs: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """X (groups, samples, positions, columns), S (groups, samples, positions, rows): S^T X is a sample's gradient."""
    groups, rows, _ = rule.matrix_shape
    if isinstance(rule, ConvRule):
        if inputs.dim() == len(rule.module.kernel_size) + 1:
            inputs, grad_output = inputs[None], grad_output[None]
        samples = len(inputs)
        patches = patch_rows(rule.module, inputs)[..., rule.weight_order[: rule.fan_in]]
        X = patches.reshape(groups, samples, -1, rule.fan_in)
        S = grad_output.reshape(samples, groups, rows, -1).permute(1, 0, 3, 2)
    else:
        assert isinstance(rule, DenseRule)
        samples = len(inputs) if inputs.dim() > 1 else 1
        X = inputs.reshape(1, samples, -1, inputs.shape[-1])
        S = grad_output.reshape(1, samples, -1, rows)
    return (torch.nn.functional.pad(X, (0, 1), value=1.0) if rule.has_bias else X), S


class Moments:
    """E[(U_G^T g a^T U_A)^2] elementwise, g a^T summed over the positions of a sample: (batch, rows, columns).

    `averages` is in the basis that `bases` hold at the moment; `restart_` forgets it when they change. A layer called
    twice in a forward counts its calls as separate samples. Source: George et al., arXiv 1806.03884.
    """

    def __init__(self, rule: Rule, bases: Mapping[str, Tensor]) -> None:
        self.rule = rule
        self.bases = bases
        some = bases["A"]
        self.sums = torch.zeros(rule.matrix_shape, dtype=some.dtype, device=some.device)
        self.averages = torch.zeros_like(self.sums)
        self.folds = some.new_zeros(1)  # not 0-dim: graphs lose what they write to float64

    def accumulate_(self, inputs: Tensor, grad_output: Tensor) -> None:
        """sums += sum_n (sum_t (U_G^T g_nt) (U_A^T a_nt)^T)^2, some samples at a time."""
        dtype = self.sums.dtype
        X, S = sample_rows(self.rule, inputs.to(dtype), grad_output.to(dtype))
        X, S = X @ self.bases["A"][:, None], S @ self.bases["G"][:, None]
        if X.shape[2] == 1:  # the square of an outer product is the outer product of squares
            self.sums.baddbmm_(S[:, :, 0].square().mT, X[:, :, 0].square())
            return
        size = max(1, CHUNK // self.sums.numel())
        for x, s in zip(X.split(size, 1), S.split(size, 1), strict=True):
            self.sums.add_((s.mT @ x).square_().sum(1))

    def fold_(self, scale: Tensor, decay: float) -> None:
        """Average += its weight times (scale * sums - average); scale (batch,) is 0 for statistics not to be used."""
        usable = (scale > 0).all() & self.sums.sum().isfinite()
        weight = torch.where(usable, (1 - decay) / (1 - decay ** (self.folds + 1)), 0.0)
        fresh = torch.where(usable, self.sums * scale[:, None, None], self.averages)
        self.averages.lerp_(fresh, weight)
        self.folds.add_(usable)
        self.sums.zero_()

    def restart_(self) -> None:
        """The basis has changed: averages in the old one mean nothing."""
        self.folds.zero_()
        self.averages.zero_()
        self.sums.zero_()
