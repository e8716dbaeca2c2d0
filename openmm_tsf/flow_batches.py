"""A flow at several temperatures in one pass: small batches cost as much as large ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .flow import Flow
from .flow_steps import PlacedFlow
from .proposals import join_momenta, part_momenta
from .typing import Mask, Positions, Scalars, Vectors

Draws = tuple[Float[Tensor, "draws atoms 3"], Float[Tensor, " draws"], Bool[Tensor, " draws"]]


@dataclass(frozen=True, eq=False)
class PreparedFlow:
    """A placed flow whose first draws, and the scores of where its walkers are, were made together with others'.

    For one independence step of the walkers that it was prepared for; walks in its latents are its own.

    Args:
        placed: the flow at a temperature, with its walkers.
        draws: what it proposes: positions, ln q and which are valid.
        scores: ln q of the walkers.
    """

    placed: PlacedFlow
    draws: Draws
    scores: Scalars

    @property
    def latent_scale(self) -> Tensor:
        """As the flow's own."""
        return self.placed.latent_scale

    def exploring(self, share: float) -> PreparedFlow:
        """Itself: its draws were made so."""
        return self

    def propose(self, n: int, *, generator: torch.Generator) -> tuple[Positions, Scalars, Mask]:
        """The draws; n must be their number."""
        if n != len(self.draws[0]):
            raise ValueError(f"{len(self.draws[0])} draws were prepared, and {n} are asked for")
        return self.draws

    def score(self, x: Positions, *, generator: torch.Generator) -> Scalars:
        """The scores; x must be the walkers."""
        if x is not self.placed.onto:
            raise ValueError("scores were prepared for the walkers as they were, not for other positions")
        return self.scores

    def to_latents(self, x: Positions, *, generator: torch.Generator) -> tuple[Vectors, Scalars]:
        """See `PlacedFlow.to_latents`."""
        return self.placed.to_latents(x, generator=generator)

    def from_latents(self, z: Vectors) -> tuple[Positions, Scalars, Mask]:
        """See `PlacedFlow.from_latents`."""
        return self.placed.from_latents(z)


@torch.no_grad()
def prepare(
    flow: Flow, temperatures: Sequence[float], walkers: Sequence[Tensor], n_proposals: int, explore: float, *,
    generator: torch.Generator,
) -> list[PreparedFlow]:  # fmt: skip
    """The flow at several temperatures, ready for an independence step of the walkers of each.

    Args:
        flow: of the molecule.
        temperatures: [K].
        walkers: positions [nm] at each temperature.
        n_proposals: of each walker.
        explore: share of the draws spread over all basins.
        generator: of the draws.
    """
    steered = [flow.at(temperature).exploring(explore) for temperature in temperatures]
    sizes = [len(x) for x in walkers]
    taus = torch.tensor(temperatures, dtype=flow.dtype) / flow.training_temperature
    q, _ = flow.internals.inverse(torch.cat(list(walkers)).to(flow.dtype))
    tau = taus.repeat_interleave(torch.tensor(sizes)).to(q)
    y, log_momenta = join_momenta(q, flow.n_momenta, tau, generator)
    z, log_det = flow.transform.inverse(y)
    scores = torch.cat([s.prior.log_prob(part) for s, part in zip(steered, z.split(sizes), strict=True)]) + log_det
    scores = torch.where(flow.internals.chart(q), scores - log_momenta, -torch.inf)
    drawn = [s.prior.sample(n_proposals * n, generator=generator) for s, n in zip(steered, sizes, strict=True)]
    y, log_det = flow.transform(torch.cat([z for z, _ in drawn]))
    q, log_momenta = part_momenta(y, flow.n_momenta, tau.repeat_interleave(n_proposals))
    x, valid = steered[0].placed(q)
    log_q = torch.cat([log_p for _, log_p in drawn]) - log_det - log_momenta
    onto = torch.cat([part.repeat(n_proposals, 1, 1) for part in walkers])
    x = flow.internals.moved_onto(x, onto)
    many = [n_proposals * n for n in sizes]
    draws = zip(x.split(many), log_q.split(many), valid.split(many), strict=True)
    parts = zip(steered, walkers, draws, scores.split(sizes), strict=True)
    return [PreparedFlow(PlacedFlow(s, mine), draw, score) for s, mine, draw, score in parts]
