"""What the modules of the command line share: examples in help texts, common options, and how a run is opened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .rundir import Run


def examples(*lines: str) -> str:
    """Lines to end a help text with, comments dimmed."""
    shown = [f"[dim]{line}[/dim]" if line.startswith("#") else line for line in lines]
    return "\n".join(["[b]Examples[/b]", *shown])


Source = Annotated[
    Path,
    typer.Argument(metavar="CONFIG.toml|DIR", help="Configuration of the run; or its directory, to go on with it."),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="Run directory; made if it is not there.")]
Seed = Annotated[int | None, typer.Option(help="Seed of every stage, in place of the configuration's.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def kelvin(value: float | None) -> float | None:
    """A temperature option as a number [K]; one that is none is wrong usage."""
    from .units import to_kelvin

    try:
        return None if value is None else to_kelvin(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def kelvins(values: list[float] | None) -> list[float]:
    """A repeatable temperature option, see `kelvin`."""
    return [k for value in values or [] if (k := kelvin(value)) is not None]


@contextmanager
def open_source(source: Path, out: Path | None, seed: int | None) -> Iterator[Run]:
    """The run directory that the arguments mean."""
    from dataclasses import replace

    from .config import load_config
    from .rundir import open_run

    if source.is_dir():
        if out is not None and out.resolve() != source.resolve():
            raise typer.BadParameter(
                f"{source} is a run directory already: give a CONFIG.toml, or no --out", param_hint="--out"
            )
        directory, config = source, None if seed is None else load_config(source / "config.toml")
    else:
        config = load_config(source)
        if out is None:
            raise typer.BadParameter("say where the run goes: --out DIR", param_hint="--out")
        directory = out
    if seed is not None:
        config = replace(config, seed=seed)
    with open_run(directory, config) as run:
        yield run
