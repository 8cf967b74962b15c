"""Numbers as people read them."""


def readable_bytes(count: float) -> str:
    """Bytes with a binary unit: 1536 is "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def readable_flops(count: float) -> str:
    """Operations with a decimal unit: 1500 is "1.5 k"."""
    for unit in ("", "k", "M", "G"):
        if count < 1000:
            return f"{count:.3g} {unit}".rstrip()
        count /= 1000
    return f"{count:.3g} T"
