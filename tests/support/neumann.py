"""Algorithm 2 of arXiv 1712.03298 written out in NumPy over one flat float64 vector, and the same problem in torch."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from triton_curv.optimizers.neumann import Neumann

Array = NDArray[np.float64]

SHAPES = [(3, 4), (5,), (2, 2, 2)]
SIZE = 25
# alpha and beta at which neither term is small; resets of the main loop at t = 1, 8, 22, 50
STRONG: dict[str, Any] = {"alpha": 0.3, "beta": 0.02, "gamma": 0.9, "mu": (0.5, 0.9), "period": 7, "warmup": 6}

_rng = np.random.default_rng(0)
_root = _rng.normal(size=(SIZE, SIZE)) / SIZE**0.5
HESSIAN = _root @ _root.T + 0.1 * np.eye(SIZE)
BATCHES = _rng.normal(size=(200, SIZE))
START = _rng.normal(size=SIZE)


def gradient(w: Array, step: int) -> Array:
    """Gradient of a non-convex function that changes with the batch."""
    return np.asarray(HESSIAN @ w + 0.5 * np.sin(3 * w) + 0.3 * BATCHES[step])


class Trace(NamedTuple):
    """Weights after each step, and the last m, v and mu."""

    weights: list[Array]
    m: Array
    v: Array
    mu: float


def algorithm_2(
    steps: int,
    lr: float | Array,
    *,
    alpha: float,
    beta: float,
    gamma: float,
    mu: tuple[float, float],
    period: int,
    warmup: int,
) -> Trace:
    """The listing, line by line; K doubles after every reset but the one at t = 1, which opens the first period."""
    w, v, m, mu_t = START.copy(), START.copy(), np.zeros(SIZE), mu[0]
    weights = []
    for step in range(min(warmup, steps)):
        w = w - lr * gradient(w, step)
        weights.append(w)
    reset, K = 1, period
    for t in range(1, steps - warmup + 1):
        grad = gradient(w, warmup + t - 1)
        mu_t = float(np.clip(1 - 1 / (1 + t), *mu))
        if t == reset:
            m = -lr * grad
            reset, K = reset + K, 2 * K
        else:
            norm = np.linalg.norm(w - v)
            term = (alpha * norm**2 - beta * SIZE / norm**2) * (w - v) / norm if norm > 0 else 0.0
            d = grad + term
            m = mu_t * m - lr * d
            w = w + mu_t * m - lr * d
            v = w + gamma * (v - w)
        weights.append(w)
    return Trace(weights, m, v, mu_t)


def make_params(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    chunks = np.split(START, np.cumsum([np.prod(s) for s in SHAPES])[:-1])
    return [nn.Parameter(torch.tensor(c).reshape(s).to(dtype)) for c, s in zip(chunks, SHAPES, strict=True)]


def flat(tensors: list[Any]) -> Array:
    return np.concatenate([t.detach().double().numpy().ravel() for t in tensors])


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    """Put the gradient at the parameters into .grad."""
    pieces = np.split(gradient(flat(params), step), np.cumsum([p.numel() for p in params])[:-1])
    for p, g in zip(params, pieces, strict=True):
        p.grad = torch.from_numpy(g).reshape(p.shape).to(p.dtype)


def run(opt: Neumann, params: list[nn.Parameter], first: int, last: int) -> list[Array]:
    """Steps first <= step < last; the weights after each."""
    weights = []
    for step in range(first, last):
        give_gradients(params, step)
        opt.step()
        weights.append(flat(params))
    return weights


def state_of(opt: Neumann, params: list[nn.Parameter], name: str) -> Array:
    return flat([opt.state[p][name] for p in params])


def in_two_groups(params: list[nn.Parameter], cut: int) -> list[dict[str, Any]]:
    return [{"params": params[:cut]}, {"params": params[cut:], "lr": 0.02}]


def agree(opt: Neumann, params: list[nn.Parameter], lr: float | Array, settings: dict[str, Any], steps: int) -> bool:
    want = algorithm_2(steps, lr, **settings)
    got = run(opt, params, 0, steps)
    return all(np.allclose(a, b, rtol=0, atol=1e-11) for a, b in zip(got, want.weights, strict=True))
