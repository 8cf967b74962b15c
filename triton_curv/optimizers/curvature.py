"""The curvature of a model: its taps, blocks and factors, and when they are renewed. KFAC steps with it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from triton_curv.blocks import Block, FactorStore, Rule
from triton_curv.blocks.bank import FactorKey, Normalisation
from triton_curv.blocks.centre import centred_blocks, gradients_of_biases, means_of, outer
from triton_curv.blocks.cost import inversion_work
from triton_curv.blocks.moments import Moments, has_sample_rows
from triton_curv.blocks.store_cost import fold_cost
from triton_curv.capture import CaptureSwitch, attach_taps
from triton_curv.errors import ConfigurationError, NoStatisticsError
from triton_curv.health import EVENTS, HealthMonitor
from triton_curv.nvtx import stage
from triton_curv.optimizers.copies import weakly
from triton_curv.optimizers.exchange import Exchange
from triton_curv.optimizers.fisher import Loss, signals
from triton_curv.optimizers.hyper_slots import SLOT
from triton_curv.optimizers.kfac_options import KFACOptions, due_blocks, refresh_parts
from triton_curv.optimizers.regions import Folded, Lambdas, Regions
from triton_curv.optimizers.scaler import LeftOut
from triton_curv.optimizers.traced import ALL, IDLE, Plan, register_store
from triton_curv.optimizers.turns import PERIODS, Turns

CLOCK = {"next_fold": 0, "next_inverse": 0, "renewal": IDLE, **PERIODS}  # saved with the first parameter group


class Curvature:
    """Statistics gathered by taps, folded into averages, inverted; each when it is due.

    `clock` is the parameter group that holds "step" and the entries of `CLOCK`; `current_rows` brings the rows of
    hyper-parameters up to date, of which `group_of_block` says which is each block's.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Mapping[str, Rule],
        options: KFACOptions,
        grad_scaler: torch.amp.GradScaler | None,
        clock: dict[str, Any],
        current_rows: Callable[[], Tensor],
        group_of_block: Sequence[int],
        exchange: Exchange,
        regions: Regions,
    ) -> None:
        self.options = options
        self.clock = clock
        self._scaler = grad_scaler
        self.left_out = LeftOut(grad_scaler)
        self._current_rows = current_rows
        self.exchange = exchange
        self.regions = regions
        some = next(iter(next(iter(rules.values())).params.values()))
        wide = any(p.dtype == torch.float64 for rule in rules.values() for p in rule.params.values())
        dtype, device = torch.float64 if wide else torch.float32, some.device
        for name, rule in rules.items():
            for p in rule.params.values():
                if p.device != device:
                    raise ConfigurationError(f"expected all layers on {device}, got '{name}' on {p.device}")
        shapes = [dict(rule.factor_shapes) for rule in rules.values()]
        tolerance = options.tolerance_on(device, alone=exchange.held is None and regions.compiling is None)
        self.store = FactorStore(shapes, dtype, device, options.inverse, exchange.held, tolerance)
        self.store_name = register_store(self.store)
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
        self.moving = [block for block in self.blocks.values() if block.moments is not None]
        centred = centred_blocks(self.blocks.values()) if options.centred else []
        self.folded = Folded(self.moving, centred, options.loss_scale)
        self.turned = [block for block in self.blocks.values() if block.gains is not None]
        exchange.attach(self.store, self.switch)
        inversions = [inversion_work(rule) for rule in rules.values()]
        work = torch.zeros(len(rules), dtype=torch.float64, device=device)
        self.turns = Turns(clock, options, work, inversions, regions.compiling is not None)
        if self.turns.wanted:
            self.switch.meter = {}
        self.mixed = False  # whether blocks whose turn it is not may have pending statistics
        if grad_scaler is not None:
            self.switch.on_forward = weakly(self.drop_left_out)
        self.handles = attach_taps(model, self.blocks.values(), self.switch)
        self.inverted = False
        self.any_seen = self.all_seen = False  # whether statistics of any block, of all blocks, have come
        self.sampled = False  # whether `sample_fisher` has run since the last fold
        self.draws = 0  # calls of it in this step
        self._ahead: Tensor | float = 0.0  # what `count` last said, if it was beside gradients
        self._mark: Tensor | None = None  # and the counts of then
        self.events = torch.zeros(len(EVENTS), dtype=torch.int64, device=device)
        self.store.discarded, self.store.failed = self.events[1], self.events[2]
        self.monitor = HealthMonitor(self.events, quiet=exchange.place > 0)
        self.damping_gain = torch.ones((), dtype=dtype, device=device)
        self._gain = self.damping_gain.view(1)  # graphs take a 0-dim float64 tensor for a number
        self.group_of_block = torch.tensor(group_of_block, dtype=torch.int64, device=device)
        # (next step, last interval, the one before) of each statistic, for the adaptive rule
        self.timers = torch.tensor([[0, 1, 1]] * len(self.store.keys), dtype=torch.int64)

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return int(self.clock["step"])

    @property
    def signal_scale(self) -> float | Tensor:
        """What a GradScaler multiplies the loss with, where it is."""
        return 1.0 if self._scaler is None else self._scaler.scale(torch.ones_like(self.damping_gain))

    def normalisation(self, rows: Tensor) -> Normalisation:
        """How pending sums become statistics, by the rows of hyper-parameters."""
        return self.options.normalisation(1.0 if self._scaler is None else rows[0, SLOT["signal_scale"]])

    def lambdas(self, rows: Tensor) -> Lambdas:
        """What damps each block, by the rows of hyper-parameters."""
        return Lambdas(rows, self.group_of_block, self._gain)

    # ---- statistics

    def averages_of(self, block: Block) -> dict[str, Tensor]:
        """The block's factors as they are once pending statistics are folded in."""
        how = self.options.normalisation(self.signal_scale)
        factors = {name: self.store.peek(key, how) for name, key in block.keys.items()}
        pending = self.store.held is None  # on several ranks `peek` leaves out what has not been folded
        blocks = centred_blocks([block]) if self.options.centred and pending else []
        if blocks:
            gradients = gradients_of_biases(blocks, self.store.samples)
            counts = torch.stack((self.store.counts[:, 0], self.store.seen()))
            means = means_of(blocks, gradients, counts, how, self.options.loss_scale)
            (key,), (signal,), rows = means.keys, means.signals, self.store.rows(means.keys[0])
            scale, weight = (vector[rows] for vector in self.store.pending(how))
            (most,) = means.weights([self.store.traces(sums=True)[rows] * scale])
            factors[key.name].sub_(outer(signal, self.store.size(key)) * (weight * most)[:, None, None])
        return factors

    def count(self, units: float | Tensor | None, mask: Tensor | None) -> None:
        """See `KFAC.count`."""
        if mask is not None and mask.dtype != torch.bool:
            raise ConfigurationError(f"expected a boolean mask, True at real positions, got {mask.dtype}")
        if not self.switch.enabled:
            return
        self.drop_left_out()
        if units is None and mask is not None:
            units = mask.sum()
        if units is not None and self.options.fisher == "empirical":  # sample_fisher counts its own
            self.store.add_units(units)
            # beside gradients: for those of another micro-batch, or for what comes after `zero_grad()`
            beside = bool(self.with_gradients())
            self._ahead, self._mark = (units, self.store.counts.clone()) if beside else (0.0, None)
        self.switch.mask = mask

    def drop(self) -> None:
        """The gradients of the backward passes since the last step are dropped, and their statistics with them."""
        if not self.switch.enabled or self.options.fisher != "empirical":  # sampled statistics are not of gradients
            return
        ahead = self._ahead
        if self._mark is not None:  # backward passes since then were what it was said of
            ahead = torch.where((self.store.counts == self._mark).all(), ahead, 0.0)
        self.store.drop_(ahead)
        self._ahead, self._mark = 0.0, None
        for block in self.moving:
            assert block.moments is not None
            block.moments.sums.zero_()

    def drop_left_out(self) -> None:
        """Drop the statistics of a step that a GradScaler left out, if the model's `zero_grad` has left them."""
        if self.left_out.seen():
            self.drop()

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
        place = self.exchange.place << 48  # ranks draw for other samples, so other numbers
        generator = torch.Generator(output.device).manual_seed(place | self.steps << 16 | self.draws)
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
        store, how = self.store, self.normalisation(self._current_rows())
        if self.options.fisher != "empirical":
            self.check_sampled()
            store.unstash()
        if not self.all_seen:
            self.check_taps(self.exchange.seen(store, how), self.with_gradients())
        due = None if self.options.adaptive is None else self._due_rows(steps)
        turn = self._turn()
        if turn is None:
            self.check_mask()
        self.regions.fold(store, self.folded, how, due, self.exchange, turn)
        self.sampled = self.mixed = False
        self.draws = 0
        self._ahead, self._mark = 0.0, None
        if self.turns.wanted:
            self._weigh()

    def _turn(self) -> frozenset[int] | None:
        """The blocks that have pending statistics, if it is known that others have none."""
        if self.options.adaptive is not None or self.mixed or self.switch.traced:
            return None
        turn = frozenset(block.index for block in self.blocks.values() if block.due)
        return turn if len(turn) < len(self.blocks) else None

    def _weigh(self) -> None:
        """Note what is compiled and, once, what statistics of each block cost."""
        traced, meter = self.switch.traced, self.switch.meter
        if meter is not None:
            work = [*(meter.get(index, 0.0) for index in range(len(self.blocks))), float(traced)]
            *total, anywhere = self.exchange.everywhere(self.turns.work.new_tensor(work)).tolist()
            traced = anywhere > 0
            self.turns.work.copy_(self.turns.work.new_tensor(total))
            self.turns.forget()
            self.switch.meter = None if self.turns.known or traced else {}
        if traced:
            self.turns.note_compiled("model")

    def with_gradients(self) -> list[int]:
        """The blocks some parameter of which has a gradient."""
        return [
            block.index for block in self.blocks.values() if any(p.grad is not None for p in block.rule.params.values())
        ]

    def check_sampled(self) -> None:
        """Raise NoStatisticsError for a Fisher that needs `sample_fisher`, which was not called."""
        if self.options.fisher != "empirical" and not self.sampled and self.with_gradients():
            raise NoStatisticsError(
                f"fisher='{self.options.fisher}' expects sample_fisher(output, loss) before backward() of this step, "
                "got no call"
            )

    def check_mask(self) -> None:
        """Raise ConfigurationError for a mask of `count` that fits no layer, where layers could use one."""
        if self.switch.misfits and not self.switch.mask_fits:
            raise ConfigurationError(
                "expected a mask of the shape of the positions of some layer, (samples, positions), got one that fits "
                f"none of {sorted(self.switch.misfits)}; to say N alone, count(mask.sum()) without a mask"
            )

    def check_taps(self, pending: Tensor, with_gradients: Sequence[int]) -> None:
        """A layer that has a gradient but whose tap saw nothing is an error, not a layer without curvature."""
        folds = [block.folds() > 0 for block in self.blocks.values()]
        seen = (pending | torch.stack(folds)).tolist()
        self.any_seen, self.all_seen = any(seen), all(seen)
        missed = [
            block.name
            for block, ok in zip(self.blocks.values(), seen, strict=True)
            if not ok and block.due and block.index in with_gradients
        ]
        if missed:
            raise NoStatisticsError(
                f"expected a tapped backward pass through every layer with a gradient, got none for {missed}: was the "
                "model compiled and run before KFAC was built (then call torch.compiler.reset()), or is the layer's "
                "forward bypassed, or inside a transform of torch.func?"
            )

    def _due(self, steps: int) -> list[bool]:
        """Which statistics the adaptive rule wants at a step."""
        return [timer[0] <= steps for timer in self.timers.tolist()]

    def _due_rows(self, steps: int) -> Tensor:
        due = torch.tensor(self._due(steps), device=self.store.key_of_row.device)
        return due[self.store.key_of_row]

    def statistics_due(self, steps: int) -> bool:
        """Whether statistics of some block are to be folded at a step."""
        if steps >= self.clock["next_fold"] or not self.any_seen:
            return True
        return bool(self.turns.statistics(steps))

    def capture(self, enabled: bool) -> None:
        """Take statistics of all blocks until the next step decides again, or take none."""
        self.mixed |= enabled
        for block in self.blocks.values():
            block.due = True
        self.switch.begin_step(enabled)

    def renew_statistics(self, steps: int) -> None:
        """Region 1 and when it comes next; the adaptive rule also renews the inverses of what it has folded."""
        begins = steps >= self.clock["next_fold"] or not self.any_seen
        rule = self.options.adaptive
        if rule is None:
            self.fold(steps)  # may raise; then the step is still to be made
            if begins:
                self.turns.begin("fold", steps)
            return
        self.turns.begin("fold", steps)
        due = self._due(steps)
        if not any(due):
            return
        self.fold(steps)
        if not self.any_seen:
            return
        similar = (self.exchange.changes(self.store) < rule.alpha**2).tolist()
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
        lambdas = self.lambdas(self._current_rows()) if shifts else None
        self.regions.refresh(self.store, self.turned, keys, lambdas, self.exchange)
        self.note_new_bases(keys)
        self.inverted = True
        self.monitor.watch()

    def note_new_bases(self, keys: Sequence[FactorKey] | None) -> None:
        """Second moments in new bases are wanted at the next step."""
        owners = None if keys is None else {key.block for key in keys}
        if any(owners is None or block.index in owners for block in self.moving):
            self.clock["next_fold"] = self.steps + 1

    @torch.no_grad()
    def refresh(self) -> None:
        """Fold pending statistics, if any, and recompute all damped inverses now."""
        if bool(self.exchange.seen(self.store, self.normalisation(self._current_rows())).any()):
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
        turn = self.turns.inverses(steps) if self.inverted else None
        if turn is not None:
            if steps >= self.clock["next_inverse"]:
                self.turns.begin("inverse", steps)
            if turn:
                self.invert([key for key in self.store.keys if key.block in turn])
            return
        part = self.part_due(steps)
        if part != IDLE:
            self.note_renewal(steps, part)
            self.invert(self.keys_of(part), shifts=part in (ALL, 0))

    def part_due(self, steps: int) -> int:
        """Which of `parts` is to be inverted at a step: a number, `ALL`, or `IDLE` for none."""
        if self.options.adaptive is not None and self.inverted:
            return IDLE
        at: int = self.clock["renewal"]
        if at == IDLE and (steps >= self.clock["next_inverse"] or not self.inverted):
            return ALL if len(self.parts) == 1 or not self.inverted else 0
        return at

    def plan(self, steps: int) -> Plan:
        """What a step does, as far as the host knows before it."""
        fold = steps >= self.clock["next_fold"] or not self.any_seen
        return Plan(fold, str(self.part_due(steps) if fold or self.any_seen else IDLE))

    def note(self, plan: Plan, steps: int, pending: Tensor, with_gradients: Sequence[int]) -> None:
        """What the host has to know and to check when a planned step runs as part of a graph."""
        self.monitor.watch()
        self.turns.note_compiled("step")
        if plan.fold:
            self.turns.begin("fold", steps)
            if with_gradients:
                self.check_sampled()
            if not self.all_seen:
                self.check_taps(pending, with_gradients)
            self.sampled, self.draws, self._ahead, self._mark = False, 0, 0.0, None
        part = int(plan.part)
        if part != IDLE and self.any_seen:
            self.note_renewal(steps, part)
            self.note_new_bases(self.keys_of(part))
            self.inverted = True

    def keys_of(self, part: int) -> list[FactorKey] | None:
        """The factors of a part; None stands for all."""
        return None if part == ALL else self.parts[part]

    def note_renewal(self, steps: int, part: int) -> None:
        """When the next part is due, and the next renewal."""
        if self.clock["renewal"] == IDLE:
            self.turns.begin("inverse", steps)
        if part != ALL:
            self.clock["renewal"] = part + 1 if part + 1 < len(self.parts) else IDLE

    # ---- between steps

    def state_of(self, block: Block) -> dict[str, Tensor]:
        """What is saved of a block: views of the buffers."""
        store, found = self.store, dict[str, Tensor]()
        for name, key in block.keys.items():
            rows = store.rows(key)
            found[name] = store.packed(key)
            found[f"{name}_inverse"] = store.view("inverses", key)
            found[f"{name}_failures"] = store.failures[rows]
            found[f"{name}_folds"] = store.folds[rows]
            found[f"{name}_shift"] = store.shifts[rows]
            if store.has_spectra(key):
                found[f"{name}_spectrum"] = store.view("spectra", key)
            if self.options.adaptive is not None:
                found[f"{name}_last"], found[f"{name}_before"] = store.packed(key, 1), store.packed(key, 2)
                found[f"{name}_refresh"] = self.timers[store.keys.index(key)]
        found["samples"] = store.samples[block.index]
        if self.turns.wanted:
            found["work"] = self.turns.work[block.index]
        if block.moments is not None:
            found["moments"], found["moments_folds"] = block.moments.averages, block.moments.folds
        return found

    def wanted(self, steps: int) -> bool:
        """Whether the backward pass of a step is to give statistics; marks the blocks that are due."""
        if self.options.adaptive is None or not self.any_seen:
            turn = self.turns.statistics(steps) if self.any_seen else None
            for block in self.blocks.values():
                block.due = not turn or block.index in turn
            return self.statistics_due(steps)
        due = due_blocks(self.store.keys, self._due(steps))
        for block in self.blocks.values():
            block.due = block.index in due
        return bool(due)

    def resume(self) -> None:
        """Derive what is not saved from what was loaded; pending statistics are gone."""
        self.store.forget()
        self.store.forms += 1
        if self.store.tolerance is None:  # the state may be of an optimizer that has low-rank forms
            self.store.stay_dense_()
        self.sampled, self.draws, self.mixed = False, 0, False
        self.turns.forget()
        if self.turns.wanted:
            self.switch.meter = None if self.turns.known or self.clock["compiled"] else {}
        for block in self.blocks.values():
            if block.moments is not None:
                block.moments.sums.zero_()
            block.renew_gains_()
        self.any_seen = self.inverted = bool((self.store.folds > 0).any())
        self.all_seen = False
