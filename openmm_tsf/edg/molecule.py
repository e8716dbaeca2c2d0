"""A molecule as a target: the reduced energy of whitened flat internals.

Vectors x stand for flat internals q = centre + root x. Bonds, angles and stiff torsions are whitened together, by mean
and covariance of some frames; soft torsions are angles in units of `EVEN`. Soft torsions come first in x, then stiff
ones, angles and bonds, so that a decoder with fewer latents than coordinates begins with what moves most.

A Gaussian decoder draws on lines, but a soft torsion lives on a circle. Its images q + 2 pi k get shares h of the
circle's density that sum to one, those of a window of 2 pi with soft ends:

    h(q) = Phi((pi - d)/s) - Phi((-pi - d)/s),    d = q - centre,    sum over k of h(q + 2 pi k) = 1,

so exp(-U) h is a smooth density on the line, which folded back is the molecule's own. The density lives in flat
internals, so ln Z is that of flows: U has the Jacobian of the whitening, exp(-U) dx = exp(-u) h dq.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.special import log_ndtr

from openmm_tsf.cuts import emptiest
from openmm_tsf.geometry import wrap
from openmm_tsf.internals import FlatInternals
from openmm_tsf.systems import Molecule
from openmm_tsf.typing import Energy, Mask, Positions, Scalars, Vectors
from openmm_tsf.units import kT, to_kelvin
from openmm_tsf.zmatrix import ZMatrix, build_zmatrix

WALL = 20.0
"""What training adds beyond the chart: WALL (e + e^2/2) [kT] of the excess e, see `MolecularTarget.walled`."""
SOFTENED = 1000.0
"""Reduced energies beyond this grow only logarithmically in training."""
NARROWEST = 0.02
"""Training takes bond columns below this share of their reference, and 1 - |cos theta| below this, as lying there."""
WINDOW = 0.5
"""Width s [rad] of the ends of a window."""
EVEN = math.pi / math.sqrt(3.0)
"""Standard deviation of an angle [rad] anywhere on a circle: a generator starts from what covers all of it."""
IMAGES = 3
"""Images of a torsion on each side of its window that have a share worth counting."""


class MolecularTarget:
    """U(x) = u(q)/kT - ln c - sum ln h - ln|det root| of vectors x (B, D); +inf off the chart.

    ln c is the constraint factor of rigid bonds. At another temperature tau only u is divided by it (`reduced`): the
    rest are volumes. Energies are evaluated for rows on the chart alone.

    Args:
        internals: of the molecule.
        energy: U [kJ/mol] of positions [nm], as `BatchedEnergy` or `OpenMMEnergy`; twice differentiable where a decoder
            takes gradients of the target.
        temperature: T [K, or a Quantity].
        centre: (D,) of the internals; of a soft torsion, that of its window.
        root: (D, D).
        walled: for training: draws off the chart have an energy that leads back. Bonds and angles are put back on its
            edge; a torsion beyond the branch of its isomer, or a centre of the other hand, stays where it is. Both pay
            WALL (e + e^2/2), e being what they exceed the chart by: in widths, rad, or the sine of handedness. Reduced
            energies are softened beyond `SOFTENED`.

    Attributes:
        n_evaluations: draws asked for so far.
        n_off_chart: how many of them were off the chart.

    Raises:
        ValueError: shapes that do not fit, a root that cannot be inverted, a temperature that is none.
    """

    def __init__(
        self, internals: FlatInternals, energy: Energy, temperature: Any, centre: Tensor, root: Tensor, *,
        walled: bool = False,
    ) -> None:  # fmt: skip
        d = internals.dim
        if centre.shape != (d,) or root.shape != (d, d) or not bool(torch.linalg.slogdet(root.double())[1].isfinite()):
            raise ValueError(f"{d} internals need as many centres and an invertible root ({d}, {d})")
        self.internals, self.energy, self.temperature, self.is_walled = (
            internals, energy, to_kelvin(temperature), walled
        )  # fmt: skip
        self.centre, self.root = centre.double(), root.double()
        self.width = self.root.norm(dim=1)
        self.log_det = float(torch.linalg.slogdet(self.root)[1])
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
        return MolecularTarget(
            self.internals, self.energy, temperature, self.centre, self.root, walled=self.is_walled
        )  # fmt: skip

    def walled(self, walled: bool = True) -> MolecularTarget:
        """The same for training, or with False for weights; counts from zero."""
        return MolecularTarget(
            self.internals, self.energy, self.temperature, self.centre, self.root, walled=walled
        )  # fmt: skip

    def flat(self, x: Vectors) -> Vectors:
        """Flat internals (B, D) of x (B, D)."""
        return self.centre.to(x) + x @ self.root.T.to(x)

    def chart(self, x: Vectors) -> Mask:
        """(B,) whether x is on the chart."""
        q = self.flat(x)
        return self.internals.chart(q) & torch.isfinite(q).all(1)

    def positions(self, x: Vectors) -> tuple[Positions, Mask]:
        """Positions (B, A, 3) [nm] of x (B, D), NaN off the chart, and which rows are on it."""
        inside = self.chart(x)
        placed, _ = self.internals(self.flat(x[inside]))
        found = x.new_full((len(x), *placed.shape[1:]), torch.nan)
        found[inside] = placed
        return found, inside

    def standardised(self, positions: Positions, *, generator: torch.Generator | None = None) -> Vectors:
        """x (B, D) of positions (B, A, 3) [nm], soft torsions within pi of their centres, or, with a generator, in an
        image drawn by its share."""
        q, _ = self.internals.inverse(positions)
        soft, centre = self.internals.circular, self.centre.to(q)
        q = torch.where(soft, wrap(q - centre) + centre, q)
        if generator is not None:
            away = (q - centre)[:, soft]
            images = 2.0 * math.pi * torch.arange(-IMAGES, IMAGES + 1, dtype=q.dtype, device=q.device)
            shares = log_window(away[..., None] + images).exp()
            at = torch.rand(away.shape, generator=generator, dtype=q.dtype, device=generator.device).to(q)
            chosen = (shares.cumsum(-1) < at[..., None] * shares.sum(-1, keepdim=True)).sum(-1)
            q[:, soft] = q[:, soft] + images[chosen]
        return torch.linalg.solve(self.root.to(q), (q - centre).T).T

    def log_shares(self, x: Vectors) -> Scalars:
        """Sum of ln h (B,) of x (B, D)."""
        soft = self.internals.circular
        return log_window((x @ self.root.T.to(x))[:, soft]).sum(1)

    def __call__(self, x: Vectors) -> Scalars:
        """U (B,) of x (B, D); in float32 or float64, as x is."""
        return self.reduced(x, x.new_ones(len(x)))

    def reduced(self, x: Vectors, tau: Scalars) -> Scalars:
        """u(q)/(kT tau) - ln c - sum ln h - ln|det root| (B,) of x (B, D) at temperatures tau (B,) in units of T.

        Raises:
            ValueError: the number of columns is not D.
        """
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"the molecule has {self.dim} internals, not {(*x.shape,)}")
        q, inside = self.flat(x), self.chart(x)
        self.n_evaluations += len(x)
        self.n_off_chart += int((~inside).sum())
        toll = q.new_zeros(len(q))
        if self.is_walled:
            q, toll = self._put_back(q)
            inside = torch.isfinite(q).all(1)
        rows = torch.nonzero(inside)[:, 0]
        where, _ = self.internals(q[rows])
        u = self.energy(where).to(q) / kT(self.temperature) / tau.to(q)[rows] - self.internals.log_constraint_factor(
            where
        )
        if self.is_walled:
            u = torch.where(u > SOFTENED, SOFTENED + torch.log1p((u - SOFTENED).clamp_min(0.0)), u) + toll[rows]
        u = u - self.log_shares(x[rows]) - self.log_det
        return torch.full_like(toll, torch.inf).index_put((rows,), u)

    def _put_back(self, q: Vectors) -> tuple[Vectors, Scalars]:
        """Internals with bonds and angles on the edge of the chart where they were beyond it, and what all that is off
        the chart costs [kT]."""
        chart, r, c = self.internals.chart, self.internals.n_bonds, self.internals.n_bonds + self.internals.n_angles
        bonds = torch.maximum(q[:, :r], NARROWEST * self.internals.reference[:r].to(q))
        angles = q[:, r:c].clamp(NARROWEST - 1.0, 1.0 - NARROWEST)
        back = torch.cat((bonds, angles, q[:, c:]), 1)
        excess = torch.cat(((q - back).abs() / self.width.to(q), chart.excess(q)), 1)
        return back, WALL * (excess + 0.5 * excess.square()).sum(1)


def log_window(away: Tensor) -> Tensor:
    """ln h of torsions at a distance [rad] from the centres of their windows; any shape."""
    near, far = log_ndtr((math.pi - away.abs()) / WINDOW), log_ndtr((-math.pi - away.abs()) / WINDOW)
    return near + torch.log1p(-torch.exp(far - near))


def molecular_target(
    molecule: Molecule, energy: Energy, frames: np.ndarray, temperature: Any, *, zmatrix: ZMatrix | None = None,
    walled: bool = False,
) -> MolecularTarget:  # fmt: skip
    """The target of a molecule, with the centres, and the covariance of stiff coordinates, of frames.

    Args:
        molecule: the molecule.
        energy: see `MolecularTarget`.
        frames: (n, A, 3) [nm], of any temperature that covers the target's; a few thousand do.
        temperature: T [K, or a Quantity].
        zmatrix: automatic by default.
        walled: see `MolecularTarget`.

    Raises:
        ValueError: too few frames on the chart for a covariance, or frames of another isomer.
    """
    internals = FlatInternals(molecule, zmatrix or build_zmatrix(molecule))
    q, inside = internals.of_frames(frames)
    q, soft = q[inside], internals.circular
    n_stiff = int((~soft).sum())
    if len(q) < 2 * n_stiff:
        raise ValueError(f"{len(q)} frames on the chart are too few for {n_stiff} stiff coordinates; give 2 for each")
    return MolecularTarget(internals, energy, temperature, *whitening(q, soft), walled=walled)


def whitening(q: Vectors, soft: Bool[Tensor, " dim"]) -> tuple[Float[Tensor, " dim"], Float[Tensor, "dim dim"]]:
    """Centres (D,) and root (D, D) of internals q (n, D), of which the columns `soft` are torsions on a circle."""
    stiff = (~soft).nonzero()[:, 0].flip(0)
    centre, root = q.mean(0), q.new_zeros(q.shape[1], q.shape[1])
    n_soft = 0
    for column in soft.nonzero()[:, 0].tolist():
        centre[column] = wrap(emptiest(q[:, column]) + math.pi)
        root[column, n_soft] = EVEN
        n_soft += 1
    values, vectors = torch.linalg.eigh(torch.cov(q[:, stiff].T).reshape(len(stiff), len(stiff)))
    # the symmetric root mixes coordinates as little as a root can
    symmetric = (vectors * values.clamp_min(1e-12 * values.max()).sqrt()) @ vectors.T
    root[stiff[:, None], n_soft + torch.arange(len(stiff))] = symmetric
    # rounded as files and training round it
    return centre.float().double(), root.float().double()
