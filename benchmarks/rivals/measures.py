"""How good draws are: what the tables show of each group of targets."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openmm_tsf.weights import largest_weight_share, normalised_weights

from .cases import Case
from .common import Drawn

TRUTH = Path(__file__).parents[1] / "edg_truth.npz"
FLOOR_REPEATS = 10
N_MMD = 2000
"""Draws, and exact draws, that MMD compares."""
Row = dict[str, Any]


def measured(case: Case, drawn: Drawn) -> Row:
    """Everything of a run that JSON can hold."""
    row: Row = {
        "target": case.name, "group": case.group, "method": drawn.method, "n": len(drawn.x),
        "evaluations_training": drawn.n_training, "evaluations_drawing": drawn.n_drawing,
        "seconds_training": drawn.seconds_training, "seconds_drawing": drawn.seconds_drawing,
        "facts": {k: v for k, v in drawn.facts.items() if not isinstance(v, torch.Tensor)},
    }  # fmt: skip
    row |= of_weights(case, drawn) | GROUPS[case.group](case, drawn)
    return {key: safe(value) for key, value in row.items()}


def safe(value: Any) -> Any:
    """What JSON knows; numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: safe(part) for key, part in value.items()}
    if isinstance(value, list):
        return [safe(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def of_weights(case: Case, drawn: Drawn) -> Row:
    """ESS and ln Z of methods with weights; errors are estimate less exact value, where that is known."""
    if drawn.log_weights is None:
        return {}
    ess, log_z, bound = drawn.ess, drawn.log_z, drawn.log_z_bound
    row = {
        "ess": ess, "largest_share": largest_weight_share(drawn.log_weights), "log_z": log_z, "log_z_bound": bound,
        "log_z_standard_error": math.sqrt((1.0 / ess - 1.0) / len(drawn.x)) if ess else math.inf,
    }  # fmt: skip
    if case.log_z is not None:
        row |= {"log_z_exact": case.log_z, "log_z_error": log_z - case.log_z, "bound_gap": case.log_z - bound}
    return row


def weights(drawn: Drawn) -> torch.Tensor | None:
    """Normalised weights of draws, None where a method has none or all of them are zero."""
    if drawn.log_weights is None or not bool((drawn.log_weights > -math.inf).any()):
        return None
    return normalised_weights(drawn.log_weights)


def of_plane(case: Case, drawn: Drawn) -> Row:
    """MMD with exact draws, raw and reweighted, beside what as many exact draws have, and modes found."""
    from openmm_tsf.edg.mmd import mmd
    from openmm_tsf.edg.targets import modes_found

    exact = case.target.sample(N_MMD, generator=torch.Generator().manual_seed(0))
    rows = torch.linspace(0, len(drawn.x) - 1, min(N_MMD, len(drawn.x))).round().long()
    x = drawn.x[rows]
    good = x.isfinite().all(1)
    row = {
        "modes": modes_found(case.target, drawn.x[drawn.x.isfinite().all(1)]), "modes_all": case.target.n_modes,
        "mmd": mmd(x[good], exact), "mmd_floor": floor(case.name, len(x)), "n_mmd": len(x),
    }  # fmt: skip
    w = weights(drawn)
    if w is None or float(w[rows].max()) in (0.0, float(w[rows].sum())):  # all of them zero, or all but one
        return row
    w = w[rows] / w[rows].sum()
    return row | {"mmd_weighted": mmd(x[good], exact, w[good]), "n_mmd_effective": 1.0 / float(w.square().sum())}


@cache
def floor(name: str, n: int) -> float:
    """MMD of n exact draws with `N_MMD` others."""
    from openmm_tsf.edg.mmd import noise_floor
    from openmm_tsf.edg.targets import density_2d

    generator = torch.Generator().manual_seed(1)
    return noise_floor(density_2d(name).sample, n, N_MMD, repeats=FLOOR_REPEATS, generator=generator)


def of_energy(case: Case, drawn: Drawn) -> Row:
    """Mean reduced energies, raw and reweighted, and the exact one where it is known."""
    finite = drawn.energy.isfinite()
    row = {"mean_energy": float(drawn.energy[finite].double().mean()), "n_nonfinite": int((~finite).sum())}
    w = weights(drawn)
    if w is not None:
        row["mean_energy_weighted"] = float(w[finite] @ drawn.energy[finite].double())
    if "mean_energy" in case.facts:
        row["mean_energy_exact"] = case.facts["mean_energy"]
    return row


def of_cluster(case: Case, drawn: Drawn) -> Row:
    """Mean energies, and the lower bound of ln Z of the energy as it is softened for training.

    For the energy as it is the bound is -inf: particles that share a place in the latents share it in x, and the mean
    of r^-12 over draws with a density at r = 0 does not exist. Overlaps are e^-7 of the softened Z.
    """
    row = of_energy(case, drawn)
    if drawn.log_weights is not None:
        log_weights = drawn.log_weights.double() + drawn.energy.double() - case.learned(drawn.x.double())
        row["log_z_bound_softened"] = float(log_weights[log_weights.isfinite()].mean())
    return row


def of_logistic(case: Case, drawn: Drawn) -> Row:
    """Predictions, and moments beside the exact ones: largest error of a mean in its own standard deviation, and of the
    covariance, the Frobenius norm of the difference over that of the exact one."""
    from openmm_tsf.edg.logistic import accuracy, area_under_curve, predictive

    task, w, x = case.facts["task"], weights(drawn), drawn.x.double()
    log_w = None if w is None else w.log()
    p = predictive(task, x, log_w)
    row = {"accuracy": accuracy(p, task.labels), "auc": area_under_curve(p, task.labels)}
    if not TRUTH.exists():
        return row
    with np.load(TRUTH) as truth:
        exact = {key: truth[f"{case.name}_{key}"] for key in ("mean", "covariance", "log_z", "accuracy", "auc")}
    w = torch.full((len(x),), 1.0 / len(x), dtype=torch.float64) if w is None else w.double()
    mean = w @ x
    covariance = (x - mean).T @ ((x - mean) * w[:, None])
    wanted, centre = torch.from_numpy(exact["covariance"]), torch.from_numpy(exact["mean"])
    row |= {
        "mean_error": float(((mean - centre).abs() / wanted.diagonal().sqrt()).max()),
        "covariance_error": float((covariance - wanted).norm() / wanted.norm()),
        "accuracy_exact": float(exact["accuracy"]), "auc_exact": float(exact["auc"]),
    }  # fmt: skip
    if drawn.log_weights is not None:
        log_z = float(exact["log_z"])
        row |= {"log_z_exact": log_z, "log_z_error": drawn.log_z - log_z, "bound_gap": log_z - drawn.log_z_bound}
    return row


def of_ising(case: Case, drawn: Drawn) -> Row:
    """ln Z of the spins beside the exact one."""
    row = {"temperature": case.facts["temperature"], "log_z_ising_exact": case.facts["log_z_ising"]}
    if drawn.log_weights is not None:
        row |= {"log_z_ising": case.target.ising(drawn.log_z), "bound_ising": case.target.ising(drawn.log_z_bound)}
    return row


def of_molecule(case: Case, drawn: Drawn) -> Row:
    """Total variation of Ramachandran maps beyond that of exact samples of as many frames, and the mean energy."""
    from openmm_tsf.analysis import excess_total_variation, ramachandran_histogram
    from openmm_tsf.reference import load_reference
    from openmm_tsf.torsions import phi_psi

    positions = drawn.facts.get("positions")
    inside = torch.ones(len(drawn.x), dtype=torch.bool)
    if positions is None:
        with torch.no_grad():
            positions, inside = case.target.positions(drawn.x.double())
    phi, psi = phi_psi(positions[inside].numpy(), case.facts["molecule"].topology)
    state = load_reference().at(case.facts["kelvin"])
    row = of_energy(case, drawn) | {"share_off_chart": 1.0 - float(inside.double().mean())}
    raw = ramachandran_histogram(phi, psi)
    row["excess_tv"] = excess_total_variation(state.ramachandran, raw, state.n_effective, int(inside.sum()))
    w = weights(drawn)
    if w is not None:
        effective = 1.0 / float(w.square().sum())
        weighted = ramachandran_histogram(phi, psi, w[inside].numpy())
        row["excess_tv_weighted"] = excess_total_variation(state.ramachandran, weighted, state.n_effective, effective)
    return row


GROUPS = {
    "2d": of_plane, "wells": of_energy, "logistic": of_logistic, "lj": of_cluster, "ising": of_ising,
    "molecule": of_molecule,
}  # fmt: skip
