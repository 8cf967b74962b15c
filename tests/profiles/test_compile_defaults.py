"""The sweep over default configurations: its rows cover what the launchers ask for; a sample is compiled here."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from profiles import compile_defaults
from profiles.compile_defaults import CSV, like, main, read_rows, variants
from profiles.default_calls import Call, empty
from tests.support.offline import MACHINES, Arch
from triton_curv_kernels import choice
from triton_curv_kernels.apply_inverse import launch_apply_damped_inverse
from triton_curv_kernels.cg import launch_cg_direction, launch_cg_update
from triton_curv_kernels.factor import launch_accumulate_factor_
from triton_curv_kernels.factor_group import launch_accumulate_factors_
from triton_curv_kernels.momentum import launch_momentum_update_
from triton_curv_kernels.neumann import launch_neumann_update_
from triton_curv_kernels.patch import launch_accumulate_patch_factor_
from triton_curv_kernels.patch_geometry import PatchGeometry
from triton_curv_kernels.symmetric import launch_pack_symmetric


def smallest_calls() -> Iterator[Call]:
    """Sizes and strides of 1, which Triton's compiler takes for constants, as its interpreter does not."""
    scalar, one, hyper = empty(()), [empty(1, 1)], empty(5)
    yield Call("accumulate_factor_", "1", partial(launch_accumulate_factor_, empty(2, 2), empty(1, 1), 1.0, 1.0, True))
    group = [empty(1), empty(2, 2)], [empty(1, 1), empty(0, 1)], empty(2), empty(2), [False, True], empty(2)
    yield Call("accumulate_factors_", "1", partial(launch_accumulate_factors_, *group))
    geometry = PatchGeometry.of((1,), (1,), (1,), (1, 1), (1,))
    patches = empty(1, 2, 2), empty(1, 1, 1), geometry, 1.0, 1.0, True
    yield Call("accumulate_patch_factor_", "1", partial(launch_accumulate_patch_factor_, *patches))
    yield Call("pack_symmetric", "1", partial(launch_pack_symmetric, one, torch.float32, scalar))
    yield Call("apply_damped_inverse", "1", partial(launch_apply_damped_inverse, one, one, one, one, scalar, scalar))
    updates = partial(launch_momentum_update_, one, one, one, [scalar], hyper, rescale=[1.0])
    yield Call("momentum_update_", "1", updates)
    yield Call("neumann_update_", "1", partial(launch_neumann_update_, one, one, one, one, scalar, hyper))
    yield Call("cg_update_", "1", partial(launch_cg_update, one, one, one, one, scalar, scalar))
    yield Call("cg_direction_", "1", partial(launch_cg_direction, one, one, scalar))


def test_sizes_of_one_compile_eagerly_and_in_traces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compile_defaults, "variants", partial(variants, made=smallest_calls))
    assert main(["--arch", "sm_90", "--jobs", "2", "--csv", str(tmp_path / "rows.csv")]) == 0
    rows = read_rows(tmp_path / "rows.csv").values()
    traced = {row.kernel for row in rows if row.case.startswith("traced")}
    assert {"momentum_update_kernel", "rescale_kernel", "_update_kernel", "cg_update_kernel"} <= traced
    assert all(row.registers > 0 and row.triton for row in rows)


@pytest.mark.parametrize("arch", MACHINES)
def test_every_default_has_been_compiled_and_does_not_spill(arch: Arch) -> None:
    """A new default, or a launcher that launches otherwise: run `python -m profiles.compile_defaults` again."""
    rows = [row for row in read_rows(CSV).values() if row.arch == arch]
    assert [row for row in rows if not row.is_fine] == []
    known = {like(row.arch, row.op, row.kernel, row.constants, row.types) for row in rows}
    needed = {variant.like for variant in variants([arch])}
    assert len(needed) > 200
    assert sorted(needed - known) == []
    if arch != "gfx942":  # 64 x 64 and larger products of 16 bits are made by tensor cores
        large = [row for row in rows if row.kernel == "_accumulate_kernel" and "bf16" in row.types]
        assert all(row.matrix > 0 for row in large)
    wide = [row for row in rows if row.kernel == "momentum_update_kernel" and not row.case.startswith("traced")]
    assert wide
    assert all(row.wide_loads > 0 for row in wide)


def test_a_kernel_that_changed_is_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def calls() -> Iterator[Call]:
        yield Call("cg_direction_", "a", partial(launch_cg_direction, [empty(64)], [empty(64)], empty(())))

    monkeypatch.setattr(compile_defaults, "variants", partial(variants, made=calls))
    run = ["--arch", "sm_80", "--jobs", "1", "--csv", str(tmp_path / "rows.csv")]
    assert main([*run, "--seconds", "0"]) == 2
    assert main(run) == 0
    first = (tmp_path / "rows.csv").read_text()
    monkeypatch.setattr(compile_defaults, "measured", lambda left, *_: pytest.fail("nothing changed") if left else [])
    assert main(run) == 0
    assert (tmp_path / "rows.csv").read_text() == first
    (tmp_path / "rows.csv").write_text(first.replace(read_rows(tmp_path / "rows.csv").popitem()[1].source, "another"))
    with pytest.raises(pytest.fail.Exception):
        main(run)


def test_the_chooser_is_put_back() -> None:
    before = choice._chooser
    variants(["sm_80"], lambda: iter(()))
    assert choice._chooser is before
