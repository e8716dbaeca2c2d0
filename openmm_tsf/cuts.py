"""Soft torsions cut open, so that they live on lines like all other coordinates."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from .geometry import smoothed_density, wrap
from .internals import FlatInternals
from .typing import Mask, Positions, Scalars, Vectors
from .vectors import LineCoordinates


class CutInternals(nn.Module):
    """`FlatInternals` whose soft torsions live on lines, each within pi of a centre.

    What lies beyond is off the chart: folding it back would give one configuration the density of several.

    Args:
        internals: of the molecule.
        centre: (D,) [rad] the torsions' centres, opposite to where they are cut; zero in the other columns.
    """

    def __init__(self, internals: FlatInternals, centre: Tensor | None = None) -> None:
        super().__init__()
        self.whole, self.dim, self.zmatrix = internals, internals.dim, internals.zmatrix
        self.register_buffer("centre", torch.zeros_like(internals.reference) if centre is None else centre)
        self.register_buffer("circular", torch.zeros_like(internals.circular), persistent=False)

    def chart(self, q: Vectors) -> Mask:
        """(batch,) True where q is on the chart of the internals, and no torsion beyond its cut."""
        off = self.whole.circular & ((q - self.centre.to(q)).abs() >= math.pi)
        return self.whole.chart(q) & ~off.any(1)

    def forward(self, q: Vectors) -> tuple[Positions, Scalars]:
        """See `FlatInternals.forward`."""
        return self.whole(q)

    def inverse(self, x: Positions) -> tuple[Vectors, Scalars]:
        """See `FlatInternals.inverse`; soft torsions come out within pi of their centres."""
        q, log_det = self.whole.inverse(x)
        return self._on_branch(q), log_det

    def of_frames(self, positions: np.ndarray) -> tuple[Vectors, Mask]:
        """See `FlatInternals.of_frames`."""
        q, inside = self.whole.of_frames(positions)
        return self._on_branch(q), inside

    def moved_onto(self, x: Positions, onto: Positions) -> Positions:
        """See `FlatInternals.moved_onto`."""
        return self.whole.moved_onto(x, onto)

    def log_constraint_factor(self, x: Positions, masses: Tensor | None = None) -> Scalars:
        """See `FlatInternals.log_constraint_factor`."""
        return self.whole.log_constraint_factor(x, masses)

    def _on_branch(self, q: Vectors) -> Vectors:
        centre = self.centre.to(q)
        return torch.where(self.whole.circular, wrap(q - centre) + centre, q)


def cut_open(internals: FlatInternals, q: Vectors) -> CutInternals:
    """Internals with every soft torsion cut where internals q (frames, D) are rarest."""
    centre = torch.zeros_like(internals.reference)
    for column in torch.nonzero(internals.circular)[:, 0].tolist():
        centre[column] = wrap(emptiest(q[:, column]) + math.pi)
    return CutInternals(internals, centre.float().double())  # flows are trained in single precision


def reached(internals: FlatInternals | CutInternals | LineCoordinates, q: Vectors) -> tuple[Mask, Scalars]:
    """Which internals q (batch, D) positions belong to, and by how much torsions lie beyond their cuts (batch,) [rad].

    On the chart the second is zero. A configuration beyond a cut is one of those within, written a second time.
    """
    if not isinstance(internals, CutInternals):
        return internals.chart(q), q.new_zeros(len(q))
    soft = internals.whole.circular
    beyond = ((q - internals.centre.to(q)).abs()[:, soft] - math.pi).clamp_min(0.0).sum(1)
    return internals.whole.chart(q), beyond


def emptiest(angles: Scalars) -> Tensor:
    """The angle [rad] where the smoothed histogram of angles (n,) [rad] is lowest."""
    places, density = smoothed_density(angles)
    return places[density.argmin()]
