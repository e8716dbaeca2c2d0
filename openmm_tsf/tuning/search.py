"""The sampling temperatures at which a model is closest to its target, in both directions of the divergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor

from openmm_tsf.tuning.pool import pooled, pooled_replicates
from openmm_tsf.tuning.samples import (
    FEWEST,
    TAIL,
    Grid,
    Moments,
    ScoredSamples,
    counts_in_blocks,
    effective_numbers,
    interval,
    moments,
    positive,
    reweighted,
    target_ess,
    usable,
    without_clashes,
)

GRID = (0.25, 4.0, 81)
"""Sampling temperatures that are searched unless others are given: lowest, highest, and how many."""
DRAWN_AT = 17
"""How many of them fresh samples are drawn at."""
ENOUGH, ENOUGH_SHARE = 100.0, 0.05
"""Effective samples that a temperature needs to be trusted, or this share of all, whichever is less."""

Draw = Callable[[float], ScoredSamples]


class Root(NamedTuple):
    """A sampling temperature and its bootstrap interval, and the share of replicates that had no such temperature."""

    value: float
    interval: tuple[float, float]
    share_without: float


@dataclass(frozen=True, eq=False)
class OptimalTemperature:
    """Where on a grid of sampling temperatures a model is closest to its target.

    Args:
        t_star: minimum of KL(q_t || p), the temperature of fidelity; None where the grid has none.
        t_prime: minimum of KL(p || q_t), the temperature of diversity; None where the grid has none.
        statement: what that means, in words.
        temperatures: (G,) ascending.
        fidelity, diversity: (G,) KL(q_t || p) and KL(p || q_t) [nat]. Of samples, both rest on ln Z and <u> of p by
            reweighting, a constant that does not move their minima; `reweighting_ess` says what it is worth.
        covariance, variance: (G,) K and C.
        ess: (G,) Kish's effective share of samples of q_t reweighted to p.
        n_effective: (G,) effective samples at each t.
        trusted: (G,) where these are enough; roots are searched nowhere else.
        method: how averages at other temperatures were had.
        left_out: share of the samples left out as clashes.
        reweighting_ess: of all samples reweighted to p, clashes left out.
        confidence: of the intervals.
    """

    t_star: Root | None
    t_prime: Root | None
    statement: str
    temperatures: Grid = field(repr=False)
    fidelity: Grid = field(repr=False)
    diversity: Grid = field(repr=False)
    covariance: Grid = field(repr=False)
    variance: Grid = field(repr=False)
    ess: Grid = field(repr=False)
    n_effective: Grid = field(repr=False)
    trusted: Tensor = field(repr=False)
    method: Literal["enumeration", "reweighting", "fresh samples"]
    left_out: float
    reweighting_ess: float
    confidence: float


def optimal_sampling_temperature(
    source: ScoredSamples | Draw, *, temperatures: Sequence[float] | Tensor | None = None,
    held_out: Float[Tensor, " m"] | None = None, tail: float = TAIL, confidence: float = 0.95, n_replicates: int = 200,
    generator: torch.Generator | None = None,
) -> OptimalTemperature:  # fmt: skip
    """t* and t', with the curves they are minima of.

    From an enumeration everything is exact. From samples of one t, averages at another are by reweighting, which is
    trusted as far as `trusted` says. From a callable, fresh samples are drawn at DRAWN_AT temperatures of the grid (or
    at all of those given) and are used together.

    Args:
        source: samples or an enumeration, or a callable that gives `ScoredSamples` of any t.
        temperatures: of the grid; by default GRID.
        held_out: (m,) Ehat of samples of p that the model was not fitted to, for <Ehat>_p; without, by reweighting.
        tail: see `without_clashes`.
        confidence: of the intervals.
        n_replicates: of the bootstrap, 0 for none.
        generator: of the bootstrap; by default one with a fixed seed.

    Raises:
        ValueError: as `temperature_diagnostics`; fewer than 2 temperatures, or one not above 0.
    """
    fresh = not isinstance(source, ScoredSamples)
    grid = _grid(temperatures)
    draws, left_out = _kept(_draws(source, grid, temperatures is None) if fresh else [source], tail)
    samples = pooled(draws) if fresh else usable(draws[0])
    target = reweighted(samples)
    target_mean = float(target[1] if held_out is None else held_out_energies(held_out).mean())
    values = moments(samples, grid)
    trusted, n_effective = _trusted(samples, grid)
    fidelity = values.target - values.model / grid - values.log_z + target[0]
    diversity = target_mean / grid + values.log_z - target[0] - target[2]
    slopes = [_slopes(values, mean)[trusted] for mean in (None, target_mean)]
    star = _minimum(samples, grid[trusted], fidelity[trusted], slopes[0], None)
    prime = _minimum(samples, grid[trusted], diversity[trusted], slopes[1], target_mean)
    roots = [None if found is None else Root(found, (math.nan, math.nan), math.nan) for found in (star, prime)]
    if n_replicates and not (samples.exact and held_out is None):
        roots = _intervals(roots, slopes, draws, grid[trusted], held_out, (confidence, n_replicates, generator))
    log_w = samples.log_base - samples.target_energy
    return OptimalTemperature(
        *roots, _statement(roots, grid[trusted], values, target_mean, trusted),
        temperatures=grid, fidelity=fidelity, diversity=diversity, covariance=values.covariance,
        variance=values.variance,
        ess=target_ess(samples, grid) * (1.0 - left_out),
        n_effective=n_effective, trusted=trusted,
        method="enumeration" if samples.exact else "fresh samples" if fresh else "reweighting", left_out=left_out,
        reweighting_ess=1.0 if samples.exact else float(1.0 / log_w.softmax(0).square().sum() / len(log_w)),
        confidence=confidence,
    )  # fmt: skip


def held_out_energies(held_out: Tensor) -> Float[Tensor, " m"]:
    """Model energies of held-out samples of p, or an error that says what is wrong with them."""
    energies = held_out.detach().to("cpu", torch.float64)
    if energies.ndim != 1 or len(energies) < FEWEST:
        raise ValueError(
            f"need the model energies of at least {FEWEST} held-out samples, not shape {(*energies.shape,)}"
        )
    if bad := int((~torch.isfinite(energies)).sum()):
        raise ValueError(f"{bad} of {len(energies)} held-out samples have a model energy that is not finite")
    return energies


def _grid(temperatures: Sequence[float] | Tensor | None) -> Grid:
    if temperatures is None:
        low, high, n = GRID
        return torch.logspace(math.log10(low), math.log10(high), n, dtype=torch.float64)
    grid = torch.as_tensor(temperatures, dtype=torch.float64).unique()
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"a search needs at least 2 different temperatures, not {len(grid)}")
    for t in grid.tolist():
        positive(t)
    return grid


def _draws(draw: Draw, grid: Grid, thin: bool) -> list[ScoredSamples]:
    """Fresh samples, at every so manieth temperature of the default grid."""
    rows = range(0, len(grid), (len(grid) - 1) // (DRAWN_AT - 1)) if thin else range(len(grid))
    draws = [draw(float(grid[k])) for k in rows]
    for k, drawn in zip(rows, draws, strict=True):
        if not math.isclose(drawn.t, float(grid[k]), rel_tol=1e-9):
            raise ValueError(f"samples asked for at t = {grid[k]:g} came at t = {drawn.t:g}")
    return draws


def _kept(draws: list[ScoredSamples], tail: float) -> tuple[list[ScoredSamples], float]:
    """All draws without clashes, and the share that was left out."""
    kept, shares = zip(*(without_clashes(draw, tail) for draw in draws), strict=True)
    return list(kept), sum(shares) / len(shares)


def _trusted(samples: ScoredSamples, grid: Grid) -> tuple[Tensor, Grid]:
    n_effective = effective_numbers(samples, grid)
    if samples.exact:
        return torch.ones(len(grid), dtype=torch.bool), n_effective
    return n_effective >= max(FEWEST, min(ENOUGH, ENOUGH_SHARE * len(samples))), n_effective


# --- minima -----------------------------------------------------------------------------------------------------------


def slope(samples: ScoredSamples, t: float, target_mean: float | None) -> float:
    """K - C at t, or <Ehat>_q - <Ehat>_p where <Ehat>_p is given: what is zero at t* and at t'."""
    m = moments(samples, torch.tensor([t], dtype=torch.float64))
    return float(m.covariance - m.variance if target_mean is None else m.model - target_mean)


def _slopes(values: Moments, target_mean: Tensor | float | None) -> Tensor:
    return values.covariance - values.variance if target_mean is None else values.model - target_mean


def _minimum(samples: ScoredSamples, ts: Grid, curve: Grid, slopes: Grid, target_mean: float | None) -> float | None:
    """The lowest minimum inside the trusted part of the grid, None if the curve ends lower."""
    found = []
    for k in range(len(ts) - 1):
        if slopes[k] < 0.0 <= slopes[k + 1]:
            root = _zero(lambda t: slope(samples, t, target_mean), float(ts[k]), float(ts[k + 1]))
            found.append((float(curve[k : k + 2].min()), root))
    if not found:
        return None
    height, root = min(found)
    return root if height <= float(curve.min()) else None


def _zero(rising: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that rises through zero between two temperatures is zero; up to rounding, at one of them too."""
    if rising(low) >= 0.0:
        return low
    return high if rising(high) <= 0.0 else brentq(rising, low, high, xtol=1e-12)


def _intervals(
    roots: list[Root | None], slopes: list[Grid], draws: list[ScoredSamples], ts: Grid, held_out: Tensor | None,
    rule: tuple[float, int, torch.Generator | None],
) -> list[Root | None]:  # fmt: skip
    """The roots with bootstrap intervals: of each replicate, the zero of its slope nearest to the root."""
    confidence, n_replicates, generator = rule
    found, means = [[], []], None
    if held_out is not None:
        energies = held_out_energies(held_out)
        blocks = counts_in_blocks(len(energies), n_replicates, generator)
        means = torch.cat([counts @ energies / counts.sum(1) for counts in blocks])
    if draws[0].exact:
        found[1] = [_slopes(moments(draws[0], ts), means[:, None])]
    else:
        done = 0
        for values, mean in _replicates(draws, ts, n_replicates, generator):
            own = mean if means is None else means[done : done + len(mean)]
            found[0].append(_slopes(values, None))
            found[1].append(_slopes(values, own[:, None]))
            done += len(mean)
    results = []
    for root, own, replicated in zip(roots, slopes, found, strict=True):
        if root is None or not replicated:
            results.append(root)
            continue
        # interpolation errs alike in all of them
        off = root.value / float(nearest_zeros(ts, own[None], root.value))
        replicates = off * nearest_zeros(ts, torch.cat(replicated), root.value)
        share = float(torch.isnan(replicates).double().mean())
        results.append(Root(root.value, interval(replicates, confidence), share))
    return results


def _replicates(
    draws: list[ScoredSamples], ts: Grid, n_replicates: int, generator: torch.Generator | None
) -> Iterator[tuple[Moments, Tensor]]:
    """Moments and <Ehat>_p of bootstrap replicates, some at a time."""
    if len(draws) == 1:
        for counts in counts_in_blocks(len(draws[0]), n_replicates, generator):
            yield moments(draws[0], ts, counts), reweighted(draws[0], counts)[1]
        return
    for samples in pooled_replicates(draws, n_replicates, generator):
        values = moments(samples, ts)
        yield Moments(*(value[None] for value in values)), reweighted(samples)[1][None]


def nearest_zeros(ts: Grid, slopes: Float[Tensor, "replicates grid"], near: float) -> Float[Tensor, " replicates"]:
    """Where each row rises through zero, by linear interpolation in ln t, nearest to `near`; NaN where nowhere."""
    a, b = slopes[:, :-1], slopes[:, 1:]
    rising = (a < 0.0) & (b >= 0.0)
    x = ts.log()
    zero = x[:-1] + (x[1:] - x[:-1]) * torch.where(rising, -a / (b - a), 0.0)
    distance = torch.where(rising, (zero - math.log(near)).abs(), math.inf)
    best, row = distance.min(1)
    return torch.where(best < math.inf, zero.gather(1, row[:, None])[:, 0].exp(), math.nan)


# --- in words ---------------------------------------------------------------------------------------------------------


def _statement(roots: list[Root | None], ts: Grid, values: Moments, target_mean: float, trusted: Tensor) -> str:
    """What t* and t' mean, and where to go if one of them does not exist."""
    star, prime = roots
    if len(ts) < 2:
        return "the samples are worth too little at every temperature of the grid: draw more, or draw at several"
    words = []
    for root, slopes, name in (
        (star, _slopes(values, None)[trusted], "t*, for fidelity (draws that are likely in the target)"),
        (prime, _slopes(values, target_mean)[trusted], "t', for diversity (nothing likely in the target is missed)"),
    ):
        if root is None:
            edge, way = (ts[-1], "above") if slopes[-1] < 0.0 else (ts[0], "below")
            words.append(f"no {name} between {ts[0]:.3g} and {ts[-1]:.3g}: the divergence still falls {way} {edge:.3g}")
        else:
            undecided = root.interval[0] <= 1.0 <= root.interval[1]
            verb = "keep" if undecided or root.value == 1.0 else "lower" if root.value < 1.0 else "raise"
            words.append(f"{name}, is {root.value:.4g}: {verb} the temperature")
    if star and prime and star.value < 1.0 < prime.value:
        words.append("the two disagree: cool for samples to use as they are, heat for samples to be reweighted")
    return "; ".join(words)
