"""The command line: `openmm-tsf run | simulate | train | sample | refine | tune | exchange | report | info`.

Nothing heavy is imported before a command runs, so that --help answers at once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_base import Debug, Out, Seed, Source, examples, kelvin, open_source
from .cli_flows import REFINE_EXAMPLES, TUNE_EXAMPLES, refine, tune
from .console import friendly, say, table

if TYPE_CHECKING:
    from .rundir import Run


LOST = "With openmmtools, those since the last stored frame are done again after Ctrl-C."

app = typer.Typer(
    name="openmm-tsf",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the console script."""
    # the batches are small: more threads than one only wait for each other, and for whatever else the machine does
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    app(prog_name="openmm-tsf")


def _version(wanted: bool) -> bool:
    if wanted:
        from . import __version__

        typer.echo(f"openmm-tsf {__version__}")
        raise typer.Exit
    return wanted


@app.callback(
    epilog=examples(
        "# a weighted ensemble in seconds, from the flow that ships with the package",
        "openmm-tsf sample ala2 --temperature 300",
        "# the whole job, from 600 K dynamics to report.html",
        "openmm-tsf run examples/ala2.toml --out runs/ala2",
        "# your own molecule; every key of the configuration has a default",
        "openmm-tsf run my.toml --out runs/my",
        "",
        "Ctrl-C at any time: the same command goes on from there.",
        "Exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted.",
    )
)
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Equilibrium ensembles of a molecule at any temperature.

    Simulate where sampling is cheap (600 K), train a temperature-steerable
    flow once, then draw weighted ensembles at any temperature (300 K). The
    weights are exact, and the effective sample size (ESS) says how far to
    trust them.
    """


@app.command(
    epilog=examples(
        "openmm-tsf run examples/ala2.toml --out runs/ala2",
        "openmm-tsf run examples/ala2.toml --out runs/ala2-seed2 --seed 2",
        "# go on with what is there",
        "openmm-tsf run runs/ala2",
    )
)
@friendly
def run(source: Source, out: Out = None, seed: Seed = None, debug: Debug = False) -> None:
    """Simulate, train, sample and report, skipping what is done.

    The directory then holds config.toml (all that was set), topology.pdb,
    training.dcd, flow.tsf (or generator.edg, where model = "edg"),
    ensemble_300K.npz (weighted draws), ensemble_300K.dcd (equally likely
    frames), pictures, report.html and metrics.json.
    """
    with open_source(source, out, seed) as opened:
        for name in ("simulate", "train", "sample", "report"):
            _do(opened, name)
        _summary(opened)


@app.command(epilog=examples("openmm-tsf simulate examples/ala2.toml --out runs/ala2"))
@friendly
def simulate(source: Source, out: Out = None, seed: Seed = None, debug: Debug = False) -> None:
    """Make the training frames: dynamics, or a checked copy of your own trajectory."""
    with open_source(source, out, seed) as opened:
        _do(opened, "simulate")


@app.command(epilog=examples("openmm-tsf train runs/ala2"))
@friendly
def train(source: Source, out: Out = None, seed: Seed = None, debug: Debug = False) -> None:
    """Train the flow on the frames of the run directory, or a diffusion generator on energies."""
    with open_source(source, out, seed) as opened:
        _do(opened, "train")


@app.command(epilog=examples("openmm-tsf report runs/ala2"))
@friendly
def report(source: Source, out: Out = None, debug: Debug = False) -> None:
    """Draw the pictures and write report.html and metrics.json anew."""
    with open_source(source, out, None) as opened:
        _do(opened, "report", again=True)
        _summary(opened)


@app.command(
    epilog=examples(
        "openmm-tsf sample ala2 --temperature 300",
        "# draws with their weights",
        "openmm-tsf sample runs/ala2 --temperature 350 -n 50000 --out at350.npz",
        "# equally likely frames, resampled from the draws",
        "openmm-tsf sample flow.tsf --temperature 300 --out at300.dcd",
        "# run at the temperature at which the flow is closest to 300 K",
        "openmm-tsf sample runs/ala2 --temperature 300 --tuned",
        "# the ensembles of the run's own configuration",
        "openmm-tsf sample runs/ala2",
    )
)
@friendly
def sample(
    source: Annotated[
        str, typer.Argument(metavar="FLOW", help="A checkpoint, a run directory, or a pretrained flow: ala2.")
    ],
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-T", callback=kelvin, help="Of the ensemble, K; any you like.")
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Number of draws.")] = 10_000,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help=".npz: draws with weights; .dcd, .xtc, .pdb, ...: equally likely frames.",
        ),
    ] = None,
    at: Annotated[
        float | None, typer.Option(callback=kelvin, help="Run the flow at this temperature, K, and reweight.")
    ] = None,
    tuned: Annotated[
        bool, typer.Option("--tuned", help="Run it at t* of `openmm-tsf tune`, which is found where it is not there.")
    ] = False,
    explore: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=0.99, help="Share of the draws spread over all basins, for rare ones; by default 0.1."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 1,
    engine: Annotated[
        str | None, typer.Option(help="batched or openmm; by default batched where the force field allows.")
    ] = None,
    platform: Annotated[
        str | None, typer.Option(help="OpenMM platform (engine openmm): CUDA, OpenCL, CPU, Reference.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Draw a weighted ensemble at any temperature, and say how far to trust it."""
    if tuned and at is not None:
        raise typer.BadParameter("a flow runs at one temperature: --at or --tuned", param_hint="--tuned")
    if temperature is None:
        if tuned or not Path(source, "config.toml").is_file():
            raise typer.BadParameter("say which, in K", param_hint="--temperature")
        with open_source(Path(source), None, None) as opened:
            _do(opened, "sample")
        return
    from .console import Bar
    from .sampling import sample_to_file

    with Bar("sample") as bar:
        rows, path = sample_to_file(
            source, temperature, n=n, out=out, at=at, tuned=tuned, explore=explore, seed=seed, engine=engine,
            platform=platform, progress=bar,
        )  # fmt: skip
    table(f"{path} at {temperature:g} K", rows)


app.command(epilog=REFINE_EXAMPLES)(refine)
app.command(epilog=TUNE_EXAMPLES)(tune)


@app.command(
    epilog=examples(
        "openmm-tsf exchange ala2 --out exchanges/ala2",
        "# longer: what is there goes on",
        "openmm-tsf exchange exchanges/ala2 -n 4000",
        "# the same with openmmtools, which writes exchange.nc",
        "openmm-tsf exchange ala2 --sampler openmmtools --temperatures 300,357,424,505,600 --out exchanges/nc",
        "# without the flow, to see what it is worth",
        "openmm-tsf exchange ala2 --plain --out exchanges/plain",
    )
)
@friendly
def exchange(
    source: Annotated[
        str,
        typer.Argument(metavar="FLOW|DIR", help="A checkpoint, a run directory, or: ala2; or an exchange to go on."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Directory; by default exchange in a run's.")
    ] = None,
    n: Annotated[int | None, typer.Option("-n", min=4, help="Iterations in all; by default 1000.")] = None,
    temperatures: Annotated[
        str | None, typer.Option(metavar="T,T,...", help="The ladder, K, ascending; or one is made of the next four.")
    ] = None,
    lowest: Annotated[float | None, typer.Option(callback=kelvin, help="Lowest one, K; by default 300.")] = None,
    highest: Annotated[float | None, typer.Option(callback=kelvin, help="Highest one, K; by default 600.")] = None,
    levels: Annotated[int | None, typer.Option(min=2, help="Number of temperatures; by default 5.")] = None,
    ladder: Annotated[
        str | None, typer.Option(help="geometric (default); or flow: equal acceptance by the flow's free energies.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="batched (default): all walkers at once; or openmmtools.")] = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Replicas at each temperature (batched); by default 8.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of dynamics in an iteration; by default 100.")] = None,
    timestep: Annotated[float | None, typer.Option(help="Time step, fs; by default 1, or 2 with constraints.")] = None,
    kind: Annotated[str | None, typer.Option(help="Of the move: independence (default), latent or mixed.")] = None,
    proposals: Annotated[
        int | None, typer.Option(min=1, help="Draws of the flow for each replica in an iteration; by default 16.")
    ] = None,
    explore: Annotated[
        float | None, typer.Option(min=0.0, max=0.99, help="Share of them spread over all basins; by default 0.")
    ] = None,
    swaps: Annotated[str | None, typer.Option(help="neighbours (default) or random pairs (batched).")] = None,
    plain: Annotated[bool | None, typer.Option("--plain", help="No moves with the flow.")] = None,
    store_every: Annotated[
        int | None,
        typer.Option(min=1, help=f"Iterations between stored frames; by default 1. {LOST}"),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed; by default 1.")] = None,
    debug: Debug = False,
) -> None:
    """Replica exchange in temperature, with the flow as a Metropolis move.

    Exact whatever the flow is worth. Writes exchange.html with acceptance,
    swaps, replica paths, round trips, free energies by MBAR, and the lowest
    temperature beside the flow's own draws; exchange.json with all figures;
    frames of the lowest temperature as a trajectory. Given the directory of
    an exchange it goes on with the settings there; of those only -n may
    change once an iteration is stored.
    """
    from .console import Bar
    from .exchange_stage import run_exchange, settings_of, summary

    directory, settings = settings_of(
        source, out, n, temperatures, (lowest, highest, levels, ladder), sampler=sampler, n_replicas=replicas,
        n_dynamics_steps=steps, timestep_fs=timestep, kind=kind, n_proposals=proposals, explore=explore, swaps=swaps,
        plain=plain, store_every=store_every, seed=seed,
    )  # fmt: skip
    with Bar("exchange") as bar:
        found = run_exchange(directory, settings, progress=bar)
    table(f"{directory}/exchange.html", summary(found))


@app.command(epilog=examples("openmm-tsf info", "openmm-tsf info runs/ala2/flow.tsf"))
@friendly
def info(
    source: Annotated[
        str | None, typer.Argument(metavar="[FLOW]", help="A checkpoint, a run directory, or: ala2.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Print versions and OpenMM platforms; or what a checkpoint says about itself."""
    from .sampling import describe_flow, describe_machine

    title, rows, more = describe_machine() if source is None else describe_flow(source)
    table(title, rows)
    if more:
        typer.echo(more)


def _do(opened: Run, name: str, again: bool = False) -> None:
    """One stage with its progress bar, or a line that says it is done already."""
    from .console import Bar
    from .reporting import STAGES
    from .stages import seconds

    is_done, work = STAGES[name]
    if is_done(opened) and not again:
        say(f"{name}: done already")
        return
    with Bar(name) as bar:
        work(opened, bar)
    say(f"{name}: done, {seconds(opened, name):.0f} s in all")


def _summary(opened: Run) -> None:
    from .reporting import summary

    table(f"{opened.path}/report.html", summary(opened))
