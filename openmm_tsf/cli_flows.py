"""The commands that make a trained flow serve better: `refine` and `tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_base import Debug, examples, kelvin, kelvins, open_source
from .console import friendly, table

REFINE_EXAMPLES = examples(
    "openmm-tsf refine runs/ala2 --temperature 300",
    "# first at the temperature of training, which helps at all others",
    "openmm-tsf refine runs/ala2 --temperature 600 --also 900 -n 300000 --rounds 2 --steps 1500",
    "openmm-tsf refine runs/ala2 --temperature 300 --after 600",
    "# then draw from what it wrote",
    "openmm-tsf sample runs/ala2/flow_300K.tsf --temperature 300",
)
TUNE_EXAMPLES = examples(
    "openmm-tsf tune runs/ala2 --temperature 300",
    "# then run the flow at the temperature that was found, and weigh for 300 K",
    "openmm-tsf sample runs/ala2 --temperature 300 --tuned",
    "# at each temperature of the run's own configuration",
    "openmm-tsf tune runs/ala2",
)


@friendly
def refine(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory with a trained flow.")],
    temperature: Annotated[float, typer.Option("--temperature", "-T", callback=kelvin, help="Of the target, K.")],
    n: Annotated[int | None, typer.Option("-n", min=100, help="Draws of each round; by default 50000.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds at most; by default 6.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps of a round; by default 400.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Largest of a round; by default 0.0005.")] = None,
    also: Annotated[
        list[float] | None, typer.Option(callback=kelvins, help="Another temperature, K, that has a say; repeatable.")
    ] = None,
    after: Annotated[
        float | None, typer.Option(callback=kelvin, help="Go on from the flow refined at so many K.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Make the flow better at one temperature, with energies there; optional.

    Writes flow_300K.tsf and refinement_300K.json beside flow.tsf, which stays
    as it is. Rounds of drawing, weighing and training go on until the ESS of
    fresh draws stops rising. A round that loses part of the molecule's
    conformations is undone. A flow that steers goes on steering exactly.

    At the temperature of training, --also a higher one tells energies from
    entropies, so that raw shares of conformations hold when it is cooled.
    """
    from .console import Bar
    from .refine_stage import flow_file, refine_stage, settings_of, summary

    if not source.is_dir():
        raise ValueError(f"{source} is not a run directory; `openmm-tsf run CONFIG.toml --out DIR` makes one")
    with open_source(source, None, None) as run:
        asked = {"n": n, "rounds": rounds, "steps": steps, "learning_rate": learning_rate}
        settings = settings_of(run, **asked, also=tuple(also or ()))
        with Bar("refine") as bar:
            done = refine_stage(run, temperature, settings, bar, after=after)
        table(str(flow_file(run, temperature)), summary(run, done))


@friendly
def tune(
    source: Annotated[
        str, typer.Argument(metavar="FLOW", help="A run directory; or a checkpoint, or a pretrained flow: ala2.")
    ],
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-T", callback=kelvin, help="Of the target, K.")
    ] = None,
    n: Annotated[int, typer.Option("-n", min=100, help="Draws at each of a dozen sampling temperatures.")] = 3000,
    lowest: Annotated[float, typer.Option(help="Lowest one, in multiples of the target's.")] = 0.5,
    highest: Annotated[float, typer.Option(help="Highest one, in multiples of the target's.")] = 2.0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="For the files; of a run, its own directory.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Find the temperature at which the flow is best run, for a target.

    A flow that has seen too little can be closer to its target a bit cooler
    or hotter than it says. t* is where draws are most likely in the target
    (fidelity), t' where least of it is missed (diversity), both in multiples
    of the target's temperature. Prints K, C, t*, t' and the ESS there, and
    writes tuning_300K.json and tuning_300K.png.
    """
    from .console import Bar
    from .tune_stage import rows, tune_file, tune_run

    span = lowest, highest
    with Bar("tune") as bar:
        if Path(source, "config.toml").is_file():
            if out is not None:
                raise typer.BadParameter("the files of a run go to its own directory", param_hint="--out")
            with open_source(Path(source), None, None) as run:
                made = tune_run(run, temperature, n=n, span=span, progress=bar)
        elif temperature is None:
            raise typer.BadParameter("say which, in K", param_hint="--temperature")
        else:
            made = [tune_file(source, temperature, out=out or Path(), n=n, span=span, progress=bar)]
    for path, facts in made:
        table(f"{path} for {facts['temperature']:g} K", rows(facts))
