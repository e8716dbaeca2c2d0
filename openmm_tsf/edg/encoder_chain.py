"""The encoder as a chain of steps, which weighs draws without an equation: exact, at the price of a score a step.

At times 0 = t_0 < ... < t_K = 1 the diffusion is z_{i+1} = alpha z_i + beta eps with alpha = a_{i+1}/a_i and beta^2 =
1 - alpha^2, and the way back, from z_K ~ N(0, I), is

    z_i | z_{i+1}, x ~ N((z_{i+1} + beta^2 s)/alpha, beta^2 w_i^2/w_{i+1}^2),    s = s(z_{i+1}, x, t_{i+1}).

The mean is Tweedie's; the widths are those of the Gaussian that is the base of the score, for which both are exact.
With the noise of a path z_1 ... z_K that starts from z_0,

    R = N(z_K; 0, I) prod p(z_i|z_{i+1}, x) / prod q(z_{i+1}|z_i)

has a mean that is a density of z_0 given x, for any score and any number of steps: R may stand for p_E(z_0|x) in a
weight, whose mean remains Z. The mean of ln R, and the bound of ln Z with it, tends to what `bound` estimates as steps
become many. The equation of `encoder_ode` knows p_E without that noise, but needs a derivative for every latent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmm_tsf.checks import whole
from openmm_tsf.edg.encoder_ode import EncoderPaths, check_pairs
from openmm_tsf.edg.generator import EDG
from openmm_tsf.edg.networks import Latents, log_normal
from openmm_tsf.edg.scores import Given
from openmm_tsf.typing import Scalars, Vectors


@torch.no_grad()
def chain_paths(
    edg: EDG, z0: Latents, x: Vectors, steps: int, *, tau: Scalars | None = None, generator: torch.Generator
) -> EncoderPaths:  # fmt: skip
    """Diffuse latents to t = 1 in steps that are even on the clock; `log_prob` is ln R.

    Args:
        edg: the generator.
        z0, x: (B, d_z) and (B, d).
        steps: K.
        tau: (B,) temperatures, of generators that are conditioned on them.
        generator: of the noise.

    Raises:
        ValueError: no step, or as in `encoder_ode.encoder_paths`.
    """
    check_pairs(edg, z0, x)
    chain = _Chain(edg, edg.score.given(x, tau), steps)
    z, log_ratio = z0, torch.zeros_like(z0[:, 0])
    for i in range(steps):
        alpha, beta = chain.noise(i)
        eps = _normal(z, generator)
        z, before = alpha * z + beta * eps, z
        mean, width = chain.back(z, i)
        n = chain.given.along_axes(before - mean) / width
        log_ratio = log_ratio + log_normal(n, width.log()) - log_normal(eps, beta.log())
    return EncoderPaths(log_ratio + log_normal(z), z0, z, steps)


@torch.no_grad()
def chain_sample(
    edg: EDG, x: Vectors, steps: int, *, tau: Scalars | None = None, generator: torch.Generator
) -> EncoderPaths:  # fmt: skip
    """Paths of the chain, one for each x, from t = 1 to z_0; arguments and errors as in `chain_paths`."""
    chain = _Chain(edg, edg.score.given(x, tau), steps)
    end = z = _normal(chain.given.mean, generator)
    log_ratio = log_normal(z)
    for i in reversed(range(steps)):
        alpha, beta = chain.noise(i)
        mean, width = chain.back(z, i)
        eps = _normal(z, generator)
        after, z = z, mean + chain.given.from_axes(width * eps)
        log_ratio = log_ratio + log_normal(eps, width.log()) - log_normal((after - alpha * z) / beta, beta.log())
    return EncoderPaths(log_ratio, z, end, steps)


class _Chain:
    """Times of the steps, noise on the way there and Gaussians on the way back."""

    def __init__(self, edg: EDG, given: Given, steps: int) -> None:
        whole("the number of steps of a chain", steps)
        self.edg, self.given = edg, given
        clock = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64, device=given.x.device)
        self.t = edg.diffusion.times(clock)[0].to(given.x)
        self.integral = edg.diffusion.integral(self.t)

    def noise(self, i: int) -> tuple[Tensor, Latents]:
        """alpha () and beta (B, d_z) of step i."""
        lost = self.integral[i + 1] - self.integral[i]
        return torch.exp(-0.5 * lost), torch.sqrt(-torch.expm1(-lost)).expand_as(self.given.mean)

    def back(self, z: Latents, i: int) -> tuple[Latents, Latents]:
        """Mean of z_i given z_{i+1}, and width along the axes, (B, d_z)."""
        before, after = (self.t[j].expand(len(z)) for j in (i, i + 1))
        parts = self.edg.score.parts(z, self.given, after)
        alpha, beta = self.noise(i)
        narrow, wide = (self.given.frame(self.edg.diffusion, t)[1] for t in (before, after))
        return (z + beta.square() * (parts.base + parts.correction)) / alpha, beta * narrow / wide


def _normal(like: Latents, generator: torch.Generator) -> Latents:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=generator.device).to(like.device)
