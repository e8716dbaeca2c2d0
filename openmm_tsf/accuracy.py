"""What a flow is worth at one temperature, and what it cost: one flat record for each, for the table of all models.

Draws come in parts, and only their angles, energies and densities stay, so that a million take little memory.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .analysis import (
    excess_total_variation,
    free_energy,
    kl_divergence,
    ramachandran_histogram,
    total_variation,
)
from .ensemble import draw
from .flow import Flow
from .reference import ReferenceState
from .systems import Molecule
from .torsions import alpha_left, phi_psi
from .training import Progress
from .typing import Energy, Mask, Positions, Scalars
from .weights import (
    Estimate,
    bootstrap_mean,
    effective_sample_size,
    largest_weight_share,
    log_mean_exp,
    normalised_weights,
)

PART = 100_000
"""Draws that are in memory at once, and those of the first ESS."""
N_SHUFFLES = 20
N_REPLICATES = 100


@dataclass(frozen=True, eq=False)
class Draws:
    """Draws of a flow at one temperature, without their positions.

    Args:
        temperature: [K].
        energy: (n,) [kJ/mol]; `log_weights`: (n,) [nat], not normalised.
        phi, psi: (n,) [rad].
        n_rejected, n_rejected_first: draws off the chart on the way to all, and to the first `PART`.
        n_mirrored: (on the chart, off it) with a C-alpha of the other hand than the molecule's.
    """

    temperature: float
    energy: Tensor
    log_weights: Tensor
    phi: np.ndarray
    psi: np.ndarray
    n_rejected: int
    n_rejected_first: int
    n_mirrored: tuple[int, int]

    def __len__(self) -> int:
        return len(self.energy)


class _Watched:
    """A flow at one temperature whose draws are looked at before those off the chart are thrown away."""

    def __init__(self, flow: Flow, temperature: float) -> None:
        self.flow, self.steered, self.n_mirrored = flow, flow.at(temperature), [0, 0]

    def at(self, temperature: float) -> _Watched:
        return self

    def propose(self, n: int, *, generator: torch.Generator) -> tuple[Positions, Scalars, Mask]:
        q, log_prob, _ = self.steered.vectors.propose(n, generator=generator)
        x, inside = self.steered.placed(q)
        beyond, _ = self.flow.internals(q[~inside])
        for i, places in enumerate((x[inside], beyond)):
            self.n_mirrored[i] += int(mirrored(places, self.flow.molecule).sum())
        return x, log_prob, inside

    def log_constraint_factor(self, x: Positions) -> Scalars:
        return self.steered.log_constraint_factor(x)


def mirrored(positions: Positions, molecule: Molecule) -> Mask:
    """(n,) True for each of positions (n, A, 3) [nm] with a C-alpha of the other hand than the molecule's own.

    The hand is the sign of the volume that N, C and CB span around CA. What is not finite is not mirrored.
    """
    centres = []
    for residue in molecule.mdtraj_topology.residues:
        atoms = {atom.name: atom.index for atom in residue.atoms}
        if {"N", "CA", "C", "CB"} <= set(atoms):
            centres.append([atoms[name] for name in ("CA", "N", "C", "CB")])
    hands = _hands(positions, centres)
    own = _hands(torch.tensor(molecule.positions).to(hands)[None], centres)
    return (hands * own < 0).any(1)


def _hands(x: Positions, centres: list[list[int]]) -> Tensor:
    """(n, centres) signed volumes [nm^3]."""
    index = torch.tensor(centres, dtype=torch.long).reshape(-1, 4)
    legs = x[:, index[:, 1:]] - x[:, index[:, :1]]
    return torch.linalg.det(legs)


def collect(
    flow: Flow, energy: Energy, temperature: float, n: int, *, generator: torch.Generator,
    progress: Progress | None = None,
) -> Draws:  # fmt: skip
    """n plain draws at a temperature [K], their positions looked at in parts and dropped.

    Raises:
        RuntimeError: almost no draw is on the flow's chart.
    """
    watched, parts, done = _Watched(flow, temperature), [], 0
    rejected: list[int] = []
    while done < n:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a low ESS is what is measured
            part = draw(watched, energy, temperature=temperature, n=min(PART, n - done), generator=generator)
        rejected.append(part.n_rejected)
        angles = phi_psi(part.positions, flow.molecule)
        parts.append((part.energy, part.log_weights, *map(torch.from_numpy, angles)))
        done += len(part)
        if progress is not None:
            progress(done, n, f"{sum(rejected)} rejected")
    energies, log_weights, phi, psi = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return Draws(
        temperature, energies, log_weights, phi.numpy(), psi.numpy(), sum(rejected), rejected[0],
        (watched.n_mirrored[0], watched.n_mirrored[1]),
    )  # fmt: skip


def figures(draws: Draws, state: ReferenceState | None) -> dict[str, Any]:
    """What is to be said of draws, JSON-safe; `raw` and `reweighted` have the same keys.

    `ramachandran_excess_tv_own` compares raw draws with the same ones reweighted, and takes off what weights that know
    nothing of the angles would show: shuffled ones. It does not depend on a reference.
    """
    log_w, n_rejected = draws.log_weights, draws.n_rejected
    ess = effective_sample_size(log_w, n_rejected)
    n_effective = ess * (len(draws) + n_rejected)
    first = len(draws) > PART
    weights = normalised_weights(log_w).numpy()
    raw, weighted = (ramachandran_histogram(draws.phi, draws.psi, w) for w in (None, weights))
    found = {
        "n_draws": len(draws),
        "n_rejected": n_rejected,
        "ess": ess,
        "ess_first": effective_sample_size(log_w[:PART], draws.n_rejected_first) if first else None,
        "n_draws_first": PART if first else None,
        "largest_weight_share": largest_weight_share(log_w),
        "log_z_nat": log_mean_exp(log_w, n_rejected),
        "n_infinite_energy": int(torch.isinf(draws.energy).sum()),
        "n_mirrored_draws": draws.n_mirrored[0],
        "n_mirrored_rejected": draws.n_mirrored[1],
        "ramachandran_excess_tv_own": total_variation(raw, weighted) - _shuffled(draws, raw, weights),
        "reference": None if state is None else {
            "alpha_left": state.alpha_left, "alpha_left_error": state.alpha_left_error,
            "mean_energy": state.mean_energy, "mean_energy_error": state.mean_energy_error,
            "n_effective": state.n_effective,
        },
        "raw": _plain_means(draws) | _distances(draws, raw, None, len(draws), state),
        "reweighted": _weighted_means(draws) | _distances(draws, weighted, weights, n_effective, state),
    }  # fmt: skip
    for name in ("raw", "reweighted"):
        found[name] |= _free_energy(found[name], state)
    return _json_safe(found)


def _shuffled(draws: Draws, raw: np.ndarray, weights: np.ndarray) -> float:
    """Mean total variation between draws as they are and with each other's weights."""
    rng = np.random.default_rng(0)
    maps = (ramachandran_histogram(draws.phi, draws.psi, rng.permutation(weights)) for _ in range(N_SHUFFLES))
    return float(np.mean([total_variation(raw, shuffled) for shuffled in maps]))


def _plain_means(draws: Draws) -> dict[str, float]:
    left, finite = alpha_left(draws.phi).mean(), draws.energy[torch.isfinite(draws.energy)]
    return {
        "alpha_left": float(left),
        "alpha_left_error": math.sqrt(left * (1.0 - left) / len(draws)),
        "mean_energy": float(finite.mean()),
        "mean_energy_error": float(finite.std() / math.sqrt(len(finite))),
    }


def _weighted_means(draws: Draws) -> dict[str, float]:
    values = torch.stack([torch.as_tensor(alpha_left(draws.phi)).double(), draws.energy], 1)
    best, error = bootstrap_mean(draws.log_weights, values, n_rejected=draws.n_rejected, n_replicates=N_REPLICATES)
    names = ("alpha_left", "mean_energy")
    return {f"{name}{end}": float(x[i]) for i, name in enumerate(names) for end, x in (("", best), ("_error", error))}


def _distances(
    draws: Draws, cells: np.ndarray, weights: np.ndarray | None, n: float, state: ReferenceState | None
) -> dict[str, float | None]:
    """Of histograms to those of the reference, n being what the draws are worth; energies beyond its edges count."""
    names = ("ramachandran_kl", "ramachandran_tv", "ramachandran_excess_tv", "energy_tv", "energy_excess_tv")
    if state is None:
        return dict.fromkeys(names)
    edges = np.concatenate([[-np.inf], state.energy_edges, [np.inf]])
    # an infinite energy belongs to the last bin, which ends there
    levels, _ = np.histogram(np.minimum(draws.energy.numpy(), np.finfo(float).max), edges, weights=weights)
    exact = np.concatenate([[0.0], state.energy_histogram, [0.0]])
    values = (
        kl_divergence(state.ramachandran, cells),
        total_variation(state.ramachandran, cells),
        excess_total_variation(state.ramachandran, cells, state.n_effective, n),
        total_variation(exact, levels),
        excess_total_variation(exact, levels, state.n_effective, n),
    )
    return dict(zip(names, values, strict=True))


def _free_energy(means: dict[str, Any], state: ReferenceState | None) -> dict[str, float | None]:
    """-ln of the share of alpha_L [kT] and its distance to the reference, with errors; None where nothing is there."""
    names = [f"alpha_left_{what}_kt" for what in ("free_energy", "free_energy_error", "deviation", "deviation_error")]
    if means["alpha_left"] == 0.0:
        return dict.fromkeys(names)
    value, error = _of_share(means["alpha_left"], means["alpha_left_error"])
    if state is None:
        return dict.fromkeys(names) | {names[0]: value, names[1]: error}
    exact, exact_error = _of_share(state.alpha_left, state.alpha_left_error)
    return dict(zip(names, (value, error, value - exact, math.hypot(error, exact_error)), strict=True))


def _of_share(share: float, error: float) -> tuple[float, float]:
    value, deviation = free_energy(Estimate(torch.tensor(share).double(), torch.tensor(error).double()))
    return float(value), float(deviation)


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _json_safe(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
