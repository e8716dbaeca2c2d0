"""Distances held fixed in dynamics, for many walkers at once: what SHAKE and RATTLE do, to the same result.

The walkers are the last axis everywhere, as in the batched energies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Vectors = Float[Tensor, "constraints 3 walkers"]
Values = Float[Tensor, "constraints walkers"]
Coordinates = Float[Tensor, "atoms 3 walkers"]

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-9}
"""Relative errors of the lengths. Single precision knows a bond of 0.1 nm at 0.5 nm from the origin to 5e-7."""
MOST_ITERATIONS = 25


class ConstraintError(ValueError):
    """Walkers so far off their constraints that no multipliers lead back to them."""


class Constraints:
    """Fixed distances between pairs of atoms: bonds, or the sides of rigid groups.

    Positions x are corrected along the directions of the constraints at a reference, divided by masses, until all
    lengths hold: x + M^-1 J^T(reference) lambda, the one solution that SHAKE, SETTLE and CCMA approach too. Multipliers
    are found by iteration with an estimate of the coupling matrix J M^-1 J^T that is the same for all walkers and
    steps (as in CCMA); should that not converge, by Newton's method with the matrix of each walker.

    Args:
        pairs: atoms (i, j) of each constraint.
        lengths: distance of each [nm].
        masses: of all atoms [amu].
        dtype, device: of the positions to come.
        tolerance: largest relative error of a length, and of the velocity along a constraint in lengths per fs; by
            default `TOLERANCE` of the dtype.

    Raises:
        ValueError: atoms that do not exist or have no mass, a pair twice, a length that is not above 0, a tolerance
            below the precision of the dtype, or torch set to round the factors of float32 products.

    Source: J.-P. Ryckaert, G. Ciccotti, H. J. C. Berendsen, J. Comput. Phys. 23, 327 (1977); H. C. Andersen, J. Comput.
    Phys. 52, 24 (1983); P. Eastman, V. S. Pande, J. Chem. Theory Comput. 6, 434 (2010).
    """

    def __init__(
        self,
        pairs: Sequence[tuple[int, int]],
        lengths: Sequence[float],
        masses: Sequence[float],
        *,
        dtype: torch.dtype = torch.float32,
        device: Any = "cpu",
        tolerance: float | None = None,
    ) -> None:
        _check(pairs, lengths, masses)
        self.tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
        if self.tolerance < 4.0 * torch.finfo(dtype).eps:
            raise ValueError(f"tolerance {tolerance:g} is below the precision of {dtype}")
        if len(pairs) and dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            raise ValueError(
                "constraints need matrix products in full single precision; "
                "call torch.set_float32_matmul_precision('highest')"
            )
        self.pairs = tuple((int(i), int(j)) for i, j in pairs)
        ends = torch.tensor(self.pairs, dtype=torch.int64).reshape(-1, 2)
        signs = torch.tensor([-1.0, 1.0], dtype=torch.float64).expand(len(ends), 2)
        differences = torch.zeros(len(ends), len(masses), dtype=torch.float64).scatter_(1, ends, signs)
        cosines = _cosines(self.pairs, lengths) * (differences @ differences.T).sign()
        per_length = 1.0 / torch.tensor(lengths, dtype=torch.float64)[:, None]
        differences *= per_length
        # masses of 0 belong to atoms without constraints
        to_atoms = differences.T / torch.tensor([mass or 1.0 for mass in masses], dtype=torch.float64)[:, None]
        coupling = differences @ to_atoms
        inverse = torch.linalg.pinv(coupling * cosines, rtol=1e-6, hermitian=True)

        def moved(x: Tensor) -> Tensor:
            return x.to(device, dtype).contiguous()

        self._first, self._second = ends[:, 0].to(device), ends[:, 1].to(device)
        self._per_length = moved(per_length[..., None])
        self._to_atoms, self._coupling, self._inverse = moved(to_atoms), moved(coupling), moved(inverse)

    def __len__(self) -> int:
        return len(self.pairs)

    def positions(self, positions: Coordinates, reference: Coordinates) -> Coordinates:
        """Positions with all lengths right, from positions near by and a reference that has them right [nm].

        Raises:
            ConstraintError: no correction along the reference's directions leads to the right lengths.
        """
        return positions + self.position_shift(positions, self.directions(reference))

    def velocities(self, velocities: Coordinates, positions: Coordinates) -> Coordinates:
        """Velocities [nm/ps] without what changes lengths, by the orthogonal projection in the metric of the masses."""
        return velocities + self.velocity_shift(velocities, self.directions(positions))

    def directions(self, positions: Coordinates) -> Vectors:
        """From the first to the second atom of each constraint, in units of its length."""
        return (
            positions.index_select(0, self._second).sub_(positions.index_select(0, self._first)).mul_(self._per_length)
        )

    def position_shift(self, positions: Coordinates, directions: Vectors) -> Coordinates:
        """What to add to positions for all lengths to be right, along the given directions over the masses.

        A walker whose positions are not finite stays as it is, without effect on others.

        Raises:
            ConstraintError: as in `positions`.
        """

        def error(d: Tensor, scratch: Tensor) -> Tensor:
            return torch.rsub(torch.mul(d, d, out=scratch).sum(1), 0.5, alpha=0.5)

        return self._shift(positions, directions, error, lambda d: d, self.tolerance)

    def velocity_shift(self, velocities: Coordinates, directions: Vectors, slack: float = 1.0) -> Coordinates:
        """What to add to velocities for none to be left along the given directions.

        Args:
            slack: by how much the tolerance may be exceeded.
        """

        def error(d: Tensor, scratch: Tensor) -> Tensor:
            return torch.mul(d, directions, out=scratch).sum(1).neg_()

        return self._shift(velocities, directions, error, lambda d: directions, 1000.0 * slack * self.tolerance)

    def _shift(
        self,
        vectors: Tensor,
        directions: Tensor,
        error: Callable[[Tensor, Tensor], Tensor],
        gradient: Callable[[Tensor], Tensor],
        tolerance: float,
    ) -> Tensor:
        """Correction of positions or velocities (atoms, 3, walkers) that brings all errors below the tolerance.

        An error falls as gradient(d) . d grows, where d is the difference between the two atoms over the length.
        """

        def estimated(left: Tensor, _d: Tensor) -> Tensor:
            return self._inverse @ left

        def exact(left: Tensor, d: Tensor) -> Tensor:
            matrix = torch.einsum("cxw,dxw->wcd", gradient(d), directions) * self._coupling
            # a singular matrix gives what is not finite, and is reported as not converged
            return torch.linalg.solve_ex(matrix, left.T)[0].T

        for solve in (estimated, exact):
            d = self.directions(vectors)
            multipliers, left = _iterate(d, directions, self._coupling, error, tolerance, solve)
            if _largest(left) <= tolerance:
                along = torch.mul(directions, multipliers[:, None], out=d)
                return (self._to_atoms @ along.flatten(1)).view_as(vectors)
        raise ConstraintError(self._report(left, tolerance))

    def _report(self, left: Tensor, tolerance: float) -> str:
        missed = ~(left.abs() <= tolerance)
        walkers = missed.any(0).nonzero().squeeze(1).tolist()
        i, j = self.pairs[int(missed[:, walkers[0]].nonzero()[0])]
        return (
            f"constraints cannot be met in {len(walkers)} of {left.shape[1]} walkers ({listed(walkers)}; atoms {i} and "
            f"{j} of walker {walkers[0]}, for one); use a smaller time step, or check the forces"
        )


def listed(numbers: Sequence[int], most: int = 10) -> str:
    """The first few of many numbers, for a message: "3, 7, 8" or "3, 7, ..."."""
    return ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")


def _iterate(
    d: Tensor,
    directions: Tensor,
    coupling: Tensor,
    error: Callable[[Tensor, Tensor], Tensor],
    tolerance: float,
    solve: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Multipliers and errors left (constraints, walkers) when all are below the tolerance, or when patience ends.

    Works in place on d, the differences to correct.
    """
    multipliers, scratch = torch.zeros_like(d[:, 0]), torch.empty_like(d)
    flat, step = d.flatten(1), scratch.flatten(1)
    left = error(d, scratch)
    # What is not finite to begin with cannot be helped. It must not keep the others from being finished.
    lost = None if math.isfinite(_largest(left)) else ~left.isfinite().all(0)
    for _ in range(MOST_ITERATIONS):
        if lost is not None:
            left[:, lost] = 0.0
        if _largest(left) <= tolerance:
            break
        more = solve(left, d)
        multipliers += more
        torch.mul(directions, more[:, None], out=scratch)
        flat.addmm_(coupling, step)
        left = error(d, scratch)
    return multipliers, left


def _largest(errors: Tensor) -> float:
    low, high = torch.aminmax(errors)  # several times quicker than abs().max()
    return max(-float(low), float(high))


def _cosines(pairs: Sequence[tuple[int, int]], lengths: Sequence[float]) -> Tensor:
    """Cosines (C, C) of the angles between constraints, seen from the atom that they share.

    Exact where a third constraint closes the triangle. Otherwise as if the n constraints at the atom were evenly spread
    (-1/3 for up to four, as in tetrahedra): near enough for molecules, and positive semidefinite for sure.
    """
    length_of = {frozenset(pair): length for pair, length in zip(pairs, lengths, strict=True)}
    at_atom: dict[int, list[int]] = {}
    for index, pair in enumerate(pairs):
        for atom in pair:
            at_atom.setdefault(atom, []).append(index)
    cosines = torch.eye(len(pairs), dtype=torch.float64)
    for indices in at_atom.values():
        spread = -1.0 / max(3, len(indices) - 1)
        for a in indices:
            for b in indices:
                if a != b:
                    opposite = length_of.get(frozenset(pairs[a]) ^ frozenset(pairs[b]))
                    sides = lengths[a], lengths[b], opposite
                    cosines[a, b] = spread if opposite is None else _law_of_cosines(*sides)
    return cosines


def _law_of_cosines(a: float, b: float, opposite: float) -> float:
    return (a * a + b * b - opposite * opposite) / (2.0 * a * b)


def _check(pairs: Sequence[tuple[int, int]], lengths: Sequence[float], masses: Sequence[float]) -> None:
    seen = set()
    for (i, j), length in zip(pairs, lengths, strict=True):
        what = f"the constraint between atoms {i} and {j}"
        if not (0 <= i < len(masses) and 0 <= j < len(masses) and i != j):
            raise ValueError(f"{what} is not between two of the {len(masses)} atoms")
        if not (masses[i] > 0.0 and masses[j] > 0.0):
            raise ValueError(f"{what} involves a particle without mass")
        if not (math.isfinite(length) and length > 0.0):
            raise ValueError(f"{what} has length {length:g} nm")
        if frozenset((i, j)) in seen:
            raise ValueError(f"{what} is there twice")
        seen.add(frozenset((i, j)))
