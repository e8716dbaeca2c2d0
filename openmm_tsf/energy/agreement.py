"""Batched terms compared with OpenMM, one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import openmm
import torch
from openmm import unit

from openmm_tsf.energy.terms import ForceField, value_and_forces

ENERGY_ERROR, RELATIVE_ERROR = 1e-6, 1e-9
"""Allowed difference of energies in float64: the first [kJ/mol], and the second times the energy."""
FORCE_ERROR = 1e-8
"""Allowed difference of forces in float64, relative to the largest force of the configuration."""
GROUPS = 32


class EnergyMismatch(ValueError):
    """A batched term that is not what OpenMM computes, or that could not be compared with it."""


@dataclass(frozen=True)
class Agreement:
    """How far a batched term is from OpenMM's, at worst over the configurations compared.

    Args:
        label: of the term.
        energy: largest energy of the term, by size [kJ/mol].
        energy_error: largest difference of energies [kJ/mol].
        force_error: largest difference of force components, relative to the largest force of the configuration.
        allowed: whether both are within rounding.
        n: configurations compared, those where OpenMM's own value is finite.
    """

    label: str
    energy: float
    energy_error: float
    force_error: float
    allowed: bool
    n: int


def agreements(
    system: openmm.System, field: ForceField, parameters: Mapping[str, float], positions: np.ndarray
) -> list[Agreement]:
    """Compare each term, in float64, with OpenMM's Reference platform.

    Args:
        system: the System the field was read from.
        field: its batched terms.
        parameters: values of global parameters, where they are not the System's defaults.
        positions: (B, A, 3) [nm].
    """
    x = torch.tensor(positions).permute(1, 2, 0).contiguous()
    wanted = _openmm_terms(system, list(range(system.getNumForces())), parameters, positions)
    rows = []
    for label in field.labels:
        energy, forces = value_and_forces(field.term(label))(x)
        of_openmm = wanted.pop(field.forces[label])
        rows.append(_compare(label, energy.numpy(), forces.permute(2, 0, 1).numpy(), *of_openmm))
    for index, (energy, forces) in wanted.items():  # forces without a term must have no energy
        if energy.any() or forces.any():
            label = type(system.getForce(index)).__name__
            rows.append(_compare(label, np.zeros_like(energy), np.zeros_like(forces), energy, forces))
    return rows


def check_agreement(
    system: openmm.System, field: ForceField, parameters: Mapping[str, float], positions: np.ndarray
) -> None:
    """Refuse a field that is not what OpenMM computes.

    Raises:
        EnergyMismatch: with the terms that differ, and by how much; or with those that are not finite in OpenMM on any
            of the positions, so that there is nothing to compare.
    """
    rows = agreements(system, field, parameters, positions)
    blind = [row.label for row in rows if not row.n]
    if blind:
        raise EnergyMismatch(
            f"{', '.join(blind)} could not be compared with OpenMM: not finite on any of {len(positions)} geometries; "
            "give sound positions=, or verify=False"
        )
    wrong = [row for row in rows if not row.allowed]
    if wrong:
        terms = "; ".join(
            f"{a.label} by {a.energy_error:.3g} of {a.energy:.3g} kJ/mol (forces by {a.force_error:.2g} of the largest)"
            for a in wrong
        )
        raise EnergyMismatch(f"batched energies differ from OpenMM's: {terms}; use OpenMMEnergy, and report this")


def _compare(
    label: str, energy: np.ndarray, forces: np.ndarray, wanted: np.ndarray, wanted_forces: np.ndarray
) -> Agreement:
    rows = np.isfinite(wanted) & np.isfinite(wanted_forces).all(axis=(1, 2))
    error = np.abs(energy[rows] - wanted[rows])
    largest = np.abs(wanted_forces[rows]).max(axis=(1, 2), initial=0.0)
    force_error = np.abs(forces[rows] - wanted_forces[rows]).max(axis=(1, 2), initial=0.0) / (largest + 1e-3)
    allowed = (error <= ENERGY_ERROR + RELATIVE_ERROR * np.abs(wanted[rows])).all() and (
        force_error <= FORCE_ERROR
    ).all()
    worst = [float(values.max(initial=0.0)) for values in (np.abs(wanted[rows]), error, force_error)]
    return Agreement(label, *worst, bool(allowed), int(rows.sum()))


def _openmm_terms(
    system: openmm.System, forces: list[int], parameters: Mapping[str, float], positions: np.ndarray
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Energies (B,) and forces (B, A, 3) of each force of a System, by its index."""
    found = {}
    for start in range(0, len(forces), GROUPS - 1):
        found |= _openmm_groups(system, forces[start : start + GROUPS - 1], parameters, positions)
    return found


def _openmm_groups(
    system: openmm.System, forces: list[int], parameters: Mapping[str, float], positions: np.ndarray
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    system = openmm.XmlSerializer.clone(system)
    for index, force in enumerate(system.getForces()):
        force.setForceGroup(1 + forces.index(index) if index in forces else 0)
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    for name, value in parameters.items():
        context.setParameter(name, value)
    found = {index: (np.empty(len(positions)), np.empty(positions.shape)) for index in forces}
    for row, pose in enumerate(positions):
        context.setPositions(pose)
        for group, index in enumerate(forces, start=1):
            state = context.getState(energy=True, forces=True, groups={group})
            found[index][0][row] = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
            found[index][1][row] = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
    return found
