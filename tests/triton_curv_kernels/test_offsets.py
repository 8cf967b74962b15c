"""Offsets beyond 32 bits: a probe for each op and way through its kernels, and the same probes on 32-bit kernels.

The negative control is a copy of the package whose kernels have 32 bits wherever they ask for 64 (see support/far.py).
On tensors close together it passes each probe; on those far apart it fails each. Whole numbers make sums exact.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.support.far import FAR, NEAR, Kernels, apart, last_program_only, narrowed, reserved_amid
from tests.support.patches import Setting
from tests.triton_curv_kernels.test_apply_inverse import definition
from tests.triton_curv_kernels.test_patch_reference import geometry_of
from triton_curv_kernels.factor_tiles import store_columns
from triton_curv_kernels.packed import from_dense, packed_length

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore:overflow")]

Probe = Callable[[Kernels, int], None]
"""Runs an op of the package on tensors whose elements are `far` apart, and asserts what comes out."""


def integers(*shape: int) -> Tensor:
    """Small whole numbers."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


def symmetric(n: int) -> Tensor:
    half = integers(n, n)
    return half + half.mT


# accumulate_factor_, accumulate_factors_


def factor(kernels: Kernels, far: int, grouped: bool = False, of: str = "rows", split: bool = False) -> None:
    """Rows, factors, or matrices of a batch, far apart."""
    batch, k = (9, 12) if of == "batch" else (1, 48)
    rows, old = integers(batch, k, 8), torch.ones(batch, 9, 9)
    x = torch.cat([rows, torch.ones(batch, k, 1)], -1)
    expected = x.mT @ x + 1
    rows = apart(rows, far, 1 if of == "rows" else 0) if of != "factor" else rows
    old = apart(old, far, 1 if of == "factor" else 0) if of != "rows" else old
    if grouped:
        one = torch.ones(1)
        config = kernels.factor_group_config.GroupConfig(32, 16, 16, 16 if split else 64, 4, 2)
        for matrix, result in zip(rows, old, strict=True):
            kernels.factor_group.launch_accumulate_factors_([result], [matrix], one, one, [True], config=config)
    else:
        config = kernels.factor.FactorConfig(16, 16, 3 if split else 1)
        kernels.factor.launch_accumulate_factor_(old, rows, ones=True, config=config)
    assert torch.equal(old, expected)


@triton.jit  # type: ignore[untyped-decorator]  # Triton is untyped
def _store_kernel(PACKED: Any, i: Any, j: Any, size: Any, beta: Any) -> None:
    value = (tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]).to(tl.float32)
    store_columns(PACKED, value, i, j, True, size, size, beta, 0, 0, 16, 16, True)


def packed_factor(kernels: Kernels, far: int, first: bool) -> None:
    """The last tile of n = 100,000 in each part of the rectangle, 5 and 2.5 milliards of elements from its start."""
    n = 100_000 if far == FAR else 100
    half = n // 2
    packed = reserved_amid(packed_length(n), torch.float32, far)
    i, j = n - 16, half - 16 if first else n - 32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "store_columns", kernels.factor_tiles.store_columns)
        _store_kernel[(1,)](packed, i, j, n, 1.0)
    rectangle = packed.view(n + 1, half)
    tile = rectangle[i + 1 : i + 17, j : j + 16]
    tile = tile if first else rectangle[j - half : j - half + 16, i - half : i - half + 16].mT
    assert torch.equal(tile, torch.arange(256.0).view(16, 16))


# accumulate_patch_factor_


def patches(kernels: Kernels, far: int, algorithm: str, of: str) -> None:
    """Samples, rows of pixels, channels, rows of the factor or groups far apart; of groups, the last program."""
    sizes, kernel, padding = {
        "samples": ((9, 2, 3), (2,), (1,)),
        "pixels": ((1, 2, 10, 2), (2, 1), (1, 0)),
        "channels": ((2, 9, 3), (1,), (0,)),
        "factor": ((2, 5, 3), (2,), (1,)),
        "groups": ((5, 1, 4), (1,), (0,)),
    }[of]
    setting = Setting(sizes, kernel, {"padding": padding, "groups": 9 if of == "groups" else 1}, channels_last=True)
    input, result = setting.integers(), setting.factor(ones=True)
    expected = setting.expected(result, input, 0.5, 1.0, ones=True)
    near = input.movedim(1, -1)
    far_along = {"samples": 0, "pixels": 1, "channels": near.dim() - 1, "groups": near.dim() - 1}
    if of in far_along:
        input = apart(near, far, far_along[of]).movedim(-1, 1)
    if of in ("factor", "groups"):
        result = apart(result, far, 1 if of == "factor" else 0)
    splits = 3 if of in ("samples", "factor") else 1
    config = kernels.patch.PatchConfig(algorithm, 16, 16, splits, num_warps=1, num_stages=2)
    geometry = kernels.patch_geometry.PatchGeometry(**vars(geometry_of(setting)))
    with last_program_only() if of == "groups" else nullcontext():
        kernels.patch.launch_accumulate_patch_factor_(result, input, geometry, 0.5, 1.0, True, config)
    if of == "groups":
        result, expected = result[-1, -1], expected[-1, -1]
    assert torch.equal(result.double(), expected)


def one_pixel(kernels: Kernels, far: int, of: str) -> None:
    """A kernel of one pixel: samples, channels, rows of pixels, or rows of the factor far apart."""
    sizes = {"samples": (9, 3, 10), "channels": (2, 9, 10), "rows": (2, 3, 9, 2), "factor": (2, 9, 4)}[of]
    setting = Setting(sizes, (1,) * len(sizes[2:]))
    input, result = setting.integers(), setting.factor(ones=True)
    expected = setting.expected(result, input, 0.5, 1.0, ones=True)
    if of == "factor":
        result = apart(result, far, 1)
    else:
        input = apart(input, far, ("samples", "channels", "rows").index(of))
    geometry = kernels.patch_geometry.PatchGeometry(**vars(geometry_of(setting)))
    kernels.patch.launch_accumulate_patch_factor_(result, input, geometry, 0.5, 1.0, True)
    assert torch.equal(result.double(), expected)


# pack_symmetric, unpack_symmetric


def untraced(kernels: Kernels, file: str, traced: bool) -> pytest.MonkeyPatch:
    """Launch as a trace does, without a table, if `traced`."""
    patch = pytest.MonkeyPatch()
    if traced:
        patch.setattr(getattr(kernels, file), "is_traced", lambda *_: True)
    return patch


def packing(kernels: Kernels, far: int, traced: bool) -> None:
    """Rows of a matrix far apart, there and back; tiles of all kinds."""
    matrix, tiles = symmetric(64), kernels.symmetric.SymmetricConfig(16, 1)
    there, back = apart(matrix, far, dtype=torch.float16), apart(torch.zeros(64, 64), far)
    patch = untraced(kernels, "symmetric", traced)
    try:
        packed = kernels.symmetric.launch_pack_symmetric([there], torch.float32, config=tiles)
        kernels.symmetric.launch_unpack_symmetric_([back], from_dense(matrix), config=tiles)
    finally:
        patch.undo()
    assert torch.equal(packed, from_dense(matrix))
    assert torch.equal(back, matrix)


def packing_large(kernels: Kernels, far: int, pack: bool) -> None:
    """The tile in the middle of n = 100,000, 2.5 milliards of elements behind the start of the packed matrix."""
    n = 100_000 if far == FAR else 128
    tiles, half, middle = kernels.symmetric.SymmetricConfig(16, 1), n // 2, n // 32 * 16 - 16
    packed = reserved_amid(packed_length(n), torch.float16, far)
    matrix = reserved_amid(n * n, torch.float16, far).view(n, n)
    of_tile = matrix[middle : middle + 16, middle : middle + 16]
    of_packed = packed.view(n + 1, half)[middle + 1 : middle + 17, middle : middle + 16]
    values = symmetric(16).half()
    with pytest.MonkeyPatch.context() as patch, last_program_only():
        if pack:
            of_tile.copy_(values)
            patch.setattr(torch, "empty", lambda *_, **__: packed)
            kernels.symmetric.launch_pack_symmetric([matrix], torch.float16, config=tiles)
        else:
            of_packed.copy_(values)
            kernels.symmetric.launch_unpack_symmetric_([matrix], packed, config=tiles)
    assert torch.equal((of_packed if pack else of_tile).tril(), values.tril())


# damped_inverse_


def inverse(kernels: Kernels, far: int, of: str) -> None:
    """The last tile of a matrix of 49,152 rows, or a matrix 2^31 elements behind the start of the workspace."""
    file, size = kernels.damped_inverse_kernels, 3 << 14 if far == FAR else 48
    offset = 0
    if of == "offset":
        offset, size = 8 * far + 16, 16
    last, width = size - 16, 128 if size > 128 else 16
    x, a, left, w = (reserved_amid(offset + size**2, torch.float32, far) for _ in "xalw")
    x_, a_, left_, w_ = (t[offset:].view(size, size) for t in (x, a, left, w))
    for place, t in enumerate((x_, a_, left_, w_)):
        t[last:, : width // 2] = integers(16, width // 2 + place)[:, : width // 2]
        t[last:, last:] = symmetric(16) + place
    if size == 16:
        width = 16
    matrices = torch.tensor([[offset, size, size, 0, 0, 0]])
    corner = torch.tensor([[0, last, last]], dtype=torch.int32)
    state, modes, partial = torch.ones(5), torch.zeros(1, dtype=torch.int32), torch.empty(1)
    tile = (slice(last, None), slice(last, None))
    blocks = {"BLOCK_N": 16, "BLOCK_K": max(16, size // 3 if size > 48 else 16), "PRECISION": "ieee"}
    rows = [t[last:].clone() for t in (x_, a_, left_, w_)]
    old_x, old_w = x_[tile].clone(), w_[tile].clone()
    if of in ("residual", "offset"):
        file.residual_kernel[(1,)](matrices, corner, modes, x, a, left, partial, BLOCK_M=16, **blocks)
        assert torch.equal(left_[tile], torch.eye(16) - rows[0] @ rows[1].mT)
    elif of == "bounds":
        bounds = torch.empty(2)
        panel = torch.tensor([[0, size - width]])
        file.bounds_kernel[(1,)](matrices, panel, a, bounds, BLOCK_N=width)
        sums, diagonal = a_[-width:].abs().sum(1), a_.diagonal()[-width:]
        assert torch.equal(bounds, torch.stack([sums.max(), (diagonal - (sums - diagonal.abs())).min()]))
    elif of in ("correction", "start"):
        modes.fill_(2 if of == "start" else 0)
        file.correction_kernel[(1,)](matrices, corner, modes, state, 1, x, a, left, w, **blocks)
        product = torch.eye(16) - a_[tile] if of == "start" else rows[0] @ rows[2].mT
        assert torch.equal(w_[tile].tril(), product.tril())
        assert of != "start" or (
            torch.equal(x_[tile], torch.eye(16)) and torch.equal(left_[tile].tril(), product.tril())
        )
    else:
        order = int(of[-1])
        file.update_kernel[(1,)](matrices, corner, modes, state, 1, x, left, w, ORDER=order, **blocks)
        more = rows[3] @ rows[2].mT if order == 3 else 0.0
        assert torch.equal(x_[tile].tril(), (old_x + old_w + more).tril())


# apply_damped_inverse


def applying(kernels: Kernels, far: int, of: int) -> None:
    """Rows (or small matrices) of updates, gradients, A^-1 or G^-1 far apart: aligned, not, single, small."""
    shapes = [(12, 12), (11, 13), (12, 9), (9, 2, 1)]
    grads = [integers(*shape) for shape in shapes]
    of_a = [symmetric(12), symmetric(13), torch.empty(0), torch.empty(0)]
    of_g = [symmetric(12), symmetric(11), symmetric(12), torch.stack([symmetric(2)] * 9)]
    target, _, _ = definition(grads, of_a, of_g)
    lists = [[torch.zeros_like(grad) for grad in grads], grads, of_a, of_g]
    lists[of] = [apart(t, far) if t.numel() else t for t in lists[of]]
    config = kernels.apply_inverse.ApplyConfig(16, 16, 1, 1)
    kernels.apply_inverse.launch_apply_damped_inverse(*lists, config=config)
    for update, expected in zip(lists[0], target, strict=True):
        assert torch.equal(update.double(), expected)


def applying_large(kernels: Kernels, far: int) -> None:
    """Two layers whose products G^-1 D lie 2^32 elements apart."""
    grads, of_a, of_g = [integers(8, 8), integers(8, 8) + 1], [symmetric(8)] * 2, [symmetric(8)] * 2
    target, _, _ = definition(grads, of_a, of_g)
    updates, file = [torch.zeros(8, 8) for _ in "12"], kernels.apply_inverse
    work = file.work_of(updates, grads, of_a, of_g, 16)
    matrices = work.matrices.clone()
    matrices[1, 4] = matrices[0, 4] + 16 * far
    workspace = reserved_amid(16 * far + 64, torch.float32, far)
    empty = torch.empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "work_of", lambda *_: work._replace(matrices=matrices, workspace=len(workspace)))
        patch.setattr(torch, "empty", lambda n, **some: workspace if n == len(workspace) else empty(n, **some))
        file.launch_apply_damped_inverse(updates, grads, of_a, of_g, config=file.ApplyConfig(16, 16, 1, 1))
    for update, expected in zip(updates, target, strict=True):
        assert torch.equal(update.double(), expected)


# momentum_update_, neumann_update_, cg_*


def spread(far: int, count: int, dtypes: Sequence[torch.dtype]) -> list[list[Tensor]]:
    """Lists of two tensors each: rows far apart, and matrices of rows that are not neighbours."""
    lists = []
    for place in range(count):
        rows, matrices = integers(9, 3) + place, integers(9, 2, 4) - place
        lists.append([apart(rows, far, dtype=dtypes[place]), apart(matrices, far, dtype=dtypes[place])[..., :3]])
    return lists


def long(far: int, count: int, dtypes: Sequence[torch.dtype], dense: bool) -> list[list[Tensor]]:
    """Lists of one tensor of 9 * far elements each, of which the last 64 are not 0; in rows with gaps, or `dense`."""
    lists = []
    for place in range(count):
        tensor = reserved_amid(9 * far, dtypes[place], far)
        tensor[-64:] = integers(64) + place
        lists.append([tensor if dense else tensor.as_strided((9, far - 16), (far, 1))])
    return lists


def over_lists(kernels: Kernels, far: int, op: str, way: str) -> None:
    """An op over lists and its reference: through a table or launch by launch; all of it, or the last program alone."""
    file, options, dtypes = kernels.cg, {}, [torch.float32] * 4
    count = {"momentum_update": 3, "neumann_update": 4, "cg_update": 4, "cg_direction": 2, "cg_dots": 2}[op]
    if op == "momentum_update":
        file, dtypes = kernels.momentum, [torch.bfloat16, torch.float32, torch.float16]
        if way != "traced long":  # whose parameter would be measured as a whole
            options["rescale"] = [2.0, 3.0]
    elif op == "neumann_update":
        file, dtypes = kernels.neumann, [torch.bfloat16, torch.float32, torch.float32, torch.float16]
    is_long = "long" in way
    dense = way == "traced long" and op != "momentum_update"
    lists = long(far, count, dtypes, dense) if is_long else spread(far, count, dtypes)

    def ends() -> list[list[Tensor]]:
        if not is_long:
            return [[t.clone(memory_format=torch.contiguous_format) for t in tensors] for tensors in lists]
        return [[t[-64:].clone() if t.dim() == 1 else t[-1, -64:].clone() for t in tensors] for tensors in lists]

    before = ends()
    numbers: list[Any] = [torch.tensor(0.5), torch.zeros(())]
    if op == "momentum_update":
        numbers = [[torch.tensor(0.5)] * len(lists[0]), torch.tensor([0.5, 0.25, 0.5, 1.0, 0.5])]
        if "rescale" in options:
            options["rescale"] = options["rescale"][: len(lists[0])]
    elif op == "neumann_update":
        numbers = [torch.tensor(1.0), torch.tensor([0.5, 0.5, 0.0, 0.0, 0.5])]
    elif op == "cg_direction":
        numbers = [torch.tensor(0.5)]
    elif op == "cg_dots":
        numbers = []
    config = kernels.pointer_table.ListConfig(8192 if far == FAR else 512, 4)
    launch = getattr(file, f"launch_{op}_", None) or getattr(file, f"launch_{op}")
    patch = untraced(kernels, file.__name__.rpartition(".")[2], "traced" in way)
    try:
        if is_long:
            patch.setattr(torch, "empty", torch.zeros)
            with last_program_only():
                result = launch(*lists, *numbers, **options, config=config)
        else:
            result = launch(*lists, *numbers, **options, config=config)
    finally:
        patch.undo()
    if op == "cg_dots":
        a, b = before
        expected = torch.stack([file.cg_dot_reference(a, b), file.cg_dot_reference(a, a)])
        torch.testing.assert_close(result[1:] if is_long else result, expected[1:] if is_long else expected)
        return
    getattr(file, f"{op}_reference")(*before, *numbers, **options)
    for got, target in zip(ends(), before, strict=True):
        torch.testing.assert_close(got, target)


PROBES: dict[str, Probe] = {
    **{f"factor, {of}": partial(factor, of=of) for of in ("rows", "factor", "batch")},
    "factor, rows in parts": partial(factor, split=True),
    **{f"factors, {of}": partial(factor, grouped=True, of=of) for of in ("rows", "factor")},
    **{f"factors, {of} in parts": partial(factor, grouped=True, of=of, split=True) for of in ("rows", "factor")},
    **{f"packed factor, {'first' if f else 'last'}": partial(packed_factor, first=f) for f in (True, False)},
    **{
        f"patches by {algorithm}, {of}": partial(patches, algorithm=algorithm, of=of)
        for algorithm in ("gather", "implicit", "displacement")
        for of in ("samples", "pixels", "factor", "groups")
    },
    "patches by gather, channels": partial(patches, algorithm="gather", of="channels"),
    **{f"one pixel, {of}": partial(one_pixel, of=of) for of in ("samples", "channels", "rows", "factor")},
    **{f"packing{', traced' * t}": partial(packing, traced=t) for t in (False, True)},
    **{f"{'un' * (not p)}packing, large": partial(packing_large, pack=p) for p in (True, False)},
    **{
        f"inverse, {of}": partial(inverse, of=of)
        for of in ("residual", "offset", "bounds", "correction", "start", "update of order 2", "update of order 3")
    },
    **{f"apply, {n}": partial(applying, of=i) for i, n in enumerate(("updates", "grads", "inverse_A", "inverse_G"))},
    "apply, workspace": applying_large,
    **{
        f"{op}, {way}": partial(over_lists, op=op, way=way)
        for op in ("momentum_update", "neumann_update", "cg_update", "cg_direction", "cg_dots")
        for way in ("table", "table long", "traced long")
    },
    "momentum_update, traced": partial(over_lists, op="momentum_update", way="traced"),
}


@pytest.mark.parametrize("name", PROBES)
def test_kernels_reach_far(name: str) -> None:
    PROBES[name](Kernels("triton_curv_kernels"), FAR)


@pytest.mark.parametrize("name", PROBES)
def test_kernels_of_32_bits_do_not(name: str) -> None:
    """The negative control: a probe that they passed would see nothing."""
    kernels = Kernels(narrowed())
    PROBES[name](kernels, NEAR)
    with pytest.raises(AssertionError):
        PROBES[name](kernels, FAR)
