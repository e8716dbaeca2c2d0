"""The torsion potentials of the prior, fitted to frames before anything else is trained."""

from __future__ import annotations

import torch
from torch import Tensor

from .priors import MolecularPrior, TorusFactor

SHRINK = 1e-4
"""Weight of the squared coefficients: keeps empty stretches of the circle from digging bottomless barriers."""


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
