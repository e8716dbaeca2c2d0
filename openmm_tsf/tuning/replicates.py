"""Many small data sets of one Ising model, each fitted and tuned: what few samples do to the best temperatures."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from openmm_tsf.tuning.ising import fit_ising, sample_spins, square_lattice
from openmm_tsf.tuning.search import OptimalTemperature, optimal_sampling_temperature
from openmm_tsf.tuning.two_level import median_interval

CRITICAL = 2.0 / math.log(1.0 + math.sqrt(2.0))
"""2.269: of the infinite square lattice, J = 1."""
SEARCHED = (0.1, 10.0, 31)
"""Temperatures of the search: lowest, highest, how many; roots between them are exact all the same."""
Replicates = Float[Tensor, " replicates"]


@dataclass(frozen=True, eq=False)
class IsingReplicates:
    """t* and t' of fits of all pair couplings to M samples of a periodic square, J = 1, one for each data set.

    Args:
        side: of the square.
        temperature: of the samples.
        size: M.
        t_star, t_prime: (R,) +inf or 0 where the divergence still falls at the upper or lower end of SEARCHED.
        no_fit: (R,) data sets that have no finite fit, and were fitted with the pseudocount.
    """

    side: int
    temperature: float
    size: int
    t_star: Replicates = field(repr=False)
    t_prime: Replicates = field(repr=False)
    no_fit: Bool[Tensor, " replicates"] = field(repr=False)

    def median(self, name: str, *, no_fit: bool) -> tuple[float, float, float]:
        """Median of `t_star` or `t_prime` and its 95 % interval, over the data sets with or without a finite fit.

        NaN where there are none, and the interval where there are fewer than 2.
        """
        values = getattr(self, name)[self.no_fit == no_fit]
        if not len(values):
            return math.nan, math.nan, math.nan
        bounds = median_interval(values) if len(values) > 1 else (math.nan, math.nan)
        return float(values.median()), float(bounds[0]), float(bounds[1])


def ising_replicates(
    side: int, temperature: float, size: int, n_replicates: int, *, generator: torch.Generator
) -> IsingReplicates:
    """Draw data sets of `size` samples, fit each, and find t* and t' by enumeration.

    Raises:
        ValueError: no replicates, fewer than 2 samples, a temperature not above 0, or a side that cannot be enumerated.
    """
    if n_replicates < 1:
        raise ValueError(f"need at least one data set, not {n_replicates}")
    lattice = square_lattice(side)
    low, high, n = SEARCHED
    grid = torch.logspace(math.log10(low), math.log10(high), n, dtype=torch.float64)
    rows = []
    for _ in range(n_replicates):
        fit = fit_ising(sample_spins(lattice, size, temperature=temperature, generator=generator))
        best = optimal_sampling_temperature(fit.against(lattice, temperature), temperatures=grid)
        rows.append((_value(best, "t_star", "fidelity"), _value(best, "t_prime", "diversity"), float(fit.pseudocount)))
    star, prime, no_fit = torch.tensor(rows, dtype=torch.float64).T
    return IsingReplicates(side, temperature, size, star, prime, no_fit.bool())


def _value(best: OptimalTemperature, name: str, curve: str) -> float:
    """A root; where there is none, the end towards which the divergence falls."""
    if (root := getattr(best, name)) is not None:
        return root.value
    values = getattr(best, curve)
    return math.inf if values[-1] < values[0] else 0.0
