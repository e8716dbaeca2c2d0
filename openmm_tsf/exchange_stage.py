"""The `exchange` command: run a temperature ladder in a directory, go on with it, report it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import flow_path, load_flow
from .dynamics import default_timestep_fs
from .energy import choose_energy
from .ensemble import to_mdtraj
from .exchange_report import write_exchange_report
from .exchange_settings import (
    FILE,
    SEGMENTS,
    STORAGE,
    ExchangeSettings,
    changed_settings,
    load_exchange_settings,
    make_settings,
    settle,
)
from .files import whole, write_text
from .flow import Flow
from .flow_steps import STEPS
from .ladder import flow_ladder, geometric_ladder
from .records import ExchangeRecord
from .report import share_with_error
from .rundir import Progress

N_DRAWS = 10_000
CLOCK = "seconds.json"
LADDER = (300.0, 600.0, 5, "geometric")
"""Lowest and highest temperature [K], number and kind of a ladder that nobody gave."""
Ladder = tuple[float | None, float | None, int | None, str | None]


def settings_of(
    source: str, out: Path | None, n_iterations: int | None, temperatures: str | None, ladder: Ladder, **others: Any
) -> tuple[Path, ExchangeSettings]:
    """Directory and settings that a command line means; None is what it does not say.

    Args:
        source: a flow, or the directory of an exchange; what is not said is as it is there.
        out: the directory; by default `exchange` in a run directory.
        n_iterations: in all.
        temperatures: "300,400,500" [K].
        ladder: lowest and highest [K], number, and "geometric" or "flow", where no temperatures are given.
        others: of `ExchangeSettings`.

    Raises:
        ValueError: a ladder that is none, or said twice; a flow that is not there; no directory to write to.
    """
    if temperatures is not None and any(part is not None for part in ladder):
        raise ValueError("give --temperatures, or a ladder by --lowest, --highest, --levels and --ladder, not both")
    values = others | {"n_iterations": n_iterations}
    if (Path(source) / FILE).is_file():
        if out is not None and out.resolve() != Path(source).resolve():
            raise ValueError(f"{source} is an exchange already: give a flow, or no --out")
        begun = load_exchange_settings(Path(source))
        return Path(source), changed_settings(begun, temperatures=_other_ladder(begun, temperatures, ladder), **values)
    path = flow_path(source).resolve()
    named = str(path) if Path(source).exists() else source  # a pretrained flow moves with the package
    if out is None and not Path(source).is_dir():
        raise ValueError("say where the exchange goes: --out DIR")
    directory = Path(source) / "exchange" if out is None else out
    kelvin = _ladder(path, *_filled(ladder, LADDER)) if temperatures is None else _listed(temperatures)
    return directory, make_settings(flow=named, temperatures=kelvin, **values)


def _other_ladder(begun: ExchangeSettings, temperatures: str | None, ladder: Ladder) -> list[float] | None:
    """The ladder that is asked for in place of one that was begun; None if nothing else is asked for."""
    if temperatures is not None:
        return _listed(temperatures)
    lowest, highest = (round(t, 3) for t in (begun.temperatures[0], begun.temperatures[-1]))
    there = (lowest, highest, len(begun.temperatures), None)
    asked = _filled(ladder, there)
    return None if asked == there else _ladder(flow_path(begun.flow), *_filled(asked, LADDER))


def _filled(ladder: Ladder, default: Ladder) -> Ladder:
    return tuple(there if part is None else part for part, there in zip(ladder, default, strict=True))


def _listed(temperatures: str) -> list[float]:
    try:
        return [float(part) for part in temperatures.split(",")]
    except ValueError:
        raise ValueError(f"temperatures {temperatures!r} must be numbers with commas, as 300,400,500") from None


def _ladder(flow: Path, lowest: float, highest: float, n: int, how: str) -> list[float]:
    if how not in ("geometric", "flow"):
        raise ValueError(f"unknown ladder {how!r}; choose geometric or flow")
    made = (
        geometric_ladder(lowest, highest, n) if how == "geometric" else flow_ladder(load_flow(flow), lowest, highest, n)
    )
    return [round(t, 3) for t in made.tolist()]


def run_exchange(
    directory: Path, settings: ExchangeSettings, *, n_draws: int = N_DRAWS, progress: Progress | None = None
) -> dict[str, Any]:
    """Run or go on, then report.

    Args:
        directory: made if need be; an exchange that is there goes on if its settings are the same.
        settings: of the exchange; `n_iterations` may have changed. What is there is only reported if it is enough.
        n_draws: of the flow at each temperature, for comparison in the report.
        progress: told of iterations, then of the report.

    Returns:
        what exchange.json holds, see `write_exchange_report`.

    Raises:
        ValueError: other settings than those of the directory, a damaged file, a ladder or flow that does not fit.
    """
    flow = load_flow(flow_path(settings.flow)).requires_grad_(False)
    if not settings.plain:
        flow.at(settings.temperatures[0]).exploring(settings.explore)  # refused before anything begins
    if settings.timestep_fs is None:
        settings = replace(settings, timestep_fs=default_timestep_fs(flow.molecule))
    settings = settle(directory, settings)
    record = (
        _batched(directory, settings, flow, progress)
        if settings.sampler == "batched"
        else _openmmtools(directory, settings, flow, progress)
    )
    _save_frames(record, flow, directory)
    energy = choose_energy(flow.molecule.system, flow.molecule.positions, n=n_draws * len(record.temperatures))
    return write_exchange_report(
        directory, record, flow.molecule, flow, energy, n_draws=n_draws, seed=settings.seed, progress=progress
    )


def summary(found: dict[str, Any]) -> dict[str, str]:
    """The main figures, ready to print: names and values with units."""
    levels = range(found["n_temperatures"])
    swaps = [found[f"swap_acceptance_{k}_{k + 1}"] for k in levels if f"swap_acceptance_{k}_{k + 1}" in found]
    rows = {
        "temperatures": ", ".join(f"{found[f'temperature_{k}_kelvin']:g}" for k in levels) + " K",
        "iterations": f"{found['n_iterations']} of {found['n_replicas']} replicas",
        "swaps of neighbours": _range([100 * share for share in swaps], "% accepted"),
        "round trips": str(found["round_trips"]),
    }
    for kind in STEPS:
        shares = [
            100 * found[key] for k in levels if (key := f"{kind}_acceptance_{k}") in found and found[key] is not None
        ]
        if shares:
            rows[f"{kind} proposals"] = _range(shares, "% accepted, from the lowest temperature to the highest")
    rows["effective samples"] = f"{found['n_effective_0']:.0f} at {found['temperature_0_kelvin']:g} K"
    for source, label in (
        ("exchange", "alpha_L share"),
        ("flow", "  flow, reweighted"),
        ("reference", "  long reference"),
    ):
        share, error = found.get(f"alpha_left_{source}"), found.get(f"alpha_left_{source}_error")
        if share is not None and error is not None:
            rows[label] = share_with_error(share, error)
    return rows


def _range(values: list[float], unit: str) -> str:
    """First and last, and both once only where they are alike."""
    shown = list(dict.fromkeys(f"{value:.3g}" for value in (values[0], values[-1]))) if values else ["no"]
    return f"{' to '.join(shown)} {unit}"


def _batched(directory: Path, settings: ExchangeSettings, flow: Flow, progress: Progress | None) -> ExchangeRecord:
    from .tempering import BatchedTempering
    from .tempering_storage import run_tempering

    tempering = BatchedTempering(
        flow.molecule, np.array(settings.temperatures), flow=None if settings.plain else flow, steps=settings.steps,
        n_replicas_per_temperature=settings.n_replicas, n_dynamics_steps=settings.n_dynamics_steps,
        timestep_fs=settings.timestep_fs, friction_per_ps=settings.friction_per_ps, swaps=settings.swaps,
        seed=settings.seed,
    )  # fmt: skip
    return run_tempering(
        tempering, directory / SEGMENTS, settings.n_iterations, store_every=settings.store_every, progress=progress
    )


def _openmmtools(directory: Path, settings: ExchangeSettings, flow: Flow, progress: Progress | None) -> ExchangeRecord:
    from .exchange.move import FlowMove
    from .exchange.sampler import most_energies, run_openmmtools
    from .exchange.storage import read_exchange

    steps = settings.steps
    move = None if settings.plain else FlowMove(
        settings.flow, steps.n_proposals, steps.kind, steps.step_size, n_walk_steps=steps.n_walk_steps,
        explore=steps.explore,
    )  # fmt: skip
    clock, begin = directory / CLOCK, time.monotonic()
    goes_on = clock.is_file() and (directory / STORAGE).exists()
    before = json.loads(clock.read_text("utf-8"))["seconds"] if goes_on else 0.0
    try:
        run_openmmtools(
            flow.molecule, np.array(settings.temperatures), directory / STORAGE, settings.n_iterations, move=move,
            n_dynamics_steps=settings.n_dynamics_steps, timestep_fs=settings.timestep_fs,
            friction_per_ps=settings.friction_per_ps, store_every=settings.store_every, seed=settings.seed,
            progress=progress,
        )  # fmt: skip
    finally:
        seconds = before + time.monotonic() - begin
        write_text(clock, json.dumps({"seconds": seconds}) + "\n")
    record = read_exchange(directory / STORAGE)
    energies = most_energies(settings.n_dynamics_steps, None if settings.plain else steps)
    return replace(record, seconds=seconds, n_energy_evaluations=energies * record.levels.size)


def _save_frames(record: ExchangeRecord, flow: Flow, directory: Path) -> None:
    """Frames of the lowest temperature, in the order of iterations, as a trajectory."""
    chosen = record.positions[record.levels[record.position_iterations] == 0]
    if len(chosen):
        with whole(directory / f"frames_{record.temperatures[0]:g}K.dcd") as temporary:
            to_mdtraj(chosen, flow.molecule).save(str(temporary))
        with whole(directory / "topology.pdb") as temporary:
            to_mdtraj(flow.molecule.positions[None], flow.molecule).save(str(temporary))
