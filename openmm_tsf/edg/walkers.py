"""Walkers at equilibrium with the target, of which a generator learns besides its own draws.

The bound of `bound` weighs what a generator draws. What it draws too rarely costs next to nothing there, though the
weights of such draws are what the effective sample size dies of. In the opposite divergence they cost most,

    KL(pi p_E || p_D) = E[ln w] - ln Z,    w(x, z) = exp(-U(x)) p_E(z|x)/[p_D(z) p_D(x|z)],    x ~ pi, z ~ p_E(z|x),

p_E being the Gaussian base of the encoder, whose density and draws have a closed form. It needs x ~ pi, and walkers
have them from the energy alone. Hamiltonian Monte Carlo moves each; and each is offered a draw of the generator, which
it takes with probability min(1, w(draw)/w(walker)), so that walkers share modes as the target does, whatever lies
between. Both leave exp(-U) p_E(z|x) as it is for a generator that stays as it is. Walkers start hot and cool down with
the target: draws at its own temperature have let go of rare basins already, and dynamics seldom find them again.

E[ln w] is at least ln Z with walkers at equilibrium, as it is at most ln Z over the generator's draws.

Sources: Gabrie, Rotskoff, Vanden-Eijnden, arXiv 2105.12603 (a map learned of walkers that it moves); Noe, Olsson,
Koehler, Wu, arXiv 1812.01729 (both divergences at once).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from openmm_tsf.edg.generator import EDG
from openmm_tsf.edg.networks import Latents, Target, at_temperatures, log_normal
from openmm_tsf.edg.pair_score import PairScore
from openmm_tsf.typing import Mask, Scalars, Vectors

Weights = Float[Tensor, " walkers"]
"""ln w of walkers, of whom there may be fewer than draws."""

ACCEPTED = 0.8
"""Share of trajectories that step sizes are adapted to."""
FIRST_STEP = 0.02
"""Step size at the start, in standard deviations of the walkers."""
ADAPTATION = 0.3
"""What ln of the step size gains each time, in units of the share accepted above `ACCEPTED`."""
FAR = 30.0
"""Walkers whose ln w is so far above the median are not learned from: the encoder has not found their latents."""


class Walkers:
    """Configurations on their way.

    Args:
        x: (W, d) where they start.
        step: of their trajectories; by default a share of how far they are apart.
    """

    def __init__(self, x: Vectors, step: float | None = None) -> None:
        self.x = x
        self.step = FIRST_STEP * float(x.std(0).mean()) if step is None else step

    def move(self, target: Target, trajectory: int, *, tau: float = 1.0, generator: torch.Generator) -> Scalars:
        """A trajectory of so many leapfrog steps each at temperature tau, and the test of Metropolis; the reduced
        energy (W,) of where they are.

        Step sizes are between half of `step` and one and a half, each walker's own.
        """
        x, p = self.x, _normal(self.x, generator)
        h = self.step * (0.5 + _uniform(x, generator))[:, None]
        before, slope = _energy_and_slope(target, x, tau)
        start = before + 0.5 * p.square().sum(1)
        for _ in range(trajectory):
            p = p - 0.5 * h * slope
            x = x + h * p
            energy, slope = _energy_and_slope(target, x, tau)
            p = p - 0.5 * h * slope
        chance = torch.exp(start - energy - 0.5 * p.square().sum(1)).nan_to_num(0.0)  # NaN is where no energy is
        taken = _uniform(x, generator) < chance
        self.x = torch.where(taken[:, None], x, self.x)
        self.step *= math.exp(ADAPTATION * (float(taken.float().mean()) - ACCEPTED))
        return torch.where(taken, energy, before)

    def offer(self, x: Vectors, log_weights: Scalars, own: Weights, *, generator: torch.Generator) -> None:
        """Offer draws x (B, d) of ln w (B,) to walkers of ln w (W,), the first to the first, as far as there are any.

        Walkers whose ln w is NaN stay where they are.
        """
        n = min(len(x), len(self.x))
        chance = torch.exp(log_weights[:n] - own[:n])
        taken = _uniform(chance, generator) < chance
        self.x = torch.cat((torch.where(taken[:, None], x[:n], self.x[:n]), self.x[n:]))


def log_density(edg: EDG, x: Vectors, noise: Latents, tau: float = 1.0) -> Scalars:
    """ln p_D(z) p_D(x|z)/p_E(z|x) (B,) of x (B, d) at temperature tau, z ~ p_E from N(0, I) noise (B, d_z), which is
    differentiable; of decoders of pairs its limit for narrow widths, and NaN where they have no z."""
    if isinstance(edg.score, PairScore):
        return edg.score.log_density(x)
    taus = x.new_full((len(x),), tau)
    given = edg.score.given(x, taus)
    z = given.latents(noise)
    return log_normal(z) + edg.decoder.conditional(z, taus).log_prob(x) - given.log_prob(z)


def learn_from(
    edg: EDG, x: Vectors, energy: Scalars, *, tau: float = 1.0, generator: torch.Generator
) -> tuple[Tensor, Scalars]:
    """What the opposite divergence is of walkers x (W, d) with reduced energies (W,) at temperature tau, as a scalar to
    lower, and ln w (W,) of each; see `FAR`."""
    density = log_density(edg, x, _normal(x.new_empty(len(x), edg.latent_dim), generator), tau)
    log_weights = -energy - density.detach()
    return -density[near(log_weights)].mean(), log_weights


def near(log_weights: Scalars) -> Mask:
    """Which of walkers with ln w (W,) are learned from: not those with NaN, nor those `FAR` above the median."""
    return log_weights <= log_weights.nanmedian() + FAR


def _energy_and_slope(target: Target, x: Vectors, tau: float) -> tuple[Scalars, Vectors]:
    with torch.enable_grad():
        here = x.detach().requires_grad_()
        energy = at_temperatures(target, here, here.new_full((len(here),), tau))
        (slope,) = torch.autograd.grad(energy.sum(), here)
    return energy.detach().to(x), slope


def _normal(like: Vectors, generator: torch.Generator) -> Vectors:
    return torch.randn(like.shape, generator=generator, device=generator.device).to(like)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """One number in (0, 1) for each row, in the dtype of the rows."""
    return torch.rand(len(like), generator=generator, device=generator.device).to(like)
