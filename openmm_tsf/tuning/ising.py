"""Small Ising models, exactly: nearest neighbours on a periodic square, and fits of all pair couplings without fields.

Spins without fields come in pairs of states of opposite sign; one of each is kept, the one whose last spin is +1. All
averages of products of spins, and all energies, are Walsh-Hadamard transforms over the remaining 2^(L-1) states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmm_tsf.tuning.samples import ScoredSamples, enumerated, positive
from openmm_tsf.tuning.sizes import NoFit

MOST_SPINS = 20
"""Enumerated: 2^19 pairs of states."""
STEPS, CONVERGED = 100, 1e-9
"""Newton steps at most, and the step at which they end."""
FLAT, MATCHED = 1e-8, 1e-6
"""Curvature of the likelihood below which there is no finite fit, once correlations agree so far. On the way to
infinite couplings curvature and error fall together; at a finite fit to M samples the curvature is 1/M or so."""
LONGEST = 1.0
"""Newton steps are cut to this change of a coupling."""
Couplings = Float[Tensor, "sites sites"]
Spins = Int[Tensor, "samples sites"]


def square_lattice(side: int, *, coupling: float = 1.0) -> Couplings:
    """(L, L) couplings of nearest neighbours on a periodic square of side x side spins.

    Raises:
        ValueError: a side below 3, on which neighbours to the left and to the right would be one.
    """
    if side < 3:
        raise ValueError(f"a periodic square needs a side of at least 3, not {side}")
    j = torch.zeros(side * side, side * side, dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            here = row * side + column
            for there in ((row + 1) % side * side + column, row * side + (column + 1) % side):
                j[here, there] = j[there, here] = coupling
    return j


def walsh(values: Float[Tensor, "*batch states"]) -> Float[Tensor, "*batch states"]:
    """Walsh-Hadamard transform over the last axis: sum over states of value times the product of the spins in a set.

    Bit k of a state is one where spin k is -1; bit k of a set, where it holds spin k.
    """
    shape, n = values.shape, values.shape[-1]
    width = 1
    while width < n:
        pairs = values.reshape(*shape[:-1], n // (2 * width), 2, width)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        values = torch.stack([a + b, a - b], -2)
        width *= 2
    return values.reshape(shape)


def _pairs(n: int) -> tuple[Tensor, Tensor, Int[Tensor, " pairs"]]:
    """Both sites of each pair, and the number of its set; the last spin is +1 and in no set."""
    i, j = torch.triu_indices(n, n, 1)
    bits = torch.cat([2 ** torch.arange(n - 1), torch.zeros(1, dtype=torch.long)])
    return i, j, bits[i] + bits[j]


def pair_energies(couplings: Float[Tensor, "*batch sites sites"]) -> Float[Tensor, "*batch states"]:
    """Ehat = -sum_{i<j} J_ij s_i s_j of all states whose last spin is +1, in the order of `spin_states`.

    Raises:
        ValueError: couplings that are not square and symmetric, or of more than MOST_SPINS spins.
    """
    n = couplings.shape[-1]
    if couplings.shape[-2] != n or not 2 <= n <= MOST_SPINS:
        raise ValueError(f"couplings of 2 to {MOST_SPINS} spins can be enumerated, not {(*couplings.shape[-2:],)}")
    if not torch.isfinite(couplings).all() or (couplings - couplings.mT).abs().max() > 1e-9:
        raise ValueError("couplings must be finite and symmetric")
    i, j, sets = _pairs(n)
    vector = torch.zeros(*couplings.shape[:-2], 2 ** (n - 1), dtype=torch.float64)
    vector[..., sets] = couplings.double()[..., i, j]
    return -walsh(vector)


def spin_states(n: int) -> Spins:
    """The states of n spins, -1 or +1, whose last spin is +1."""
    bits = torch.arange(2 ** (n - 1))[:, None] >> torch.arange(n) & 1
    return 1 - 2 * bits


def sample_spins(couplings: Couplings, m: int, *, temperature: float = 1.0, generator: torch.Generator) -> Spins:
    """m exact samples of exp(-E/T), E = -sum_{i<j} J_ij s_i s_j.

    Raises:
        ValueError: no samples, a temperature not above zero, or as `pair_energies`.
    """
    if m < 1:
        raise ValueError(f"need at least one sample, not {m}")
    cumulated = torch.softmax(-pair_energies(couplings) / positive(temperature), 0).cumsum(0)
    draws = torch.rand(m, generator=generator, dtype=torch.float64) * cumulated[-1]
    rows = torch.searchsorted(cumulated, draws, right=True).clamp(max=len(cumulated) - 1)
    n = len(couplings)
    flip = 1 - 2 * torch.randint(2, (m, 1), generator=generator)
    return (1 - 2 * (rows[:, None] >> torch.arange(n) & 1)) * flip


def correlations(spins: Spins) -> Couplings:
    """<s_i s_j> over samples (M, L).

    Raises:
        ValueError: fewer than 2 samples, or spins other than -1 and +1.
    """
    if spins.ndim != 2 or len(spins) < 2:
        raise ValueError(f"a fit needs at least 2 samples, not {(*spins.shape,)}")
    if bad := int((spins.abs() != 1).sum()):
        raise ValueError(f"{bad} spins are neither -1 nor +1")
    s = spins.double()
    return s.T @ s / len(s)


@dataclass(frozen=True, eq=False)
class IsingFit:
    """Maximum-likelihood couplings, in units of the temperature of the data.

    Args:
        couplings: (L, L).
        n_steps: of Newton.
        pseudocount: the data have no finite fit; what was fitted are their correlations times M/(M + 1).
        largest_error: of the model's correlations against those fitted.
    """

    couplings: Couplings = field(repr=False)
    n_steps: int
    pseudocount: bool
    largest_error: float

    def against(self, couplings: Couplings, temperature: float, *, t: float = 1.0) -> ScoredSamples:
        """All states, with the energies of the fit and of a true Ising model at its temperature.

        Raises:
            ValueError: a model of another number of spins, or a temperature not above zero.
        """
        if couplings.shape != self.couplings.shape:
            raise ValueError(
                f"a fit of {len(self.couplings)} spins and a model of {len(couplings)}: not one state space"
            )
        target = pair_energies(couplings) / positive(temperature)
        twice = torch.full_like(target, math.log(2.0))
        return enumerated(pair_energies(self.couplings), target, twice, t=t)


def fit_ising(spins: Spins, *, pseudocount: bool = True) -> IsingFit:
    """Fit all pair couplings, without fields, by maximum likelihood: Newton on the exact likelihood.

    Args:
        spins: (M, L), -1 or +1.
        pseudocount: where there is no finite fit, fit the correlations times M/(M + 1) instead, and say so.

    Raises:
        NoFit: there is no finite fit, and `pseudocount` is off.
        ValueError: fewer than 2 samples, spins other than -1 and +1, or too many of them.
    """
    measured = correlations(spins)
    try:
        return fit_correlations(measured)
    except NoFit:
        if not pseudocount:
            raise
    fit = fit_correlations(measured * (len(spins) / (len(spins) + 1.0)))
    return IsingFit(fit.couplings, fit.n_steps, True, fit.largest_error)


def fit_correlations(measured: Couplings) -> IsingFit:
    """The couplings whose model has these correlations <s_i s_j>.

    There is no such model if a correlation is +-1, nor if the correlations lie on another face of the polytope of all
    that are possible; Newton's steps then do not end, and the couplings grow without bound.

    Raises:
        NoFit: there is no finite fit.
        ValueError: as `pair_energies`.
    """
    n = len(measured)
    i, j, sets = _pairs(n)
    goal = measured[i, j]
    if bad := int((goal.abs() >= 1.0 - 1e-12).sum()):
        raise NoFit(f"{bad} of {len(goal)} pairs of spins are always equal or always opposite: no finite couplings")
    couplings = torch.zeros_like(measured)
    cross = sets[:, None] ^ sets
    value = _likelihood(couplings, goal, (i, j))
    for step in range(1, STEPS + 1):
        averages = walsh(torch.softmax(-pair_energies(couplings), 0))
        mean = averages[sets]
        hessian = averages[cross] - mean[:, None] * mean
        curvature, axes = torch.linalg.eigh(hessian)
        error = goal - mean
        if curvature[0] < FLAT and error.abs().max() < MATCHED:
            break
        change = axes @ ((axes.T @ error) / curvature.clamp(min=FLAT**2))
        longest = float(change.abs().max())
        if longest < CONVERGED:
            return IsingFit(couplings, step, False, float(error.abs().max()))
        couplings, value = _uphill(couplings, change * min(1.0, LONGEST / longest), goal, (i, j), value)
    raise NoFit(f"couplings grow without bound (to {float(couplings.abs().max()):.0f}): the data have no finite fit")


def _uphill(couplings: Tensor, change: Tensor, goal: Tensor, pair: tuple, value: float) -> tuple[Tensor, float]:
    """A step along a direction, halved until the likelihood does not fall."""
    for _ in range(30):
        new = couplings.clone()
        new[pair[0], pair[1]] += change
        new[pair[1], pair[0]] += change
        found = _likelihood(new, goal, pair)
        if found >= value - 1e-13 * abs(value) - 1e-14:
            return new, found
        change = 0.5 * change
    return new, found


def _likelihood(couplings: Tensor, goal: Tensor, pair: tuple) -> float:
    """ln-likelihood of one sample, up to a constant."""
    return float(couplings[pair] @ goal - torch.logsumexp(-pair_energies(couplings), 0))
