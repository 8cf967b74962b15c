"""The tables that the package ships, autotune/triton_curv_autotune/tuned/: analytic rows for devices not measured yet.

python -m profiles.tuned_tables      writes them anew; needed where an op's default, space or examples have changed

Measured rows stay; they come from `triton-curv tune --export FILE` and `triton-curv tune merge`.
"""

from pathlib import Path

import triton_curv_autotune
from triton_curv_autotune.entry import Entry, provenance_now
from triton_curv_autotune.key import environment
from triton_curv_autotune.registry import get_op, op_names
from triton_curv_autotune.table import Table, merge, read_table, write_table
from triton_curv_kernels.backend import DeviceLimits

FOLDER = Path(triton_curv_autotune.__file__).parent / "tuned"
AMPERE, HOPPER = 163 * 1024, 227 * 1024

DEVICES: dict[str, tuple[DeviceLimits, tuple[str, ...]]] = {
    "a100": (
        DeviceLimits("cuda", 108, AMPERE, "NVIDIA A100-SXM4-80GB", "sm_80"),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"),
    ),
    "h100": (DeviceLimits("cuda", 132, HOPPER, "NVIDIA H100 80GB HBM3", "sm_90"), ()),
    "h200": (DeviceLimits("cuda", 132, HOPPER, "NVIDIA H200", "sm_90"), ()),
    "b200": (DeviceLimits("cuda", 148, HOPPER, "NVIDIA B200", "sm_100"), ()),
    "mi300x": (DeviceLimits("hip", 304, 64 * 1024, "AMD Instinct MI300X", "gfx942"), ("AMD Instinct MI300X OAM",)),
}
"""File name: the device as its driver names it, its limits; further names of devices with the same limits and speed."""


def analytic_rows(limits: DeviceLimits) -> list[Entry]:
    """The default of every op on its examples; of no kernel source, since a default can't be wrong for another."""
    rows = []
    for name in op_names():
        op = get_op(name)
        buckets = dict.fromkeys(op.bucket(op.on(problem, limits)) for problem in op.examples)
        for bucket in buckets:
            rows.append(
                Entry(op, environment(limits), "", bucket, op.default(bucket), "analytic", (), provenance_now())
            )
    return rows


def main() -> None:
    """Write all tables, and say how many rows each has."""
    for name, (limits, aliases) in DEVICES.items():
        path = FOLDER / f"{name}.json"
        known = read_table(path.read_bytes())[0].entries if path.exists() else ()
        measured = [entry for entry in known if entry.kind == "measured"]
        rows = merge([analytic_rows(limits), measured])
        write_table(path, Table(tuple(rows), (limits.name, *aliases)))
        print(f"{path.name}: {len(rows)} rows, {len(measured)} measured")


if __name__ == "__main__":
    main()
