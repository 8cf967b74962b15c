"""What parameters without a curvature block are trained with: AdamW or SGD, as torch.optim has them."""

from collections.abc import MutableMapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from triton_curv.costs import update_cost
from triton_curv.nvtx import stage
from triton_curv.sharding.local import local

FallbackName = Literal["adamw", "sgd"]


class Fallback(Protocol):
    """A first-order rule for one parameter group; its state lies in the optimizer's `state[param]`."""

    defaults: dict[str, Any]

    def init_state(self, param: Parameter) -> dict[str, Tensor]:
        """State of one parameter before the first step."""

    def update(
        self, params: list[Parameter], state: MutableMapping[Any, Any], group: dict[str, Any], ok: Tensor | None
    ) -> None:
        """One step for the parameters, all of which have a gradient.

        `ok` () is a flag on the device: where it is False nothing changes, and nobody waits to know. None is True.
        """


def _for_each(scalar: Tensor, params: list[Parameter]) -> list[Tensor]:
    """One 0-dim tensor for every parameter: foreach functions of a single one read it on the host, on CPU."""
    return [scalar] * len(params)


def _gradients(params: list[Parameter], group: dict[str, Any], ok: Tensor) -> list[Tensor]:
    """Gradients to descend along, zero where the step does not happen: 0 * NaN is not 0."""
    grads = [torch.where(ok, local(p.grad), 0.0) for p in params if p.grad is not None]
    return list(torch._foreach_neg(grads)) if group["maximize"] else grads


class AdamWFallback:
    """`torch.optim.AdamW`."""

    defaults: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}  # noqa: RUF012  # read only

    def init_state(self, param: Parameter) -> dict[str, Tensor]:
        """step, exp_avg, exp_avg_sq."""
        return {
            "step": torch.zeros((), device=param.device),
            "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
        }

    @stage("update", payload=lambda rule, params, *_: update_cost(sum(p.numel() for p in params)))
    def update(
        self, params: list[Parameter], state: MutableMapping[Any, Any], group: dict[str, Any], ok: Tensor | None
    ) -> None:
        """torch's own functional AdamW on the group's state, or the same with a flag."""
        exp_avgs = [local(state[p]["exp_avg"]) for p in params]
        exp_avg_sqs = [local(state[p]["exp_avg_sq"]) for p in params]
        steps = [state[p]["step"] for p in params]
        if ok is not None:
            self._update_where(ok, params, exp_avgs, exp_avg_sqs, steps, group)
            return
        adamw(
            [local(p) for p in params],
            [local(p.grad) for p in params if p.grad is not None],
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            foreach=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            eps=group["eps"],
            maximize=group["maximize"],
        )

    @staticmethod
    def _update_where(
        ok: Tensor,
        params: list[Parameter],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
        group: dict[str, Any],
    ) -> None:
        (beta1, beta2), lr, happens = group["betas"], group["lr"], ok.to(torch.float32)
        grads = _gradients(params, group, ok)
        torch._foreach_add_(steps, _for_each(happens, params))
        torch._foreach_mul_(exp_avgs, _for_each(1 - (1 - beta1) * happens, params))
        torch._foreach_add_(exp_avgs, grads, alpha=1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, _for_each(1 - (1 - beta2) * happens, params))
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
        counted = [step.clamp_min(1.0) for step in steps]
        roots = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(roots, [(1 - beta2**step).sqrt() for step in counted])
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(exp_avgs, roots)
        torch._foreach_mul_(updates, [-lr * happens / (1 - beta1**step) for step in counted])
        weights = [local(p) for p in params]
        torch._foreach_mul_(weights, _for_each(1 - lr * group["weight_decay"] * happens, params))
        torch._foreach_add_(weights, updates)


class SGDFallback:
    """`torch.optim.SGD` with momentum; its weight decay is the L2 term that torch's SGD has."""

    defaults: dict[str, Any] = {}  # noqa: RUF012  # read only

    def init_state(self, param: Parameter) -> dict[str, Tensor]:
        """momentum_buffer, and step for checkpoints."""
        return {
            "step": torch.zeros((), device=param.device),
            "momentum_buffer": torch.zeros_like(param, memory_format=torch.preserve_format),
        }

    @stage("update", payload=lambda rule, params, *_: update_cost(sum(p.numel() for p in params)))
    def update(
        self, params: list[Parameter], state: MutableMapping[Any, Any], group: dict[str, Any], ok: Tensor | None
    ) -> None:
        """torch's own functional SGD on the group's state, or the same with a flag."""
        buffers = [local(state[p]["momentum_buffer"]) for p in params]
        if ok is not None:
            happens, momentum, weights = ok.to(torch.float32), group["momentum"], [local(p.data) for p in params]
            torch._foreach_add_([state[p]["step"] for p in params], _for_each(happens, params))
            grads = _gradients(params, group, ok)
            decayed = torch._foreach_mul(weights, _for_each(group["weight_decay"] * happens, params))
            torch._foreach_mul_(buffers, _for_each(1 - (1 - momentum) * happens, params))
            torch._foreach_add_(buffers, torch._foreach_add(grads, decayed))
            torch._foreach_add_(weights, torch._foreach_mul(buffers, _for_each(-group["lr"] * happens, params)))
            return
        for p in params:
            state[p]["step"] += 1
        sgd(
            [local(p) for p in params],
            [local(p.grad) for p in params if p.grad is not None],
            list(buffers),
            foreach=True,
            weight_decay=float(group["weight_decay"]),
            momentum=float(group["momentum"]),
            lr=float(group["lr"]),
            dampening=0.0,
            nesterov=False,
            maximize=group["maximize"],
        )


FALLBACKS: dict[str, Fallback] = {"adamw": AdamWFallback(), "sgd": SGDFallback()}
