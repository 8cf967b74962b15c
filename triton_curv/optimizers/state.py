"""Loading a state dict into the buffers an optimizer already has."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from triton_curv.errors import StateMismatchError
from triton_curv.sharding.local import assign_


def load_state_in_place(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """`Optimizer.load_state_dict` that copies into existing tensors, whatever their dtype, instead of replacing them.

    torch's own casts every state tensor to the parameter's dtype and rebinds it, which would turn fp32 factors into
    bf16 and leave views of flat buffers behind. Raises StateMismatchError, with nothing changed, if groups, parameters,
    state names or shapes differ, or if the state knows its parameters by name and has the same ones in another order.
    """
    for hook in list(optimizer._optimizer_load_state_dict_pre_hooks.values()):
        replaced = hook(optimizer, dict(state_dict))
        state_dict = state_dict if replaced is None else replaced
    groups, saved_groups = optimizer.param_groups, deepcopy(state_dict["param_groups"])
    sizes, saved_sizes = [len(g["params"]) for g in groups], [len(g["params"]) for g in saved_groups]
    if sizes != saved_sizes:
        raise StateMismatchError(f"expected parameter groups of sizes {sizes}, got {saved_sizes}")
    known: Mapping[Any, str] = getattr(optimizer, "_names", {})
    names = [known[p] for g in groups for p in g["params"]] if known else names_in({"param_groups": groups})
    require_order(names, names_in(state_dict))
    saved_keys = [key for g in saved_groups for key in g["params"]]
    params = [p for g in groups for p in g["params"]]
    saved_state = state_dict["state"]
    copies: list[tuple[Tensor, Tensor]] = []
    for index, (key, param) in enumerate(zip(saved_keys, params, strict=True)):
        own, saved = optimizer.state.get(param, {}), saved_state.get(key, {})
        if set(own) != set(saved):
            raise StateMismatchError(
                f"parameter {index}: expected state {sorted(own)}, got {sorted(saved)}; is it another optimizer's?"
            )
        for name, value in own.items():
            given = torch.as_tensor(saved[name])
            if value.shape != given.shape:
                raise StateMismatchError(
                    f"parameter {index}: expected '{name}' of shape {tuple(value.shape)}, got {tuple(given.shape)}"
                )
            copies.append((value, given))
    for value, given in copies:
        assign_(value, given)
    for group, saved_group in zip(groups, saved_groups, strict=True):
        group.update({k: v for k, v in saved_group.items() if k != "params"})
    for post_hook in list(optimizer._optimizer_load_state_dict_post_hooks.values()):
        post_hook(optimizer)


def names_in(state_dict: Mapping[str, Any]) -> list[str]:
    """The names of all parameters, where a state dict has them: ours under "names", torch's with the groups."""
    of_groups = [name for group in state_dict["param_groups"] for name in group.get("param_names", ())]
    return list(state_dict.get("names", of_groups))


def require_order(own: Sequence[str], saved: Sequence[str]) -> None:
    """Raise StateMismatchError for the same names in another order: shapes alone may not tell.

    Other names are no error: a wrapper puts a prefix before them.
    """
    if sorted(own) == sorted(saved) and list(own) != list(saved):
        i, expected, got = next((i, a, b) for i, (a, b) in enumerate(zip(own, saved, strict=True)) if a != b)
        raise StateMismatchError(
            f"parameter {i}: expected the state of '{expected}', got that of '{got}': the layers come in another "
            "order than when it was saved"
        )
