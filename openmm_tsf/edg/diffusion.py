"""The noise of the encoder: a variance-preserving diffusion of the latents, and a clock for integrals over its time.

    dz = -beta z/2 dt + sqrt(beta) dW,    t in [0, 1],    Lambda = integral of beta,
    z_t = a z_0 + sigma eps,    a = exp(-Lambda/2),    sigma^2 = 1 - exp(-Lambda).

Integrals over t have an integrand that is large where sigma is as small as the width of the latents' posterior, and
that dies out as a^2 at late times. The clock is the u in [0, 1] with a = c tanh(y), c^2 = 1 + finest^2, and y falling
evenly with u: its times are even in ln(sigma^2 + finest^2) at the start and thin out as a at the end. With u uniform,
an integrand that grows no faster than 1/(sigma^2 + finest^2) keeps a bounded estimator as t goes to 0, and so does one
that falls as a at late times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from openmm_tsf.typing import Scalars, Vectors

Times = Float[Tensor, "*batch"]


@dataclass(frozen=True)
class VariancePreserving:
    """Ornstein-Uhlenbeck noise with a rate that rises linearly; N(0, I) is stationary.

    Args:
        beta_min, beta_max: rates at t = 0 and t = 1.
        finest: width of the noise below which times are no longer told apart by the clock.

    Raises:
        ValueError: not 0 < beta_min <= beta_max, or `finest` not between 0 and 1.

    Source: Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, arXiv 2011.13456; the clock is our own.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    finest: float = 0.03

    def __post_init__(self) -> None:
        if not 0.0 < self.beta_min <= self.beta_max < math.inf:
            raise ValueError(f"need 0 < beta_min <= beta_max, not {self.beta_min:g} and {self.beta_max:g}")
        if not 0.0 < self.finest < 1.0:
            raise ValueError(f"finest must be between 0 and 1, not {self.finest:g}")

    def rate(self, t: Times) -> Times:
        """beta = g^2."""
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def integral(self, t: Times) -> Times:
        """Lambda."""
        return t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    @property
    def total(self) -> float:
        """Lambda at t = 1."""
        return 0.5 * (self.beta_min + self.beta_max)

    def scale(self, t: Times) -> Times:
        """a: what is left of z_0."""
        return torch.exp(-0.5 * self.integral(t))

    def width(self, t: Times) -> Times:
        """sigma: standard deviation of the noise."""
        return torch.sqrt(-torch.expm1(-self.integral(t)))

    def perturbed(self, z0: Vectors, t: Scalars, eps: Vectors) -> Vectors:
        """z_t (B, d) of latents z_0 (B, d) at times (B,) with standard normal noise eps (B, d)."""
        return self.scale(t)[:, None] * z0 + self.width(t)[:, None] * eps

    def times(self, u: Times) -> tuple[Times, Times]:
        """Times t of clock readings u in [0, 1], and (g^2/2) dt/du there.

        The integral of (g^2/2) h(t) dt is the mean of h times the second over uniform u.
        """
        first, last, c = self._ends()
        y = first + (last - first) * u.double()
        square = ((c / torch.cosh(y)) ** 2 - self.finest**2).clamp(0.0, 1.0)  # sigma^2, without cancellation
        lost = -torch.log1p(-square)
        slope = self.beta_max - self.beta_min
        t = 2.0 * lost / (self.beta_min + torch.sqrt(self.beta_min**2 + 2.0 * slope * lost))
        weight = 2.0 * (first - last) / torch.sinh(2.0 * y)
        return t.clamp(max=1.0).to(u), weight.to(u)

    def clock(self, t: Times) -> Times:
        """Readings u of times t, the inverse of `times`."""
        first, last, c = self._ends()
        return ((torch.atanh(self.scale(t.double()) / c) - first) / (last - first)).to(t)

    def _ends(self) -> tuple[float, float, float]:
        """y at t = 0 and at t = 1, and c."""
        c = math.sqrt(1.0 + self.finest**2)
        return math.atanh(1.0 / c), math.atanh(math.exp(-0.5 * self.total) / c), c
