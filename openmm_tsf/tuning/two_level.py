"""The two-level gap model and its fit to few samples: the smallest system in which cooling or heating a model helps.

n_g ground states and n_e excited ones, a gap (in units of the temperature that the samples come from) above them. A
model of the same form is fitted to how often each state was seen; it takes ground states never seen for excited ones.

Source: Fields, Ngampruetikorn, Schwab, Palmer, arXiv 2512.09152.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmm_tsf.tuning.samples import ScoredSamples, enumerated
from openmm_tsf.weights import bootstrap_counts

Replicates = Float[Tensor, " replicates"]
Counts = Int[Tensor, "replicates states"]
DRAWN = 4_000_000
"""Samples drawn at a time."""


@dataclass(frozen=True)
class TwoLevel:
    """States 0 ... n_ground - 1 of energy zero and n_excited more of energy `gap`, at temperature 1.

    Raises:
        ValueError: a level without states, or a gap that is not finite and above zero.
    """

    n_ground: int
    n_excited: int
    gap: float

    def __post_init__(self) -> None:
        if min(self.n_ground, self.n_excited) < 1:
            raise ValueError(f"both levels need a state, not {self.n_ground} and {self.n_excited}")
        if not (math.isfinite(self.gap) and self.gap > 0.0):
            raise ValueError(f"a gap must be finite and above 0, not {self.gap:g}")

    @property
    def n_states(self) -> int:
        return self.n_ground + self.n_excited

    @property
    def probabilities(self) -> Float[Tensor, " states"]:
        """Of each state."""
        energy = torch.zeros(self.n_states, dtype=torch.float64)
        energy[self.n_ground :] = self.gap
        return torch.softmax(-energy, 0)

    def sample(self, m: int, n_replicates: int = 1, *, generator: torch.Generator) -> Counts:
        """How often each state is seen in m samples, over replicates.

        Raises:
            ValueError: no samples, or no replicates.
        """
        if m < 1 or n_replicates < 1:
            raise ValueError(f"need at least one sample and one replicate, not {m} and {n_replicates}")
        rows, cumulated = [], self.probabilities.cumsum(0)[:-1].contiguous()
        for first in range(0, n_replicates, max(DRAWN // m, 1)):
            n = min(max(DRAWN // m, 1), n_replicates - first)
            state = torch.bucketize(torch.rand(n, m, generator=generator, dtype=torch.float64), cumulated, right=True)
            state += self.n_states * torch.arange(n)[:, None]
            rows.append(torch.bincount(state.view(-1), minlength=n * self.n_states).view(n, -1))
        return torch.cat(rows)

    def settling_size(self) -> float:
        """Samples from which on t* is about 1: excited states and all ground states have been seen."""
        return max(self.n_ground / self.n_excited * math.exp(self.gap), self.n_ground * math.log(self.n_ground))


@dataclass(frozen=True, eq=False)
class TwoLevelFit:
    """Fitted two-level models, one for each replicate.

    Args:
        truth: what the samples are of.
        n_ground: (R,) fitted number of ground states, n_g^.
        gap: (R,) fitted gap, above zero.
        true_ground: (R,) how many of the fitted ground states are ground states.

    The closed forms below are those of the module's source; `energies` gives the same by enumeration.
    """

    truth: TwoLevel
    n_ground: Int[Tensor, " replicates"] = field(repr=False)
    gap: Replicates = field(repr=False)
    true_ground: Int[Tensor, " replicates"] = field(repr=False)

    @property
    def excited_in_ground(self) -> Replicates:
        """f_g: truly excited fraction of the fitted ground states."""
        return 1.0 - self.true_ground.double() / self.n_ground

    @property
    def excited_in_excited(self) -> Replicates:
        """f_e: truly excited fraction of the fitted excited states."""
        n_excited = self.truth.n_states - self.n_ground
        return 1.0 - (self.truth.n_ground - self.true_ground).double() / n_excited

    @property
    def ground_mass(self) -> Replicates:
        """q: share of the fitted ground states in the fitted model."""
        ratio = (self.truth.n_states / self.n_ground.double() - 1.0) * torch.exp(-self.gap)
        return 1.0 / (1.0 + ratio)

    @property
    def covariance(self) -> Replicates:
        """K at t = 1."""
        q = self.ground_mass
        return self.truth.gap * self.gap * (self.excited_in_excited - self.excited_in_ground) * q * (1.0 - q)

    @property
    def variance(self) -> Replicates:
        """C at t = 1."""
        q = self.ground_mass
        return self.gap**2 * q * (1.0 - q)

    @property
    def t_star(self) -> Replicates:
        """(R,) minimum of KL(q_t || p); +inf where f_e <= f_g, because it then falls for ever as t rises."""
        difference = self.excited_in_excited - self.excited_in_ground
        return torch.where(difference > 0.0, self.gap / self.truth.gap / difference.clamp(min=1e-300), math.inf)

    @property
    def t_prime(self) -> Replicates:
        """(R,) minimum of KL(p || q_t); +inf where p does not prefer the fitted ground states."""
        p = self.truth.probabilities
        n_wrong = self.n_ground - self.true_ground
        ground = self.true_ground * p[0] + n_wrong * p[-1]
        right = torch.log(ground / (1.0 - ground) * (self.truth.n_states / self.n_ground.double() - 1.0))
        return torch.where(right > 0.0, self.gap / right.clamp(min=1e-300), math.inf)

    def energies(self, replicate: int, *, t: float = 1.0) -> ScoredSamples:
        """The states of one replicate, in the at most four classes that model and truth tell apart."""
        truth, n, right = self.truth, int(self.n_ground[replicate]), int(self.true_ground[replicate])
        sizes = torch.tensor([right, n - right, truth.n_ground - right, truth.n_excited - (n - right)])
        model = float(self.gap[replicate]) * torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
        target = truth.gap * torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
        there = sizes > 0
        return enumerated(model[there], target[there], sizes[there].double().log(), t=t)


def fit_two_level(truth: TwoLevel, counts: Counts, *, generator: torch.Generator | None = None) -> TwoLevelFit:
    """Fit two levels to how often each state was seen, in every replicate.

    States are ranked by frequency; each prefix of the ranks is tried as the ground level, with its empirical mass q
    (q = 1 becomes 1 - 1/M); the prefix that maximises KL(Bern(q) || Bern(n_g^/N)) stays, and the gap is the one that
    gives it this mass: ln[q (N/n_g^ - 1)/(1 - q)]. Equals are ranked at random. That matters where all but one of the
    states seen once have the mass that all of them are given, so that one of them is left to the excited level.

    Args:
        truth: what the samples are of; of it, the fit knows the number of states only.
        counts: (R, N).
        generator: of the ranks of equals; by default one with a fixed seed.

    Raises:
        ValueError: counts of another number of states, or negative; fewer than 2 samples; samples that show no gap,
            every state having been seen equally often.
    """
    if counts.shape[1] != truth.n_states:
        raise ValueError(f"counts of {counts.shape[1]} states for a model of {truth.n_states}: not one state space")
    if (counts < 0).any():
        raise ValueError("a state cannot have been seen a negative number of times")
    m = counts.sum(1).double()
    if (m < 2).any():
        raise ValueError(f"a fit needs at least 2 samples, and a replicate has {int(m.min())}")
    chance = torch.rand(counts.shape, generator=generator or torch.Generator().manual_seed(0), dtype=torch.float64)
    order = torch.argsort(counts + chance, dim=1, descending=True)
    ranked, k = counts.gather(1, order), torch.arange(1, truth.n_states)
    q = (ranked.cumsum(1)[:, :-1] / m[:, None]).clamp(max=1.0)
    q = torch.where(q == 1.0, 1.0 - 1.0 / m[:, None], q)
    r = k.double() / truth.n_states
    # with q = 1 - 1/M a prefix of nearly all states can lie below the uniform share: that is no ground level
    divergence = torch.where(q > r, torch.special.xlogy(q, q / r) + (1.0 - q) * torch.log((1.0 - q) / (1.0 - r)), -1.0)
    best, row = divergence.max(1)
    if n := int((best <= 1e-14).sum()):
        raise ValueError(
            f"in {n} of {len(counts)} replicates every state was seen equally often: there is no gap to fit"
        )
    chosen = row[:, None]
    mass, share = q.gather(1, chosen)[:, 0], r[row]
    gap = torch.log(mass * (1.0 / share - 1.0) / (1.0 - mass))
    right = (order < truth.n_ground).cumsum(1).gather(1, chosen)[:, 0]
    return TwoLevelFit(truth, row + 1, gap, right)


# --- the phase picture ------------------------------------------------------------------------------------------------


class PhasePicture(NamedTuple):
    """Over a grid of gaps (rows) and numbers of samples (columns).

    Args:
        gaps, sizes: of rows and columns.
        median, low, high: (rows, columns) median of t* over replicates, and the bounds of its 95 % interval.
        spread: (rows, columns, 2) quartiles of t* over replicates.
        prime: (rows, columns) median of t'.
        without: (rows, columns) share of replicates that have no t*; they count as +inf.
        failed: (rows, columns) share of replicates whose samples show no gap; they do not count.
        critical: (rows, columns) median of the gap beyond which cooling helps, `critical_gap`.
    """

    gaps: tuple[float, ...]
    sizes: tuple[int, ...]
    median: Tensor
    low: Tensor
    high: Tensor
    spread: Tensor
    prime: Tensor
    without: Tensor
    failed: Tensor
    critical: Tensor


def critical_gap(fit: TwoLevelFit, m: int) -> Replicates:
    """The gap beyond which cooling helps a model that has seen no excited state: ln[(M - 1)(N/n_g^ - 1)]/f_e."""
    n = fit.truth.n_states / fit.n_ground.double()
    return torch.log((m - 1.0) * (n - 1.0)) / fit.excited_in_excited


def phase_picture(
    n_ground: int, n_excited: int, gaps: Sequence[float], sizes: Sequence[int], *, n_replicates: int = 50,
    generator: torch.Generator,
) -> PhasePicture:  # fmt: skip
    """t* over gaps and numbers of samples: where to cool, to keep, to heat.

    Args:
        n_ground, n_excited: numbers of states.
        gaps: in units of the temperature.
        sizes: numbers of samples, each at least 2.
        n_replicates: of each.
        generator: of the samples.
    """
    cells = []
    for gap in gaps:
        truth = TwoLevel(n_ground, n_excited, gap)
        for m in sizes:
            counts = truth.sample(m, n_replicates, generator=generator)
            shown = counts.amax(1) > counts.amin(1)
            fit = fit_two_level(truth, counts[shown], generator=generator) if shown.any() else None
            cells.append(_cell(fit, m, n_replicates))
    columns = [torch.stack(column).unflatten(0, (len(gaps), len(sizes))) for column in zip(*cells, strict=True)]
    return PhasePicture(tuple(map(float, gaps)), tuple(sizes), *columns)


def _cell(fit: TwoLevelFit | None, m: int, n_replicates: int) -> tuple[Tensor, ...]:
    """The statistics of one gap and one number of samples."""
    failed = torch.tensor(1.0 - (len(fit.gap) if fit else 0) / n_replicates, dtype=torch.float64)
    if fit is None:
        nothing = torch.tensor(math.nan, dtype=torch.float64)
        return nothing, nothing, nothing, torch.stack([nothing, nothing]), nothing, nothing, failed, nothing
    star = fit.t_star
    low, high = median_interval(star)
    quartiles = torch.tensor([0.25, 0.75], dtype=torch.float64)
    spread = torch.quantile(star, quartiles, interpolation="nearest")
    without = torch.isinf(star).double().mean()
    return star.median(), low, high, spread, fit.t_prime.median(), without, failed, critical_gap(fit, m).median()


def median_interval(values: Replicates, *, n_replicates: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Bootstrap interval (95 %) of a median; +inf among the values is the largest of them."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.stack(list(bootstrap_counts(len(values), 0, n_replicates, generator)))
    order = values.argsort()
    middle = torch.searchsorted(counts[:, order].cumsum(1), torch.full((n_replicates, 1), 0.5 * len(values)).double())
    medians = values[order[middle[:, 0].clamp(max=len(values) - 1)]].sort().values
    return medians[int(0.025 * n_replicates)], medians[min(int(0.975 * n_replicates), n_replicates - 1)]
