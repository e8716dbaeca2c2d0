"""Samples of several sampling temperatures as one set that stands for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from openmm_tsf.tuning.samples import ScoredSamples, moments
from openmm_tsf.weights import bootstrap_counts

STEPS, CONVERGED, LONGEST = 100, 1e-8, 2.0
"""Newton steps at most, the change of a ln Z at which they end, and the one that they are cut to."""


def pooled(draws: Sequence[ScoredSamples]) -> ScoredSamples:
    """Join samples of one model at several t by multistate reweighting; they can then be weighted for any t.

    Args:
        draws: each of its own t, by one and the same model.

    Raises:
        ValueError: no draws, an enumeration among them, or temperatures too far apart to be joined.

    Source: M. R. Shirts, J. D. Chodera, J. Chem. Phys. 129, 124105 (2008), equation 11.
    """
    if not draws or any(draw.exact for draw in draws):
        raise ValueError("samples of at least one sampling temperature are needed, and an enumeration needs no other")
    draws = sorted(draws, key=lambda draw: draw.t)
    e = torch.cat([draw.model_energy for draw in draws])
    n = torch.tensor([len(draw) for draw in draws], dtype=torch.float64)
    own = torch.cat([torch.log_softmax(d.log_weights, 0) + k for d, k in zip(draws, n.log(), strict=True)])
    levels = n.log()[:, None] - e / torch.tensor([draw.t for draw in draws], dtype=torch.float64)[:, None]
    f = _first_guess(draws)
    for _ in range(STEPS):
        joint = levels + f[:, None]
        share = joint.softmax(0)
        seen = share * own.exp()
        slope, curvature = n - seen.sum(1), torch.diag(seen.sum(1)) - seen @ share.T
        factor, failed = torch.linalg.cholesky_ex(curvature[1:, 1:])  # only differences to the first matter
        if failed:
            break
        change = torch.cholesky_solve(slope[1:, None], factor)[:, 0]
        longest = float(change.abs().max()) if len(change) else 0.0
        if longest < CONVERGED:
            t = draws[len(draws) // 2].t
            u = torch.cat([draw.target_energy for draw in draws])
            return ScoredSamples(e, u, own - joint.logsumexp(0) - e / t, t=t)
        f[1:] += change * min(1.0, LONGEST / longest)
    ts = ", ".join(f"{draw.t:g}" for draw in draws)
    raise ValueError(f"samples at t = {ts} overlap too little: put more temperatures between them")


def pooled_replicates(
    draws: Sequence[ScoredSamples], n_replicates: int, generator: torch.Generator | None
) -> Iterator[ScoredSamples]:
    """Bootstrap of `pooled`: each draw is resampled by itself, and all of them are joined anew."""
    generator = generator or torch.Generator().manual_seed(0)
    for _ in range(n_replicates):
        counts = [next(bootstrap_counts(len(draw), 0, 1, generator)) for draw in draws]
        yield pooled([replace(d, log_weights=d.log_weights + c.log()) for d, c in zip(draws, counts, strict=True)])


def _first_guess(draws: Sequence[ScoredSamples]) -> Tensor:
    """-ln Z_t against the first t, by integrating <Ehat> over 1/t with slopes at both ends."""
    f, own = [0.0], [moments(draw, torch.tensor([draw.t], dtype=torch.float64)) for draw in draws]
    for (a, first), (b, second) in pairwise(zip(draws, own, strict=True)):
        h = 1.0 / b.t - 1.0 / a.t
        bend = second.variance * b.t**2 - first.variance * a.t**2
        f.append(f[-1] + float(h * (first.model + second.model) / 2.0 + h * h * bend / 12.0))
    return torch.tensor(f, dtype=torch.float64)
