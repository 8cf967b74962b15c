"""Damped inverses and eigenbases of the factors in a store, and the failure ladder of those that can't be inverted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from triton_curv.blocks.low_rank import read, truncate, write_
from triton_curv.hostcheck import known_true, on_host
from triton_curv.inverse import (
    Inversion,
    damp_,
    damped_inverse,
    eigenbasis,
    hyperpower_inverses,
    raised,
    stand_in,
)
from triton_curv.packing import unpack

if TYPE_CHECKING:
    from triton_curv.blocks.bank import Bank, FactorStore

    Piece = tuple[Bank, slice]  # a bank, and a place in it

PORTION = 1 << 26  # numbers in the matrices that are inverted in one call, which takes several times their memory


class Renewal(NamedTuple):
    """One call of `invert_`: what is added to each matrix of the store, and whether it is known that none has failed.

    Ten times more is added for every failure in a row.
    """

    store: FactorStore
    shifts: Tensor
    calm: bool

    def shifts_of(self, bank: Bank, place: slice) -> Tensor:
        """What is added to the matrices of a part of a bank."""
        return self.shifts[_rows(bank, place)]


def invert_(store: FactorStore, pieces: Iterable[Piece]) -> None:
    """Recompute damped inverses, or eigenbases, of parts of banks from their averages."""
    calm = on_host(store.failures) and known_true(store.failures + store.rungs == 0)
    renewal = Renewal(store, raised(store.shifts, store.failures), calm)
    together: list[Piece] = []
    for bank, place in pieces:
        if bank.spectra is not None:
            _decompose_(renewal, bank, place)
        elif store.inverse == "neumann" and bank.size > 2:
            together.append((bank, place))
        elif bank.wide and store.tolerance is not None:
            for row in range(place.start, place.stop):
                _truncate_(renewal, bank, slice(row, row + 1), store.tolerance)
        else:
            _invert_densely_(renewal, bank, place, unpack(bank.averages[place], bank.size))
    for some in _portions(together):
        _iterate_(renewal, some)


def _invert_densely_(renewal: Renewal, bank: Bank, place: slice, matrices: Tensor) -> None:
    """By Cholesky; `matrices` are the averages, and are damped in place."""
    damped = damp_(matrices, renewal.shifts_of(bank, place))
    _take_(renewal, bank, place, damped, damped_inverse(damped))


def _truncate_(renewal: Renewal, bank: Bank, place: slice, tolerance: float) -> None:
    """A low-rank form of one inverse. Once that was not near enough the factor's inverses stay dense."""
    store, current = renewal.store, bank.inverses[place][0]
    matrices = unpack(bank.averages[place], bank.size, store.workspace.of(bank.size))
    last, found = read(current), None
    if last is not None:
        start = last.basis if last.rank else None
        found = truncate(matrices[0], float(renewal.shifts_of(bank, place)), start, tolerance)
    store.forms += 1
    if found is None:
        _invert_densely_(renewal, bank, place, matrices)
        return
    write_(current, found.form)
    _note(renewal, _rows(bank, place), store.failures.new_ones(1, dtype=torch.bool), found.error)


def _rows(bank: Bank, place: slice) -> slice:
    """Where a part of a bank lies in vectors over factor matrices."""
    return slice(bank.rows.start + place.start, bank.rows.start + place.stop)


def _iterate_(renewal: Renewal, pieces: Sequence[Piece]) -> None:
    """Damped inverses by hyperpower steps, all in one call."""
    shifts = [renewal.shifts_of(bank, place) for bank, place in pieces]
    matrices = [unpack(bank.averages[place], bank.size) for bank, place in pieces]
    current = [bank.inverses[place] for bank, place in pieces]
    results = hyperpower_inverses(matrices, shifts, current, renewal.store.iterations)
    for (bank, place), matrix, shift, result in zip(pieces, matrices, shifts, results, strict=True):
        _take_(renewal, bank, place, damp_(matrix, shift), result)


def _take_(renewal: Renewal, bank: Bank, place: slice, damped: Tensor, result: Inversion) -> None:
    """New inverses of a part of a bank, and the ladder for those that failed."""
    store, rows, current, inverses = renewal.store, _rows(bank, place), bank.inverses[place], result.inverses
    if not _note(renewal, rows, result.ok, result.residuals):
        instead, rungs = stand_in(damped, current, store.failures[rows])
        inverses = torch.where(result.ok[:, None, None], inverses, instead)
        store.rungs[rows] = torch.where(result.ok, 0, rungs)
    current.copy_(inverses)


def _decompose_(renewal: Renewal, bank: Bank, place: slice) -> None:
    """Eigenbases of a part of a bank; where that fails the last ones, then the diagonal's, then the identity's."""
    assert bank.spectra is not None
    store, rows, matrices = renewal.store, _rows(bank, place), unpack(bank.averages[place], bank.size)
    result = eigenbasis(matrices)
    bases, spectra = result.bases, result.spectra
    old_bases, old_spectra = bank.inverses[place], bank.spectra[place]
    if not _note(renewal, rows, result.ok, result.residuals):
        identity = torch.eye(bank.size, dtype=bases.dtype, device=bases.device).expand_as(bases)
        diagonal = matrices.diagonal(dim1=-2, dim2=-1)
        usable = ((diagonal >= 0) & diagonal.isfinite()).all(-1)
        previous = store.failures[rows] <= 3
        rungs = torch.where(previous, 1, torch.where(usable, 2, 3))
        of_diagonal = torch.where(usable[:, None], diagonal, 1.0)
        ok = result.ok[:, None]
        bases = torch.where(ok[..., None], bases, torch.where(previous[:, None, None], old_bases, identity))
        spectra = torch.where(ok, spectra, torch.where(previous[:, None], old_spectra, of_diagonal))
        store.rungs[rows] = torch.where(result.ok, 0, rungs)
    old_bases.copy_(bases)
    old_spectra.copy_(spectra)


def _note(renewal: Renewal, rows: slice, ok: Tensor, residuals: Tensor | float) -> bool:
    """Count failures; True if it is known on the host that there is none."""
    store, fine = renewal.store, known_true(ok)
    store.residuals[rows] = residuals
    if not (fine and renewal.calm):
        store.failures[rows] = torch.where(ok, 0, store.failures[rows] + 1)
        store.rungs[rows] = 0
        store.failed.add_((~ok).sum())
    return fine


def _portions(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Parts of banks in lists of at most PORTION numbers, or of one part."""
    portion: list[Piece] = []
    total = 0
    for bank, place in pieces:
        numbers = (place.stop - place.start) * bank.size**2
        if portion and total + numbers > PORTION:
            yield portion
            portion, total = [], 0
        portion.append((bank, place))
        total += numbers
    if portion:
        yield portion
