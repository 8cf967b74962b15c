"""The command line: ``triton-curv train | compare | scenarios | tune``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

BAD_INPUT = 2
INTERRUPTED = 130
PACKAGES = ("typer", "rich", "matplotlib", "jinja2")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 2 for bad input (one line on stderr), 130 for Ctrl-C."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:  # said before a run, not by the picture at its end
        return _fail(f'the command line needs the package {missing[0]}: pip install "triton-curv[cli]"')
    import typer

    from triton_curv.cli.app import app
    from triton_curv.errors import TritonCurvError

    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = typer.main.get_command(app).main(given or ["--help"], prog_name="triton-curv", standalone_mode=False)
    except TritonCurvError as error:
        return _fail(str(error))
    except _usage_error() as error:
        return _fail(error.format_message())
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        print("triton-curv: interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _usage_error() -> type[Any]:
    """UsageError, of click or of the copy of click that newer typer carries."""
    from typer import BadParameter

    return BadParameter.__mro__[1]


def _fail(message: str) -> int:
    print(f"triton-curv: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT
