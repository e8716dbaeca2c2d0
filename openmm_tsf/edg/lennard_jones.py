"""Clusters of Lennard-Jones particles in a harmonic trap, without their centre of mass.

Reduced units: the pair energy has depth 1 at distance 1, the Boltzmann constant is 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from openmm_tsf.geometry import dot
from openmm_tsf.typing import Positions, Scalars, Vectors

CORE = 0.8
"""Distance below which training may take the pair energy as a line; it is 6.92 there, with slope -161."""
COINCIDENT = 1e-12
"""Squared distances below this count as this, with no derivative: there is no direction in which to push apart."""


@dataclass(frozen=True, eq=False)
class LennardJones:
    """u(y) = [sum_{i<j} V(r_ij) + (trap/2) sum_i |x_i - c|^2]/T with V(r) = r^-12 - 2 r^-6 and c the mean of the x_i.

    The density lives in the 3 (n - 1) coordinates y of an orthonormal basis of the positions relative to their mean, so
    sum_i |x_i - c|^2 = |y|^2, and the volume element is that of the relative positions. V has its minimum -1 at r = 1:
    the unit of length is where two particles like to be, not where V is zero.

    Args:
        n: particles.
        temperature: T.
        trap: spring constant that keeps the cluster together; without it there is no normalised density.
        core: None for the energy as it is, which overflows to +inf where particles coincide. A distance r_c makes V a
            line below it, V(r_c) + V'(r_c)(r - r_c), so that draws with overlaps have finite energies and forces. For
            training alone: weights belong to the energy as it is.

    Raises:
        ValueError: fewer than 2 particles, or a temperature, trap or core that is not above 0, or a core beyond r = 1.

    Source: the energy of 13 and 55 particles at T = 1, trap 1: Koehler, Klein, Noe, arXiv 2006.02425.
    """

    n: int
    temperature: float = 1.0
    trap: float = 1.0
    core: float | None = None

    def __post_init__(self) -> None:
        if self.n < 2:
            raise ValueError(f"a cluster has at least 2 particles, not {self.n}")
        for name in ("temperature", "trap"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0.0):
                raise ValueError(f"the {name} must be finite and above 0, not {getattr(self, name):g}")
        if self.core is not None and not 0.0 < self.core <= 1.0:
            raise ValueError(f"the core must be above 0 and at most 1, not {self.core:g}")

    @property
    def dim(self) -> int:
        return 3 * (self.n - 1)

    def softened(self, core: float = CORE) -> LennardJones:
        """The same for training; see `core`."""
        return replace(self, core=core)

    @cached_property
    def basis(self) -> Float[Tensor, "relative particles"]:
        """Takes relative coordinates to positions and back."""
        return relative_basis(self.n)

    def positions(self, y: Vectors) -> Positions:
        """Positions (B, n, 3) with mean zero of coordinates (B, d).

        Raises:
            ValueError: the number of columns is not d.
        """
        self._check(y)
        return self.basis.to(y).T @ y.reshape(len(y), self.n - 1, 3)

    def _check(self, y: Tensor) -> None:
        if y.ndim != 2 or y.shape[1] != self.dim:
            raise ValueError(f"{self.n} particles have {self.dim} relative coordinates, not {(*y.shape,)}")

    def relative(self, positions: Positions) -> Vectors:
        """Coordinates (B, d) of positions (B, n, 3), wherever their mean is."""
        return (self.basis.to(positions) @ positions).flatten(1)

    def __call__(self, y: Vectors) -> Scalars:
        """Reduced energies (B,) of coordinates (B, d).

        Raises:
            ValueError: the number of columns is not d.
        """
        self._check(y)
        pairs = self._pair_energies(self._squares(y)).sum(0)
        return (pairs + 0.5 * self.trap * y.square().sum(1)) / self.temperature

    @cached_property
    def _steps(self) -> Float[Tensor, "pairs relative"]:
        """Takes relative coordinates to differences x_i - x_j: a product, because gathers are slow to differentiate."""
        i, j = torch.triu_indices(self.n, self.n, 1)
        return (self.basis[:, i] - self.basis[:, j]).T

    def _squares(self, y: Vectors) -> Float[Tensor, "pairs batch"]:
        """Squared distances, the batch last: each step of the arithmetic is then over contiguous numbers."""
        step = self._steps.to(y) @ y.reshape(len(y), self.n - 1, 3).permute(2, 1, 0)
        return dot(step, step)

    def _pair_energies(self, squares: Tensor) -> Tensor:
        if self.core is None:
            return _pair(squares)
        slope = 12.0 * (self.core**-7 - self.core**-13)
        r = squares.clamp_min(COINCIDENT).sqrt()
        line = float(_pair(torch.tensor(self.core**2, dtype=torch.float64))) + slope * (r - self.core)
        return torch.where(squares < self.core**2, line, _pair(squares.clamp_min(self.core**2)))


def relative_basis(n: int) -> Float[Tensor, "relative particles"]:
    """(n - 1, n) orthonormal rows, each with sum zero: row k compares particle k with the mean of those before."""
    rows = torch.zeros(n - 1, n, dtype=torch.float64)
    for k in range(1, n):
        rows[k - 1, :k], rows[k - 1, k] = 1.0, -float(k)
    return rows / rows.norm(dim=1, keepdim=True)


def _pair(squares: Tensor) -> Tensor:
    """V of squared distances."""
    sixth = squares**-3
    return sixth * (sixth - 2.0)
