"""Closed forms of temperature tuning for flows that steer: what the latent density alone says.

With q_t ~ exp(-Ehat/t), Ehat = E(z)/tau and a known Z, averages of Ehat over q_t are derivatives of ln Z. So C is known
without a draw, and t' is where <Ehat> is that of frames that the flow was not trained on. For a Gaussian prior of D
coordinates these are C = D/2 and t' = <|z|^2>/(D tau), and t* is where the latent virial <z . grad_z u> is D.

Draws off the flow's chart are in these averages, and in those over samples they are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor

from .flow import Flow
from .proposals import join_momenta
from .trajectories import Frames
from .tuning import ScoredSamples
from .tuning.samples import FEWEST, Grid, counts_in_blocks, interval, unclashed
from .tuning.search import nearest_zeros
from .units import to_kelvin
from .vectors import Samples

STEP = 0.01
"""Relative step of the differences that ln Z is derived by; their error is of fourth order in it."""
FARTHEST = 50.0
"""Sampling temperatures, and their reciprocals, beyond which t' is not looked for."""
BLOCKS = 20
"""Stretches that a single trajectory is cut into, for the error of its average."""
NORMAL_95 = 1.96


class Value(NamedTuple):
    """A number and its 95 % interval."""

    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class ClosedForms:
    """What needs no search; None where it cannot be had.

    Args:
        dim: D, coordinates and momenta.
        variance: C at t = 1, from ln Z.
        t_prime: from <Ehat> of the held-out frames.
        virial: <z . grad_z u>/D at t = 1, which is K/C; of Gaussian priors only, and 1 for a perfect flow.
        t_star: where that is 1; of Gaussian priors only.
    """

    dim: int
    variance: float
    t_prime: Value | None
    virial: Value | None
    t_star: Value | None


class HeldOut(NamedTuple):
    """Ehat of held-out frames.

    Args:
        energies: (m,) of frames far enough apart to count as independent.
        mean, error: of all of them, correlations in the error.
    """

    energies: Float[Tensor, " m"]
    mean: float
    error: float


def is_gaussian(flow: Flow) -> bool:
    """Whether every latent is a Gaussian's."""
    return flow.prior.n_soft == 0 and flow.prior.stiff is None


@torch.no_grad()
def latent_moments(flow: Flow, temperature: float, t: float) -> tuple[float, float]:
    """<Ehat> over q_t and C = Var(Ehat)/t^2, from ln Z; Ehat = -ln of the latent density at the temperature [K]."""
    tau = flow.at(temperature).prior.tau
    b = 1.0 / t
    # five points of ln Z against 1/t
    f = [float(flow.prior.log_z(tau / (b * (1.0 + k * STEP)))) for k in (-2, -1, 0, 1, 2)]
    first = (f[0] - 8.0 * f[1] + 8.0 * f[3] - f[4]) / (12.0 * STEP * b)
    second = (-f[0] + 16.0 * f[1] - 30.0 * f[2] + 16.0 * f[3] - f[4]) / (12.0 * (STEP * b) ** 2)
    return float(flow.prior.log_z(tau)) - first, second * b * b


def temperature_of_mean(flow: Flow, temperature: float, mean: float) -> float:
    """The t at which <Ehat> over q_t is this; infinite or zero where it is beyond reach."""

    def excess(log_t: float) -> float:
        return latent_moments(flow, temperature, math.exp(log_t))[0] - mean

    far = math.log(FARTHEST)
    if excess(far) < 0.0:
        return math.inf
    return math.exp(brentq(excess, -far, far, xtol=1e-10)) if excess(-far) < 0.0 else 0.0


def closed_t_prime(flow: Flow, temperature: float, held_out: HeldOut) -> Value:
    """t' from the average over held-out frames."""
    low, value, high = (
        temperature_of_mean(flow, temperature, held_out.mean + k * NORMAL_95 * held_out.error) for k in (-1, 0, 1)
    )
    return Value(value, (low, high))


# --- held-out frames --------------------------------------------------------------------------------------------------


@torch.no_grad()
def held_out_scores(flow: Flow, temperature: float, frames: Frames | Samples, generator: torch.Generator) -> HeldOut:
    """Ehat of frames at the temperature [K] that the flow was not trained on; those off the chart are left out.

    Args:
        generator: of the momenta, where the flow has some.

    Raises:
        ValueError: frames at another temperature, or too few of them.
    """
    kelvin = to_kelvin(temperature)
    if not np.allclose(frames.temperatures, kelvin, rtol=1e-6):
        seen = ", ".join(f"{t:g}" for t in np.unique(frames.temperatures)[:3])
        raise ValueError(f"held-out frames must be of the target's temperature, {kelvin:g} K, not of {seen} K")
    prior = flow.at(kelvin).prior
    energies = torch.full((len(frames),), math.nan, dtype=torch.float64)
    q, kept = flow.internals.of_frames(frames.positions)
    rows = kept.nonzero()[:, 0]
    for part in rows.split(16384):
        y, _ = join_momenta(q[part].to(flow.dtype), flow.n_momenta, prior.tau, generator)
        z, _ = flow.transform.inverse(y)
        energies[part] = -prior.log_prob(z).double()
    fine = torch.isfinite(energies)
    if (m := int(fine.sum())) < FEWEST:
        raise ValueError(f"{m} of {len(frames)} held-out frames are on the flow's chart; at least {FEWEST} are needed")
    error = _error(energies, getattr(frames, "n_walkers", 1))
    energies = energies[fine]
    apart = max(1.0, m * error**2 / float(energies.var()))
    n_apart = max(FEWEST, int(m / apart))
    return HeldOut(energies[torch.linspace(0, m - 1, n_apart).long()], float(energies.mean()), error)


def _error(energies: Tensor, n_walkers: int) -> float:
    """Standard error of the mean, from averages over walkers, or over stretches of time where these are few."""
    by_time = energies.reshape(-1, n_walkers)
    blocks = [by_time[:, k] for k in range(n_walkers)] if n_walkers >= BLOCKS else by_time.tensor_split(BLOCKS)
    means = torch.stack([block.nanmean() for block in blocks if not block.isnan().all()])
    return float(means.std() / math.sqrt(len(means)))


# --- the virial -------------------------------------------------------------------------------------------------------


def virial_ratio(virial: Float[Tensor, " n"], scored: ScoredSamples, dim: int) -> Value:
    """<z . grad_z u>/D over draws without clashes."""
    kept = virial[unclashed(scored) & torch.isfinite(virial)] / dim
    error = float(kept.std()) / math.sqrt(len(kept))
    mean = float(kept.mean())
    return Value(mean, (mean - NORMAL_95 * error, mean + NORMAL_95 * error))


def virial_root(
    virial: Float[Tensor, " n"], scored: ScoredSamples, dim: int, grid: Grid, *, n_replicates: int = 200,
    generator: torch.Generator | None = None,
) -> Value | None:  # fmt: skip
    """The t at which <z . grad_z u> rises through D, by interpolation in ln t; None where it does not.

    Args:
        virial: (n,) of the samples.
        scored: samples that can be weighted for every t of the grid.
        dim: D.
        grid: ascending.
        n_replicates: of the bootstrap, for the interval.
        generator: of the bootstrap; by default one with a fixed seed.
    """
    kept = unclashed(scored) & torch.isfinite(virial)
    log_w = (scored.log_base - scored.model_energy / grid[:, None])[:, kept]
    weights = (log_w - log_w.amax(1, keepdim=True)).exp()
    columns = torch.cat((weights, weights * virial[kept] / dim)).T

    def excess(counts: Tensor) -> Tensor:
        total, above = (counts @ columns).tensor_split(2, 1)
        return above / total - 1.0

    found = float(nearest_zeros(grid, excess(torch.ones(1, len(columns), dtype=columns.dtype)), 1.0))
    if math.isnan(found):
        return None
    blocks = counts_in_blocks(len(columns), n_replicates, generator)
    replicates = torch.cat([nearest_zeros(grid, excess(counts), found) for counts in blocks])
    return Value(found, interval(replicates, 0.95))
