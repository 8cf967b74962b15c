"""K-FAC: natural gradient with Kronecker-factored curvature (arXiv 1811.12019, 2002.06015)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from triton_curv.blocks import Block, FactorStore, LayerOptions, NormFisher, WeightSharing
from triton_curv.capture import CaptureSwitch, attach_taps
from triton_curv.coverage import Coverage, coverage_of
from triton_curv.errors import ConfigurationError, NoStatisticsError
from triton_curv.hostcheck import known_true
from triton_curv.inverse import RUNGS
from triton_curv.optimizers.fallback import FALLBACKS, FallbackName
from triton_curv.optimizers.groups import check_hyper_parameters, choose, param_groups_of, rules_of
from triton_curv.optimizers.matrices import Lists, MatrixGroup
from triton_curv.optimizers.state import load_state_in_place
from triton_curv_kernels import momentum_update_

UpdateSize = Literal["rms", "kl_clip", "none"]
Reduction = Literal["mean", "sum"]


class Work(NamedTuple):
    """One parameter group in one step: its settings, its buffers, and the blocks that have gradients."""

    group: dict[str, Any]
    matrices: MatrixGroup
    lists: Lists


class KFAC(Optimizer):
    r"""w <- w - lr (G + sqrt(lambda)/pi I)^-1 dW (A + pi sqrt(lambda) I)^-1, layer by layer.

    A = E[a a^T] over samples and positions, G = E[g g^T], pi^2 = (tr A/dim A)/(tr G/dim G): arXiv 1811.12019 section 3.
    Both are moving averages of the empirical Fisher taken in the ordinary backward pass every `factor_interval` steps;
    damped inverses are renewed every `inverse_interval` steps. Every trainable parameter is trained: those of layers
    without a block by `fallback`; `explain()` says which and why.

    A averages over all rows of all calls of a layer. N, the samples the loss is a mean over, is the leading size of the
    layer's input, added up over the model's forwards since the last step; more calls in one forward add positions only.
    Where the loss is a mean over something else (tokens, unmasked tokens), say so with `count()`.

    Args:
        model: the module to train; blocks are made for its Linear, Conv, ConvTranspose, Embedding, normalisation and
            MultiheadAttention layers, for tied weights, and for what `register_block` says.
        lr: step size. With `update_size="rms"` the root mean square of a layer's step, in units of the weights.
        momentum: in [0, 1). With "rms" an average of the last steps with bias correction, else heavy ball.
        nesterov: look one step ahead; None means yes for "rms" and no otherwise (the paper).
        weight_decay: decoupled, w <- (1 - lr weight_decay) w.
        damping: lambda, absolute. None (default): lambda = relative_damping * (tr A/dim A)(tr G/dim G), per block.
        relative_damping: the part of lambda that scales with curvature; default 0.03, and 0 if `damping` is given.
        fisher: "empirical": gradients of the training loss itself.
        fallback: "adamw" or "sgd", for parameters without a block, at `fallback_lr` (default: `lr`).
        update_size: "rms" scales each layer's step to root mean square 1; "kl_clip" scales all steps by
            min(1, sqrt(kl_clip / (lr^2 sum <step, grad>))); "none" is the bare natural gradient of the paper.
        factor_decay: weight of the past in the factors' moving average, bias-corrected.
        norm_fisher: "unit" (2x2 per channel), "diagonal" or "full", for normalisation layers.
        weight_sharing: "expand" or "reduce" (arXiv 2311.00636): whether positions of a sample (tokens, pixels) are rows
            of their own, or are averaged (inputs) and summed (gradients) first.
        max_factor_dim: factors with more rows are split into diagonal blocks or made diagonal; `explain()` says which.
        batch_dim: the dimension of samples in inputs (samples, positions, features); 1 for (time, batch, features).
        reduction: how the loss reduces over its samples; with "sum", gradients are divided by the sample count.
        loss_scale: a constant the loss was multiplied with before backward(); gradients still carry it.
        grad_scaler: a torch.amp.GradScaler; its scale is taken out of G (it unscales the gradients itself).
        groups: hyper-parameters by module pattern, [{"modules": "layer1.*", "lr": 0.1}, ...]; the first match wins.
            Also norm_fisher, weight_sharing, max_factor_dim and batch_dim.
        maximize: ascend instead of descend.

    Raises:
        ConfigurationError: an argument out of range, or a model without any layer that has a block.
        NoStatisticsError: at the first refresh, if a layer has gradients but its tap saw no backward pass.

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
        fisher: Literal["empirical"] = "empirical",
        fallback: FallbackName = "adamw",
        fallback_lr: float | Tensor | None = None,
        update_size: UpdateSize = "rms",
        kl_clip: float = 1e-3,
        factor_decay: float = 0.95,
        factor_interval: int = 20,
        inverse_interval: int = 20,
        norm_fisher: NormFisher = "unit",
        weight_sharing: WeightSharing = "expand",
        max_factor_dim: int = 8192,
        batch_dim: int = 0,
        reduction: Reduction = "mean",
        loss_scale: float = 1.0,
        grad_scaler: torch.amp.GradScaler | None = None,
        groups: Sequence[Mapping[str, Any]] = (),
        maximize: bool = False,
    ) -> None:
        choose("fisher", fisher, ("empirical",))
        choose("fallback", fallback, get_args(FallbackName))
        choose("update_size", update_size, get_args(UpdateSize))
        choose("reduction", reduction, get_args(Reduction))
        if factor_interval < 1 or inverse_interval < 1:
            raise ConfigurationError(
                f"expected intervals of at least 1 step, got {factor_interval=}, {inverse_interval=}"
            )
        if not 0 <= factor_decay < 1 or not kl_clip > 0 or not loss_scale > 0:
            raise ConfigurationError(
                "expected factor_decay in [0, 1), kl_clip > 0 and loss_scale > 0, got "
                f"{factor_decay=}, {kl_clip=}, {loss_scale=}"
            )
        if relative_damping is None:
            relative_damping = 0.03 if damping is None else 0.0
        self.fallback: FallbackName = fallback
        self.update_size: UpdateSize = update_size
        self.nesterov = update_size == "rms" if nesterov is None else nesterov
        self.kl_clip = kl_clip
        self.factor_decay = factor_decay
        self.factor_interval = factor_interval
        self.inverse_interval = inverse_interval
        self.reduction: Reduction = reduction
        self.loss_scale = loss_scale
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
        options = LayerOptions(norm_fisher, weight_sharing, max_factor_dim, batch_dim)
        self._build(model, defaults, groups, lr if fallback_lr is None else fallback_lr, options)

    # ---- construction

    def _build(
        self,
        model: nn.Module,
        defaults: dict[str, Any],
        overrides: Sequence[Mapping[str, Any]],
        fallback_lr: float | Tensor,
        options: LayerOptions,
    ) -> None:
        """Find the layers, lay out their state, attach the taps."""
        rules, self._reasons = rules_of(model, options, overrides)
        if not rules:
            raise ConfigurationError(
                "expected a model with at least one trainable layer that has a curvature block, got none in "
                f"{type(model).__name__}"
            )
        names = {id(p): name for name, p in model.named_parameters()}
        self._names = {p: names[id(p)] for p in model.parameters()}
        param_groups, blocks_of = param_groups_of(model, rules, defaults, overrides, fallback_lr, self.fallback)
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
        self._store = FactorStore([dict(rules[name].factor_shapes) for name in ordered], dtype, device)
        self._switch = CaptureSwitch(enabled=True)
        self.blocks: dict[str, Block] = {
            name: Block(name, rules[name], index, self._store, self._averages_of, self._ensure_inverse)
            for index, name in enumerate(ordered)
        }
        self._handles = attach_taps(model, self.blocks.values(), self._switch)
        self._matrices = [MatrixGroup([self.blocks[n] for n in group], dtype, device) for group in blocks_of]
        self._inverted = False
        self._any_seen = self._all_seen = False  # whether statistics of any block, of all blocks, have come
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._init_state()
        self._ready = True

    def _init_state(self) -> None:
        """All state exists from here on; tensors are views of the buffers that the step works on."""
        for matrices in self._matrices:
            for row in matrices.rows:
                for part in row.parts:
                    self.state[part.param] = {"momentum_buffer": part.momentum}
                first = self.state[row.parts[0].param]
                for name, key in row.block.keys.items():
                    first[name] = self._store.view("averages", key)
                    first[f"{name}_inverse"] = self._store.view("inverses", key)
                    first[f"{name}_failures"] = self._store.failures[self._store.rows(key)]
                first["folds"] = self._store.folds[row.block.index]
                first["samples"] = self._store.samples[row.block.index]
        for group in self.param_groups:
            if group["kind"] == "fallback":
                for p in group["params"]:
                    self.state[p] = dict(FALLBACKS[self.fallback].init_state(p))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Parameters added later have no block; `fallback` trains them, and `explain()` says so."""
        if self.__dict__.get("_ready", False):
            param_group = {"kind": "fallback", **FALLBACKS[self.fallback].defaults, **param_group}
        super().add_param_group(param_group)
        if self.__dict__.get("_ready", False):
            group = self.param_groups[-1]
            check_hyper_parameters(group)
            for p in group["params"]:
                self.state[p] = dict(FALLBACKS[self.fallback].init_state(p))
                self._names[p] = f"added parameter {len(self._names)}"
                self._reasons[p] = "added by add_param_group"

    # ---- curvature

    @property
    def _signal_scale(self) -> float:
        return self.loss_scale * (self._scaler.get_scale() if self._scaler is not None else 1.0)

    def _averages_of(self, block: Block) -> dict[str, Tensor]:
        """The block's factors as they are once pending statistics are folded in."""
        how = (self.factor_decay, self._signal_scale, self.reduction == "sum")
        return {name: self._store.peek(key, *how) for name, key in block.keys.items()}

    def _fold(self) -> None:
        """Region 1: fold the statistics gathered since the last fold into the moving averages."""
        if not self._all_seen:
            self._check_taps()
        self._store.fold_(self.factor_decay, self._signal_scale, self.reduction == "sum")

    def _check_taps(self) -> None:
        """A layer that has a gradient but whose tap saw nothing is an error, not a layer without curvature."""
        seen = (self._store.seen() + self._store.folds > 0).tolist()
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

    def _invert(self) -> None:
        """Region 2: renew the damped inverses."""
        damping = self._per_block("damping")
        relative = self._per_block("relative_damping")
        self._store.invert_(damping, relative)
        self._inverted = True

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
            self._fold()
        if not self._any_seen:
            raise NoStatisticsError("refresh() needs statistics: run loss.backward() first")
        self._invert()

    def _ensure_inverse(self) -> None:
        if not self._inverted:
            self.refresh()

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], float | Tensor] | None = None) -> float | Tensor | None:  # type: ignore[override]  # torch's overloads
        """One step: fold statistics and renew inverses when due, precondition, scale, move.

        A step whose gradients are not finite changes nothing and is counted (`health()`).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        steps = cast("int", self.param_groups[0]["step"])
        if steps % self.factor_interval == 0 or not self._any_seen:
            self._fold()
        if self._any_seen and (steps % self.inverse_interval == 0 or not self._inverted):
            self._invert()
        self._apply(steps)
        self._set_steps(steps + 1)
        return loss

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # keeps opt.step compilable, COMPILE_AND_DIST 2.1

    def _set_steps(self, steps: int) -> None:
        for group in self.param_groups:
            group["step"] = steps
        self.capture(steps % self.factor_interval == 0 or not self._any_seen)

    def _apply(self, steps: int) -> None:
        """Region 3: P = G^-1 D A^-1 for every block, its size, momentum, decay, update."""
        work = [
            Work(group, matrices, lists)
            for group, matrices in zip(self.param_groups, self._matrices, strict=False)
            if (lists := matrices.active()).rows
        ]
        for each in work:
            self._precondition(each)
        norms = [torch.stack(torch._foreach_norm(each.lists.row_updates)) for each in work]
        finite = torch.cat([*norms, self._skipped.new_zeros(1)]).sum().isfinite()
        healthy = known_true(finite)
        self._skipped.add_(~finite)
        for each, scales in zip(work, self._scales(work, norms), strict=True):
            hyper = self._hyper(each.group, steps)
            if not healthy:
                each.matrices.updates.masked_fill_(~finite, 0.0)
                scales = torch.where(finite, scales, 0.0)
                hyper = torch.where(finite, hyper, each.matrices.idle)
            of_row = (-scales if each.group["maximize"] else scales).unbind()
            of_param = [of_row[row] for row in each.lists.row_of_param]
            momentum_update_(each.lists.params, each.lists.momenta, each.lists.updates, of_param, hyper)
        self._apply_fallback(finite)

    def _precondition(self, work: Work) -> None:
        """From gradients to the steps of all blocks of a group, of whatever size they come out."""
        lists = work.lists
        torch._foreach_copy_(lists.grads, [cast("Tensor", p.grad) for p in lists.params])
        if self.reduction == "sum":
            torch._foreach_div_(lists.row_grads, [self._store.samples[row.block.index] for row in lists.rows])
        if self.loss_scale != 1.0:
            work.matrices.grads.div_(self.loss_scale)
        for row in lists.rows:
            row.block.solve(row.grad, row.update)

    def _scales(self, work: list[Work], norms: list[Tensor]) -> list[Tensor]:
        """What each block's update is multiplied with on its way into the momentum, one vector for each group."""
        if self.update_size == "rms":  # step of root mean square 1; the momentum is an average, hence 1 - momentum
            return [
                each.lists.root_sizes * (1 - each.group["momentum"]) / n.clamp_min(torch.finfo(n.dtype).tiny)
                for each, n in zip(work, norms, strict=True)
            ]
        if self.update_size == "none" or not work:
            return [torch.ones_like(n) for n in norms]
        products = [torch.dot(each.matrices.updates, each.matrices.grads) * each.group["lr"] ** 2 for each in work]
        nu = torch.sqrt(self.kl_clip / torch.stack(products).sum().clamp_min(1e-30)).clamp_max(1.0)
        return [nu.expand_as(n) for n in norms]

    def _hyper(self, group: dict[str, Any], steps: int) -> Tensor:
        """[lr, momentum, weight_decay, weight of the momentum, weight of the update]: see `momentum_update_`."""
        momentum = group["momentum"]
        ahead = (momentum, 1.0) if self.nesterov else (1.0, 0.0)
        bias = 1 - momentum ** (steps + 1 + self.nesterov) if self.update_size == "rms" else 1.0
        values = [group["lr"], momentum, group["weight_decay"], ahead[0] / bias, ahead[1] / bias]
        like = self._store.samples
        if any(isinstance(v, Tensor) for v in values):
            return torch.stack([torch.as_tensor(v, dtype=like.dtype, device=like.device) for v in values])
        return torch.tensor(values, dtype=like.dtype, device=like.device)

    def _apply_fallback(self, finite: Tensor) -> None:
        for group in self.param_groups:
            if group["kind"] == "fallback":
                params = [p for p in group["params"] if p.grad is not None]
                grads = [cast("Tensor", p.grad) for p in params]
                if params and bool(finite & torch.stack(torch._foreach_norm(grads)).isfinite().all()):
                    FALLBACKS[self.fallback].update(params, self.state, group)

    # ---- state and reports

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a state into the existing buffers, dtypes kept (torch's default casts factors and rebinds them).

        Raises StateMismatchError if the state is of another model or optimizer.
        """
        load_state_in_place(self, state_dict)
        self._store.counts.zero_()
        self._store.units.zero_()
        self._store.units_known = False
        for bank in self._store.banks:
            bank.sums.zero_()
        self._any_seen = self._inverted = bool((self._store.folds > 0).any())
        self._set_steps(cast("int", self.param_groups[0]["step"]))

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

        On steps without statistics it does nothing.

        """
        if mask is not None and mask.dtype != torch.bool:
            raise ConfigurationError(f"expected a boolean mask, True at real positions, got {mask.dtype}")
        if not self._switch.enabled:
            return
        if units is None and mask is not None:
            units = mask.sum()
        if units is not None:
            self._store.add_units(units)
        self._switch.mask = mask

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
        return coverage_of(self.blocks, self.param_groups, self._names, self._reasons, self.fallback)

    def health(self) -> dict[str, dict[str, Any]]:
        """Per block: residual of the last inverses, failed tries in a row, rung of the ladder; and "skipped_steps"."""
        report: dict[str, dict[str, Any]] = {}
        for name, block in self.blocks.items():
            rows = [self._store.rows(key) for key in block.keys.values()]
            report[name] = {
                "residual": max(float(self._store.residuals[r].max()) for r in rows),
                "failures": max(int(self._store.failures[r].max()) for r in rows),
                "rung": RUNGS[max(int(self._store.rungs[r].max()) for r in rows)],
            }
        report["optimizer"] = {"skipped_steps": int(self._skipped)}
        return report
