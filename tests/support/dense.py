"""Dense curvature of one layer by `torch.func.jacrev`: the oracle that knows no Kronecker factor.

One layout for every layer: theta of shape (groups, out / groups, n), the weight flattened behind its
output channel, the bias as last of the n columns. A dense matrix is (groups, p, p) with p = (out / groups) n
in the order of theta[g].flatten(), in which a pair of Kronecker factors reads G (x) A = torch.kron(G, A).
Everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

WeightLayer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def group_count(layer: WeightLayer) -> int:
    """Return the number of groups of a layer; 1 for a linear layer."""
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def join(layer: WeightLayer, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return theta (*, groups, out / groups, n) of a weight (*, *weight.shape) and a bias (*, out)."""
    groups, out = group_count(layer), layer.weight.shape[0]
    lead = weight.shape[: weight.dim() - layer.weight.dim()]
    theta = weight.reshape(*lead, groups, out // groups, -1)
    if bias is None:
        return theta
    return torch.cat([theta, bias.reshape(*lead, groups, out // groups, 1)], dim=-1)


def split(layer: WeightLayer, theta: Tensor) -> dict[str, Tensor]:
    """Return {"weight": ..., "bias": ...} of theta (groups, out / groups, n): undoes `join`."""
    if layer.bias is None:
        return {"weight": theta.reshape(layer.weight.shape)}
    return {
        "weight": theta[..., :-1].reshape(layer.weight.shape),
        "bias": theta[..., -1].reshape(layer.bias.shape),
    }


def weight_layers(model: nn.Module) -> dict[str, WeightLayer]:
    """Return the layers of a model that have a Kronecker block, by qualified name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, WeightLayer)}


def jacobian(model: nn.Module, name: str, inputs: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """D head(model(inputs))[sample, k] / d theta of the layer `name`: (N, k, groups, out / groups, n).

    By `jacrev` over the whole net. Per-sample gradients are the case of a `head` that returns losses (N, 1).
    """
    layer = weight_layers(model)[name]
    own = {f"{name}.{key}": value.detach() for key, value in layer.named_parameters()}

    def run(parameters: dict[str, Tensor]) -> Tensor:
        outputs: Tensor = functional_call(model, parameters, (inputs,))
        return head(outputs)

    parts: dict[str, Tensor] = jacrev(run)(own)
    return join(layer, parts[f"{name}.weight"], parts.get(f"{name}.bias")).detach()


def gram(jacobian: Tensor) -> Tensor:
    """(1/N) sum_nk vec(J_nk) vec(J_nk)^T of J (N, k, groups, o, n): (groups, p, p), one block a group."""
    rows = jacobian.flatten(-2).flatten(0, 1)
    return torch.einsum("kgp,kgq->gpq", rows, rows) / jacobian.shape[0]


def kronecker_parts(dense: Tensor, out: int) -> tuple[Tensor, Tensor]:
    """Return A (groups, n, n), G (groups, out, out) with G (x) A = dense (groups, p, p), by partial traces.

    Needs dense to be a Kronecker product. The split of a scalar between A and G is free: pi-damping does not
    see it.
    """
    groups, p, _ = dense.shape
    blocks = dense.reshape(groups, out, p // out, out, p // out)
    trace = dense.diagonal(dim1=-2, dim2=-1).sum(-1)
    A = torch.einsum("gaiaj->gij", blocks)
    G = torch.einsum("gaibi->gab", blocks) / trace[:, None, None]
    return A, G


def kron(G: Tensor, A: Tensor) -> Tensor:
    """Return G (x) A (groups, o n, o n) of G (groups, o, o) and A (groups, n, n)."""
    return torch.stack([torch.kron(g, a) for g, a in zip(G, A, strict=True)])


def mean_eigenvalue(factor: Tensor) -> Tensor:
    """Return trace over dimension (groups, 1, 1) of factors (groups, n, n)."""
    return factor.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]


def damped_kron(A: Tensor, G: Tensor, damping: float) -> Tensor:
    """(G + sqrt(lambda)/pi I) (x) (A + pi sqrt(lambda) I), pi^2 = (tr A/dim A)/(tr G/dim G), per group.

    `damping` is lambda, one for all groups; pi is each group's own.
    """
    pi = (mean_eigenvalue(A) / mean_eigenvalue(G)).sqrt()
    root = damping**0.5
    eye_A = torch.eye(A.shape[-1], dtype=A.dtype)
    eye_G = torch.eye(G.shape[-1], dtype=G.dtype)
    return kron(G + root / pi * eye_G, A + root * pi * eye_A)


def solve(dense: Tensor, theta: Tensor) -> Tensor:
    """Return the least-norm X with dense @ vec(X) = vec(theta) per group."""
    solution: Tensor = torch.linalg.pinv(dense, rtol=1e-12, hermitian=True) @ theta.flatten(-2).unsqueeze(-1)
    return solution.reshape(theta.shape)


def gauss_newton_batch(model: nn.Module, inputs: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return inputs (M d, ...), targets (M d, d): mse_loss's empirical Fisher is its Gauss-Newton matrix.

    mse_loss is the mean over N = M d samples of l_n = (1/d) ||f(x_n) - y_n||^2: the d of the mean over
    elements stays in the sample's loss, so dl/df = (2/d)(f - y) and d2l/df2 = (2/d) I. Every input comes d
    times, with y = f(x) - c q_k for the columns q_k of a random orthogonal matrix of its own. Then dl/df =
    (2c/d) q_k, and the mean over k of its outer product is (4 c^2/d^3) I: the Hessian (2/d) I if c^2 = d^2/2.
    This holds input by input, so G does not depend on a, and G (x) A is exact where the Jacobian is constant.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        outputs = model(inputs)
    count, d = outputs.shape
    bases = torch.linalg.qr(torch.randn(count, d, d, generator=generator, dtype=outputs.dtype)).Q
    targets = outputs[:, None, :] - d / 2**0.5 * bases.mT
    return inputs.repeat_interleave(d, dim=0), targets.reshape(count * d, d)


def gauss_newton(model: nn.Module, name: str, inputs: Tensor) -> Tensor:
    """(1/N) sum_n J_n^T (2/d) J_n, mse_loss's Gauss-Newton matrix of one layer: (groups, p, p)."""
    J = jacobian(model, name, inputs, lambda outputs: outputs)
    return gram(J) * (2 / J.shape[1])


def relative_error(value: Tensor, expected: Tensor) -> float:
    """||value - expected|| / ||expected|| (Frobenius); shapes must agree."""
    assert value.shape == expected.shape, f"expected shape {tuple(expected.shape)}, got {tuple(value.shape)}"
    return float((value - expected).norm() / expected.norm())
