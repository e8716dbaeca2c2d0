"""Whether a flow still covers what another one covered: its likelihood there, and the share of every well.

A flow trained on its own weighted draws never hears of a mode that it has lost. So a flow is held against draws that an
earlier one spread over all basins: these say how much of the Boltzmann distribution lies in every well of the soft
torsions, and how likely the flow makes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from .ensemble import Ensemble
from .flow import Flow
from .geometry import smoothed_density
from .torsions import dihedrals
from .typing import Positions, Scalars
from .weights import Estimate, bootstrap_mean
from .zmatrix import ZMatrix

FACTOR = 2.0
"""Most that a flow's own share of a well may differ from the Boltzmann distribution's, unless it did from the start."""
N_SIGMA = 3.0
"""Standard errors that a difference of shares is given besides."""


@dataclass(frozen=True)
class Well:
    """The stretch of a soft torsion between two minima of its density.

    Attributes:
        atoms: (4,) indices of the torsion.
        name: its atoms, for people.
        start, end: [rad]; a well with start >= end goes round past pi.
    """

    atoms: tuple[int, int, int, int]
    name: str
    start: float
    end: float

    def __str__(self) -> str:
        return f"torsion {self.name} from {self.start:.2f} to {self.end:.2f} rad"

    def holds(self, positions: Positions) -> Scalars:
        """(n,) 1 for each of positions (n, atoms, 3) that lies in the well, 0 for the others."""
        beyond = torch.tensor(dihedrals(positions, self.atoms), dtype=torch.float64) - self.start
        return (beyond % math.tau < (self.end - self.start) % math.tau).double()


def find_wells(ensemble: Ensemble, zmatrix: ZMatrix) -> tuple[Well, ...]:
    """The wells of every soft torsion that has more than one, in the weighted density of an ensemble."""
    weights = torch.softmax(ensemble.log_weights, 0)
    wells = []
    for row, leader in zip(zmatrix.rows, zmatrix.leaders, strict=True):
        if row.kind != "soft" or zmatrix.rows[leader] is not row:
            continue
        atoms = (row.torsion, row.angle, row.bond, row.atom)
        angles = torch.tensor(dihedrals(ensemble.positions, atoms), dtype=torch.float64)
        places, density = smoothed_density(angles, weights, bins=180)
        lowest = (density < density.roll(1)) & (density <= density.roll(-1))
        cuts = places[lowest].tolist()
        name = " ".join(zmatrix.labels[atom] for atom in atoms)
        if len(cuts) > 1:
            wells += [Well(atoms, name, a, b) for a, b in zip(cuts, [*cuts[1:], cuts[0]], strict=True)]
    return tuple(wells)


def shares(wells: tuple[Well, ...], positions: Positions) -> Float[Tensor, " wells"]:
    """Share of positions (n, atoms, 3) in each well, all of them counted alike."""
    return _members(wells, positions).mean(0)


def _members(wells: tuple[Well, ...], positions: Positions) -> Float[Tensor, "n wells"]:
    nothing = torch.zeros(len(positions), 0, dtype=torch.float64)
    return torch.cat([nothing, *(well.holds(positions)[:, None] for well in wells)], 1)


@dataclass(frozen=True, eq=False)
class Coverage:
    """What a flow has to cover at one temperature, and how well another one did.

    Args:
        ensemble: weighted draws that were spread over all basins (`draw(..., explore=...)`).
        wells: see `find_wells`.
        start: (wells,) share of each among the plain draws of the flow that made the ensemble.
    """

    ensemble: Ensemble
    wells: tuple[Well, ...]
    start: Float[Tensor, " wells"]

    @cached_property
    def exact(self) -> Estimate:
        """Share of the Boltzmann distribution in each well (wells,), with its error."""
        if not self.wells:
            return Estimate(self.start, torch.zeros_like(self.start))
        return self.ensemble.mean(_members(self.wells, self.ensemble.positions), n_replicates=100)

    def log_prob(self, flow: Flow) -> Scalars:
        """ln q [nat] of a flow at each row of the ensemble, at its temperature and without exploring."""
        steered, momenta = flow.at(self.ensemble.temperature), torch.Generator().manual_seed(0)
        parts = self.ensemble.positions.double().split(16384)
        return torch.cat([steered.score(x, generator=momenta) for x in parts])

    def nll_change(self, before: Scalars, after: Scalars) -> Estimate:
        """How much the weighted negative log-likelihood [nat] rises from one `log_prob` to another."""
        rest = {"n_rejected": self.ensemble.n_rejected, "n_replicates": 100}
        # a row that rounding put off the chart is -inf for both
        rise = torch.where(before == after, 0.0, before - after)
        return bootstrap_mean(self.ensemble.log_weights, rise, **rest)

    def lost(self, raw: Float[Tensor, " wells"], n: int) -> str | None:
        """The first well of which a flow holds too little or too much, in words; None where all is well.

        Args:
            raw: share of each well among the flow's plain draws.
            n: number of these.
        """
        share, error = self.exact
        off = torch.maximum(self.start / share, share / self.start)  # inf, and so no bound, where the start had none
        factor = torch.where(share > 0, off.nan_to_num(nan=1.0, posinf=math.inf).clamp_min(FACTOR), torch.inf)
        low, high = share / factor, share * factor
        least = low - N_SIGMA * (low / n + (error / factor) ** 2).sqrt()
        most = high + N_SIGMA * (high / n + (error * factor) ** 2).sqrt()
        bad = torch.nonzero((raw < least) | (raw > most))[:, 0].tolist()
        if not bad:
            return None
        i = bad[0]
        return (
            f"{100 * raw[i]:.3g} % of the draws have the {self.wells[i]}, where "
            f"{100 * share[i]:.3g} ± {100 * error[i]:.2g} % belong"
        )
