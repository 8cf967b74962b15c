"""When a step of KFAC is measured against what its quadratic model promised, and what follows for the damping."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter

from triton_curv.errors import ConfigurationError
from triton_curv.optimizers.curvature import Curvature
from triton_curv.optimizers.trial import Before, Evaluate, evaluated, predicted_change, reduction_ratio

CHANGING = ("momentum_buffer", "exp_avg", "exp_avg_sq")


class Trials:
    """The measurements that the damping rule of a KFAC asks for."""

    def __init__(self, model: nn.Module, curvature: Curvature) -> None:
        self._model = model
        self._curvature = curvature

    def before(
        self, params: Sequence[Parameter], state: Mapping[Any, Mapping[str, Tensor]], evaluate: Evaluate | None
    ) -> Before | None:
        """What a measured step starts from; None where the damping rule measures nothing."""
        rule, steps = self._curvature.options.damping_rule, self._curvature.steps
        if not rule.interval or steps % rule.interval:
            return None
        if evaluate is None:
            raise ConfigurationError(
                f"{type(rule).__name__} expects step(evaluate=...) every {rule.interval} steps, a function that "
                "returns the loss of the batch without backward(); got none"
            )
        moving = [p for p in params if p.grad is not None]
        changing = [state[p][name] for p in moving for name in CHANGING if name in state[p]]
        loss = evaluated(self._model, evaluate, steps)
        return Before.of(self._curvature.exchange.mean(loss), moving, changing)

    def judge(self, before: Before, evaluate: Evaluate, maximize: bool) -> None:
        """The reduction ratio moves the damping; a step that raised the loss is taken back if the rule says so."""
        curvature = self._curvature
        options, store, exchange = curvature.options, curvature.store, curvature.exchange
        after = exchange.mean(evaluated(self._model, evaluate, curvature.steps))
        units = store.samples.amax() if options.reduction == "sum" else 1.0
        blocks = [block for block in curvature.blocks.values() if store.owns(next(iter(block.keys.values())))]
        predicted = predicted_change(blocks, before, options.loss_scale, units, exchange.total)
        sign = -1.0 if maximize else 1.0
        ratio = reduction_ratio(sign * before.loss, sign * after, sign * predicted)
        gain = curvature.damping_gain
        gain.copy_(options.damping_rule.adapt(gain, ratio.to(gain)))
        if options.damping_rule.reject:
            worse = ~(sign * after <= sign * before.loss)
            before.restore_(worse)
            curvature.events[3].add_(worse.to(curvature.events.device))
            curvature.monitor.watch()
