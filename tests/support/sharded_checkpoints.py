"""What ranks do in the tests of checkpoints: save on some number of ranks, load on another."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

import triton_curv as tc
from tests.support.sharded import Case, batch, outcome, packed, share, step, together

WRAPPERS = ("ddp", "fsdp")
SAVED, END = 4, 7  # in the middle of intervals


def case_of(wrapper: str) -> Case:
    return Case(wrapper, steps=END)


def advance(model: nn.Module, optimizer: tc.KFAC, first: int, last: int, rank: int, world: int) -> None:
    for i in range(first, last):
        step(model, optimizer, share(batch(i), rank, world))


def save(model: nn.Module, optimizer: tc.KFAC, folder: Path) -> None:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    save_state({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: tc.KFAC, folder: Path) -> None:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": of_model, "optimizer": of_optimizer}
    load_state(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def saving(rank: int, world: int, folder: str) -> Any:
    """Train, save in all formats, train on."""
    found: dict[str, Any] = {}
    for wrapper in WRAPPERS:
        model, optimizer = together(case_of(wrapper))
        advance(model, optimizer, 0, SAVED, rank, world)
        save(model, optimizer, Path(folder, f"{wrapper}-{world}"))
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole = get_state_dict(model, optimizer, options=options)
        plain = optimizer.state_dict() if wrapper == "ddp" else None
        if rank == 0:
            torch.save(whole, Path(folder, f"{wrapper}-{world}.full"))
            if plain is not None:
                weights = {k.removeprefix("module."): v for k, v in model.state_dict().items()}
                torch.save({"model": weights, "optimizer": plain}, Path(folder, f"{wrapper}-{world}.pt"))
        advance(model, optimizer, SAVED, END, rank, world)
        found[wrapper] = outcome(model, optimizer)
    return packed(found)


def loading(rank: int, world: int, folder: str, saved_on: int) -> Any:
    """Leave other state behind, load what `saved_on` ranks saved, train on."""
    found: dict[str, Any] = {}
    for source, wrapper in (("ddp", "ddp"), ("fsdp", "fsdp"), ("fsdp", "ddp"), ("ddp", "fsdp")):
        model, optimizer = together(case_of(wrapper))
        advance(model, optimizer, 20, 22, rank, world)
        load(model, optimizer, Path(folder, f"{source}-{saved_on}"))
        advance(model, optimizer, SAVED, END, rank, world)
        found[f"{source} to {wrapper}"] = outcome(model, optimizer)
    model, optimizer = together(case_of("fsdp"))
    options = StateDictOptions(full_state_dict=True)
    whole = torch.load(Path(folder, f"fsdp-{saved_on}.full"), weights_only=True)
    set_state_dict(model, optimizer, model_state_dict=whole[0], optim_state_dict=whole[1], options=options)
    advance(model, optimizer, SAVED, END, rank, world)
    found["full"] = outcome(model, optimizer)
    found["refused"] = refused(rank, world)
    return packed(found)


def refused(rank: int, world: int) -> list[tuple[str, bool]]:
    """What loading a state that does not fit says, and whether it left everything as it was."""
    model, optimizer = together(case_of("ddp"))
    advance(model, optimizer, 0, 2, rank, world)
    good = optimizer.state_dict()
    missing, larger = copy.deepcopy(good), copy.deepcopy(good)
    del missing["state"][0]["A"]
    larger["state"][0]["A"] = torch.zeros(3, dtype=torch.float64)
    other = tc.KFAC(nn.Linear(4, 3).double(), process_group="alone").state_dict()
    answers = []
    before = outcome(model, optimizer)
    for state in (missing, larger, other):
        try:
            optimizer.load_state_dict(state)
            text = "nothing raised"
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        after = outcome(model, optimizer)
        answers.append((text, all(torch.equal(after[name], value) for name, value in before.items())))
    return answers
