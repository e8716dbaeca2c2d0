"""A flow on plain vectors, with momenta or without: a density, and a proposal of Metropolis steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .geometry import wrap
from .typing import Mask, Samplable, Scalars, Transform, Vectors

Joint = Float[Tensor, "batch joint"]
"""Positions and momenta side by side, or their latents."""


def join_momenta(x: Vectors, n: int, tau: Scalars | float, generator: torch.Generator | None) -> tuple[Joint, Scalars]:
    """y = (x, p) of x (batch, d), with n fresh momenta p ~ N(0, tau), and ln N(p; 0, tau).

    Args:
        x: (batch, d).
        n: number of momenta.
        tau: temperature, one for all or (batch,).
        generator: of the momenta; only where there are some.

    Raises:
        ValueError: momenta without a generator.
    """
    if n == 0:
        return x, x.new_zeros(len(x))
    if generator is None:
        raise ValueError(f"this flow has {n} momenta, which are drawn anew: give a generator")
    noise = torch.randn(len(x), n, generator=generator, dtype=x.dtype, device=generator.device)
    y = torch.cat((x, torch.as_tensor(tau, dtype=x.dtype, device=x.device).sqrt().reshape(-1, 1) * noise.to(x)), 1)
    return y, part_momenta(y, n, tau)[1]


def part_momenta(y: Joint, n: int, tau: Scalars | float) -> tuple[Vectors, Scalars]:
    """x (batch, d) of y = (x, p), and ln N(p; 0, tau) of its n momenta; see `join_momenta`."""
    x, p = y.split((y.shape[1] - n, n), 1)
    tau = torch.as_tensor(tau, dtype=y.dtype, device=y.device)
    return x, -0.5 * (p * p).sum(1) / tau - 0.5 * n * (2.0 * math.pi * tau).log()


@dataclass(frozen=True, eq=False)
class VectorFlow:
    """A latent density and a map G of it to vectors y = (x, p), the last `n_momenta` of which are momenta.

    With momenta, densities of x are ln q(x, p) - ln N(p; 0, tau) with fresh p. Their weights are exact, but they are
    not the marginal density of x: `is_marginal` says so. Nothing is asked of the Jacobian: steerable flows and others
    are as good, and as exact.

    Args:
        prior: density of latents z (B, D) at the temperature wanted.
        transform: z (B, D) to y (B, D).
        tau: temperature; momenta are N(0, tau).
        n_momenta: number of momenta.
        circular: (D,) latents that live on the circle; none by default.
    """

    prior: Samplable
    transform: Transform
    tau: float = 1.0
    n_momenta: int = 0
    circular: Tensor | None = None

    @property
    def is_marginal(self) -> bool:
        """Whether `log_prob` is the density of x alone, the same number every time."""
        return self.n_momenta == 0

    @property
    def latent_scale(self) -> Tensor:
        """(D,) widths of a unit step of the latent walk; a single one without circles."""
        width = torch.tensor([math.sqrt(self.tau)], dtype=torch.float64)
        return width if self.circular is None else torch.where(self.circular, 1.0, width.to(self.circular.device))

    def log_prob(self, x: Vectors, *, generator: torch.Generator | None = None) -> Scalars:
        """ln q(x, p) - ln N(p; 0, tau) [nat] of x (n, d), with fresh p; differentiable.

        Raises:
            ValueError: momenta without a generator.
        """
        y, log_momenta = join_momenta(x, self.n_momenta, self.tau, generator)
        return self.joint_log_prob(y) - log_momenta

    def joint_log_prob(self, y: Joint) -> Scalars:
        """ln q(x, p) [nat] of y = (x, p), (n, D); differentiable."""
        z, log_det = self.transform.inverse(y)
        return self.prior.log_prob(z) + log_det

    @torch.no_grad()
    def propose(self, n: int, *, generator: torch.Generator) -> tuple[Vectors, Scalars, Mask]:
        """n draws x (n, d), ln q(x, p) - ln N(p; 0, tau) [nat], and which are finite."""
        z, log_prob = self.prior.sample(n, generator=generator)
        y, log_det = self.transform.forward(z)
        x, log_momenta = part_momenta(y, self.n_momenta, self.tau)
        return x, log_prob - log_det - log_momenta, torch.isfinite(y).all(1)

    @torch.no_grad()
    def score(self, x: Vectors, *, generator: torch.Generator | None = None) -> Scalars:
        """`log_prob` without its gradient, -inf where it is not a number."""
        return _without_nan(self.log_prob(x, generator=generator))

    @torch.no_grad()
    def to_latents(self, x: Vectors, *, generator: torch.Generator | None = None) -> tuple[Joint, Scalars]:
        """z (n, D) of x (n, d) with fresh p, and ln|det dG(z)| + ln N(p; 0, tau)."""
        y, log_momenta = join_momenta(x, self.n_momenta, self.tau, generator)
        z, log_det = self.transform.inverse(y)
        return z, _without_nan(log_momenta - log_det)

    @torch.no_grad()
    def from_latents(self, z: Joint) -> tuple[Vectors, Scalars, Mask]:
        """x (n, d) of z (n, D), ln|det dG(z)| + ln N(p; 0, tau), and which are finite."""
        y, log_det = self.transform.forward(z if self.circular is None else torch.where(self.circular, wrap(z), z))
        x, log_momenta = part_momenta(y, self.n_momenta, self.tau)
        return x, log_det + log_momenta, torch.isfinite(y).all(1)


def _without_nan(log_prob: Scalars) -> Scalars:
    return torch.where(log_prob.isnan(), -math.inf, log_prob)
