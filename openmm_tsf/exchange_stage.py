"""The `exchange` command: run a temperature ladder in a directory, go on with it, report it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import flow_path, load_flow
from .energy import choose_energy
from .ensemble import to_mdtraj
from .exchange_report import write_exchange_report
from .exchange_settings import FILE, ExchangeSettings, load_exchange_settings, make_settings, settle
from .files import whole, write_text
from .flow import Flow
from .ladder import flow_ladder, geometric_ladder
from .records import ExchangeRecord
from .report import share_with_error
from .rundir import Progress

N_DRAWS = 10_000
SEGMENTS, STORAGE, CLOCK = "segments", "exchange.nc", "seconds.json"


def settings_of(
    source: str, out: Path | None, n_iterations: int | None, temperatures: str | None,
    ladder: tuple[float, float, int, str], **others: Any,
) -> tuple[Path, ExchangeSettings]:  # fmt: skip
    """Directory and settings that a command line means.

    Args:
        source: a flow, or the directory of an exchange, which keeps its settings.
        out: the directory; by default `exchange` in a run directory.
        n_iterations: in all.
        temperatures: "300,400,500" [K].
        ladder: lowest and highest [K], number, and "geometric" or "flow", where no temperatures are given.
        others: of `ExchangeSettings`.

    Raises:
        ValueError: a ladder that is none; a flow that is not there; no directory to write to.
    """
    if (Path(source) / FILE).is_file():
        if out is not None and out.resolve() != Path(source).resolve():
            raise ValueError(f"{source} is an exchange already: give a flow, or no --out")
        begun = load_exchange_settings(Path(source))
        return Path(source), replace(begun, n_iterations=n_iterations or begun.n_iterations)
    path = flow_path(source).resolve()
    named = str(path) if Path(source).exists() else source  # a pretrained flow moves with the package
    if out is None and not Path(source).is_dir():
        raise ValueError("say where the exchange goes: --out DIR")
    directory = Path(source) / "exchange" if out is None else out
    kelvin = _ladder(path, temperatures, *ladder)
    values = {**others, **({} if n_iterations is None else {"n_iterations": n_iterations})}
    return directory, make_settings(flow=named, temperatures=kelvin, **values)


def _ladder(flow: Path, temperatures: str | None, lowest: float, highest: float, n: int, how: str) -> list[float]:
    if temperatures is not None:
        try:
            return [float(part) for part in temperatures.split(",")]
        except ValueError:
            raise ValueError(f"temperatures {temperatures!r} must be numbers with commas, as 300,400,500") from None
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
        settings: of the exchange; `n_iterations` may have grown.
        n_draws: of the flow at each temperature, for comparison in the report.
        progress: told of iterations, then of the report.

    Returns:
        what exchange.json holds, see `write_exchange_report`.

    Raises:
        ValueError: other settings than those of the directory, a damaged file, a ladder or flow that does not fit.
    """
    flow = load_flow(flow_path(settings.flow)).requires_grad_(False)
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
    for kind in ("independence", "latent"):
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
    from .exchange.sampler import run_openmmtools
    from .exchange.storage import read_exchange

    steps = settings.steps
    move = None if settings.plain else FlowMove(
        settings.flow, steps.n_proposals, steps.kind, steps.step_size, n_walk_steps=steps.n_walk_steps,
        explore=steps.explore,
    )  # fmt: skip
    clock, begin = directory / CLOCK, time.monotonic()
    before = json.loads(clock.read_text("utf-8"))["seconds"] if clock.is_file() else 0.0
    timestep = 2.0 if flow.molecule.constraints else 1.0
    try:
        run_openmmtools(
            flow.molecule, np.array(settings.temperatures), directory / STORAGE, settings.n_iterations, move=move,
            n_dynamics_steps=settings.n_dynamics_steps, timestep_fs=settings.timestep_fs or timestep,
            friction_per_ps=settings.friction_per_ps, store_every=settings.store_every, seed=settings.seed,
            progress=progress,
        )  # fmt: skip
    finally:
        seconds = before + time.monotonic() - begin
        write_text(clock, json.dumps({"seconds": seconds}) + "\n")
    record = read_exchange(directory / STORAGE)
    energies = settings.n_dynamics_steps + (0 if settings.plain else steps.n_energies)
    return replace(record, seconds=seconds, n_energy_evaluations=energies * record.levels.size)


def _save_frames(record: ExchangeRecord, flow: Flow, directory: Path) -> None:
    """Frames of the lowest temperature, in the order of iterations, as a trajectory."""
    chosen = record.positions[record.levels[record.position_iterations] == 0]
    if len(chosen):
        with whole(directory / f"frames_{record.temperatures[0]:g}K.dcd") as temporary:
            to_mdtraj(chosen, flow.molecule).save(str(temporary))
        with whole(directory / "topology.pdb") as temporary:
            to_mdtraj(flow.molecule.positions[None], flow.molecule).save(str(temporary))
