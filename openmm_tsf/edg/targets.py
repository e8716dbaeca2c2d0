"""Six densities of the plane with modes far apart, each with its exact ln Z, exact draws, and a count of modes found.

The reduced energy U is -ln of the density, not normalised for the rings. At temperature tau the density is
exp(-U/tau)/Z(tau).

Source of the six: Wu, Guo, Zhou, Wang, arXiv 2401.02080.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmm_tsf.typing import Scalars, Vectors

TINY = 1e-12
"""Added to squared radii, so that energies of a radius have derivatives at the origin."""
REACH = 12.0
"""Quadratures of mixtures reach so many standard deviations beyond the outermost centres."""
POINTS_PER_WIDTH = 8
"""Their points in one standard deviation of the narrowest Gaussian. The trapezoid rule converges exponentially."""
FOUND = 0.1
"""A mode counts as found if its share is at least so much of its exact share."""
Modes = Int[Tensor, " batch"]


@runtime_checkable
class Density2D(Protocol):
    """A target with everything that is known of it."""

    name: str
    dim: int
    n_modes: int

    def __call__(self, x: Vectors) -> Scalars: ...

    def log_z(self, tau: float = 1.0) -> float: ...

    def sample(self, n: int, *, generator: torch.Generator) -> Vectors: ...

    def mode(self, x: Vectors) -> Modes: ...

    @property
    def mode_shares(self) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Mixture2D:
    """Isotropic Gaussians of equal weight: U = -ln of the normalised density, so ln Z is zero at tau = 1.

    Args:
        name: for tables.
        centres: (K, 2).
        variances: (K,).

    Raises:
        ValueError: shapes that do not fit, or a variance not above zero.
    """

    name: str
    centres: Tensor
    variances: Tensor
    dim = 2

    def __post_init__(self) -> None:
        if self.centres.ndim != 2 or self.centres.shape != (len(self.variances), 2):
            raise ValueError(f"{len(self.variances)} variances need as many centres, not {(*self.centres.shape,)}")
        if not bool((self.variances > 0).all()):
            raise ValueError("variances must be above 0")

    @property
    def n_modes(self) -> int:
        return len(self.variances)

    @property
    def mode_shares(self) -> Float[Tensor, " modes"]:
        """(K,) weights of the Gaussians."""
        return torch.full_like(self.variances, 1.0 / self.n_modes)

    def __call__(self, x: Vectors) -> Scalars:
        """U (B,) of points (B, 2)."""
        return -self._log_parts(x).logsumexp(1)

    def mode(self, x: Vectors) -> Modes:
        """(B,) which of the Gaussians is the densest there."""
        return self._log_parts(x).argmax(1)

    def _log_parts(self, x: Vectors) -> Float[Tensor, "batch modes"]:
        """ln of each Gaussian times its weight."""
        v = self.variances.to(x)
        away = (x[:, None] - self.centres.to(x)).square().sum(2)
        return -0.5 * away / v - torch.log(2.0 * math.pi * self.n_modes * v)

    def log_z(self, tau: float = 1.0) -> float:
        """ln of the integral of exp(-U/tau): 0 at tau = 1, by quadrature elsewhere."""
        if tau == 1.0:
            return 0.0
        centres, wide, narrow = (t.double() for t in (self.centres, self.variances.max(), self.variances.min()))
        margin = REACH * float((wide * max(tau, 1.0)).sqrt())
        step = float((narrow * min(tau, 1.0)).sqrt()) / POINTS_PER_WIDTH
        axes = [torch.arange(float(c.min()) - margin, float(c.max()) + margin, step).double() for c in centres.T]
        rows = [-self(torch.cartesian_prod(axes[0][k : k + 64], axes[1])) / tau for k in range(0, len(axes[0]), 64)]
        return float(torch.cat(rows).logsumexp(0)) + 2.0 * math.log(step)

    def sample(self, n: int, *, generator: torch.Generator) -> Vectors:
        """n exact draws (n, 2) at tau = 1."""
        centres, width = self.centres.double(), self.variances.double().sqrt()
        k = torch.randint(self.n_modes, (n,), generator=generator)
        noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        return (centres[k] + width[k, None] * noise).to(torch.get_default_dtype())


@dataclass(frozen=True, eq=False)
class Rings2D:
    """Concentric rings: U = min_k (|x| - r_k)^2 / (2 variance), with kinks half-way between two rings.

    Args:
        name: for tables.
        radii: ascending.
        variance: of the radius in a ring, but for the factor |x| of the area.

    Raises:
        ValueError: radii that do not ascend from above zero, or a variance not above zero.
    """

    name: str
    radii: tuple[float, ...]
    variance: float
    dim = 2

    def __post_init__(self) -> None:
        if sorted(set(self.radii)) != list(self.radii) or not self.radii or self.radii[0] <= 0.0:
            raise ValueError(f"radii must ascend from above 0, not {self.radii}")
        if not self.variance > 0.0:
            raise ValueError(f"the variance must be above 0, not {self.variance:g}")

    @property
    def n_modes(self) -> int:
        return len(self.radii)

    @cached_property
    def mode_shares(self) -> Float[Tensor, " modes"]:
        """(K,) exact share of each ring, bounded half-way to its neighbours."""
        areas = torch.tensor(self._areas(1.0), dtype=torch.float64)
        return areas / areas.sum()

    def __call__(self, x: Vectors) -> Scalars:
        """U (B,) of points (B, 2)."""
        away = self._radius(x)[:, None] - x.new_tensor(self.radii)
        return away.square().amin(1) / (2.0 * self.variance)

    def mode(self, x: Vectors) -> Modes:
        """(B,) the nearest ring."""
        return (self._radius(x)[:, None] - x.new_tensor(self.radii)).abs().argmin(1)

    def log_z(self, tau: float = 1.0) -> float:
        """ln of the integral of exp(-U/tau), in closed form."""
        return math.log(sum(self._areas(tau)))

    def _radius(self, x: Vectors) -> Scalars:
        return (x.square().sum(1) + TINY).sqrt()

    @property
    def _edges(self) -> list[float]:
        return [0.0, *((a + b) / 2.0 for a, b in itertools.pairwise(self.radii)), math.inf]

    def _areas(self, tau: float) -> list[float]:
        """Integrals of exp(-U/tau) over the domain of each ring.

        With v = tau * variance, 2 pi r exp(-(r - a)^2/2v) has the antiderivative
        2 pi (-v exp(-(r - a)^2/2v) + a sqrt(pi v/2) erf((r - a)/sqrt(2v))).
        """
        v, edges = tau * self.variance, self._edges

        def antiderivative(r: float, a: float) -> float:
            if math.isinf(r):
                return a * math.sqrt(0.5 * math.pi * v)
            return -v * math.exp(-0.5 * (r - a) ** 2 / v) + a * math.sqrt(0.5 * math.pi * v) * math.erf(
                (r - a) / math.sqrt(2.0 * v)
            )

        ends = zip(self.radii, itertools.pairwise(edges), strict=True)
        return [2.0 * math.pi * (antiderivative(high, a) - antiderivative(low, a)) for a, (low, high) in ends]

    def sample(self, n: int, *, generator: torch.Generator) -> Vectors:
        """n exact draws (n, 2) at tau = 1: normal radii, accepted in their own domain with probability |x|/bound.

        The bound is the upper edge of the domain; beyond the last ring the rare radii above r + 8 standard deviations
        (less than 1e-14 of all) are not drawn.
        """
        width, edges = math.sqrt(self.variance), self._edges
        ends = [min(high, a + 8.0 * width) for a, high in zip(self.radii, edges[1:], strict=True)]
        lows, bounds, radii = torch.tensor([edges[:-1], ends, self.radii], dtype=torch.float64)
        cumulated, kept = bounds.cumsum(0), [torch.empty(0, dtype=torch.float64)]
        while sum(map(len, kept)) < n:
            u = torch.rand(2, 2 * n + 64, generator=generator, dtype=torch.float64)
            k = torch.searchsorted(cumulated, u[0] * cumulated[-1]).clamp(max=self.n_modes - 1)
            r = radii[k] + width * torch.randn(u.shape[1], generator=generator, dtype=torch.float64)
            inside = (r > lows[k]) & (r < bounds[k])
            kept.append(r[inside & (u[1] * bounds[k] < r)])
        r = torch.cat(kept)[:n]
        angle = 2.0 * math.pi * torch.rand(n, generator=generator, dtype=torch.float64)
        return torch.stack((r * angle.cos(), r * angle.sin()), 1).to(torch.get_default_dtype())


def _mixture(name: str, centres: list[tuple[float, float]], variances: float | list[float]) -> Mixture2D:
    """All in double precision; energies come out in the dtype of the points."""
    where = torch.tensor(centres, dtype=torch.float64)
    return Mixture2D(name, where, torch.tensor(variances, dtype=torch.float64).expand(len(where)).clone())


def _hexagon(k: int) -> tuple[float, float]:
    return 5.0 * math.cos(math.pi * k / 3.0), 5.0 * math.sin(math.pi * k / 3.0)


DENSITIES_2D: dict[str, Callable[[], Density2D]] = {
    "MoG2": lambda: _mixture("MoG2", [(-5.0, 0.0), (5.0, 0.0)], 0.5),
    "MoG2(i)": lambda: _mixture("MoG2(i)", [(-5.0, 0.0), (5.0, 0.0)], [1.5, 0.3]),
    "MoG6": lambda: _mixture("MoG6", [_hexagon(k) for k in range(6)], 0.1),
    "MoG9": lambda: _mixture("MoG9", list(itertools.product((-3.0, 0.0, 3.0), repeat=2)), 0.3),
    "Ring": lambda: Rings2D("Ring", (2.0,), 0.16),
    "Ring5": lambda: Rings2D("Ring5", (1.0, 2.0, 3.0, 4.0, 5.0), 0.02),
}
"""Makers of the six densities by name."""


def density_2d(name: str) -> Density2D:
    """One of the six densities.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in DENSITIES_2D:
        raise ValueError(f"no density {name!r}; there are {', '.join(DENSITIES_2D)}")
    return DENSITIES_2D[name]()


def mode_shares(density: Density2D, x: Vectors, weights: Scalars | None = None) -> Float[Tensor, " modes"]:
    """Shares (K,) of points (B, 2) in the modes of a density, with weights (B,) or all alike."""
    w = x.new_ones(len(x)) if weights is None else weights.to(x)
    return torch.bincount(density.mode(x), weights=w, minlength=density.n_modes) / w.sum()


def modes_found(density: Density2D, x: Vectors, weights: Scalars | None = None) -> int:
    """How many modes have at least `FOUND` of their exact share among points (B, 2)."""
    return int((mode_shares(density, x, weights) >= FOUND * density.mode_shares.to(x)).sum())
