"""What a figure shows of one set of configurations: histograms with their errors, apart from how they are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .analysis import N_BINS, phi_psi, ramachandran_histogram
from .ensemble import Ensemble
from .reference import Reference, ReferenceState
from .weights import normalised_weights

ENERGY_BINS = 80
KINDS = ("data", "raw", "reweighted", "reference")


@dataclass(frozen=True)
class Histogram:
    """Densities per unit of the axis.

    Args:
        edges: (B + 1,).
        density: (B,), with standard errors `error` (B,).
        n: how many values it was made from.
        off_scale: share of the weight beyond the edges, in [0, 1].
    """

    edges: np.ndarray
    density: np.ndarray
    error: np.ndarray
    n: int
    off_scale: float = 0.0


@dataclass(frozen=True)
class Series:
    """One set of configurations at one temperature.

    Args:
        kind: one of `KINDS`, says how it is drawn.
        label: for titles and legends.
        temperature: [K].
        n: configurations; `ess`: Kish's share of effective ones, None for equal weights.
        ramachandran: (64, 64) shares, None without phi and psi.
        phi: marginal over degrees, `energy`: over kJ/mol; None where unknown.
    """

    kind: str
    label: str
    temperature: float
    n: int
    ess: float | None
    ramachandran: np.ndarray | None
    phi: Histogram | None
    energy: Histogram | None


def histogram(values: np.ndarray, edges: np.ndarray, weights: np.ndarray | None = None) -> Histogram:
    """Density of weighted values; a cell's variance is the sum of its squared weights."""
    values = np.asarray(values)
    w = np.full(len(values), 1.0 / len(values)) if weights is None else np.asarray(weights) / np.sum(weights)
    width = np.diff(edges)
    share, squares = (np.histogram(values, edges, weights=x)[0] for x in (w, w**2))
    return Histogram(edges, share / width, np.sqrt(squares) / width, len(values), float(1.0 - share.sum()))


def energy_edges(energy: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Edges [kJ/mol] from 4 standard deviations below the weighted mean to 5 above it."""
    energy = np.asarray(energy, dtype=np.float64)
    w = np.ones(len(energy)) if weights is None else np.asarray(weights)
    kept = (w > 0) & np.isfinite(energy)
    w, energy = w[kept] / w[kept].sum(), energy[kept]
    mean = float(w @ energy)
    width = max(float(np.sqrt(w @ (energy - mean) ** 2)), 1e-3)
    return np.linspace(mean - 4.0 * width, mean + 5.0 * width, ENERGY_BINS + 1)


def of_ensemble(
    ensemble: Ensemble, topology: Any, edges: np.ndarray | None = None, *, name: str = "Flow"
) -> tuple[Series, Series]:
    """An ensemble as it was drawn, and reweighted to its temperature.

    Args:
        ensemble: the draws.
        topology: as in `analysis.backbone`.
        edges: of the energy histogram [kJ/mol]; by default around the reweighted mean.
        name: of what drew it.
    """
    weights, energy = normalised_weights(ensemble.log_weights).numpy(), ensemble.energy.numpy()
    edges = energy_edges(energy, weights) if edges is None else edges
    angles = _angles(ensemble.positions, topology)
    common = (len(ensemble), angles, energy, edges)
    drawn = f"{name}, {100 * ensemble.explore:g} % exploring" if ensemble.explore else f"{name}, as drawn"
    return (
        _series("raw", drawn, ensemble.sampling_temperature, None, *common, None),
        _series("reweighted", f"{name}, reweighted", ensemble.temperature, ensemble.ess, *common, weights),
    )


def of_frames(
    positions: np.ndarray | Tensor, temperature: float | int, topology: Any, energy: np.ndarray | None = None
) -> Series:
    """Frames (N, A, 3) [nm] of dynamics at one temperature [K]; `energy` (M,) [kJ/mol] of any sample of them."""
    edges = None if energy is None else energy_edges(energy)
    angles = _angles(positions, topology)
    return _series("data", "Dynamics", temperature, None, len(positions), angles, energy, edges, None)


def of_reference(reference: Reference | None, temperature: float | int) -> Series | None:
    """The reference at a temperature [K], None where it has none."""
    state = None if reference is None else reference.at(temperature)
    if state is None:
        return None
    phi = _periodic_marginal(state.ramachandran, state.n_effective)
    return Series(
        "reference",
        "Reference",
        state.temperature,
        round(state.n_effective),
        None,
        state.ramachandran,
        phi,
        _reference_energy(state),
    )


def _series(
    kind: str,
    label: str,
    temperature: float | int,
    ess: float | None,
    n: int,
    angles: tuple[np.ndarray, np.ndarray] | None,
    energy: np.ndarray | None,
    edges: np.ndarray | None,
    weights: np.ndarray | None,
) -> Series:
    ramachandran = phi = None
    if angles is not None:
        ramachandran = ramachandran_histogram(*angles, weights)
        phi = histogram(np.degrees(angles[0]), np.linspace(-180.0, 180.0, N_BINS + 1), weights)
    levels = None if energy is None or edges is None else histogram(energy, edges, weights)
    return Series(kind, label, float(temperature), n, ess, ramachandran, phi, levels)


def _angles(positions: np.ndarray | Tensor, topology: Any) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        return phi_psi(positions, topology)
    except ValueError:
        return None


def _periodic_marginal(ramachandran: np.ndarray, n_effective: float) -> Histogram:
    share, width = ramachandran.sum(1), 360.0 / len(ramachandran)
    edges = np.linspace(-180.0, 180.0, len(ramachandran) + 1)
    error = np.sqrt(share * (1.0 - share) / n_effective)
    return Histogram(edges, share / width, error / width, round(n_effective))


def _reference_energy(state: ReferenceState) -> Histogram:
    share, width = state.energy_histogram / state.energy_histogram.sum(), np.diff(state.energy_edges)
    error = np.sqrt(share * (1.0 - share) / state.n_effective)
    return Histogram(state.energy_edges, share / width, error / width, round(state.n_effective))
