"""Which exchange a model gets."""

from collections.abc import Mapping

import torch

from triton_curv.blocks import Rule
from triton_curv.errors import ConfigurationError
from triton_curv.optimizers.exchange import Alone, Exchange
from triton_curv.optimizers.kfac_options import KFACOptions
from triton_curv.optimizers.traced import ONE_RANK
from triton_curv.sharding.options import Sharding
from triton_curv.sharding.ranks import Found
from triton_curv.sharding.shard_team import ShardTeam
from triton_curv.sharding.team import Team


def exchange_for(
    rules: Mapping[str, Rule],
    found: Found,
    sharding: Sharding,
    options: KFACOptions,
    dtype: torch.dtype,
    compiled: bool = False,
) -> Exchange:
    """What the ranks that were found need of one another. Raises ConfigurationError for what they can't share out."""
    if len(found.ranks) == 1 and found.wrapper != "fsdp":
        return Alone()
    if compiled:
        raise ConfigurationError(ONE_RANK)
    if options.ekfac:
        raise ConfigurationError(
            "expected ekfac=False on several ranks: its second moments are taken in a layer's eigenbasis, which is "
            "not on the ranks where the samples are"
        )
    team = ShardTeam if found.wrapper == "fsdp" else Team
    return team(rules, found, sharding, options, dtype)
