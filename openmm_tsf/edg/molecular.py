"""A generator of a molecule, used as a flow is: `generator.at(T)` proposes, scores and draws positions.

What temperature does to it is learned, not exact, as it is in flows that steer. Weights set it right at any.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.edg.generator import EDG, EDGSettings
from openmm_tsf.edg.molecule import MolecularTarget
from openmm_tsf.edg.proposal import EDGProposal
from openmm_tsf.systems import Molecule
from openmm_tsf.typing import Mask, Positions, Scalars, Vectors
from openmm_tsf.units import to_kelvin
from openmm_tsf.zmatrix import ZMatrix


class MolecularEDG:
    """A generator and the coordinates that it draws.

    `ensemble.draw` takes it for a flow, and so do Metropolis steps.

    Args:
        edg: the generator, of whitened flat internals; its tau is 1 at the temperature of the target.
        target: whose coordinates they are.
        molecule: the molecule.
        temperatures: lowest and highest temperature [K] of its training.

    Raises:
        ValueError: generator and target of different dimensions, or a range for a generator that knows one
            temperature.
    """

    noun = "generator"

    def __init__(self, edg: EDG, target: MolecularTarget, molecule: Molecule, temperatures: tuple[Any, Any]) -> None:
        if edg.dim != target.dim:
            raise ValueError(f"the generator draws {edg.dim} coordinates, the molecule has {target.dim}")
        low, high = map(to_kelvin, temperatures)
        if not low <= high or (low != high and not edg.conditioned):
            raise ValueError(f"a generator of one temperature cannot have been trained from {low:g} to {high:g} K")
        self.edg, self.target, self.molecule, self.temperatures = edg, target, molecule, (low, high)

    @property
    def training_temperature(self) -> float:
        """[K], tau = 1."""
        return self.target.temperature

    @property
    def zmatrix(self) -> ZMatrix:
        return self.target.internals.zmatrix

    @property
    def settings(self) -> EDGSettings:
        return self.edg.settings

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.edg.parameters())

    def at(self, temperature: Any) -> SampledMolecule:
        """The generator at a temperature [K, or a Quantity] of the range of its training.

        Raises:
            ValueError: outside that range.
        """
        kelvin, (low, high) = to_kelvin(temperature), self.temperatures
        if not low <= kelvin <= high:
            known = f"{low:g} K" if low == high else f"{low:g} to {high:g} K"
            raise ValueError(
                f"this generator was trained at {known}, and cannot run at {kelvin:g} K: run it there and reweight "
                "(`at`), or train it over a range that has this temperature"
            )
        return SampledMolecule(self, kelvin)

    def __repr__(self) -> str:
        low, high = self.temperatures
        trained = f"at {low:g} K" if low == high else f"from {low:g} to {high:g} K"
        return (
            f"MolecularEDG({self.molecule.name}, {self.edg.dim} degrees of freedom, {self.edg.latent_dim} latents, "
            f"trained {trained}, {self.n_parameters} parameters)"
        )


@dataclass(frozen=True, eq=False)
class SampledMolecule:
    """A generator of a molecule at one temperature [K].

    Densities are of flat internals and of latents drawn along, see `proposal`: weights are exact, but the number is not
    the marginal density of positions, and another one each time.
    """

    generator: MolecularEDG
    temperature: float

    is_marginal = False

    @property
    def latent_scale(self) -> Tensor:
        """Widths of a unit step of the latent walk."""
        return self._vectors.latent_scale

    @torch.no_grad()
    def propose(self, n: int, *, generator: torch.Generator) -> tuple[Positions, Scalars, Mask]:
        """n draws: positions (n, A, 3) [nm], NaN off the chart, ln of their density [nat], and which are on it."""
        x, log_prob, finite = self._vectors.propose(n, generator=generator)
        positions, inside = self._target.positions(x)
        return positions, log_prob - self._log_volume(x), inside & finite

    @torch.no_grad()
    def score(self, x: Positions, *, generator: torch.Generator | None = None) -> Scalars:
        """ln of the density (n,) [nat] of positions (n, A, 3) [nm] with fresh latents, -inf off the chart."""
        vectors, inside = self._vectors_of(x, generator)
        log_prob = self._vectors.score(vectors, generator=generator) - self._log_volume(vectors)
        return torch.where(inside, log_prob, -math.inf)

    @torch.no_grad()
    def to_latents(self, x: Positions, *, generator: torch.Generator | None = None) -> tuple[Vectors, Scalars]:
        """See `EDGProposal.to_latents`."""
        vectors, inside = self._vectors_of(x, generator)
        v, log_volume = self._vectors.to_latents(vectors, generator=generator)
        return v, torch.where(inside, log_volume + self._log_volume(vectors), -math.inf)

    @torch.no_grad()
    def from_latents(self, z: Vectors) -> tuple[Positions, Scalars, Mask]:
        """See `EDGProposal.from_latents`."""
        x, log_volume, finite = self._vectors.from_latents(z)
        positions, inside = self._target.positions(x)
        return positions, log_volume + self._log_volume(x), inside & finite

    def log_constraint_factor(self, x: Positions) -> Scalars:
        """See `FlatInternals.log_constraint_factor`."""
        return self._target.internals.log_constraint_factor(x)

    @property
    def _target(self) -> MolecularTarget:
        return self.generator.target

    @property
    def _vectors(self) -> EDGProposal:
        return EDGProposal(self.generator.edg, self.temperature / self.generator.training_temperature)

    def _vectors_of(self, x: Positions, generator: torch.Generator | None) -> tuple[Vectors, Mask]:
        if generator is None:
            raise ValueError("the latents of a diffusion generator are drawn anew: give a generator")
        vectors = self._target.standardised(x.to(self.generator.edg.dtype), generator=generator)
        return vectors, self._target.chart(vectors)

    def _log_volume(self, x: Vectors) -> Scalars:
        """ln of the flat internals that a unit of x stands for, with the share of the image that x is."""
        return self._target.log_det + self._target.log_shares(x)
