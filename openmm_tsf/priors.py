"""Latent densities that steer exactly: exp(-E(z)/tau)/Z(tau) with one E and a Z known at every tau.

tau is the temperature in units of the reference temperature, so E is in units of k_B times that temperature.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .geometry import TWO_PI, wrap
from .potentials import QuarticPotentials
from .typing import Scalars, Vectors

GRID = {1: 512, 2: 128}
"""Quadrature points along each side of the circle or torus."""
MOST_KEPT = 128
"""Tables that a factor of a frozen flow keeps, two for each temperature."""
WARMER = 4.0
"""How much hotter the backbone torsions of exploring draws are."""


class TorusPotential(nn.Module):
    """A truncated Fourier series on the circle or the torus, for energies and entropies of one or two angles.

    f(a) = sum_k alpha_k cos(k.a) + beta_k sin(k.a), without the constant.

    Args:
        dim: 1 or 2 angles.
        order: largest harmonic in each direction.
    """

    def __init__(self, dim: int, order: int) -> None:
        super().__init__()
        if dim not in GRID:
            raise ValueError(f"potentials have 1 or 2 angles, not {dim}")
        if not 0 <= 4 * order <= GRID[dim]:
            raise ValueError(f"harmonics of {dim} angles must be between 0 and {GRID[dim] // 4}, not {order}")
        self.dim, self.order = dim, order
        modes = [k for k in itertools.product(range(-order, order + 1), repeat=dim) if k > (0,) * dim]
        self.register_buffer("modes", torch.tensor(modes, dtype=torch.long).reshape(-1, dim), persistent=False)
        self.coefficients = nn.Parameter(torch.zeros(2, len(modes)))

    def features(self, angles: Tensor) -> Tensor:
        """cos(k.a) and sin(k.a) of angles (batch, dim): (batch, 2, modes)."""
        phase = angles @ self.modes.to(angles).T
        return torch.stack((phase.cos(), phase.sin()), 1)

    def forward(self, angles: Tensor) -> Scalars:
        """f of angles (batch, dim) [rad]: (batch,)."""
        return (self.features(angles) * self.coefficients).sum((1, 2))

    def on_grid(self, derivative: int | None = None) -> Tensor:
        """f, or its derivative along one angle, at the points 2 pi m / n: (n,) or (n, n)."""
        n = GRID[self.dim]
        alpha, beta = self.coefficients
        spectrum = torch.complex(alpha, -beta)
        if derivative is not None:
            spectrum = spectrum * 1j * self.modes[:, derivative]
        full = torch.zeros((n,) * self.dim, dtype=spectrum.dtype, device=spectrum.device)
        full = full.index_put(tuple((self.modes % n).T), spectrum)
        return torch.fft.ifftn(full, norm="forward").real

    def curvature_bound(self) -> Tensor:
        """A number that no second directional derivative of f exceeds."""
        size = (self.coefficients**2).sum(0).sqrt()
        return (size * (self.modes**2).sum(1)).sum()


class TorusFactor(nn.Module):
    """exp(-e(a)/tau + s(a))/Z(tau) for one or two angles, with Fourier series e and s and Z by quadrature.

    s is the entropy that coordinates conditioned on a carry: their widths multiply the volume by exp(s), see
    `MolecularPrior`. What is stored is s and m = s - e, the logarithm of the density at tau = 1: frames at that
    temperature fix m whatever s is, so the two can be learnt side by side.
    """

    def __init__(self, dim: int, energy_order: int, entropy_order: int) -> None:
        super().__init__()
        self.dim = dim
        self.marginal = TorusPotential(dim, energy_order)
        self.entropy = TorusPotential(dim, entropy_order)
        self._kept: dict[tuple, Tensor] = {}

    def energy(self, angles: Tensor) -> Scalars:
        """e of angles (batch, dim), up to a constant: (batch,)."""
        return self.entropy(angles) - self.marginal(angles)

    def exponent(self, angles: Tensor, tau: float) -> Scalars:
        """-e/tau + s of angles (batch, dim): (batch,)."""
        return self.marginal(angles) / tau + (1.0 - 1.0 / tau) * self.entropy(angles)

    def _on_grid(self, tau: float, derivative: int | None = None) -> Tensor:
        return self.marginal.on_grid(derivative) / tau + (1.0 - 1.0 / tau) * self.entropy.on_grid(derivative)

    def log_z(self, tau: float) -> Tensor:
        """ln of the integral of exp(-e/tau + s); the trapezoid rule converges exponentially for periodic functions."""
        constant = self.dim * math.log(TWO_PI / GRID[self.dim])
        return self._keeping("log_z", tau, lambda: self._on_grid(tau).flatten().logsumexp(0) + constant)

    @torch.no_grad()
    def sample(self, n: int, tau: float, *, generator: torch.Generator) -> Tensor:
        """Exact draws (n, dim) [rad]: a cell-constant envelope and rejection."""
        envelope = self._keeping("envelope", tau, lambda: self._envelope(tau))
        total = torch.cumsum(torch.exp(envelope - envelope.max()).double(), 0)
        drawn = [envelope.new_zeros(0, self.dim)]
        while (have := sum(map(len, drawn))) < n:
            m = int(1.3 * (n - have)) + 64
            u = torch.rand(m, self.dim + 2, generator=generator, dtype=torch.float64, device=envelope.device)
            cell = torch.searchsorted(total, u[:, 0] * total[-1]).clamp(max=len(total) - 1)
            side = GRID[self.dim]
            corner = torch.stack((cell // side, cell % side), 1)[:, 2 - self.dim :]
            angles = ((corner + u[:, 2:] - 0.5) * (TWO_PI / side)).to(envelope)
            accepted = u[:, 1].log().to(envelope) < self.exponent(angles, tau) - envelope[cell]
            drawn.append(wrap(angles[accepted]))
        return torch.cat(drawn)[:n]

    def _keeping(self, what: str, tau: float, make: Callable[[], Tensor]) -> Tensor:
        """make(), kept for the next time where nothing is being trained: a move draws a few at a time, and often."""
        numbers = list(self.parameters())
        if any(p.requires_grad for p in numbers):
            return make()
        key = what, tau, *((p.dtype, p.device, p.detach().cpu().numpy().tobytes()) for p in numbers)
        if key not in self._kept:
            if len(self._kept) >= MOST_KEPT:
                self._kept.clear()
            self._kept[key] = make()
        return self._kept[key]

    def _envelope(self, tau: float) -> Tensor:
        """An upper bound of the exponent on every cell: value and slope at its centre, and the largest curvature."""
        half = math.pi / GRID[self.dim]
        slopes = sum(self._on_grid(tau, d).abs() for d in range(self.dim))
        curvature = self.marginal.curvature_bound() / tau + abs(1.0 - 1.0 / tau) * self.entropy.curvature_bound()
        return (self._on_grid(tau) + slopes * half + 0.5 * curvature * self.dim * half**2).flatten()


class MolecularPrior(nn.Module):
    """Soft torsions in Fourier potentials, stiff coordinates in quartic ones whose width depends on the torsions.

    With latents z = (u, a), u (batch, n) and a (batch, n_soft) [rad], and s(a) = sum_f s_f(a_f):

        E(z) = sum_f e_f(a_f) + sum_i e_i(u_i exp(-s(a)/n))
        Z(tau) = prod_i integral exp(-e_i/tau) prod_f integral exp(-e_f/tau + s_f)

    so q_tau = exp(-E/tau)/Z(tau) exactly, and free-energy differences between basins gain the entropies s_f that
    coordinates of constant width cannot carry. How the width is shared out among the coordinates is left to the volume-
    preserving couplings that follow.

    Args:
        n_stiff: number of stiff coordinates.
        groups: soft columns by factor, each of one or two indices; together 0 ... n_soft - 1.
        energy_order, entropy_order: largest harmonics of e and s; entropy_order 0 leaves the entropies out.
        anharmonic: False gives every stiff coordinate e_i(v) = v^2/2, a Gaussian.
    """

    def __init__(
        self, n_stiff: int, groups: Sequence[Sequence[int]], *, energy_order: int, entropy_order: int,
        anharmonic: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.groups = tuple(tuple(int(i) for i in group) for group in groups)
        self.n_stiff, self.n_soft = n_stiff, sum(map(len, self.groups))
        if sorted(itertools.chain(*self.groups)) != list(range(self.n_soft)):
            raise ValueError(f"soft groups {self.groups} must hold each of 0 ... {self.n_soft - 1} once")
        orders = energy_order, entropy_order if n_stiff else 0
        self.factors = nn.ModuleList(TorusFactor(len(group), *orders) for group in self.groups)
        self.stiff = QuarticPotentials(n_stiff) if anharmonic and n_stiff else None
        self.register_buffer("like", torch.zeros(()), persistent=False)

    @property
    def dim(self) -> int:
        return self.n_stiff + self.n_soft

    def log_width(self, a: Tensor) -> Tensor:
        """s(a)/n of angles (batch, n_soft): (batch, 1)."""
        total = sum((f.entropy(a[:, g]) for f, g in zip(self.factors, self.groups, strict=True)), a.new_zeros(len(a)))
        return total[:, None] / max(self.n_stiff, 1)

    def stiff_loss(self, z: Vectors, tau: Scalars | float) -> Scalars:
        """-ln p(u | a) of latents (batch, D), each at its own tau, up to a number that depends on tau: (batch,)."""
        log_width = self.log_width(z[:, self.n_stiff :])
        v = z[:, : self.n_stiff] * torch.exp(-log_width)
        e = 0.5 * (v * v) if self.stiff is None else self.stiff(v)
        return e.sum(1) / tau + self.n_stiff * log_width[:, 0]

    def stiff_log_z(self, tau: float) -> Tensor:
        """ln of the integral of exp(-sum_i e_i/tau)."""
        if self.stiff is None:
            return self.like.new_full((), 0.5 * self.n_stiff * math.log(TWO_PI * tau))
        return self.stiff.log_z(tau).sum()

    def log_z(self, tau: float) -> Tensor:
        """ln Z(tau)."""
        return sum((factor.log_z(tau) for factor in self.factors), self.stiff_log_z(tau))

    def at(self, tau: float, *, explore: float = 0.0) -> SteeredPrior:
        """The density at temperature tau (in units of the reference temperature); see `SteeredPrior` for `explore`.

        Raises:
            ValueError: tau is not above zero, or the share not in 0 <= explore < 1.
        """
        if not (math.isfinite(tau) and tau > 0):
            raise ValueError(f"tau must be finite and above 0, not {tau:g}")
        if not 0.0 <= explore < 1.0:
            raise ValueError(f"the share of exploring draws must be in 0 ... 1, not {explore:g}")
        return SteeredPrior(self, float(tau), explore)


@dataclass(frozen=True)
class SteeredPrior:
    """A `MolecularPrior` at one temperature.

    Attributes:
        tau: temperature in units of the reference temperature.
        explore: share of the draws whose backbone torsions come from a density `WARMER` times as hot, the stiff
            coordinates given them being those of tau. So rare basins are drawn more often; `log_prob` is the mixture's.
    """

    prior: MolecularPrior
    tau: float
    explore: float = 0.0

    def log_prob(self, z: Vectors) -> Scalars:
        """ln p(z) [nat] of latents (batch, D); the angles are taken modulo 2 pi."""
        p, tau = self.prior, self.tau
        return self.log_prob_torsions(z[:, p.n_stiff :]) - p.stiff_loss(z, tau) - p.stiff_log_z(tau)

    def log_prob_torsions(self, a: Vectors) -> Scalars:
        """ln of the marginal density [nat] of the torsions (batch, n_soft) alone."""
        own = self._log_prob_torsions(a, 1.0)
        if self.explore == 0.0:
            return own
        warm = self._log_prob_torsions(a, WARMER)
        return torch.logaddexp(own + math.log1p(-self.explore), warm + math.log(self.explore))

    def _log_prob_torsions(self, a: Vectors, warmth: float) -> Scalars:
        log_p = a.new_zeros(len(a))
        for factor, group, tau in self._factors(warmth):
            log_p = log_p + factor.exponent(a[:, group], tau) - factor.log_z(tau)
        return log_p

    def _factors(self, warmth: float) -> Iterator[tuple[TorusFactor, tuple[int, ...], float]]:
        """Factors, their columns and their tau, that of backbone pairs (of all, where there is none) times `warmth`."""
        pairs = any(factor.dim == 2 for factor in self.prior.factors)
        for factor, group in zip(self.prior.factors, self.prior.groups, strict=True):
            yield factor, group, self.tau * (warmth if factor.dim == 2 or not pairs else 1.0)

    def sample(self, n: int, *, generator: torch.Generator) -> tuple[Vectors, Scalars]:
        """n draws (n, D) and their ln p(z); differentiable in the width, not in the angles."""
        a = self.sample_torsions(n, generator=generator)
        if self.explore > 0.0:
            warm = torch.rand(n, generator=generator, device=a.device) < self.explore
            a[warm] = self.sample_torsions(int(warm.sum()), warmth=WARMER, generator=generator)
        z = self.complete(a, generator=generator)
        return z, self.log_prob(z)

    def sample_torsions(self, n: int, *, warmth: float = 1.0, generator: torch.Generator) -> Vectors:
        """n draws (n, n_soft) [rad] of the torsions alone; those of the backbone as if `warmth` times as hot."""
        a = self.prior.like.new_zeros(n, self.prior.n_soft)
        for factor, group, tau in self._factors(warmth):
            a[:, group] = factor.sample(n, tau, generator=generator)
        return a

    def complete(self, a: Tensor, *, generator: torch.Generator) -> Vectors:
        """Latents (n, D) with the torsions given and stiff coordinates drawn for them."""
        p = self.prior
        if p.stiff is None:
            noise = torch.randn(len(a), p.n_stiff, generator=generator, dtype=a.dtype, device=a.device)
            v = math.sqrt(self.tau) * noise
        else:
            v = p.stiff.sample(len(a), self.tau, generator=generator)
        return torch.cat((v * torch.exp(p.log_width(a)), a), 1)
