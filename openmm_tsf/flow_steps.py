"""What a move with a flow does when it is applied once: which Metropolis steps, how many, and what is counted."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .checks import positive
from .flow import SteeredFlow
from .metropolis import StepInfo, Target, Walkers, independence_step, latent_step
from .typing import Mask, Positions, Proposal, Scalars, Vectors

STEPS = ("independence", "latent")
"""Kinds of Metropolis steps."""
KINDS = (*STEPS, "mixed")
"""Kinds of moves: of one of the steps, or of both."""
WHAT = ("proposed", "accepted", "nonfinite", "off_chart")
COUNTS = (*(f"{kind}_{what}" for kind in STEPS for what in WHAT), "unrepresentable")
"""Keys of the counts: of each kind of step, its proposals and what became of them; and how many walkers were where the
flow cannot be, so that all their proposals were rejected."""


@dataclass(frozen=True)
class FlowSteps:
    """Metropolis steps of one application.

    Args:
        kind: "independence": a chain of draws of the flow, which leaps between basins; "latent": small steps in the
            flow's latents, for flows of which hardly any draw is accepted; "mixed": the one, then the other.
        n_proposals: draws of the chain, made and scored in one batch.
        n_walk_steps: latent steps, one after the other.
        step_size: of the latent walk, in units of the width of the latents (sqrt(tau); 1 rad for torsions).
        explore: share of the draws spread over all basins, see `SteeredFlow.exploring`; the steps stay exact.

    Raises:
        ValueError: an unknown kind, or numbers that make no sense.
    """

    kind: str = "independence"
    n_proposals: int = 16
    n_walk_steps: int = 1
    step_size: float = 0.1
    explore: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of move {self.kind!r}; choose from {', '.join(KINDS)}")
        for name in ("n_proposals", "n_walk_steps"):
            value = getattr(self, name)
            if not (isinstance(value, Integral) and value >= 1):
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
            object.__setattr__(self, name, int(value))
        positive("step_size", self.step_size)
        if not 0.0 <= self.explore < 1.0:
            raise ValueError(f"explore must be in 0 <= explore < 1, not {self.explore:g}")

    @property
    def n_energies(self) -> int:
        """Energies that one application to one walker takes, that of where it is included."""
        draws = 0 if self.kind == "latent" else self.n_proposals
        return 1 + draws + (0 if self.kind == "independence" else self.n_walk_steps)

    def run(
        self, walkers: Walkers, target: Target, steered: Proposal, *, generator: torch.Generator
    ) -> tuple[Walkers, dict[str, int]]:
        """The walkers after all steps, and counts (keys `COUNTS`) summed over walkers.

        Args:
            walkers: of `target.at`.
            target: left invariant.
            steered: the flow at the temperature of the target.
            generator: of proposals and decisions.
        """
        counts = dict.fromkeys(COUNTS, 0)
        representable = torch.ones(len(walkers), dtype=torch.bool)
        if self.kind != "latent":
            draws = self._exploring(steered) if self.explore > 0.0 else steered
            walkers, info = independence_step(walkers, target, draws, generator=generator, n_proposals=self.n_proposals)
            representable = _add(counts, "independence", info)
        if self.kind != "independence":
            for _ in range(self.n_walk_steps):
                walkers, info = latent_step(walkers, target, steered, step_size=self.step_size, generator=generator)
                representable = _add(counts, "latent", info)
        counts["unrepresentable"] = int((~representable).sum())
        return walkers, counts

    def _exploring(self, steered: Any) -> Proposal:
        if not hasattr(steered, "exploring"):
            raise ValueError(f"a {type(steered).__name__} cannot explore; leave explore at 0")
        return steered.exploring(self.explore)


@dataclass(frozen=True, eq=False)
class PlacedFlow:
    """A flow whose configurations lie where given walkers are, as far as rigid motions go.

    So a molecule stays where it is in space when a proposal is accepted, and forces that are not the same everywhere
    (an external field, say) are sampled rightly: a step changes internals at fixed position and orientation.

    Args:
        steered: the flow at a temperature.
        onto: positions (B, A, 3) [nm] of the walkers; draw k * B + b is put onto number b.
    """

    steered: SteeredFlow
    onto: Positions

    @property
    def latent_scale(self) -> Tensor:
        """As the flow's own."""
        return self.steered.latent_scale

    def exploring(self, share: float) -> PlacedFlow:
        """See `SteeredFlow.exploring`."""
        return PlacedFlow(self.steered.exploring(share), self.onto)

    def propose(self, n: int, *, generator: torch.Generator) -> tuple[Positions, Scalars, Mask]:
        """n draws, n a multiple of the walkers; see `SteeredFlow.propose`."""
        x, log_prob, valid = self.steered.propose(n, generator=generator)
        return self._moved(x), log_prob, valid

    def score(self, x: Positions, *, generator: torch.Generator) -> Scalars:
        """See `SteeredFlow.score`."""
        return self.steered.score(x, generator=generator)

    def to_latents(self, x: Positions, *, generator: torch.Generator) -> tuple[Vectors, Scalars]:
        """See `SteeredFlow.to_latents`."""
        return self.steered.to_latents(x, generator=generator)

    def from_latents(self, z: Vectors) -> tuple[Positions, Scalars, Mask]:
        """Latents (B, D) of each walker; see `SteeredFlow.from_latents`."""
        x, log_volume, valid = self.steered.from_latents(z)
        return self._moved(x), log_volume, valid

    def _moved(self, x: Positions) -> Positions:
        return self.steered.flow.internals.moved_onto(x, self.onto.repeat(len(x) // len(self.onto), 1, 1))


def _add(counts: dict[str, int], kind: str, info: StepInfo) -> Any:
    """Add what became of the proposals to the counts; which walkers the flow could represent."""
    found = (
        len(info.representable) * info.n_proposed,
        *map(_total, (info.n_accepted, info.n_nonfinite, info.n_off_chart)),
    )
    for what, number in zip(WHAT, found, strict=True):
        counts[f"{kind}_{what}"] += number
    return info.representable


def _total(numbers: Tensor) -> int:
    return int(numbers.sum())
