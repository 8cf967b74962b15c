"""Every block of K-FAC, and both matrix-free products, on a small copy of a model: errors against definitions."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from triton_curv.blocks import Block, LayerOptions
from triton_curv.optimizers.groups import rules_of
from triton_curv.optimizers.kfac import KFAC
from triton_curv.verification.definition import Definition, define, gradient_matrix, users_of
from triton_curv.verification.kronecker import mean_eigenvalue, solve
from triton_curv.verification.products import Problem, ProductRow, check_products
from triton_curv.verification.seen import watching
from triton_curv.verification.shrink import Shrunken

TOLERANCE = 1e-8
"""Relative error in float64 above which a block fails: sums of a few thousand terms round to 1e-13."""
DAMPING, RELATIVE_DAMPING = 1e-8, 0.03
"""lambda is the first + the second times a block's mean eigenvalue: no scale makes it ill-conditioned."""


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
    definitions = _definitions(problem)
    optimizer = KFAC(model, damping=DAMPING, relative_damping=RELATIVE_DAMPING, factor_interval=1, inverse_interval=1)
    with problem.as_before():
        problem.loss().loss.backward()
    optimizer.refresh()
    rows = tuple(_block_row(block, definitions[name]) for name, block in optimizer.blocks.items())
    left = {row.parameter: row.note.removeprefix("none: ") for row in optimizer.explain().rows if row.trainer != "kfac"}
    return Verdict(name, small.divisor, tuple(small.inputs.shape), rows, products, left)


def _definitions(problem: Problem) -> dict[str, Definition | str]:
    """Of each block, from a pass of its own: no tap is on the model yet."""
    rules, _ = rules_of(problem.model, LayerOptions())
    users = {name: users_of(problem.model, rule) for name, rule in rules.items()}
    with problem.as_before():
        with watching(problem.model, [layer for layers in users.values() for layer in layers]) as calls:
            problem.loss().loss.backward()
        found = {name: define(rule, users[name], calls) for name, rule in rules.items()}
    problem.model.zero_grad()
    return found


# ---- blocks


def _block_row(block: Block, told: Definition | str) -> BlockRow:
    kind = type(block.rule.module).__name__
    if isinstance(told, str):
        return BlockRow(block.name, kind, None, None, None, told)
    ours, note = block.factors(), f"its factors are not whole: {block.rule.approximation}"
    if any(key not in ours or ours[key].numel() != factor.numel() for key, factor in told.factors.items()):
        return BlockRow(block.name, kind, None, None, told.gap, note)
    ours = {key: ours[key].reshape(factor.shape) for key, factor in told.factors.items()}
    if told.only_product:
        scale = float(told.factors["A"].norm() / ours["A"].norm().clamp_min(1e-300))
        ours = {"A": ours["A"] * scale, "G": ours["G"] / scale}
    error = max(_relative(ours[key], factor) for key, factor in told.factors.items())
    return BlockRow(block.name, kind, error, _solve_error(block, told), told.gap)


def _solve_error(block: Block, told: Definition) -> float | None:
    grads = {key: p.grad for key, p in block.rule.params.items() if p.grad is not None}
    if grads.keys() != block.rule.params.keys():
        return None
    ours = gradient_matrix(block.rule, block.precondition(grads))
    damping = DAMPING + RELATIVE_DAMPING * mean_eigenvalue(told.factors)
    return _relative(ours, solve(told.factors, gradient_matrix(block.rule, grads), damping))


def _relative(ours: Tensor, expected: Tensor) -> float:
    norm = float(expected.norm())
    return float((ours - expected).norm()) / norm if norm else float(ours.norm())
