"""Pairwise models of discrete states: Potts and Ising, exact where states can be counted, by sampling beyond.

    Ehat(s) = -sum_i h_i(s_i) - sum_{i<j} J_ij(s_i, s_j)        s_i = 0 ... S - 1

in units of the temperature of the data that a model is fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from openmm_tsf.swaps import exchange, neighbour_pairs
from openmm_tsf.tuning.samples import positive

States = Int[Tensor, "samples sites"]
MOST_STATES = 2_000_000
"""States that are enumerated."""


@dataclass(frozen=True, eq=False)
class PairwiseModel:
    """Energies of L sites in S states each; `model(states)` gives Ehat of states (B, L).

    Args:
        fields: (L, S).
        couplings: (L, S, L, S), symmetric, zero within a site.

    Raises:
        ValueError: shapes that do not fit, fewer than 2 sites or states, or couplings that are not finite or symmetric,
            or not zero within a site.
    """

    fields: Float[Tensor, "..."] = field(repr=False)
    couplings: Float[Tensor, "..."] = field(repr=False)

    def __post_init__(self) -> None:
        if self.fields.ndim != 2 or min(self.fields.shape) < 2 or self.couplings.shape != self.fields.shape * 2:
            shapes = tuple(self.fields.shape), tuple(self.couplings.shape)
            raise ValueError("fields have shape {}, couplings {}; expected (L, S), (L, S, L, S)".format(*shapes))
        fields, couplings = (x.detach().to("cpu", torch.float64) for x in (self.fields, self.couplings))
        if not (torch.isfinite(fields).all() and torch.isfinite(couplings).all()):
            raise ValueError("fields and couplings must be finite")
        within = torch.diagonal(couplings, dim1=0, dim2=2)
        if within.any() or (couplings - couplings.permute(2, 3, 0, 1)).abs().max() > 1e-9:
            raise ValueError("couplings must be symmetric, J_ij(a, b) = J_ji(b, a), and zero within a site")
        object.__setattr__(self, "fields", fields)
        object.__setattr__(self, "couplings", couplings)

    @property
    def n_sites(self) -> int:
        return self.fields.shape[0]

    @property
    def n_states(self) -> int:
        """S, of each site."""
        return self.fields.shape[1]

    def __call__(self, states: States) -> Float[Tensor, " samples"]:
        hot = one_hot(self.checked(states), self.n_states)
        matrix = self.couplings.reshape(hot.shape[1], -1)
        return -hot @ self.fields.reshape(-1) - 0.5 * ((hot @ matrix) * hot).sum(1)

    def checked(self, states: States) -> States:
        """The states, or an error if they are of another space."""
        if states.ndim != 2 or states.shape[1] != self.n_sites:
            raise ValueError(f"states of {states.shape[-1]} sites for a model of {self.n_sites}: not one state space")
        if len(states) and not 0 <= int(states.min()) <= int(states.max()) < self.n_states:
            raise ValueError(f"states from {int(states.min())} to {int(states.max())} for a model of {self.n_states}")
        return states

    def states(self) -> States:
        """All of them, the last site changing fastest.

        Raises:
            ValueError: there are more than MOST_STATES.
        """
        return all_states(self.n_sites, self.n_states)


def one_hot(states: States, n_states: int) -> Float[Tensor, "samples columns"]:
    """(B, L S) with a one in each site's column of its state."""
    return torch.nn.functional.one_hot(states.long(), n_states).to(torch.float64).flatten(1)


def all_states(n_sites: int, n_states: int) -> States:
    """Every state of L sites, the last one changing fastest."""
    if (n := n_states**n_sites) > MOST_STATES:
        raise ValueError(f"{n_states}^{n_sites} = {n:.3g} states are too many to enumerate; sample instead")
    place = n_states ** torch.arange(n_sites - 1, -1, -1)
    return torch.arange(n)[:, None] // place % n_states


def ising(couplings: Float[Tensor, "sites sites"], fields: Float[Tensor, " sites"] | None = None) -> PairwiseModel:
    """Ising model Ehat = -sum_i h_i s_i - sum_{i<j} J_ij s_i s_j as a Potts model: states 0 and 1 are spins -1 and +1.

    Raises:
        ValueError: couplings that are not symmetric, or not zero on the diagonal.
    """
    spin = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    h = torch.zeros(len(couplings), dtype=torch.float64) if fields is None else fields.double()
    pair = couplings.double()[:, None, :, None] * spin[:, None, None] * spin
    return PairwiseModel(h[:, None] * spin, pair)


# --- sampling ---------------------------------------------------------------------------------------------------------


class PairwiseSamples(NamedTuple):
    """States (n, L), and the share of the exchanges between neighbouring temperatures that were accepted."""

    states: States
    swaps_accepted: Float[Tensor, " swaps"]


def gibbs(
    model: PairwiseModel, states: States, n_sweeps: int, *, t: float | Float[Tensor, " samples"] = 1.0,
    generator: torch.Generator,
) -> States:  # fmt: skip
    """Gibbs sampling of exp(-Ehat/t), all chains at once: each site in turn from its distribution given the rest.

    Args:
        model: of the chains.
        states: (B, L) where they start.
        n_sweeps: of all sites.
        t: of all chains, or of each.
        generator: of the draws.
    """
    model.checked(states)
    temperature = torch.as_tensor(t, dtype=torch.float64)
    positive(float(temperature.min()))
    inverse = (1.0 / temperature).expand(len(states))[:, None]
    hot, n = one_hot(states, model.n_states), model.n_states
    rows = model.couplings.reshape(model.n_sites, n, -1)
    new = states.clone()
    for _ in range(n_sweeps):
        noise = torch.rand(model.n_sites, len(states), n, generator=generator, dtype=torch.float64)
        gumbel = -torch.log(-torch.log(noise.clamp(min=1e-300)))
        for site in range(model.n_sites):
            logits = (model.fields[site] + hot @ rows[site].T) * inverse
            new[:, site] = (logits + gumbel[site]).argmax(1)
            hot[:, site * n : (site + 1) * n] = torch.nn.functional.one_hot(new[:, site], n)
    return new


def temper_pairwise(
    model: PairwiseModel, n: int, *, t: float = 1.0, hottest: float = 4.0, n_levels: int = 8, n_replicas: int = 100,
    n_sweeps: int = 5, equilibration: int = 100, generator: torch.Generator,
) -> PairwiseSamples:  # fmt: skip
    """Samples of exp(-Ehat/t) by Gibbs sweeps and parallel tempering.

    Args:
        model: of the samples.
        n: how many.
        t: their temperature.
        hottest: of the ladder, which is geometric, in units of t.
        n_levels: temperatures in the ladder; 1 for Gibbs sampling alone.
        n_replicas: chains at each temperature.
        n_sweeps: between exchanges, and between samples of a chain.
        equilibration: sweeps before the first sample.
        generator: of everything.

    Raises:
        ValueError: a number that must be positive and is not, or a ladder that does not ascend.
    """
    if min(n, n_levels, n_replicas, n_sweeps) < 1 or equilibration < 0 or not hottest >= 1.0:
        raise ValueError(f"cannot draw {n} samples from {n_levels} levels of {n_replicas} chains up to {hottest:g} t")
    ladder = positive(t) * torch.logspace(0, math.log10(hottest), n_levels, dtype=torch.float64)
    levels = torch.arange(n_levels).repeat_interleave(n_replicas)
    states = torch.randint(model.n_states, (len(levels), model.n_sites), generator=generator)
    found, tried, accepted = [], 0, 0
    rounds = -(-equilibration // n_sweeps)
    for turn in range(rounds + -(-n // n_replicas)):
        states = gibbs(model, states, n_sweeps, t=ladder[levels], generator=generator)
        if turn >= rounds:
            found.append(states[levels == 0])
        if n_levels > 1:
            pairs = neighbour_pairs(levels, n_levels, turn, generator=generator)
            levels, a, b = exchange(levels, model(states), 1.0 / ladder, pairs, generator=generator)
            tried, accepted = tried + a, accepted + b
    rates = torch.diagonal(accepted / tried, 1).double() if n_levels > 1 else torch.zeros(0, dtype=torch.float64)
    return PairwiseSamples(torch.cat(found)[:n], rates)


# --- fitting ----------------------------------------------------------------------------------------------------------


def fit_pseudolikelihood(
    states: States, n_states: int, *, ridge: float = 0.01, weights: Sequence[float] | Tensor | None = None,
    most: int = 500,
) -> PairwiseModel:  # fmt: skip
    """Fit fields and couplings by the pseudo-likelihood of all sites at once, with a Gaussian prior.

    Minimises -1/M sum_m sum_i ln q(s_i | the others) + ridge/2 (sum_{i<j} |J_ij|^2 + sum_i |h_i|^2) by L-BFGS. With the
    prior, whose width is 1/sqrt(M ridge), the optimum is unique and exists for any data; it also chooses the gauge.

    Args:
        states: (M, L).
        n_states: S.
        ridge: strength of the prior, above zero.
        weights: of the samples, if they are not worth the same.
        most: iterations.

    Raises:
        ValueError: fewer than 2 samples or sites, states beyond S, a ridge that is not above zero, weights that do not
            fit; or no convergence.

    Source: M. Ekeberg et al., Phys. Rev. E 87, 012707 (2013), the symmetric variant.
    """
    empty = PairwiseModel(torch.zeros(states.shape[1], n_states), torch.zeros((states.shape[1], n_states) * 2))
    if len(empty.checked(states)) < 2:
        raise ValueError(f"a fit needs at least 2 samples, not {len(states)}")
    if not (math.isfinite(ridge) and ridge > 0.0):
        raise ValueError(f"the ridge must be finite and above 0, not {ridge:g}: without it a fit may not exist")
    w = torch.ones(len(states)) if weights is None else torch.as_tensor(weights)
    w = w.to(torch.float64)
    if w.shape != (len(states),) or not (w >= 0.0).all() or not 0.0 < w.sum() < math.inf:
        raise ValueError(f"weights of {len(states)} samples must be as many numbers from zero, not all zero")
    w, hot = w / w.sum(), one_hot(states, n_states)
    length, width = states.shape[1], hot.shape[1]
    apart = torch.block_diag(*[torch.ones(n_states, n_states)] * length).to(torch.float64) == 0.0
    h = torch.zeros(width, dtype=torch.float64, requires_grad=True)
    raw = torch.zeros(width, width, dtype=torch.float64, requires_grad=True)
    rule = {"max_iter": most, "tolerance_grad": 1e-5, "tolerance_change": 0.0, "history_size": 20}
    optimiser = torch.optim.LBFGS([h, raw], line_search_fn="strong_wolfe", **rule)

    def loss() -> Tensor:
        optimiser.zero_grad()
        j = 0.5 * (raw + raw.T) * apart
        logits = (h + hot @ j).view(-1, length, n_states)
        log_q = torch.log_softmax(logits, 2).flatten(1)
        value = -(w @ (log_q * hot).sum(1))
        value = value + 0.5 * ridge * (0.5 * j.square().sum() + h.square().sum())
        value.backward()
        return value

    optimiser.step(loss)
    if (slope := float(torch.cat([h.grad, raw.grad.view(-1)]).abs().max())) > 1e-4:
        raise ValueError(f"the fit did not converge in {most} iterations (largest slope {slope:.1g}); raise the ridge")
    shape = (length, n_states)
    with torch.no_grad():
        return PairwiseModel(h.detach().view(shape), (0.5 * (raw + raw.T) * apart).view(*shape, *shape))
