"""The encoder's score: s(z, x, t), a model of grad_z ln p_D(z_t | x).

Each form is the sum of a base and a correction. The base is the score of a Gaussian N(m, w^2) of z_0 carried along the
diffusion,

    -n / w_t,    n = (z - a m) / w_t,    w_t^2 = a^2 w^2 + sigma^2,

which is -z for m = 0, w = 1. Where the Gaussian has axes V of its own, n is V^T (z - a m)/w_t and the score -V n/w_t;
the diffusion, which knows no directions, leaves them as they are. What depends on x alone is computed once, by
`given`, for all the latents and times that go with an x.

    plain     s = -z + (1 - t) s'
    energy    s = -z + (1 - t) grad_z ln p_D(x|z) + t (1 - t) s'
    gaussian  s = -(n + a s') / w_t    with networks m(x) and w(x)

The second is (1 - t) grad_z [ln p_D(x|z) + ln p_D(z)] + t grad ln p_D(z_T) + t (1 - t) s', both densities of z being
N(0, I). The third, ours, has a correction in the unit of length of its base, which fades with the memory a of z_0 as
in theory. Without s' it makes of the encoder the Gaussian one of a variational autoencoder.

Source of the first two: Wang, Guo, Wu, Zhou, arXiv 2401.02080.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from openmm_tsf.checks import positive
from openmm_tsf.edg.decoders import Decoder, bounded
from openmm_tsf.edg.diffusion import VariancePreserving
from openmm_tsf.edg.networks import (
    TIME_FEATURES,
    Features,
    Latents,
    log_normal,
    time_features,
    with_harmonics,
    with_temperature,
)
from openmm_tsf.nets import perceptron
from openmm_tsf.typing import Scalars, Vectors


class Given(NamedTuple):
    """What a score knows of each x.

    Args:
        x: (B, d).
        features: (B, k) what the correction reads of x and of its temperature.
        mean, log_width: (B, d_z) m and ln w of the base.
        tau: (B,) temperatures, where given.
        axes: (B, d_z, d_z) orthonormal columns, along which the base has its widths; None for those of the latents.
    """

    x: Vectors
    features: Features
    mean: Latents
    log_width: Latents
    tau: Scalars | None
    axes: Float[Tensor, "batch latents latents"] | None = None

    def repeated(self, n: int) -> Given:
        """All rows, n times over: (n B, ...)."""
        return Given(*(part if part is None else part.repeat(n, *[1] * (part.ndim - 1)) for part in self))

    def frame(self, diffusion: VariancePreserving, t: Scalars) -> tuple[Latents, Latents]:
        """a m, and w_t along the axes, (B, d_z) at times (B,)."""
        a, sigma = diffusion.scale(t)[:, None], diffusion.width(t)[:, None]
        return a * self.mean, torch.sqrt((a * self.log_width.exp()).square() + sigma.square())

    def latents(self, noise: Latents) -> Latents:
        """Draws of the base at t = 0, of N(0, I) noise (B, d_z)."""
        return self.mean + self.from_axes(self.log_width.exp() * self.along_axes(noise))

    def log_prob(self, z: Latents) -> Scalars:
        """ln of the base's density at t = 0 (B,) of latents (B, d_z)."""
        return log_normal(self.along_axes(z - self.mean) * torch.exp(-self.log_width), self.log_width)

    def along_axes(self, v: Latents) -> Latents:
        """Components of vectors (B, d_z) along the axes."""
        return v if self.axes is None else (v[:, None] @ self.axes)[:, 0]

    def from_axes(self, v: Latents) -> Latents:
        """Vectors (B, d_z) of components along the axes."""
        return v if self.axes is None else (self.axes @ v[..., None])[..., 0]


class Parts(NamedTuple):
    """A score in two parts.

    Args:
        base: (B, d_z).
        divergence: (B,) of the base.
        correction: (B, d_z).
    """

    base: Latents
    divergence: Scalars
    correction: Latents


@runtime_checkable
class Score(Protocol):
    """What a generator asks of a score. Without a correction the base is all there is, and the encoder a Gaussian."""

    latent_dim: int
    dim: int
    corrected: bool

    def given(self, x: Vectors, tau: Scalars | None = None) -> Given: ...

    def parts(self, z: Latents, given: Given, t: Scalars) -> Parts: ...


class PlainScore(nn.Module):
    """s = -z + (1 - t) s'(z, x, t): costs nothing but a network.

    Args:
        latent_dim, dim: numbers of latents and of components of x.
        diffusion: of the encoder.
        hidden, depth: of the network.
        spread: about the standard deviation of x.
        harmonics: of as many components of x as there are latents, see `with_harmonics`.
        conditioned: whether ln tau is an input.
    """

    corrected = True

    def __init__(
        self, latent_dim: int, dim: int, diffusion: VariancePreserving, *, hidden: int = 128, depth: int = 3,
        spread: float = 1.0, harmonics: int = 0, conditioned: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.latent_dim, self.dim, self.diffusion, self.conditioned = latent_dim, dim, diffusion, conditioned
        self.spread, self.harmonics = positive("spread", spread), harmonics
        n = latent_dim + dim + 2 * harmonics * min(latent_dim, dim) + TIME_FEATURES + conditioned
        self.net = perceptron(n, latent_dim, hidden=hidden, depth=depth)

    def given(self, x: Vectors, tau: Scalars | None = None) -> Given:
        """What is needed of x (B, d) at temperatures (B,)."""
        scaled = with_harmonics(x / self.spread, self.harmonics, self.latent_dim)
        features = with_temperature(scaled, tau, conditioned=self.conditioned)
        nothing = x.new_zeros(len(x), self.latent_dim)
        return Given(x, features, nothing, nothing, tau)

    def parts(self, z: Latents, given: Given, t: Scalars) -> Parts:
        """The score of latents z (B, d_z) at times (B,)."""
        correction = (1.0 - t)[:, None] * self.net(_input(z, given, t, self.diffusion))
        return Parts(-z, torch.full_like(t, -float(z.shape[1])), correction)


class EnergyScore(nn.Module):
    """s = -z + (1 - t) grad_z ln p_D(x|z) + t (1 - t) s'(z, x, t): exact at t = 0, at the price of a decoder's
    gradient, and of another of the target where the decoder runs dynamics; training then needs its third derivatives.

    Args:
        decoder: of the generator; it stays the decoder's, its parameters are not the score's.
        plain: the network s' in its plain form, and the rest of the arguments.
    """

    corrected = True

    def __init__(self, decoder: Decoder, plain: PlainScore) -> None:
        super().__init__()
        self.latent_dim, self.dim, self.plain = plain.latent_dim, plain.dim, plain
        self._decoder = (decoder,)  # a tuple hides it from the module's parameters

    def given(self, x: Vectors, tau: Scalars | None = None) -> Given:
        """What is needed of x (B, d) at temperatures (B,)."""
        return self.plain.given(x, tau)

    def parts(self, z: Latents, given: Given, t: Scalars) -> Parts:
        """The score of latents z (B, d_z) at times (B,)."""
        base, divergence, correction = self.plain.parts(z, given, t)
        force = (1.0 - t)[:, None] * self._slope(z, given)
        return Parts(base, divergence, force + t[:, None] * correction)

    def _slope(self, z: Latents, given: Given) -> Latents:
        """grad_z ln p_D(x|z)."""
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            here = z if z.requires_grad and again else z.detach().requires_grad_()
            log_prob = self._decoder[0].conditional(here, given.tau).log_prob(given.x)
            return torch.autograd.grad(log_prob.sum(), here, create_graph=again)[0]


class GaussianScore(nn.Module):
    """s = -(n + a s'(n, z, x, t))/w_t: a Gaussian posterior of the latents for each x, corrected.

    Args:
        latent_dim, dim: numbers of latents and of components of x.
        diffusion: of the encoder.
        hidden, depth: of the networks.
        features: numbers of x that the first network hands on to the correction.
        spread: about the standard deviation of x.
        harmonics: of as many components of x as there are latents, see `with_harmonics`.
        conditioned: whether ln tau is an input.
        corrected: False leaves s' out.
    """

    def __init__(
        self, latent_dim: int, dim: int, diffusion: VariancePreserving, *, hidden: int = 128, depth: int = 3,
        features: int = 16, spread: float = 1.0, harmonics: int = 0, conditioned: bool = False,
        corrected: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.latent_dim, self.dim, self.diffusion, self.harmonics = latent_dim, dim, diffusion, harmonics
        self.conditioned, self.corrected, self.spread = conditioned, corrected, positive("spread", spread)
        n = dim + 2 * harmonics * min(latent_dim, dim) + conditioned
        self.encoder = perceptron(n, 2 * latent_dim + features, hidden=hidden, depth=depth)
        n += 2 * latent_dim + features + TIME_FEATURES
        if corrected:
            self.net = perceptron(n, latent_dim, hidden=hidden, depth=depth)

    def given(self, x: Vectors, tau: Scalars | None = None) -> Given:
        """What is needed of x (B, d) at temperatures (B,)."""
        scaled = with_harmonics(x / self.spread, self.harmonics, self.latent_dim)
        plain = with_temperature(scaled, tau, conditioned=self.conditioned)
        mean, log_width, more = self.encoder(plain).tensor_split((self.latent_dim, 2 * self.latent_dim), 1)
        return Given(x, torch.cat((plain, more), 1), mean, bounded(log_width), tau)

    def parts(self, z: Latents, given: Given, t: Scalars) -> Parts:
        """The score of latents z (B, d_z) at times (B,)."""
        centre, width = given.frame(self.diffusion, t)
        n = (z - centre) / width
        if not self.corrected:
            return Parts(-n / width, -width.pow(-2).sum(1), torch.zeros_like(n))
        memory = self.diffusion.scale(t)[:, None]
        correction = -memory / width * self.net(torch.cat((n, _input(z, given, t, self.diffusion)), 1))
        return Parts(-n / width, -width.pow(-2).sum(1), correction)


def _input(z: Latents, given: Given, t: Scalars, diffusion: VariancePreserving) -> Features:
    return torch.cat((z, given.features, time_features(diffusion.clock(t))), 1)
