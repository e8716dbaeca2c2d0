"""Temperatures of a replica exchange: geometric, or such that all neighbours exchange equally often."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from scipy.optimize import brentq

from .flow import Flow
from .units import to_kelvin

NODES_PER_OCTAVE = 24
"""Temperatures, for each factor of two, at which mean energies are computed; a spline is between them."""


def geometric_ladder(lowest: Any, highest: Any, n: int) -> np.ndarray:
    """n temperatures [K], each the same factor above the one before: equal exchange at a constant heat capacity.

    Args:
        lowest, highest: [K], or Quantities.
        n: at least 2.

    Raises:
        ValueError: fewer than 2 temperatures, or lowest not below highest.
    """
    lowest, highest = _ends(lowest, highest, n)
    ladder = np.geomspace(lowest, highest, n)
    ladder[[0, -1]] = lowest, highest
    return ladder


def flow_ladder(flow: Flow, lowest: Any, highest: Any, n: int) -> np.ndarray:
    """n temperatures [K] whose neighbours exchange equally often, as far as the flow knows the molecule.

    How often i and j exchange is decided by (beta_i - beta_j)(<U>_i - <U>_j), and the flow knows <U>: its free energy
    is in closed form, see `mean_energy`. That product is made equal for all neighbours.

    Args:
        flow: of the molecule.
        lowest, highest: [K], or Quantities.
        n: at least 2.

    Raises:
        ValueError: fewer than 2 temperatures, or lowest not below highest.

    Source: C. Predescu, M. Predescu, C. V. Ciobanu, J. Chem. Phys. 120, 4119 (2004), for the acceptance.
    """
    lowest, highest = _ends(lowest, highest, n)
    nodes = np.geomspace(lowest, highest, math.ceil(NODES_PER_OCTAVE * math.log2(highest / lowest)) + 4)
    taus = nodes / flow.training_temperature
    energy = CubicSpline(np.log(taus), [mean_energy(flow, tau) for tau in taus])

    def distance(one: float, other: float) -> float:
        # the root of the product grows as other - one does, which the solver likes
        product = (1.0 / one - 1.0 / other) * float(energy(math.log(other)) - energy(math.log(one)))
        return math.sqrt(max(0.0, product))

    def steps(length: float) -> list[float]:
        """Where steps of this length lead from the lowest temperature, at most to the highest."""
        ladder = [float(taus[0])]
        while len(ladder) < n and distance(ladder[-1], taus[-1]) > length:
            ladder.append(brentq(lambda x: distance(ladder[-1], x) - length, ladder[-1], taus[-1], xtol=1e-13))
        return ladder

    def missing(length: float) -> float:
        """What is left to the highest temperature after n - 1 steps, below zero if they lead too far."""
        ladder = steps(length)
        return distance(ladder[-1], taus[-1]) - length * (n - len(ladder))

    whole = distance(taus[0], taus[-1])
    length = brentq(missing, 0.01 * whole / n, 2.0 * whole, xtol=1e-12) if n > 2 else whole
    ladder = np.array([*steps(length)[: n - 1], taus[-1]]) * flow.training_temperature
    ladder[[0, -1]] = lowest, highest
    return ladder


def mean_energy(flow: Flow, tau: float) -> float:
    """<E> of a flow at temperature tau, both in units of its training temperature; up to a constant.

    From its free energy, <E> = -d ln Z / d(1/tau), without the energy of momenta, where there are some.
    """
    prior, step = copy.deepcopy(flow.prior).double(), 1e-4
    with torch.no_grad():
        # (1/tau)(1 -+ step) on both sides, so that the error is of second order in 1/tau, where ln Z is smooth
        up, down = (float(prior.log_z(tau / (1.0 + s))) for s in (step, -step))
    return -(up - down) * tau / (2.0 * step) - 0.5 * flow.n_momenta * tau


def check_ladder(temperatures: Any) -> np.ndarray:
    """Temperatures (K,) [K] as an array, if they are a ladder.

    Args:
        temperatures: numbers in K or Quantities, or a Quantity of numbers.

    Raises:
        ValueError: fewer than two, one that is not finite and above zero, one twice, or not ascending; names them.
    """
    if np.ndim(getattr(temperatures, "_value", temperatures)) != 1:
        raise ValueError(f"a ladder is a row of temperatures, not {temperatures!r}")
    ladder = np.array([to_kelvin(t) for t in temperatures])
    if len(ladder) < 2:
        raise ValueError(f"a ladder needs at least 2 temperatures, not {len(ladder)} ({_listed(ladder)})")
    values, counts = np.unique(ladder, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"temperatures more than once in a ladder: {_listed(values[counts > 1])}; leave each one once")
    if len(wrong := np.flatnonzero(np.diff(ladder) < 0)):
        pairs = ", ".join(f"{ladder[i]:g} K before {ladder[i + 1]:g} K" for i in wrong)
        raise ValueError(f"temperatures of a ladder must ascend; found {pairs}: sort them")
    return ladder


def _ends(lowest: Any, highest: Any, n: int) -> tuple[float, float]:
    lowest, highest = to_kelvin(lowest), to_kelvin(highest)
    if not (isinstance(n, int) and n >= 2):
        raise ValueError(f"a ladder needs at least 2 temperatures, not {n}")
    if not lowest < highest:
        raise ValueError(f"the lowest temperature, {lowest:g} K, must be below the highest, {highest:g} K")
    return lowest, highest


def _listed(temperatures: np.ndarray) -> str:
    return ", ".join(f"{t:g} K" for t in temperatures) or "none"
