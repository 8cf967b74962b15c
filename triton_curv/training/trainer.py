"""One model in training: a scenario's data and model, an optimizer, and the order of batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from triton_curv.scenarios import Data, Scenario
from triton_curv.training.batches import BatchOrder
from triton_curv.training.errors import SettingError
from triton_curv.training.optimizers import CLOSURES, get_optimizer
from triton_curv.training.ranks import Ranks

EVALUATION_ROWS = 256
"""Rows of one forward pass of an evaluation: larger activations leave the cache of a CPU core."""


@runtime_checkable
class DisplacedOptimizer(Protocol):
    """An optimizer that takes gradients away from the true weights (Neumann): it swaps them in and out."""

    def eval(self) -> None:
        """Put the true weights into the model."""

    def train(self) -> None:
        """Put the displaced weights back, bit for bit."""


@dataclass(frozen=True)
class Evaluation:
    """Loss on training rows and the scenario's metric on the validation rows, both in eval mode."""

    train_loss: float
    metric: float


class Trainer:
    """Trains a scenario step by step; the same seed gives every optimizer the same weights and batches.

    Args:
        scenario: What to train.
        data: The scenario's data, already loaded (it is moved to ``device`` and ``dtype``).
        optimizer: Name in ``OPTIMIZERS``.
        lr: Learning rate, positive.
        seed: Of the model's weights, the batches, and torch's global generator.
        steps: Steps the run is planned for (Neumann's reset period follows from it).
        batch_size: Rows of a batch; the scenario's by default.
        device: Where to train.
        dtype: Of the model and the floating-point data.
        ranks: Processes that train this model together; each steps on its share of every batch.

    Raises:
        SettingError: Where the optimizer is unknown or a number is out of range.

    """

    def __init__(
        self,
        scenario: Scenario,
        data: Data,
        optimizer: str,
        lr: float,
        seed: int,
        steps: int,
        batch_size: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        ranks: Ranks | None = None,
    ) -> None:
        build = get_optimizer(optimizer)
        if not (math.isfinite(lr) and lr > 0):
            raise SettingError(f"expected a positive learning rate, got {lr}")
        if not 0 <= seed < 2**63:
            raise SettingError(f"expected a seed from 0 to 2^63 - 1, got {seed}")
        self.scenario = scenario
        self.order = BatchOrder(len(data.train_x), scenario.batch_size if batch_size is None else batch_size, seed)
        self.step_count = 0
        torch.manual_seed(seed)
        self.ranks = ranks
        self.seed = seed
        model = scenario.model().to(device=device, dtype=dtype)
        self.model = model if ranks is None else ranks.wrap(model)
        self.module = model  # without a wrapper
        self.optimizer: Any = build(self.model, lr, steps, **scenario.options.get(optimizer, {}))
        self._closure = CLOSURES.get(optimizer)
        self.data = _moved(data, device, dtype)
        rows = len(data.train_x)
        chosen = torch.randperm(rows, generator=torch.Generator().manual_seed(0))[: scenario.loss_rows].sort().values
        self._loss_rows = None if rows <= scenario.loss_rows else chosen.to(self.data.train_x.device)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the next batch."""
        rows = self.order.draw()
        if self.ranks is not None:
            rows = self.ranks.share(rows)
            # dropout of this rank's own, the same after a restart on any number of ranks
            torch.manual_seed((self.seed << 32) + self.step_count * self.ranks.world + self.ranks.rank)
        rows = rows.to(self.data.train_x.device)
        return self.data.train_x[rows], self.data.train_y[rows]

    def step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Forward, backward, ``optimizer.step()``, ``zero_grad()``; returns the batch loss, detached.

        An optimizer that differentiates twice gets a closure instead and makes all passes itself.
        """
        x, y = batch

        def loss_and_output() -> tuple[Tensor, Tensor]:
            output = self.model(x)
            return self.scenario.objective(self.module, output, y), output

        if self._closure is None:
            loss, _ = loss_and_output()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        else:
            whole = self._closure == "loss and output"
            loss = self.optimizer.step(loss_and_output if whole else lambda: loss_and_output()[0])
        self.step_count += 1
        return loss.detach()

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """Evaluated training loss and validation metric at the true weights; training goes on unchanged.

        A model that draws random numbers draws the same ones in every evaluation.
        """
        data, rows = self.data, self._loss_rows
        x, y = (data.train_x, data.train_y) if rows is None else (data.train_x[rows], data.train_y[rows])
        self.model.eval()
        if isinstance(self.optimizer, DisplacedOptimizer):
            self.optimizer.eval()
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            loss = self.scenario.objective(self.module, self._outputs(x), y)
            metric = self.scenario.metric.measure(self._outputs(data.val_x), data.val_y, data.target_scale)
        if isinstance(self.optimizer, DisplacedOptimizer):
            self.optimizer.train()
        self.model.train()
        return Evaluation(float(loss), metric)

    def true_weights(self) -> dict[str, Tensor]:
        """Copies of the model's parameters and buffers, for use rather than for more training."""
        if isinstance(self.optimizer, DisplacedOptimizer):
            self.optimizer.eval()
        found = self.model.state_dict() if self.ranks is None else self.ranks.weights(self.model)
        weights = {name: tensor.detach().cpu().clone() for name, tensor in found.items()}
        if isinstance(self.optimizer, DisplacedOptimizer):
            self.optimizer.train()
        return weights

    def state_dict(self) -> dict[str, Any]:
        """Everything but the global random state that the next step depends on. On several ranks a collective."""
        ranks = self.ranks
        return {
            "step": self.step_count,
            "model": self.model.state_dict() if ranks is None else ranks.weights(self.model),
            "optimizer": self.optimizer.state_dict()
            if ranks is None
            else ranks.optimizer_state(self.model, self.optimizer),
            "order": self.order.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        if self.ranks is None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            self.ranks.set_weights(self.model, state["model"])
            self.ranks.set_optimizer_state(self.model, self.optimizer, state["optimizer"])
        self.order.load_state_dict(state["order"])
        self.step_count = state["step"]

    def _outputs(self, x: Tensor) -> Tensor:
        return torch.cat([self.model(part) for part in torch.split(x, EVALUATION_ROWS)])


def _moved(data: Data, device: torch.device | None, dtype: torch.dtype) -> Data:
    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

    return replace(
        data,
        train_x=move(data.train_x),
        train_y=move(data.train_y),
        val_x=move(data.val_x),
        val_y=move(data.val_y),
    )
