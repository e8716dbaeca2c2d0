"""Portraits of alanine dipeptide and its like: what a set of configurations at one temperature shows, as JSON holds it.

Draws of a flow, an exchange of temperatures and a shipped reference all give portraits, so that they compare.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from .analysis import N_BINS, ramachandran_histogram
from .ensemble import Ensemble
from .mbar import Samples, jackknife
from .multistate import observables
from .records import ExchangeRecord
from .reference import Reference, ReferenceState
from .series import energy_edges, histogram
from .systems import Molecule
from .torsions import alpha_left, phi_psi
from .trajectories import Frames
from .units import kT
from .weights import normalised_weights

DISCARDED = 0.1
"""Share of an exchange that is left out at its beginning."""
N_BLOCKS = 20
Rows = list[dict[str, float]]


@dataclass(frozen=True)
class Portrait:
    """Configurations at one temperature.

    Args:
        temperature: [K].
        n: how many; `ess`: Kish's share of effective ones, None where weights are equal or say nothing.
        positive, positive_error: share with phi > 0, and its standard error.
        left, left_error: share in alpha_L, 0 < phi < 2.4 rad.
        mean_energy, mean_energy_error: [kJ/mol]; None where a few clashes would make it.
        ramachandran: (64, 64) shares.
        energy_edges, energy_density: histogram of the potential energy [kJ/mol, mol/kJ].
        off_scale: share of the weight beyond the edges.
    """

    temperature: float
    n: int
    ess: float | None
    positive: float
    positive_error: float
    left: float
    left_error: float
    mean_energy: float | None
    mean_energy_error: float | None
    ramachandran: list[list[float]]
    energy_edges: list[float]
    energy_density: list[float]
    off_scale: float


@dataclass(frozen=True)
class Exact:
    """What is right within its errors: portraits, and mean energies and heat capacities against temperature.

    Args:
        model: of the molecule.
        source: where it is from.
        n_iterations: of the exchange; 0 for a shipped reference.
        portraits: of ascending temperatures.
        rows: temperature [K], mean_energy [kJ/mol] and heat_capacity [kJ/mol/K], with errors.
    """

    model: str
    source: str
    n_iterations: int
    portraits: list[Portrait]
    rows: Rows

    def at(self, temperature: float) -> Portrait:
        """The portrait nearest to a temperature [K]."""
        return nearest(self.portraits, temperature)

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Exact:
        """What `to_json` gave."""
        stored = json.loads(text)
        return cls(**{**stored, "portraits": [Portrait(**portrait) for portrait in stored["portraits"]]})


def nearest(portraits: Sequence[Portrait], temperature: float) -> Portrait:
    """The portrait nearest to a temperature [K]."""
    return min(portraits, key=lambda portrait: abs(portrait.temperature - temperature))


def of_draws(ensemble: Ensemble, molecule: Molecule, *, weighted: bool) -> Portrait:
    """Draws of a flow at their temperature, as they were drawn or reweighted."""
    phi, psi = phi_psi(ensemble.positions, molecule)
    energies, weights = ensemble.energy.numpy(), normalised_weights(ensemble.log_weights).numpy()
    edges, members = energy_edges(energies, weights), _members(phi)
    if not weighted:
        shares = members.mean(1)
        errors = np.sqrt(shares * (1.0 - shares) / len(phi))
        return _portrait(ensemble.temperature, (phi, psi), None, energies, edges, (*shares, None), (*errors, None))
    shares, errors = (part.numpy() for part in ensemble.mean(members.T))
    mean, error = map(float, ensemble.mean(torch.nan_to_num(ensemble.energy, posinf=0.0)))
    return _portrait(
        ensemble.temperature, (phi, psi), weights, energies, edges, (*shares, mean), (*errors, error), ess=ensemble.ess
    )


def of_exchange(
    record: ExchangeRecord, molecule: Molecule, temperatures: Sequence[float], *, model: str, source: str
) -> Exact:
    """An exchange of temperatures by MBAR, errors by block jackknife over time; the first tenth is left out.

    Only iterations with stored frames are used, in one solution for frames and energies.

    Args:
        record: of the exchange.
        molecule: of which it is.
        temperatures: of the portraits [K], within the ladder.
        model, source: as in `Exact`.
    """
    n_iterations, record = record.n_iterations, with_frames(record)
    discarded = int(DISCARDED * record.n_iterations)
    samples = Samples.of(record, discarded, max(2, min(N_BLOCKS, (record.n_iterations - discarded) // 2)))
    phi, psi = phi_psi(record.positions.reshape(-1, *record.positions.shape[2:]), molecule)
    energies = record.energies.ravel()
    values = np.stack([*_members(phi), energies])

    def figures(iterations: np.ndarray, f: np.ndarray) -> np.ndarray:
        return np.stack([values @ samples.frame_weights(f, iterations, t).ravel() for t in temperatures])

    best = figures(samples.everything, samples.f)
    portraits = []
    for temperature, value, error in zip(temperatures, best, jackknife(samples, figures, best), strict=True):
        weights = samples.frame_weights(samples.f, samples.everything, temperature).ravel()
        edges = energy_edges(energies, weights)
        portraits.append(_portrait(temperature, (phi, psi), weights, energies, edges, [*value], [*error]))
    kelvin = np.linspace(record.temperatures[0], record.temperatures[-1], 13).tolist()
    return Exact(model, source, n_iterations, portraits, observables(record, kelvin, samples=samples))


def with_frames(record: ExchangeRecord) -> ExchangeRecord:
    """The iterations of an exchange that end with stored frames, as if there were no others."""
    stored = record.position_iterations
    return replace(
        record, levels=record.levels[stored], energies=record.energies[stored],
        position_iterations=np.arange(len(stored)),
    )  # fmt: skip


def of_reference(reference: Reference, *, model: str) -> Exact:
    """A shipped reference at its own temperatures."""
    rows = []
    for state in reference.states:
        unit = kT(state.temperature) * state.temperature
        row = {name: getattr(state, name) for name in ("temperature", "mean_energy", "mean_energy_error")}
        row["heat_capacity"] = state.energy_variance / unit
        row["heat_capacity_error"] = state.energy_variance_error / unit
        rows.append(row)
    return Exact(model, "shipped reference", 0, [_of_state(state) for state in reference.states], rows)


def of_walkers(frames: Frames, molecule: Molecule) -> dict[str, float]:
    """Shares of phi > 0 and of alpha_L in frames of dynamics, with errors from the scatter of walkers."""
    members = _members(phi_psi(frames.positions, molecule)[0]).reshape(2, -1, frames.n_walkers).mean(1)
    value, error = members.mean(1), members.std(1, ddof=1) / frames.n_walkers**0.5
    names = ("positive", "left", "positive_error", "left_error")
    return dict(zip(names, map(float, (*value, *error)), strict=True))


def steered_alone(portrait: Portrait, temperature: float) -> float:
    """Share of phi > 0 at another temperature [K] if phi and psi steered by themselves, p_T = p^(T0/T)/Z, cell by cell.

    So they would if nothing but energies told their basins apart: free energies at T0 are taken for energies.
    """
    cells = np.array(portrait.ramachandran) ** (portrait.temperature / temperature)
    return float(cells[N_BINS // 2 :].sum() / cells.sum())


def two_states(cold: Portrait, hot: Portrait) -> tuple[float, float, float, float]:
    """Energy [kJ/mol] and entropy [k_B] of phi > 0 less those of the rest, each followed by its standard error.

    What the odds at two temperatures say, ln odds = S - E/kT, if E and S are the same at both; errors take the two
    portraits for independent.
    """
    betas = np.array([1.0 / kT(cold.temperature), 1.0 / kT(hot.temperature)])
    shares = np.array([cold.positive, hot.positive])
    errors = np.array([cold.positive_error, hot.positive_error]) / (shares * (1.0 - shares))
    log_odds, width = np.log(shares / (1.0 - shares)), betas[0] - betas[1]
    energy = (log_odds[1] - log_odds[0]) / width
    entropy = log_odds[0] + betas[0] * energy
    energy_error = np.hypot(*errors) / width
    entropy_error = np.hypot(*(errors * betas[::-1])) / width
    return float(energy), float(energy_error), float(entropy), float(entropy_error)


def _members(phi: np.ndarray) -> np.ndarray:
    """(2, N) ones where phi > 0, and where in alpha_L."""
    return np.stack([phi > 0.0, alpha_left(phi)]).astype(np.float64)


def _of_state(state: ReferenceState) -> Portrait:
    positive = float(state.ramachandran[N_BINS // 2 :].sum() / state.ramachandran.sum())
    rest = max(positive - state.alpha_left, 0.0)  # beta beyond 180 degrees, which comes and goes quickly
    error = float(np.hypot(state.alpha_left_error, np.sqrt(rest / state.n_effective)))
    density = state.energy_histogram / (state.energy_histogram.sum() * np.diff(state.energy_edges))
    return Portrait(
        state.temperature, round(state.n_effective), None, positive, error, state.alpha_left, state.alpha_left_error,
        state.mean_energy, state.mean_energy_error, state.ramachandran.tolist(), state.energy_edges.tolist(),
        density.tolist(), 0.0,
    )  # fmt: skip


def _portrait(
    temperature: float, angles: tuple[np.ndarray, np.ndarray], weights: np.ndarray | None, energies: np.ndarray,
    edges: np.ndarray, best: Sequence[float | None], errors: Sequence[float | None], *, ess: float | None = None,
) -> Portrait:  # fmt: skip
    """`best` and `errors` are of phi > 0, alpha_L and the mean energy."""
    n = len(energies) if weights is None else int(np.count_nonzero(weights))
    levels, cells = histogram(energies, edges, weights), ramachandran_histogram(*angles, weights)
    pairs = zip(best, errors, strict=True)
    figures = [None if x is None else float(x) for pair in pairs for x in pair]
    return Portrait(
        float(temperature), n, ess, *figures, cells.tolist(), edges.tolist(), levels.density.tolist(), levels.off_scale
    )
