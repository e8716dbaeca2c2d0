"""The encoder's score for a decoder of pairs: the decoder run backwards.

Its base is Laplace's approximation of the decoder's own posterior. Stages undone one by one guess the latents m that f
takes to x, and damped Newton steps

    m <- m + J^-1 (x - f(m)),    J = df/dz,

find them. There f(z) + w xi is as good as linear, which makes z given x a Gaussian of precision P = 1 + J^T J/w^2
around m - P^-1 m. Nothing of this is learned: the encoder is right for whatever the decoder has become. The narrower w
is, the less the decoder bends within a width, and the better the approximation, so that it needs no correction. Where
Newton steps do not get to x, w grows by what is left, as a root of squares.

In the limit of w = 0 the decoder has the density ln N(m; 0, I) - ln|det J|, which is what training takes.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from openmm_tsf.edg.diffusion import VariancePreserving
from openmm_tsf.edg.networks import Latents, log_normal
from openmm_tsf.edg.pairs import Matrices, PairDecoder
from openmm_tsf.edg.scores import Given, Parts
from openmm_tsf.typing import Scalars, Vectors

LONGEST = 1.0
"""Norm of a step beyond which it is not believed: it never gets longer."""
DAMPING = 1e-8
"""Added to J^T J, as a share of its mean eigenvalue."""
ROWS = 64
"""Posteriors made at once: matrices of pairs of more of them are slow to allocate."""
IN_TRAINING = 2
"""Newton steps in training, which leaves out what they do not find."""
FOUND = 0.01
"""Distance of f(m) and x, in units of the decoder's spread, up to which training takes m for the latents of x."""


class PairScore(nn.Module):
    """s = -V diag(1/w_t) n.

    Args:
        decoder: of the generator; it stays the decoder's; the score has no parameters of its own.
        diffusion: of the encoder.
        repeats: of each stage on the way back; see `PairDecoder.backwards`.
        refinements: Newton steps, at least one, each with its own J.
    """

    corrected = False

    def __init__(
        self, decoder: PairDecoder, diffusion: VariancePreserving, *, repeats: int = 4, refinements: int = 4
    ) -> None:
        super().__init__()
        self._decoder = (decoder,)  # a tuple hides it from the module's parameters
        self.latent_dim, self.dim, self.diffusion = decoder.latent_dim, decoder.dim, diffusion
        self.repeats, self.refinements = repeats, refinements

    @torch.no_grad()
    def given(self, x: Vectors, tau: Scalars | None = None) -> Given:
        """What is needed of x (B, d); without derivatives."""
        mean, log_width, axes = map(torch.cat, zip(*(self._posterior(some) for some in x.split(ROWS)), strict=True))
        return Given(x, x[:, :0], mean, log_width, tau, axes)

    def _posterior(self, x: Vectors) -> tuple[Latents, Latents, Matrices]:
        """Mean, ln of widths, and axes of Laplace's approximation."""
        decoder = self._decoder[0]
        m = self.latents(x, self.refinements)
        centre, matrix = decoder.centre_and_jacobian(m)
        square = math.exp(2.0 * decoder.log_width) + (x - centre).square().mean(1, keepdim=True)
        scaled = (matrix / square.sqrt()[..., None]).double()
        values, axes = (v.to(m) for v in torch.linalg.eigh(_square(scaled) + torch.eye(m.shape[1]).to(scaled)))
        mean = m - (axes @ ((m[:, None] @ axes)[:, 0] / values)[..., None])[..., 0]
        return mean, -0.5 * values.log(), axes

    def latents(self, x: Vectors, refinements: int) -> Latents:
        """m (B, d) of x (B, d); the last Newton step makes it differentiable by the decoder's parameters."""
        decoder = self._decoder[0]
        with torch.no_grad():
            m = decoder.backwards(x, self.repeats)
            for _ in range(refinements - 1):
                centre, matrix = decoder.centre_and_jacobian(m)
                m = m + _step(matrix, x - centre)
            _, matrix = decoder.centre_and_jacobian(m)
        return m + _step(matrix, x - decoder.centre(m))

    def log_density(self, x: Vectors) -> Scalars:
        """ln N(m; 0, I) - ln|det J| (B,) of x (B, d), differentiable; NaN where Newton steps do not get to x."""
        decoder = self._decoder[0]
        m = self.latents(x, IN_TRAINING)
        centre, log_det, _ = decoder.centre_and_log_det(m)
        found = (centre - x).detach().norm(dim=1) < FOUND * decoder.spread
        return torch.where(found, log_normal(m) - log_det, torch.nan)

    def parts(self, z: Latents, given: Given, t: Scalars) -> Parts:
        """The score of latents z (B, d) at times (B,)."""
        centre, width = given.frame(self.diffusion, t)
        score = -given.from_axes(given.along_axes(z - centre) / width.square())
        return Parts(score, -width.pow(-2).sum(1), torch.zeros_like(score))


def _square(matrix: Matrices) -> Matrices:
    """J^T J."""
    return matrix.transpose(1, 2) @ matrix


def _step(matrix: Matrices, miss: Vectors) -> Latents:
    """About J^-1 (x - f(m)): damped where J is singular, and never longer than `LONGEST`."""
    j = matrix.double()
    square = _square(j)
    least = DAMPING * square.diagonal(dim1=1, dim2=2).mean(1)
    root = torch.linalg.cholesky(square + least[:, None, None] * torch.eye(j.shape[1]).to(j))
    step = torch.cholesky_solve(j.transpose(1, 2) @ miss.double()[..., None], root)[..., 0].to(miss)
    return step / (1.0 + step.square().sum(1, keepdim=True) / LONGEST**2).sqrt()
