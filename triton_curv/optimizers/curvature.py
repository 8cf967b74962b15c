"""The curvature of a model: its taps, blocks and factors, and when they are renewed. KFAC steps with it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from triton_curv.blocks import Block, FactorStore, Rule
from triton_curv.blocks.bank import FactorKey, Normalisation
from triton_curv.blocks.centre import Mean, centre_, centred_blocks, gradients_of_biases, means_of
from triton_curv.blocks.moments import Moments, has_sample_rows
from triton_curv.blocks.store_cost import fold_cost
from triton_curv.capture import CaptureSwitch, attach_taps
from triton_curv.errors import ConfigurationError, NoStatisticsError
from triton_curv.health import EVENTS, HealthMonitor
from triton_curv.nvtx import stage
from triton_curv.optimizers.exchange import Exchange
from triton_curv.optimizers.fisher import Loss, signals
from triton_curv.optimizers.kfac_options import KFACOptions, due_blocks, refresh_parts
from triton_curv.optimizers.regions import fold_, refresh_

IDLE = -1  # no renewal of inverses is under way
CLOCK = {"next_fold": 0, "next_inverse": 0, "renewal": IDLE}  # saved with the first parameter group


class Curvature:
    """Statistics gathered by taps, folded into averages, inverted; each when it is due.

    `clock` is the parameter group that holds "step" and the entries of `CLOCK`; `per_block` gives a hyper-parameter as
    one number for each block.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Mapping[str, Rule],
        options: KFACOptions,
        grad_scaler: torch.amp.GradScaler | None,
        clock: dict[str, Any],
        per_block: Callable[[str], Tensor],
        exchange: Exchange,
    ) -> None:
        self.options = options
        self.clock = clock
        self._scaler = grad_scaler
        self._per_block = per_block
        self._exchange = exchange
        some = next(iter(next(iter(rules.values())).params.values()))
        wide = any(p.dtype == torch.float64 for rule in rules.values() for p in rule.params.values())
        dtype, device = torch.float64 if wide else torch.float32, some.device
        for name, rule in rules.items():
            for p in rule.params.values():
                if p.device != device:
                    raise ConfigurationError(f"expected all layers on {device}, got '{name}' on {p.device}")
        shapes = [dict(rule.factor_shapes) for rule in rules.values()]
        self.store = FactorStore(shapes, dtype, device, options.inverse, exchange.held)
        if options.adaptive is not None:
            self.store.keep_recent()
        self.parts = refresh_parts(self.store, options.refresh_budget)
        self.switch = CaptureSwitch(enabled=True, records=options.fisher == "empirical", device=device)
        self.blocks: dict[str, Block] = {
            name: Block(name, rule, index, self.store, self.averages_of, self.ensure_inverse)
            for index, (name, rule) in enumerate(rules.items())
        }
        if options.ekfac:
            for block in self.blocks.values():
                if block.gains is not None and has_sample_rows(block.rule):
                    block.moments = Moments(block.rule, block.inverses)
        self._moving = [block for block in self.blocks.values() if block.moments is not None]
        self._turned = [block for block in self.blocks.values() if block.gains is not None]
        exchange.attach(self.store, self.switch)
        self.handles = attach_taps(model, self.blocks.values(), self.switch)
        self.inverted = False
        self.any_seen = self.all_seen = False  # whether statistics of any block, of all blocks, have come
        self.sampled = False  # whether `sample_fisher` has run since the last fold
        self.draws = 0  # calls of it in this step
        self._ahead: Tensor | float = 0.0  # what `count` last said, if it was beside gradients
        self.events = torch.zeros(len(EVENTS), dtype=torch.int64, device=device)
        self.store.discarded, self.store.failed = self.events[1], self.events[2]
        self.monitor = HealthMonitor(self.events)
        self.damping_gain = torch.ones((), dtype=dtype, device=device)
        # (next step, last interval, the one before) of each statistic, for the adaptive rule
        self.timers = torch.tensor([[0, 1, 1]] * len(self.store.keys), dtype=torch.int64)

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return int(self.clock["step"])

    @property
    def signal_scale(self) -> float:
        """What a GradScaler multiplies the loss with."""
        return self._scaler.get_scale() if self._scaler is not None else 1.0

    # ---- statistics

    def averages_of(self, block: Block) -> dict[str, Tensor]:
        """The block's factors as they are once pending statistics are folded in."""
        how = self.options.normalisation(self.signal_scale)
        factors = {name: self.store.peek(key, how) for name, key in block.keys.items()}
        for key, mean in self._means(how, [block]).items():
            weight = self.store.pending(how)[1][self.store.rows(key)] * mean.weight()
            factors[key.name].sub_(mean.outer() * weight[:, None, None])
        return factors

    def _means(
        self, how: Normalisation, blocks: Sequence[Block], exchange: Exchange | None = None
    ) -> dict[FactorKey, Mean]:
        """Mean signals to centre G with: those of this rank, or with an exchange those of all."""
        blocks = centred_blocks(blocks) if self.options.centred else []
        if not blocks:
            return {}
        gradients = gradients_of_biases(blocks, self.store.samples)
        counts = torch.stack((self.store.counts[:, 0], self.store.seen()))
        if exchange is not None:
            gradients, counts = exchange.centres(gradients, counts)
        return means_of(blocks, gradients, counts, how, self.options.loss_scale)

    def count(self, units: float | Tensor | None, mask: Tensor | None) -> None:
        """See `KFAC.count`."""
        if mask is not None and mask.dtype != torch.bool:
            raise ConfigurationError(f"expected a boolean mask, True at real positions, got {mask.dtype}")
        if not self.switch.enabled:
            return
        if units is None and mask is not None:
            units = mask.sum()
        if units is not None and self.options.fisher == "empirical":  # sample_fisher counts its own
            self.store.add_units(units)
            # beside gradients: for those of another micro-batch, or for what comes after `zero_grad()`
            self._ahead = units if self._any_gradient() else 0.0
        self.switch.mask = mask

    def _any_gradient(self) -> bool:
        return any(p.grad is not None for block in self.blocks.values() for p in block.rule.params.values())

    def drop(self) -> None:
        """The gradients of the backward passes since the last step are dropped, and their statistics with them."""
        if not self.switch.enabled or self.options.fisher != "empirical":  # sampled statistics are not of gradients
            return
        self.store.drop_(self._ahead)
        self._ahead = 0.0
        for block in self._moving:
            assert block.moments is not None
            block.moments.sums.zero_()

    def sample_fisher(self, output: Tensor, loss: Loss, *, mask: Tensor | None = None, dim: int = -1) -> None:
        """See `KFAC.sample_fisher`."""
        options, switch, store = self.options, self.switch, self.store
        if options.fisher == "empirical":
            raise ConfigurationError("expected fisher='sampled' or 'exact' for sample_fisher(), got 'empirical'")
        if not switch.enabled:
            return
        if switch.traced:  # a compiled training pass has left statistics among the sampled ones
            store.unstash() if self.sampled else store.forget()
        # one stream for each micro-batch of each step, so that a resumed run draws the same
        generator = torch.Generator(output.device).manual_seed(self.steps << 16 | self.draws)
        self.draws += 1
        sent = signals(output, loss, exact=options.fisher == "exact", mask=mask, dim=dim, generator=generator)
        store.add_units(sent.units)
        before, switch.recording, switch.mask = switch.mask, True, mask
        try:
            for source, gradient in sent.passes:
                torch.autograd.grad(source, [switch.anchor], gradient, retain_graph=True, allow_unused=True)
        finally:
            switch.recording, switch.mask = False, before
        if switch.traced:
            store.stash()
        self.sampled = True

    @stage("fold", payload=lambda curvature, steps: fold_cost(curvature.store))
    def fold(self, steps: int) -> None:
        """Region 1: fold the statistics gathered since the last fold into the moving averages."""
        store = self.store
        if self.options.fisher != "empirical":
            if not self.sampled and self._any_gradient():
                raise NoStatisticsError(
                    f"fisher='{self.options.fisher}' expects sample_fisher(output, loss) before backward() of this "
                    "step, got no call"
                )
            store.unstash()
        if not self.all_seen:
            self._check_taps()
        how = self.options.normalisation(self.signal_scale)
        due = None if self.options.adaptive is None else self._due_rows(steps)
        means = self._means(how, list(self.blocks.values()), self._exchange)
        before = store.folds.clone() if means else store.folds
        fold_(store, self._moving, how, due, self._exchange)
        centre_(store, means, before, how.decay)
        self.sampled = False
        self.draws = 0
        self._ahead = 0.0

    def _check_taps(self) -> None:
        """A layer that has a gradient but whose tap saw nothing is an error, not a layer without curvature."""
        how = self.options.normalisation(self.signal_scale)
        pending, folds = self._exchange.seen(self.store, how), [block.folds() > 0 for block in self.blocks.values()]
        seen = (pending | torch.stack(folds)).tolist()
        self.any_seen, self.all_seen = any(seen), all(seen)
        missed = [
            block.name
            for block, ok in zip(self.blocks.values(), seen, strict=True)
            if not ok and any(p.grad is not None for p in block.rule.params.values())
        ]
        if missed:
            raise NoStatisticsError(
                f"expected a tapped backward pass through every layer with a gradient, got none for {missed}: was the "
                "model compiled and run before KFAC was built (then call torch.compiler.reset()), or is the layer's "
                "forward bypassed?"
            )

    def _due(self, steps: int) -> list[bool]:
        """Which statistics the adaptive rule wants at a step."""
        return [timer[0] <= steps for timer in self.timers.tolist()]

    def _due_rows(self, steps: int) -> Tensor:
        due = torch.tensor(self._due(steps), device=self.store.key_of_row.device)
        return due[self.store.key_of_row]

    def renew_statistics(self, steps: int) -> None:
        """Region 1 and when it comes next; the adaptive rule also renews the inverses of what it has folded."""
        self.clock["next_fold"] = steps + self.options.steps_to_next_fold(steps)
        rule = self.options.adaptive
        if rule is None:
            self.fold(steps)
            return
        due = self._due(steps)
        if not any(due):
            return
        self.fold(steps)
        if not self.any_seen:
            return
        similar = (self._exchange.changes(self.store) < rule.alpha**2).tolist()
        for timer, is_due, (to_last, to_before) in zip(self.timers, due, similar, strict=True):
            if is_due:
                _, last, before = timer.tolist()
                interval = rule.next(last, before, to_last, to_before)
                timer.copy_(torch.tensor([steps + interval, interval, last]))
        folded = [key for key, is_due in zip(self.store.keys, due, strict=True) if is_due]
        self.invert(folded if self.inverted else None)

    # ---- inverses

    def invert(self, keys: Sequence[FactorKey] | None = None, shifts: bool = True) -> None:
        """Region 2: renew damped inverses or eigenbases, all or those of some factors, with what follows from them."""
        dampings = None
        if shifts:
            factor = self.options.damping_rule.factor(self.steps) * self.damping_gain
            dampings = self._per_block("damping") * factor, self._per_block("relative_damping") * factor
        refresh_(self.store, self._turned, keys, dampings, self._exchange)
        owners = None if keys is None else {key.block for key in keys}
        if any(owners is None or block.index in owners for block in self._moving):
            self.clock["next_fold"] = self.steps + 1  # second moments in the new basis
        self.inverted = True
        self.monitor.watch()

    @torch.no_grad()
    def refresh(self) -> None:
        """Fold pending statistics, if any, and recompute all damped inverses now."""
        if bool(self._exchange.seen(self.store, self.options.normalisation(self.signal_scale)).any()):
            self.fold(self.steps)
        if not self.any_seen:
            raise NoStatisticsError("refresh() needs statistics: run loss.backward() first")
        self.invert()

    def ensure_inverse(self) -> None:
        """`refresh`, if there never was one."""
        if not self.inverted:
            self.refresh()

    def renew_inverses(self, steps: int) -> None:
        """Region 2: all at once, or one part at a step until every inverse is new."""
        if self.options.adaptive is not None and self.inverted:
            return
        clock = self.clock
        due = steps >= clock["next_inverse"] or not self.inverted
        if due and clock["renewal"] == IDLE:
            clock["next_inverse"] = steps + self.options.steps_to_next_inverse(steps)
            if len(self.parts) == 1 or not self.inverted:
                self.invert()
                return
            clock["renewal"] = 0
        at = clock["renewal"]
        if at != IDLE:
            self.invert(self.parts[at], shifts=at == 0)
            clock["renewal"] = at + 1 if at + 1 < len(self.parts) else IDLE

    # ---- between steps

    def wanted(self, steps: int) -> bool:
        """Whether the backward pass of a step is to give statistics; marks the blocks that are due."""
        if self.options.adaptive is None or not self.any_seen:
            return steps >= self.clock["next_fold"] or not self.any_seen
        due = due_blocks(self.store.keys, self._due(steps))
        for block in self.blocks.values():
            block.due = block.index in due
        return bool(due)

    def resume(self) -> None:
        """Derive what is not saved from what was loaded; pending statistics are gone."""
        self.store.forget()
        self.sampled, self.draws = False, 0
        for block in self.blocks.values():
            if block.moments is not None:
                block.moments.sums.zero_()
            block.renew_gains_()
        self.any_seen = self.inverted = bool((self.store.folds > 0).any())
        self.all_seen = False
