"""What a Context is: its energy in batches, its masses, and whether a flow fits its System."""

from __future__ import annotations

import hashlib
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import openmm
import torch
from openmm import unit

from openmm_tsf.energy import BatchedEnergy
from openmm_tsf.energy.agreement import EnergyMismatch
from openmm_tsf.energy.lepton import ExpressionError
from openmm_tsf.energy.openmm import ContextEnergy
from openmm_tsf.energy.terms import global_parameters
from openmm_tsf.energy.unsupported import UnsupportedForce
from openmm_tsf.flow import Flow
from openmm_tsf.metropolis import Target, Walkers
from openmm_tsf.systems import FORBIDDEN_FORCES, Molecule
from openmm_tsf.typing import Energy
from openmm_tsf.units import kT

KEPT = 128
"""Batched energies that are kept, one for each System and set of global parameters."""
SAME_ENERGY = 0.05, 1e-4
"""Absolute [kJ/mol] and relative difference of energies that single precision explains."""
SAME_LENGTH = 1e-6
"""Constrained lengths [nm] that differ by less are the same."""


@dataclass(frozen=True, eq=False)
class SystemFacts:
    """A System without thermostats.

    Args:
        system: a copy.
        digest: of its XML.
        masses: (A,) [amu].
        parameters: names of its global parameters.
    """

    system: openmm.System
    digest: str
    masses: torch.Tensor
    parameters: tuple[str, ...]


_FACTS: weakref.WeakKeyDictionary[openmm.Context, SystemFacts] = weakref.WeakKeyDictionary()
_ENERGIES: OrderedDict[tuple, BatchedEnergy | None] = OrderedDict()
_CHECKED: weakref.WeakKeyDictionary[Flow, set[str]] = weakref.WeakKeyDictionary()


def facts_of(context: openmm.Context) -> SystemFacts:
    """The facts of a Context's System, read once."""
    if context not in _FACTS:
        _FACTS[context] = read_facts(context.getSystem())
    return _FACTS[context]


def read_facts(system: openmm.System) -> SystemFacts:
    """The facts of a System, of which a copy is kept."""
    system = openmm.XmlSerializer.clone(system)
    for index in reversed(range(system.getNumForces())):
        if FORBIDDEN_FORCES.get(type(system.getForce(index)).__name__) == "thermostat":
            system.removeForce(index)
    digest = hashlib.sha256(openmm.XmlSerializer.serialize(system).encode()).hexdigest()
    masses = [system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(system.getNumParticles())]
    names = tuple(sorted(global_parameters(system)))
    return SystemFacts(system, digest, torch.tensor(masses, dtype=torch.float64), names)


def energy_of(context: openmm.Context, positions: np.ndarray) -> Energy:
    """The energy of a Context with its present global parameters: in batches where possible, by the Context otherwise.

    Args:
        context: of any integrator; if its System has no batched form, its positions change with every evaluation.
        positions: (A, 3) [nm], where the batched energy is compared with OpenMM's when it is made.
    """
    facts = facts_of(context)
    values = context.getParameters()
    parameters = {name: values[name] for name in facts.parameters}
    key = facts.digest, tuple(parameters.items())
    if key not in _ENERGIES:
        _ENERGIES[key] = _batched(facts, parameters, positions)
        if len(_ENERGIES) > KEPT:
            _ENERGIES.popitem(last=False)
    _ENERGIES.move_to_end(key)
    return _ENERGIES[key] or ContextEnergy(context)


def walkers_of(
    context: openmm.Context, temperature: float, positions: np.ndarray, log_factor: Callable[[torch.Tensor], Any] | None
) -> tuple[Target, Walkers]:
    """The target of a Context at a temperature, and where a configuration (A, 3) [nm] is in it.

    Its energy is compared with the Context's own each time. If they differ, somebody has changed the parameters of the
    Context's forces since they were read; then they are read again.

    Raises:
        ValueError: positions or energies that are not finite.
    """
    x = torch.from_numpy(positions)[None]
    own = ContextEnergy(context)
    for attempt in ("known", "read again", "by the Context"):
        energy = own if attempt == "by the Context" else energy_of(context, positions)
        target = Target(energy, kT(temperature), log_factor)
        walkers = target.at(x)
        if energy is own or _agree(float(walkers.energy), float(own(x))):
            break
        _FACTS.pop(context, None)
    return target, walkers


def _agree(found: float, wanted: float) -> bool:
    same = abs(found - wanted) <= SAME_ENERGY[0] + SAME_ENERGY[1] * abs(wanted)
    return same or found == wanted or not (math.isfinite(found) and math.isfinite(wanted))


def _batched(facts: SystemFacts, parameters: dict[str, float], positions: np.ndarray) -> BatchedEnergy | None:
    try:
        return BatchedEnergy(facts.system, positions, parameters=parameters)
    except (UnsupportedForce, ExpressionError, EnergyMismatch):
        return None


def check_flow(flow: Flow, facts: SystemFacts) -> None:
    """Refuse a flow that is not of the molecule of a System.

    Raises:
        ValueError: another molecule, another order of atoms, other constraints: with names and numbers.
    """
    fitting = _CHECKED.setdefault(flow, set())
    if facts.digest in fitting:
        return
    molecule = flow.molecule
    _check_atoms(molecule, facts)
    _check_bonds(molecule, facts.system)
    _check_constraints(molecule, facts.system)
    fitting.add(facts.digest)


def _check_atoms(molecule: Molecule, facts: SystemFacts) -> None:
    masses, own = facts.masses.numpy(), molecule.masses
    if len(masses) != len(own):
        raise ValueError(
            f"the flow is of {molecule.name} with {len(own)} atoms; the System has {len(masses)} particles"
        )
    periodic = [type(f).__name__ for f in facts.system.getForces() if f.usesPeriodicBoundaryConditions()]
    if periodic:
        raise ValueError(f"the System is periodic ({', '.join(periodic)}); flows are of one molecule without a box")
    other = np.flatnonzero(np.abs(masses - own) > 0.01 * own)
    # hydrogens may have been made heavier at the cost of their neighbours; then the bonds have to tell
    if len(other) and (abs(masses.sum() - own.sum()) > 0.01 or not _bonds(facts.system)):
        shown = ", ".join(f"{molecule.atom_labels[i]} {masses[i]:.3f} instead of {own[i]:.3f}" for i in other[:3])
        raise ValueError(
            f"{len(other)} particles of the System have other masses [amu] than the flow's molecule {molecule.name} "
            f"({shown}): another molecule, or another order of atoms"
        )


def _check_bonds(molecule: Molecule, system: openmm.System) -> None:
    found, wanted = _bonds(system), set(molecule.bonds)
    strange, missing = sorted(found - wanted), sorted(wanted - found)
    if strange and missing:
        i, j = strange[0]
        a, b = missing[0]
        labels = molecule.atom_labels
        raise ValueError(
            f"the System has other bonds than the flow's molecule {molecule.name}: {len(strange)} that it has not "
            f"(particles {i}-{j}, {labels[i]} and {labels[j]} there), {len(missing)} are missing ({labels[a]}-"
            f"{labels[b]}): another molecule, or another order of atoms"
        )


def _bonds(system: openmm.System) -> set[tuple[int, int]]:
    """Pairs that harmonic bonds and constraints connect."""
    pairs = [system.getConstraintParameters(k)[:2] for k in range(system.getNumConstraints())]
    for force in system.getForces():
        if isinstance(force, openmm.HarmonicBondForce):
            pairs += [force.getBondParameters(k)[:2] for k in range(force.getNumBonds())]
    return {(min(pair), max(pair)) for pair in pairs}


def _check_constraints(molecule: Molecule, system: openmm.System) -> None:
    rigid: dict[tuple[int, int], Any] = {}
    for k in range(system.getNumConstraints()):
        i, j, length = system.getConstraintParameters(k)
        rigid[min(i, j), max(i, j)] = length.value_in_unit(unit.nanometer)
    own = molecule.constraints
    labels = molecule.atom_labels
    named = lambda pairs: ", ".join(f"{labels[i]}-{labels[j]}" for i, j in sorted(pairs)[:3])  # noqa: E731
    if strange := rigid.keys() - own.keys():
        raise ValueError(
            f"the System constrains {len(strange)} bonds that are free in the flow ({named(strange)}); make it with "
            "constraints=None, or train a flow with constraints"
        )
    if missing := own.keys() - rigid.keys():
        raise ValueError(
            f"the flow has {len(missing)} rigid bonds that the System does not constrain ({named(missing)}); make it "
            "with the flow's constraints, or train a flow without"
        )
    longer = [pair for pair, length in own.items() if abs(rigid[pair] - length) > SAME_LENGTH]
    if longer:
        i, j = longer[0]
        raise ValueError(
            f"{len(longer)} constrained bonds have other lengths than in the flow ({labels[i]}-{labels[j]}: "
            f"{rigid[i, j]:.6f} nm instead of {own[i, j]:.6f} nm)"
        )
