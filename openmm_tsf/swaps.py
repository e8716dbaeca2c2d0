"""Exchange of temperatures between walkers: who meets whom, and Metropolis' rule on their energies.

Walkers carry the number of their temperature, their level. Whom a walker meets must not depend on energies; then each
exchange leaves the joint distribution of all walkers as it is.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

Levels = Int[Tensor, " walkers"]
Pairs = tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]
Totals = Int[Tensor, "levels levels"]


def neighbour_pairs(levels: Levels, n_levels: int, turn: int, *, generator: torch.Generator) -> Pairs:
    """Walkers of neighbouring levels: 0-1, 2-3, ... in even turns and 1-2, 3-4, ... in odd ones.

    Each walker of a level meets a random one of the other, as far as there are enough.

    Args:
        levels: of the walkers.
        n_levels: how many levels there are.
        turn: number of the exchange; of two levels it is always the turn.
        generator: of the matching.
    """
    shuffled = torch.randperm(len(levels), generator=generator, device=generator.device).to(levels.device)
    order = shuffled[torch.argsort(levels[shuffled], stable=True)]
    members = order.split(torch.bincount(levels, minlength=n_levels).tolist())
    i, j = [order[:0]], [order[:0]]
    for low in range(turn % 2 if n_levels > 2 else 0, n_levels - 1, 2):
        n = min(len(members[low]), len(members[low + 1]))
        i.append(members[low][:n])
        j.append(members[low + 1][:n])
    return torch.cat(i), torch.cat(j)


def random_pairs(levels: Levels, *, generator: torch.Generator) -> Pairs:
    """All walkers in random pairs, whatever their levels; one is left over if their number is odd.

    Args:
        levels: of the walkers; only their number matters.
        generator: of the matching.
    """
    half = len(levels) // 2
    shuffled = torch.randperm(len(levels), generator=generator, device=generator.device).to(levels.device)
    return shuffled[:half], shuffled[half : 2 * half]


def exchange(
    levels: Levels, energies: Float[Tensor, " walkers"], betas: Float[Tensor, " levels"], pairs: Pairs, *,
    generator: torch.Generator,
) -> tuple[Levels, Totals, Totals]:  # fmt: skip
    """Exchange the levels of each pair (i, j) with probability min(1, exp[(beta_i - beta_j)(U_i - U_j)]).

    Args:
        levels: of the walkers.
        energies: U of the walkers [kJ/mol].
        betas: 1/kT of the levels [mol/kJ].
        pairs: no walker is in two of them.
        generator: of the decisions.

    Returns:
        the new levels, and how often two levels were to be exchanged and how often they were, symmetric matrices.
        Pairs of one level are no exchange and are not counted.
    """
    i, j = pairs
    a, b = levels[i], levels[j]
    log_ratio = (betas[a] - betas[b]) * (energies[i] - energies[j])
    u = torch.rand(len(i), generator=generator, dtype=torch.float64, device=generator.device).to(levels.device)
    accepted = u.log() < log_ratio
    new = levels.clone()
    new[i], new[j] = torch.where(accepted, b, a), torch.where(accepted, a, b)
    return new, _totals(a, b, a != b, len(betas)), _totals(a, b, accepted & (a != b), len(betas))


def _totals(a: Tensor, b: Tensor, counted: Tensor, n: int) -> Tensor:
    found = torch.bincount((a * n + b)[counted], minlength=n * n).view(n, n)
    return (found + found.T).cpu()
