"""K-FAC: natural gradient with Kronecker-factored curvature (arXiv 1811.12019, 2002.06015)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from triton_curv.blocks import Block, FactorStore, NormFisher
from triton_curv.blocks.bank import FactorKey
from triton_curv.blocks.moments import Moments, has_sample_rows
from triton_curv.capture import CaptureSwitch, attach_taps
from triton_curv.coverage import Coverage, coverage_of
from triton_curv.damping import ConstantDamping, DampingRule
from triton_curv.errors import ConfigurationError, NoStatisticsError
from triton_curv.health import EVENTS, HealthMonitor
from triton_curv.hostcheck import known_true
from triton_curv.inverse import RUNGS, InverseName
from triton_curv.optimizers.apply import Work, hyper_vector, precondition, rescale_, scales
from triton_curv.optimizers.fallback import FALLBACKS, FallbackName
from triton_curv.optimizers.fisher import FisherName, Loss, signals
from triton_curv.optimizers.groups import check_hyper_parameters, choose, param_groups_of, rules_of
from triton_curv.optimizers.kfac_options import KFACOptions, Reduction, Rescale, UpdateSize, due_blocks, refresh_parts
from triton_curv.optimizers.matrices import MatrixGroup
from triton_curv.optimizers.state import load_state_in_place
from triton_curv.optimizers.trial import Before, Evaluate, evaluated, predicted_change, reduction_ratio
from triton_curv.schedules import AdaptiveInterval, RefreshSchedule
from triton_curv_kernels import momentum_update_

IDLE = -1  # no renewal of inverses is under way


class KFAC(Optimizer):
    r"""w <- w - lr (G + sqrt(lambda)/pi I)^-1 dW (A + pi sqrt(lambda) I)^-1, layer by layer.

    A = E[a a^T] over samples and positions, G = E[g g^T], pi^2 = (tr A/dim A)/(tr G/dim G): arXiv 1811.12019 section 3.
    Both are moving averages of Fisher statistics taken in a backward pass every `factor_interval` steps; damped
    inverses are renewed every `inverse_interval` steps. Every trainable parameter is trained: those of layers without
    a block by `fallback`; `explain()` says which and why.

    A averages over all rows of all calls of a layer. N, the samples the loss is a mean over, is the leading size of the
    layer's input, added up over the model's forwards since the last step; more calls in one forward add positions only.
    Where the loss is a mean over something else, tokens that are not padding say, `count_units` tells.

    Args:
        model: the module to train; blocks are made for its Linear, Conv1d/2d/3d and BatchNorm1d/2d/3d layers.
        lr: step size. With `update_size="rms"` the root mean square of a layer's step, in units of the weights.
        momentum: in [0, 1). With "rms" an average of the last steps with bias correction, else heavy ball.
        weight_decay: decoupled, w <- (1 - lr weight_decay) w.
        damping: lambda, absolute. None (default): lambda = relative_damping * (tr A/dim A)(tr G/dim G), per block.
        fisher: "empirical": gradients of the training loss itself. "sampled": of labels drawn from the model, by one
            more backward pass in `sample_fisher`, which must be called. "exact": of all outputs, one pass each.
        fallback: "adamw" or "sgd", for parameters without a block, at `fallback_lr` (default: `lr`).
        groups: hyper-parameters by module pattern, [{"modules": "layer1.*", "lr": 0.1}, ...]; the first match wins.
            A group's `damping` may be a multiple of the others' (the paper's BN damping).

    Args, how often and how curvature is inverted:
        factor_interval: steps between statistics, an `EpochInterval`, or an `AdaptiveInterval` for each statistic,
            which renews its inverse at once.
        inverse_interval: steps between renewals of the inverses, or an `EpochInterval`.
        refresh_budget: at most so many factors are inverted in one step, the others in the next ones; None: all.
        inverse: "cholesky"; "eigen", which damps exactly, (s_G s_A + lambda)^-1 in the eigenbasis of G (x) A; or
            "neumann", products alone, started from the last inverse (`damped_inverse_`).
        ekfac: with "eigen", scale by second moments of the per-sample gradients in the eigenbasis instead of s_G s_A
            (Linear and Conv layers). They are taken at capture, not from later mean gradients: those hold the square
            of the mean, which vanishes with the batch size, not the mean of squares. The step after a change of basis
            takes statistics, too.
        factor_decay: weight of the past in the factors' moving average, bias-corrected.
        norm_fisher: "unit" (2x2 per channel), "diagonal" or "full", for batch normalisation.

    Args, the size of the step:
        relative_damping: the part of lambda that scales with curvature; default 0.03, and 0 if `damping` is given.
        damping_rule: multiplies lambda as training goes on: `WarmupDamping`, `ScheduledDamping`,
            `LevenbergMarquardt` (which needs `step(evaluate=...)`).
        update_size: "rms" scales each layer's step to root mean square 1; "kl_clip" scales all steps by
            min(1, sqrt(kl_clip / (lr^2 sum <step, grad>))); "none" is the bare natural gradient of the paper.
        nesterov: look one step ahead; None means yes for "rms" and no otherwise (the paper).
        rescale: after each step, weights of Linear and Conv layers to norm sqrt(2 d_out): "paper" always, "code" (as
            in chainerkfac) only where they are longer.

    Args, what the loss is:
        reduction: how the loss reduces over its samples; with "sum", gradients are divided by the sample count.
        loss_scale: a constant the loss was multiplied with before backward(); gradients still carry it.
        grad_scaler: a torch.amp.GradScaler; its scale is taken out of G (it unscales the gradients itself).
        maximize: ascend instead of descend.

    Raises:
        ConfigurationError: an argument out of range, or a model without any layer that has a block.
        NoStatisticsError: at the first refresh, if a layer has gradients but its tap saw no backward pass; at any, if
            `sample_fisher` was not called for a Fisher that needs it.

    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 3e-3,
        *,
        momentum: float | Tensor = 0.9,
        nesterov: bool | None = None,
        weight_decay: float | Tensor = 0.0,
        damping: float | Tensor | None = None,
        relative_damping: float | Tensor | None = None,
        damping_rule: DampingRule | None = None,
        fisher: FisherName = "empirical",
        fallback: FallbackName = "adamw",
        fallback_lr: float | Tensor | None = None,
        update_size: UpdateSize = "rms",
        kl_clip: float = 1e-3,
        rescale: Rescale = "none",
        factor_decay: float = 0.95,
        factor_interval: int | RefreshSchedule | AdaptiveInterval = 20,
        inverse_interval: int | RefreshSchedule = 20,
        refresh_budget: int | None = None,
        inverse: InverseName = "cholesky",
        ekfac: bool = False,
        norm_fisher: NormFisher = "unit",
        reduction: Reduction = "mean",
        loss_scale: float = 1.0,
        grad_scaler: torch.amp.GradScaler | None = None,
        groups: Sequence[Mapping[str, Any]] = (),
        maximize: bool = False,
    ) -> None:
        choose("norm_fisher", norm_fisher, get_args(NormFisher))
        self.options = KFACOptions(
            fisher=fisher,
            fallback=fallback,
            inverse=inverse,
            ekfac=ekfac,
            update_size=update_size,
            nesterov=update_size == "rms" if nesterov is None else nesterov,
            kl_clip=kl_clip,
            factor_decay=factor_decay,
            factor_interval=factor_interval,
            inverse_interval=inverse_interval,
            refresh_budget=refresh_budget,
            damping_rule=ConstantDamping() if damping_rule is None else damping_rule,
            rescale=rescale,
            reduction=reduction,
            loss_scale=loss_scale,
        )
        if relative_damping is None:
            relative_damping = 0.03 if damping is None else 0.0
        self._model = model
        self._scaler = grad_scaler
        self._opt_called = True  # an LR scheduler built after torch.compile(opt.step) looks for it
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "damping": 0.0 if damping is None else damping,
            "relative_damping": relative_damping,
            "maximize": maximize,
        }
        self._build(defaults, groups, lr if fallback_lr is None else fallback_lr, norm_fisher)

    # ---- construction

    def _build(
        self,
        defaults: dict[str, Any],
        overrides: Sequence[Mapping[str, Any]],
        fallback_lr: float | Tensor,
        norm_fisher: NormFisher,
    ) -> None:
        """Find the layers, lay out their state, attach the taps."""
        model, options = self._model, self.options
        rules, self._reasons = rules_of(model, norm_fisher)
        if not rules:
            raise ConfigurationError(
                "expected a model with at least one trainable Linear, Conv or BatchNorm layer, got none in "
                f"{type(model).__name__}"
            )
        names = {id(p): name for name, p in model.named_parameters()}
        self._names = {p: names[id(p)] for p in model.parameters()}
        param_groups, blocks_of = param_groups_of(model, rules, defaults, overrides, fallback_lr, options.fallback)
        param_groups[0].update(next_fold=0, next_inverse=0, renewal=IDLE)
        self._ready = False  # add_param_group below is the constructor's own
        super().__init__(param_groups, defaults)
        for group in self.param_groups:
            check_hyper_parameters(group)

        ordered = [name for group in blocks_of for name in group]
        some = next(iter(rules[ordered[0]].params.values()))
        wide = any(p.dtype == torch.float64 for rule in rules.values() for p in rule.params.values())
        dtype, device = torch.float64 if wide else torch.float32, some.device
        for name in ordered:
            for p in rules[name].params.values():
                if p.device != device:
                    raise ConfigurationError(f"expected all layers on {device}, got '{name}' on {p.device}")
        shapes = [dict(rules[name].factor_shapes) for name in ordered]
        self._store = FactorStore(shapes, dtype, device, options.inverse)
        if options.adaptive is not None:
            self._store.keep_recent()
        self._parts = refresh_parts(self._store, options.refresh_budget)
        self._switch = CaptureSwitch(enabled=True, records=options.fisher == "empirical", device=device)
        self.blocks: dict[str, Block] = {
            name: Block(name, rules[name], index, self._store, self._averages_of, self._ensure_inverse)
            for index, name in enumerate(ordered)
        }
        if options.ekfac:
            for block in self.blocks.values():
                if block.gains is not None and has_sample_rows(block.rule):
                    block.moments = Moments(block.rule, block.inverses)
        self._handles = attach_taps(model, self.blocks.values(), self._switch)
        self._matrices = [MatrixGroup([self.blocks[n] for n in group], dtype, device) for group in blocks_of]
        self._inverted = False
        self._any_seen = self._all_seen = False  # whether statistics of any block, of all blocks, have come
        self._sampled = False  # whether `sample_fisher` has run since the last fold
        self._events = torch.zeros(len(EVENTS), dtype=torch.int64, device=device)
        self._store.discarded, self._store.failed = self._events[1], self._events[2]
        self._monitor = HealthMonitor(self._events)
        self._damping_gain = torch.ones((), dtype=dtype, device=device)
        # (next step, last interval, the one before) of each statistic, for the adaptive rule
        self._timers = torch.tensor([[0, 1, 1]] * len(self._store.keys), dtype=torch.int64)
        self._init_state()
        self._ready = True

    def _init_state(self) -> None:
        """All state exists from here on; tensors are views of the buffers that the step works on."""
        store, of_model = self._store, {"events": self._events, "damping_gain": self._damping_gain}
        for matrices in self._matrices:
            for row in matrices.rows:
                for part in row.parts:
                    self.state[part.param] = {"momentum_buffer": part.momentum}
                first = self.state[row.parts[0].param]
                for name, key in row.block.keys.items():
                    rows = store.rows(key)
                    first[name] = store.packed(key)
                    first[f"{name}_inverse"] = store.view("inverses", key)
                    first[f"{name}_failures"] = store.failures[rows]
                    first[f"{name}_folds"] = store.folds[rows]
                    first[f"{name}_shift"] = store.shifts[rows]
                    if store.has_spectra(key):
                        first[f"{name}_spectrum"] = store.view("spectra", key)
                    if self.options.adaptive is not None:
                        first[f"{name}_last"], first[f"{name}_before"] = store.packed(key, 1), store.packed(key, 2)
                        first[f"{name}_refresh"] = self._timers[store.keys.index(key)]
                first["samples"] = store.samples[row.block.index]
                if row.block.moments is not None:
                    first["moments"], first["moments_folds"] = row.block.moments.averages, row.block.moments.folds
                first.update(of_model)
                of_model = {}
        for group in self.param_groups:
            if group["kind"] == "fallback":
                for p in group["params"]:
                    self.state[p] = dict(FALLBACKS[self.options.fallback].init_state(p))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Parameters added later have no block; `fallback` trains them, and `explain()` says so."""
        if self.__dict__.get("_ready", False):
            added = {"kind": "fallback", "step": self.param_groups[0]["step"]}
            param_group = {**added, **FALLBACKS[self.options.fallback].defaults, **param_group}
        super().add_param_group(param_group)
        if self.__dict__.get("_ready", False):
            group = self.param_groups[-1]
            check_hyper_parameters(group)
            for p in group["params"]:
                self.state[p] = dict(FALLBACKS[self.options.fallback].init_state(p))
                self._names[p] = f"added parameter {len(self._names)}"
                self._reasons[p] = "added by add_param_group"

    # ---- curvature

    @property
    def factor_interval(self) -> int:
        """Steps from a fold now to the next one."""
        return self.options.steps_to_next_fold(self._steps)

    @property
    def _steps(self) -> int:
        return cast("int", self.param_groups[0]["step"])

    @property
    def _signal_scale(self) -> float:
        return self._scaler.get_scale() if self._scaler is not None else 1.0

    def _averages_of(self, block: Block) -> dict[str, Tensor]:
        """The block's factors as they are once pending statistics are folded in."""
        how = self.options.normalisation(self._signal_scale)
        return {name: self._store.peek(key, how) for name, key in block.keys.items()}

    @torch.no_grad()
    def count_units(self, units: Tensor | float) -> None:
        """Say over how many units the coming loss is a mean, where they are not the samples of the batch.

        Args:
            units: their number; or a boolean mask that is True where a position (token) counts, before `backward()`.
                Linear layers with a row for each position then leave the others out of A. Call it for each micro-batch.
                Compiled models take the number only.

        """
        if not self._switch.enabled:
            return
        if isinstance(units, Tensor) and units.dtype == torch.bool:
            self._switch.mask = units
            units = units.sum()
        self._store.add_units(units)

    def sample_fisher(self, output: Tensor, loss: Loss, *, mask: Tensor | None = None, dim: int = -1) -> None:
        """Statistics by backward passes of their own from the model's `output`; call it before `loss.backward()`.

        With fisher="sampled" one pass with targets drawn from the model, with "exact" one for each output. Parameters'
        gradients stay as they are. Does nothing on steps without statistics, so call it at every one, and for every
        micro-batch. The random numbers depend on the step alone (those of a Distribution are torch's own).

        Args:
            output: what the loss is a function of; logits for "cross_entropy". Its graph is kept. A model compiled by
                inductor must be compiled with `torch._functorch.config.donated_buffer = False` for that.
            loss: "cross_entropy": softmax over `dim`; every other position is a unit, as in the mean that
                `torch.nn.functional.cross_entropy` takes. "mse": a unit is a sample, its loss the mean of squares.
                A torch Distribution of the targets, made of the output: a unit is one entry of the leading dimension.
            mask: True where a unit counts (no padding, no ignore_index), of the shape of the units; N counts these.
                For "mse" and distributions its dimensions are those of the units.
            dim: the dimension of classes.

        Raises:
            ConfigurationError: fisher="empirical", or arguments that do not fit together.

        """
        options, switch, store = self.options, self._switch, self._store
        if options.fisher == "empirical":
            raise ConfigurationError("expected fisher='sampled' or 'exact' for sample_fisher(), got 'empirical'")
        if not switch.enabled:
            return
        if switch.traced:  # a compiled training pass has left statistics among the sampled ones
            store.unstash() if self._sampled else store.forget()
        generator = torch.Generator(output.device).manual_seed(self._steps * 4 + 1)
        generator.set_offset(0) if output.device.type == "cuda" else None
        sent = signals(output, loss, exact=options.fisher == "exact", mask=mask, dim=dim, generator=generator)
        store.add_units(sent.units)
        switch.recording, switch.mask = True, mask
        try:
            for source, gradient in sent.passes:
                torch.autograd.grad(source, [switch.anchor], gradient, retain_graph=True, allow_unused=True)
        finally:
            switch.recording, switch.mask = False, None
        if switch.traced:
            store.stash()
        self._sampled = True

    def _fold(self, steps: int) -> None:
        """Region 1: fold the statistics gathered since the last fold into the moving averages."""
        store = self._store
        if self.options.fisher != "empirical":
            if not self._sampled and any(p.grad is not None for p in self._names):
                raise NoStatisticsError(
                    f"fisher='{self.options.fisher}' expects sample_fisher(output, loss) before backward() of this "
                    "step, got no call"
                )
            store.unstash()
        if not self._all_seen:
            self._check_taps()
        how = self.options.normalisation(self._signal_scale)
        if self.options.ekfac:
            scale, weight = store.pending(how)
            for block in self.blocks.values():
                if block.moments is not None:
                    rows = store.rows(block.keys["G"])
                    block.moments.fold_(torch.where(weight[rows] > 0, scale[rows], 0.0), how.decay)
        store.fold_(how, None if self.options.adaptive is None else self._due_rows(steps))
        self._sampled = False

    def _due(self, steps: int) -> list[bool]:
        """Which statistics the adaptive rule wants at a step."""
        return [timer[0] <= steps for timer in self._timers.tolist()]

    def _due_rows(self, steps: int) -> Tensor:
        due = torch.tensor(self._due(steps), device=self._store.key_of_row.device)
        return due[self._store.key_of_row]

    def _check_taps(self) -> None:
        """A layer that has a gradient but whose tap saw nothing is an error, not a layer without curvature."""
        pending, folds = self._store.seen() > 0, [block.folds() > 0 for block in self.blocks.values()]
        seen = (pending | torch.stack(folds)).tolist()
        self._any_seen, self._all_seen = any(seen), all(seen)
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

    def _invert(self, keys: Sequence[FactorKey] | None = None, shifts: bool = True) -> None:
        """Region 2: renew damped inverses or eigenbases, all or those of some factors, with what follows from them."""
        if shifts:
            factor = self.options.damping_rule.factor(self._steps) * self._damping_gain
            self._store.set_shifts_(self._per_block("damping") * factor, self._per_block("relative_damping") * factor)
        self._store.invert_(keys)
        if self.options.inverse == "eigen":
            owners = None if keys is None else {key.block for key in keys}
            for block in self.blocks.values():
                if owners is None or block.index in owners:
                    if block.moments is not None:
                        block.moments.restart_()
                        self.param_groups[0]["next_fold"] = self._steps + 1  # second moments in the new basis
                    block.renew_gains_()
        self._inverted = True
        self._monitor.watch()

    def _per_block(self, key: str) -> Tensor:
        like = self._store.samples
        return torch.cat(
            [
                torch.as_tensor(group[key], dtype=like.dtype, device=like.device).expand(len(matrices.rows))
                for group, matrices in zip(self.param_groups, self._matrices, strict=False)
            ]
        )

    @torch.no_grad()
    def refresh(self) -> None:
        """Fold pending statistics, if any, and recompute all damped inverses now."""
        if bool(self._store.counts.any()):
            self._fold(self._steps)
        if not self._any_seen:
            raise NoStatisticsError("refresh() needs statistics: run loss.backward() first")
        self._invert()

    def _ensure_inverse(self) -> None:
        if not self._inverted:
            self.refresh()

    # ---- the step

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch's overloads
        self, closure: Callable[[], float | Tensor] | None = None, *, evaluate: Evaluate | None = None
    ) -> float | Tensor | None:
        """One step: fold statistics and renew inverses when due, precondition, scale, move.

        A step whose gradients are not finite changes nothing and is counted (`health()`).

        Args:
            closure: called first, under autograd; returns the loss.
            evaluate: returns the loss of this step's batch as the weights are, without backward(). Needed, and then
                called twice, at the steps where the damping rule measures what the last step achieved.

        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        steps = self._steps
        if steps >= self.param_groups[0]["next_fold"] or not self._any_seen:
            self._renew_statistics(steps)
        if self._any_seen:
            self._renew_inverses(steps)
        before = self._before(steps, evaluate)
        self._apply(steps)
        if before is not None:
            self._judge(before, cast("Evaluate", evaluate), steps)
        self._set_steps(steps + 1)
        return loss

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # keeps opt.step compilable, COMPILE_AND_DIST 2.1

    def _renew_statistics(self, steps: int) -> None:
        """Region 1 and when it comes next; the adaptive rule also renews the inverses of what it has folded."""
        self.param_groups[0]["next_fold"] = steps + self.options.steps_to_next_fold(steps)
        rule = self.options.adaptive
        if rule is None:
            self._fold(steps)
            return
        due = self._due(steps)
        if not any(due):
            return
        self._fold(steps)
        if not self._any_seen:
            return
        similar = (self._store.changes() < rule.alpha**2).tolist()
        for timer, is_due, (to_last, to_before) in zip(self._timers, due, similar, strict=True):
            if is_due:
                _, last, before = timer.tolist()
                interval = rule.next(last, before, to_last, to_before)
                timer.copy_(torch.tensor([steps + interval, interval, last]))
        folded = [key for key, is_due in zip(self._store.keys, due, strict=True) if is_due]
        self._invert(folded if self._inverted else None)

    def _renew_inverses(self, steps: int) -> None:
        """Region 2: all at once, or one part at a step until every inverse is new."""
        if self.options.adaptive is not None and self._inverted:
            return
        clock = self.param_groups[0]
        due = steps >= clock["next_inverse"] or not self._inverted
        if due and clock["renewal"] == IDLE:
            clock["next_inverse"] = steps + self.options.steps_to_next_inverse(steps)
            if len(self._parts) == 1 or not self._inverted:
                self._invert()
                return
            clock["renewal"] = 0
        at = clock["renewal"]
        if at != IDLE:
            self._invert(self._parts[at], shifts=at == 0)
            clock["renewal"] = at + 1 if at + 1 < len(self._parts) else IDLE

    def _set_steps(self, steps: int) -> None:
        for group in self.param_groups:
            group["step"] = steps
        self._switch.mask = None
        wanted = steps >= self.param_groups[0]["next_fold"] or not self._any_seen
        if self.options.adaptive is not None and self._any_seen:
            due = due_blocks(self._store.keys, self._due(steps))
            wanted = bool(due)
            for block in self.blocks.values():
                block.due = block.index in due
        self.capture(wanted)

    def _apply(self, steps: int) -> None:
        """Region 3: P = G^-1 D A^-1 for every block, its size, momentum, decay, update."""
        work = [
            Work(group, matrices, lists)
            for group, matrices in zip(self.param_groups, self._matrices, strict=False)
            if (lists := matrices.active()).rows
        ]
        for each in work:
            precondition(each, self._store.samples, self.options)
        norms = [torch.stack(torch._foreach_norm(each.lists.row_updates)) for each in work]
        loose = [cast("Tensor", p.grad) for _, params in self._loose() for p in params]
        of_loose = [torch.stack(torch._foreach_norm(loose))] if loose else []
        finite = torch.cat([*norms, *of_loose, self._damping_gain.new_zeros(1)]).sum().isfinite()
        healthy = known_true(finite)
        if not healthy:
            self._events[0].add_(~finite)
            self._monitor.watch()
        for each, scale in zip(work, scales(work, norms, self.options), strict=True):
            hyper = hyper_vector(each.group, steps, self.options, self._store.samples)
            if not healthy:
                each.matrices.updates.masked_fill_(~finite, 0.0)
                scale = torch.where(finite, scale, 0.0)
                hyper = torch.where(finite, hyper, each.matrices.idle)
            of_row = (-scale if each.group["maximize"] else scale).unbind()
            of_param = [of_row[row] for row in each.lists.row_of_param]
            momentum_update_(each.lists.params, each.lists.momenta, each.lists.updates, of_param, hyper)
        if self.options.rescale != "none":
            weights = [p for each in work for p in each.lists.params if p.dim() > 1]
            rescale_(weights, self.options.rescale, finite)
        for group, params in self._loose():
            if params:
                rule = FALLBACKS[self.options.fallback]
                rule.update(params, self.state, group, None if healthy else finite)

    def _loose(self) -> Iterator[tuple[dict[str, Any], list[nn.Parameter]]]:
        """Parameter groups without blocks, and those of their parameters that have gradients."""
        for group in self.param_groups:
            if group["kind"] == "fallback":
                yield group, [p for p in group["params"] if p.grad is not None]

    # ---- was it a good step?

    def _before(self, steps: int, evaluate: Evaluate | None) -> Before | None:
        """What a measured step starts from; None where the damping rule measures nothing."""
        interval = self.options.damping_rule.interval
        if not interval or steps % interval:
            return None
        if evaluate is None:
            raise ConfigurationError(
                f"{type(self.options.damping_rule).__name__} expects step(evaluate=...) every {interval} steps, a "
                "function that returns the loss of the batch without backward(); got none"
            )
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        changing = ("momentum_buffer", "exp_avg", "exp_avg_sq")
        state = [self.state[p][name] for p in params for name in changing if name in self.state[p]]
        return Before.of(evaluated(self._model, evaluate, steps), params, state)

    def _judge(self, before: Before, evaluate: Evaluate, steps: int) -> None:
        """The reduction ratio moves the damping; a step that raised the loss is taken back if the rule says so."""
        rule, summed = self.options.damping_rule, self.options.reduction == "sum"
        after = evaluated(self._model, evaluate, steps)
        units = self._store.samples.amax() if summed else 1.0
        predicted = predicted_change(self.blocks.values(), before, self.options.loss_scale, units)
        sign = -1.0 if self.param_groups[0]["maximize"] else 1.0
        ratio = reduction_ratio(sign * before.loss, sign * after, sign * predicted)
        self._damping_gain.copy_(rule.adapt(self._damping_gain, ratio.to(self._damping_gain)))
        if rule.reject:
            worse = ~(sign * after <= sign * before.loss)
            before.restore_(worse)
            self._events[3].add_(worse.to(self._events.device))
            self._monitor.watch()

    # ---- state and reports

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a state into the existing buffers, dtypes kept (torch's default casts factors and rebinds them).

        Raises StateMismatchError if the state is of another model or optimizer.
        """
        load_state_in_place(self, state_dict)
        self._store.forget()
        self._sampled = False
        for block in self.blocks.values():
            if block.moments is not None:
                block.moments.sums.zero_()
            block.renew_gains_()
        self._any_seen = self._inverted = bool((self._store.folds > 0).any())
        self._all_seen = False
        self._set_steps(self._steps)

    def capture(self, enabled: bool) -> None:
        """Take statistics in the coming backward passes, or take none, until the next `step()` decides again."""
        self._switch.begin_step(enabled)

    def detach(self) -> None:
        """Take the taps off the model; the optimizer can't step with fresh curvature afterwards."""
        self._switch.enabled = False
        for handle in self._handles:
            handle.remove()

    def explain(self) -> Coverage:
        """Which parameter is trained how, and why: printable, one row for each parameter."""
        return coverage_of(self.blocks, self.param_groups, self._names, self._reasons, self.options.fallback)

    def health(self) -> dict[str, dict[str, Any]]:
        """Per block: residual of the last inverses, failed tries in a row, rung of the ladder.

        "optimizer": how often a step was skipped ("skipped_steps") or taken back ("rejected_steps"), statistics were
        dropped ("discarded_statistics") and inversions failed ("failed_inverses"); and the damping's multiplier.
        """
        report: dict[str, dict[str, Any]] = {}
        for name, block in self.blocks.items():
            rows = [self._store.rows(key) for key in block.keys.values()]
            report[name] = {
                "residual": max(float(self._store.residuals[r].max()) for r in rows),
                "failures": max(int(self._store.failures[r].max()) for r in rows),
                "rung": RUNGS[max(int(self._store.rungs[r].max()) for r in rows)],
            }
        counts = dict(zip(EVENTS, self._events.tolist(), strict=True))
        gain = float(self._damping_gain) * self.options.damping_rule.factor(self._steps)
        report["optimizer"] = {**counts, "damping_gain": gain}
        return report
