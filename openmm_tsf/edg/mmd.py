"""Maximum mean discrepancy of two sets of points, raw or weighted, under one stated kernel, and its noise floor.

k(x, y) = (1/5) sum_s exp(-|x - y|^2/(2 s^2)), s = 1/4, 1/2, 1, 2, 4: widths from those of the narrowest modes of the
plane densities to the distances between modes, the same for all of them. A point has k = 1 with itself.

Source: Gretton, Borgwardt, Rasch, Schoelkopf, Smola, J. Mach. Learn. Res. 13, 723 (2012).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Points = Tensor
"""(n, d); checked by `squared_mmd`."""
Weights = Tensor
"""(n,) of any sum, not below zero."""

LARGEST_WIDTH = 4.0
N_WIDTHS = 5
"""Kernel widths, each half of the one before."""
CHUNK = 64
"""Rows at a time, so that what is worked on stays in the cache."""


def kernel(squares: Tensor) -> Tensor:
    """k of squared distances: the wider Gaussians are the fourth roots of the narrower ones, so one exp serves all."""
    gauss = torch.exp(squares * (-0.5 / LARGEST_WIDTH**2))
    total = gauss.clone()
    for _ in range(N_WIDTHS - 1):
        gauss = gauss.square().square_()
        total += gauss
    return total / N_WIDTHS


@torch.no_grad()
def squared_mmd(
    x: Points, y: Points, x_weights: Weights | None = None, y_weights: Weights | None = None
) -> float:  # fmt: skip
    """Unbiased estimate of MMD^2 between points x (n, d) and y (m, d); it can be below zero.

    sum_{i != j} w_i w_j k(x_i, x_j)/(1 - sum w^2) + the same of y - 2 sum w_i v_j k(x_i, y_j), weights normalised. With
    weights that are functions of their own points, it is unbiased as far as normalising them is.

    Raises:
        ValueError: fewer than two points, dimensions or weights that do not fit, or points that are not finite.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"need two sets of at least 2 points of one dimension, not {(*x.shape,)} and {(*y.shape,)}")
    if bad := int((~torch.isfinite(x).all(1)).sum() + (~torch.isfinite(y).all(1)).sum()):
        raise ValueError(f"{bad} points are not finite")
    x, y = x.double(), y.double()
    w, v = _normalised(x_weights, len(x)), _normalised(y_weights, len(y))
    return _within(x, w) + _within(y, v) - 2.0 * _between(x, y, w, v)


def mmd(x: Points, y: Points, x_weights: Weights | None = None, y_weights: Weights | None = None) -> float:
    """Square root of `squared_mmd`, zero where that is below zero."""
    return math.sqrt(max(squared_mmd(x, y, x_weights, y_weights), 0.0))


def noise_floor(
    sample: Callable[..., Points], n: int, m: int, *, repeats: int = 20, generator: torch.Generator
) -> float:  # fmt: skip
    """What `mmd` gives for two sets of exact draws: the fourth root of the mean of MMD^4, from n and m of them.

    MMD^2 is zero on average there, so its size is a root mean square. For weighted points let n be their effective
    number.

    Args:
        sample: `sample(n, generator=...)` gives n exact draws.
        repeats: pairs of sets.
    """
    pairs = ((sample(n, generator=generator), sample(m, generator=generator)) for _ in range(repeats))
    return (sum(squared_mmd(x, y) ** 2 for x, y in pairs) / repeats) ** 0.25


def _normalised(weights: Weights | None, n: int) -> Weights:
    if weights is None:
        return torch.full((n,), 1.0 / n, dtype=torch.float64)
    w = weights.detach().double()
    if w.shape != (n,) or not bool((w >= 0).all()) or not 0.0 < float(w.sum()) < math.inf:
        raise ValueError(f"{n} points need as many weights, finite, not below 0 and not all 0")
    w = w / w.sum()
    if float(w.max()) == 1.0:
        raise ValueError("one point has all the weight: there are no pairs")
    return w


def _within(x: Points, w: Weights) -> float:
    """Mean of k over pairs of different points; a point with itself has k = 1."""
    own = float(w.square().sum())
    return (_between(x, x, w, w) - own) / (1.0 - own)


def _between(x: Points, y: Points, w: Weights, v: Weights) -> float:
    total = 0.0
    for rows, part in zip(x.split(CHUNK), w.split(CHUNK), strict=True):
        total += float(part @ (kernel(torch.cdist(rows, y).square_()) @ v))
    return total
