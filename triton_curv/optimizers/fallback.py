"""What parameters without a curvature block are trained with: AdamW or SGD, as torch.optim has them."""

from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from triton_curv.costs import update_cost
from triton_curv.hostcheck import known_true
from triton_curv.nvtx import stage
from triton_curv.optimizers.hyper_slots import OF_UPDATE, SLOT
from triton_curv.sharding.local import local
from triton_curv_kernels import momentum_update_

FallbackName = Literal["adamw", "sgd"]


class Loose(NamedTuple):
    """The parameters of one group without blocks that have gradients, their gradients, state and hyper-parameters."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Tensor]]
    hyper: Tensor


class Fallback(Protocol):
    """A first-order rule for one parameter group; its state lies in the optimizer's `state[param]`."""

    defaults: Mapping[str, Any]

    def init_state(self, param: Parameter) -> dict[str, Tensor]:
        """State of one parameter before the first step."""

    def update(self, loose: Loose, fine: Tensor) -> None:
        """One step; `fine` () is a flag on the device: where it is False nothing changes, and nobody waits to know."""


class LooseGroup(NamedTuple):
    """All parameters of a group without blocks, and their state."""

    params: list[Parameter]
    states: list[dict[str, Tensor]]

    @classmethod
    def of(cls, params: list[Parameter], rule: Fallback, state: MutableMapping[Any, Any]) -> "LooseGroup":
        """Give each its first state, in `state`."""
        states = [rule.init_state(p) for p in params]
        state.update(zip(params, states, strict=True))
        return cls(list(params), states)

    def active(self, hyper: Tensor) -> Loose:
        """Those that have gradients."""
        some = [(p, p.grad, state) for p, state in zip(self.params, self.states, strict=True) if p.grad is not None]
        states = [{name: local(tensor) for name, tensor in state.items()} for _, _, state in some]
        return Loose([local(p) for p, _, _ in some], [local(g) for _, g, _ in some], states, hyper)


def _gradients(loose: Loose, fine: Tensor) -> list[Tensor]:
    """Gradients, zero where the step does not happen: 0 * NaN is not 0."""
    return [torch.where(fine, grad, 0.0) for grad in loose.grads]


def _column(loose: Loose, name: str) -> list[Tensor]:
    return [state[name] for state in loose.states]


def _fits_one_pass(loose: Loose) -> bool:
    """Whether torch's fused AdamW takes these tensors: fp32, in the same order in memory, which it does not check."""
    tensors = [*loose.params, *loose.grads, *_column(loose, "exp_avg"), *_column(loose, "exp_avg_sq")]
    return all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)


def _fused_adamw_(loose: Loose) -> None:
    """AdamW in one pass over memory: torch's own, on the host, where its arguments are known."""
    steps = _column(loose, "step")
    torch._foreach_add_(steps, 1.0)
    row = loose.hyper.tolist()
    torch._fused_adamw_(  # private, but what torch.optim.AdamW(fused=True) calls
        loose.params,
        loose.grads,
        _column(loose, "exp_avg"),
        _column(loose, "exp_avg_sq"),
        [],
        steps,
        amsgrad=False,
        lr=row[SLOT["lr"]],
        beta1=row[SLOT["beta1"]],
        beta2=row[SLOT["beta2"]],
        weight_decay=row[SLOT["weight_decay"]],
        eps=row[SLOT["eps"]],
        maximize=row[SLOT["sign"]] < 0,
    )


class AdamWFallback:
    """`torch.optim.AdamW`."""

    defaults: Mapping[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}  # read only

    def init_state(self, param: Parameter) -> dict[str, Tensor]:
        """step, exp_avg, exp_avg_sq."""
        return {
            "step": torch.zeros((), device=param.device),
            "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
        }

    @stage("update", payload=lambda rule, loose, fine: update_cost(sum(p.numel() for p in loose.params)))
    def update(self, loose: Loose, fine: Tensor) -> None:
        """The rule by foreach functions; of lists of 0-dim tensors, which nobody reads on the host."""
        if known_true(fine) and _fits_one_pass(loose):
            _fused_adamw_(loose)
            return
        hyper, happens, count = loose.hyper, fine.to(loose.hyper.dtype), len(loose.params)
        lr, beta1, beta2 = (hyper[SLOT[name]] for name in ("lr", "beta1", "beta2"))
        new1, new2 = hyper[SLOT["one_minus_beta1"]] * happens, hyper[SLOT["one_minus_beta2"]] * happens
        exp_avgs, exp_avg_sqs, steps = (_column(loose, name) for name in ("exp_avg", "exp_avg_sq", "step"))
        grads = _gradients(loose, fine)
        torch._foreach_add_(steps, [happens] * count)
        torch._foreach_mul_(exp_avgs, [1 - new1] * count)
        torch._foreach_add_(exp_avgs, torch._foreach_mul(grads, [new1 * hyper[SLOT["sign"]]] * count))
        torch._foreach_mul_(exp_avg_sqs, [1 - new2] * count)
        torch._foreach_addcmul_(exp_avg_sqs, torch._foreach_mul(grads, [new2] * count), grads)
        counted = [step.clamp_min(1.0) for step in steps]
        roots = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(roots, [(1 - beta2**step).sqrt() for step in counted])
        torch._foreach_add_(roots, [hyper[SLOT["eps"]]] * count)
        torch._foreach_mul_(loose.params, [1 - lr * hyper[SLOT["weight_decay"]] * happens] * count)
        updates = torch._foreach_div(exp_avgs, roots)
        torch._foreach_mul_(updates, [-lr * happens / (1 - beta1**step) for step in counted])
        torch._foreach_add_(loose.params, updates)


class SGDFallback:
    """`torch.optim.SGD` with momentum; its weight decay is the L2 term that torch's SGD has."""

    defaults: Mapping[str, Any] = {}  # read only

    def init_state(self, param: Parameter) -> dict[str, Tensor]:
        """momentum_buffer, and step for checkpoints."""
        return {
            "step": torch.zeros((), device=param.device),
            "momentum_buffer": torch.zeros_like(param, memory_format=torch.preserve_format),
        }

    @stage("update", payload=lambda rule, loose, fine: update_cost(sum(p.numel() for p in loose.params)))
    def update(self, loose: Loose, fine: Tensor) -> None:
        """The rule by `momentum_update_`."""
        happens = fine.to(loose.hyper.dtype)
        torch._foreach_add_(_column(loose, "step"), [happens] * len(loose.params))
        lr, momentum, weight_decay, *rest = loose.hyper[:OF_UPDATE].unbind()
        hyper = torch.stack([lr * happens, 1 - (1 - momentum) * happens, weight_decay * happens, *rest])
        scales = [happens * loose.hyper[SLOT["sign"]]] * len(loose.params)
        buffers = _column(loose, "momentum_buffer")
        momentum_update_(loose.params, buffers, _gradients(loose, fine), scales, hyper, coupled=True)


FALLBACKS: dict[str, Fallback] = {"adamw": AdamWFallback(), "sgd": SGDFallback()}
