"""A checkpoint of n ranks continues on m ranks, whatever wraps the model there; what does not fit changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.processes import on_ranks
from tests.support.sharded import Case, alone, batch, difference, outcome, single, step, unpacked
from tests.support.sharded_checkpoints import END, SAVED, loading, saving

TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[int, dict[str, Any]]]:
    """A folder with checkpoints of 1, 2 and 4 ranks, and how the runs that wrote them went on."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    return folder, {n: unpacked(on_ranks(n, saving, n, folder, timeout_s=150)[0]) for n in (1, 2, 4)}


@pytest.mark.parametrize(("n", "m"), [(4, 1), (4, 3), (2, 2), (1, 4)])
def test_a_run_continues_on_another_number_of_ranks(saved: Any, n: int, m: int) -> None:
    folder, went_on = saved
    expected = single(Case("none", steps=END))
    found = unpacked(on_ranks(m, loading, m, folder, n, timeout_s=150)[0])
    refused = found.pop("refused")
    assert len(found) == 5
    for name, result in found.items():
        assert difference(result, expected) < TOLERANCE, name
        source, *_, wrapper = name.replace("full", "fsdp to fsdp").split()
        if n == m and source == wrapper:
            same = went_on[n][wrapper]
            assert all(torch.equal(result[key], same[key]) for key in same), name
    for text, unchanged in refused:
        assert text.startswith("StateMismatchError: ")
        assert unchanged


def test_a_saved_state_dict_continues_in_one_process(saved: Any) -> None:
    folder, _ = saved
    expected = single(Case("none", steps=END))
    model, optimizer = alone(Case("none"))
    for i in (30, 31):
        step(model, optimizer, batch(i))
    state = torch.load(Path(folder, "ddp-4.pt"), weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for i in range(SAVED, END):
        step(model, optimizer, batch(i))
    assert difference(outcome(model, optimizer), expected) < TOLERANCE
