"""Hamiltonian Monte Carlo, tuned in a warm-up: masses, step size by dual averaging, length of trajectories.

Sources: R. Neal, in Handbook of MCMC (2011), arXiv 1206.1901; M. Hoffman, A. Gelman, JMLR 15, 1593 (2014), section 3.2
(dual averaging); A. Vehtari et al., Bayesian Anal. 16, 667 (2021), arXiv 1903.08008 (split R-hat).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.typing import Scalars, Vectors

from .common import Budget, Counted, Drawn, normal

LENGTHS = (1, 2, 4, 8, 16, 32)
"""Mean numbers of leapfrog steps that are tried."""
WANTED = 0.8
"""Acceptance that dual averaging aims at."""
KEPT = 2e7
"""Numbers that are kept of what chains visited; beyond them, iterations are left out evenly."""
DECADES, OFTEN = 3.0, 0.1
"""So often, a trajectory has steps up to so many powers of ten shorter: chains get away from where energies are steep,
as they are at some starts."""
SHARES = (0.10, 0.15, 0.05)
"""Of the budget: for masses; for the length; for the last step size."""


@dataclass
class DualAverage:
    """ln of a step size, moved until the acceptance is `WANTED`; equation (6) of Hoffman and Gelman and its constants.

    Args:
        log_step: where it begins.
        centre: what it is drawn to; ln 10 above the beginning where little is known, so that large steps are tried.
    """

    log_step: float
    centre: float
    smooth: float = 0.0
    error: float = 0.0
    t: int = 0

    def update(self, acceptance: float) -> None:
        """Take in the mean acceptance of one iteration."""
        self.t += 1
        self.error += (WANTED - acceptance - self.error) / (self.t + 10.0)
        self.log_step = self.centre - math.sqrt(self.t) / 0.05 * self.error
        keep = self.t**-0.75
        self.smooth = keep * self.log_step + (1.0 - keep) * self.smooth

    @property
    def found(self) -> float:
        """ln of the averaged step size."""
        return self.smooth if self.t else self.log_step


@dataclass(frozen=True, eq=False)
class Chains:
    """Chains x (B, d) with their energies (B,) and gradients (B, d)."""

    x: Vectors
    u: Scalars
    g: Vectors


@dataclass(frozen=True, eq=False)
class Tuning:
    """Widths (d,) of the coordinates (masses are 1 / width^2), step in units of them, mean number of steps."""

    width: Tensor
    step: float
    length: int


def iterate(
    chains: Chains, target: Counted, tuning: Tuning, generator: torch.Generator
) -> tuple[Chains, Scalars, Scalars]:
    """One trajectory of each chain; the chains after it, acceptance probabilities and squared jumps (in widths), (B,).

    The number of steps is uniform between 1 and 2 length - 1, the same for all chains, so that no period of the motion
    is hit; the step size varies by a tenth between chains, and for `OFTEN` of them by much more.
    """
    b, d = chains.x.shape
    width, kinetic = tuning.width, lambda v: 0.5 * (v * v).sum(1)
    n_steps = int(torch.randint(1, 2 * tuning.length, (1,), generator=generator))
    step = tuning.step * (0.9 + 0.2 * torch.rand(b, 1, generator=generator))
    shorter = 10.0 ** (-DECADES * torch.rand(b, 1, generator=generator))
    step = torch.where(torch.rand(b, 1, generator=generator) < OFTEN, shorter * step, step)
    v = normal(b, d, generator)
    x, u, g, begin = chains.x, chains.u, chains.g, chains.u + kinetic(v)
    v = v - 0.5 * step * width * g
    for k in range(n_steps):
        x = x + step * width * v
        u, g = target.slope(x)
        v = v - (1.0 if k < n_steps - 1 else 0.5) * step * width * g
    log_ratio = begin - u - kinetic(v)
    log_ratio = torch.where(log_ratio.isnan(), -math.inf, log_ratio)
    accepted = torch.rand(b, generator=generator).log() < log_ratio
    probability, row = log_ratio.clamp(max=0.0).exp(), accepted[:, None]
    jump = torch.where(accepted, (((x - chains.x) / width) ** 2).sum(1), 0.0)
    new = Chains(
        torch.where(row, x, chains.x), torch.where(accepted, u, chains.u), torch.where(row, g, chains.g)
    )  # fmt: skip
    return new, probability, jump


def started(target: Counted, n_chains: int, scale: float, generator: torch.Generator) -> Chains:
    """Chains at draws of N(0, scale^2), those with a finite energy.

    Raises:
        ValueError: fewer than one in a hundred has one.
    """
    kept: list[Tensor] = []
    for _ in range(100):
        x = scale * normal(n_chains, target.dim, generator)
        u, g = target.slope(x)
        kept.append(x[u.isfinite() & g.isfinite().all(1)])
        if sum(map(len, kept)) >= n_chains:
            x = torch.cat(kept)[:n_chains]
            return Chains(x, *target.slope(x))
    raise ValueError(f"of {100 * n_chains} starts of width {scale:g}, {sum(map(len, kept))} have a finite energy")


def _run(
    chains: Chains, target: Counted, tuning: Tuning, until: float, average: DualAverage, generator: torch.Generator
) -> tuple[Chains, Tensor, float]:
    """Adapt the step until a share of the budget is spent: chains, what they visited, squared jump per gradient."""
    visited, jumps, begin = [chains.x], 0.0, target.n
    while target.progress < until:
        step = Tuning(tuning.width, math.exp(average.log_step), tuning.length)
        chains, probability, jump = iterate(chains, target, step, generator)
        average.update(float(probability.mean()))
        visited.append(chains.x)
        jumps += float(jump.sum())
    return chains, torch.stack(visited), jumps / max(target.n - begin, 1)


def tuned(chains: Chains, target: Counted, scale: float, generator: torch.Generator) -> tuple[Chains, Tuning]:
    """Warm up: masses from the late half of a first run, the length of the largest squared jump for each gradient."""
    width, first = torch.full((target.dim,), scale), math.log(0.05)
    average, end = DualAverage(first, first + math.log(10.0)), SHARES[0]
    chains, visited, _ = _run(chains, target, Tuning(width, 0.0, 4), end, average, generator)
    late = visited[len(visited) // 2 :]
    # within chains, not between them: the width of the well that a chain is in sets its frequencies
    inside = late.var(0).mean(0).sqrt() if len(late) > 20 else late.flatten(0, 1).std(0)
    inside = inside.clamp_min(1e-3 * scale)
    first = average.found + float((width / inside).log().mean())  # the same step, in the new widths
    best = (-1.0, 1, first)
    for length in LENGTHS:
        average, end = DualAverage(first, first), end + SHARES[1] / len(LENGTHS)
        chains, _, worth = _run(chains, target, Tuning(inside, 0.0, length), end, average, generator)
        best = max(best, (worth, length, average.found))
    _, length, first = best
    average = DualAverage(first, first)
    chains, _, _ = _run(chains, target, Tuning(inside, 0.0, length), end + SHARES[2], average, generator)
    return chains, Tuning(inside, math.exp(average.found), length)


def split_r_hat(x: Tensor) -> float:
    """Largest split R-hat of the coordinates of chains (iterations, chains, d); 1 where they agree.

    NaN where there are fewer than four iterations.
    """
    n = len(x) // 2
    if n < 2:
        return math.nan
    halves = torch.cat((x[:n], x[n : 2 * n]), 1).double()
    inside, between = halves.var(0).mean(0), halves.mean(0).var(0)
    return float(((n - 1) / n + between / inside.clamp_min(1e-300)).sqrt().max())


def collected(
    chains: Chains, step: Callable[[Chains], tuple[Chains, Scalars]], target: Counted, n: int, *, cost: int
) -> tuple[Vectors, Scalars, dict[str, float]]:  # fmt: skip
    """Run chains until the budget is spent; n draws, spread evenly over what they visited, and their energies.

    What was visited is repeated if it is less than n.

    Args:
        chains: where they start.
        step: chains and their acceptance probabilities after an iteration.
        target: with the budget.
        n: number of draws.
        cost: of an iteration of one chain, about, in energies.
    """
    expected = max(0, target.budget.evaluations - target.n) / cost
    stride, xs, us, acceptance = max(1, math.ceil(expected * target.dim / KEPT)), [], [], []
    while target.progress < 1.0 or not xs:
        chains, probability = step(chains)
        if len(acceptance) % stride == 0:
            xs.append(chains.x)
            us.append(chains.u)
        acceptance.append(float(probability.mean()))
    x, u = torch.stack(xs), torch.stack(us)
    rows = torch.linspace(0, u.numel() - 1, n, dtype=torch.float64).round().long()
    facts = {
        "acceptance": sum(acceptance) / len(acceptance), "r_hat": split_r_hat(x), "n_chains": len(chains.x),
        "iterations": len(acceptance),
    }  # fmt: skip
    return x.flatten(0, 1)[rows], u.flatten()[rows], facts


def hmc(
    target: Any, budget: Budget, n: int, *, scale: float, n_chains: int = 64, seed: int, name: str = "hmc"
) -> Drawn:  # fmt: skip
    """n draws of what chains visited after the warm-up; they have no weights and no ln Z.

    Args:
        target: what to draw from.
        budget: of warm-up and run together; three tenths go to the warm-up.
        n: number of draws.
        scale: chains start at N(0, scale^2).
        n_chains: number of chains.
        seed: of everything.
    """
    generator = torch.Generator().manual_seed(seed)
    counted = Counted(target, budget)
    chains = started(counted, n_chains, scale, generator)
    chains, tuning = tuned(chains, counted, scale, generator)
    warm, seconds = counted.n, counted.seconds

    def step(chains: Chains) -> tuple[Chains, Scalars]:
        return iterate(chains, counted, tuning, generator)[:2]

    x, u, facts = collected(chains, step, counted, n, cost=tuning.length)
    facts |= {"step": tuning.step, "length": tuning.length}
    return Drawn(name, x, u, None, warm, counted.n - warm, seconds, counted.seconds - seconds, facts)
