"""Energy maps of pairs of torsions: OpenMM's CMAPTorsionForce."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openmm_tsf.energy.coordinates import Corners, torsion
from openmm_tsf.energy.unsupported import check_atoms, plain, refuse_periodic


class TorsionMap(nn.Module):
    """Energies of two torsions each, read off maps by bicubic splines: twice differentiable, and smooth within a cell.

    Args:
        rows: (R,) eight atoms each, four of either torsion.
        maps: (n, n) energies [kJ/mol] at torsions of multiples of 2 pi / n, the first torsion along the first axis.
        map_of: (R,) which map a row reads.
        n_atoms: number of atoms of the System.
    """

    label = "CMAPTorsionForce"

    def __init__(
        self, rows: Sequence[Sequence[int]], maps: Sequence[np.ndarray], map_of: Sequence[int], n_atoms: int
    ) -> None:
        super().__init__()
        self.first = Corners([row[:4] for row in rows], n_atoms)
        self.second = Corners([row[4:] for row in rows], n_atoms)
        sizes = [len(m) for m in maps]
        starts = np.cumsum([0, *(n * n for n in sizes)])
        self.register_buffer("cells", torch.tensor(np.concatenate([_cells(m) for m in maps], axis=1)))
        self.register_buffer("size", torch.tensor([sizes[m] for m in map_of], dtype=torch.float64)[:, None])
        self.register_buffer("start", torch.tensor([int(starts[m]) for m in map_of])[:, None])

    def forward(self, geometry: Any) -> Tensor:
        """Energy (batch,) [kJ/mol] of `geometry.positions` (atoms, 3, batch)."""
        i, s = self._place(torsion(*self.first(geometry.positions)))
        j, t = self._place(torsion(*self.second(geometry.positions)))
        # A nan coordinate must not become an index; it reaches the energy through s and t.
        cell = self.start + torch.nan_to_num(i * self.size + j, nan=0.0).to(torch.int64)
        c = self.cells[:, cell]
        across = [((c[4 * k] * t + c[4 * k + 1]) * t + c[4 * k + 2]) * t + c[4 * k + 3] for k in range(4)]
        return (((across[0] * s + across[1]) * s + across[2]) * s + across[3]).sum(0)

    def _place(self, angle: Tensor) -> tuple[Tensor, Tensor]:
        """Number of the cell along one axis, without gradient, and the place in it, from 0 to 1."""
        along = torch.where(angle < 0.0, angle + 2.0 * math.pi, angle) * (self.size / (2.0 * math.pi))
        number = torch.minimum(along.detach().floor(), self.size - 1.0)
        return number, along - number


def read_cmap_torsions(force: Any, parameters: Mapping[str, float], n_atoms: int) -> TorsionMap | None:
    """The term of an openmm.CMAPTorsionForce; None without torsions.

    Raises:
        UnsupportedForce: periodic boundary conditions.
        ValueError: an atom or a map that does not exist, or a map smaller than 2 x 2.
    """
    refuse_periodic(force)
    maps = []
    for k in range(force.getNumMaps()):
        size, energies = force.getMapParameters(k)
        if size < 2:
            raise ValueError(f"CMAPTorsionForce: map {k} is of size {size}; it must be at least 2")
        maps.append(np.array(plain(energies)).reshape(size, size).T)  # the first torsion runs fastest
    rows, map_of = [], []
    for row in range(force.getNumTorsions()):
        k, *atoms = force.getTorsionParameters(row)
        rows.append(check_atoms(force, row, atoms[:4], n_atoms) + check_atoms(force, row, atoms[4:], n_atoms))
        if not 0 <= k < len(maps):
            raise ValueError(f"CMAPTorsionForce: row {row} reads map {k}; there are {len(maps)}")
        map_of.append(k)
    return TorsionMap(rows, maps, map_of, n_atoms) if rows else None


def _cells(energies: np.ndarray) -> np.ndarray:
    """Coefficients (16, n * n) of s^3 t^3, s^3 t^2, ... 1 in each cell of a periodic map (n, n)."""
    along_first = _periodic_spline(energies)  # power, cell, second torsion
    along_both = _periodic_spline(np.moveaxis(along_first, 2, 0))  # power, cell of the second torsion, then the first's
    return np.transpose(along_both, (2, 0, 3, 1)).reshape(16, -1)


def _periodic_spline(values: np.ndarray) -> np.ndarray:
    """Coefficients (4, n, ...), cube first, of the pieces of the periodic cubic spline through values (n, ...)."""
    from scipy.interpolate import CubicSpline  # 0.3 s of CPU, for the few that have such maps

    n = len(values)
    return CubicSpline(np.arange(n + 1), np.take(values, range(n + 1), axis=0, mode="wrap"), bc_type="periodic").c
