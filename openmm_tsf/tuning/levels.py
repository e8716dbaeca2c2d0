"""Which energy levels of the target a model over- and under-weights, and what a change of temperature does to each."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmm_tsf.tuning.samples import TAIL, ScoredSamples, counts_in_blocks, usable, without_clashes

MOST_LEVELS = 64
"""Different energies up to which each is a level of its own; more are cut into levels of equal weight."""
Levels = Float[Tensor, " levels"]


@dataclass(frozen=True, eq=False)
class LevelDecomposition:
    """Shares of the levels of the target, lowest first, in the model at t and in the target.

    Args:
        t: sampling temperature.
        energy: (L,) mean u of the level in the model.
        model, model_error: (L,) share q_t(level) and its standard error.
        target, target_error: (L,) share p(level), of samples by reweighting, and its standard error.
        slope, slope_error: (L,) d ln q_t(level)/dt = (<Ehat>_level - <Ehat>)/t^2; cooling does the opposite.
        left_out: share of the samples left out as clashes.
    """

    t: float
    energy: Levels = field(repr=False)
    model: Levels = field(repr=False)
    model_error: Levels = field(repr=False)
    target: Levels = field(repr=False)
    target_error: Levels = field(repr=False)
    slope: Levels = field(repr=False)
    slope_error: Levels = field(repr=False)
    left_out: float

    @property
    def helped_by_cooling(self) -> Tensor:
        """(L,) True where lowering t brings the model's share closer to the right one."""
        return (self.model - self.target) * self.slope > 0.0


def energy_level_decomposition(
    samples: ScoredSamples, *, n_levels: int | None = None, tail: float = TAIL, n_replicates: int = 200,
    generator: torch.Generator | None = None,
) -> LevelDecomposition:  # fmt: skip
    """Shares of the target's energy levels in the model and in the target, and how temperature moves them.

    Args:
        samples: of the model at the temperature in question, or all states.
        n_levels: cut the energies into so many levels of equal weight in the model and the target together; by default
            each energy is a level, if there are at most MOST_LEVELS, and 12 levels otherwise.
        tail: see `without_clashes`.
        n_replicates: of the bootstrap; an enumeration has no errors.
        generator: of the bootstrap; by default one with a fixed seed.

    Raises:
        ValueError: fewer than 2 levels or replicates; too few samples, or an energy that does not vary.
    """
    if n_levels is not None and n_levels < 2:
        raise ValueError(f"a decomposition has at least 2 levels, not {n_levels}")
    if n_replicates < 2:
        raise ValueError(f"errors need at least 2 bootstrap replicates, not {n_replicates}")
    kept, left_out = without_clashes(samples, tail)
    usable(kept)
    log_q = torch.log_softmax(kept.log_weights, 0)
    log_p = torch.log_softmax(kept.log_base - kept.target_energy, 0)
    level = _levels(kept.target_energy, 0.5 * (log_q.exp() + log_p.exp()), n_levels)
    member = torch.nn.functional.one_hot(level).to(torch.float64)
    rows = _statistics(kept, member, log_q.exp(), log_p.exp(), torch.ones(1, len(kept), dtype=torch.float64))
    errors = torch.zeros(4, member.shape[1], dtype=torch.float64)
    if not kept.exact:
        blocks = counts_in_blocks(len(kept), n_replicates, generator)
        replicates = [_statistics(kept, member, log_q.exp(), log_p.exp(), counts) for counts in blocks]
        errors = _spread(torch.cat(replicates, 1))
    energy, model, target, slope = rows[:, 0]
    return LevelDecomposition(kept.t, energy, model, errors[1], target, errors[2], slope, errors[3], left_out)


def _levels(energy: Tensor, weights: Tensor, n_levels: int | None) -> Int[Tensor, " samples"]:
    """The level of each sample."""
    scale = energy.abs().max().clamp(min=1.0)
    different, level = torch.unique((energy / scale * 1e9).round(), return_inverse=True)
    if n_levels is None and len(different) <= MOST_LEVELS:
        return level
    share = torch.zeros(len(different), dtype=torch.float64).index_add_(0, level, weights)
    middle = share.cumsum(0) - 0.5 * share  # a level in which most of the weight lies stays in one piece
    cut = (middle / share.sum() * (n_levels or 12)).floor().long().clamp(0, (n_levels or 12) - 1)
    return torch.unique(cut[level], return_inverse=True)[1]


def _statistics(samples: ScoredSamples, member: Tensor, q: Tensor, p: Tensor, counts: Tensor) -> Tensor:
    """(4, replicates, levels): energy, share in the model, share in the target, slope."""
    e, u = samples.model_energy, samples.target_energy
    e = e - e.mean()
    in_q = counts @ (q[:, None] * member)
    total = in_q.sum(1, keepdim=True)
    model_energy = counts @ ((q * e)[:, None] * member)
    slope = (model_energy / in_q - model_energy.sum(1, keepdim=True) / total) / samples.t**2
    in_p = counts @ (p[:, None] * member)
    energy = counts @ ((q * u)[:, None] * member) / in_q
    return torch.stack([energy, in_q / total, in_p / in_p.sum(1, keepdim=True), slope])


def _spread(replicates: Tensor) -> Tensor:
    """Standard deviation over the second axis; replicates that lack a level do not count for it."""
    finite = torch.isfinite(replicates)
    n = finite.sum(1).clamp(min=2)
    values = torch.where(finite, replicates, 0.0)
    mean = values.sum(1) / n
    return (torch.where(finite, (replicates - mean[:, None]) ** 2, 0.0).sum(1) / (n - 1)).sqrt()
