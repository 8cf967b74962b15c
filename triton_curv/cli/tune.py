"""``triton-curv tune``: measure kernel configurations, and look after what was measured; options only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Measure kernel configurations for this GPU, and keep what is faster than the default by 3 %.",
    invoke_without_command=True,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Files = Annotated[list[Path], typer.Argument(metavar="FILE...", help="Tables, as `export` writes them.")]


@app.callback()
def tune(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="module:factory, a scenario or a torchvision model.", show_default="examples")
    ] = None,
    scenario: Annotated[str | None, typer.Option(help="Tune for a scenario's model and batches.")] = None,
    shapes: Annotated[
        Path | None, typer.Option(help='JSON list of {"op": ..., "problem": {...}}; see `show --json`.')
    ] = None,
    batch: Annotated[int, typer.Option(help="Samples of a batch, for --model.")] = 32,
    input_shape: Annotated[str, typer.Option("--input", help="Shape of a sample, for --model.")] = "3x224x224",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="The input's layout, for --model.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, of --model and --scenario.")] = "float32",
    budget: Annotated[float, typer.Option(help="Seconds.")] = 120.0,
    export: Annotated[Path | None, typer.Option(help="Then write what was tuned to a table, to contribute.")] = None,
    dry_run: Annotated[bool, typer.Option(help="List problems and candidates; measure nothing.")] = False,
    json: Json = False,
) -> None:
    """Measure for BUDGET seconds; a run continues where the last one ended, and Ctrl-C keeps what is finished."""
    if context.invoked_subcommand is None:
        from triton_curv.cli.tuning import TuneOptions, run_tune

        layout = (batch, input_shape, channels_last, dtype)
        options = TuneOptions(model, scenario, shapes, *layout, budget, export, dry_run, json)
        raise typer.Exit(run_tune(options))


@app.command()
def show(json: Json = False) -> None:
    """List choices: op, problem, config, source, ms, gain over the default."""
    from triton_curv.cli.tables import run_show

    run_show(json)


@app.command()
def export(file: Annotated[Path, typer.Argument(help="Table to write.")], json: Json = False) -> None:
    """Write all that was measured on this machine to a table."""
    from triton_curv.cli.tables import run_export

    run_export(file, json)


@app.command("import")
def import_(files: Files, json: Json = False) -> None:
    """Take tables into the store; they count on the very devices and versions that they name."""
    from triton_curv.cli.tables import run_import

    run_import(files, json)


@app.command()
def merge(
    files: Files, out: Annotated[Path, typer.Option(help="Table to write.", show_default=False)], json: Json = False
) -> None:
    """Put tables together: all measurements of each problem, the last table's where two have one config."""
    from triton_curv.cli.tables import run_merge

    run_merge(files, out, json)


@app.command()
def verify(
    files: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", show_default="the store")] = None,
    json: Json = False,
) -> None:
    """Check tables; on the GPU that they name measure results and the 3 % margin again."""
    from triton_curv.cli.tables import run_verify

    raise typer.Exit(run_verify(files or [], json))


@app.command()
def clear(
    everything: Annotated[bool, typer.Option("--all", help="Entries for other devices and versions, too.")] = False,
    json: Json = False,
) -> None:
    """Delete what was measured for this machine's GPUs."""
    from triton_curv.cli.tables import run_clear

    run_clear(everything, json)
