"""What bonded terms measure: distances, angles and torsions of the rows of a force, all configurations at once.

Positions are (atoms, 3, batch); a vector is three tensors (rows, batch), which is what compiles to the fastest code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from openmm_tsf.energy.gather import take

Vector = Sequence[Tensor]
NARROWEST = 1e-10
"""An angle closer [rad] than this to 0 or pi counts as this far from it. It has no direction to open in, and gets a
gradient of all but zero."""


class Corners(nn.Module):
    """The atoms of each row of a force, as one vector of coordinates for each place in the row.

    Args:
        rows: atom indices, as many in each row.
        n_atoms: number of atoms of the System.
    """

    def __init__(self, rows: Sequence[Sequence[int]], n_atoms: int) -> None:
        super().__init__()
        self.places = len(rows[0])
        # Coordinate by coordinate: its pieces are then contiguous, and so is what they give back.
        index = [3 * row[place] + axis for place in range(self.places) for axis in range(3) for row in rows]
        self.coordinates = take(index, 3 * n_atoms)

    def forward(self, positions: Tensor) -> list[Vector]:
        """Vectors of (rows, batch), from positions (atoms, 3, batch)."""
        parts = self.coordinates(positions.reshape(-1, positions.shape[-1])).chunk(3 * self.places)
        return [parts[3 * place : 3 * place + 3] for place in range(self.places)]


def distance(a: Vector, b: Vector) -> Tensor:
    """|b - a|; its gradient is nan where it is zero."""
    d = _from_to(a, b)
    return _dot(d, d).sqrt()


def angle(a: Vector, b: Vector, c: Vector) -> Tensor:
    """Angle [rad] at b, on [0, pi]; nan or with a nan gradient where a or c coincides with b."""
    u, v = _from_to(b, a), _from_to(b, c)
    normal = _cross(u, v)
    # As accurate near 0 and pi as anywhere; the arccosine of the scalar product loses half the digits there.
    narrowest = (NARROWEST**2 * _dot(u, u) * _dot(v, v)).detach()
    return torch.atan2(torch.maximum(_dot(normal, normal), narrowest).sqrt(), _dot(u, v))


def phase(a: Vector, b: Vector, c: Vector, d: Vector) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the torsion of a chain of atoms (IUPAC sign); nan where three of them are in line."""
    cos, sin = _unscaled_phase(a, b, c, d)
    scale = torch.rsqrt(cos * cos + sin * sin)
    return cos * scale, sin * scale


def torsion(a: Vector, b: Vector, c: Vector, d: Vector) -> Tensor:
    """Torsion [rad, IUPAC sign] of a chain of atoms, on [-pi, pi]."""
    cos, sin = _unscaled_phase(a, b, c, d)
    return torch.atan2(sin, cos)


def _unscaled_phase(a: Vector, b: Vector, c: Vector, d: Vector) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the torsion times one positive factor."""
    u, axis, v = _from_to(a, b), _from_to(b, c), _from_to(c, d)
    normal = _cross(axis, v)
    return _dot(_cross(u, axis), normal), _dot(u, normal) * _dot(axis, axis).sqrt()


def _from_to(a: Vector, b: Vector) -> Vector:
    return [q - p for p, q in zip(a, b, strict=True)]


def _dot(a: Vector, b: Vector) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _cross(a: Vector, b: Vector) -> Vector:
    return [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]
