"""Kronecker factors and norm-layer Fishers by Python loops over samples, positions and channels.

With N samples, T positions that share the weight, layer inputs a_nt (patches for a convolution, a 1 appended
for a bias) and gradients g_nt of the sample's loss at the layer's output:
A = (1/N) sum_n (1/T) sum_t a_nt a_nt^T, G = (1/N) sum_n sum_t g_nt g_nt^T, one pair a group.
No unfold, no pad, no einsum.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


@dataclass(frozen=True)
class Call:
    """One call of a layer: its input (N, ...) and the per-sample losses' gradients at its output (N, ...)."""

    inputs: Array
    output_grads: Array


def observe(model: nn.Module, name: str, loss: Callable[[nn.Module], Tensor], samples: int) -> list[Call]:
    """Return the calls of the layer `name` in one forward; g is samples times the mean loss's gradient.

    Call it before KFAC attaches to the model: a deep copy shares the hooks.
    """
    twin = copy.deepcopy(model)
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        seen.append((args[0].detach().clone(), output))

    twin.get_submodule(name).register_forward_hook(keep)
    torch.autograd.backward(loss(twin))
    calls = []
    for inputs, output in seen:
        assert output.grad is not None
        calls.append(Call(inputs.numpy(), samples * output.grad.numpy()))
    return calls


def padding_amounts(layer: Conv) -> list[tuple[int, int]]:
    """Return the (before, after) padding of every spatial dimension; 'same' puts the odd one after."""
    if layer.padding == "valid":
        return [(0, 0)] * len(layer.kernel_size)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(amount), int(amount)) for amount in layer.padding]


def source_index(index: int, size: int, mode: str) -> int | None:
    """Return the input coordinate read at `index`, outside 0..size-1 in the padding; None reads 0."""
    if 0 <= index < size:
        return index
    if mode == "zeros":
        return None
    if mode == "circular":
        return index % size
    if mode == "replicate":
        return 0 if index < 0 else size - 1
    assert mode == "reflect"
    return -index if index < 0 else 2 * (size - 1) - index


def conv_patches(layer: Conv, inputs: Array) -> Array:
    """Return patches (N, T, groups, n), columns ordered as in weight.reshape(out, -1)."""
    sizes, padding = inputs.shape[2:], padding_amounts(layer)
    extents = [
        (size + sum(pad) - dilation * (kernel - 1) - 1) // stride + 1
        for size, pad, dilation, kernel, stride in zip(
            sizes, padding, layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
    ]
    outputs = list(itertools.product(*map(range, extents)))
    offsets = list(itertools.product(*map(range, layer.kernel_size)))
    per_group = layer.in_channels // layer.groups
    patches = np.zeros((inputs.shape[0], len(outputs), layer.groups, per_group * len(offsets)))
    for t, output in enumerate(outputs):
        for k, offset in enumerate(offsets):
            where = [
                source_index(o * stride - pad[0] + d * dilation, size, layer.padding_mode)
                for o, d, stride, pad, dilation, size in zip(
                    output, offset, layer.stride, padding, layer.dilation, sizes, strict=True
                )
            ]
            if None in where:
                continue
            for n in range(inputs.shape[0]):
                for channel in range(layer.in_channels):
                    group, within = divmod(channel, per_group)
                    patches[n, t, group, within * len(offsets) + k] = inputs[(n, channel, *where)]
    return patches


def positions(layer: nn.Linear | Conv, call: Call) -> tuple[Array, Array]:
    """Return a (N, T, groups, n [+ 1]) and g (N, T, groups, out / groups) of one call."""
    samples = call.inputs.shape[0]
    if isinstance(layer, nn.Linear):
        a = call.inputs.reshape(samples, -1, 1, layer.in_features)
        g = call.output_grads.reshape(samples, -1, 1, layer.out_features)
    else:
        a = conv_patches(layer, call.inputs)
        channels_last = np.moveaxis(call.output_grads, 1, -1)
        g = channels_last.reshape(samples, -1, layer.groups, layer.out_channels // layer.groups)
    if layer.bias is not None:
        a = np.concatenate([a, np.ones((*a.shape[:-1], 1))], axis=-1)
    return a, g


def kronecker_factors(layer: nn.Linear | Conv, calls: list[Call]) -> dict[str, Tensor]:
    """Return {"A": (groups, n, n), "G": (groups, o, o)}, without the leading dimension for one group.

    The positions of all calls share one mean over T.
    """
    rows = [positions(layer, call) for call in calls]
    samples, _, groups, n = rows[0][0].shape
    o = rows[0][1].shape[-1]
    T = sum(a.shape[1] for a, _ in rows)
    A, G = np.zeros((groups, n, n)), np.zeros((groups, o, o))
    for a, g in rows:
        for sample, t, group in np.ndindex(a.shape[:3]):
            A[group] += np.outer(a[sample, t, group], a[sample, t, group]) / T / samples
        for sample, t, group in np.ndindex(g.shape[:3]):
            G[group] += np.outer(g[sample, t, group], g[sample, t, group]) / samples
    factors = {"A": torch.from_numpy(A), "G": torch.from_numpy(G)}
    return factors if groups > 1 else {key: factor[0] for key, factor in factors.items()}


def norm_gradients(layer: BatchNorm, call: Call) -> Array:
    """Return (N, c, 2): per sample sum_t g xhat and sum_t g, the gradients of gamma and beta."""
    samples, channels = call.inputs.shape[:2]
    x = call.inputs.reshape(samples, channels, -1)
    g = call.output_grads.reshape(samples, channels, -1)
    grads = np.zeros((samples, channels, 2))
    for c in range(channels):
        if layer.training or layer.running_mean is None or layer.running_var is None:
            mean, variance = float(x[:, c].mean()), float(x[:, c].var())
        else:
            mean, variance = float(layer.running_mean[c]), float(layer.running_var[c])
        for sample, t in itertools.product(range(samples), range(x.shape[2])):
            xhat = (x[sample, c, t] - mean) / math.sqrt(variance + layer.eps)
            grads[sample, c] += g[sample, c, t] * np.array([xhat, 1.0])
    return grads


def norm_fisher(layer: BatchNorm, calls: list[Call], kind: str) -> dict[str, Tensor]:
    """Return {"F": (1/N) sum_n h_n h_n^T} of one call.

    (c, 2, 2) for unit; in the order [gamma; beta] (2c,) for diagonal and (2c, 2c) for full.
    """
    (call,) = calls
    grads = norm_gradients(layer, call)
    samples, channels = grads.shape[:2]
    unit = np.zeros((channels, 2, 2))
    full = np.zeros((2 * channels, 2 * channels))
    for h in grads:
        for c in range(channels):
            unit[c] += np.outer(h[c], h[c]) / samples
        stacked = h.T.reshape(-1)
        full += np.outer(stacked, stacked) / samples
    fishers: dict[str, Any] = {"unit": unit, "full": full, "diagonal": full.diagonal().copy()}
    return {"F": torch.from_numpy(fishers[kind])}
