"""A flow on plain vectors as a proposal of Metropolis steps, with momenta or without."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .geometry import wrap
from .typing import Mask, Samplable, Scalars, Transform, Vectors


@dataclass(frozen=True, eq=False)
class VectorFlow:
    """A latent density and a map G of it to vectors y = (x, p), the last `n_momenta` of which are momenta.

    Nothing is asked of the Jacobian: steerable flows and others are as good, and as exact.

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
    def latent_scale(self) -> Tensor:
        """(D,) widths of a unit step of the latent walk; a single one without circles."""
        width = torch.tensor([math.sqrt(self.tau)])
        return width if self.circular is None else torch.where(self.circular, 1.0, width)

    @torch.no_grad()
    def propose(self, n: int, *, generator: torch.Generator) -> tuple[Vectors, Scalars, Mask]:
        """n draws x (n, d), ln q(x, p) - ln N(p; 0, tau) [nat], and which are finite."""
        z, log_prob = self.prior.sample(n, generator=generator)
        y, log_det = self.transform.forward(z)
        x, log_momenta = self._parted(y)
        return x, log_prob - log_det - log_momenta, torch.isfinite(y).all(1)

    @torch.no_grad()
    def score(self, x: Vectors, *, generator: torch.Generator) -> Scalars:
        """ln q(x, p) - ln N(p; 0, tau) [nat] of x (n, d), with fresh p."""
        y, log_momenta = self._joined(x, generator)
        z, log_det = self.transform.inverse(y)
        return torch.nan_to_num(self.prior.log_prob(z) + log_det - log_momenta, nan=-math.inf)

    @torch.no_grad()
    def to_latents(self, x: Vectors, *, generator: torch.Generator) -> tuple[Tensor, Scalars]:
        """z (n, D) of x (n, d) with fresh p, and ln|det dG(z)| + ln N(p; 0, tau)."""
        y, log_momenta = self._joined(x, generator)
        z, log_det = self.transform.inverse(y)
        return z, torch.nan_to_num(log_momenta - log_det, nan=-math.inf)

    @torch.no_grad()
    def from_latents(self, z: Vectors) -> tuple[Tensor, Scalars, Mask]:
        """x (n, d) of z (n, D), ln|det dG(z)| + ln N(p; 0, tau), and which are finite."""
        y, log_det = self.transform.forward(z if self.circular is None else torch.where(self.circular, wrap(z), z))
        x, log_momenta = self._parted(y)
        return x, log_det + log_momenta, torch.isfinite(y).all(1)

    def _parted(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """x of y = (x, p), and ln N(p; 0, tau)."""
        split = y.shape[1] - self.n_momenta
        return y[:, :split], self._log_normal(y[:, split:])

    def _joined(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        noise = torch.randn(len(x), self.n_momenta, generator=generator, dtype=x.dtype, device=generator.device)
        p = math.sqrt(self.tau) * noise.to(x)
        return torch.cat((x, p), 1), self._log_normal(p)

    def _log_normal(self, p: Tensor) -> Tensor:
        return -0.5 * (p * p).sum(1) / self.tau - 0.5 * self.n_momenta * math.log(2.0 * math.pi * self.tau)
