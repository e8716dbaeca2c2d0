"""What frames say directly, fitted before all is trained together: torsions, and stiff coordinates given them."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from .flow import Flow
from .priors import MolecularPrior, TorusFactor
from .proposals import join_momenta
from .transforms import LineCoupling

SHRINK = 1e-4
"""Weight of the squared coefficients: keeps empty stretches of the circle from digging bottomless barriers."""


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
    """Maximum likelihood of the Fourier energies, with the entropies at zero; a convex problem, solved by L-BFGS.

    Args:
        prior: changed in place.
        torsions: (frames, n_soft) [rad].
        tau: (frames,) temperature of each frame over the training temperature.
    """
    for factor, group in zip(prior.factors, prior.groups, strict=True):
        _fit(factor, torsions[:, group], tau, max_iterations)


def _fit(factor: TorusFactor, angles: Tensor, tau: Tensor, max_iterations: int) -> None:
    coefficients = factor.marginal.coefficients
    if not coefficients.numel():
        return
    temperatures, counts = tau.unique(return_counts=True)
    shares = (counts / len(tau)).tolist()
    # the frames enter through their mean features alone
    total = torch.zeros_like(coefficients)
    for part, part_tau in zip(angles.split(65536), tau.split(65536), strict=True):
        total += (factor.marginal.features(part.to(coefficients)) / part_tau.to(coefficients)[:, None, None]).sum(0)
    mean = total.detach() / len(angles)
    optimiser = torch.optim.LBFGS([coefficients], max_iter=max_iterations, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        log_z = sum(w * factor.log_z(float(t)) for w, t in zip(shares, temperatures, strict=True))
        value = log_z - (coefficients * mean).sum() + SHRINK * (coefficients**2).sum()
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
