"""The commands and their options; data sets and matplotlib are imported when a command runs, not before."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from triton_curv.cli.bench import app as bench_app
from triton_curv.cli.tune import app as tune_app

app = typer.Typer(
    name="triton-curv",
    help="Train with curvature: K-FAC, Neumann, Newton-CG and SGN beside SGD and AdamW, on real data.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

app.add_typer(tune_app, name="tune")
app.add_typer(bench_app, name="bench")

OPTIMIZER_NAMES = "sgd, adamw, neumann, kfac, newton-cg, sgn or neumann-inner."
ScenarioName = Annotated[
    str,
    typer.Argument(metavar="SCENARIO", show_default=False, help="What to train; see `triton-curv scenarios`."),
]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", show_default=False, help="A scenario, module:factory, or a model of torchvision or timm."
    ),
]
InputShape = Annotated[str | None, typer.Option("--input", help="Shape of one sample.", show_default="3x224x224")]
InputDtype = Annotated[str, typer.Option(help="float32, int64, or auto: the first that fits.")]


@app.command()
def scenarios() -> None:
    """List the scenarios: data, model, loss and budget of each."""
    from triton_curv.cli.scenarios import show_scenarios

    show_scenarios()


@app.command()
def train(
    scenario: ScenarioName,
    optimizer: Annotated[
        str | None,
        typer.Option(help=OPTIMIZER_NAMES, show_default="kfac"),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", show_default="the scenario's")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs in all.", show_default="what fills the scenario's budget")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step.", show_default="the scenario's")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights and batches.", show_default="0")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, float64 or bfloat16.", show_default="float32")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of checkpoint and results.", show_default="runs/SCENARIO-OPTIMIZER-SEED"),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Checkpoint to continue bit for bit; it holds all options not given.")
    ] = None,
    parallel: Annotated[
        str | None,
        typer.Option(help="ddp or fsdp: on all ranks of `torchrun --nproc-per-node N -m triton_curv train ...`."),
    ] = None,
    timeout: Annotated[float, typer.Option(help="With --parallel: seconds to wait for a rank that is gone.")] = 600.0,
) -> None:
    """Train one model; Ctrl-C leaves a checkpoint that --resume continues bit for bit."""
    from triton_curv.cli.train import TrainOptions, run_train

    options = TrainOptions(
        scenario, optimizer, lr, epochs, batch_size, seed, device, dtype, out, resume, parallel, timeout
    )
    raise typer.Exit(run_train(options))


@app.command()
def compare(
    scenario: Annotated[
        str,
        typer.Argument(
            metavar="SCENARIO",
            show_default=False,
            help="A scenario, or paper-newton-cg or paper-sgn: all of a paper's.",
        ),
    ],
    optimizers: Annotated[
        str | None, typer.Option(help="Names, separated by commas.", show_default="sgd,adamw,neumann,kfac")
    ] = None,
    rates: Annotated[int, typer.Option(help="Learning rates tried for each optimizer, a factor sqrt(10) apart.")] = 5,
    seeds: Annotated[int, typer.Option(help="Seeds; the rates are tried on the first.")] = 3,
    steps: Annotated[int | None, typer.Option(help="Steps of each run.", show_default="the scenario's budget")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for report.png, results.csv, run.json.", show_default="runs/compare-SCENARIO"),
    ] = None,
) -> None:
    """Compare optimizers: the same number of rates for each, several seeds, a table and a picture."""
    from triton_curv.cli.compare import run_compare

    run_compare(scenario, optimizers, rates, seeds, steps, out)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def profile(
    context: typer.Context,
    target: Annotated[
        str | None, typer.Argument(metavar="SCENARIO|SCRIPT.py", show_default=False, help="What to profile.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="Of a scenario: see `triton-curv train`.")] = "kfac",
    steps: Annotated[int, typer.Option(min=1, help="Of a scenario: steps to profile after a warm-up.")] = 40,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    nsys: Annotated[
        Path | None, typer.Option(metavar="FILE.sqlite", help="Read an Nsight Systems export instead.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for stages.png and stages.csv.")] = Path("runs/profile"),
) -> None:
    """Show where the time of a training step goes: by stage, with FLOPs, bytes and percent of this machine's roof."""
    from triton_curv.cli.profile import run_profile

    run_profile(target, context.args, optimizer, steps, device, nsys, out)


@app.command()
def explain(
    model: Model,
    batch: Annotated[int | None, typer.Option(help="Samples of a step.", show_default="the scenario's, or 32")] = None,
    input_shape: InputShape = None,
    input_dtype: InputDtype = "auto",
    factor_interval: Annotated[int, typer.Option(help="Steps between statistics.")] = 20,
    inverse_interval: Annotated[int, typer.Option(help="Steps between renewals of the inverses.")] = 20,
    max_factor_dim: Annotated[int, typer.Option(help="Larger factors are split or made diagonal.")] = 8192,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write one self-contained page.")] = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Also show how so many ranks share the work, what they send and hold.")
    ] = None,
    shard_size: Annotated[
        int | None, typer.Option(help="Ranks that hold every factor once, of an HSDP mesh.", show_default="all")
    ] = None,
    grad_worker_fraction: Annotated[float, typer.Option(help="Share of ranks that precondition a layer.")] = 0.0,
    parallel: Annotated[str, typer.Option(help="Who reduces gradients: plain (K-FAC itself), ddp or fsdp.")] = "plain",
    wire_bytes: Annotated[int, typer.Option(help="Bytes of a number on the wire.")] = 4,
    machine: Annotated[str, typer.Option(help="Rates for predicted times: v100, a100 or h100.")] = "a100",
) -> None:
    """Show what K-FAC covers, holds and costs on a model: by layer, from shapes alone; nothing is trained."""
    from triton_curv.cli.explain import ExplainOptions, run_explain
    from triton_curv.explanation import Ranks

    ranks = None
    if world_size is not None:
        ranks = Ranks(world_size, shard_size, grad_worker_fraction, parallel, wire_bytes, machine)
    intervals = (factor_interval, inverse_interval, max_factor_dim)
    run_explain(ExplainOptions(model, batch, input_shape, input_dtype, *intervals, as_json, html, ranks))


@app.command()
def verify(
    model: Model,
    batch: Annotated[int | None, typer.Option(help="Samples.", show_default="5")] = None,
    input_shape: InputShape = None,
    input_dtype: InputDtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check every block and both matrix-free products on a narrow float64 copy of a model, against definitions."""
    from triton_curv.cli.verify import VerifyOptions, run_verify

    raise typer.Exit(run_verify(VerifyOptions(model, batch, input_shape, input_dtype, as_json)))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Print versions, device, the implementation each op takes, what works here and what to do if it does not."""
    from triton_curv.cli.doctor import run_doctor

    raise typer.Exit(run_doctor(as_json))
