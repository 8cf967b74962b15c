"""From a model without data to its explanation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from triton_curv.blocks import Block
from triton_curv.blocks.cost import inversion_cost, numbers_of, solve_cost, statistics_cost
from triton_curv.costs import NOTHING, update_cost
from triton_curv.explanation.layers import Exactness, Explanation, LayerRow
from triton_curv.explanation.observe import Call, observe
from triton_curv.optimizers.kfac import KFAC
from triton_curv.packing import packed_size
from triton_curv.sharding.layers import layer_sizes


def explain(
    model: nn.Module,
    name: str,
    input_shape: Sequence[int],
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.int64),
    **options: Any,
) -> Explanation:
    """What `KFAC(model, **options)` covers, holds and costs.

    Args:
        model: on device "meta" (`without_data`).
        name: what to call it.
        input_shape: of a whole batch.
        dtypes: of the input; the first one that the model takes.
        options: of KFAC; intervals are integers.

    Raises:
        ConfigurationError: the model does not take the input, has no layer with a block, or an option is wrong.

    """
    optimizer = KFAC(model, **options)
    optimizer.detach()
    blocks = optimizer.blocks
    seen = observe(model, {key: block.rule for key, block in blocks.items()}, input_shape, dtypes)
    names = {id(p): key for key, p in model.named_parameters()}
    rows = [_block_row(key, block, names, seen.calls[key]) for key, block in blocks.items()]
    kinds = {key: type(module).__name__ for key, module in model.named_modules()}
    for row in optimizer.explain().rows:
        if row.trainer != "kfac":
            p = model.get_parameter(row.parameter)
            held = [t for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
            rows.append(
                LayerRow(
                    row.parameter,
                    kinds[row.parameter.rpartition(".")[0]],
                    (row.parameter,),
                    p.numel(),
                    row.trainer,
                    "no curvature",
                    row.note.removeprefix("none: "),
                    moment_bytes=sum(t.numel() * t.element_size() for t in held),
                    update=update_cost(p.numel()),
                )
            )
    for key, p in model.named_parameters():
        if not p.requires_grad:
            kind = kinds[key.rpartition(".")[0]]
            rows.append(LayerRow(key, kind, (key,), p.numel(), "nothing", "frozen", "requires no gradient"))
    order = {key: i for i, key in enumerate(names.values())}
    chosen = optimizer.options
    return Explanation(
        name,
        seen.input_shape,
        str(seen.dtype).removeprefix("torch."),
        sum(p.numel() * p.element_size() for p in model.parameters()),
        seen.flops,
        chosen.steps_to_next_fold(0),
        chosen.steps_to_next_inverse(0),
        tuple(sorted(rows, key=lambda row: order[row.parameters[0]])),
        layer_sizes({key: block.rule for key, block in blocks.items()}),
    )


def _block_row(key: str, block: Block, names: dict[int, str], calls: Sequence[Call]) -> LayerRow:
    rule = block.rule
    statistics = [sum(statistics_cost(rule, *call), NOTHING) for call in calls]
    return LayerRow(
        layer=key,
        kind=type(rule.module).__name__,
        parameters=tuple(names[id(p)] for p in rule.params.values()),
        numbers=numbers_of(rule),
        trainer="kfac",
        exact=_exactness(block),
        note=rule.approximation + ("" if calls else "; not reached by this forward"),
        factors=", ".join(
            f"{k} {s.size}x{s.size}" if s.batch == 1 else f"{k} {s.batch} of {s.size}x{s.size}"
            for k, s in rule.factor_shapes.items()
        ),
        calls=len(calls),
        factor_bytes=sum(
            t.element_size() * (t.numel() + len(t) * packed_size(t.shape[-1])) for t in block.sums.values()
        ),
        inverse_bytes=sum(t.numel() * t.element_size() for t in block.inverses.values()),
        moment_bytes=3 * numbers_of(rule) * block.counts.element_size(),
        statistics=sum(statistics, NOTHING),
        inverse=inversion_cost(rule),
        apply=solve_cost(rule),
        update=update_cost(numbers_of(rule)),
    )


def _exactness(block: Block) -> Exactness:
    shapes = block.rule.factor_shapes
    whole = "F" in shapes and shapes["F"].batch == 1 and shapes["F"].size == numbers_of(block.rule)
    return "exact" if whole else "approximate"
