"""One law for each noun of the package, as functions that raise AssertionError; a new class joins a parametrised list.

Laws come with a negative control in the tests that use them: something close by that must break them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from openmm_tsf.geometry import wrap

TWO_PI = 2.0 * math.pi


# --- bijective --------------------------------------------------------------------------------------------------------


def jacobians(function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """d function / d z of each row, (batch, outputs, inputs); right where rows do not mix, see `independent`."""
    z = z.detach().clone().requires_grad_()
    y = function(z).flatten(1)
    rows = [torch.autograd.grad(y[:, i].sum(), z, retain_graph=True)[0].flatten(1) for i in range(y.shape[1])]
    return torch.stack(rows, 1)


def difference(a: Tensor, b: Tensor, circular: Tensor | None = None) -> float:
    """Largest |a - b|, around the circle in the columns that live on one."""
    delta = (a - b).detach()
    if circular is not None:
        delta = torch.where(circular, wrap(delta), delta)
    return float(delta.abs().max())


def bijective(
    transform: Any,
    z: Tensor,
    *,
    circular_z: Tensor | None = None,
    circular_x: Tensor | None = None,
    atol: float = 1e-10,
) -> None:
    """Each way undoes the other, log-determinants are those of autograd and opposite, rows do not mix.

    Args:
        transform: with `forward` and `inverse`.
        z: (batch, dim) latents; more than two rows.
        circular_z, circular_x: (dim,) columns that are angles.
        atol: largest error of a coordinate or of a log-determinant.
    """
    x, log_det = transform.forward(z)
    back, log_det_back = transform.inverse(x)
    assert torch.isfinite(x).all(), "forward gives non-finite numbers"
    assert difference(back, z, circular_z) < atol, f"inverse(forward) is off by {difference(back, z, circular_z):.1e}"
    again, _ = transform.forward(back)
    assert difference(again, x, circular_x) < atol, "forward(inverse) is not the identity"
    assert log_det.shape == log_det_back.shape == (len(z),)
    assert difference(log_det, -log_det_back) < atol, "the two log-determinants are not opposite"
    exact = torch.linalg.slogdet(jacobians(lambda z: transform.forward(z)[0], z))[1]
    assert difference(exact, log_det) < 1e3 * atol, f"log-determinant is off by {difference(exact, log_det):.1e}"
    independent(lambda z: transform.forward(z)[0], z)
    independent(lambda x: transform.inverse(x)[0], x.detach())


def independent(function: Callable[[Tensor], Tensor], z: Tensor, atol: float = 1e-10) -> None:
    """A row of the result depends on its own row alone, whatever the others are, NaN included.

    Products of matrices round a row by where it stands in the batch, differently on different processors, and an
    inverse magnifies that.
    """
    with torch.no_grad():
        whole = function(z)
        order = torch.arange(len(z) - 1, -1, -1)
        scale = atol * (1.0 + float(whole.abs().max()))
        assert difference(function(z[order])[order], whole) < scale, "the order of the batch matters"
        assert difference(function(z[1:2]), whole[1:2]) < scale, "the size of the batch matters"
        poisoned = z.clone()
        poisoned[0] = math.nan
        assert difference(function(poisoned)[1:], whole[1:]) < scale, "a NaN row spoils its neighbours"


def log_volume_element(to_positions: Callable[[Tensor], Tensor], q: Tensor) -> Tensor:
    """ln of Cartesian volume (3 A dimensions) per internals and per rigid motion, (batch,), by autograd.

    The Jacobian of the internals is augmented with three translations and three rotations.
    """
    augmented = with_rigid_motions(to_positions, q)
    return torch.linalg.slogdet(augmented)[1]


def with_rigid_motions(to_positions: Callable[[Tensor], Tensor], q: Tensor) -> Tensor:
    """Jacobian of positions by internals, translations and rotations: (batch, 3 A, D + 6)."""
    x = to_positions(q).detach()
    n, atoms, _ = x.shape
    columns = [jacobians(to_positions, q)]
    for axis in torch.eye(3, dtype=x.dtype):
        columns.append(axis.repeat(atoms).expand(n, -1)[..., None])
        columns.append(torch.linalg.cross(axis.expand_as(x), x).flatten(1)[..., None])
    return torch.cat(columns, 2)


# --- normalised -------------------------------------------------------------------------------------------------------


def normalised(log_prob: Callable[[Tensor], Tensor], axes: Sequence[Tensor], atol: float = 1e-9) -> None:
    """The density integrates to one, by the trapezoid rule on the product of evenly spaced axes.

    Exponentially accurate for what is periodic over an axis or vanishes at its ends.
    """
    points = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    cell = math.prod(float(axis[1] - axis[0]) for axis in axes)
    with torch.no_grad():
        log_total = float(torch.cat([log_prob(part) for part in points.split(100_000)]).logsumexp(0)) + math.log(cell)
    assert abs(log_total) < atol, f"the density integrates to 1 {math.expm1(log_total):+.2e}"


def circle(n: int) -> Tensor:
    """n evenly spaced angles."""
    return torch.arange(n, dtype=torch.float64) * (TWO_PI / n) - math.pi


def line(half_width: float, n: int) -> Tensor:
    """n evenly spaced numbers."""
    return torch.linspace(-half_width, half_width, n, dtype=torch.float64)


# --- faithful ---------------------------------------------------------------------------------------------------------


def faithful(density: Any, n: int, generator: torch.Generator, atol: float = 1e-8) -> None:
    """`sample` returns the log_prob that `log_prob` gives to its draws."""
    x, log_prob = density.sample(n, generator=generator)
    assert x.shape[0] == n and log_prob.shape == (n,)
    with torch.no_grad():
        error = float((density.log_prob(x) - log_prob).abs().max())
    assert error < atol, f"log_prob of draws is off by {error:.1e} nat"


def follow(angles: Tensor, log_density: Callable[[Tensor], Tensor], bins: int, *, inside: int) -> None:
    """Draws on the circle or torus follow a density: chi-square against quadrature at the level of 0.001.

    Args:
        angles: (n, dim) draws [rad], dim 1 or 2.
        log_density: ln of the density of angles (batch, dim), normalised.
        bins: along each angle.
        inside: Gauss-Legendre points along each side of a bin.
    """
    n, dim = angles.shape
    nodes, weights = (torch.tensor(a) for a in np.polynomial.legendre.leggauss(inside))
    half = math.pi / bins
    axis = ((torch.arange(bins) * 2 + 1)[:, None] * half + half * nodes).flatten() - math.pi
    points = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    weight = torch.cartesian_prod(*[(half * weights).repeat(bins)] * dim).reshape(-1, dim).prod(1)
    with torch.no_grad():
        mass = weight * torch.cat([log_density(part) for part in points.split(100_000)]).exp()
    expected = mass.reshape((bins, inside) * dim).sum([2 * d + 1 for d in range(dim)]).flatten()
    assert abs(float(expected.sum()) - 1.0) < 1e-4, "the quadrature of the test itself is too coarse"
    index = ((wrap(angles) + math.pi) * (bins / TWO_PI)).long().clamp(0, bins - 1)
    flat = index[:, 0] if dim == 1 else index[:, 0] * bins + index[:, 1]
    observed = torch.bincount(flat, minlength=bins**dim).double()
    p_value = chi_square(observed.numpy(), (n * expected).numpy())
    assert p_value > 1e-3, f"draws do not follow the density: p = {p_value:.1e}"


def chi_square(observed: np.ndarray, expected: np.ndarray, least: float = 10.0) -> float:
    """p-value of counts; neighbouring bins are merged until each expects at least `least`."""
    groups = np.floor(np.cumsum(expected) / least).astype(int)
    o, e = (np.bincount(groups, weights=values) for values in (observed, expected))
    o, e = o[e > 0], e[e > 0]
    if e[-1] < least and len(e) > 1:
        o, e = np.append(o[:-2], o[-2:].sum()), np.append(e[:-2], e[-2:].sum())
    assert len(e) > 5, "too few bins for a test"
    return float(scipy.stats.chi2.sf(((o - e) ** 2 / e).sum(), len(e) - 1))


def mean_weight_is_one(log_p: Tensor, log_q: Tensor, sigmas: float = 4.0) -> None:
    """The mean of p/q over draws of q is one within its standard error, for a normalised p."""
    w = torch.exp(log_p - log_q)
    error = float(w.std() / math.sqrt(len(w)))
    assert error < 0.05, f"the standard error {error:.2g} is too large to test anything"
    assert abs(float(w.mean()) - 1.0) < sigmas * error, f"mean of p/q is {float(w.mean()):.4f} +- {error:.4f}"


# --- steerable --------------------------------------------------------------------------------------------------------


def steering_spread(family: Any, x: Tensor, one: float, other: float) -> float:
    """(max - min of T1 ln q_T1 - T2 ln q_T2) / |T1 - T2| over x [nat]; zero for a steerable family."""
    with torch.no_grad():
        value = one * family.at(one).log_prob(x) - other * family.at(other).log_prob(x)
    assert torch.isfinite(value).all(), "the density is not finite everywhere: choose x on its chart"
    return float(value.max() - value.min()) / abs(one - other)


def steerable(family: Any, x: Tensor, one: float, other: float, bound: float = 1e-9) -> None:
    """T1 ln q_T1 - T2 ln q_T2 is one number for all x, of which there are at least a thousand and no two alike."""
    assert len(x) >= 1000
    assert len(torch.unique(x.flatten(1), dim=0)) == len(x)
    spread = steering_spread(family, x, one, other)
    assert spread < bound, f"steering between {one:g} and {other:g} spreads by {spread:.1e} nat"


# --- stationary -------------------------------------------------------------------------------------------------------


def errors_of_means(series: Tensor) -> Tensor:
    """Standard errors (observables,) of the means of series (times, walkers, observables), from autocorrelation.

    Walkers are independent of one another and followed by themselves. Autocovariances are pooled over walkers and
    summed until two neighbours together are not positive (C. J. Geyer, Stat. Sci. 7, 473 (1992)).
    """
    times, walkers, _ = series.shape
    delta = series - series.mean((0, 1))
    total = (delta**2).mean((0, 1))
    open_sum = torch.ones_like(total, dtype=torch.bool)
    for lag in range(1, times - 1, 2):
        pair = sum(2.0 * (delta[t:] * delta[:-t]).sum((0, 1)) / (times * walkers) for t in (lag, lag + 1))
        open_sum = open_sum & (pair > 0)
        if not open_sum.any():
            break
        total = total + torch.where(open_sum, pair, 0.0)
    return (total / (times * walkers)).sqrt()


def deviations(series: Tensor, expected: Tensor, expected_error: Tensor | float = 0.0) -> Tensor:
    """(observables,) mean of series (times, walkers, observables) less what is expected, in standard errors."""
    expected_error = torch.as_tensor(expected_error, dtype=series.dtype)
    error = (errors_of_means(series) ** 2 + expected_error**2).sqrt()
    return (series.mean((0, 1)) - expected) / error.clamp_min(1e-300)


def stationary(
    series: Tensor, expected: Tensor, expected_error: Tensor | float = 0.0, *, sigmas: float = 4.5,
    resolution: float = 0.05,
) -> None:  # fmt: skip
    """Walkers that start in the distribution stay in it: means over times and walkers are the expected ones.

    Args:
        series: (times, walkers, observables).
        expected, expected_error: (observables,) means and their standard errors.
        sigmas: largest deviation in standard errors.
        resolution: largest standard error in standard deviations of the observable; a test with more sees nothing.
    """
    assert torch.isfinite(series).all(), "an observable is not finite"
    blur = errors_of_means(series) / series.flatten(0, 1).std(0)
    assert float(blur.max()) < resolution, f"standard errors of {float(blur.max()):.2g} deviations see nothing"
    z = deviations(series, expected, expected_error)
    rows = zip(series.mean((0, 1)).tolist(), expected.tolist(), z.tolist(), strict=True)
    found = ", ".join(f"{mean:.4f} for {want:.4f} ({sigma:+.1f} errors)" for mean, want, sigma in rows)
    assert float(z.abs().max()) < sigmas, f"not stationary: {found}"
