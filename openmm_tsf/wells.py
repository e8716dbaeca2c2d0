"""Double wells in many dimensions: a model system whose thermodynamics are one-dimensional quadratures.

Energies and temperatures share one unit (k_B = 1); lengths are plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from .swaps import exchange, neighbour_pairs
from .typing import Scalars, Vectors

N_GRID = 4001
"""Points of the quadratures; the trapezoid rule converges exponentially for densities that vanish at both ends."""
TAIL = 60.0
"""Quadratures reach as far as the reduced energy is at most so much above its lowest value [kT]."""
STEPS = (0.3, 1.0, 3.0)
"""Widths of the Metropolis steps: within a well when it is cold, when it is warm, and from one well to the other."""


@dataclass(frozen=True, eq=False)
class DoubleWells:
    """U(x) = sum_i a_i y_i + b y_i^2 + c y_i^4 with y = A x: the energy of vectors x (B, d), `wells(x)` (B,).

    Args:
        a: (d,) tilts.
        mix: (d, d) the matrix A.
        b, c: without tilt there are two wells in each direction, sqrt(-2 b / c) apart, and b^2 / 4c between them.

    Raises:
        ValueError: shapes that do not fit, a singular A, or not b < 0 < c.

    Source: M. Dibak, L. Klein, F. Noe, arXiv 2012.00429 and 2108.01590.
    """

    a: Float[Tensor, " dim"]
    mix: Float[Tensor, "rows columns"]
    b: float = -4.0
    c: float = 1.0

    def __post_init__(self) -> None:
        if self.mix.shape != (len(self.a), len(self.a)):
            raise ValueError(f"{len(self.a)} tilts need a matrix of as many rows and columns, not {(*self.mix.shape,)}")
        if not -math.inf < self.b < 0.0 < self.c < math.inf:
            raise ValueError(f"two wells need b < 0 < c, not {self.b:g} and {self.c:g}")
        if not torch.isfinite(self.log_volume):
            raise ValueError("the matrix is singular, or not finite")

    @property
    def dim(self) -> int:
        return len(self.a)

    @property
    def log_volume(self) -> Tensor:
        """ln|det A|."""
        return torch.linalg.slogdet(self.mix.double())[1]

    def well(self, y: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Energies of the directions by themselves; they add up to U."""
        square = y * y
        return self.a.to(y) * y + (self.b + self.c * square) * square

    def __call__(self, x: Vectors) -> Scalars:
        return self.well(x @ self.mix.to(x).T).sum(1)

    def at(self, temperature: float) -> SteeredWells:
        """The exact density at a temperature.

        Raises:
            ValueError: the temperature is not finite and above zero.
        """
        if not (math.isfinite(temperature) and temperature > 0.0):
            raise ValueError(f"the temperature must be finite and above 0, not {temperature:g}")
        return SteeredWells(self, float(temperature))


@dataclass(frozen=True, eq=False)
class SteeredWells:
    """exp(-U(x)/T)/Z(T) of `DoubleWells` at one temperature, with all it takes from quadratures in y."""

    wells: DoubleWells
    temperature: float

    def log_prob(self, x: Vectors) -> Scalars:
        """ln p(x) [nat] of vectors (B, d)."""
        return -self.wells(x) / self.temperature - self.log_z.to(x)

    @property
    def log_z(self) -> Tensor:
        """ln of the integral of exp(-U/T) over x."""
        _, log_weights = self._grid()
        return log_weights.logsumexp(0).sum() - self.wells.log_volume

    @property
    def entropy(self) -> float:
        """-E[ln p] [nat]: no model has a lower nll."""
        return float(self.log_z) + self.mean_energy / self.temperature

    @property
    def mean_energy(self) -> float:
        """<U>."""
        return float(self.means(self.wells.well).sum())

    def means(self, observable: Callable[[Tensor], Tensor]) -> Float[Tensor, " dim"]:
        """Mean of a function of y, in each direction.

        Args:
            observable: of y (n, d), one number for each of its elements.
        """
        y, log_weights = self._grid()
        return (log_weights.softmax(0) * observable(y)).sum(0)

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Points y (N_GRID, d) in double precision, and -U/T there with the logarithm of their spacing."""
        wells, temperature = self.wells, self.temperature
        slope = float(wells.a.abs().max()) + abs(wells.b)  # U >= c y^4 - slope y^2 beyond |y| = 1, and U(0) = 0
        edge = math.sqrt((slope + math.sqrt(slope**2 + 4.0 * wells.c * TAIL * temperature)) / (2.0 * wells.c))
        y = torch.linspace(-max(edge, 1.0), max(edge, 1.0), N_GRID, dtype=torch.float64)[:, None].expand(-1, wells.dim)
        return y, -wells.well(y) / temperature + torch.log(y[1] - y[0])


def random_wells(dim: int, *, generator: torch.Generator) -> DoubleWells:
    """Double wells with random tilts and a random, well-conditioned matrix.

    a_i is uniform in (-1, 1). A = V diag(s) W with V and W uniform among the orthogonal matrices and ln s_i uniform in
    +-ln(2)/2, so that no direction is more than twice as stiff as another one because of A.
    """
    if dim < 1:
        raise ValueError(f"double wells have at least 1 dimension, not {dim}")
    a = 2.0 * torch.rand(dim, generator=generator, dtype=torch.float64) - 1.0
    log_s = (torch.rand(dim, generator=generator, dtype=torch.float64) - 0.5) * math.log(2.0)
    left, right = (_orthogonal(dim, generator) for _ in range(2))
    return DoubleWells(a, left @ torch.diag(log_s.exp()) @ right)


def _orthogonal(dim: int, generator: torch.Generator) -> Tensor:
    """A matrix of the Haar measure: Q of QR, with the signs that make it unique."""
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    return q * torch.sign(torch.diagonal(r))


# --- parallel tempering -----------------------------------------------------------------------------------------------


def temperature_ladder(low: float, middle: float, high: float, n: int) -> list[float]:
    """n temperatures from low to high that include the middle one, in geometric progression on both sides of it.

    Raises:
        ValueError: they do not ascend from above zero, or there are fewer than 3.
    """
    if not 0.0 < low < middle < high < math.inf:
        raise ValueError(f"need 0 < low < middle < high, not {low:g}, {middle:g} and {high:g}")
    if n < 3:
        raise ValueError(f"a ladder of low, middle and high has at least 3 temperatures, not {n}")
    below = min(max(round((n - 1) * math.log(middle / low) / math.log(high / low)), 1), n - 2)
    above = n - 1 - below
    cold = [low * (middle / low) ** (k / below) for k in range(below)]
    warm = [middle * (high / middle) ** (k / above) for k in range(1, above)]
    return [*cold, middle, *warm, high]


@dataclass(frozen=True, eq=False)
class TemperedSamples:
    """What a parallel tempering gave.

    Args:
        temperatures: (K,).
        x: (K, n, d) float32, of each temperature in the order of their making, `n_replicas` at a time.
        n_replicas: walkers at each temperature.
        moves_accepted: (K,) share of the Metropolis steps at each temperature.
        swaps_accepted: (K - 1,) share of the exchanges between each two neighbours.
        n_energy_evaluations: in all.
    """

    temperatures: list[float]
    x: Float[Tensor, "levels samples dim"]
    n_replicas: int
    moves_accepted: Float[Tensor, " levels"]
    swaps_accepted: Float[Tensor, " swaps"]
    n_energy_evaluations: int

    def at(self, temperature: float) -> Vectors:
        """(n, d) of one of the temperatures.

        Raises:
            ValueError: another temperature than those of the run.
        """
        for t, x in zip(self.temperatures, self.x, strict=True):
            if math.isclose(t, temperature, rel_tol=1e-9):
                return x
        raise ValueError(
            f"there are no samples at {temperature:g}, only at {len(self.temperatures)} temperatures from "
            f"{self.temperatures[0]:g} to {self.temperatures[-1]:g}"
        )

    def split(self, share: float) -> tuple[TemperedSamples, TemperedSamples]:
        """The early samples of every temperature, and the last `share` of them (a fraction between 0 and 1)."""
        cut = self.x.shape[1] - round(self.x.shape[1] * share)
        return replace(self, x=self.x[:, :cut]), replace(self, x=self.x[:, cut:])


@torch.no_grad()
def temper(
    wells: DoubleWells, temperatures: Sequence[float], n: int, *, n_replicas: int = 32, n_equilibration: int = 100,
    generator: torch.Generator,
) -> TemperedSamples:  # fmt: skip
    """Equilibrium samples at every temperature by parallel tempering, all walkers in one batch.

    In an iteration each walker tries a step of each of the widths `STEPS` along each y_i, then walkers of neighbouring
    temperatures exchange them. Metropolis' rule decides on all.

    Args:
        wells: the system.
        temperatures: (K,) ascending.
        n: samples at each temperature.
        n_replicas: walkers at each temperature.
        n_equilibration: iterations before the first sample.
        generator: of everything.

    Raises:
        ValueError: fewer than two temperatures, or temperatures that do not ascend from above zero.
    """
    temperatures = [float(t) for t in temperatures]
    if len(temperatures) < 2 or temperatures[0] <= 0.0 or sorted(set(temperatures)) != temperatures:
        raise ValueError("parallel tempering needs at least two temperatures, ascending and above 0")
    d, n_levels, n_saved = wells.dim, len(temperatures), -(-n // n_replicas)
    taus = torch.tensor(temperatures, dtype=torch.float64)
    levels = torch.arange(n_levels).repeat_interleave(n_replicas)
    y = torch.randn(len(levels), d, generator=generator, dtype=torch.float64)
    drawn, moves, proposed, accepted = [], torch.zeros(n_levels), 0, 0
    for iteration in range(n_equilibration + n_saved):
        for width in STEPS:
            y, moved = _step(wells, y, taus[levels], width, generator)
            moves += torch.bincount(levels, moved.double().mean(1), minlength=n_levels)
        pairs = neighbour_pairs(levels, n_levels, iteration, generator=generator)
        levels, tried, done = exchange(levels, wells.well(y).sum(1), 1.0 / taus, pairs, generator=generator)
        proposed, accepted = proposed + tried, accepted + done
        if iteration >= n_equilibration:
            drawn.append(y[levels.argsort()].view(n_levels, n_replicas, d).float())
    n_steps = (n_equilibration + n_saved) * len(STEPS)
    x = torch.cat(drawn, 1)[:, :n] @ torch.linalg.inv(wells.mix.double()).T.float()
    swaps = (accepted / proposed.clamp(min=1)).diagonal(1)
    return TemperedSamples(temperatures, x, n_replicas, moves / (n_steps * n_replicas), swaps, n_steps * len(levels))


def _step(
    wells: DoubleWells, y: Vectors, taus: Scalars, width: float, generator: torch.Generator
) -> tuple[Vectors, Tensor]:
    """A Metropolis step of walkers y (B, d) at temperatures (B,) along each direction, and which were accepted (B, d).

    U is a sum over directions: a step along one does not see the others, so all are decided at once.
    """
    new = y + width * torch.randn(y.shape, generator=generator, dtype=y.dtype)
    log_u = torch.rand(y.shape, generator=generator, dtype=y.dtype).log()
    accepted = log_u < (wells.well(y) - wells.well(new)) / taus[:, None]
    return torch.where(accepted, new, y), accepted
