"""What a replica exchange in temperature leaves behind, whichever program ran it; its round trips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class ExchangeRecord:
    """I iterations of R replicas on K temperatures, with J stored frames of each replica.

    Args:
        sampler: "batched" or "openmmtools".
        temperatures: (K,) [K], ascending.
        levels: (I, R), index of each replica's temperature during the iteration.
        energies: (I, R), raw potential energy [kJ/mol] at the end of the iteration, before temperatures are exchanged.
        swap_proposed, swap_accepted: (K, K), symmetric totals of exchanges between two temperatures.
        move_counts: of the flow moves, a mapping for each temperature (keys: `flow_steps.COUNTS`), empty without them.
        positions: (J, R, A, 3) float32 [nm].
        position_iterations: (J,), the iteration that each stored frame ends.
        n_energy_evaluations: of dynamics and moves; None where unknown.
        seconds: of wall time; None where unknown.

    Raises:
        ValueError: shapes that do not fit together.
    """

    sampler: str
    temperatures: np.ndarray
    levels: np.ndarray
    energies: np.ndarray
    swap_proposed: np.ndarray
    swap_accepted: np.ndarray
    move_counts: tuple[Mapping[str, int], ...]
    positions: np.ndarray
    position_iterations: np.ndarray
    n_energy_evaluations: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        k, shape, stored = len(self.temperatures), self.levels.shape, len(self.position_iterations)
        wanted = {
            "levels": (len(self.levels), self.n_replicas),
            "energies": shape,
            "swap_proposed": (k, k),
            "swap_accepted": (k, k),
            "positions": (stored, self.n_replicas, *self.positions.shape[2:]),
        }
        wrong = [
            f"{name} {getattr(self, name).shape} instead of {size}"
            for name, size in wanted.items()
            if getattr(self, name).shape != size
        ]
        if wrong or len(self.move_counts) != k:
            raise ValueError(f"an exchange of {k} temperatures contradicts itself: {'; '.join(wrong) or 'move_counts'}")

    @property
    def n_iterations(self) -> int:
        """Number of iterations I."""
        return len(self.levels)

    @property
    def n_replicas(self) -> int:
        """Number of replicas R."""
        return self.levels.shape[1]


class RoundTrips:
    """Counts how often each of R replicas went from the lowest of K temperatures to the highest and back, as it goes.

    Args:
        n_temperatures, n_replicas: K and R.
    """

    def __init__(self, n_temperatures: int, n_replicas: int) -> None:
        self._top = n_temperatures - 1
        self._end = np.full(n_replicas, -1)  # where each replica was last, the bottom or the top; -1 for neither yet
        self._arrivals = np.zeros(n_replicas, dtype=np.int64)  # at the bottom, from the top or for the first time

    def follow(self, levels: np.ndarray) -> None:
        """Take in the next n iterations: levels (n, R), as in `ExchangeRecord`."""
        path = np.concatenate([self._end[None], levels])
        rows = np.where((path == 0) | (path == self._top), np.arange(len(path))[:, None], 0)
        ends = np.take_along_axis(path, np.maximum.accumulate(rows, axis=0), axis=0)
        self._arrivals += ((ends[1:] == 0) & (ends[:-1] != 0)).sum(0)
        self._end = ends[-1]

    @property
    def counts(self) -> np.ndarray:
        """(R,) round trips so far."""
        return np.maximum(self._arrivals - 1, 0)
