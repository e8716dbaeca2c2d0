"""Terms of OpenMM's custom forces of few atoms: CustomBond-, CustomAngle-, CustomTorsion- and CustomExternalForce.

The energy is an expression in OpenMM's own text: of a coordinate of the atoms of a row (or of the position of its one
atom), of the parameters of the row, and of global parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openmm_tsf.energy.coordinates import Corners, angle, distance, torsion
from openmm_tsf.energy.expressions import check_names, own_parameters, parse_expression
from openmm_tsf.energy.lepton import Expression
from openmm_tsf.energy.unsupported import check_atoms, refuse_periodic

Coordinates = Mapping[str, Callable[..., Tensor]]


class Custom(nn.Module):
    """Energies that are one expression for all rows.

    Args:
        label: name of the force.
        expression: energy [kJ/mol] of coordinates, parameters and constants.
        coordinates: by name, as functions of the positions of the atoms of a row.
        rows: (R,) atom indices of each row.
        names: of the parameters of a row.
        parameters: (R, P) their values.
        constants: values of global parameters.
        n_atoms: number of atoms of the System.
    """

    def __init__(
        self,
        label: str,
        expression: Expression,
        coordinates: Coordinates,
        rows: Sequence[Sequence[int]],
        names: Sequence[str],
        parameters: np.ndarray,
        constants: Mapping[str, float],
        n_atoms: int,
    ) -> None:
        super().__init__()
        self.label, self.expression, self.coordinates = label, expression, dict(coordinates)
        self.constants, self.names = dict(constants), tuple(names)
        self.corners = Corners(rows, n_atoms)
        self.register_buffer("columns", torch.tensor(parameters.T, dtype=torch.float64)[..., None])

    def forward(self, geometry: Any) -> Tensor:
        """Energy (batch,) [kJ/mol] of `geometry.positions` (atoms, 3, batch)."""
        corners = self.corners(geometry.positions)
        found = {name: coordinate(*corners) for name, coordinate in self.coordinates.items()}
        # Where names are the same, OpenMM takes the coordinate, then the parameter of the row.
        values = self.constants | dict(zip(self.names, self.columns, strict=True)) | found
        energy = self.expression(values)
        if not self.expression.variables & set(found):  # the same everywhere: give it the shape of the batch
            energy = energy + 0.0 * next(iter(found.values()))
        return energy.sum(0)


def read_custom_bonds(force: Any, parameters: Mapping[str, float], n_atoms: int) -> Custom | None:
    """The term of an openmm.CustomBondForce, an expression of r; None without bonds.

    Raises:
        UnsupportedForce: periodic boundary conditions.
        ValueError: an expression that cannot be read, or an atom that does not exist.
    """
    names = [force.getPerBondParameterName(k) for k in range(force.getNumPerBondParameters())]
    rows = [force.getBondParameters(k) for k in range(force.getNumBonds())]
    return _read(force, {"r": distance}, rows, names, parameters, n_atoms)


def read_custom_angles(force: Any, parameters: Mapping[str, float], n_atoms: int) -> Custom | None:
    """The term of an openmm.CustomAngleForce, an expression of theta; None without angles.

    Raises:
        UnsupportedForce: periodic boundary conditions.
        ValueError: an expression that cannot be read, or an atom that does not exist.
    """
    names = [force.getPerAngleParameterName(k) for k in range(force.getNumPerAngleParameters())]
    rows = [force.getAngleParameters(k) for k in range(force.getNumAngles())]
    return _read(force, {"theta": angle}, rows, names, parameters, n_atoms)


def read_custom_torsions(force: Any, parameters: Mapping[str, float], n_atoms: int) -> Custom | None:
    """The term of an openmm.CustomTorsionForce, an expression of theta on [-pi, pi]; None without torsions.

    Raises:
        UnsupportedForce: periodic boundary conditions.
        ValueError: an expression that cannot be read, or an atom that does not exist.
    """
    names = [force.getPerTorsionParameterName(k) for k in range(force.getNumPerTorsionParameters())]
    rows = [force.getTorsionParameters(k) for k in range(force.getNumTorsions())]
    return _read(force, {"theta": torsion}, rows, names, parameters, n_atoms)


def read_custom_external(force: Any, parameters: Mapping[str, float], n_atoms: int) -> Custom | None:
    """The term of an openmm.CustomExternalForce, an expression of x, y and z; None without particles.

    Raises:
        UnsupportedForce: distances in a periodic box.
        ValueError: an expression that cannot be read, or an atom that does not exist.
    """
    names = [force.getPerParticleParameterName(k) for k in range(force.getNumPerParticleParameters())]
    rows = [force.getParticleParameters(k) for k in range(force.getNumParticles())]
    return _read(force, {"x": itemgetter(0), "y": itemgetter(1), "z": itemgetter(2)}, rows, names, parameters, n_atoms)


def _read(
    force: Any,
    coordinates: Coordinates,
    rows: Sequence[Sequence[Any]],
    names: Sequence[str],
    parameters: Mapping[str, float],
    n_atoms: int,
) -> Custom | None:
    """The term of a force whose rows are some atoms and then the values of the parameters `names`."""
    refuse_periodic(force)
    expression = parse_expression(force, force.getEnergyFunction())
    shared = own_parameters(force, parameters)
    check_names(force, expression, [*coordinates, *names, *shared])
    atoms = [check_atoms(force, k, row[:-1], n_atoms) for k, row in enumerate(rows)]
    for k, (*_, values) in enumerate(rows):
        if len(values) != len(names):
            raise ValueError(
                f"{type(force).__name__}: row {k} has {len(values)} parameters; the force names {len(names)}"
            )
    if not rows:
        return None
    table = np.array([values for *_, values in rows], dtype=np.float64).reshape(len(rows), len(names))
    return Custom(type(force).__name__, expression, coordinates, atoms, names, table, shared, n_atoms)
