"""Storage of all factors: those of one size lie in one (batch, n, n) tensor, so that each operation is one call."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from triton_curv.blocks.rule import FactorShape
from triton_curv.damping import kronecker_shifts
from triton_curv.hostcheck import known_true
from triton_curv.inverse import damped_inverse, raised, stand_in

USES = 4  # calls of a layer in one forward that are told apart; later ones add positions only


class FactorKey(NamedTuple):
    """Factor `name` ("A", "G" or "F") of block number `block`."""

    block: int
    name: str


class Bank:
    """Factors of size n x n: unnormalised sums since the last fold, their moving average, and its damped inverses.

    `rows` is the bank's place in the vectors that hold one number for each factor of the store.
    """

    def __init__(self, size: int, rows: slice, dtype: torch.dtype, device: torch.device) -> None:
        batch = rows.stop - rows.start
        self.rows = rows
        self.sums = torch.zeros((batch, size, size), dtype=dtype, device=device)
        self.averages = torch.zeros_like(self.sums)
        self.inverses = torch.eye(size, dtype=dtype, device=device).repeat(batch, 1, 1)


class FactorStore:
    """All factors, the counts behind them, and the two operations on them: fold and invert.

    Vectors over blocks: `samples` in the last fold, `folds`, and `counts` since it, (blocks, 1 + USES): rows over all
    calls of the layer, and samples of its first, second, ... call in a forward, the largest of which is N: a layer
    called twice sees its samples twice, and a call whose output is not used brings none.
    Vectors over factors, in the order of the banks: `failures` in a row, `rungs`, `residuals` of the last inversion.
    """

    def __init__(self, shapes: Sequence[Mapping[str, FactorShape]], dtype: torch.dtype, device: torch.device) -> None:
        self.counts = torch.zeros(len(shapes), 1 + USES, dtype=dtype, device=device)
        self.samples = torch.zeros(len(shapes), dtype=dtype, device=device)
        self.folds = torch.zeros(len(shapes), dtype=dtype, device=device)
        self.units = torch.zeros((), dtype=dtype, device=device)
        self.units_known = False
        keys: dict[int, list[FactorKey]] = {}
        for block, factors in enumerate(shapes):
            for name, shape in factors.items():
                keys.setdefault(shape.size, []).append(FactorKey(block, name))
        self.banks: list[Bank] = []
        self._places: dict[FactorKey, tuple[Bank, slice]] = {}
        owner: list[int] = []
        is_input: list[bool] = []
        for size, members in keys.items():
            start = len(owner)
            slices = []
            for key in members:
                batch = shapes[key.block][key.name].batch
                slices.append(slice(len(owner) - start, len(owner) - start + batch))
                owner += [key.block] * batch
                is_input += [key.name[0] == "A"] * batch
            bank = Bank(size, slice(start, len(owner)), dtype, device)
            self.banks.append(bank)
            self._places.update(zip(members, ((bank, place) for place in slices), strict=True))
        self.owner = torch.tensor(owner, device=device)
        self.is_input = torch.tensor(is_input, device=device)
        self.failures = torch.zeros(len(owner), dtype=torch.int32, device=device)
        self.rungs = torch.zeros(len(owner), dtype=torch.int64, device=device)
        self.residuals = torch.zeros(len(owner), dtype=dtype, device=device)
        self._pair_up(shapes, device)

    def _pair_up(self, shapes: Sequence[Mapping[str, FactorShape]], device: torch.device) -> None:
        """Factors A and the G beside each (same block, same group), and lone factors F.

        The diagonal blocks of one factor are stood for by the first of them: `first_row` says which that is for each
        row, and there `dimensions` holds the size of the whole factor.
        """
        pairs: list[tuple[int, int]] = []
        single: list[int] = []
        first_row = list(range(len(self.owner)))
        sizes = [0] * len(self.owner)
        for block, factors in enumerate(shapes):
            first: dict[str, list[int]] = {}
            for name, shape in factors.items():
                start = self.rows(FactorKey(block, name)).start
                heads = first.setdefault(name[0], list(range(start, start + shape.batch, shape.blocks)))
                for i in range(shape.batch):
                    first_row[start + i] = heads[i // shape.blocks]
                    sizes[start + i] = shape.size
            if "F" in first:
                single += first["F"]
            else:
                pairs += zip(first["A"], first["G"], strict=True)
        self.first_row = torch.tensor(first_row, dtype=torch.int64, device=device)
        lengths = torch.tensor(sizes, dtype=self.samples.dtype, device=device)
        self.dimensions = torch.zeros_like(lengths).index_add_(0, self.first_row, lengths)
        self.row_A = torch.tensor([a for a, _ in pairs], dtype=torch.int64, device=device)
        self.row_G = torch.tensor([g for _, g in pairs], dtype=torch.int64, device=device)
        self.row_F = torch.tensor(single, dtype=torch.int64, device=device)

    def rows(self, key: FactorKey) -> slice:
        """The factor's place in vectors over factors."""
        bank, place = self._places[key]
        return slice(bank.rows.start + place.start, bank.rows.start + place.stop)

    def view(self, kind: Literal["sums", "averages", "inverses"], key: FactorKey) -> Tensor:
        """The part (batch, n, n) of a bank's tensor that belongs to one factor."""
        bank, place = self._places[key]
        whole: Tensor = getattr(bank, kind)
        return whole[place]

    def seen(self) -> Tensor:
        """Units N of each block since the last fold; 0 where its layer was not used."""
        samples = self.counts[:, 1:].amax(1)
        return torch.where(samples > 0, self.units, 0.0) if self.units_known else samples

    def add_units(self, units: Tensor | float) -> None:
        """Say what N is, where the size of the batch does not: tokens, unmasked positions. Adds up until the fold."""
        self.units.add_(units)
        self.units_known = True

    def pending(self, decay: float, signal_scale: float, summed: bool) -> tuple[Tensor, Tensor]:
        """What normalises the pending sum of each factor, and its weight in the moving average.

        A = sum / rows; G and F = N sum for a mean loss and sum / N for a summed one, both over signal_scale^2. The
        weight corrects the average's start, (1 - decay) / (1 - decay^k) at fold k. A factor without pending samples,
        or whose sum is not finite (its diagonal shows it: X^T X), gets weight 0.
        """
        rows, samples = self.counts[self.owner, 0], self.seen()[self.owner]
        of_signal = (1 / samples if summed else samples) / signal_scale**2
        traces = torch.cat([bank.sums.diagonal(dim1=-2, dim2=-1).sum(-1) for bank in self.banks])
        usable = (samples > 0) & traces.isfinite()
        scale = torch.where(usable, torch.where(self.is_input, 1 / rows, of_signal), 0.0)
        weight = (1 - decay) / (1 - decay ** (self.folds + 1))
        return scale, torch.where(usable, weight[self.owner], 0.0)

    def peek(self, key: FactorKey, decay: float, signal_scale: float, summed: bool) -> Tensor:
        """A factor's moving average as it is once the pending sums are folded in."""
        scale, weight = (v[self.rows(key), None, None] for v in self.pending(decay, signal_scale, summed))
        fresh = torch.where(weight > 0, self.view("sums", key) * scale, 0.0)
        return self.view("averages", key).lerp(fresh, weight)

    def fold_(self, decay: float, signal_scale: float, summed: bool) -> None:
        """Fold the pending sums into the averages and empty them."""
        scale, weight = self.pending(decay, signal_scale, summed)
        all_usable = known_true(weight > 0)
        for bank in self.banks:
            bank.sums.mul_(scale[bank.rows, None, None])
            if not all_usable:  # 0 * inf is not 0
                bank.sums.masked_fill_((weight[bank.rows] == 0)[:, None, None], 0.0)
            bank.averages.lerp_(bank.sums, weight[bank.rows, None, None])
            bank.sums.zero_()
        samples = self.seen()
        self.folds.add_(samples > 0)
        self.samples.copy_(torch.where(samples > 0, samples, self.samples))
        self.counts.zero_()
        self.units.zero_()
        self.units_known = False

    def shifts(self, damping: Tensor, relative: Tensor) -> Tensor:
        """The multiple of I added to each factor, from lambda = damping + relative * mean eigenvalue, per block."""
        traces = torch.cat([bank.averages.diagonal(dim1=-2, dim2=-1).sum(-1) for bank in self.banks])
        means = torch.zeros_like(traces).index_add_(0, self.first_row, traces) / self.dimensions  # NaN if not first
        shifts = torch.empty_like(means)
        if len(self.row_A):
            mean_A, mean_G = means[self.row_A], means[self.row_G]
            damping_A = self._damping(self.row_A, mean_A * mean_G, damping, relative)
            shifts[self.row_A], shifts[self.row_G] = kronecker_shifts(mean_A, mean_G, damping_A)
        if len(self.row_F):
            shifts[self.row_F] = self._damping(self.row_F, means[self.row_F], damping, relative)
        least = torch.finfo(shifts.dtype).tiny ** 0.5  # for a dead layer: its factor is 0, and so is lambda
        return torch.where(shifts > 0, shifts, least)[self.first_row]

    def _damping(self, rows: Tensor, curvature: Tensor, damping: Tensor, relative: Tensor) -> Tensor:
        """lambda of each row; its relative part is measured over the whole block, so that a dead group is damped."""
        owner = self.owner[rows]
        total = torch.zeros_like(self.samples).index_add_(0, owner, curvature)
        members = torch.zeros_like(self.samples).index_add_(0, owner, torch.ones_like(curvature))
        return damping[owner] + relative[owner] * total[owner] / members[owner]

    def invert_(self, damping: Tensor, relative: Tensor) -> None:
        """Recompute every damped inverse from the averages; `damping` and `relative` are per block."""
        shifts = raised(self.shifts(damping, relative), self.failures)
        shifts = torch.where(self.folds[self.owner] > 0, shifts, 1.0)  # a layer not used yet: (0 + I)^-1 = I
        results = [damped_inverse(bank.averages, shifts[bank.rows]) for bank in self.banks]
        ok = torch.cat([result.ok for result in results])
        self.residuals.copy_(torch.cat([result.residuals for result in results]))
        self.failures.copy_(torch.where(ok, 0, self.failures + 1))
        self.rungs.zero_()
        all_ok = known_true(ok)
        for bank, result in zip(self.banks, results, strict=True):
            inverses = result.inverses
            if not all_ok:
                rows = bank.rows
                instead, rungs = stand_in(bank.averages, shifts[rows], bank.inverses, self.failures[rows])
                inverses = torch.where(result.ok[:, None, None], inverses, instead)
                self.rungs[rows] = torch.where(result.ok, 0, rungs)
            bank.inverses.copy_(inverses)
