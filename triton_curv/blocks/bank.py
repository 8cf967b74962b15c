"""Storage of all factors: those of one size lie in one (batch, n, n) tensor, so that each operation is one call."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from triton_curv.blocks import low_rank
from triton_curv.blocks.inversion import invert_
from triton_curv.blocks.low_rank import LowRank
from triton_curv.blocks.products import ProductQueue
from triton_curv.blocks.rule import FactorShape
from triton_curv.blocks.samples import samples_of
from triton_curv.blocks.shifts import Shares
from triton_curv.blocks.store_cost import inversion_cost
from triton_curv.blocks.workspace import Workspace
from triton_curv.errors import NotOwnedError
from triton_curv.hostcheck import known_true
from triton_curv.inverse import InverseName
from triton_curv.nvtx import stage
from triton_curv.packing import diagonal_places, pack, packed_size, squared_norms, unpack

USES = 4  # calls of a layer in one forward that are told apart; later ones add positions only
SLIVER = 1e-30  # a squared norm below it is that of a dead factor


class FactorKey(NamedTuple):
    """Factor `name` ("A", "G" or "F") of block number `block`."""

    block: int
    name: str


class Held(NamedTuple):
    """Of which factors this rank keeps the averages (it inverts these), and of which the inverses: at least those.

    `owners` says which rank keeps each, counted among those that hold every factor once.
    """

    owned: frozenset[FactorKey]
    served: frozenset[FactorKey]
    owners: Mapping[FactorKey, int]


class Normalisation(NamedTuple):
    """How pending sums become statistics: the moving average's decay, and the scale and reduction of the signal."""

    decay: float
    signal_scale: float | Tensor
    summed: bool


class Bank:
    """Factors of size n x n: unnormalised sums since the last fold, their moving average, and its damped inverses.

    `averages` holds packed triangles (batch, n (n + 1) / 2); everything else is dense, (batch, n, n). With
    `spectra`, (batch, n), `inverses` holds eigenbases instead. `rows` is the bank's place in the vectors that hold one
    number for each factor matrix of the store. In a `wide` bank an inverse may lie as a `LowRank` form in the place of
    the dense one. Of `averages` this rank keeps the first `owned` only, of `inverses`
    and `spectra` the first `served`; on one rank that is all.
    """

    def __init__(
        self,
        size: int,
        rows: slice,
        owned: int,
        served: int,
        eigen: bool,
        wide: bool,
        dtype: torch.dtype,
        device: torch.device,
        products: ProductQueue,
    ) -> None:
        batch = rows.stop - rows.start
        self.size = size
        self.rows = rows
        self.owned = owned
        self.wide = wide
        self._sums = torch.zeros((batch, size, size), dtype=dtype, device=device)
        self._products = products
        self.averages = torch.zeros((owned, packed_size(size)), dtype=dtype, device=device)
        self.inverses = torch.eye(size, dtype=dtype, device=device).repeat(served, 1, 1)
        self.spectra = torch.ones((served, size), dtype=dtype, device=device) if eigen else None
        self.diagonal = diagonal_places(size, device)
        self.orders: list[tuple[slice, Tensor]] = []
        self.recent: tuple[Tensor, Tensor] | None = None  # averages after the last fold and the one before, if kept

    @property
    def sums(self) -> Tensor:
        """Complete: no product waits to be added."""
        self._products.flush()
        return self._sums


class FactorStore:
    """All factors, the counts behind them, and the two operations on them: fold and invert.

    Vectors over blocks: `samples` in the last fold and `counts` since it, (blocks, 1 + USES): rows over all calls of
    the layer, and samples of its first, second, ... call in a forward, the largest of which is N: a layer called twice
    sees its samples twice, and a call whose output is not used brings none. `shared` is 1 where a call serves a whole
    batch: see `samples_of`. `units`, if `units_known`, is N of all.
    Vectors over factor matrices, in the order of the banks: `folds`, `shifts` of the last inversion, `failures` in a
    row, `rungs`, `residuals`, and `folded_traces`: tr M of the statistics that the last fold brought.
    """

    def __init__(
        self,
        shapes: Sequence[Mapping[str, FactorShape]],
        dtype: torch.dtype,
        device: torch.device,
        inverse: InverseName = "cholesky",
        held: Held | None = None,
        tolerance: float | None = None,
    ) -> None:
        self.inverse: InverseName = inverse
        self.tolerance = tolerance
        self.forms = self._read_at = 0  # grows when a low-rank form may have changed
        self._read: dict[FactorKey, LowRank | None] = {}
        self.held = held
        self.iterations = 8
        self.counts = torch.zeros(len(shapes), 1 + USES, dtype=dtype, device=device)
        self.samples = torch.zeros(len(shapes), dtype=dtype, device=device)
        self.shared = torch.zeros(len(shapes), dtype=dtype, device=device)
        self.units = torch.zeros(1, dtype=dtype, device=device)  # not 0-dim: graphs lose what they write to float64
        self.units_known = False
        self.products = ProductQueue()
        members: dict[tuple[int, bool, bool], list[FactorKey]] = {}
        for block, factors in enumerate(shapes):
            turned = inverse == "eigen" and set(factors) == {"A", "G"} and all(s.blocks == 1 for s in factors.values())
            for name, shape in factors.items():
                across = sum(other.size * other.blocks for key, other in factors.items() if key[0] != name[0])
                wide = name in ("A", "G") and shape.batch == 1 and low_rank.pays(shape.size, across)
                wide &= inverse != "neumann" and not turned
                members.setdefault((shape.size, turned, wide), []).append(FactorKey(block, name))
        self.banks: list[Bank] = []
        self.keys: list[FactorKey] = []
        self._places: dict[FactorKey, tuple[Bank, slice]] = {}
        owner: list[int] = []
        is_input: list[bool] = []
        key_of_row: list[int] = []
        for (size, turned, wide), together in members.items():
            start = len(owner)
            slices = []
            self.keys += together  # in one order on all ranks
            keys = sorted(together, key=self._held_last)
            for key in keys:
                batch = shapes[key.block][key.name].batch
                slices.append(slice(len(owner) - start, len(owner) - start + batch))
                owner += [key.block] * batch
                is_input += [key.name[0] == "A"] * batch
                key_of_row += [self.keys.index(key)] * batch
            places = [(self._held_last(key), place.stop) for key, place in zip(keys, slices, strict=True)]
            owned, served = (max((stop for held, stop in places if held <= most), default=0) for most in (0, 1))
            bank = Bank(size, slice(start, len(owner)), owned, served, turned, wide, dtype, device, self.products)
            if wide and tolerance is not None:
                for place in bank.inverses:
                    low_rank.write_(place, low_rank.LowRank(place[:0], place[0, :0], 1.0))
            self.banks.append(bank)
            self._places.update(zip(keys, ((bank, place) for place in slices), strict=True))
            orders = [(place, shapes[key.block][key.name].order) for key, place in zip(keys, slices, strict=True)]
            bank.orders = [(place, order.to(device)) for place, order in orders if order is not None]
        self.owner = torch.tensor(owner, device=device)
        self.is_input = torch.tensor(is_input, device=device)
        self.key_of_row = torch.tensor(key_of_row, device=device)
        self.folds = torch.zeros(len(owner), dtype=dtype, device=device)
        self.folded_traces = torch.zeros(len(owner), dtype=dtype, device=device)
        self.shifts = torch.ones(len(owner), dtype=dtype, device=device)
        self.failures = torch.zeros(len(owner), dtype=torch.int32, device=device)
        self.rungs = torch.zeros(len(owner), dtype=torch.int64, device=device)
        self.residuals = torch.zeros(len(owner), dtype=dtype, device=device)
        self.discarded = torch.zeros((), dtype=torch.int64, device=device)  # statistics that were not finite
        self.failed = torch.zeros((), dtype=torch.int64, device=device)  # inversions
        self.across: Callable[[Tensor], Tensor] | None = None  # sums over ranks, where a block's factors lie on several
        self.workspace = Workspace(self.samples)
        self._stash: tuple[list[Tensor], Tensor] | None = None
        self._sizes = [len(bank.sums) for bank in self.banks]
        bases = [bank.spectra is not None for bank in self.banks for _ in range(len(bank.sums))]
        self.shares = Shares(shapes, lambda *key: self.rows(FactorKey(*key)).start, self.owner, bases, self.samples)

    # ---- places

    def _held_last(self, key: FactorKey) -> int:
        """0 for factors of this rank's own, 1 for those whose inverses it has, 2 for the others."""
        return 0 if self.owns(key) else 1 if self.serves(key) else 2

    def owns(self, key: FactorKey) -> bool:
        """Whether this rank keeps and inverts the factor's average."""
        return self.held is None or key in self.held.owned

    def require(self, key: FactorKey, here: bool) -> None:
        """Raise NotOwnedError unless something of the factor is here."""
        if not here and self.held is not None:
            raise NotOwnedError(
                f"expected factor {key.name} of block number {key.block} on this rank, but rank "
                f"{self.held.owners[key]} of the shard group keeps it: ask there"
            )

    def serves(self, key: FactorKey) -> bool:
        """Whether this rank has the factor's inverse."""
        return self.held is None or key in self.held.served

    def _keys_of(self, blocks: Collection[int]) -> list[FactorKey]:
        return [key for key in self.keys if key.block in blocks]

    def rows(self, key: FactorKey) -> slice:
        """The factor's place in vectors over factor matrices."""
        bank, place = self._places[key]
        return slice(bank.rows.start + place.start, bank.rows.start + place.stop)

    def size(self, key: FactorKey) -> int:
        """n of the factor's matrices."""
        return self._places[key][0].size

    def view(self, kind: Literal["sums", "inverses", "spectra"], key: FactorKey) -> Tensor:
        """The part (batch, ...) of a bank's tensor that belongs to one factor; on "meta" where another rank has it."""
        bank, place = self._places[key]
        whole: Tensor = getattr(bank, kind)
        if kind != "sums" and not self.serves(key):
            return torch.empty((place.stop - place.start, *whole.shape[1:]), dtype=whole.dtype, device="meta")
        return whole[place]

    def packed(self, key: FactorKey, age: int = 0) -> Tensor:
        """A factor's moving average, packed in one dimension: now, or 1 or 2 folds ago; "meta" if another rank's."""
        bank, place = self._places[key]
        if not self.owns(key):
            numbers = (place.stop - place.start) * packed_size(bank.size)
            return torch.empty(numbers, dtype=bank.averages.dtype, device="meta")
        kept = bank.averages if not age or bank.recent is None else bank.recent[age - 1]
        return kept[place].view(-1)

    def has_spectra(self, key: FactorKey) -> bool:
        """Whether the factor has an eigenbasis in place of an inverse."""
        return self._places[key][0].spectra is not None

    def form_of(self, key: FactorKey) -> LowRank | None:
        """The low-rank form that stands for the factor's inverse, if one does."""
        if self.tolerance is None or not self._places[key][0].wide:
            return None
        if self._read_at != self.forms:
            self._read, self._read_at = {}, self.forms
        if key not in self._read:
            self._read[key] = low_rank.read(self.view("inverses", key)[0])
        return self._read[key]

    def stay_dense_(self) -> None:
        """Dense inverses in the place of low-rank forms, from now on: for who can't look at their ranks."""
        self.tolerance = None
        self.forms += 1
        for bank in self.banks:
            for place in bank.inverses if bank.wide else ():
                form = low_rank.read(place)
                if form is not None:
                    place.copy_(form.dense())

    def keep_recent(self) -> None:
        """From now on remember the averages of the last two folds, for rules that compare them."""
        for bank in self.banks:
            bank.recent = (torch.zeros_like(bank.averages), torch.zeros_like(bank.averages))

    def _pieces(self, keys: Sequence[FactorKey] | None) -> Iterator[tuple[Bank, slice]]:
        """What this rank owns of whole banks, or the places of those of some factors that it owns."""
        if keys is None:
            yield from ((bank, slice(0, bank.owned)) for bank in self.banks if bank.owned)
        else:
            yield from (self._places[key] for key in keys if self.owns(key))

    # ---- region 1: statistics into averages

    def seen(self) -> Tensor:
        """Units N of each block since the last fold; 0 where its layer was not used."""
        samples = samples_of(self.counts, self.shared, self.samples)
        return torch.where(samples > 0, self.units, 0.0) if self.units_known else samples

    def add_units(self, units: Tensor | float) -> None:
        """Say what N is, where the size of the batch does not: tokens, unmasked positions. Adds up until the fold."""
        self.units.add_(units)
        self.units_known = True

    def traces(self, sums: bool = False) -> Tensor:
        """tr M of each average (0 for those of other ranks), or of each pending sum."""
        if sums:
            return torch.cat([bank.sums.diagonal(dim1=-2, dim2=-1).sum(-1) for bank in self.banks])
        own = [bank.averages[:, bank.diagonal].sum(-1) for bank in self.banks]
        if self.held is None:
            return torch.cat(own)
        return torch.cat([pad(t, (0, len(bank.sums) - bank.owned)) for t, bank in zip(own, self.banks, strict=True)])

    def pending(
        self,
        how: Normalisation,
        due: Tensor | None = None,
        traces: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What normalises the pending sum of each factor, and its weight in the moving average.

        A = sum / rows; G and F = N sum for a mean loss and sum / N for a summed one, both over signal_scale^2. The
        weight corrects the average's start, (1 - decay) / (1 - decay^k) at fold k. A factor without pending samples,
        or whose sum is not finite (its diagonal shows it: X^T X), or that is not `due`, gets weight 0. `traces` are
        those of the sums, where these lie elsewhere; `seen`, if known, is what the method says.
        """
        traces = self.traces(sums=True) if traces is None else traces
        seen = self.seen() if seen is None else seen
        rows, samples = self.counts[self.owner, 0], seen[self.owner]
        of_signal = (1 / samples if how.summed else samples) / how.signal_scale**2
        usable = (samples > 0) & traces.isfinite()
        if due is not None:
            usable &= due
        scale = torch.where(usable, torch.where(self.is_input, 1 / rows, of_signal), 0.0)
        weight = (1 - how.decay) / (1 - how.decay ** (self.folds + 1))
        return scale, torch.where(usable, weight, 0.0)

    def peek(self, key: FactorKey, how: Normalisation) -> Tensor:
        """A factor's moving average (batch, n, n) as it is once the pending sums are folded in.

        On several ranks as it is: pending sums are known only together. Raises NotOwnedError on those that lack it.
        """
        bank, place = self._places[key]
        if self.held is not None:
            self.require(key, self.owns(key))
            return unpack(bank.averages[place], bank.size)
        scale, weight = (v[self.rows(key), None, None] for v in self.pending(how))
        fresh = torch.where(weight > 0, self.sums_in_weight_order(key) * scale, 0.0)
        return unpack(bank.averages[place], bank.size).lerp_(fresh, weight)

    def sums_in_weight_order(self, key: FactorKey) -> Tensor:
        """The pending sums of one factor, in the order of the layer's weights; a copy where that is another."""
        bank, place = self._places[key]
        orders = [(slice(None), order) for other, order in bank.orders if other == place]
        sums = bank.sums[place]
        return self._in_weight_order(sums.clone(), orders) if orders else sums

    @staticmethod
    def _in_weight_order(sums: Tensor, orders: Sequence[tuple[slice, Tensor]]) -> Tensor:
        """Sums whose captured coordinates come in another order than the layer's weights, put into theirs, in place."""
        for place, order in orders:
            part = sums[place]
            part.copy_(part.index_select(1, order).mT.index_select(1, order).mT)  # by rows, which are copied in one go
        return sums

    def fold_(self, how: Normalisation, due: Tensor | None = None, turn: Collection[int] | None = None) -> None:
        """Fold the pending sums into the averages and empty them. `turn`: the blocks that have some; None: any."""
        traces = self.traces(sums=True)
        if turn is not None:
            pieces = {key: pack(self.sums_in_weight_order(key)) for key in self._keys_of(turn)}
            self.fold_packed_(pieces, how, due, traces, turn)
            return
        seen = self.seen()
        scale, weight = self.pending(how, due, traces, seen)
        all_usable = known_true(weight > 0)
        scales, weights = (vector[:, None].split(self._sizes) for vector in (scale, weight))
        for bank, of_sums, of_average in zip(self.banks, scales, weights, strict=True):
            sums = self._in_weight_order(bank.sums, bank.orders)
            if not all_usable:  # 0 * inf is not 0
                sums.masked_fill_((of_average == 0)[..., None], 0.0)
            self._average_(
                bank, slice(None), pack(sums, spoil=not torch.compiler.is_compiling()).mul_(of_sums), of_average
            )
        self._note_fold(weight, due, traces * scale, seen)

    def fold_packed_(
        self,
        sums: Mapping[FactorKey, Tensor],
        how: Normalisation,
        due: Tensor | None,
        traces: Tensor,
        turn: Collection[int] | None = None,
    ) -> None:
        """`fold_` of sums over ranks: of the factors this rank owns, packed; `counts` and `traces` over ranks, too."""
        seen = self.seen()
        scale, weight = self.pending(how, due, traces, seen)
        for key, packed in sums.items():
            bank, place = self._places[key]
            rows = self.rows(key)
            fresh = packed.view(-1, packed_size(bank.size)) * scale[rows, None]
            fresh.masked_fill_((weight[rows] == 0)[:, None], 0.0)
            self._average_(bank, place, fresh, weight[rows, None])
        self._note_fold(weight, due, traces * scale, seen, turn)

    @staticmethod
    def _average_(bank: Bank, place: slice, fresh: Tensor, weight: Tensor) -> None:
        """Average += weight (fresh - average) at a place of a bank; keep the last two averages, if that is wanted."""
        if bank.recent is not None:
            folded = weight > 0
            last, before = (kept[place] for kept in bank.recent)
            before.copy_(torch.where(folded, last, before))
            last.copy_(torch.where(folded, bank.averages[place], last))
        bank.averages[place].lerp_(fresh, weight)

    def _note_fold(
        self, weight: Tensor, due: Tensor | None, traces: Tensor, seen: Tensor, turn: Collection[int] | None = None
    ) -> None:
        """Count what was folded and what was discarded, note its traces, and empty the sums."""
        folded = weight > 0
        if known_true(folded):
            self.folded_traces.copy_(traces)
            self.samples.copy_(seen)
        else:
            self.folded_traces.copy_(torch.where(folded, traces, 0.0))
            used = seen[self.owner] > 0
            if due is not None:
                used &= due
            self.discarded.add_((used & (weight == 0)).sum())
            self.samples.copy_(torch.where(seen > 0, seen, self.samples))
        self.folds.add_(folded)
        self.forget(turn)

    def forget(self, turn: Collection[int] | None = None) -> None:
        """Drop pending statistics. `turn`: the blocks that have some; None: any."""
        self._empty(turn)
        self.units.zero_()
        self.units_known = False
        self._stash = None

    def drop_(self, keep: Tensor | float) -> None:
        """Drop pending statistics; where there are some, N so far too, except `keep`, which is of coming ones."""
        if not known_true(self.counts == 0):
            self.units.copy_(torch.where((self.counts > 0).any(), keep, self.units))
            self._empty()

    def _empty(self, turn: Collection[int] | None = None) -> None:
        self.products.clear()
        sums = [b.sums for b in self.banks] if turn is None else [self.view("sums", k) for k in self._keys_of(turn)]
        for each in sums:
            each.zero_()
        self.counts.zero_()

    def stash(self) -> None:
        """Put pending statistics aside, out of the reach of a backward pass that will add others."""
        self._stash = ([bank.sums.clone() for bank in self.banks], self.counts.clone())

    def unstash(self) -> None:
        """Pending statistics as they were at the last `stash`, if there is one; what came since is dropped."""
        if self._stash is not None:
            sums, counts = self._stash
            for bank, kept in zip(self.banks, sums, strict=True):
                bank.sums.copy_(kept)
            self.counts.copy_(counts)
            self._stash = None

    def changes(self) -> Tensor:
        """||X - X'||_F^2 / ||X'||_F^2 over all matrices of each factor, X' one and two folds ago: (factors, 2).

        Infinite where there is no such X' yet, and for factors of other ranks. Needs `keep_recent`.
        """
        rows: list[Tensor] = []
        for bank in self.banks:
            assert bank.recent is not None
            past = [[squared_norms(x, bank.diagonal) for x in (bank.averages - old, old)] for old in bank.recent]
            own = torch.stack([torch.stack(pair) for pair in past])  # (age, difference or norm, batch)
            rows.append(pad(own, (0, len(bank.sums) - bank.owned)) if bank.owned < len(bank.sums) else own)
        every = torch.cat(rows, dim=-1)
        totals = every.new_zeros(2, 2, len(self.keys)).index_add_(2, self.key_of_row, every)
        ratios = torch.where(totals[:, 1] > SLIVER, totals[:, 0] / totals[:, 1], torch.inf)
        return ratios.T

    # ---- region 2: averages into damped inverses

    def set_shifts_(self, damping: Tensor, relative: Tensor) -> None:
        """Split lambda = damping + relative * mean eigenvalue, both per block, between factors: see `Shares.shifts`."""
        traces = self.traces() if self.across is None else self.across(self.traces())
        shifts = self.shares.shifts(traces, damping, relative)
        self.shifts.copy_(torch.where(self.folds > 0, shifts, 1.0))  # a layer not used yet: (0 + I)^-1 = I

    @stage("inverse", payload=inversion_cost)
    def invert_(self, keys: Sequence[FactorKey] | None = None) -> None:
        """Recompute damped inverses, or eigenbases, from the averages: all of them, or those of some factors."""
        invert_(self, self._pieces(keys))
