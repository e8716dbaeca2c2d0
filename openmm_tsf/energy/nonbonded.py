"""Coulomb and Lennard-Jones interactions of atom pairs: OpenMM's NonbondedForce."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from openmm import unit
from torch import Tensor, nn

from openmm_tsf.energy.pairs import Geometry, Pairs, check_particles
from openmm_tsf.energy.unsupported import UnsupportedForce, plain
from openmm_tsf.units import to_float

COULOMB = 138.93545764438198
"""1/(4 pi epsilon_0) [kJ nm/mol/e^2], as OpenMM's NonbondedForce has it."""


class Nonbonded(nn.Module):
    """Coulomb and Lennard-Jones energy of all pairs; excluded pairs have parameters of zero.

    Source: OpenMM user guide, "NonbondedForce": direct space, and reaction field beyond which nothing acts.

    Args:
        coulomb: (P,) charge products times Coulomb's constant [kJ nm/mol].
        sigma, epsilon: (P,) [nm], [kJ/mol].
        cutoff: of the pairs that are `cut`; the others (exceptions) act at any distance. None without cutoff.
    """

    label = "NonbondedForce"

    def __init__(
        self, coulomb: np.ndarray, sigma: np.ndarray, epsilon: np.ndarray, cutoff: Cutoff | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("coulomb", _column(coulomb))
        self.register_buffer("square", _column(np.where(epsilon != 0.0, sigma, 0.0) ** 2))
        self.register_buffer("depth", _column(4.0 * epsilon))
        self.cutoff = cutoff

    def forward(self, geometry: Geometry) -> Tensor:
        """Energy (batch,) [kJ/mol]."""
        inverse = geometry.inverse_distances
        sixth = (self.square * inverse * inverse) ** 3
        dispersion = self.depth * (sixth * sixth - sixth)
        if self.cutoff is None:
            return (self.coulomb * inverse + dispersion).sum(0)
        r = geometry.distances
        field = self.cutoff.quadratic * r * r - self.cutoff.constant
        cut = self.cutoff(self.coulomb * (inverse + field) + self.cutoff.switched(dispersion, r), r)
        return torch.where(self.cutoff.cut, cut, self.coulomb * inverse + dispersion).sum(0)


class Cutoff(nn.Module):
    """A cutoff distance [nm] with reaction field and switching function.

    Args:
        distance: beyond which nothing acts [nm].
        switch: where the switching function begins [nm]; None without.
        dielectric: of the reaction field; 0 for none.
        cut: (P,) which pairs the cutoff is for.
    """

    def __init__(self, distance: float, switch: float | None, dielectric: float, cut: np.ndarray) -> None:
        super().__init__()
        self.distance, self.switch = distance, switch
        self.quadratic = (dielectric - 1.0) / (2.0 * dielectric + 1.0) / distance**3
        self.constant = 3.0 * dielectric / (2.0 * dielectric + 1.0) / distance
        self.register_buffer("cut", torch.tensor(cut)[:, None])

    def forward(self, energy: Tensor, r: Tensor) -> Tensor:
        """The energy (pairs, batch) within the cutoff, zero beyond."""
        return torch.where(r < self.distance, energy, 0.0)

    def switched(self, energy: Tensor, r: Tensor) -> Tensor:
        """The energy (pairs, batch) times the switching function."""
        if self.switch is None:
            return energy
        t = ((r - self.switch) / (self.distance - self.switch)).clamp(0.0, 1.0)
        return energy * (1.0 + t * t * t * (-10.0 + t * (15.0 - 6.0 * t)))


def read_nonbonded(force: Any, parameters: Mapping[str, float], pairs: Pairs) -> Nonbonded:
    """The term of an openmm.NonbondedForce.

    Raises:
        UnsupportedForce: a method for periodic boxes.
        ValueError: an exception of atoms that do not exist.
    """
    methods = {force.NoCutoff: False, force.CutoffNonPeriodic: True}
    if force.getNonbondedMethod() not in methods:
        names = {force.CutoffPeriodic: "CutoffPeriodic", force.Ewald: "Ewald", force.PME: "PME", force.LJPME: "LJPME"}
        name = names.get(force.getNonbondedMethod(), "a periodic method")
        raise UnsupportedForce(f"NonbondedForce with {name} has no batched form; use OpenMMEnergy")
    check_particles(force, pairs)
    charge, sigma, epsilon = _particles(force, parameters, pairs.n_atoms)
    i, j = pairs.first, pairs.second
    coulomb, sigmas = COULOMB * charge[i] * charge[j], 0.5 * (sigma[i] + sigma[j])
    epsilons = np.sqrt(epsilon[i] * epsilon[j])
    cut = np.ones(len(pairs), dtype=bool)
    for row, values in _exceptions(force, parameters, pairs).items():
        coulomb[row], sigmas[row], epsilons[row] = COULOMB * values[0], values[1], values[2]
        cut[row] = False
    cutoff = None
    if methods[force.getNonbondedMethod()]:
        switch = _nm(force.getSwitchingDistance()) if force.getUseSwitchingFunction() else None
        cutoff = Cutoff(_nm(force.getCutoffDistance()), switch, force.getReactionFieldDielectric(), cut)
    return Nonbonded(coulomb, sigmas, epsilons, cutoff)


def _particles(force: Any, parameters: Mapping[str, float], n_atoms: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Charges [e], sigmas [nm] and epsilons [kJ/mol] of the atoms, offsets added."""
    table = np.array([plain(force.getParticleParameters(i)) for i in range(n_atoms)]).reshape(n_atoms, 3)
    for k in range(force.getNumParticleParameterOffsets()):
        name, atom, *scales = force.getParticleParameterOffset(k)
        if not 0 <= atom < n_atoms:
            raise ValueError(f"NonbondedForce: offset {k} is of atom {atom}; the System has atoms 0 to {n_atoms - 1}")
        table[atom] += parameters[name] * np.array(plain(scales))
    return table[:, 0], table[:, 1], table[:, 2]


def _exceptions(force: Any, parameters: Mapping[str, float], pairs: Pairs) -> dict[int, np.ndarray]:
    """Charge product [e^2], sigma [nm] and epsilon [kJ/mol] of each exceptional pair, offsets added."""
    found, rows = {}, []
    for k in range(force.getNumExceptions()):
        i, j, *values = force.getExceptionParameters(k)
        if not (0 <= i < pairs.n_atoms and 0 <= j < pairs.n_atoms) or i == j:
            raise ValueError(
                f"NonbondedForce: exception {k} is of atoms {i} and {j}; the System has atoms 0 to {pairs.n_atoms - 1}"
            )
        rows.append(pairs.row(i, j))
        found[rows[k]] = np.array(plain(values))
    for k in range(force.getNumExceptionParameterOffsets()):
        name, exception, *scales = force.getExceptionParameterOffset(k)
        if not 0 <= exception < len(rows):
            raise ValueError(f"NonbondedForce: offset {k} is of exception {exception}; there are {len(rows)}")
        found[rows[exception]] += parameters[name] * np.array(plain(scales))
    return found


def _nm(distance: Any) -> float:
    return float(to_float(distance, unit.nanometer, "distance"))


def _column(values: np.ndarray) -> Tensor:
    if not math.isfinite(float(np.abs(values).sum())):
        raise ValueError("NonbondedForce has parameters that are not finite")
    return torch.tensor(np.asarray(values, dtype=np.float64))[:, None]
