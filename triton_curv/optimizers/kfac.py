"""K-FAC: natural gradient with Kronecker-factored curvature (arXiv 1811.12019, 2002.06015)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from triton_curv.blocks import LayerOptions, NormFisher, WeightSharing
from triton_curv.coverage import Coverage, coverage_of
from triton_curv.damping import ConstantDamping, DampingRule
from triton_curv.errors import ConfigurationError
from triton_curv.health import health_of
from triton_curv.hostcheck import known_true
from triton_curv.inverse import InverseName
from triton_curv.nvtx import stage
from triton_curv.optimizers.copies import Rebuilt, release_with, weakly
from triton_curv.optimizers.curvature import CLOCK, Curvature
from triton_curv.optimizers.exchange import Alone, Exchange
from triton_curv.optimizers.fallback import FALLBACKS, FallbackName, LooseGroup
from triton_curv.optimizers.fisher import FisherName, Loss
from triton_curv.optimizers.groups import check_hyper_parameters, param_groups_of, rules_of, warn_of_untrained
from triton_curv.optimizers.hyper import HyperParameters, OfModel, values_of
from triton_curv.optimizers.kfac_options import Even, KFACOptions, Reduction, Rescale, UpdateSize
from triton_curv.optimizers.regions import Regions, fold_, refresh_
from triton_curv.optimizers.state import load_state_in_place
from triton_curv.optimizers.traced import ALL, IDLE, Plan, begin_step_, register, require_gradients, stay_traceable
from triton_curv.optimizers.trial import Evaluate
from triton_curv.optimizers.trials import Trials
from triton_curv.optimizers.watchers import watchable
from triton_curv.schedules import GROWING, AdaptiveInterval, RefreshSchedule
from triton_curv.sharding.choice import exchange_for
from triton_curv.sharding.local import like
from triton_curv.sharding.options import Sharding
from triton_curv.sharding.ranks import Where, find_ranks


class KFAC(Rebuilt):
    r"""w <- w - lr (G + sqrt(lambda)/pi I)^-1 dW (A + pi sqrt(lambda) I)^-1, layer by layer.

    A = E[a a^T] over samples and positions, G = E[g g^T], pi^2 = (tr A/dim A)/(tr G/dim G): arXiv 1811.12019 section 3.
    Both are moving averages of Fisher statistics taken in a backward pass every `factor_interval` steps; damped
    inverses are renewed every `inverse_interval` steps. Every trainable parameter is trained: those of layers without
    a block by `fallback`; `explain()` says which and why.

    A averages over all rows of all calls of a layer. N, the samples the loss is a mean over, is the leading size of the
    layer's input, added up over the model's forwards since the last step; more calls in one forward add positions only.
    Where the loss is a mean over something else (tokens, unmasked tokens), say so with `count()`.

    Args:
        model: the module to train; blocks are made for its Linear, Conv, ConvTranspose, Embedding, normalisation and
            MultiheadAttention layers, for tied weights, and for what `register_block` says.
        lr: step size. With `update_size="matched"` the root mean square of the step of a layer with 64 inputs, in units
            of the weights, while steps agree; with "rms" that of every layer. 3e-2 served ten tasks of all widths.
        momentum: in [0, 1). With "matched" and "rms" an average of the last steps with bias correction, else heavy
            ball.
        weight_decay: decoupled, w <- (1 - lr weight_decay) w.
        damping: lambda, absolute. None (default): lambda = relative_damping * (tr A/dim A)(tr G/dim G), per block: it
            follows the scale of the loss, so that a sum over pixels needs no other value than a mean.
        fisher: "empirical": gradients of the training loss itself. "sampled": of labels drawn from the model, by one
            more backward pass in `sample_fisher`, which must be called. "exact": of all outputs, one pass each.
        centred: with "empirical", G is the covariance of the output gradients in place of their second moment, where a
            Linear or Conv layer has a bias (whose gradient is their mean): their mean is the signal, not curvature, and
            at the start, when all samples pull one way, it would damp the very direction that all want. Default: yes,
            unless `damping` is given.
        fallback: "adamw" or "sgd", for parameters without a block, at `fallback_lr` (default: `lr`).
        groups: hyper-parameters by module pattern, [{"modules": "layer1.*", "lr": 0.1}, ...]; the first match wins.
            Also the fields of `LayerOptions`. A group's `damping` may be a multiple of the others' (the paper's BN).

    Args, how often and how curvature is inverted:
        factor_interval: steps between statistics, an `EpochInterval`, or an `AdaptiveInterval` for each statistic,
            which renews its inverse at once. Default: `GrowingInterval(32)`, at steps 0, 1, 2, 4, 8, 16, 32, then every
            32: curvature moves fastest at the start, where one batch tells little of it.
        inverse_interval: steps between renewals of the inverses, or a schedule; as above.
        refresh_budget: "even": layers take turns in an interval, of about equal work, with statistics and inverses:
            no step has all of it. Under a compiled model, whose taps are on or off together, and with sampled and
            exact Fisher, inverses alone take turns; in compiled steps nothing does (`explain()` says so). A number:
            statistics of all layers in one step, at most so many factors inverted in each. None: all at once.
        inverse: "cholesky"; "eigen", which damps exactly, (s_G s_A + lambda)^-1 in the eigenbasis of G (x) A;
            "neumann", products alone, started from the last inverse (`damped_inverse_`); "low_rank": of factors with
            256 rows or more the directions that stand out, the others at their mean (`blocks.low_rank`), where that
            needs no more than a third of them. "auto": "low_rank" on a CPU, on one rank, not compiled; else "cholesky".
        inverse_tolerance: the largest relative error of a damped factor in a low-rank form.
        ekfac: with "eigen", scale by second moments of the per-sample gradients in the eigenbasis instead of s_G s_A
            (Linear and Conv layers). They are taken at capture, not from later mean gradients: those hold the square
            of the mean, which vanishes with the batch size, not the mean of squares. The step after a change of basis
            takes statistics, too.
        factor_decay: weight of the past in the factors' moving average, bias-corrected.
        norm_fisher: "unit" (2x2 per channel), "diagonal" or "full", for normalisation layers.
        weight_sharing: "expand" or "reduce" (arXiv 2311.00636): whether positions of a sample (tokens, pixels) are rows
            of their own, or are averaged (inputs) and summed (gradients) first.
        max_factor_dim: factors with more rows are split into diagonal blocks or made diagonal; `explain()` says which.
        max_output_dim: Linear layers with more outputs have a diagonal G.
        conv_samples: convolutions take A from so many samples of a batch (more for many coordinates); 0: from all.
        batch_dim: the dimension of samples in inputs (samples, positions, features); 1 for (time, batch, features).

    Args, the size of the step:
        relative_damping: the part of lambda that scales with curvature; default 0.3, and 0 if `damping` is given. Less
            lets directions of little curvature, where a batch's gradient is mostly noise, rule the step.
        damping_rule: moves lambda: `WarmupDamping`, `ScheduledDamping`, `LevenbergMarquardt` (`step(evaluate=...)`).
        update_size: "matched" scales each layer's step to root mean square sqrt(64 / inputs), so that the outputs of
            narrow and wide layers change alike, and lr by how far the last steps agree (see `agreement`), so that steps
            get shorter as noise takes over; "rms" to root mean square 1; "kl_clip" scales all steps by
            min(1, sqrt(kl_clip / (lr^2 sum <step, grad>))); "none" is the bare natural gradient of the paper.
        nesterov: look one step ahead; None means yes for "matched" and "rms" and no otherwise (the paper).
        rescale: weights of Linear and Conv layers to norm sqrt(2 d_out): "paper" after each step, "code" where longer.

    Args, what the loss is:
        reduction: how the loss reduces over its samples; with "sum", gradients are divided by the sample count.
        loss_scale: a constant the loss was multiplied with before backward(); gradients still carry it.
        grad_scaler: a torch.amp.GradScaler; its scale is taken out of G (it unscales the gradients itself). Where G is
            centred, call `refresh()` and look at pending `factors()` after `grad_scaler.unscale_(optimizer)` only.
        maximize: ascend instead of descend.
        compile: True, or arguments for `torch.compile`: each region becomes a graph when it first runs. On one rank.

    Args, on several ranks of torch.distributed:
        process_group: "auto": the ranks of the model's DDP wrapper or of its FSDP2 mesh; of a model without a wrapper
            all ranks. Or a group, or a mesh (replicate, shard) whose rows each hold every factor once; or "alone": each
            rank trains a model of its own. Each step then is that of one process on the batches of all ranks together:
            gradients are means over ranks, as DDP has them (sums for reduction="sum"). If batches differ in size, let
            each rank's loss be (ranks / all samples) times its sum, and say `count(all samples / ranks)`.
        sharding: how curvature is shared out over the ranks, a `Sharding`.

    Raises:
        ConfigurationError: an argument out of range, or a model without any layer that has a block.
        NoStatisticsError: at the first refresh, if a layer has gradients but its tap saw no backward pass; at any, if
            `sample_fisher` was not called for a Fisher that needs it.

    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 3e-2,
        *,
        momentum: float | Tensor = 0.9,
        nesterov: bool | None = None,
        weight_decay: float | Tensor = 0.0,
        damping: float | Tensor | None = None,
        relative_damping: float | Tensor | None = None,
        damping_rule: DampingRule | None = None,
        fisher: FisherName = "empirical",
        centred: bool | None = None,
        fallback: FallbackName = "adamw",
        fallback_lr: float | Tensor | None = None,
        update_size: UpdateSize = "matched",
        kl_clip: float = 1e-3,
        rescale: Rescale = "none",
        factor_decay: float = 0.95,
        factor_interval: int | RefreshSchedule | AdaptiveInterval = GROWING,
        inverse_interval: int | RefreshSchedule = GROWING,
        refresh_budget: int | Even | None = None,
        inverse: InverseName = "auto",
        inverse_tolerance: float = 1.5,
        ekfac: bool = False,
        norm_fisher: NormFisher = "unit",
        weight_sharing: WeightSharing = "expand",
        max_factor_dim: int = 8192,
        max_output_dim: int = 64,
        conv_samples: int = 0,
        batch_dim: int = 0,
        reduction: Reduction = "mean",
        loss_scale: float = 1.0,
        grad_scaler: torch.amp.GradScaler | None = None,
        groups: Sequence[Mapping[str, Any]] = (),
        maximize: bool = False,
        compile: bool | Mapping[str, Any] = False,
        process_group: Where = "auto",
        sharding: Sharding | None = None,
    ) -> None:
        self.options = KFACOptions(
            fisher=fisher,
            centred=fisher == "empirical" and damping is None if centred is None else centred,
            fallback=fallback,
            inverse=inverse,
            inverse_tolerance=inverse_tolerance,
            ekfac=ekfac,
            update_size=update_size,
            nesterov=update_size in ("matched", "rms") if nesterov is None else nesterov,
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
            relative_damping = 0.3 if damping is None else 0.0
        self._found = find_ranks(model, process_group)
        self._sharding = Sharding() if sharding is None else sharding
        self._model, self._scaler = self._found.model, grad_scaler
        self._number, self._plan = register(self), Plan()
        device = next(self._model.parameters()).device
        self._regions = Regions({} if compile is True else compile or None, device)
        self._opt_called = True  # an LR scheduler built after torch.compile(opt.step) looks for it
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "damping": 0.0 if damping is None else damping,
            "relative_damping": relative_damping,
            "maximize": maximize,
        }
        layers = LayerOptions(norm_fisher, weight_sharing, max_factor_dim, max_output_dim, conv_samples, batch_dim)
        self._build(defaults, groups, lr if fallback_lr is None else fallback_lr, layers)

    def _build(
        self,
        defaults: dict[str, Any],
        overrides: Sequence[Mapping[str, Any]],
        fallback_lr: float | Tensor,
        layers: LayerOptions,
    ) -> None:
        """Find the layers, lay out their state, attach the taps."""
        model, options = self._model, self.options
        rules, self._reasons = rules_of(model, layers, overrides)
        if not rules:
            raise ConfigurationError(
                "expected a model with at least one trainable layer that has a curvature block, got none in "
                f"{type(model).__name__}"
            )
        names = {id(p): name for name, p in model.named_parameters()}
        self._names = {p: names[id(p)] for p in model.parameters()}
        param_groups, blocks_of = param_groups_of(model, rules, defaults, overrides, fallback_lr, options.fallback)
        param_groups[0].update(CLOCK)
        self._ready = False  # add_param_group below is the constructor's own
        super().__init__(param_groups, defaults)
        for group in self.param_groups:
            check_hyper_parameters(group)

        ordered = {name: rules[name] for group in blocks_of for name in group}
        wide = any(p.dtype == torch.float64 for rule in rules.values() for p in rule.params.values())
        dtype = torch.float64 if wide else torch.float32
        compiled = self._regions.compiling is not None
        self._exchange: Exchange = exchange_for(ordered, self._found, self._sharding, options, dtype, compiled)
        clock, rows = self.param_groups[0], weakly(self._current_rows)
        groups = [i for i, names in enumerate(blocks_of) for _ in names]
        self._curvature = Curvature(
            model, ordered, options, self._scaler, clock, rows, groups, self._exchange, self._regions
        )
        release_with(self, self._curvature.handles)
        self._store, self._switch, self.blocks = self._curvature.store, self._curvature.switch, self._curvature.blocks
        some = self._store.samples
        self._matrices = [self._exchange.matrices_of([self.blocks[n] for n in group], some) for group in blocks_of]
        self._trials = Trials(model, self._curvature)
        self._hyper = HyperParameters(len(self.param_groups), some.dtype, some.device)
        self._init_state()
        self._params = [p for group in self.param_groups for p in group["params"]]
        self._exchange.require_equal([self._names[p] for p in self._params], self._params)
        self._ready = True

    def _init_state(self) -> None:
        """All state exists from here on; tensors are views of the buffers that the step works on."""
        curvature = self._curvature
        of_model = {"events": curvature.events, "damping_gain": curvature.damping_gain}
        for matrices in self._matrices:
            for row in matrices.rows:
                for part in row.parts:
                    self.state[part.param] = {"momentum_buffer": like(part.momentum, part.param)}
                self.state[row.parts[0].param].update({**curvature.state_of(row.block), **of_model})
                of_model = {}
        self._loose, rule = list[LooseGroup](), FALLBACKS[self.options.fallback]
        for group in self.param_groups[len(self._matrices) :]:
            self._loose.append(LooseGroup.of(group["params"], rule, self.state))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Parameters added later have no block; `fallback` trains them, and `explain()` says so."""
        if self.__dict__.get("_ready", False):
            added = {"kind": "fallback", "step": self.param_groups[0]["step"]}
            param_group = {**added, **FALLBACKS[self.options.fallback].defaults, **param_group}
        super().add_param_group(param_group)
        if self.__dict__.get("_ready", False):
            group = self.param_groups[-1]
            try:
                check_hyper_parameters(group)
            except ConfigurationError:
                self.param_groups.pop()
                raise
            self._late.append(group)
            self._loose.append(LooseGroup.of(group["params"], FALLBACKS[self.options.fallback], self.state))
            self._params += group["params"]
            for p in group["params"]:
                self._names.setdefault(p, f"added parameter {len(self._names)}")
                self._reasons[p] = "added by add_param_group"
            self._hyper = HyperParameters(len(self.param_groups), self._store.samples.dtype, self._store.samples.device)

    @property
    def factor_interval(self) -> int:
        """Steps from a fold now to the next one."""
        return self.options.steps_to_next_fold(self._steps)

    @property
    def _steps(self) -> int:
        return cast("int", self.param_groups[0]["step"])

    @torch.no_grad()
    def count(self, units: float | Tensor | None = None, *, mask: Tensor | None = None) -> None:
        """Say, before a forward, what its loss is a mean over: N = `units`; the samples of the batch if never called.

        Args:
            units: how many terms the loss averages: all tokens of a per-token loss, or the unmasked ones. Adds up over
                the forwards since the last step, as samples do. None with a mask: `mask.sum()`.
            mask: True at real positions, False at padding, (samples, positions). Layers that see as many positions
                leave the others out of A, so that padding changes nothing; their gradients are zero already. Holds
                until the next `count()` or `step()`. Linear, Embedding and attention layers use it; convolutions,
                whose patches mix positions, don't.

        On steps without statistics it does nothing. `zero_grad()` forgets it together with statistics that it drops.
        `step()` raises ConfigurationError if a mask fits none of the layers that could use it.

        """
        self._curvature.count(units, mask)

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
        self._curvature.sample_fisher(output, loss, mask=mask, dim=dim)

    def _current_rows(self, written: Sequence[Tensor] | None = None) -> Tensor:
        """The rows of hyper-parameters, brought up to date."""
        steps, options = self._steps, self.options
        rows, counted = (self._hyper.rows, self._hyper.steps) if written is None else written
        of_model = OfModel(options.damping_rule.factor(steps), self._curvature.signal_scale)
        values = [values_of(group, options, of_model) for group in self.param_groups]
        self._hyper.write_(rows, counted, values, steps)
        return rows

    @torch.no_grad()
    def refresh(self) -> None:
        """Fold pending statistics, if any, and recompute all damped inverses now."""
        self._curvature.refresh()
        self._plan = self._curvature.plan(self._steps)

    @watchable
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
        if torch.compiler.is_compiling():
            self._traced_step(closure, evaluate)
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_step(self._steps, evaluate)
        return loss

    @stage("step", payload=lambda optimizer, steps, evaluate: steps)
    def _take_step(self, steps: int, evaluate: Evaluate | None) -> None:
        curvature = self._curvature
        self._exchange.gradients_(self._params)
        if curvature.statistics_due(steps):
            warn_of_untrained(self._names, self._params)
            curvature.renew_statistics(steps)
        if curvature.any_seen:
            curvature.renew_inverses(steps)
        before = self._trials.before(self._params, self.state, evaluate)
        self._current_rows()
        finite = self._apply()
        self._hyper.count()
        if not known_true(finite):
            curvature.monitor.watch()
        if before is not None:
            self._trials.judge(before, cast("Evaluate", evaluate), self.param_groups[0]["maximize"])
        self._set_steps(steps + 1)

    def _set_steps(self, steps: int) -> None:
        for group in self.param_groups:
            group["step"] = steps
        self._switch.mask = None
        self._curvature.left_out.note_step()
        self._switch.begin_step(self._curvature.wanted(steps))
        self._plan = self._curvature.plan(steps)

    def _traced_step(self, closure: object, evaluate: object) -> None:
        """The step as a part of a graph: the regions of its plan; the host's share of it when the graph runs."""
        options, curvature, plan = self.options, self._curvature, self._plan
        blind = closure is None and evaluate is None and not (options.damping_rule.interval or options.adaptive)
        store, rows = self._store, self._hyper.rows
        stay_traceable(curvature.store_name, blind, isinstance(self._exchange, Alone))
        self._exchange.gradients_(self._params)
        if plan.fold and options.fisher != "empirical":
            store.unstash()
        pending = self._exchange.seen(store, curvature.normalisation(rows)) if plan.fold else store.samples
        begin_step_([rows, self._hyper.steps], pending, self._number, curvature.with_gradients() if plan.fold else [])
        if plan.fold:
            fold_(store, curvature.folded, curvature.normalisation(rows), None, self._exchange)
        part = int(plan.part)
        if part != IDLE:
            lambdas = curvature.lambdas(rows) if part in (ALL, 0) else None
            refresh_(store, curvature.turned, curvature.keys_of(part), lambdas, self._exchange)
        self._apply()

    def begin_step(self, written: Sequence[Tensor], pending: Tensor, with_gradients: Sequence[int]) -> None:
        """The host's share of a compiled step: write hyper-parameters, count the step, plan the next."""
        self._curvature.note(self._plan, self._steps, pending, with_gradients)
        self._current_rows(written)
        self._hyper.count()
        self._set_steps(self._steps + 1)

    def _apply(self) -> Tensor:
        """Region 3; returns whether gradients are finite, ()."""
        require_gradients(self._names, self._params)
        samples, skipped = self._store.samples, self._curvature.events[0]
        hyper, options = self._hyper, self.options
        return self._regions.apply(self._matrices, self._loose, hyper, samples, skipped, options, self._exchange)

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        """`Optimizer.zero_grad`; gradients that no step has used take their statistics with them (not sampled ones)."""
        self._curvature.drop()
        super().zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """All state, as `load_state_dict` takes it, on any number of ranks.

        On several ranks, which hold parts of it, this is a collective: call it on all of them, then save on one.
        """
        state = super().state_dict()
        places = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        rows = [row for matrices in self._matrices for row in matrices.rows]
        factors = {key: places[row.parts[0].param] for row in rows for key in row.block.keys.values()}
        return {**state, "state": self._exchange.whole(state["state"], factors)}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a state into the existing buffers, dtypes kept (torch's default casts factors and rebinds them).

        Raises StateMismatchError if the state is of another model or optimizer.
        """
        load_state_in_place(self, state_dict)
        self._curvature.resume()
        self._set_steps(self._steps)

    def capture(self, enabled: bool) -> None:
        """Take statistics in the coming backward passes, or take none, until the next `step()` decides again."""
        self._curvature.capture(enabled)

    def detach(self) -> None:
        """Take the taps off the model; the optimizer can't step with fresh curvature afterwards."""
        self.capture(False)
        for handle in self._curvature.handles:
            handle.remove()

    def explain(self) -> Coverage:
        """Which parameter is trained how, and why: printable, one row for each parameter."""
        sent, notes = self._exchange.bytes_sent(), self._curvature.turns.notes()
        groups, fallback = self.param_groups, self.options.fallback
        return coverage_of(self.blocks, groups, self._names, self._reasons, fallback, sent, notes)

    def health(self) -> dict[str, dict[str, Any]]:
        """Per block: residual of the last inverses, failed tries in a row, rung of the ladder, ranks of low-rank forms.

        "optimizer": how often a step was skipped ("skipped_steps") or taken back ("rejected_steps"), statistics were
        dropped ("discarded_statistics") and inversions failed ("failed_inverses"); and the damping's multiplier.
        """
        gain = float(self._curvature.damping_gain) * self.options.damping_rule.factor(self._steps)
        return health_of(self.blocks, self._store, self._curvature.events, gain)
