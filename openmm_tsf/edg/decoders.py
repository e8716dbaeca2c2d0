"""From latents to configurations: x | z is a Gaussian with a diagonal covariance, made by a network or by dynamics."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from openmm_tsf.checks import positive
from openmm_tsf.edg.networks import (
    Features,
    Latents,
    Target,
    leading,
    log_normal,
    slope,
    with_harmonics,
    with_temperature,
)
from openmm_tsf.nets import perceptron
from openmm_tsf.typing import Scalars, Vectors

LARGEST_LOG_WIDTH = 8.0
"""Networks cannot make widths larger or smaller than exp of this times the one that they start with."""


@dataclass(frozen=True, eq=False)
class Conditional:
    """x | z of a batch of latents: independent Gaussians of every component.

    Args:
        mean: (B, d).
        log_width: (B, d), ln of the standard deviations.
    """

    mean: Vectors
    log_width: Vectors

    def sample(self, eps: Vectors) -> Vectors:
        """x (B, d) of standard normal numbers (B, d); differentiable."""
        return self.mean + self.log_width.exp() * eps

    def log_prob(self, x: Vectors) -> Scalars:
        """ln p(x | z) (B,) [nat]."""
        eps = (x - self.mean) * torch.exp(-self.log_width)
        return log_normal(eps, self.log_width)

    @property
    def entropy(self) -> Scalars:
        """-E[ln p(x | z)] (B,) [nat]."""
        return (self.log_width + 0.5 * math.log(2.0 * math.pi * math.e)).sum(1)


@runtime_checkable
class Decoder(Protocol):
    """What a generator asks of a decoder. `n_slopes` is the number of gradients of the target that a draw costs."""

    latent_dim: int
    dim: int
    conditioned: bool
    n_slopes: int

    def conditional(self, z: Latents, tau: Scalars | None = None) -> Conditional: ...


class GaussianDecoder(nn.Module):
    """A perceptron of the latents: x = spread (z + f(z)) + w(z) xi, xi ~ N(0, I).

    Args:
        latent_dim, dim: numbers of latents and of components; components beyond the latents start without them.
        hidden, depth: of the perceptron.
        spread: standard deviation of x at the start, in the unit of x; about that of the target when heated up.
        width: at the start, in units of `spread`; components beyond the latents start as wide as `spread`.
        harmonics: of the latents, see `with_harmonics`.
        conditioned: whether ln tau is an input; widths then grow as sqrt(tau) before the network corrects them.
    """

    n_slopes = 0

    def __init__(
        self, latent_dim: int, dim: int, *, hidden: int = 128, depth: int = 3, spread: float = 1.0, width: float = 0.3,
        harmonics: int = 0, conditioned: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.latent_dim, self.dim, self.conditioned = latent_dim, dim, conditioned
        self.spread, self.harmonics = positive("spread", spread), harmonics
        widths = torch.full((dim,), self.spread, dtype=torch.float64)
        widths[:latent_dim] *= positive("width", width)
        self.register_buffer("log_width", widths.log(), persistent=False)
        n = latent_dim * (1 + 2 * harmonics) + conditioned
        self.net = perceptron(n, 2 * dim, hidden=hidden, depth=depth)

    def conditional(self, z: Latents, tau: Scalars | None = None) -> Conditional:
        """x | z of latents (B, d_z) at temperatures (B,)."""
        features = with_temperature(with_harmonics(z, self.harmonics), tau, conditioned=self.conditioned)
        shift, change = self.net(features).chunk(2, 1)
        log_width = self.log_width + bounded(change)
        if self.conditioned:
            log_width = log_width + 0.5 * tau.log()[:, None]
        return Conditional(self.spread * (leading(z, self.dim) + shift), log_width)


class HamiltonianDecoder(nn.Module):
    """Generalised Hamiltonian dynamics of the target, stage by stage, and a step of Langevin dynamics at the end.

    From y = spread (z + f(z)), each stage gives itself a fresh velocity v = M z + r(z) and takes leapfrog steps

        v <- v - [(h_l/2) grad u(y) * exp(Q_v/2)] - (h_l/2) T_v,    Q_v, T_v of (y, l)
        y <- y + h_l (v * exp(Q_y) + T_y),                          Q_y, T_y of (v, l)
        v <- v - [(h_l/2) grad u(y) * exp(Q_v/2)] - (h_l/2) T_v

    with u = U/tau. In the end x = y - [h grad u(y)] + sqrt(2 h) xi, xi ~ N(0, I). The kick that ends a stage is left
    out: its velocity goes nowhere. So a draw costs stages * leaps + 1 gradients of u; training needs as many products
    with its Hessian.

    Two things keep the dynamics stable. Time steps are h_l = sqrt(tau) e_l and h = tau e with learned e_l and e (d,):
    a force then moves x as far as at tau = 1, and steps that are stable in a target heated up a hundred times stay so
    as it cools down. And [.] tames forces: what moves x by less than `spread` is as it was, but no more than that is
    ever moved. Without it, a plain step throws draws from the steep outskirts of the target (x^4, or a hard core) still
    farther out, and the next gradient overflows.

    Args:
        target: U.
        dim: of x.
        stages: of the dynamics; 0 leaves the Langevin step alone.
        leaps: leapfrog steps of a stage.
        latent_dim: number of latents; by default `dim`.
        step: e_l and e at the start, in units where U of curvature 1 has the period 2 pi.
        hidden, depth: of the networks.
        spread: standard deviation of y at the start, and the farthest that a force moves a component at once.
        harmonics: of the latents, for what the dynamics start from; see `with_harmonics`.
        conditioned: whether ln tau is an input of the networks.

    Source: Wang, Guo, Wu, Zhou, arXiv 2401.02080, where e_l = e0 exp(e0 eps_l) for any tau, Q has a factor e0, and
    nothing is tamed; scaled leapfrog steps: Levy, Hoffman, Sohl-Dickstein, arXiv 1711.09268; tamed forces: Brosse,
    Durmus, Moulines, Sabanis, arXiv 1710.05559.
    """

    def __init__(
        self, target: Target, dim: int, stages: int, *, leaps: int = 1, latent_dim: int | None = None,
        step: float = 0.05, hidden: int = 64, depth: int = 2, spread: float = 1.0, harmonics: int = 0,
        conditioned: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if stages < 0 or leaps < 1:
            raise ValueError(f"need stages >= 0 of at least 1 leapfrog step, not {stages} of {leaps}")
        self._target = (target,)  # a tuple hides it, and what parameters it may have, from the module's
        self.dim, self.stages, self.leaps = dim, stages, leaps
        self.conditioned, self.latent_dim, self.n_slopes = conditioned, latent_dim or dim, stages * leaps + 1
        self.spread, size = positive("spread", spread), {"hidden": hidden, "depth": depth}
        self.harmonics, n = harmonics, self.latent_dim * (1 + 2 * harmonics) + conditioned
        self.start = perceptron(n, dim * (1 + stages), **size)
        self.mixing = nn.Parameter(torch.randn(stages, self.latent_dim, dim) / math.sqrt(self.latent_dim))
        self.kicks = nn.ModuleList(perceptron(dim + conditioned, 2 * dim, **size) for _ in range(stages))
        self.drifts = nn.ModuleList(perceptron(dim + conditioned, 2 * dim, **size) for _ in range(stages))
        self.log_steps = nn.Parameter(torch.full((stages,), math.log(positive("step", step))))
        self.log_step = nn.Parameter(torch.full((dim,), math.log(step)))

    def __deepcopy__(self, memo: dict[int, Any]) -> HamiltonianDecoder:
        """Copies share the target: it may count its calls, or hold a simulation."""
        memo[id(self.target)] = self.target
        new = memo[id(self)] = self.__class__.__new__(self.__class__)
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    @property
    def target(self) -> Target:
        """U."""
        return self._target[0]

    def conditional(self, z: Latents, tau: Scalars | None = None) -> Conditional:
        """x | z of latents (B, d_z) at temperatures (B,)."""
        shift, *velocities = self.start(self._input(with_harmonics(z, self.harmonics), tau)).chunk(1 + self.stages, 1)
        y = self.spread * (leading(z, self.dim) + shift)
        heat = z.new_ones(1, 1) if tau is None else tau[:, None]
        g = slope(self.target, y, tau)
        for stage, velocity in enumerate(velocities):
            h = heat.sqrt() * self.log_steps[stage].exp()
            v = velocity + z @ self.mixing[stage] - self._half_kick(y, g, h, stage, tau)
            for leap in range(self.leaps):
                if leap:  # two half kicks at the same place
                    v = v - 2.0 * self._half_kick(y, g, h, stage, tau)
                q, t = self.drifts[stage](self._input(v, tau)).chunk(2, 1)
                y = y + h * (v * bounded(q).exp() + t)
                g = slope(self.target, y, tau)
        h = heat * self.log_step.exp()
        return Conditional(y - tamed(h * g, self.spread), (0.5 * (2.0 * h).log()).expand_as(y))

    def _half_kick(self, y: Vectors, g: Vectors, h: Tensor, stage: int, tau: Scalars | None) -> Vectors:
        """What half a time step h takes from the velocity."""
        q, t = self.kicks[stage](self._input(y / self.spread, tau)).chunk(2, 1)
        return tamed(0.5 * h * g * torch.exp(0.5 * bounded(q)), self.spread / h) + 0.5 * h * t

    def _input(self, z: Vectors, tau: Scalars | None) -> Features:
        return with_temperature(z, tau, conditioned=self.conditioned)


def bounded(x: Tensor) -> Tensor:
    """x where it is small, and never beyond +-LARGEST_LOG_WIDTH; smooth."""
    return LARGEST_LOG_WIDTH * torch.tanh(x / LARGEST_LOG_WIDTH)


def tamed(x: Tensor, most: Tensor | float) -> Tensor:
    """x where it is much smaller than `most`, and never beyond +-most; smooth, and finite where x is."""
    share = x / most
    return x / torch.hypot(share, torch.ones_like(share))
