"""What training minimises, named by what is consumed: frames (`likelihood_loss`) or energies (`energy_loss`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .flow import Flow
from .typing import Energy, Scalars, Vectors
from .units import kT

LARGEST_ADVANTAGE = 10.0
"""Largest deviation of ln q + u from its mean [nat] that moves the torsions' density."""


def likelihood_loss(flow: Flow, q: Vectors, temperatures: Scalars) -> Scalars:
    """-ln q [nat] of frames given as flat internals (batch, D), each at its own temperature (batch,) [K]: (batch,)."""
    loss = q.new_zeros(len(q))
    z, log_det = flow.transform.inverse(q)
    for temperature in temperatures.unique():
        mine = temperatures == temperature
        prior = flow.at(float(temperature)).prior
        loss = loss.masked_scatter(mine, -prior.log_prob(z[mine]) - log_det[mine])
    return loss


@dataclass(frozen=True)
class EnergyLoss:
    """One batch of draws scored by the energy.

    Attributes:
        surrogate: scalar whose gradient trains the flow.
        value: E_q[ln q + u] [nat], with u softened.
        log_weights: (draws from q,) -u - ln q of the raw energies, -inf off the chart: the weights of the draws.
    """

    surrogate: Tensor
    value: float
    log_weights: Scalars


def soften(u: Scalars, *, start: float) -> Scalars:
    """Reduced energies above `start` [kT] grow only logarithmically; used in training alone, never in weights."""
    excess = (u - start).clamp_min(0.0)
    return torch.where(u > start, start + torch.log1p(excess), u)


def energy_loss(
    flow: Flow, energy: Energy, temperature: float, n: int, *, start: float, flatten: float = 2.0,
    generator: torch.Generator,
) -> EnergyLoss:  # fmt: skip
    """ln q + U/kT of fresh draws at one temperature, to be made the same number everywhere.

    Half of the draws come from q. The other half has its pairs of torsions from a flattened density (as if these alone
    were `flatten` times as hot), so that rare basins are trained too: given its torsions, a draw is right or wrong
    however often those torsions come up. Stiff coordinates are differentiated through the draw. Torsions come from a
    rejection sampler, which has no derivative; their density is moved by the deviation of ln q + u from its mean (the
    score-function gradient of the relative entropy, and of the variance of the log-weights for the flattened half). A
    deviation beyond `LARGEST_ADVANTAGE` counts as that much: a bias that vanishes as the flow gets better.

    Args:
        temperature: of the draws and of the target [K].
        n: number of draws, at least 2; those off the chart have no energy and are left out of the gradient.
        start: where reduced energies begin to be softened [kT].
        flatten: 1 takes all draws from q.

    Raises:
        RuntimeError: no draw is on the chart with a finite energy.
    """
    prior = flow.at(temperature).prior
    n_own = n - n // 2
    torsions = [prior.sample_torsions(m, warmth=f, generator=generator) for m, f in ((n_own, 1.0), (n // 2, flatten))]
    z = prior.complete(torch.cat(torsions), generator=generator)
    q, log_det = flow.transform(z)
    rows = torch.nonzero(flow.internals.chart(q.detach()))[:, 0]
    x = flow.internals(q[rows])[0]
    u = energy(x) / kT(temperature)
    finite = torch.isfinite(u.detach())
    if x.requires_grad:  # a slope that is no number would survive its weight of zero
        x.register_hook(lambda slope: torch.where(finite[:, None, None], slope, 0.0))
    rows, u = rows[finite], u[finite]
    if not len(rows):
        raise RuntimeError(f"none of {n} draws has a finite energy at {temperature:g} K")
    z = z[rows]
    marginal = prior.log_prob_torsions(z[:, flow.prior.n_stiff :])
    conditional = prior.log_prob(z) - marginal - log_det[rows] + soften(u, start=start)
    loss = (conditional + marginal).detach()
    advantage = (loss - loss.mean()).clamp(-LARGEST_ADVANTAGE, LARGEST_ADVANTAGE)
    own = rows < n_own
    log_weights = torch.full((n_own,), -torch.inf, dtype=u.dtype, device=u.device)
    log_weights[rows[own]] = (soften(u, start=start) - loss - u).detach()[own]
    surrogate = conditional.mean() + (advantage * marginal).mean()
    return EnergyLoss(surrogate, float(loss[own].mean()), log_weights)
