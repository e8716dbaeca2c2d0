"""All pairs of atoms of a batch of configurations, and what the terms of a force field share of them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openmm_tsf.energy.gather import differences, take


class Pairs(nn.Module):
    """Atom pairs first < second, in the order of the upper triangle; the same for every configuration.

    Args:
        n_atoms: number of atoms.
    """

    def __init__(self, n_atoms: int) -> None:
        super().__init__()
        self.first, self.second = np.triu_indices(n_atoms, 1)
        self.n_atoms = n_atoms
        ends = [*self.first.tolist(), *self.second.tolist()]
        self.difference = differences(self.first.tolist(), self.second.tolist(), n_atoms)
        self.ends = take(ends, n_atoms)

    def __len__(self) -> int:
        return len(self.first)

    def row(self, i: int, j: int) -> int:
        """Row of the pair of two atoms, in either order."""
        i, j = min(i, j), max(i, j)
        return i * self.n_atoms - i * (i + 1) // 2 + j - i - 1

    def of_atoms(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values (atoms, batch) of the first and of the second atom of each pair, (pairs, batch)."""
        both = self.ends(values)
        return both[: len(self)], both[len(self) :]

    def onto_atoms(self, first: Tensor, second: Tensor) -> Tensor:
        """Sums (atoms, batch) of what each pair gives to its first and to its second atom, (pairs, batch)."""
        return self.ends.transposed(torch.cat([first, second]))


def check_particles(force: Any, pairs: Pairs) -> int:
    """The number of particles of a force of pairs.

    Raises:
        ValueError: it is not that of the System.
    """
    n = force.getNumParticles()
    if n != pairs.n_atoms:
        raise ValueError(f"{type(force).__name__} has parameters of {n} particles; the System has {pairs.n_atoms}")
    return n


class Geometry:
    """A batch of configurations as the terms of a force field see it.

    Args:
        positions: (atoms, 3, batch) [nm].
        pairs: the pairs of its atoms.
    """

    def __init__(self, positions: Tensor, pairs: Pairs) -> None:
        self.positions, self.pairs = positions, pairs

    @cached_property
    def inverse_distances(self) -> Tensor:
        """(pairs, batch) [1/nm]."""
        return torch.rsqrt(self._squares)

    @cached_property
    def distances(self) -> Tensor:
        """(pairs, batch) [nm]."""
        return self._squares * self.inverse_distances

    @cached_property
    def _squares(self) -> Tensor:
        vectors = self.pairs.difference(self.positions)
        return (vectors * vectors).sum(1)
