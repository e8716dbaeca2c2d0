"""Metropolis steps with a flow: state in, state and info out, for batches of walkers.

A flow, even a bad one, never changes what is sampled, only how fast. The target is exp(-U/kT) c, with c the constraint
factor; `Walkers` keep U and ln c apart, so that a state may go on at another temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .checks import positive
from .typing import Energy, Mask, Proposal, Scalars


@dataclass(frozen=True, eq=False)
class Walkers:
    """B configurations and what the target needs to know of them.

    Args:
        x: (B, ...) positions (B, A, 3) [nm], or vectors.
        energy: (B,) raw U [kJ/mol], float64; +inf is a probability of zero.
        log_factor: (B,) ln c [nat], float64.
    """

    x: Tensor
    energy: Scalars
    log_factor: Scalars

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Target:
    """The distribution exp(-U/kT) c that steps leave as it is.

    Args:
        energy: U [kJ/mol] of configurations.
        kT: [kJ/mol], above 0.
        log_factor: ln c [nat] of configurations, such as ln det Zc / 2 where bonds are rigid; none by default.
    """

    energy: Energy
    kT: float
    log_factor: Callable[[Tensor], Scalars] | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.kT) and self.kT > 0.0):
            raise ValueError(f"kT must be finite and above 0 kJ/mol, not {self.kT:g}")

    def at(self, x: Tensor) -> Walkers:
        """Walkers at these configurations, in double precision, everything computed anew.

        Raises:
            ValueError: configurations or energies that are not finite (U = +inf is allowed), and how many.
        """
        wrong = ~torch.isfinite(x).flatten(1).all(1)
        if wrong.any():
            raise ValueError(
                f"{int(wrong.sum())} of {len(x)} configurations are not finite (first: number "
                f"{int(wrong.nonzero()[0])}); a simulation that broke down cannot go on from here"
            )
        walkers = self._evaluated(
            x.double()
        )  # or an accepted proposal would be rounded, and not be where its energy is
        wrong = torch.isnan(walkers.energy) | (walkers.energy == -math.inf)
        if wrong.any():
            raise ValueError(f"the energy of {int(wrong.sum())} of {len(x)} configurations is NaN or -inf")
        return walkers

    def log_prob(self, walkers: Walkers) -> Scalars:
        """-U/kT + ln c (B,) [nat], not normalised."""
        return -walkers.energy / self.kT + walkers.log_factor

    def proposed(self, x: Tensor, valid: Mask) -> Walkers:
        """Walkers at proposals (B, ...); U = +inf where they are not valid, or where the energy is not a number."""
        energy, log_factor = x.new_full((len(x),), math.inf, dtype=torch.float64), x.new_zeros(len(x)).double()
        rows = valid.nonzero().squeeze(1)
        if len(rows) > 0:
            found = self._evaluated(x[rows])
            energy[rows] = torch.where(found.energy.isfinite(), found.energy, math.inf)
            log_factor[rows] = torch.where(found.log_factor.isfinite(), found.log_factor, -math.inf)
        return Walkers(x, energy, log_factor)

    @torch.no_grad()
    def _evaluated(self, x: Tensor) -> Walkers:
        energy = self.energy(x).double()
        log_factor = torch.zeros_like(energy) if self.log_factor is None else self.log_factor(x).double()
        return Walkers(x, energy, log_factor)


@dataclass(frozen=True, eq=False)
class StepInfo:
    """What became of the proposals of B walkers.

    Args:
        n_proposed: of each walker, whatever became of them.
        n_accepted: (B,).
        n_nonfinite: (B,) with an energy that is not finite.
        n_off_chart: (B,) that cannot be configurations.
        representable: (B,) whether the flow can represent the walker at the beginning; if not, it rejects everything.
        log_ratio: (n_proposed, B) ln of the Metropolis ratio [nat], -inf for what cannot be.
    """

    n_proposed: int
    n_accepted: Int[Tensor, " walkers"]
    n_nonfinite: Int[Tensor, " walkers"]
    n_off_chart: Int[Tensor, " walkers"]
    representable: Mask
    log_ratio: Float[Tensor, "proposals walkers"]


@torch.no_grad()
def independence_step(
    walkers: Walkers, target: Target, proposal: Proposal, *, generator: torch.Generator, n_proposals: int = 1
) -> tuple[Walkers, StepInfo]:
    """A chain of Metropolis steps for each walker, with proposals (x', p') ~ q that do not depend on where it is.

    log a = -[dU + d|p|^2/2]/kT + d ln c + ln q(x, p) - ln q(x', p'). All proposals are drawn and scored in one batch.
    Momenta, of flows that have them, are drawn for the walker before the chain and belong to it in the chain.

    Args:
        walkers: B of them.
        target: left invariant.
        proposal: the flow at the temperature of the target, or at any other.
        generator: of proposals and decisions.
        n_proposals: length of the chain.

    Raises:
        ValueError: n_proposals < 1.

    Source: L. Tierney, Ann. Stat. 22, 1701 (1994), independence chains.
    """
    if n_proposals < 1:
        raise ValueError(f"n_proposals must be at least 1, not {n_proposals}")
    n, b = n_proposals, len(walkers)
    log_q = proposal.score(walkers.x, generator=generator).double()
    representable = log_q > -math.inf
    x, new_log_q, valid = proposal.propose(n * b, generator=generator)
    valid = valid & (new_log_q > -math.inf)  # what has no density was not drawn
    new = target.proposed(x, valid)
    new_excess = (target.log_prob(new) - new_log_q.double()).view(n, b)
    log_u = torch.rand(n, b, generator=generator, dtype=torch.float64, device=generator.device).log().to(new_excess)
    excess, chosen = target.log_prob(walkers) - log_q, torch.full((b,), -1, device=log_q.device)
    log_ratio, n_accepted = torch.empty_like(new_excess), torch.zeros(b, dtype=torch.int64, device=log_q.device)
    for k in range(n):
        log_ratio[k] = _ratio(new_excess[k] - excess, representable)
        accepted = log_u[k] < log_ratio[k]
        excess = torch.where(accepted, new_excess[k], excess)
        chosen = torch.where(accepted, k, chosen)
        n_accepted += accepted
    info = _info(n, b, n_accepted, new, valid, representable, log_ratio)
    return _chosen(walkers, new, chosen), info


@torch.no_grad()
def latent_step(
    walkers: Walkers, target: Target, proposal: Proposal, *, step_size: float, generator: torch.Generator
) -> tuple[Walkers, StepInfo]:
    """One Metropolis step for each walker, a small random step of its latents.

    v = G^-1(x, p), v' = v + xi, (x', p') = G(v'), with xi normal of width step_size times `proposal.latent_scale`:
    log a = -[dU + d|p|^2/2]/kT + d ln c + ln|det dG(v')| - ln|det dG(v)|. The prior does not appear.

    Args:
        walkers, target, proposal, generator: as in `independence_step`.
        step_size: width of the step.

    Raises:
        ValueError: a step size that is not finite and above 0.

    Source: Dibak, Klein, Noe, arXiv 2108.01590 (latent Monte Carlo).
    """
    positive("step_size", step_size)
    z, log_volume = proposal.to_latents(walkers.x, generator=generator)
    representable = log_volume > -math.inf
    noise = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=generator.device).to(z)
    x, new_log_volume, valid = proposal.from_latents(z + step_size * proposal.latent_scale.to(z) * noise)
    new = target.proposed(x, valid & representable)
    log_u = torch.rand(len(z), generator=generator, dtype=torch.float64, device=generator.device).log().to(new.energy)
    change = target.log_prob(new) - target.log_prob(walkers) + new_log_volume.double() - log_volume.double()
    log_ratio = _ratio(change, representable)
    accepted = log_u < log_ratio
    info = _info(1, len(z), accepted.long(), new, valid | ~representable, representable, log_ratio[None])
    return _chosen(walkers, new, torch.where(accepted, 0, -1)), info


def _ratio(change: Tensor, representable: Tensor) -> Tensor:
    """The logarithm of the ratio; what is no number, or starts where the flow cannot be, is an impossible proposal."""
    return torch.where(representable & ~torch.isnan(change), change, -math.inf)


def _chosen(walkers: Walkers, new: Walkers, chosen: Tensor) -> Walkers:
    """Walkers, or their proposal of number `chosen` (B,) where that is not -1; row k * B + b of `new` is k of b."""
    moved = (chosen >= 0).nonzero().squeeze(1)
    rows = chosen[moved] * len(walkers) + moved
    x, energy, log_factor = walkers.x.clone(), walkers.energy.clone(), walkers.log_factor.clone()
    x[moved], energy[moved], log_factor[moved] = new.x[rows].to(x), new.energy[rows], new.log_factor[rows]
    return Walkers(x, energy, log_factor)


def _info(
    n: int, b: int, n_accepted: Tensor, new: Walkers, valid: Tensor, representable: Tensor, log_ratio: Tensor
) -> StepInfo:
    nonfinite = (valid & (new.energy == math.inf)).view(n, b) & representable
    return StepInfo(n, n_accepted, nonfinite.sum(0), (~valid).view(n, b).sum(0), representable, log_ratio)
