"""What a scenario is: data, a model, a loss and a metric, and the budget they are compared under."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

RATE_RATIO = math.sqrt(10.0)
"""Factor between neighbouring learning rates of a grid, the same for every optimizer."""
UNTUNED: Mapping[str, float] = {"sgn": 1.0}
"""Step size of the optimizers that need no tuning: their grids have this one rate."""


@dataclass(frozen=True)
class Data:
    """Training and validation rows.

    Attributes:
        train_x: (rows, ...) float32 inputs, or int64 tokens.
        train_y: int64 classes (rows,) or (rows, positions), or float32 targets (rows, outputs).
        val_x: Validation inputs, as ``train_x``.
        val_y: Validation targets, as ``train_y``.
        target_scale: Original units in one unit of ``train_y``; 1 for classes.

    """

    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    target_scale: float = 1.0


@dataclass(frozen=True)
class Metric:
    """A number people read, measured on the validation rows.

    Attributes:
        name: Name with its unit, as printed.
        higher_is_better: Its direction.
        measure: ``(output, target, target_scale) -> float``.

    """

    name: str
    higher_is_better: bool
    measure: Callable[[Tensor, Tensor, float], float]


@dataclass(frozen=True)
class Scenario:
    """One training task.

    Attributes:
        name: The name used on the command line.
        summary: One line: data, model, loss.
        train_rows: Rows ``load`` gives to train on.
        load: Reads the data. Raises ``MissingDataError`` where its package is not installed.
        model: Builds the model from torch's global random state.
        loss: ``(output, target) -> mean loss over the rows``.
        loss_rows: At most so many training rows, a fixed choice, give the evaluated training loss.
        penalty: ``model -> scalar``, a term of the loss that is a function of the parameters alone.
        metric: The validation metric.
        batch_size: Rows per step.
        budget: Steps of a comparison.
        evaluate_every: Steps between two evaluations of a comparison.
        target_loss: Evaluated training loss that counts as "reached".
        learning_rates: Default learning rate of each optimizer, the centre of its grid; not of those in ``UNTUNED``.
        options: Further arguments of some optimizers, by name: what their papers set by task.

    """

    name: str
    summary: str
    train_rows: int
    load: Callable[[], Data]
    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: Metric
    batch_size: int
    budget: int
    evaluate_every: int
    target_loss: float
    learning_rates: Mapping[str, float]
    loss_rows: int = 2000
    penalty: Callable[[nn.Module], Tensor] | None = None
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def objective(self, model: nn.Module, output: Tensor, target: Tensor) -> Tensor:
        """What training minimises: the loss of the output, plus the penalty."""
        loss = self.loss(output, target)
        return loss if self.penalty is None else loss + self.penalty(model)

    def learning_rate(self, optimizer: str) -> float:
        """The optimizer's default."""
        return UNTUNED[optimizer] if optimizer in UNTUNED else self.learning_rates[optimizer]

    def rate_grid(self, optimizer: str, count: int) -> tuple[float, ...]:
        """``centre * sqrt(10)**k`` for ``count`` consecutive k around 0, ascending, to three digits."""
        if optimizer in UNTUNED:
            return (UNTUNED[optimizer],)
        centre = self.learning_rates[optimizer]
        first = -(count // 2)
        return tuple(float(f"{centre * RATE_RATIO**k:.3g}") for k in range(first, first + count))


def _accuracy(output: Tensor, target: Tensor, target_scale: float) -> float:
    del target_scale  # a class has no unit
    return float((output.argmax(dim=1) == target).double().mean())


def _root_mean_square_error(output: Tensor, target: Tensor, target_scale: float) -> float:
    return target_scale * float((output.double() - target.double()).square().mean().sqrt())


def loss_metric(name: str, loss: Callable[[Tensor, Tensor], Tensor], scale: float = 1.0) -> Metric:
    """``scale`` times a loss on the validation rows."""
    return Metric(name, False, lambda output, target, target_scale: scale * float(loss(output, target)))


ACCURACY = Metric("accuracy", True, _accuracy)
"""Share of rows whose largest output is the target class, 0 to 1."""


def rmse(unit: str) -> Metric:
    """Root mean square error in the target's original ``unit``."""
    return Metric(f"RMSE ({unit})", False, _root_mean_square_error)
