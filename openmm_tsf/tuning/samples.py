"""Samples scored by a learned model and by its target: what every function of tuning takes, and averages over them.

A model q_1 ~ exp(-Ehat) learned from samples of p ~ exp(-E/T) can be sampled at any t: q_t ~ exp(-Ehat/t). All energies
here are reduced: Ehat, and u = E/T. Both may lack a constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from openmm_tsf.typing import Mask
from openmm_tsf.weights import bootstrap_counts, checked, normalised_weights

TAIL, TAIL_LEAST = 10.0, 20.0
"""How far u - Ehat may lie above its median: so many interquartile ranges, and at any rate so many nat."""
FEWEST = 20
"""Samples, and effective samples of their weights, below which no statistic is worth its name."""
CHUNK, BLOCK = 20_000_000, 1_000_000
"""Numbers in one block of bootstrap counts (160 MB), and of weights at several temperatures."""
Grid = Float[Tensor, " grid"]


@dataclass(frozen=True, eq=False)
class ScoredSamples:
    """Samples of q_t with the energies that the model and its target give them; or all states of a finite space.

    Args:
        model_energy: (n,) Ehat; of a normalised model at t = 1 this is -ln q_1.
        target_energy: (n,) u = E/T; +inf where the target cannot be.
        log_weights: (n,) with which the samples represent q_t; None for samples of q_t itself.
        t: sampling temperature, 1 for the model as it was trained.
        exact: the samples are all states there are, and have no statistical error.

    Raises:
        ValueError: energies of different numbers of samples, fewer than 2, NaN, a model energy that is infinite,
            weights that are NaN or all zero, or a temperature that is not finite and above zero.
    """

    model_energy: Float[Tensor, "..."] = field(repr=False)
    target_energy: Float[Tensor, "..."] = field(repr=False)
    log_weights: Float[Tensor, "..."] | None = field(repr=False, default=None)
    t: float = 1.0
    exact: bool = False

    def __post_init__(self) -> None:
        energies = {"model": _vector(self.model_energy, "model"), "target": _vector(self.target_energy, "target")}
        model, target = energies["model"], energies["target"]
        if len(model) != len(target):
            raise ValueError(
                f"{len(model)} model energies and {len(target)} target energies: both must be of the same samples, in "
                "one state space"
            )
        if len(model) < 2:
            raise ValueError(f"{len(model)} samples say nothing about a temperature; at least {FEWEST} are needed")
        for name, energy in energies.items():
            bad = torch.isnan(energy) | (energy == -math.inf) | ((energy == math.inf) & (name == "model"))
            if bad.any():
                first = int(bad.nonzero()[0])
                raise ValueError(f"{int(bad.sum())} of {len(bad)} {name} energies are not numbers (first: row {first})")
        log_weights = torch.zeros_like(model) if self.log_weights is None else checked(self.log_weights)
        if len(log_weights) != len(model):
            raise ValueError(f"{len(log_weights)} weights for {len(model)} samples")
        normalised_weights(log_weights)
        positive(self.t)
        for name, value in (("model_energy", model), ("target_energy", target), ("log_weights", log_weights)):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.model_energy)

    @property
    def log_base(self) -> Float[Tensor, " n"]:
        """ln of the measure that the samples stand for: q_t has the weights base - Ehat/t at any t, p has base - u."""
        return self.log_weights + self.model_energy / self.t

    def at(self, t: float) -> ScoredSamples:
        """The same samples, weighted for another sampling temperature."""
        return replace(self, log_weights=self.log_base - self.model_energy / positive(t), t=float(t))


def enumerated(
    model_energy: Float[Tensor, " states"], target_energy: Float[Tensor, " others"],
    log_degeneracy: Float[Tensor, " classes"] | None = None, *, t: float = 1.0,
) -> ScoredSamples:  # fmt: skip
    """All states of a finite space, or all classes of states alike: averages over them are exact.

    Args:
        model_energy: (n,) Ehat.
        target_energy: (n,) u.
        log_degeneracy: (n,) ln of the number of states in each class; None for 1.
        t: sampling temperature.

    Raises:
        ValueError: as `ScoredSamples`, or a state that the target cannot be in: no q_t is then near it.
    """
    model = _vector(model_energy, "model")
    base = torch.zeros_like(model) if log_degeneracy is None else log_degeneracy.double()
    if len(base) != len(model):
        raise ValueError(f"{len(base)} degeneracies for {len(model)} states")
    if n := int(torch.isinf(target_energy).sum()):
        raise ValueError(f"{n} states have an infinite target energy: KL(q_t || p) is infinite at every t")
    return ScoredSamples(model, target_energy, base - model / positive(t), t=t, exact=True)


def positive(t: float) -> float:
    """A sampling temperature that is one, or an error."""
    if not (math.isfinite(t) and t > 0.0):
        raise ValueError(f"a sampling temperature must be finite and above 0, not {t:g}")
    return float(t)


def _vector(energy: Tensor, name: str) -> Tensor:
    energy = torch.as_tensor(energy).detach().to("cpu", torch.float64)
    if energy.ndim != 1:
        raise ValueError(f"{name} energies must be a vector, not of shape {(*energy.shape,)}")
    return energy


# --- what is left out, and what is too little -------------------------------------------------------------------------


def without_clashes(samples: ScoredSamples, tail: float = TAIL) -> tuple[ScoredSamples, float]:
    """Leave out the samples that the target all but excludes; what remains is q_t on the rest of space.

    Returns:
        the samples that are `unclashed`, and the share of the weight that was left out.

    Raises:
        ValueError: as `unclashed`.
    """
    kept = unclashed(samples, tail)
    if kept.all():
        return samples, 0.0
    rest = replace(
        samples,
        model_energy=samples.model_energy[kept],
        target_energy=samples.target_energy[kept],
        log_weights=samples.log_weights[kept],
    )
    return rest, float(normalised_weights(samples.log_weights)[~kept].sum().clamp(0.0, 1.0))


def unclashed(samples: ScoredSamples, tail: float = TAIL) -> Mask:
    """(n,) which samples have weight and no clash.

    A sample clashes if its target energy is infinite, or u - Ehat lies more than max(tail * IQR, TAIL_LEAST nat)
    above its median (both over the weighted samples of finite energy). Such a sample weighs less than e^-20 of a
    typical one once it is reweighted to p, yet a few of them make all of the covariance of u and Ehat. An enumeration
    is left as it is.

    Args:
        samples: of any sampling temperature.
        tail: interquartile ranges; inf leaves out infinite energies only.

    Raises:
        ValueError: a tail that is not above zero, or fewer than `FEWEST` samples remain.
    """
    if not tail > 0.0:
        raise ValueError(f"the bound of the tail must be above 0 interquartile ranges, not {tail:g}")
    if samples.exact:
        return torch.ones(len(samples), dtype=torch.bool)
    weights = normalised_weights(samples.log_weights)
    kept = torch.isfinite(samples.target_energy) & (weights > 0.0)
    if kept.any() and tail < math.inf:
        excess = samples.target_energy - samples.model_energy
        low, middle, high = _quantiles(excess[kept], weights[kept])
        kept &= excess <= middle + max(tail * (high - low), TAIL_LEAST)
    if (n := int(kept.sum())) < FEWEST:
        raise ValueError(f"{n} of {len(samples)} samples have weight and no clash; at least {FEWEST} are needed")
    return kept


def _quantiles(values: Tensor, weights: Tensor) -> tuple[float, float, float]:
    """Weighted quartiles."""
    order = values.argsort()
    cumulated = weights[order].cumsum(0)
    rows = torch.searchsorted(cumulated, cumulated[-1] * torch.tensor([0.25, 0.5, 0.75], dtype=cumulated.dtype))
    return tuple(values[order[rows.clamp(max=len(values) - 1)]].tolist())


def usable(samples: ScoredSamples) -> ScoredSamples:
    """The samples, or an error that says why there is no temperature to find in them.

    Raises:
        ValueError: too few effective samples, or an energy that is the same for all of them.
    """
    if not samples.exact and (n := effective_number(samples, samples.t)) < FEWEST:
        raise ValueError(
            f"{len(samples)} samples are worth {n:.1f} of equal weight; at least {FEWEST} are needed for a statistic"
        )
    kept = samples.log_weights > -math.inf
    for name, energy in (("model", samples.model_energy[kept]), ("target", samples.target_energy[kept])):
        if energy.max() - energy.min() <= 1e-12 * energy.abs().max().clamp(min=1.0):
            raise ValueError(
                f"the {name} gives all {len(energy)} samples one energy ({energy[0]:g}): its variance is zero, and no "
                "temperature is better than another"
            )
    return samples


def effective_number(samples: ScoredSamples, t: float) -> float:
    """Kish's number of effective samples that the samples are worth at t."""
    return float(effective_numbers(samples, torch.tensor([t], dtype=torch.float64)))


def effective_numbers(samples: ScoredSamples, temperatures: Grid) -> Grid:
    """The same at each of several temperatures."""
    parts = _log_weights(samples, temperatures)
    return torch.cat([1.0 / torch.softmax(log_w, 1).square().sum(1) for log_w in parts])


def target_ess(samples: ScoredSamples, temperatures: Grid) -> Grid:
    """Kish's effective share of samples of q_t reweighted to the target, in (0, 1]; clashes count as zero weights."""
    found, u = [], samples.target_energy
    for log_w, t in zip(_log_weights(samples, temperatures), temperatures.split(_block(samples)), strict=True):
        log_q = torch.log_softmax(log_w, 1)
        log_ratio = samples.model_energy / t[:, None] - u
        first, second = (torch.where(log_q > -math.inf, log_q + k * log_ratio, -math.inf) for k in (1, 2))
        found.append((2.0 * first.logsumexp(1) - second.logsumexp(1)).exp().nan_to_num(0.0))
    return torch.cat(found)


def _block(samples: ScoredSamples) -> int:
    """How many temperatures are worked on at a time."""
    return max(BLOCK // len(samples), 1)


def _log_weights(samples: ScoredSamples, temperatures: Grid) -> Iterator[Tensor]:
    """ln of the weights (temperatures, n), unnormalised, in blocks of temperatures."""
    base, e = samples.log_base, samples.model_energy
    for t in temperatures.split(_block(samples)):
        yield base - e / t[:, None]


# --- averages ---------------------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Averages over q_t: tensors (..., temperatures), with a first axis of replicates where counts were given.

    log_z is ln of the integral of exp(-Ehat/t), `covariance` is K = Cov(u, Ehat)/t, `variance` is C = Var(Ehat)/t^2.
    """

    log_z: Tensor
    model: Tensor
    target: Tensor
    covariance: Tensor
    variance: Tensor


def moments(samples: ScoredSamples, temperatures: Grid, counts: Tensor | None = None) -> Moments:
    """Averages at each sampling temperature, over replicates with these counts (replicates, n) or over the samples."""
    e, u = samples.model_energy, samples.target_energy
    e0, u0 = e.mean(), u.mean()
    features = torch.stack([torch.ones_like(e), e - e0, u - u0, (e - e0) * (u - u0), (e - e0) ** 2], 1)
    tops, sums = [], []
    for log_w in _log_weights(samples, temperatures):
        top = log_w.amax(1)
        weights = (log_w - top[:, None]).exp()
        tops.append(top)
        if counts is None:
            sums.append(weights @ features)
        else:
            columns = (weights.T[:, :, None] * features[:, None]).flatten(1)
            sums.append((counts @ columns).unflatten(1, (-1, features.shape[1])))
    top, total = torch.cat(tops), torch.cat(sums, -2)
    m, h, mh, mm = (total[..., k] / total[..., 0] for k in range(1, 5))
    covariance, variance = (mh - m * h) / temperatures, (mm - m * m) / temperatures**2
    return Moments(total[..., 0].log() + top, m + e0, h + u0, covariance, variance)


def reweighted(samples: ScoredSamples, counts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """ln of the integral of exp(-u), <Ehat>_p and <u>_p, with an axis of replicates where counts were given."""
    log_w = samples.log_base - samples.target_energy
    top = log_w.max()
    features = torch.stack([torch.ones_like(log_w), samples.model_energy, samples.target_energy], 1)
    weighted = (log_w - top).exp()[:, None] * features
    sums = weighted.sum(0) if counts is None else counts @ weighted
    total = sums[..., 0]
    return total.log() + top, sums[..., 1] / total, sums[..., 2] / total


def counts_in_blocks(n: int, n_replicates: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Bootstrap counts (replicates, n) of n samples, in blocks that fit into memory."""
    counts = bootstrap_counts(n, 0, n_replicates, generator or torch.Generator().manual_seed(0))
    size, block = max(CHUNK // n, 1), []
    for count in counts:
        block.append(count)
        if len(block) == size:
            yield torch.stack(block)
            block = []
    if block:
        yield torch.stack(block)


def interval(replicates: Tensor, confidence: float) -> tuple[float, float]:
    """Central interval of the finite replicates; NaN where there are fewer than two."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"a confidence lies between 0 and 1, not at {confidence:g}")
    finite = replicates[torch.isfinite(replicates)]
    if len(finite) < 2:
        return math.nan, math.nan
    half = 0.5 * (1.0 - confidence)
    low, high = torch.quantile(finite, torch.tensor([half, 1.0 - half], dtype=finite.dtype)).tolist()
    return low, high
