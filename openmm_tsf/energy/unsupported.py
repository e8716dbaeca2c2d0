"""The refusal of forces without a batched form, and what the readers of forces share."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from openmm import unit


class UnsupportedForce(ValueError):
    """A force, or an option of one, without a batched form; `OpenMMEnergy` takes any."""


def plain(values: Iterable[Any]) -> list[float]:
    """Parameters of a force as floats, in nm, kJ/mol, e, radian and what is made of them."""
    return [float(v.value_in_unit_system(unit.md_unit_system) if unit.is_quantity(v) else v) for v in values]


def refuse_periodic(force: Any) -> None:
    """Refuse a force that measures across the walls of a periodic box.

    Raises:
        UnsupportedForce: `force` uses periodic boundary conditions.
    """
    if force.usesPeriodicBoundaryConditions():
        name = type(force).__name__
        raise UnsupportedForce(f"{name} with periodic boundary conditions has no batched form; use OpenMMEnergy")


def check_atoms(force: Any, row: int, atoms: Sequence[int], n_atoms: int) -> tuple[int, ...]:
    """The chain of atoms of one row of a force.

    Raises:
        ValueError: an atom that the System does not have.
        UnsupportedForce: a bond of an atom with itself, whose direction is undefined.
    """
    name = type(force).__name__
    for atom in atoms:
        if not 0 <= atom < n_atoms:
            raise ValueError(f"{name}: row {row} names atom {atom}; the System has atoms 0 to {n_atoms - 1}")
    for atom, following in itertools.pairwise(atoms):
        if atom == following:
            raise UnsupportedForce(
                f"{name}: row {row} joins atom {atom} to itself, which has no batched form; use OpenMMEnergy"
            )
    return tuple(atoms)
