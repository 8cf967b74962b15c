"""Every block of K-FAC, and both matrix-free products, on a small copy of a model: errors against definitions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from triton_curv.blocks import Block
from triton_curv.optimizers.kfac import KFAC
from triton_curv.verification.oracle import Definition, Norm, Seen, define, solve, watch
from triton_curv.verification.products import Problem, ProductRow, check_products
from triton_curv.verification.shrink import Shrunken

TOLERANCE = 1e-8
"""Relative error in float64 above which a block fails: sums of a few thousand terms round to 1e-13."""
DAMPING = 1e-2


@dataclass(frozen=True)
class BlockRow:
    """One block; errors are relative and None where nothing could be compared, for which `note` says why.

    `factors`: of A, G or F; `solve`: of the preconditioned gradient against a dense solve; `gap`: of the block's
    curvature to the exact empirical Fisher of its parameters on this batch, which is approximation, not error.
    """

    block: str
    kind: str
    factors: float | None
    solve: float | None
    gap: float | None
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing compared is wrong."""
        return all(error is None or error <= TOLERANCE for error in (self.factors, self.solve))


@dataclass(frozen=True)
class Verdict:
    """What was found on the copy; `loose` names parameters without a block, and why."""

    model: str
    divisor: int
    input_shape: tuple[int, ...]
    blocks: tuple[BlockRow, ...]
    products: tuple[ProductRow, ...]
    loose: Mapping[str, str]

    @property
    def ok(self) -> bool:
        """Whether every block that could be compared is right, and every product that has its derivatives."""
        return all(row.ok for row in self.blocks) and all(row.ok or row.op for row in self.products)


def verify(small: Shrunken, name: str, seed: int = 0) -> Verdict:
    """Take statistics, invert and precondition once on a small copy, and compare with definitions in float64.

    The loss is the mean over samples of the squared distance of all outputs to random targets.
    """
    model = small.model
    problem = Problem(model, small.inputs, seed)
    products = check_products(problem)
    seen = watch(model)
    optimizer = KFAC(model, damping=DAMPING, factor_interval=1, inverse_interval=1)
    problem.loss().loss.backward()
    optimizer.refresh()
    rows = tuple(_block_row(block, seen) for block in optimizer.blocks.values())
    left = {row.parameter: row.note.removeprefix("none: ") for row in optimizer.explain().rows if row.trainer != "kfac"}
    return Verdict(name, small.divisor, tuple(small.inputs.shape), rows, products, left)


# ---- blocks


def _block_row(block: Block, seen: Mapping[str, Sequence[Seen]]) -> BlockRow:
    module, kind = block.rule.module, type(block.rule.module).__name__
    if hasattr(block.rule, "members"):
        return BlockRow(block.name, kind, None, None, None, "one weight in several layers: no definition to compare")
    calls = seen.get(block.name, ())
    if not calls:
        return BlockRow(block.name, kind, None, None, None, "its module was not called: nothing to compare")
    told = define(module, calls)
    if isinstance(told, str):
        return BlockRow(block.name, kind, None, None, None, told)
    ours = block.factors()
    if any(key not in ours or ours[key].shape != factor.shape for key, factor in told.factors.items()):
        return BlockRow(
            block.name, kind, None, None, told.gap, f"its factors are not whole: {block.rule.approximation}"
        )
    error = max(_relative(ours[key], factor) for key, factor in told.factors.items())
    return BlockRow(block.name, kind, error, _solve_error(block, told), told.gap)


def _solve_error(block: Block, told: Definition) -> float | None:
    grads = {key: p.grad for key, p in block.rule.params.items() if p.grad is not None}
    if grads.keys() != block.rule.params.keys():
        return None
    ours, matrix = block.precondition(grads), _matrix(block.rule.module, grads)
    expected = solve(told.factors, matrix, DAMPING)
    return _relative(_matrix(block.rule.module, ours), expected)


def _matrix(module: nn.Module, values: Mapping[str, Tensor]) -> Tensor:
    """Gradients of a layer laid out as D (groups, rows, columns) of its factors; the bias is the last column."""
    if isinstance(module, Norm):
        return torch.stack([value.reshape(-1) for value in values.values()], dim=-1)[..., None]
    weight = values["weight"]
    if isinstance(module, nn.Embedding):
        return weight.T[None]
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return weight.flatten(1).T[None]
    groups = getattr(module, "groups", 1)
    matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
    return torch.cat([matrix, values["bias"].reshape(groups, -1, 1)], dim=2) if "bias" in values else matrix


def _relative(ours: Tensor, expected: Tensor) -> float:
    norm = float(expected.norm())
    return float((ours - expected).norm()) / norm if norm else float(ours.norm())
