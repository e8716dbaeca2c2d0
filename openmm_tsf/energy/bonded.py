"""Terms of OpenMM's bonded forces: HarmonicBondForce, HarmonicAngleForce, PeriodicTorsionForce and RBTorsionForce."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.polynomial.chebyshev import poly2cheb
from torch import Tensor, nn

from openmm_tsf.energy.coordinates import Corners, angle, distance, phase
from openmm_tsf.energy.unsupported import check_atoms, plain, refuse_periodic


class Harmonic(nn.Module):
    """Energies k (x - x0)^2 / 2 of one coordinate for each row.

    Args:
        label: name of the force.
        coordinate: of the atoms of a row.
        rows: (R,) atom indices of each row.
        centres: (R,) x0 [nm or rad].
        constants: (R,) k [kJ/mol/nm^2 or kJ/mol/rad^2].
        n_atoms: number of atoms of the System.
    """

    def __init__(
        self,
        label: str,
        coordinate: Callable[..., Tensor],
        rows: Sequence[Sequence[int]],
        centres: Sequence[float],
        constants: Sequence[float],
        n_atoms: int,
    ) -> None:
        super().__init__()
        self.label, self.coordinate, self.corners = label, coordinate, Corners(rows, n_atoms)
        self.register_buffer("centre", torch.tensor(centres, dtype=torch.float64)[:, None])
        self.register_buffer("half_k", 0.5 * torch.tensor(constants, dtype=torch.float64)[:, None])

    def forward(self, geometry: Any) -> Tensor:
        """Energy (batch,) [kJ/mol] of `geometry.positions` (atoms, 3, batch)."""
        off = self.coordinate(*self.corners(geometry.positions)) - self.centre
        return (self.half_k * off * off).sum(0)


class Fourier(nn.Module):
    """Torsion energies sum_n a_n cos(n phi) + b_n sin(n phi), by recurrence from the cosine and sine of phi.

    No angle is computed: that saves the arctangent and the cosines, and nothing happens at phi = pi.

    Args:
        label: name of the force.
        rows: (R,) quadruples of atoms.
        waves: (N + 1, R) complex numbers a_n + i b_n [kJ/mol] for n = 0 to N; N at least 1.
        n_atoms: number of atoms of the System.
    """

    def __init__(self, label: str, rows: Sequence[Sequence[int]], waves: np.ndarray, n_atoms: int) -> None:
        super().__init__()
        self.label, self.corners = label, Corners(rows, n_atoms)
        self.register_buffer("cosines", torch.tensor(waves.real)[..., None])
        self.register_buffer("sines", torch.tensor(waves.imag)[..., None] if waves.imag.any() else None)

    def forward(self, geometry: Any) -> Tensor:
        """Energy (batch,) [kJ/mol] of `geometry.positions` (atoms, 3, batch)."""
        cos, sin = phase(*self.corners(geometry.positions))
        first, second = _clenshaw(self.cosines, 2.0 * cos)
        energy = self.cosines[0] + cos * first - second
        if self.sines is not None:
            energy = energy + sin * _clenshaw(self.sines, 2.0 * cos)[0]
        return energy.sum(0)


def read_harmonic_bonds(force: Any, parameters: Mapping[str, float], n_atoms: int) -> Harmonic | None:
    """The term of an openmm.HarmonicBondForce; None without bonds.

    Raises:
        UnsupportedForce: periodic boundary conditions.
        ValueError: an atom that does not exist.
    """
    return _read_harmonic(force, distance, 2, force.getNumBonds(), force.getBondParameters, n_atoms)


def read_harmonic_angles(force: Any, parameters: Mapping[str, float], n_atoms: int) -> Harmonic | None:
    """The term of an openmm.HarmonicAngleForce; None without angles.

    Raises:
        UnsupportedForce: periodic boundary conditions.
        ValueError: an atom that does not exist.
    """
    return _read_harmonic(force, angle, 3, force.getNumAngles(), force.getAngleParameters, n_atoms)


def read_periodic_torsions(force: Any, parameters: Mapping[str, float], n_atoms: int) -> Fourier | None:
    """The term of an openmm.PeriodicTorsionForce, k (1 + cos(n phi - phase)); None without torsions.

    Raises:
        UnsupportedForce: periodic boundary conditions.
        ValueError: an atom that does not exist, or a periodicity below 1.
    """
    refuse_periodic(force)
    series = []
    for row in range(force.getNumTorsions()):
        *atoms, n, shift, k = force.getTorsionParameters(row)
        check_atoms(force, row, atoms, n_atoms)
        if n < 1:
            raise ValueError(f"PeriodicTorsionForce: row {row} has periodicity {n}; it must be at least 1")
        shift, k = plain((shift, k))
        if k != 0.0:
            waves = np.zeros(n + 1, dtype=complex)
            waves[[0, n]] = k, k * np.exp(1j * shift)
            series.append((_forwards(atoms), waves))
    return _fourier("PeriodicTorsionForce", series, n_atoms)


def read_rb_torsions(force: Any, parameters: Mapping[str, float], n_atoms: int) -> Fourier | None:
    """The term of an openmm.RBTorsionForce, sum_n c_n cos(phi - pi)^n; None without torsions.

    Raises:
        UnsupportedForce: periodic boundary conditions.
        ValueError: an atom that does not exist.
    """
    refuse_periodic(force)
    series = []
    for row in range(force.getNumTorsions()):
        *atoms, c0, c1, c2, c3, c4, c5 = force.getTorsionParameters(row)
        check_atoms(force, row, atoms, n_atoms)
        powers = np.array(plain((c0, c1, c2, c3, c4, c5)))
        if powers.any():
            powers[1::2] *= -1.0  # cos(phi - pi) is -cos(phi)
            series.append((_forwards(atoms), poly2cheb(powers)))
    return _fourier("RBTorsionForce", series, n_atoms)


def _read_harmonic(
    force: Any, coordinate: Callable[..., Tensor], places: int, n_rows: int, row_parameters: Callable, n_atoms: int
) -> Harmonic | None:
    refuse_periodic(force)
    rows, centres, constants = [], [], []
    for row in range(n_rows):
        found = row_parameters(row)
        atoms = check_atoms(force, row, found[:places], n_atoms)
        centre, k = plain(found[places:])
        if k != 0.0:
            rows.append(atoms)
            centres.append(centre)
            constants.append(k)
    return Harmonic(type(force).__name__, coordinate, rows, centres, constants, n_atoms) if rows else None


def _forwards(atoms: Sequence[int]) -> tuple[int, ...]:
    """A chain of atoms in the one of its two directions that all rows agree on; the torsion is the same."""
    return min(tuple(atoms), tuple(reversed(atoms)))


def _fourier(label: str, series: Sequence[tuple[tuple[int, ...], np.ndarray]], n_atoms: int) -> Fourier | None:
    """One series for each quadruple of atoms, out of the waves (n + 1,) of any number of rows."""
    if not series:
        return None
    number = {atoms: i for i, atoms in enumerate(dict(series))}
    sums = np.zeros((max(2, *(len(waves) for _, waves in series)), len(number)), dtype=complex)
    for atoms, waves in series:
        sums[: len(waves), number[atoms]] += waves
    return Fourier(label, list(number), sums, n_atoms)


def _clenshaw(coefficients: Tensor, twice: Tensor) -> tuple[Tensor, Tensor | float]:
    """The first two terms of Clenshaw's backward recurrence for a series in multiples of phi; twice is 2 cos(phi)."""
    *lower, first = coefficients[1:].unbind()
    second: Tensor | float = 0.0
    for c in reversed(lower):
        first, second = c + twice * first - second, first
    return first, second
