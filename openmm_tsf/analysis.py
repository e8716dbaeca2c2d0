"""What is measured on ensembles: Ramachandran histograms and their distances, observables, the figures of a run.

Angles are in rad; histograms sum to 1 and have phi along the first axis.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .ensemble import Ensemble, draw
from .reference import Reference, ReferenceState, load_reference, reference_for
from .torsions import alpha_left, backbone, basins, count_transitions, dihedrals, phi_psi
from .typing import Energy
from .units import kT, to_kelvin
from .weights import Estimate, bootstrap_counts, normalised_weights

__all__ = [
    "alpha_left",
    "backbone",
    "basins",
    "count_transitions",
    "dihedrals",
    "excess_total_variation",
    "expected_total_variation",
    "flow_observables",
    "free_energy",
    "kl_divergence",
    "load_reference",
    "metrics",
    "observables_against_temperature",
    "phi_psi",
    "ramachandran_histogram",
    "reference_for",
    "total_variation",
]

N_BINS = 64


def ramachandran_histogram(
    phi: np.ndarray, psi: np.ndarray, weights: np.ndarray | Tensor | None = None, n_bins: int = N_BINS
) -> np.ndarray:
    """Share of the weight in each of n_bins x n_bins cells on (-pi, pi]^2; equal weights by default."""
    cell = _bin(phi, n_bins) * n_bins + _bin(psi, n_bins)
    counts = np.bincount(cell, weights=None if weights is None else np.asarray(weights), minlength=n_bins**2)
    return (counts / counts.sum()).reshape(n_bins, n_bins)


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Total variation distance of two histograms, in [0, 1]."""
    return 0.5 * float(np.abs(p / p.sum() - q / q.sum()).sum())


def kl_divergence(reference: np.ndarray, model: np.ndarray, floor: float = 1e-10) -> float:
    """KL(reference || model) [nat] of two histograms, with `floor` added to both once they sum to 1."""
    p, q = reference / reference.sum() + floor, model / model.sum() + floor
    return float(np.sum(p * np.log(p / q)))


def expected_total_variation(
    reference: np.ndarray, n_first: float | int, n_second: float | int, *, seed: int = 0, n_pairs: int = 20
) -> float:
    """Mean total variation of two exact samples of the reference of n_first and n_second independent draws."""
    rng = np.random.default_rng(seed)
    p = np.asarray(reference, dtype=np.float64).ravel()
    p = p / p.sum()
    pairs = [[rng.multinomial(max(1, round(n)), p) for n in (n_first, n_second)] for _ in range(n_pairs)]
    return float(np.mean([total_variation(first, second) for first, second in pairs]))


def excess_total_variation(
    reference: np.ndarray, model: np.ndarray, n_reference: float | int, n_model: float | int, *, seed: int = 0
) -> float:
    """Total variation beyond what two exact samples of these effective sizes show; near 0 for a right model."""
    noise = expected_total_variation(reference, n_reference, n_model, seed=seed)
    return total_variation(reference, model) - noise


def free_energy(share: Estimate) -> Estimate:
    """-ln of a basin's share [kT] of the whole ensemble, its error carried over to first order."""
    return Estimate(-torch.log(share.value), share.error / share.value)


def observables_against_temperature(
    ensemble: Ensemble,
    temperatures: Sequence[float],
    phi: np.ndarray,
    *,
    n_replicates: int = 200,
    generator: torch.Generator | None = None,
) -> list[dict[str, float]]:
    """What one ensemble says at other temperatures, with bootstrap errors.

    Args:
        ensemble: its draws are weighed anew for each temperature.
        temperatures: [K].
        phi: (N,) [rad] of the draws.
        n_replicates: of the bootstrap; `generator`: of the bootstrap, by default a fresh one with a fixed seed.

    Returns:
        one row a temperature: temperature [K], ess, mean_energy [kJ/mol], heat_capacity (of the potential energy, its
        variance / kT^2) [kJ/mol/K], alpha_left (share), alpha_left_free_energy_kt (-ln of the share) and
        alpha_left_free_energy [kJ/mol], each of them but the first two with an `_error`.
    """
    there = [ensemble.reweighted(to_kelvin(temperature)) for temperature in temperatures]
    weights = torch.stack([normalised_weights(other.log_weights) for other in there])
    centre = weights[0] @ torch.nan_to_num(ensemble.energy, posinf=0.0)  # so that the variance does not cancel
    shifted = torch.nan_to_num(ensemble.energy - centre, posinf=0.0)
    moments = torch.stack([torch.ones_like(shifted), shifted, shifted**2, torch.as_tensor(alpha_left(phi)).double()], 1)
    thermal = torch.tensor([[kT(other.temperature), other.temperature] for other in there], dtype=torch.float64)
    counts = bootstrap_counts(
        len(ensemble), ensemble.n_rejected, n_replicates, generator or torch.Generator().manual_seed(0)
    )
    best = _figures(weights @ moments, centre, thermal)
    error = torch.stack([_figures((weights * count) @ moments, centre, thermal) for count in counts]).std(0)
    return [_observables(other, value, deviation) for other, value, deviation in zip(there, best, error, strict=True)]


def flow_observables(
    flow: Any,
    energy: Energy,
    temperatures: Sequence[float],
    *,
    n: int,
    generator: torch.Generator,
    explore: float | int = 0.0,
) -> list[dict[str, float]]:
    """Rows as `observables_against_temperature` gives, each temperature with n draws of its own.

    Farther than reweighting one ensemble, because the flow is steered to each temperature [K]. `explore` as in `draw`.

    Raises:
        ValueError: the molecule has no residue with phi and psi.
    """
    rows = []
    for temperature in temperatures:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a low ESS is part of the row
            ensemble = draw(flow, energy, temperature=temperature, n=n, generator=generator, explore=explore)
        phi = dihedrals(ensemble.positions, backbone(flow.molecule)[0])
        rows += observables_against_temperature(ensemble, [temperature], phi)
    return rows


def _figures(sums: Tensor, centre: Tensor, thermal: Tensor) -> Tensor:
    """(temperatures, 3): mean energy, heat capacity, alpha_L share, from weighted sums of 1, U, U^2 and membership."""
    total, first, second, left = sums.T
    mean = first / total
    variance = second / total - mean**2
    return torch.stack([centre + mean, variance / (thermal[:, 0] * thermal[:, 1]), left / total], 1)


def _observables(ensemble: Ensemble, value: Tensor, error: Tensor) -> dict[str, float]:
    energy_kt = free_energy(Estimate(value[2], error[2]))
    columns = {
        "mean_energy": (value[0], error[0]),
        "heat_capacity": (value[1], error[1]),
        "alpha_left": (value[2], error[2]),
        "alpha_left_free_energy_kt": energy_kt,
        "alpha_left_free_energy": tuple(kT(ensemble.temperature) * part for part in energy_kt),
    }
    row = {"temperature": ensemble.temperature, "ess": ensemble.ess}
    for name, (best, deviation) in columns.items():
        row |= {name: float(best), f"{name}_error": float(deviation)}
    return row


def metrics(
    train: Ensemble, target: Ensemble, topology: Any, *, reference: Reference | None = None, seed: int = 0
) -> dict[str, float | int | None]:
    """The figures of a run under flat names with units in them, JSON-safe; None where one does not exist.

    Args:
        train: draws weighed at the training temperature; `target`: draws weighed at the temperature wanted.
        topology: as in `backbone`; without phi and psi the figures on them are None.
        reference: to compare `target` with.
        seed: of the bootstrap, and of the exact samples whose noise is taken off.
    """
    state = None if reference is None else reference.at(target.temperature)
    figures: dict[str, Any] = {}
    for name, ensemble in (("train", train), ("target", target)):
        figures |= _plain_metrics(name, ensemble, seed)
        try:
            phi, psi = phi_psi(ensemble.positions, topology)
        except ValueError:
            phi = psi = None
        figures |= _alpha_left_metrics(name, ensemble, phi, seed)
    figures |= _reference_metrics(target, phi, psi, state, seed)
    left, error = figures["alpha_left_target"], figures["alpha_left_target_error"]
    if state is not None and left is not None:
        figures["alpha_left_target_deviation"] = (left - state.alpha_left) / math.hypot(error, state.alpha_left_error)
    return {name: _json_safe(value) for name, value in figures.items()}


def _plain_metrics(name: str, ensemble: Ensemble, seed: int) -> dict[str, Any]:
    mean, error = ensemble.mean(ensemble.energy, generator=torch.Generator().manual_seed(seed))
    return {
        f"temperature_{name}_kelvin": ensemble.temperature,
        f"n_draws_{name}": len(ensemble),
        f"n_rejected_{name}": ensemble.n_rejected,
        f"explore_share_{name}": ensemble.explore,
        f"n_infinite_energy_{name}": int(torch.isinf(ensemble.energy).sum()),
        f"ess_{name}": ensemble.ess,
        f"largest_weight_share_{name}": ensemble.largest_weight_share,
        f"log_z_{name}_nat": ensemble.log_z,
        f"log_z_{name}_error_nat": ensemble.log_z_error,
        f"mean_energy_{name}_kj_per_mol": float(mean),
        f"mean_energy_{name}_error_kj_per_mol": float(error),
    }


def _alpha_left_metrics(name: str, ensemble: Ensemble, phi: np.ndarray | None, seed: int) -> dict[str, Any]:
    keys = (
        f"alpha_left_{name}",
        f"alpha_left_{name}_error",
        f"alpha_left_{name}_raw",
        f"alpha_left_{name}_free_energy_kt",
        f"alpha_left_{name}_free_energy_error_kt",
    )
    if phi is None:
        return dict.fromkeys(keys)
    members = torch.as_tensor(alpha_left(phi)).double()
    share = ensemble.mean(members, generator=torch.Generator().manual_seed(seed))
    values = (*share, members.mean(), *free_energy(share))
    return {key: float(value) for key, value in zip(keys, values, strict=True)}


def _reference_metrics(
    target: Ensemble, phi: np.ndarray | None, psi: np.ndarray | None, state: ReferenceState | None, seed: int
) -> dict[str, Any]:
    keys = ("ramachandran_kl", "ramachandran_tv", "ramachandran_excess_tv", "ramachandran_excess_tv_raw")
    names = ("n_effective", "alpha_left", "alpha_left_error", "mean_energy", "mean_energy_error")
    units = {"mean_energy": "_kj_per_mol", "mean_energy_error": "_kj_per_mol"}
    figures = {f"reference_{name}{units.get(name, '')}": getattr(state, name, None) for name in names}
    figures["alpha_left_target_deviation"] = None
    if phi is None or psi is None or state is None:
        return figures | dict.fromkeys(keys)
    weighed = ramachandran_histogram(phi, psi, normalised_weights(target.log_weights))
    raw = ramachandran_histogram(phi, psi)
    exact = state.ramachandran, state.n_effective
    values = (
        kl_divergence(exact[0], weighed),
        total_variation(exact[0], weighed),
        excess_total_variation(exact[0], weighed, exact[1], target.n_effective, seed=seed),
        excess_total_variation(exact[0], raw, exact[1], len(target), seed=seed),
    )
    return figures | dict(zip(keys, values, strict=True))


def _json_safe(value: Any) -> float | int | None:
    return value if value is None or isinstance(value, int) or math.isfinite(value) else None


def _bin(angle: np.ndarray, n_bins: int) -> np.ndarray:
    """Index of the cell on (-pi, pi]; -pi itself belongs to the last one, where it wraps to."""
    return (np.ceil((np.asarray(angle) + math.pi) * (n_bins / (2.0 * math.pi))).astype(np.int64) - 1) % n_bins
