"""What frames say directly, without training all together: torsions, and stiff coordinates given them."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from .flow import Flow
from .priors import MolecularPrior, TorusFactor, TorusPotential
from .proposals import join_momenta
from .transforms import LineCoupling

SHRINK = 1e-4
"""Weight of the squared change of coefficients: keeps empty stretches of the circle from digging bottomless
barriers."""

STEPS, BATCH = 500, 2048
"""Most steps, and frames in each, of `fit_stiff`."""
PASSES = 50
"""Times that `fit_stiff` sees each frame at most: few frames are soon learnt by heart."""
MOST_OFTEN = 30.0
"""No frame is picked for it more often than this times the mean, however rare its torsions."""


def pretrain(flow: Flow, q: Tensor, tau: Tensor, *, flatten: float, generator: torch.Generator) -> None:
    """Fit the torsions, then the stiff coordinates given them, in place.

    Args:
        flow: an untrained flow; nothing happens where it has no torsions.
        q: (frames, D) internals.
        tau: (frames,) temperature of each frame over the training temperature.
        flatten: frames for the second fit are picked as if torsions were so many times as hot, to see every basin.
        generator: of the picks, and of momenta.
    """
    if not flow.prior.n_soft:
        return
    torsions = q[:, flow.internals.circular].double()
    exact = copy.deepcopy(flow.prior).double()
    fit_torsions(exact, torsions, tau)
    flow.prior.load_state_dict(exact.state_dict())
    log_weights = (1.0 / flatten - 1.0) * exact.at(1.0).log_prob_torsions(torsions).detach()
    weights = torch.exp(log_weights - log_weights.max())
    total = weights.clamp(max=MOST_OFTEN * float(weights.mean())).cumsum(0)
    steps = min(STEPS, math.ceil(PASSES * len(q) / BATCH))
    picks = torch.rand(steps, BATCH, generator=generator, dtype=torch.float64) * total[-1]
    fit_stiff(flow, q, tau, torch.searchsorted(total, picks).clamp(max=len(total) - 1), generator)


def fit_torsions(prior: MolecularPrior, torsions: Tensor, tau: Tensor, *, max_iterations: int = 200) -> None:
    """Maximum likelihood of the Fourier energies, entropies as they are; a convex problem, solved by L-BFGS.

    Args:
        prior: changed in place.
        torsions: (frames, n_soft) [rad].
        tau: (frames,) temperature of each frame over the training temperature.
    """
    weights = torch.full((len(tau),), 1.0 / len(tau), dtype=torch.float64)
    shares = _shares(tau, weights)
    for factor, group in zip(prior.factors, prior.groups, strict=True):
        pulls = [(factor.marginal, 1.0 / tau)]
        _fit(factor, pulls, _means(pulls, torsions[:, group], weights), shares, max_iterations)


def refit_torsions(prior: MolecularPrior, torsions: Tensor, tau: Tensor, weights: Tensor, *, entropies: bool) -> None:
    """Fit the Fourier energies to weighted draws of this very prior; the same convex problem.

    What the potentials are fitted to are mean values over the weighted draws. Those over the draws as they came are
    known, they are the prior's own: so only the difference between both is taken from the draws, and its error is as
    small as weights are even. Stiff coordinates, whose widths come from the entropies, stay as wide on average.

    Args:
        prior: changed in place.
        torsions: (draws, n_soft) [rad], drawn from the prior.
        tau: (draws,) temperature of each draw over the training temperature.
        weights: (draws,) of each; of their sum, each temperature has the share that it counts.
        entropies: fit them too, which takes two temperatures at least.
    """
    weights = weights.double() / weights.sum()
    shares, change = _shares(tau, weights), weights.clone()
    for t, share in shares.items():
        change[tau == t] -= share / int((tau == t).sum())
    with torch.no_grad():
        log_width = weights @ prior.log_width(torsions).double()
    for factor, group in zip(prior.factors, prior.groups, strict=True):
        pulls = [(factor.marginal, 1.0 / tau), *([(factor.entropy, 1.0 - 1.0 / tau)] if entropies else [])]
        pulls = [(potential, pull) for potential, pull in pulls if potential.coefficients.numel()]
        own = torch.autograd.grad(_log_z(factor, shares), [p.coefficients for p, _ in pulls]) if pulls else []
        means = [a + b for a, b in zip(own, _means(pulls, torsions[:, group], change), strict=True)]
        _fit(factor, pulls, means, shares, 200)
    if entropies and prior.stiff is not None:
        with torch.no_grad():
            wider = weights @ prior.log_width(torsions).double() - log_width
        prior.stiff.rescale(float(wider.exp()))


Pulls = list[tuple[TorusPotential, Tensor]]
"""Potentials, and what the exponent of a frame has of each: (frames,)."""


def _means(pulls: Pulls, angles: Tensor, weights: Tensor) -> list[Tensor]:
    """Weighted sums of the features of every potential: frames enter through these alone."""
    means = [torch.zeros_like(potential.coefficients) for potential, _ in pulls]
    for mean, (potential, pull) in zip(means, pulls, strict=True):
        for part, w in zip(angles.split(65536), (weights * pull).split(65536), strict=True):
            mean += (w.to(mean)[:, None, None] * potential.features(part.to(mean))).sum(0)
    return means


def _shares(tau: Tensor, weights: Tensor) -> dict[float, float]:
    """The weight of each temperature that there is."""
    return {t: float(weights[tau == t].sum()) for t in tau.unique().tolist()}


def _log_z(factor: TorusFactor, shares: dict[float, float]) -> Tensor:
    """Mean of ln Z over temperatures with their shares."""
    return sum((share * factor.log_z(t) for t, share in shares.items()), torch.zeros(()))


def _fit(
    factor: TorusFactor, pulls: Pulls, means: list[Tensor], shares: dict[float, float], max_iterations: int
) -> None:  # fmt: skip
    fitted = [potential.coefficients for potential, _ in pulls]
    if not any(c.numel() for c in fitted):
        return
    start = [c.detach().clone() for c in fitted]
    optimiser = torch.optim.LBFGS(fitted, max_iter=max_iterations, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = _log_z(factor, shares)
        for c, mean, c0 in zip(fitted, means, start, strict=True):
            value = value - (c * mean).sum() + SHRINK * ((c - c0) ** 2).sum()
        value.backward()
        return value

    optimiser.step(loss)
    optimiser.zero_grad()


def fit_stiff(flow: Flow, q: Tensor, tau: Tensor, rows: Tensor, generator: torch.Generator) -> None:
    """Means, widths and shapes of the stiff coordinates given the torsions, in place.

    These are the first coupling, the entropies and the quartic potentials.

    Without it, rare basins begin as broad smears of the common one and stay so for long.

    Args:
        flow: with a first coupling that reads torsions alone; nothing happens where there is none.
        q: (frames, D) internals.
        tau: (frames,) temperature of each frame over the training temperature.
        rows: (steps, batch) frames of each step.
        generator: of momenta, for flows that have them.
    """
    first, standardise = flow.transform.transforms[0], flow.transform.transforms[-1]
    if not isinstance(first, LineCoupling) or len(first.keep):
        return
    prior = flow.prior
    parameters = [*first.parameters(), *(p for f in prior.factors for p in f.entropy.parameters())]
    parameters += [] if prior.stiff is None else prior.stiff.parameters()
    temperatures, counts = tau.unique(return_counts=True)
    shares = list(zip(temperatures.tolist(), (counts / len(tau)).tolist(), strict=True))
    optimiser = torch.optim.Adam(parameters, lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, len(rows))
    for batch in rows:
        optimiser.zero_grad()
        with torch.no_grad():
            y, _ = join_momenta(q[batch], flow.n_momenta, tau[batch], generator)
            z, _ = standardise.inverse(y)
        z, _ = first.inverse(z)
        loss = prior.stiff_loss(z, tau[batch]).mean() + sum(share * prior.stiff_log_z(t) for t, share in shares)
        loss.backward()
        optimiser.step()
        schedule.step()
    optimiser.zero_grad()
