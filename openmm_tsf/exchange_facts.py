"""What is known of a replica exchange, under flat names with units in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import plotting
from .canvas import versions
from .multistate import COLUMNS, FreeEnergies, move_acceptance, round_trips, swap_acceptance
from .records import ExchangeRecord
from .reference import Reference, ReferenceState

PACKAGES = ("pymbar", "openmmtools")
"""Packages that stand beside those of `canvas.PACKAGES`."""
TEMPLATES = {
    "mean_energy": "mean_energy_{}{}_kj_per_mol",
    "heat_capacity": "heat_capacity_{}{}_kj_per_mol_per_kelvin",
    **{name: f"{name}_{{}}{{}}" for name in COLUMNS},
    **{f"{name}_free_energy_kt": f"{name}_{{}}_free_energy{{}}_kt" for name in COLUMNS},
}
"""Names of what is in a row, for a source and its value ("") or error ("_error")."""


def account(
    record: ExchangeRecord, free: FreeEnergies, molecule: Any, n_discard: int, n_draws: int, seed: int
) -> dict[str, Any]:
    """Sizes, acceptances, free energies and versions; names that end in a number belong to that temperature.

    Args:
        free: of the same record without its first `n_discard` iterations.
        molecule: has a name.
        n_draws: of a flow at each temperature.
    """
    facts: dict[str, Any] = {
        "molecule": molecule.name,
        "sampler": record.sampler,
        "n_temperatures": len(record.temperatures),
        "n_replicas": record.n_replicas,
        "n_iterations": record.n_iterations,
        "n_discarded_iterations": n_discard,
        "n_stored_frames": record.positions.shape[0] * record.n_replicas,
        "n_draws_flow": n_draws,
        "n_energy_evaluations": record.n_energy_evaluations,
        "seconds": record.seconds,
        "round_trips": int(round_trips(record).sum()),
        "statistical_inefficiency_iterations": free.inefficiency,
    }
    acceptance = move_acceptance(record)
    for k, temperature in enumerate(record.temperatures):
        facts |= {
            f"temperature_{k}_kelvin": float(temperature),
            f"free_energy_{k}_nat": float(free.value[k]),
            f"free_energy_{k}_error_nat": float(free.error[k]),
            f"n_effective_{k}": float(free.n_effective[k]),
        }
        facts |= {f"{kind}_acceptance_{k}": float(share[k]) for kind, share in acceptance.items()}
        facts |= {f"{name}_{k}": int(count) for name, count in record.move_counts[k].items()}
    swaps = swap_acceptance(record)
    for i, j in np.argwhere(np.triu(record.swap_proposed, 1) > 0):
        facts[f"swap_acceptance_{i}_{j}"] = float(swaps[i, j])
        facts[f"n_swaps_proposed_{i}_{j}"] = int(record.swap_proposed[i, j])
    named = {f"version_{name.replace('-', '_')}": number for name, number in versions(*PACKAGES).items()}
    return facts | {"seed": seed} | named


def at_lowest(row: Mapping[str, float], flow: Mapping[str, float], reference: Reference | None) -> dict[str, Any]:
    """The lowest temperature by exchange, flow and reference, and how far they are apart in standard errors.

    Args:
        row: of `multistate.observables` at the lowest temperature.
        flow: a row of `exchange_report.flow_row` there; empty without a flow.
        reference: None without one.
    """
    state = None if reference is None else reference.at(row["temperature"])
    known = {} if state is None else _reference_row(state)
    facts: dict[str, Any] = {
        "n_effective_exchange": row.get("n_effective"),
        "n_effective_flow": flow.get("n_effective"),
        "n_effective_reference": known.get("n_effective"),
        "ess_flow": flow.get("ess"),
        "alpha_left_flow_raw": flow.get("alpha_left_raw"),
    }
    for name, template in TEMPLATES.items():
        for source, values in (("exchange", row), ("flow", flow), ("reference", known)):
            facts[template.format(source, "")] = values.get(name)
            facts[template.format(source, "_error")] = values.get(f"{name}_error")
    for name in ("mean_energy", "alpha_left"):
        facts[f"{name}_exchange_deviation"] = _deviation(row, known, name)
        facts[f"{name}_flow_difference"] = _deviation(flow, row, name)
    return facts


def _reference_row(state: ReferenceState) -> dict[str, float]:
    row = {"n_effective": state.n_effective, "alpha_left": state.alpha_left, "alpha_left_error": state.alpha_left_error}
    for name in plotting.QUANTITIES:
        row[name], row[f"{name}_error"] = plotting.reference_value(state, name)
    return row


def _deviation(first: Mapping[str, float], second: Mapping[str, float], name: str) -> float | None:
    """first - second in standard errors of the difference; None where one of them is not known."""
    errors = [row.get(f"{name}_error", 0.0) for row in (first, second)]
    if not all(error > 0.0 for error in errors):  # a basin without a single frame has no error bar
        return None
    return (first[name] - second[name]) / math.hypot(*errors)


def json_safe(value: Any) -> Any:
    """None for numbers that JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
