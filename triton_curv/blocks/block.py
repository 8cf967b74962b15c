"""A block: the parameters of one layer that share one curvature matrix, with views of their state."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from triton_curv.blocks.bank import USES, FactorKey, FactorStore
from triton_curv.blocks.low_rank import LowRank
from triton_curv.blocks.moments import Moments
from triton_curv.blocks.operator import Forms, Operator, solve
from triton_curv.blocks.products import waits_for_others
from triton_curv.blocks.rule import MaskedSource, Rule, Source
from triton_curv.errors import ConfigurationError, NoStatisticsError
from triton_curv.inverse import raised


class Block:
    """(F + lambda I)^-1 for the parameters of one layer, F = A (x) G or a single factor.

    The tensors belong to the optimizer; a block holds views. `settle` is how the optimizer brings pending statistics
    into view and `ensure_inverse` how it inverts when that never happened.
    """

    def __init__(
        self,
        name: str,
        rule: Rule,
        index: int,
        store: FactorStore,
        averages: Callable[["Block"], dict[str, Tensor]],
        ensure_inverse: Callable[[], None],
    ) -> None:
        self.name = name
        self.rule = rule
        self.index = index
        keys = {factor: FactorKey(index, factor) for factor in rule.factor_shapes}
        self.keys = keys
        self.store = store
        self.sums = {factor: store.view("sums", key) for factor, key in keys.items()}
        self.inverses = {factor: store.view("inverses", key) for factor, key in keys.items()}
        self.gains: Tensor | None = None  # 1 / (eigenvalues + lambda), (batch, rows, columns), in an eigenbasis
        if set(keys) == {"A", "G"} and store.has_spectra(keys["A"]):
            self.gains = torch.ones(rule.matrix_shape, dtype=store.samples.dtype, device=self.inverses["A"].device)
        self.moments: Moments | None = None
        self.due = True  # whether the next backward pass is to give statistics of this block
        self.counts = store.counts[index]
        self.shared = store.shared[index : index + 1]
        self.matrix_size = math.prod(rule.matrix_shape)
        self._averages = averages
        self._ensure_inverse = ensure_inverse
        shapes = rule.factor_shapes
        self.dense_operator = Operator(
            left=tuple(inverse for factor, inverse in self.inverses.items() if factor[0] != "A"),
            right=tuple(inverse for factor, inverse in self.inverses.items() if factor[0] == "A"),
            gains=self.gains,
            whole=all(name in ("A", "G", "F") and shape.blocks == 1 for name, shape in shapes.items()),
        )

    def forms(self) -> dict[str, LowRank]:
        """Low-rank forms that stand for the inverses of factors, where there are some."""
        found = {name: self.store.form_of(key) for name, key in self.keys.items()}
        return {name: form for name, form in found.items() if form is not None}

    @property
    def operator(self) -> Operator:
        """What stands for the damped inverse now."""
        forms = self.forms()
        if not forms:
            return self.dense_operator
        return self.dense_operator._replace(whole=False, forms=Forms(forms.get("G"), forms.get("A")))

    @torch.no_grad()
    def accumulate_(
        self,
        inputs: Tensor,
        grad_output: Tensor,
        training: bool,
        use: int,
        source: Source | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Add call number `use` of the layer in a forward, as seen in its backward pass.

        `source` takes the statistics if the layer is one of several of the block; `mask` tells real positions.

        In a graph of torch.compile, what does not depend on the gradient is free to move into the forward graph: sums
        would be read there and written back here, and a second forward before the backward pass would lose its part.
        `never` is False always and ties everything to the gradient.
        """
        source = self.rule if source is None else source
        if torch.compiler.is_compiling() and grad_output.numel():
            never = grad_output.flatten()[:1] > math.inf
            inputs = inputs.masked_fill(never, 0)
            mask = None if mask is None else mask.masked_fill(never, False)
            self.counts.masked_fill_(never, 0.0)
        if mask is not None and isinstance(source, MaskedSource):
            source = source.masked(mask)
        if waits_for_others(self.counts):
            with self.store.products.taking():
                added = source.accumulate_(self.sums, inputs, grad_output, training)
        else:
            added = source.accumulate_(self.sums, inputs, grad_output, training)
        self.counts[0].add_(added.rows)
        if use < USES:
            self.counts[1 + use].add_(added.samples)
        if added.shared:
            self.shared.fill_(1.0)
        if self.moments is not None:
            self.moments.accumulate_(inputs, grad_output)

    def factors(self) -> dict[str, Tensor]:
        """Dense copies of the factors, {"A", "G"} or {"F"}: the moving average including pending statistics.

        A (groups, d_in[+1], d_in[+1]) and G (groups, d_out, d_out), without the leading dimension for one group.
        Raises NoStatisticsError before the first backward pass.
        """
        if not bool(self.folds() + self.counts[1:].amax() > 0):
            raise NoStatisticsError(
                f"block '{self.name}' has seen no backward pass yet; run loss.backward() first (statistics are taken "
                "on the first step and then every factor_interval steps)"
            )
        return {name: self.rule.present(name, tensor).clone() for name, tensor in self._averages(self).items()}

    def folds(self) -> Tensor:
        """How many folds the newest of its averages holds, ()."""
        return torch.stack([self.store.folds[self.store.rows(key)].amax() for key in self.keys.values()]).amax()

    def renew_gains_(self) -> None:
        """1 / (s_G s_A^T + lambda) from the eigenvalues, or 1 / (second moments + lambda) where those are known."""
        if self.gains is None or self.gains.is_meta:
            return
        key_A, key_G = self.keys["A"], self.keys["G"]
        spectrum = self.store.view("spectra", key_G)[:, :, None] * self.store.view("spectra", key_A)[:, None, :]
        if self.moments is not None:
            spectrum = torch.where(self.moments.folds > 0, self.moments.averages, spectrum)
        rows_A, rows_G = self.store.rows(key_A), self.store.rows(key_G)
        failures = torch.maximum(self.store.failures[rows_A], self.store.failures[rows_G])
        torch.reciprocal(spectrum + raised(self.store.shifts[rows_A], failures.long())[:, None, None], out=self.gains)

    @torch.no_grad()
    def precondition(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(F + damping)^-1 grad for {"weight": ..., "bias": ...}: same names and shapes, same dtypes.

        Uses the damped inverses of the last refresh. Raises ConfigurationError if a name or shape does not fit.
        """
        if set(grads) != set(self.rule.params):
            raise ConfigurationError(
                f"block '{self.name}' preconditions {sorted(self.rule.params)}, got {sorted(grads)}"
            )
        self._ensure_inverse()
        for key in self.keys.values():
            self.store.require(key, self.store.serves(key))
        some = next(iter(self.inverses.values()))
        matrix = torch.empty(self.rule.matrix_shape, dtype=some.dtype, device=some.device)
        for name, part in self.rule.views(matrix).items():
            if grads[name].shape != part.shape:
                raise ConfigurationError(
                    f"block '{self.name}': expected {name} of shape {tuple(part.shape)}, got {tuple(grads[name].shape)}"
                )
            part.copy_(grads[name])
        out = torch.empty_like(matrix)
        solve(self.operator, matrix, out)
        return {name: part.to(grads[name].dtype).clone() for name, part in self.rule.views(out).items()}

    def __repr__(self) -> str:
        shapes = ", ".join(f"{k} {s.batch}x{s.size}x{s.size}" for k, s in self.rule.factor_shapes.items())
        return f"Block({self.name!r}, {shapes})"
