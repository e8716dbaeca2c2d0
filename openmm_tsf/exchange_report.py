"""The report of a replica exchange: pictures, exchange.json, observables_exchange.csv and exchange.html."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from . import analysis, plotting
from .canvas import png, small_print
from .ensemble import Ensemble, draw, out_of_reach
from .exchange_facts import PACKAGES, account, at_lowest, json_safe
from .exchange_page import render
from .exchange_plots import exchange_figure, exchange_series, observables_exchange
from .exchange_settings import FEWEST_ITERATIONS
from .files import whole, write_text
from .mbar import Samples
from .multistate import COLUMNS, N_BLOCKS, free_energies, observables
from .records import ExchangeRecord
from .reference import Reference, reference_for
from .series import of_ensemble, of_reference
from .typing import Energy
from .units import kT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Progress = Callable[[int, int, str], None]
Angles = tuple[np.ndarray, np.ndarray]

STEP_KELVIN, MOST_STEPS = 25.0, 16
"""Spacing of the temperatures that observables are given at, wider where that would make more steps than this."""
DISCARDED_SHARE = 0.1
"""Share of the iterations that is left out at the beginning unless the caller says how many."""


class FlowPart(NamedTuple):
    """What reweighted draws of the flow say: the draws at the lowest temperature, rows of observables, warnings."""

    coldest: Ensemble | None
    rows: list[dict[str, float]]
    notes: list[str]


def write_exchange_report(
    directory: str | os.PathLike,
    record: ExchangeRecord,
    molecule: Any,
    flow: Any,
    energy: Energy | None,
    *,
    n_draws: int = 20_000,
    n_discard: int | None = None,
    n_blocks: int = N_BLOCKS,
    seed: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure an exchange, and write its pictures, exchange.json, observables_exchange.csv and exchange.html.

    Args:
        directory: made if it is not there.
        record: of any sampler.
        molecule: whose frames they are; its reference is shown where one ships with the package.
        flow: its reweighted draws are shown beside the exchange; None for none.
        energy: U [kJ/mol] of the draws, only needed with a flow.
        n_draws: of the flow at each temperature.
        n_discard: iterations left out at the beginning; by default a tenth.
        n_blocks: of the jackknife, fewer where blocks would have less than 2 iterations.
        seed: of the draws.
        progress: called as progress(done, total, message).

    Returns:
        what exchange.json holds: flat names with units in them, None where there is no such figure. Names that end in a
        number belong to that temperature of the ladder, from 0; those with `exchange`, `flow` or `reference` to the
        lowest temperature.

    Raises:
        ValueError: the molecule has another number of atoms, a flow without energy, or under 4 iterations.
        OSError: the directory cannot be written.
    """
    discarded = int(DISCARDED_SHARE * record.n_iterations) if n_discard is None else n_discard
    _check(record, molecule, flow, energy, n_draws, discarded)
    reference, notes = reference_for(molecule), []
    angles = _angles(record.positions, molecule)
    if not np.any(record.position_iterations >= discarded):
        angles, notes = None, ["No frames are stored, so there are neither Ramachandran maps nor basins."]
    temperatures = observed_temperatures(record, reference)
    total = 3 + (0 if flow is None else len(temperatures))
    tell = progress or (lambda *_: None)
    left = record.n_iterations - discarded
    if left < 2 * n_blocks:
        n_blocks = left // 2
        notes.append(f"Only {left} iterations are left: error bars come from {n_blocks} blocks of time and are rough.")
    tell(0, total, "MBAR")
    samples = Samples.of(record, discarded, n_blocks)
    free = free_energies(record, samples=samples)
    rows = observables(record, temperatures, *(angles or ()), samples=samples)
    part = FlowPart(None, [], [])
    if flow is not None:
        part = _draws(flow, energy, molecule, temperatures, n_draws, seed, lambda i, words: tell(1 + i, total, words))
    tell(total - 2, total, "pictures")
    drawn = _figures(record, samples, angles, rows, part, reference, molecule, seed)
    facts = account(record, free, molecule, discarded, n_draws if part.rows else 0, seed)
    facts |= at_lowest(rows[0], part.rows[0] if part.rows else {}, reference)
    found = {name: json_safe(value) for name, value in facts.items()}
    tell(total - 1, total, "files")
    _write(Path(directory), found, drawn, {"exchange": rows, "flow": part.rows}, [*notes, *part.notes])
    tell(total, total, "done")
    return found


def observed_temperatures(record: ExchangeRecord, reference: Reference | None = None) -> list[float]:
    """Temperatures [K] of the table of observables: even steps over the ladder, and those of the reference within."""
    low, high = float(record.temperatures[0]), float(record.temperatures[-1])
    steps = min(MOST_STEPS, max(2, math.ceil((high - low) / STEP_KELVIN)))
    step = (high - low) / steps
    near = [] if reference is None else [float(t) for t in reference.temperatures]
    known = [low, high, *(t for t in near if low + 0.5 < t < high - 0.5)]
    even = np.linspace(low, high, steps + 1)[1:-1].round(3).tolist()
    return sorted([*known, *(t for t in even if min(abs(t - other) for other in known) > step / 4)])


def _check(
    record: ExchangeRecord, molecule: Any, flow: Any, energy: Energy | None, n_draws: int, n_discard: int
) -> None:
    n_atoms, expected = record.positions.shape[2], len(molecule.positions)
    if n_atoms != expected:
        raise ValueError(f"the exchange has frames of {n_atoms} atoms, the molecule {molecule.name!r} has {expected}")
    if flow is not None and energy is None:
        raise ValueError("draws of a flow are weighed by their energies: give energy, or flow=None")
    if n_draws < 1:
        raise ValueError(f"n_draws must be positive, not {n_draws}; flow=None leaves the flow out")
    if n_discard < 0 or record.n_iterations - n_discard < FEWEST_ITERATIONS:
        raise ValueError(
            f"{record.n_iterations} iterations without the first {n_discard} are too few for error bars; at least "
            f"{FEWEST_ITERATIONS} are needed: run longer, or discard less (n_discard, at least 0)"
        )


def _angles(positions: np.ndarray, molecule: Any) -> Angles | None:
    """phi and psi (J * R,) of the stored frames; None without frames, or without a residue that has both."""
    frames = positions.reshape(-1, *positions.shape[2:])
    try:
        return analysis.phi_psi(frames, molecule) if len(frames) else None
    except ValueError:  # no residue with both torsions
        return None


def _draws(
    flow: Any,
    energy: Energy,
    molecule: Any,
    temperatures: Sequence[float],
    n: int,
    seed: int,
    tell: Callable[[int, str], None],
) -> FlowPart:
    """Draws of the flow at each temperature; those of the lowest are kept."""
    generator, coldest, rows, notes = torch.Generator().manual_seed(seed), None, [], []
    for index, temperature in enumerate(temperatures):
        tell(index, f"flow at {temperature:g} K")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a low ESS is part of the row; that of the lowest becomes a note
                ensemble = draw(flow, energy, temperature=temperature, n=n, generator=generator)
        except RuntimeError as error:
            notes.append(f"The flow is left out from {temperature:g} K on: {error}.")
            break
        rows.append(flow_row(ensemble, molecule))
        coldest = ensemble if coldest is None else coldest
    note = None if coldest is None else out_of_reach(coldest, getattr(flow, "training_temperature", None))
    return FlowPart(coldest, rows, [*notes, *([] if note is None else [f"{note}."])])


def flow_row(ensemble: Ensemble, topology: Any) -> dict[str, float]:
    """What reweighted draws say at their temperature: a row with the keys of `multistate.observables`.

    Args:
        ensemble: draws; errors are those of a bootstrap over them.
        topology: as in `torsions.backbone`; without phi and psi the basins are left out.
    """
    angles = _angles(ensemble.positions.numpy()[:, None], topology)
    phi = np.full(len(ensemble), math.pi) if angles is None else angles[0]
    (row,) = analysis.observables_against_temperature(ensemble, [ensemble.temperature], phi)
    row = {"n_effective": ensemble.n_effective} | {key: x for key, x in row.items() if not key.startswith("alpha")}
    if angles is None:
        return row
    members = (torch.as_tensor(analysis.basins(*angles))[:, None] == torch.arange(len(COLUMNS))).double()
    share = ensemble.mean(members)
    free = analysis.free_energy(share)
    row["alpha_left_raw"] = float(members[:, 0].mean())
    for index, name in enumerate(COLUMNS):
        in_kj = tuple(kT(ensemble.temperature) * part for part in free)
        columns = {name: share, f"{name}_free_energy_kt": free, f"{name}_free_energy": in_kj}
        for key, (value, error) in columns.items():
            row |= {key: float(value[index]), f"{key}_error": float(error[index])}
    return row


def _figures(
    record: ExchangeRecord,
    samples: Samples,
    angles: Angles | None,
    rows: Sequence[Mapping[str, float]],
    part: FlowPart,
    reference: Reference | None,
    molecule: Any,
    seed: int,
) -> dict[str, Figure]:
    note = small_print(seed, *PACKAGES)
    drawn = {"exchange": exchange_figure(record, note=note)}
    if angles is not None:
        coldest = float(record.temperatures[0])
        panels = [] if part.coldest is None else list(of_ensemble(part.coldest, molecule))
        panels.append(exchange_series(record, coldest, *angles, n_effective=rows[0]["n_effective"], samples=samples))
        exact = of_reference(reference, coldest)
        drawn["ramachandran_exchange"] = plotting.ramachandran([*panels, *([exact] if exact else [])], note=note)
    drawn["observables_exchange"] = observables_exchange(rows, part.rows, reference=reference, note=note)
    return drawn


def _write(
    directory: Path,
    found: Mapping[str, Any],
    drawn: Mapping[str, Figure],
    rows: Mapping[str, Sequence[Mapping[str, float]]],
    notes: Sequence[str],
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    pictures = {name: png(figure) for name, figure in drawn.items()}
    for name, picture in pictures.items():
        with whole(directory / f"{name}.png") as temporary:
            temporary.write_bytes(picture)
    write_text(directory / "observables_exchange.csv", _csv(rows))
    write_text(directory / "exchange.html", render(found, pictures, notes))
    write_text(directory / "exchange.json", json.dumps(found, indent=2, allow_nan=False) + "\n")


def _csv(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """One line a source and temperature; what a source lacks is empty."""
    columns = list(dict.fromkeys(key for part in rows.values() for row in part for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["source", *columns], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"source": source, **row} for source, part in rows.items() for row in part)
    return text.getvalue()
