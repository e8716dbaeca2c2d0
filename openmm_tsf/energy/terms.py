"""The force field of an openmm.System as a sum of batched terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import openmm
import torch
from torch import Tensor, nn

from openmm_tsf.energy.bonded import (
    read_harmonic_angles,
    read_harmonic_bonds,
    read_periodic_torsions,
    read_rb_torsions,
)
from openmm_tsf.energy.born import read_custom_gb, read_custom_nonbonded, read_obc
from openmm_tsf.energy.cmap import read_cmap_torsions
from openmm_tsf.energy.custom import (
    read_custom_angles,
    read_custom_bonds,
    read_custom_external,
    read_custom_torsions,
)
from openmm_tsf.energy.nonbonded import read_nonbonded
from openmm_tsf.energy.pairs import Geometry, Pairs
from openmm_tsf.energy.unsupported import UnsupportedForce

OF_ATOMS: dict[str, Callable] = {
    "HarmonicBondForce": read_harmonic_bonds,
    "HarmonicAngleForce": read_harmonic_angles,
    "PeriodicTorsionForce": read_periodic_torsions,
    "RBTorsionForce": read_rb_torsions,
    "CMAPTorsionForce": read_cmap_torsions,
    "CustomBondForce": read_custom_bonds,
    "CustomAngleForce": read_custom_angles,
    "CustomTorsionForce": read_custom_torsions,
    "CustomExternalForce": read_custom_external,
}
OF_PAIRS: dict[str, Callable] = {
    "NonbondedForce": read_nonbonded,
    "CustomNonbondedForce": read_custom_nonbonded,
    "CustomGBForce": read_custom_gb,
    "GBSAOBCForce": read_obc,
}
WITHOUT_ENERGY = ("CMMotionRemover",)


class ForceField(nn.Module):
    """Terms of a System, on one set of pairs.

    Args:
        terms: by label.
        forces: index in the System of the force behind each term.
    """

    def __init__(self, terms: Mapping[str, nn.Module], forces: Mapping[str, int], pairs: Pairs) -> None:
        super().__init__()
        self.labels, self.forces, self.pairs = tuple(terms), dict(forces), pairs
        self.terms = nn.ModuleList(terms.values())

    def forward(self, positions: Tensor) -> Tensor:
        """Energy (batch,) [kJ/mol] of positions (atoms, 3, batch) [nm]."""
        total = None
        geometry = Geometry(positions, self.pairs)
        for term in self.terms:
            energy = term(geometry)
            total = energy if total is None else total + energy
        return positions[0, 0] * 0.0 if total is None else total

    def term(self, label: str) -> Callable[[Tensor], Tensor]:
        """The energy of one term as a function of positions (atoms, 3, batch)."""
        term = self.terms[self.labels.index(label)]
        return lambda positions: term(Geometry(positions, self.pairs))


def read_system(system: openmm.System, parameters: Mapping[str, float] | None = None) -> ForceField:
    """The force field of a System.

    Args:
        system: an openmm.System without periodic box and virtual sites.
        parameters: values of global parameters; the System's defaults for the others.

    Raises:
        UnsupportedForce: forces without a batched form, all of them named.
        ValueError: no atoms, parameters that no force has, or a force that contradicts itself.
    """
    n_atoms = system.getNumParticles()
    if n_atoms == 0:
        raise ValueError("the System has no particles, so there is nothing to evaluate")
    if any(system.isVirtualSite(i) for i in range(n_atoms)):
        raise UnsupportedForce("the System has virtual sites, which have no batched form; use a System without")
    values = global_parameters(system)
    unknown = sorted(set(parameters or {}) - set(values))
    if unknown:
        has = f"has {', '.join(sorted(values))}" if values else "has none"
        raise ValueError(f"no global parameter {', '.join(unknown)}: the System {has}")
    values |= {name: float(value) for name, value in (parameters or {}).items()}
    unsound = [f"{name} = {value:g}" for name, value in values.items() if not math.isfinite(value)]
    if unsound:
        raise ValueError(f"global parameters must be finite: {', '.join(unsound)}")
    forces = [(k, force) for k, force in enumerate(system.getForces()) if type(force).__name__ not in WITHOUT_ENERGY]
    strange = [type(force).__name__ for _, force in forces if type(force).__name__ not in OF_ATOMS | OF_PAIRS]
    if strange:
        raise UnsupportedForce(f"{', '.join(strange)}: no batched form; use OpenMMEnergy")
    pairs, terms, indices = Pairs(n_atoms), {}, {}
    for index, force in forces:
        name = type(force).__name__
        readers, what = (OF_PAIRS, pairs) if name in OF_PAIRS else (OF_ATOMS, n_atoms)
        term = readers[name](force, values, what)
        if term is not None:
            label = name if name not in terms else f"{name} {index}"
            terms[label], indices[label] = term, index
    return ForceField(terms, indices, pairs)


def global_parameters(system: openmm.System) -> dict[str, float]:
    """Names and default values of the global parameters of all forces."""
    values: dict[str, float] = {}
    for force in system.getForces():
        if not hasattr(force, "getNumGlobalParameters"):
            continue
        for k in range(force.getNumGlobalParameters()):
            values[force.getGlobalParameterName(k)] = force.getGlobalParameterDefaultValue(k)
    return values


def value_and_forces(field: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Energies (batch,) and forces (atoms, 3, batch) in one pass, from the energy alone."""

    def evaluate(positions: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            positions = positions.detach().requires_grad_(True)
            energy = field(positions)
            gradient = None
            if energy.requires_grad:
                (gradient,) = torch.autograd.grad(energy.sum(), positions, allow_unused=True)
        return energy.detach(), torch.zeros_like(positions) if gradient is None else -gradient

    return evaluate
