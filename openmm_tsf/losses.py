"""What training minimises, named by what is consumed: frames (`likelihood_loss`) or energies (`energy_loss`).

Both come with two gradients. The plain one differentiates ln q. The path gradient follows samples through the map at
fixed densities: it needs forces at the samples, and has no noise once the flow is right (Roeder, Wu, Duvenaud, arXiv
1703.09194, for draws; Vaitl, Winkler, Richter, Kessel, arXiv 2403.15881, for frames). They have the same mean, but for
draws with flattened torsions, where only the path gradient vanishes at the right flow, and for frames of flows whose
torsions are cut open, where only the plain one is right: the frames' density does not vanish at the cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cuts import reached
from .flow import Flow
from .proposals import join_momenta, part_momenta
from .typing import Energy, Scalars, Vectors

LARGEST_ADVANTAGE = 10.0
"""Largest deviation of ln q + u from its mean [nat] that moves the torsions' density."""

WALL = 20.0
"""What a torsion beyond its cut costs a draw in training [kT/rad]."""


def likelihood_loss(
    flow: Flow, q: Vectors, temperatures: Scalars, *, slopes: Vectors | None = None,
    generator: torch.Generator | None = None,
) -> Scalars:  # fmt: skip
    """-ln q [nat] of frames given as flat internals (batch, D), each at its own temperature (batch,) [K]: (batch,).

    With momenta, drawn from the generator, it is ln N(p; 0, tau) - ln q(x, p), as in `SteeredFlow.log_prob`.

    Args:
        slopes: (batch, D) derivatives of U/kT by the internals at the frames. With them the number stays as it is and
            its gradient becomes the path gradient, on average the same for frames from the Boltzmann distribution.
    """
    tau = temperatures / flow.training_temperature
    y, log_momenta = join_momenta(q, flow.n_momenta, tau, generator)
    z, log_det = flow.transform.inverse(y)
    if slopes is None:
        return log_momenta - _log_prior(flow, z, temperatures) - log_det
    with torch.enable_grad():
        here = z.detach().requires_grad_()
        y_again, log_det_again = flow.transform(here)
        log_prior = _log_prior(flow, here, temperatures)
        slope = torch.cat((slopes, y[:, q.shape[1] :] / tau[:, None]), 1)
        # ln of the target's density in latent space, up to a constant, less that of the prior
        mismatch = log_det_again.sum() - (slope * y_again).sum() - log_prior.sum()
        (force,) = torch.autograd.grad(mismatch, here, retain_graph=True)
    value = (log_momenta - log_prior - log_det).detach()
    surrogate = (force * z).sum(1) - log_prior
    return value + (surrogate - surrogate.detach())


def slopes_of(flow: Flow, energy: Energy, q: Vectors, temperatures: Scalars, *, chunk: int = 16384) -> Vectors:
    """Derivatives (frames, D) of U/kT by the internals, at frames on the chart, each at its own temperature [K].

    With rigid bonds, of U/kT - ln c, where c is the constraint factor that frames of dynamics have in their density.

    Raises:
        ValueError: a frame whose energy or force is not finite.
    """
    slopes = []
    for rows, part in zip(q.split(chunk), temperatures.split(chunk), strict=True):
        with torch.enable_grad():
            inside = rows.detach().double().requires_grad_()
            x, _ = flow.internals(inside)
            u = energy(x) / flow.kT(part.double()) - flow.internals.log_constraint_factor(x)
            slopes.append(torch.autograd.grad(u.sum(), inside)[0].to(q))
    slopes = torch.cat(slopes)
    if bad := int((~torch.isfinite(slopes).all(1)).sum()):
        raise ValueError(f"{bad} of {len(q)} frames have forces that are not finite; check the trajectory")
    return slopes


def _log_prior(flow: Flow, z: Vectors, temperatures: Scalars) -> Scalars:
    """ln of the latent density at each one's own temperature."""
    log_prior = z.new_zeros(len(z))
    for temperature in temperatures.unique():
        mine = temperatures == temperature
        log_prior = log_prior.masked_scatter(mine, flow.at(float(temperature)).prior.log_prob(z[mine]))
    return log_prior


class Divergence(RuntimeError):
    """Training has led a flow to where nothing is finite."""


@dataclass(frozen=True)
class EnergyLoss:
    """One batch of draws scored by the energy.

    Attributes:
        surrogate: scalar whose gradient trains the flow.
        value: E_q[ln q + u] [nat], with u softened, and walls at the cuts of torsions.
        log_weights: (draws from q,) -u - ln q of the raw energies, -inf off the chart: the weights of the draws.

    With momenta, ln q is ln q(x, p) - ln N(p; 0, tau): |p|^2 / (2 tau) is in the target.
    """

    surrogate: Tensor
    value: float
    log_weights: Scalars


def soften(u: Scalars, *, start: float) -> Scalars:
    """Reduced energies above `start` [kT] grow only logarithmically; used in training alone, never in weights."""
    excess = (u - start).clamp_min(0.0)
    return torch.where(u > start, start + torch.log1p(excess), u)


def energy_loss(
    flow: Flow, energy: Energy, temperature: float, n: int, *, start: float, flatten: float = 2.0, path: bool = True,
    generator: torch.Generator,
) -> EnergyLoss:  # fmt: skip
    """ln q + U/kT of fresh draws at one temperature, to be made the same number everywhere.

    Half of the draws come from q. The other half has its pairs of torsions from a flattened density (as if these alone
    were `flatten` times as hot), so that rare basins are trained too: given its torsions, a draw is right or wrong
    however often those torsions come up. The map is differentiated through the draw. Torsions come from a
    rejection sampler, which has no derivative; their density is moved by the deviation of ln q + u from its mean (the
    score-function gradient of the relative entropy, and of the variance of the log-weights for the flattened half). A
    deviation beyond `LARGEST_ADVANTAGE` counts as that much: a bias that vanishes as the flow gets better. The quartic
    potentials of stiff coordinates are left to the likelihood.

    Args:
        temperature: of the draws and of the target [K].
        n: number of draws, at least 2. A draw with torsions beyond their cuts, which has no weight, pays `WALL` on
            top of its energy, so that it is pulled back; one that is off the chart otherwise has no gradient.
        start: where reduced energies begin to be softened [kT].
        flatten: 1 takes all draws from q, and all count as such.
        path: the path gradient, and not the plain one.

    Raises:
        Divergence: no draw has a finite energy.
    """
    prior = flow.at(temperature).prior
    n_own = n if flatten == 1.0 else n - n // 2
    warmths = {1.0: n_own} | ({flatten: n - n_own} if n > n_own else {})
    torsions = [prior.sample_torsions(m, warmth=f, generator=generator) for f, m in warmths.items()]
    z = prior.complete(torch.cat(torsions), generator=generator)
    y, log_det = flow.transform(z)
    u, wall, slope = _target(flow, energy, y.detach(), temperature, start)
    rows = torch.nonzero(torch.isfinite(u))[:, 0]
    if not len(rows):
        raise Divergence(f"none of {n} draws has a finite energy at {temperature:g} K")
    z, y, slope, own = z[rows], y[rows], slope[rows], rows < n_own
    log_momenta = part_momenta(y, flow.n_momenta, prior.tau)[1].detach()
    marginal = prior.log_prob_torsions(z[:, flow.prior.n_stiff :])
    log_q = prior.log_prob(z) - log_det[rows] - log_momenta
    loss = (log_q + soften(u[rows], start=start) + wall[rows]).detach()
    advantage = (loss - loss.mean()).clamp(-LARGEST_ADVANTAGE, LARGEST_ADVANTAGE)
    if path:
        conditional = ((slope + _score(flow, y.detach(), temperature)) * y).sum(1)
    else:
        conditional = log_q + log_momenta - marginal + (slope * y).sum(1)
    log_weights = torch.full((n_own,), -torch.inf, dtype=u.dtype, device=u.device)
    log_weights[rows[own]] = torch.where(wall[rows] == 0, -u[rows] - log_q, -torch.inf).detach()[own]
    surrogate = conditional.mean() + (advantage * marginal).mean()
    return EnergyLoss(surrogate, float(loss[own].mean()), log_weights)


def _target(
    flow: Flow, energy: Energy, y: Vectors, temperature: float, start: float
) -> tuple[Scalars, Scalars, Vectors]:
    """Of y = (q, p): u = U/kT - ln c (batch,), the wall w (batch,), and the slope of softened u + w + |p|^2/(2 tau).

    u is +inf where no positions belong to q. w is zero on the chart and rises beyond the cuts of torsions. ln c is the
    constraint factor, zero where no bond is rigid.
    """
    tau = temperature / flow.training_temperature
    with torch.enable_grad():
        q, p = y.split((flow.internals.dim, flow.n_momenta), 1)
        q = q.requires_grad_()
        inside, beyond = reached(flow.internals, q)
        rows = torch.nonzero(inside)[:, 0]
        x, _ = flow.internals(q[rows])
        u = energy(x).to(q.dtype) / flow.kT(temperature) - flow.internals.log_constraint_factor(x)
        wall = WALL * beyond
        (slope,) = torch.autograd.grad(soften(u, start=start).sum() + wall.sum(), q)
    # a slope that is no number belongs to an energy that is none
    slope = torch.where(torch.isfinite(slope).all(1, keepdim=True), slope, 0.0)
    u = torch.full_like(q[:, 0], torch.inf).index_copy(0, rows, u).detach()
    return u, wall.detach(), torch.cat((slope, p / tau), 1)


def _score(flow: Flow, y: Vectors, temperature: float) -> Vectors:
    """Derivative of ln q by y.

    Also for draws with flattened torsions, whose own density is another: so the path gradient is zero for every draw
    where q is the target.
    """
    y = y.requires_grad_()
    with torch.enable_grad():
        z, log_det = flow.transform.inverse(y)
        log_q = flow.at(temperature).prior.log_prob(z) + log_det
        return torch.autograd.grad(log_q.sum(), y)[0]
