"""Small double-precision models and losses, and their dense Hessians and Gauss-Newton matrices by torch.func."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation
from torch.nn.attention import SDPBackend, sdpa_kernel

from triton_curv.operators.vectors import Vectors

Loss = Callable[[Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Self-attention with a projection on each side."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(2, 6)
        self.out = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out(attended).mean(1)  # type: ignore[no-any-return]  # torch's modules return Any


class PlainNorm(nn.Module):
    """BatchNorm1d in training mode or LayerNorm, in elementary ops.

    torch.func.hessian and jacrev(jacrev) are wrong by 0.1 to 0.9 through F.batch_norm and F.layer_norm (torch 2.13):
    finite differences tell.
    """

    def __init__(self, like: nn.BatchNorm1d | nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = like.weight, like.bias, like.eps
        self.dim = 0 if isinstance(like, nn.BatchNorm1d) else -1

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(self.dim, keepdim=True)
        variance = centred.square().mean(self.dim, keepdim=True)
        return centred / (variance + self.eps).sqrt() * self.weight + self.bias


def _norm_net(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 3))


def _conv_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], Sequence[int]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), (5, 3)),
    "conv": (_conv_net, (5, 1, 4, 4)),
    "batch_norm": (lambda: _norm_net(nn.BatchNorm1d(4)), (6, 3)),
    "layer_norm": (lambda: _norm_net(nn.LayerNorm(4)), (5, 3)),
    "rms_norm": (lambda: _norm_net(nn.RMSNorm(4)), (5, 3)),
    "gelu": (lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3)), (5, 3)),
    "silu": (lambda: nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 3)), (5, 3)),
    "attention": (Attention, (4, 3, 2)),
}

LOSSES: dict[str, Loss] = {
    "cross_entropy": lambda z, y: F.cross_entropy(z, y.argmax(1)),
    "bce": lambda z, y: F.binary_cross_entropy_with_logits(z, (y > 0).to(z.dtype)),
    "mse": F.mse_loss,
    "smooth_l1": F.smooth_l1_loss,
}


class Problem(NamedTuple):
    """A model in float64, a batch for it and a loss."""

    model: nn.Module
    x: Tensor
    y: Tensor
    loss: Loss

    @property
    def named(self) -> dict[str, Tensor]:
        """The trained parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def params(self) -> Vectors:
        """The trained parameters."""
        return list(self.named.values())

    def loss_closure(self) -> Tensor:
        """What NewtonCG's closure returns."""
        return self.loss(self.model(self.x), self.y)

    def pair_closure(self) -> tuple[Tensor, Tensor]:
        """What SGN's closure returns."""
        z = self.model(self.x)
        return self.loss(z, self.y), z

    def output(self, flat: Tensor) -> Tensor:
        """The output as a function of all parameters in one vector; norms in elementary ops."""
        model = self.model
        norms = nn.BatchNorm1d | nn.LayerNorm
        if any(isinstance(m, norms) for m in self.model.children()):
            layers = [PlainNorm(m) if isinstance(m, norms) else m for m in self.model.children()]
            model = nn.Sequential(*layers)
        tensors = dict(zip(self.named, split_like(flat, self.params), strict=True))
        with sdpa_kernel(SDPBackend.MATH):
            result: Tensor = torch.func.functional_call(model, tensors, (self.x,))
        return result

    def flat(self) -> Tensor:
        """All parameters in one vector."""
        return torch.cat([p.detach().reshape(-1) for p in self.params])

    def _elementary_loss(self, z: Tensor) -> Tensor:
        # forward AD of mse_loss's backward is broken (pytorch#123996)
        return (z - self.y).square().mean() if self.loss is F.mse_loss else self.loss(z, self.y)

    def hessian(self) -> Tensor:
        """d^2 L / d w^2 by torch.func.hessian."""
        dense: Tensor = torch.func.hessian(lambda w: self._elementary_loss(self.output(w)))(self.flat())
        return dense

    def gauss_newton(self) -> Tensor:
        """J^T H_L J with J by torch.func.jacrev and H_L by torch.func.hessian."""
        w = self.flat()
        z = self.output(w)
        J = torch.func.jacrev(self.output)(w).reshape(z.numel(), -1)
        H = torch.func.hessian(lambda u: self._elementary_loss(u.view_as(z)))(z.reshape(-1))
        dense: Tensor = J.T @ H @ J
        return dense


def make_problem(model: str, loss: str = "mse", seed: int = 0) -> Problem:
    """A problem by the names of its model and loss."""
    build, shape = MODELS[model]
    torch.manual_seed(seed)
    net = build().double()
    inputs, target = torch.randn(shape, dtype=torch.float64), torch.randn(shape[0], 3, dtype=torch.float64)
    return Problem(net, inputs, target, LOSSES[loss])


def split_like(flat: Tensor, like: Sequence[Tensor]) -> Vectors:
    """One vector as a list of tensors shaped as `like`."""
    parts = torch.split(flat, [t.numel() for t in like])
    return [part.view(t.shape) for part, t in zip(parts, like, strict=True)]


def join(tensors: Sequence[Tensor]) -> Tensor:
    """A list of tensors as one vector."""
    return torch.cat([t.reshape(-1) for t in tensors])


def dense_of(product: Callable[[Vectors], Vectors], like: Sequence[Tensor]) -> Tensor:
    """The matrix of a product, from its action on every unit vector."""
    count = sum(t.numel() for t in like)
    eye = torch.eye(count, dtype=like[0].dtype)
    return torch.stack([join(product(split_like(column, like))) for column in eye], dim=1)
