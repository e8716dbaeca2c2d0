"""Importance weights: effective sample size, averages, resampling and bootstrap errors.

Everything takes logarithms of weights [nat] and works on differences to their maximum, so no constant in them can over-
or underflow. A weight of zero is -inf; NaN and +inf are errors. `n_rejected` counts draws that were thrown away before
they had a weight; they are zero weights wherever the number of draws matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

FEWEST = 100
"""Draws below which an effective sample size means nothing: the large weights are still to come."""
FEWEST_EFFECTIVE = 20
"""Effective draws below which the same is said of estimates."""
LogWeights = Tensor
"""(n,) [nat]; every function checks it."""


class Estimate(NamedTuple):
    """A value and its standard error, tensors of the same shape and unit."""

    value: Tensor
    error: Tensor


def checked(log_weights: LogWeights, n_rejected: int = 0) -> LogWeights:
    """The log-weights in float64 on the CPU, or an error that says what is wrong with them.

    Raises:
        ValueError: not a vector, empty, NaN or +inf among them, or a negative number of rejected draws.
    """
    if log_weights.ndim != 1 or len(log_weights) == 0:
        raise ValueError(
            f"log-weights must be a vector with at least one entry, not of shape {tuple(log_weights.shape)}"
        )
    if n_rejected < 0:
        raise ValueError(f"the number of rejected draws cannot be negative, got {n_rejected}")
    bad = torch.isnan(log_weights) | (log_weights == math.inf)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(f"{int(bad.sum())} of {len(bad)} log-weights are NaN or +inf (first: row {first})")
    return log_weights.detach().to("cpu", torch.float64)


def effective_sample_size(log_weights: LogWeights, n_rejected: int = 0) -> float:
    """Kish's effective sample size as a share of all draws, (sum w)^2 / (n sum w^2) in [0, 1], nothing clipped.

    n counts the rejected draws too. Zero when every weight is zero.

    Source: L. Kish, Survey Sampling, 1965.
    """
    log_w = checked(log_weights, n_rejected)
    if log_w.max() == -math.inf:
        return 0.0
    w = torch.exp(log_w - log_w.max())
    return min(1.0, float(w.sum().square() / w.square().sum()) / (len(w) + n_rejected))  # rounding may exceed it


def largest_weight_share(log_weights: LogWeights) -> float:
    """Share of the total weight that the heaviest draw carries, in (0, 1]; NaN when every weight is zero."""
    log_w = checked(log_weights)
    return float(torch.exp(log_w.max() - torch.logsumexp(log_w, 0)))


def log_mean_exp(log_weights: LogWeights, n_rejected: int = 0) -> float:
    """ln of the mean weight [nat], rejected draws counted as zeros; -inf when every weight is zero."""
    log_w = checked(log_weights, n_rejected)
    return float(torch.logsumexp(log_w, 0)) - math.log(len(log_w) + n_rejected)


def log_mean_exp_error(ess: float, n: int) -> float:
    """Standard error of the ln of the mean weight [nat], by the ESS as a share of n draws: sqrt((1/ESS - 1)/n).

    Infinite for one draw, which knows of no scatter, and where all weights are zero.
    """
    return math.sqrt((1.0 / ess - 1.0) / n) if ess > 0 and n > 1 else math.inf


def normalised_weights(log_weights: LogWeights) -> Float[Tensor, " draws"]:
    """Weights that sum to 1.

    Raises:
        ValueError: every weight is zero.
    """
    log_w = checked(log_weights)
    if log_w.max() == -math.inf:
        raise ValueError(f"all {len(log_w)} weights are zero: no draw lies where the target does")
    return torch.softmax(log_w, 0)


def weighted_mean(weights: Float[Tensor, " draws"], values: Float[Tensor, "draws ..."]) -> Float[Tensor, "..."]:
    """Self-normalised average of `values` under `weights`, NaN when all are zero.

    Rows of weight zero do not enter, whatever their value.
    """
    kept = weights > 0
    w = weights[kept]
    return torch.tensordot(w, values[kept].to(w.dtype), dims=1) / w.sum()


def systematic_resample(log_weights: LogWeights, n: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    """Indices of n draws of equal weight, ascending: row i appears floor or ceil of n w_i times.

    One uniform number places a comb of n teeth on the cumulated weights, the resampling of least variance.

    Source: G. Kitagawa, J. Comput. Graph. Stat. 5, 1 (1996).
    """
    if n < 1:
        raise ValueError(f"can only resample a positive number of draws, not {n}")
    cumulated = torch.cumsum(normalised_weights(log_weights), 0)
    offset = torch.rand((), generator=generator, dtype=torch.float64, device=generator.device).cpu()
    # scaled by the last entry, so that rounding in the sum cannot push the last tooth off the end
    teeth = (torch.arange(n, dtype=torch.float64) + offset) / n * cumulated[-1]
    index = torch.searchsorted(cumulated, teeth, right=True)
    heaviest_last = int((cumulated < cumulated[-1]).sum())
    return index.clamp(max=heaviest_last)


def bootstrap_counts(
    n: int, n_rejected: int, n_replicates: int, generator: torch.Generator
) -> Iterator[Float[Tensor, " draws"]]:
    """How often each of n draws appears in a replicate of all n + n_rejected draws; one vector a replicate."""
    total = n + n_rejected
    for _ in range(n_replicates):
        rows = torch.randint(total, (total,), generator=generator, device=generator.device).cpu()
        yield torch.bincount(rows, minlength=total)[:n].to(torch.float64)


def bootstrap(
    log_weights: LogWeights,
    statistic: Callable[[Tensor], Tensor],
    *,
    n_rejected: int = 0,
    n_replicates: int = 200,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "replicates ..."]:
    """A statistic of the weights over bootstrap replicates of the draws, rejected ones among them.

    Args:
        log_weights: (n,) [nat].
        statistic: takes weights (n,), which sum to about 1, and gives a tensor of any one shape.
        generator: defaults to a fresh one with a fixed seed, so that error bars are reproducible.

    Returns:
        the statistic of each replicate; its standard deviation over the first axis is the standard error.

    Source: B. Efron, Ann. Stat. 7, 1 (1979).
    """
    weights = normalised_weights(log_weights)
    counts = bootstrap_counts(len(weights), n_rejected, n_replicates, generator or torch.Generator().manual_seed(0))
    return torch.stack([statistic(weights * count) for count in counts])


def bootstrap_mean(
    log_weights: LogWeights,
    values: Tensor,
    *,
    n_rejected: int = 0,
    n_replicates: int = 200,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Weighted average of `values` (n, ...) and its bootstrap standard error, in the unit of the values.

    The error is infinite for one draw, which knows of no scatter.

    Raises:
        ValueError: as many values as draws are needed.
    """
    if len(values) != len(log_weights):
        raise ValueError(f"{len(values)} values for {len(log_weights)} draws")
    weights = normalised_weights(log_weights)
    replicates = bootstrap(
        log_weights,
        lambda w: weighted_mean(w, values),
        n_rejected=n_rejected,
        n_replicates=n_replicates,
        generator=generator,
    )
    error = replicates.std(0)
    return Estimate(weighted_mean(weights, values), error if len(values) > 1 else torch.full_like(error, torch.inf))
