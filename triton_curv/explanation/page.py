"""An explanation as one HTML page that needs nothing else: styles, pictures and sorting are inside."""

from importlib.resources import files
from pathlib import Path

from triton_curv.explanation.layers import Explanation
from triton_curv.explanation.units import readable_bytes, readable_flops

COLORS = {"statistics": "#1f77b4", "inverses": "#d62728", "precondition": "#2ca02c", "update": "#9467bd"}
"""Of the stages, as in Nsight (`triton_curv.nvtx.COLORS`)."""


def render(explanation: Explanation, ranks: str = "") -> str:
    """The page's text; `ranks` is a plain-text report of how the work is shared out, shown as it is."""
    import jinja2

    source = (files("triton_curv.explanation") / "page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(bytes=readable_bytes, flops=readable_flops)
    largest = max((row.memory for row in explanation.rows), default=0)
    return environment.from_string(source).render(e=explanation, ranks=ranks, colors=COLORS, largest=largest or 1)


def write_page(explanation: Explanation, path: Path, ranks: str = "") -> None:
    """Write the page."""
    path.write_text(render(explanation, ranks), encoding="utf-8")
