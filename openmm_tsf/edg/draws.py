"""Weighted draws of a generator: what was drawn, what the target says to it, and what the encoder does."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from openmm_tsf import weights
from openmm_tsf.checks import whole
from openmm_tsf.edg.bound import MOST_LOST, check_target, reduced
from openmm_tsf.edg.encoder_chain import chain_paths, chain_sample
from openmm_tsf.edg.encoder_ode import encoder_paths, encoder_sample
from openmm_tsf.edg.generator import EDG
from openmm_tsf.edg.networks import Target, log_normal
from openmm_tsf.typing import Scalars, Vectors
from openmm_tsf.weights import FEWEST, FEWEST_EFFECTIVE


@dataclass(frozen=True, eq=False, repr=False)
class EDGDraws:
    """Draws with weights w = exp(-U(x)/tau)/p^(x), whose mean is Z(tau).

    p^ stands for the decoder's density of x, which has no closed form: with the latents z_0 that x came from and k
    companions z_1 ... z_k ~ p_E(z|x), it is the mean of p_D(z_i) p_D(x|z_i)/p_E(z_i|x) over all of them. That 1/p^ has
    the mean 1/p_D(x) for any k: the probability of x and its k + 1 latents, of which any may be the one that x came
    from, over pi(x) p_E(z_0|x) ... p_E(z_k|x). Companions make the weights more even, down to those of p_D(x) itself,
    and cost no energy with a decoder that is a network.

    p_E is that of the equation of `encoder_ode`, or of a chain of steps: its ratio R, see `encoder_chain`, stands for
    p_E above, and what is said holds for the latents of all times together.

    Args:
        x: (n, d).
        energy: (n,) raw U, tau times the reduced energy; +inf, a weight of zero, where the target was not finite.
        log_density: (n,) ln p^(x) [nat].
        log_prob_encoder: (n,) ln p_E(z_0|x), or ln R [nat].
        tau: temperature of the target.
        companions: k.
        n_function_evaluations: of the score in the solver or the chain, for each draw with its companions.
        n_energy_evaluations: of the target, gradients in the decoder among them.
        tolerance: (rtol, atol) of the solver; None for a chain, which has none.
        n_nonfinite: draws whose energy was NaN or infinite, or x itself, for which there is 0.
    """

    x: Vectors
    energy: Scalars
    log_density: Scalars
    log_prob_encoder: Scalars
    tau: float
    companions: int
    n_function_evaluations: float
    n_energy_evaluations: int
    tolerance: tuple[float, float] | None
    n_nonfinite: int

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        lost = f", {self.n_nonfinite} without a finite energy" if self.n_nonfinite else ""
        return f"EDGDraws({len(self)} draws in {self.x.shape[1]} dimensions, ESS {100 * self.ess:.3g} %{lost})"

    @cached_property
    def log_weights(self) -> Scalars:
        """ln w (n,) [nat]."""
        return -self.energy / self.tau - self.log_density

    @cached_property
    def ess(self) -> float:
        """Kish's effective sample size as a share of all draws; unclipped."""
        return weights.effective_sample_size(self.log_weights)

    @cached_property
    def largest_weight_share(self) -> float:
        """Share of the total weight that the heaviest draw carries."""
        return weights.largest_weight_share(self.log_weights)

    @cached_property
    def log_z(self) -> float:
        """Estimate of ln Z(tau), ln of the mean weight [nat]."""
        return weights.log_mean_exp(self.log_weights)

    @property
    def log_z_error(self) -> float:
        """Standard error of `log_z` [nat]; see `weights.log_mean_exp_error`."""
        return weights.log_mean_exp_error(self.ess, len(self))

    @cached_property
    def log_z_bound(self) -> float:
        """Lower bound of ln Z(tau): the mean of ln w [nat]; -inf with a weight of zero."""
        return float(weights.checked(self.log_weights).mean())

    def resampled(self, n: int | None = None, *, generator: torch.Generator) -> Vectors:
        """n draws (default: as many as there are) of equal weight, heavy ones repeated."""
        return self.x[weights.systematic_resample(self.log_weights, n or len(self), generator)]


@torch.no_grad()
def draw(
    edg: EDG, target: Target, tau: float = 1.0, n: int = 10_000, *, companions: int = 0, generator: torch.Generator,
    rtol: float = 1e-4, atol: float = 1e-4, steps: int | None = None, chunk: int = 8192,
) -> EDGDraws:  # fmt: skip
    """Draw from a generator and weigh the draws.

    Args:
        edg: the generator.
        target: U at temperature 1.
        tau: temperature, as a multiple of that of training.
        n: draws, each costing one energy besides what the decoder takes.
        companions: latents beside its own that each draw is weighed with; see `EDGDraws`. Where the encoder puts some
            of its latents on the other side of a sharp border of the decoder, that share of Z is missed without them.
        generator: of the draws.
        rtol, atol: tolerances of the encoder's density; see `encoder_ode.encoder_paths`.
        steps: weigh by a chain of so many steps instead: weights have the same mean, and scatter a little more, but
            take no derivative for every latent; for hundreds of them.
        chunk: draws in a batch of the solver, with a step size of its own.

    Raises:
        ValueError: too few draws for weights to mean anything, a target of another dimension, energies of -inf, no
            steps, or no tolerances.
        RuntimeError: the solver does not converge, or no draw has a finite energy.

    Warns:
        UserWarning: the draws are worth fewer than `FEWEST_EFFECTIVE`, or more than `MOST_LOST` of them have no finite
            energy.
    """
    if whole("the number of draws", n, 0) < FEWEST:
        raise ValueError(f"the weights of {n} draws say nothing of the effective sample size; draw at least {FEWEST}")
    whole("the number of companions", companions, 0)
    if not (0.0 < rtol < math.inf and 0.0 < atol < math.inf):
        raise ValueError(f"tolerances are above 0, not rtol = {rtol:g}, atol = {atol:g}")
    whole("chunk, the number of draws in a batch,", chunk)
    check_target(edg, target)
    if steps is None:
        paths, sample = (partial(f, rtol=rtol, atol=atol) for f in (encoder_paths, encoder_sample))
    else:
        paths, sample = partial(chain_paths, steps=steps, generator=generator), partial(chain_sample, steps=steps)
    density = edg.at(tau)
    parts, evaluations = [], 0.0
    for start in range(0, n, chunk):
        taus = density.taus(min(chunk, n - start))
        conditional, x, z = density.decoded(len(taus), generator=generator)
        known = torch.isfinite(x).all(1)
        x, z = (torch.where(known[:, None], v, 0.0) for v in (x, z))
        own = paths(edg, z, x, tau=taus)
        others = [sample(edg, x, tau=taus, generator=generator) for _ in range(companions)]
        ratios = [log_normal(z) + conditional.log_prob(x) - own.log_prob]
        for other in others:
            log_joint = log_normal(other.start) + edg.decoder.conditional(other.start, taus).log_prob(x)
            ratios.append(log_joint - other.log_prob)
        evaluations += sum(path.n_function_evaluations for path in (own, *others)) * len(x) / n
        log_density = torch.stack(ratios).logsumexp(0) - math.log(1 + companions)
        energy = torch.where(known, taus * reduced(target, x, taus), torch.inf)
        parts.append((x, energy, torch.where(known, log_density, 0.0), own.log_prob))
    x, energy, log_density, log_prob_encoder = (torch.cat(column) for column in zip(*parts, strict=True))
    finite = torch.isfinite(energy)
    if n_infinite := int((energy == -torch.inf).sum()):
        raise ValueError(f"the target gave {n_infinite} of {n} draws an energy of -inf, an infinite density")
    if not finite.any():
        raise RuntimeError(f"none of {n} draws has a finite energy")
    draws = EDGDraws(
        x=x,
        energy=torch.where(finite, energy, torch.inf),
        log_density=log_density,
        log_prob_encoder=log_prob_encoder,
        tau=tau,
        companions=companions,
        n_function_evaluations=evaluations,
        n_energy_evaluations=n * (1 + edg.decoder.n_slopes * (1 + companions)),
        tolerance=(rtol, atol) if steps is None else None,
        n_nonfinite=int((~finite).sum()),
    )
    _warn_of(draws)
    return draws


def _warn_of(draws: EDGDraws) -> None:
    """Say what the weights do not tell by themselves."""
    n = len(draws)
    if draws.n_nonfinite > MOST_LOST * n:
        warnings.warn(
            f"{draws.n_nonfinite} of {n} draws ({100.0 * draws.n_nonfinite / n:.2g} %) have an energy that is not "
            "finite and weigh nothing: right beyond a hard wall; elsewhere look for what is wrong with the energy",
            stacklevel=4,  # past the decorator
        )
    if draws.ess * n < FEWEST_EFFECTIVE:
        warnings.warn(
            f"{n} draws are worth {draws.ess * n:.1f}, the heaviest carries {100.0 * draws.largest_weight_share:.0f} % "
            "of all weight: ln Z is probably too low and its error too small; train longer, or draw more",
            stacklevel=4,
        )
