"""A molecule as a target: the reduced energy of standardised flat internals.

Coordinates x are flat internals q = centre + width * x of every column, where `centre` and `width` are the mean and
the standard deviation over some frames. Soft torsions are cut open where the frames are rarest (`cuts.cut_open`): a
Gaussian decoder draws on lines, so a circle becomes an interval of 2 pi, and what lies beyond its ends is off the
chart, because one configuration must not have the density of several. The density lives in flat internals, so ln Z is
that of flows: U carries the Jacobian of the widths, exp(-U) dx = exp(-u) dq.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmm_tsf.cuts import CutInternals, cut_open, reached
from openmm_tsf.internals import FlatInternals
from openmm_tsf.systems import Molecule
from openmm_tsf.typing import Energy, Mask, Positions, Scalars, Vectors
from openmm_tsf.units import kT, to_kelvin
from openmm_tsf.zmatrix import build_zmatrix

WALL = 20.0
"""What training adds for a coordinate beyond the chart: WALL * excess^2/2 [kT], excess in widths, torsions in rad."""
SOFTENED = 1000.0
"""Reduced energies beyond this grow only logarithmically in training."""
NARROWEST = 0.02
"""Training takes bond columns below this share of their reference, and 1 - |cos theta| below this, as lying there."""


class MolecularTarget:
    """U(x) = u(q)/kT - ln c - sum ln width of standardised internals x (B, D); +inf off the chart.

    ln c is the constraint factor of rigid bonds. Energies are evaluated for rows on the chart alone.

    Args:
        internals: with every soft torsion cut open.
        energy: U [kJ/mol] of positions [nm], as `BatchedEnergy` or `OpenMMEnergy`; twice differentiable where a decoder
            takes gradients of the target.
        temperature: T [K, or a Quantity].
        centre, width: (D,).
        wall: None for the target itself. A number, for training: draws whose bonds, angles or soft torsions have left
            the chart are put back on its edge, and pay for it (see `WALL`), so that they have a gradient that leads
            back; a draw that is another isomer has U = +inf all the same. Reduced energies are softened
            beyond `SOFTENED`.

    Attributes:
        n_evaluations: draws asked for so far.
        n_off_chart: how many of them were off the chart.

    Raises:
        ValueError: shapes that do not fit, a width not above zero, a temperature or wall that is none.
    """

    def __init__(
        self, internals: CutInternals, energy: Energy, temperature: Any, centre: Tensor, width: Tensor, *,
        wall: float | None = None,
    ) -> None:  # fmt: skip
        if centre.shape != (internals.dim,) or width.shape != (internals.dim,) or not bool((width > 0).all()):
            raise ValueError(f"{internals.dim} internals need as many centres, and widths above 0")
        if wall is not None and not (math.isfinite(wall) and wall > 0.0):
            raise ValueError(f"the wall must be finite and above 0, not {wall:g}")
        self.internals, self.energy, self.temperature = internals, energy, to_kelvin(temperature)
        self.centre, self.width, self.wall = centre.double(), width.double(), wall
        self.n_evaluations = self.n_off_chart = 0

    @property
    def dim(self) -> int:
        return self.internals.dim

    @property
    def share_off_chart(self) -> float:
        """Of the draws asked for so far; NaN before any."""
        return self.n_off_chart / self.n_evaluations if self.n_evaluations else math.nan

    def at(self, temperature: Any) -> MolecularTarget:
        """The same coordinates at another temperature [K, or a Quantity]; counts from zero."""
        return MolecularTarget(self.internals, self.energy, temperature, self.centre, self.width, wall=self.wall)

    def walled(self, wall: float | None = WALL) -> MolecularTarget:
        """The same for training, or with None for weights; counts from zero."""
        return MolecularTarget(self.internals, self.energy, self.temperature, self.centre, self.width, wall=wall)

    def flat(self, x: Vectors) -> Vectors:
        """Flat internals (B, D) of x (B, D)."""
        return self.centre.to(x) + self.width.to(x) * x

    def chart(self, x: Vectors) -> Mask:
        """(B,) whether x is on the chart."""
        return self.internals.chart(self.flat(x))

    def positions(self, x: Vectors) -> tuple[Positions, Mask]:
        """Positions (B, A, 3) [nm] of x (B, D), NaN off the chart, and which rows are on it."""
        q = self.flat(x)
        inside = self.internals.chart(q)
        placed, _ = self.internals(q[inside])
        found = q.new_full((len(q), *placed.shape[1:]), torch.nan)
        found[inside] = placed
        return found, inside

    def standardised(self, positions: Positions) -> Vectors:
        """x (B, D) of positions (B, A, 3) [nm]."""
        q, _ = self.internals.inverse(positions)
        return (q - self.centre.to(q)) / self.width.to(q)

    def __call__(self, x: Vectors) -> Scalars:
        """U (B,) of x (B, D); in float32 or float64, as x is.

        Raises:
            ValueError: the number of columns is not D.
        """
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"the molecule has {self.dim} internals, not {(*x.shape,)}")
        q = self.flat(x)
        inside = self.internals.chart(q) & torch.isfinite(q).all(1)
        self.n_evaluations += len(x)
        self.n_off_chart += int((~inside).sum())
        toll = q.new_zeros(len(q))
        if self.wall is not None:
            q, toll, inside = self._put_back(q)
        rows = torch.nonzero(inside)[:, 0]
        where, _ = self.internals(q[rows])
        u = self.energy(where).to(q) / kT(self.temperature) - self.internals.log_constraint_factor(where)
        if self.wall is not None:
            u = torch.where(u > SOFTENED, SOFTENED + torch.log1p((u - SOFTENED).clamp_min(0.0)), u) + toll[rows]
        u = u - self.width.to(q).log().sum()
        return torch.full_like(toll, torch.inf).index_put((rows,), u)

    def _put_back(self, q: Vectors) -> tuple[Vectors, Scalars, Mask]:
        """Internals on the edge of the chart where they were beyond it, what that costs [kT], and which belong."""
        whole = self.internals.whole
        r, c = whole.n_bonds, whole.n_bonds + whole.n_angles
        bonds = torch.maximum(q[:, :r], NARROWEST * whole.reference[:r].to(q))
        angles = q[:, r:c].clamp(NARROWEST - 1.0, 1.0 - NARROWEST)
        back = torch.cat((bonds, angles, q[:, c:]), 1)
        excess = ((q - back) / self.width.to(q)).square().sum(1)
        belongs, beyond = reached(self.internals, back)
        return back, 0.5 * self.wall * (excess + beyond.square()), belongs & torch.isfinite(q).all(1)


def molecular_target(
    molecule: Molecule, energy: Energy, frames: np.ndarray, temperature: Any, *, wall: float | None = None
) -> MolecularTarget:  # fmt: skip
    """The target of a molecule, with the centres and widths of frames.

    Args:
        molecule: the molecule.
        energy: see `MolecularTarget`.
        frames: (n, A, 3) [nm], of any temperature that covers the target's; a few hundred do.
        temperature: T [K, or a Quantity].
        wall: see `MolecularTarget`.

    Raises:
        ValueError: fewer than two frames on the chart, or frames of another isomer.
    """
    internals = FlatInternals(molecule, build_zmatrix(molecule))
    q, inside = internals.of_frames(frames)
    if int(inside.sum()) < 2:
        raise ValueError(f"centres and widths need at least 2 frames on the chart, not {int(inside.sum())}")
    cut = cut_open(internals, q[inside])
    q, _ = cut.of_frames(frames)
    return MolecularTarget(cut, energy, temperature, q[inside].mean(0), q[inside].std(0), wall=wall)
