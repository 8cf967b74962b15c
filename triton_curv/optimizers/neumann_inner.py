"""Algorithm 1 of the Neumann optimizer: an inner loop of gradients on one batch that solves for the Newton step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from triton_curv.errors import ConfigurationError
from triton_curv.nvtx import stage
from triton_curv.operators.choice import Choice
from triton_curv.operators.errors import no_backward_inside
from triton_curv.operators.loss import as_loss, check_finite
from triton_curv.operators.vectors import Vectors, add_, add_scaled, dot, zeros_like
from triton_curv.optimizers.matrix_free import MatrixFree, Trial, negated, never_traced, number, widened
from triton_curv.sharding.ranks import Where


class NeumannInner(MatrixFree):
    r"""m_0 = -g(w); m_k = m_(k-1) - g(w + eta m_(k-1)), k = 1..K; w <- w + lr m_K.

    The idealised Neumann optimizer, for study and as an oracle: K + 1 gradients a step, all on the same batch, with the
    same random numbers; BatchNorm's running statistics move once. On a quadratic m_k = -sum_(i<=k) (I - eta H)^i g, so
    that eta m_k converges to the Newton step -H^-1 g, with an error that each inner step multiplies by I - eta H: it
    needs 0 < eta H < 2. `damping` lambda adds lambda/2 ||w - w_t||^2 to the inner loss: H + lambda I stands for H.

    Args:
        model: its parameters that require a gradient are trained.
        inner_lr: eta_in, below 2 over the largest eigenvalue of H + lambda I.
        lr: eta_out; `inner_lr`, the default, makes the step the Newton step.
        inner_steps: K.
        damping: lambda.
        groups: settings by module pattern, [{"modules": "layer1.*", "lr": 0.1}, ...]; all but lr must agree.
        maximize: ascend instead of descend.
        process_group: the ranks that train the model together, as for `KFAC`; "alone": this one. Gradients are means
            over ranks.

    Raises:
        ConfigurationError: an argument out of range.

    Source: Krishnan, Xiao, Saurous 2018, arXiv 1712.03298, Algorithm 1 and equation 7.

    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: float | Tensor = 1e-2,
        *,
        lr: float | Tensor | None = None,
        inner_steps: int = 10,
        damping: float | Tensor = 0.0,
        groups: Sequence[Mapping[str, Any]] = (),
        maximize: bool = False,
        process_group: Where = "auto",
    ) -> None:
        defaults = {
            "lr": inner_lr if lr is None else lr,
            "inner_lr": inner_lr,
            "inner_steps": inner_steps,
            "damping": damping,
            "chosen_product": "gradients",
            "maximize": maximize,
        }
        super().__init__(model, defaults, groups, "identity", process_group)
        self._choice = Choice("gradients")

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        if not (float(group["inner_lr"]) > 0 and float(group["damping"]) >= 0 and group["inner_steps"] >= 0):
            raise ConfigurationError(
                "expected inner_lr > 0, damping >= 0 and inner_steps >= 0, got "
                f"{float(group['inner_lr'])}, {float(group['damping'])}, {group['inner_steps']}"
            )

    def _init_state(self, p: Parameter) -> None:
        """Algorithm 1 keeps nothing from step to step."""

    @never_traced
    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Tensor:  # type: ignore[override]  # the closure is a must
        """One outer step on `closure() -> loss`, which does not call backward(); returns the loss before it.

        Raises:
            ClosureError: the closure returned something else than a scalar loss.
            NoGraphError: a loss without graph.
            NonFiniteError: the loss or its gradient at w is not finite; parameters stay as they are.

        """
        return self._take_step(closure)

    @stage("step", payload=lambda optimizer, closure: optimizer.param_groups[0]["step"])
    def _take_step(self, closure: Callable[[], Any]) -> Tensor:
        maximize = self._shared("maximize")
        weights = self._weights(list(self._trained().values()))
        # gradients alone: what is compiled may stay so
        frozen = self._freeze(negated(closure) if maximize else closure, weights, eager=False)
        params = weights.tensors
        eta, damping = number(self._shared("inner_lr")), number(self._shared("damping"))
        trial = Trial(params, frozen, as_loss, self._mean)
        gradient = zeros_like(params)
        loss = torch.zeros((), dtype=params[0].dtype, device=params[0].device)

        def take(result: Any) -> None:
            part = as_loss(result)
            loss.add_(part.detach())
            add_(gradient, torch.autograd.grad(part, params, allow_unused=True, materialize_grads=True))

        with self._mean.agreeing("run their closures"), no_backward_inside():
            frozen.first(take)
        before, *mean_gradient = self._mean.vectors([loss.clone(), *gradient])
        check_finite(before, dot(mean_gradient, mean_gradient))
        m: Vectors = list(torch._foreach_neg(widened(mean_gradient)))
        for _ in range(self._shared("inner_steps")):
            displacement = list(torch._foreach_mul(m, eta))
            trial.move(displacement)
            torch._foreach_zero_(gradient)
            with trial.restoring(), torch.enable_grad():
                frozen.again(take)
            m = add_scaled(m, widened(self._mean.vectors(gradient)), -1.0)
            m = add_scaled(m, displacement, -damping)
        trial.move(self._scaled(m))
        weights.write_back()
        self._count_step()
        return -before if maximize else before

    def _curvature(self) -> str:
        return f"{self._shared('inner_steps')} terms of the Neumann series of H + {float(self._shared('damping'))} I"
