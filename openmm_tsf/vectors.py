"""Plain vectors in place of a molecule, for model systems: coordinates that are the vectors themselves, and samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from .typing import Mask, Scalars, Vectors
from .units import to_kelvin

Configurations = Float[Tensor, "batch ..."]
"""Positions (batch, atoms, 3) [nm] of a molecule, or vectors (batch, d) of a model system."""


class LineCoordinates(nn.Module):
    """Coordinates x (batch, d) of a model system as they are, where a molecule has `FlatInternals`.

    Args:
        dim: d.

    Raises:
        ValueError: no dimension at all.
    """

    zmatrix = None

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"a model system has at least 1 dimension, not {dim}")
        self.dim = dim
        self.register_buffer("circular", torch.zeros(dim, dtype=torch.bool), persistent=False)

    def chart(self, q: Vectors) -> Mask:
        """(batch,) True where q is finite."""
        return torch.isfinite(q).all(1)

    def forward(self, q: Vectors) -> tuple[Vectors, Scalars]:
        """q (batch, d) itself; log-determinant zero.

        Raises:
            ValueError: the number of columns is not d.
        """
        if q.ndim != 2 or q.shape[1] != self.dim:
            raise ValueError(f"vectors have shape {tuple(q.shape)}; expected (batch, {self.dim})")
        return q, q.new_zeros(len(q))

    inverse = forward

    def of_frames(self, positions: np.ndarray) -> tuple[Vectors, Mask]:
        """Samples (n, d) in double precision, all of them on the chart."""
        q, _ = self(torch.tensor(positions, dtype=torch.float64))
        return q, self.chart(q)

    def log_constraint_factor(self, x: Vectors, masses: Tensor | None = None) -> Scalars:
        """Zero: nothing is constrained."""
        return x.new_zeros(len(x))


@dataclass(frozen=True, eq=False)
class Samples:
    """Vectors sampled from exp(-U/T)/Z, each with its temperature: to a model system what `Frames` are to a molecule.

    Args:
        positions: (n, d) array or tensor, latest last; kept as float32.
        temperatures: (n,), or one for all, in the unit of the energy: the Boltzmann constant is 1.

    Raises:
        ValueError: shapes that do not fit, no samples, numbers that are not finite, a temperature not above 0.
    """

    positions: Any = field(repr=False)
    temperatures: Any = field(repr=False, default=1.0)

    def __post_init__(self) -> None:
        positions = np.array(np.asarray(self.positions), dtype=np.float32, order="C")
        if positions.ndim != 2 or positions.size == 0 or np.shape(self.temperatures) not in ((), positions.shape[:1]):
            shapes = positions.shape, np.shape(self.temperatures)
            raise ValueError("samples have shape {}, temperatures {}; expected (n, d), (n,)".format(*shapes))
        if bad := int((~np.isfinite(positions).all(1)).sum()):
            raise ValueError(f"{bad} of {len(positions)} samples are not finite")
        temperatures = np.array(np.broadcast_to(self.temperatures, positions.shape[:1]), dtype=np.float64)
        to_kelvin(temperatures.min())
        for name, array in (("positions", positions), ("temperatures", temperatures)):
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.positions)

    def split(self, holdout: float) -> tuple[Samples, Samples]:
        """The early samples, and the last `holdout` (a fraction between 0 and 1).

        Raises:
            ValueError: one of the two parts would be empty.
        """
        cut = len(self) - round(len(self) * holdout)
        if not 0 < cut < len(self):
            raise ValueError(f"cannot hold out a fraction {holdout:g} of {len(self)} samples: one part would be empty")
        first, last = slice(None, cut), slice(cut, None)
        return tuple(Samples(self.positions[part], self.temperatures[part]) for part in (first, last))
