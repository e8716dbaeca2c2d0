"""How the best sampling temperatures depend on the number of samples that a model was fitted to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from openmm_tsf.tuning.samples import ScoredSamples
from openmm_tsf.tuning.search import optimal_sampling_temperature

Curve = Float[Tensor, "subsets sizes"]
Fit = Callable[[Tensor], ScoredSamples]


class NoFit(ValueError):
    """These data have no finite fit; a `Fit` raises it, and the subset is counted apart."""


@dataclass(frozen=True, eq=False)
class DataSizeCurve:
    """t* and t' of models fitted to more and more of the same data.

    Args:
        sizes: M, ascending.
        t_star, t_prime: (subsets, sizes), one row for each order of the data; NaN where there is none on the grid, or
            no fit.
        no_fit: (subsets, sizes) where the fit does not exist.
        tolerance: what |t* - 1| is compared with.
        settles_at: the least M from which on the median of t* stays within the tolerance of 1; None if it never does.
    """

    sizes: tuple[int, ...]
    t_star: Curve = field(repr=False)
    t_prime: Curve = field(repr=False)
    no_fit: Tensor = field(repr=False)
    tolerance: float
    settles_at: int | None


def data_size_curve(
    data: Tensor, fit: Fit, sizes: Sequence[int], *, n_subsets: int = 5, tolerance: float = 0.05,
    temperatures: Sequence[float] | Tensor | None = None, generator: torch.Generator | None = None,
) -> DataSizeCurve:  # fmt: skip
    """Fit nested subsets of data, and find t* and t' of each fit.

    Args:
        data: (n, ...) samples of the target.
        fit: fits (M, ...) of them and gives samples of the fitted model, scored by it and by the target, or all states;
            `NoFit` where there is none.
        sizes: M, each from 2 to n.
        n_subsets: random orders of the data; each size takes the first M of an order.
        tolerance: of |t* - 1|.
        temperatures: of the search; see `optimal_sampling_temperature`.
        generator: of the orders; by default one with a fixed seed.

    Raises:
        ValueError: no sizes, a size below 2 or beyond the data, no subsets, or a tolerance not above zero.
    """
    sizes = tuple(sorted(set(sizes)))
    if not sizes or sizes[0] < 2 or sizes[-1] > len(data):
        raise ValueError(f"sizes lie between 2 and the {len(data)} samples there are, not {list(sizes)}")
    if n_subsets < 1 or not tolerance > 0.0:
        raise ValueError(f"need at least one subset, a tolerance above 0; not {n_subsets} and {tolerance:g}")
    generator = generator or torch.Generator().manual_seed(0)
    star = torch.full((n_subsets, len(sizes)), math.nan, dtype=torch.float64)
    prime, no_fit = star.clone(), torch.zeros_like(star, dtype=torch.bool)
    for row in range(n_subsets):
        order = torch.randperm(len(data), generator=generator)
        for column, size in enumerate(sizes):
            try:
                samples = fit(data[order[:size]])
            except NoFit:
                no_fit[row, column] = True
                continue
            best = optimal_sampling_temperature(samples, temperatures=temperatures, n_replicates=0)
            star[row, column] = best.t_star.value if best.t_star else math.nan
            prime[row, column] = best.t_prime.value if best.t_prime else math.nan
    return DataSizeCurve(sizes, star, prime, no_fit, tolerance, settling_size(sizes, star, tolerance))


def settling_size(sizes: Sequence[int], t_star: Curve, tolerance: float) -> int | None:
    """The least size from which on the median of t* over the rows that have one stays within a tolerance of 1."""
    within = (torch.nanmedian(t_star, 0).values - 1.0).abs() <= tolerance  # NaN is not within
    settled = within.flip(0).cumprod(0).flip(0).bool()
    return int(sizes[int(settled.nonzero()[0])]) if settled.any() else None
