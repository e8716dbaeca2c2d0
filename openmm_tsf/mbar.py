"""Samples of a replica exchange in temperature, their MBAR weights, and a block jackknife over time.

Source: M. R. Shirts and J. D. Chodera, J. Chem. Phys. 129, 124105 (2008); H. R. Kuensch, Ann. Stat. 17, 1217 (1989).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import logsumexp

from .exchange.quiet import quiet_import
from .records import ExchangeRecord
from .units import kT


@dataclass(frozen=True, eq=False)
class Samples:
    """Energies (I, R) [kJ/mol] and levels after discarding, the block of each iteration, and the same of the frames.

    What MBAR says of them, and of them without each block, is solved when it is first asked for and then kept.
    """

    temperatures: np.ndarray
    energies: np.ndarray
    levels: np.ndarray
    block: np.ndarray
    frame_iterations: np.ndarray
    """(J,) row of each stored frame in `energies`, negative for frames that were discarded."""

    @classmethod
    def of(cls, record: ExchangeRecord, n_discard: int, n_blocks: int) -> Samples:
        """The samples of a record without its first n_discard iterations, in n_blocks stretches of time.

        Raises:
            ValueError: fewer iterations left than blocks, or a non-finite energy among them.
        """
        n = record.n_iterations - n_discard
        if n_discard < 0 or n_blocks < 1 or n < n_blocks:
            raise ValueError(
                f"{record.n_iterations} iterations without the first {n_discard} do not make {n_blocks} blocks of at "
                "least one; run longer, or discard less"
            )
        energies = np.asarray(record.energies[n_discard:], dtype=np.float64)
        bad = ~np.isfinite(energies)
        if bad.any():
            first = n_discard + int(np.argwhere(bad)[0, 0])
            raise ValueError(f"{bad.sum()} of {bad.size} energies are not finite (first: iteration {first})")
        return cls(
            temperatures=np.asarray(record.temperatures, dtype=np.float64),
            energies=energies,
            levels=record.levels[n_discard:],
            block=np.arange(n) * n_blocks // n,
            frame_iterations=np.asarray(record.position_iterations) - n_discard,
        )

    @property
    def everything(self) -> np.ndarray:
        """(I,) all iterations."""
        return np.ones(len(self.energies), dtype=bool)

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return int(self.block[-1]) + 1

    @cached_property
    def f(self) -> np.ndarray:
        """(K,) MBAR free energies [nat] of all iterations."""
        return self.solve(self.everything)

    @cached_property
    def f_without(self) -> tuple[np.ndarray, ...]:
        """The same (K,) without each of the blocks."""
        return tuple(self.solve(self.block != block, self.f) for block in range(self.n_blocks))

    def counts(self, kept: np.ndarray) -> np.ndarray:
        """(K,) samples of each temperature."""
        return np.bincount(self.levels[kept].ravel(), minlength=len(self.temperatures))

    def solve(self, kept: np.ndarray, guess: np.ndarray | None = None) -> np.ndarray:
        """(K,) MBAR free energies [nat] of the iterations kept."""
        with quiet_import():
            from pymbar import MBAR

            # pymbar's default protocol hands scipy options that scipy warns about
            u = self.energies[kept].ravel() / kT(self.temperatures)[:, None]
            mbar = MBAR(u, self.counts(kept), initial_f_k=guess, solver_protocol=({"method": "adaptive"},))
        return np.asarray(mbar.f_k) - mbar.f_k[0]

    def log_weights(self, f: np.ndarray, kept: np.ndarray, temperature: float) -> np.ndarray:
        """(I kept, R) ln of the MBAR weights at a temperature, up to a constant."""
        return self._log_weights(f, self.energies[kept], self.counts(kept), temperature)

    def frame_weights(self, f: np.ndarray, kept: np.ndarray, temperature: float) -> np.ndarray:
        """(J, R) MBAR weights of the stored frames, which sum to 1; 0 where not kept, NaN if none is."""
        rows = self.frame_iterations
        used = (rows >= 0) & kept[np.maximum(rows, 0)]
        weights = np.zeros((len(rows), self.energies.shape[1]))
        if not used.any():
            return np.full_like(weights, math.nan)
        n = np.bincount(self.levels[rows[used]].ravel(), minlength=len(self.temperatures))
        log_w = self._log_weights(f, self.energies[rows[used]], n, temperature)
        weights[used] = np.exp(log_w - logsumexp(log_w))
        return weights

    def require_frames(self) -> None:
        """Raises a ValueError where no stored frame is left after discarding."""
        if not (self.frame_iterations >= 0).any():
            raise ValueError(
                f"none of the {len(self.frame_iterations)} stored frames is left; store more often, or discard less"
            )

    def _log_weights(self, f: np.ndarray, energies: np.ndarray, n: np.ndarray, temperature: float) -> np.ndarray:
        mixture = np.full(energies.shape, -math.inf)
        for count, f_k, kelvin in zip(n, f, self.temperatures, strict=True):
            if count > 0:
                np.logaddexp(mixture, math.log(count) + f_k - energies / kT(kelvin), out=mixture)
        return -energies / kT(temperature) - mixture


def jackknife(
    samples: Samples, statistic: Callable[[np.ndarray, np.ndarray], np.ndarray], best: np.ndarray
) -> np.ndarray:
    """Standard error of statistic(iterations kept, free energies) by leaving out each block.

    NaN with one block, and for what is NaN without one of the blocks.
    """
    n = samples.n_blocks
    if n < 2:
        return np.full_like(best, math.nan)
    parts = [statistic(samples.block != block, f) for block, f in enumerate(samples.f_without)]
    return np.sqrt((n - 1) / n * ((np.stack(parts) - np.mean(parts, axis=0)) ** 2).sum(0))
