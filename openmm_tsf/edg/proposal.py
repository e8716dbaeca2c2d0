"""A generator as a proposal of Metropolis steps.

The density of x alone has no closed form, but that of x with its latents has. A step lives on both, with the target

    exp(-U(x)) p_E(z|x),

whose x are the ones wanted. Before a step the walker draws z ~ p_E(z|x), which leaves that target as it is, and the
proposal draws z and x | z. So ln p_D(z) + ln p_D(x|z) - ln p_E(z|x) stands where a flow has ln q(x), as with the
momenta of flows that have some. A latent walk moves v = (z, xi) of x = mean(z) + width(z) xi, which is one to one with
(z, x); its ln volume is ln p_E(z|x) + sum ln width(z).

Exact as far as the encoder's density is, that is to the solver's tolerance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from openmm_tsf.edg.decoders import Conditional
from openmm_tsf.edg.encoder_ode import encoder_paths, encoder_sample
from openmm_tsf.edg.generator import EDG
from openmm_tsf.edg.networks import Latents, log_normal
from openmm_tsf.typing import Mask, Scalars, Vectors

Joint = Float[Tensor, "batch joint"]
"""v = (z, xi): latents, and the noise of x given them."""


@dataclass(frozen=True, eq=False)
class EDGProposal:
    """A generator at one temperature, for `metropolis.independence_step` and `latent_step` on vectors.

    Args:
        edg: the generator.
        tau: temperature it runs at, as a multiple of that of training.
        rtol, atol: tolerances of the encoder's density.

    Raises:
        ValueError: a temperature that the generator does not know.
    """

    edg: EDG
    tau: float = 1.0
    rtol: float = 1e-4
    atol: float = 1e-4

    is_marginal = False

    def __post_init__(self) -> None:
        self.edg.at(self.tau)

    @property
    def latent_scale(self) -> Tensor:
        """(d_z + d,) ones."""
        return torch.ones(self.edg.latent_dim + self.edg.dim, dtype=self.edg.dtype)

    @torch.no_grad()
    def propose(self, n: int, *, generator: torch.Generator) -> tuple[Vectors, Scalars, Mask]:
        """n draws x (n, d), ln of their density with latents drawn along [nat], and which are finite."""
        conditional, x, z = self.edg.at(self.tau).decoded(n, generator=generator)
        log_prob_encoder, finite = self._log_prob_encoder(z, x)
        log_prob = log_normal(z) + conditional.log_prob(x) - log_prob_encoder
        return x, torch.where(finite, log_prob, -math.inf), finite

    @torch.no_grad()
    def score(self, x: Vectors, *, generator: torch.Generator | None = None) -> Scalars:
        """The same logarithm of x (n, d) [nat], with fresh latents; -inf where x is not finite."""
        _, log_prob = self._with_latents(x, generator)
        return log_prob

    @torch.no_grad()
    def to_latents(self, x: Vectors, *, generator: torch.Generator | None = None) -> tuple[Joint, Scalars]:
        """v (n, d_z + d) of x (n, d) with fresh latents, and its ln volume, -inf where x is not finite."""
        z, log_prob = self._with_latents(x, generator)
        conditional = self._conditional(z)
        xi = (x - conditional.mean) * torch.exp(-conditional.log_width)
        # from ln p(z) + ln p(x|z) - ln p_E(z|x), that of (z, xi) is left when ln N(z) and ln N(xi) are taken off
        volume = log_normal(z) + log_normal(xi) - log_prob
        return torch.cat((z, xi), 1), torch.where(log_prob > -math.inf, volume, -math.inf)

    @torch.no_grad()
    def from_latents(self, z: Joint) -> tuple[Vectors, Scalars, Mask]:
        """x (n, d) of v (n, d_z + d), its ln volume, and which are finite."""
        z, xi = z.split((self.edg.latent_dim, self.edg.dim), 1)
        conditional = self._conditional(z)
        x = conditional.sample(xi)
        log_prob_encoder, finite = self._log_prob_encoder(z, x)
        volume = log_prob_encoder + conditional.log_width.sum(1)
        return x, torch.where(finite, volume, -math.inf), finite

    def _log_prob_encoder(self, z: Latents, x: Vectors) -> tuple[Scalars, Mask]:
        """ln p_E(z|x) where x is finite, and where it is; the solver has one step size for all and sees no other."""
        finite = torch.isfinite(x).all(1)
        z, x = (torch.where(finite[:, None], v, 0.0) for v in (z, x))
        return encoder_paths(self.edg, z, x, **self._solver(len(x))).log_prob, finite

    def _with_latents(self, x: Vectors, generator: torch.Generator | None) -> tuple[Latents, Scalars]:
        """Fresh latents of x, and ln p(z) + ln p(x|z) - ln p_E(z|x)."""
        if generator is None:
            raise ValueError("the latents of a diffusion generator are drawn anew: give a generator")
        known = torch.isfinite(x).all(1)
        x = torch.where(known[:, None], x, 0.0)
        path = encoder_sample(self.edg, x, generator=generator, **self._solver(len(x)))
        log_prob = log_normal(path.start) + self._conditional(path.start).log_prob(x) - path.log_prob
        return path.start, torch.where(known & ~log_prob.isnan(), log_prob, -math.inf)

    def _conditional(self, z: Latents) -> Conditional:
        return self.edg.decoder.conditional(z, self.edg.at(self.tau).taus(len(z)))

    def _solver(self, n: int) -> dict:
        return {"rtol": self.rtol, "atol": self.atol, "tau": self.edg.at(self.tau).taus(n)}
