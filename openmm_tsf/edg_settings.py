"""The settings of a diffusion generator of a molecule, as a configuration has them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .checks import positive
from .edg import EDGSettings, EDGTrainingSettings


@dataclass(frozen=True)
class MolecularEDGSettings:
    """Architecture and training of a diffusion generator of a molecule. The defaults are meant for alanine dipeptide.

    Args:
        temperatures: one [K], or the lowest and the highest of a range in which it is trained, with temperature for an
            input; by default what the temperatures of the frames and of the ensembles span.
        decoder: "gaussian", a network, or "hamiltonian", dynamics of the molecule, which takes many more energies.
        latents: number of latents, by default as many as soft torsions; more take stiff coordinates too, and are slow
            to learn.
        hidden, depth: width and number of hidden layers of every network.
        width: of coordinates given their latents at the start: of soft torsions in units of pi/sqrt(3).
        harmonics: of torsions and latents that networks read; the third is that of methyl groups.
        stages, step: of the dynamics ("hamiltonian").
        steps, batch: of training; each draw of a batch costs an energy and its gradient.
        learning_rate: largest.
        anneal_from, anneal_share, walkers, trajectory: see `EDGTrainingSettings`; walkers need one temperature.
        checkpoint_every: steps between checkpoints.
    """

    temperatures: tuple[float, ...] | None = None
    decoder: Literal["gaussian", "hamiltonian"] = "gaussian"
    latents: int | None = None
    hidden: int = 128
    depth: int = 3
    width: float = 0.15
    harmonics: int = 3
    stages: int = 3
    step: float = 0.01
    steps: int = 3000
    batch: int = 512
    learning_rate: float = 4e-3
    anneal_from: float = 0.3
    anneal_share: float = 0.4
    walkers: int = 0
    trajectory: int = 20
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        t = self.temperatures
        if t is not None and (len(t) not in (1, 2) or list(t) != sorted(t) or not 0.0 < t[0] <= t[-1] < math.inf):
            raise ValueError(f"temperatures = {list(t)} must be one, or the lowest and the highest of a range, in K")
        if self.latents is not None and self.latents < 1:
            raise ValueError(f"latents = {self.latents} must be at least 1")
        for name in ("width", "step"):
            positive(name, getattr(self, name))
        if self.walkers and self.conditioned:
            raise ValueError(
                f"walkers = {self.walkers} need one temperature, not {t[0]:g} to {t[-1]:g} K: leave them out, or "
                "ask for ensembles at the temperature of the frames alone"
            )
        self.network(1)  # these check the rest
        self.training  # noqa: B018

    @property
    def conditioned(self) -> bool:
        """Whether temperature is an input."""
        return self.temperatures is not None and self.temperatures[0] != self.temperatures[-1]

    def network(self, n_soft: int) -> EDGSettings:
        """The architecture, of a molecule with so many soft torsions."""
        return EDGSettings(
            decoder=self.decoder, latent_dim=self.latents or max(1, n_soft), hidden=self.hidden, depth=self.depth,
            width=self.width, harmonics=self.harmonics, stages=self.stages, step=self.step,
            conditioned=self.conditioned,
        )  # fmt: skip

    @property
    def training(self) -> EDGTrainingSettings:
        """How it is trained."""
        return EDGTrainingSettings(
            steps=self.steps, batch=self.batch, learning_rate=self.learning_rate, anneal_from=self.anneal_from,
            anneal_share=self.anneal_share, walkers=self.walkers, trajectory=self.trajectory,
            checkpoint_every=self.checkpoint_every, record_every=max(1, min(100, self.steps // 40)),
        )  # fmt: skip
