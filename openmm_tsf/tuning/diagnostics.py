"""Which way to turn the sampling temperature of a model, from samples of it at one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from openmm_tsf.tuning.samples import (
    TAIL,
    ScoredSamples,
    counts_in_blocks,
    interval,
    moments,
    reweighted,
    target_ess,
    usable,
    without_clashes,
)  # fmt: skip
from openmm_tsf.tuning.search import held_out_energies

Advice = Literal["lower", "keep", "raise"]
ROUNDING = 1e-12
"""Relative size below which an exact difference is rounding."""


@dataclass(frozen=True)
class TemperatureDiagnostics:
    """Which way to turn the sampling temperature of a model, from samples of it at one t.

    Args:
        t: sampling temperature of the samples.
        covariance: K.
        variance: C.
        difference, difference_interval: K - C = t d KL(q_t || p)/dt, and its bootstrap interval.
        fidelity: advice for KL(q_t || p).
        model_mean, target_mean: <Ehat> over q_t and over p.
        gap, gap_interval: their difference, t^2 d KL(p || q_t)/dt, and its bootstrap interval.
        diversity: advice for KL(p || q_t).
        target_mean_from: what <Ehat>_p was averaged over: samples of p held out from training, these samples reweighted
            to p, or all states.
        ess: Kish's effective share of the samples reweighted to p; clashes count.
        left_out: share of the samples left out as clashes; everything but `ess` is of the others.
        n: number of samples.
        confidence: of the intervals.
    """

    t: float
    covariance: float
    variance: float
    difference: float
    difference_interval: tuple[float, float]
    fidelity: Advice
    model_mean: float
    target_mean: float
    gap: float
    gap_interval: tuple[float, float]
    diversity: Advice
    target_mean_from: Literal["held-out samples", "reweighting", "enumeration"]
    ess: float
    left_out: float
    n: int
    confidence: float

    def __str__(self) -> str:
        (a, b), (c, d) = self.difference_interval, self.gap_interval
        return (
            f"t = {self.t:g}: K = {self.covariance:.4g}, C = {self.variance:.4g}, K - C = {self.difference:.3g} "
            f"[{a:.3g}, {b:.3g}]: {self.fidelity} the temperature for fidelity, KL(q_t || p); <Ehat> = "
            f"{self.model_mean:.4g} in the model and {self.target_mean:.4g} in the target ({self.target_mean_from}), "
            f"difference {self.gap:.3g} [{c:.3g}, {d:.3g}]: {self.diversity} it for diversity, KL(p || q_t); "
            f"ESS {100 * self.ess:.3g} %, {100 * self.left_out:.3g} % of {self.n:,} samples left out as clashes"
        )


def temperature_diagnostics(
    samples: ScoredSamples, *, held_out: Float[Tensor, " m"] | None = None, tail: float = TAIL,
    confidence: float = 0.95, n_replicates: int = 200, generator: torch.Generator | None = None,
) -> TemperatureDiagnostics:  # fmt: skip
    """K, C and what they say about the sampling temperature, in both directions of the divergence.

    The advice is "keep" where the bootstrap interval of the derivative contains zero.

    Args:
        samples: of the model at the temperature in question, or all states.
        held_out: (m,) Ehat of samples of p that the model was not fitted to; without, <Ehat>_p is that of the samples
            reweighted to p, which is worth as much as `ess` times their number.
        tail: see `without_clashes`.
        confidence: of the intervals.
        n_replicates: of the bootstrap.
        generator: of the bootstrap; by default one with a fixed seed.

    Raises:
        ValueError: too few samples, an energy that does not vary, fewer than two replicates, or as `without_clashes`.
    """
    if n_replicates < 2:
        raise ValueError(f"an interval needs at least 2 bootstrap replicates, not {n_replicates}")
    kept, left_out = without_clashes(samples, tail)
    usable(kept)
    t = torch.tensor([samples.t], dtype=torch.float64)
    value = moments(kept, t)
    difference = float(value.covariance - value.variance)
    target = _target_mean(kept, held_out)
    replicates = _replicates(kept, held_out, t, n_replicates, generator)
    gap = float(value.model) - target
    scales = float(value.covariance.abs() + value.variance), abs(float(value.model)) + abs(target)
    found = [
        _advise(number, column, confidence, scale)
        for number, column, scale in zip((difference, gap), replicates, scales, strict=True)
    ]
    source = "enumeration" if samples.exact else "reweighting"
    return TemperatureDiagnostics(
        t=samples.t, covariance=float(value.covariance), variance=float(value.variance), difference=difference,
        difference_interval=found[0][1], fidelity=found[0][0], model_mean=float(value.model), target_mean=target,
        gap=gap, gap_interval=found[1][1], diversity=found[1][0],
        target_mean_from=source if held_out is None else "held-out samples",
        ess=float(target_ess(samples, t)), left_out=left_out, n=len(samples), confidence=confidence,
    )  # fmt: skip


def _target_mean(kept: ScoredSamples, held_out: Tensor | None) -> float:
    return float(reweighted(kept)[1] if held_out is None else held_out_energies(held_out).mean())


def _replicates(
    kept: ScoredSamples, held_out: Tensor | None, t: Tensor, n_replicates: int, generator: torch.Generator | None
) -> tuple[Tensor | None, Tensor | None]:
    """Bootstrap of K - C and of <Ehat>_q - <Ehat>_p; None for what has no statistical error."""
    if kept.exact and held_out is None:
        return None, None
    differences, gaps = [], []
    if kept.exact:
        own = moments(kept, t).model.expand(n_replicates)
        gaps = [own]
    else:
        for counts in counts_in_blocks(len(kept), n_replicates, generator):
            m = moments(kept, t, counts)
            differences.append((m.covariance - m.variance)[:, 0])
            gaps.append(m.model[:, 0] - (reweighted(kept, counts)[1] if held_out is None else 0.0))
    gap = torch.cat(gaps)
    if held_out is not None:
        energies = held_out_energies(held_out)
        blocks = counts_in_blocks(len(energies), n_replicates, generator)
        gap = gap - torch.cat([counts @ energies / counts.sum(1) for counts in blocks])
    return (torch.cat(differences) if differences else None), gap


def _advise(
    value: float, replicates: Tensor | None, confidence: float, scale: float
) -> tuple[Advice, tuple[float, float]]:
    """Lower where a derivative is surely positive, raise where it is surely negative."""
    if replicates is None:
        bounds = value, value
        low, high = value - ROUNDING * scale, value + ROUNDING * scale
    else:
        bounds = low, high = interval(replicates, confidence)
    if math.isnan(low) or low <= 0.0 <= high:
        return "keep", bounds
    return ("lower" if value > 0.0 else "raise"), bounds
