"""Quartic potentials on the line: the latents of stretching bonds, bending angles and double wells."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from .typing import Vectors

CELLS = 256
"""Quadrature cells along the line."""
DEPTH = 45.0
"""Beyond the line's ends densities are below exp(-DEPTH) of their maximum: nothing, in double precision."""
SHRINK, PROBES = 0.93, 160
"""Ratio and number of the distances at which a potential is looked at to find the ends of its line."""
HARMONIC = -6.0
"""Starting value of what softplus makes the least coefficient of v^4 of: 0.0025, nearly a Gaussian."""


class QuarticPotentials(nn.Module):
    """e_i(v) = v^2/2 + c1_i v + c2_i v^2 + c3_i v^3 + c4_i v^4 of n coordinates, and exp(-e_i/tau)/Z_i(tau).

    A Gaussian latent behind a map of constant Jacobian cannot give a coordinate a skewed density; a cubic term can, and
    steers as exactly, because Z is a quadrature at every tau. c4 exceeds (3/4) c3^2/(1 + 2 |c2|): e is bounded from
    below, and where c2 is not negative it is convex, so that a cubic term does not dig a second well far away.

    Args:
        n: number of coordinates.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(3, n))
        self.quartic = nn.Parameter(torch.full((n,), HARMONIC))

    @property
    def n(self) -> int:
        return len(self.quartic)

    def polynomials(self) -> Tensor:
        """Coefficients (4, n) of v, v^2, v^3 and v^4."""
        c1, c2, c3 = self.coefficients
        return torch.stack((c1, 0.5 + c2, c3, softplus(self.quartic) + _least_quartic(c2, c3)))

    def forward(self, v: Vectors) -> Tensor:
        """e_i of coordinates (batch, n): (batch, n)."""
        return _evaluate(self.polynomials(), v)

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Make e_i(factor v) of e_i(v), in place, for a factor near 1."""
        c1, c2, c3, c4 = self.polynomials() * factor ** torch.arange(1, 5).to(self.quartic)[:, None]
        self.coefficients.copy_(torch.stack((c1, c2 - 0.5, c3)))
        above = (c4 - _least_quartic(c2 - 0.5, c3)).clamp_min(1e-6)
        self.quartic.copy_(torch.log(torch.expm1(above)))

    def derivatives(self, v: Vectors) -> tuple[Tensor, Tensor]:
        """First and second derivatives of e_i by its coordinate, each (batch, n)."""
        return _derivatives(self.polynomials(), v)

    def log_z(self, tau: float) -> Tensor:
        """ln of the integral of exp(-e_i/tau): (n,); the trapezoid rule converges exponentially for such functions."""
        grid = self._grid(tau)
        return (-self(grid) / tau).logsumexp(0) + (grid[1] - grid[0]).log()

    @torch.no_grad()
    def sample(self, m: int, tau: float, *, generator: torch.Generator) -> Vectors:
        """Exact draws (m, n): a cell-constant envelope and rejection."""
        grid, polynomials = self._grid(tau), self.polynomials()
        envelope, total = _envelope(polynomials, grid, tau)
        flat = (total + torch.arange(self.n, device=total.device)[:, None]).flatten()
        drawn = grid.new_zeros(m * self.n)
        waiting = torch.arange(m * self.n, device=grid.device)
        while len(waiting):
            u = torch.rand(3, len(waiting), generator=generator, dtype=torch.float64, device=grid.device)
            column = waiting % self.n
            # one search for all: the distribution function of coordinate i lies between i and i + 1
            cell = torch.searchsorted(flat, column + u[0]) - column * CELLS
            cell.clamp_(0, CELLS - 1)
            width = grid[1, column] - grid[0, column]
            v = grid[cell, column] + width * u[1].to(grid)
            log_p = -_evaluate(polynomials[:, column], v) / tau
            accepted = u[2].log().to(grid) < log_p - envelope[column, cell]
            drawn[waiting[accepted]] = v[accepted]
            waiting = waiting[~accepted]
        return drawn.reshape(m, self.n)

    @torch.no_grad()
    def _grid(self, tau: float) -> Tensor:
        """Knots (CELLS + 1, n) from end to end of each line."""
        polynomials = self.polynomials()
        # beyond this e' has no roots (Cauchy's bound), so that no well is further out
        reach = 1.0 + (polynomials[:3] * torch.arange(1, 4).to(polynomials)[:, None]).abs().amax(0) / (
            4 * polynomials[3]
        )
        probes = reach * SHRINK ** torch.arange(-PROBES // 4, PROBES).to(reach)[:, None]
        e = _evaluate(polynomials, torch.stack((probes, -probes)))
        shallow = e.amin(0) - e.amin((0, 1)).clamp(max=0.0) < DEPTH * tau
        widest = torch.where(shallow, probes, 0.0).amax(0) / SHRINK
        ends = torch.linspace(-1.0, 1.0, CELLS + 1, dtype=reach.dtype, device=reach.device)[:, None]
        return ends * torch.maximum(widest, probes[-1])


def _least_quartic(c2: Tensor, c3: Tensor) -> Tensor:
    """What the coefficient of v^4 exceeds, by those of v^2, beyond a half, and of v^3."""
    return 0.75 * c3**2 / (1.0 + 2.0 * c2.abs())


def _evaluate(polynomials: Tensor, v: Tensor) -> Tensor:
    """Polynomials without constant, coefficients first, at v."""
    c1, c2, c3, c4 = polynomials
    return v * (c1 + v * (c2 + v * (c3 + v * c4)))


def _derivatives(polynomials: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivatives of them at v."""
    c1, c2, c3, c4 = polynomials
    first = c1 + v * (2.0 * c2 + v * (3.0 * c3 + 4.0 * c4 * v))
    return first, 2.0 * c2 + v * (6.0 * c3 + 12.0 * c4 * v)


def _envelope(polynomials: Tensor, grid: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """An upper bound (n, CELLS) of -e/tau on every cell, and the share (n, CELLS) of it up to each cell's end."""
    _, c2, c3, c4 = polynomials
    half = 0.5 * (grid[1] - grid[0])
    middle = 0.5 * (grid[1:] + grid[:-1])
    slope, _ = _derivatives(polynomials, middle)
    far = middle.abs() + half
    curvature = 2.0 * c2.abs() + far * (6.0 * c3.abs() + far * 12.0 * c4)
    bound = ((-_evaluate(polynomials, middle) + slope.abs() * half + 0.5 * curvature * half**2) / tau).T
    total = torch.exp(bound - bound.amax(1, keepdim=True)).double().cumsum(1)
    return bound, total / total[:, -1:]
