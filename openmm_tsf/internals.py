"""Flat internal coordinates: the map between internals whose volume element is constant and Cartesian positions.

With q = (r^3/3, -cos theta, phi) the Cartesian volume element, rigid motions integrated out, is exactly dq. A density
of q that steers in temperature therefore steers in Cartesian space too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from .chart import Chart
from .geometry import cos_angle, cross, dot, torsion, unit, wrap
from .systems import Molecule
from .typing import Mask, Positions, Scalars, Vectors
from .zmatrix import ZMatrix


class FlatInternals(nn.Module):
    """Internal coordinates q (batch, D) of one molecule, and back.

    The columns are the free bonds [nm^3 / 3], the angles [-cos theta], then the torsions [rad] in the order of the
    z-matrix. Bonds that the System constrains are constants. The first torsion of a family is a torsion, the others are
    differences to it. The log-determinant is zero in both directions: ln q(x) of positions is by definition the density
    in flat internals, which is the Cartesian one with rigid motions integrated out.

    Attributes:
        dim: D = 3 A - 6 - number of constraints.
        circular: (D,) columns that live on the circle, on [-pi, pi).
        reference: (D,) internals of the molecule's own positions.
        names: D names for people.
        chart: where the coordinates are one to one; `chart(q)` says which rows are inside.

    Raises:
        ValueError: a constraint that is not a bond of the z-matrix.

    Source: Dibak, Klein, Noe, arXiv 2012.00429, for the constant Jacobian that steering needs.
    """

    def __init__(self, molecule: Molecule, zmatrix: ZMatrix) -> None:
        super().__init__()
        self.zmatrix, self.n_atoms = zmatrix, molecule.n_atoms
        a, b, c = zmatrix.root
        rows = zmatrix.rows
        bonds = [(b, a), (c, b), *((r.atom, r.bond) for r in rows)]
        angles = [(a, b, c), *((r.atom, r.bond, r.angle) for r in rows)]
        quartets = [(r.atom, *r.references) for r in rows]
        lengths = _constrained_lengths(molecule, zmatrix, bonds)
        free = [i for i, length in enumerate(lengths) if length is None]
        self._index("bond_pairs", bonds)
        self._index("angle_triples", angles)
        self._index("torsion_quartets", quartets, width=4)
        self._index("leaders", list(zmatrix.leaders))
        self._index("free_bonds", free)
        self._index("rigid_pairs", [bond for bond, length in zip(bonds, lengths, strict=True) if length], width=2)
        self._number("lengths", [length or math.nan for length in lengths])
        self._number("masses", np.array(molecule.masses))  # a copy: theirs is read-only
        follows = [leader != i for i, leader in enumerate(zmatrix.leaders)]
        self.register_buffer("follows", torch.tensor(follows, dtype=torch.bool)[:, None], persistent=False)
        self._levels = [self._level(level) for level in zmatrix.levels]
        placed = [*zmatrix.root, *(rows[i].atom for level in zmatrix.levels for i in level)]
        self._index("atom_order", [placed.index(atom) for atom in range(self.n_atoms)])

        self.n_bonds, self.n_angles = len(free), len(angles)
        self.dim = self.n_bonds + self.n_angles + len(rows)
        groups = ("r", [bonds[i] for i in free]), ("theta", angles), ("phi", quartets)
        names = (f"{kind}({' '.join(zmatrix.labels[a] for a in atoms)})" for kind, group in groups for atoms in group)
        self.names = tuple(names)
        soft = [row.kind == "soft" and not f for row, f in zip(rows, follows, strict=True)]
        self.register_buffer(
            "circular", torch.tensor([False] * (self.n_bonds + self.n_angles) + soft), persistent=False
        )
        self._number("reference", self._measure(torch.tensor(molecule.positions, dtype=torch.float64)[None])[0])
        self.chart = Chart(self.reference, self.n_bonds, self.n_angles, zmatrix, molecule.bonds)

    def _index(self, name: str, values: list, width: int = 0) -> None:
        tensor = torch.tensor(values, dtype=torch.long)
        self.register_buffer(name, tensor.reshape(-1, width) if width else tensor, persistent=False)

    def _number(self, name: str, values: object) -> None:
        self.register_buffer(name, torch.as_tensor(values, dtype=torch.float64).clone(), persistent=False)

    def _level(self, level: tuple[int, ...]) -> str:
        """Register what placing one level needs; a family of rows shares one frame. Returns the common suffix."""
        rows = [self.zmatrix.rows[i] for i in level]
        frames = list(dict.fromkeys(row.references for row in rows))
        suffix = str(level[0])
        slot = {atom: i for i, atom in enumerate(self.zmatrix.root)}
        for earlier in self.zmatrix.levels:
            if earlier == level:
                break
            slot |= {self.zmatrix.rows[i].atom: len(slot) + n for n, i in enumerate(earlier)}
        self._index(f"rows_{suffix}", list(level))
        self._index(f"frames_{suffix}", [[slot[a] for a in frame] for frame in frames])
        self._index(f"family_{suffix}", [frames.index(row.references) for row in rows])
        return suffix

    def inverse(self, x: Positions) -> tuple[Vectors, Scalars]:
        """Positions (batch, atoms, 3) [nm] to internals (batch, D), also off the chart; log-determinant zero.

        Raises:
            ValueError: the number of atoms is not the molecule's.
        """
        if x.ndim != 3 or x.shape[1:] != (self.n_atoms, 3):
            raise ValueError(f"positions have shape {tuple(x.shape)}; expected (batch, {self.n_atoms}, 3)")
        return self.chart.on_branch(self._measure(x)), x.new_zeros(len(x))

    def of_frames(self, positions: np.ndarray, *, tolerance: float = 0.05) -> tuple[Vectors, Mask]:
        """Internals (frames, D), in double precision, of frames (frames, atoms, 3) [nm], and which are on the chart.

        Frames off the chart belong to another isomer (a cis peptide bond, say); a share of up to `tolerance` is
        reported in a warning and left to the caller to drop.

        Raises:
            ValueError: more than that, with the reasons and counts.
        """
        parts = [self.inverse(torch.tensor(part, dtype=torch.float64))[0] for part in _split(positions, 8192)]
        q = torch.cat(parts) if parts else torch.empty(0, self.dim, dtype=torch.float64)
        inside = self.chart(q)
        if (n_off := int((~inside).sum())) > 0:
            why = self.chart.describe(q)
            text = f"{n_off} of {len(q)} frames are another isomer than the reference structure ({why})"
            if n_off > tolerance * len(q):
                raise ValueError(
                    f"{text}; give a molecule of the same isomer as the frames, or change kinds in the z-matrix"
                )
            warnings.warn(f"{text}; they are left out", stacklevel=2)
        return q, inside

    def _measure(self, x: Tensor) -> Tensor:
        x = x.permute(2, 1, 0).contiguous()
        step = x[:, self.bond_pairs[:, 1]] - x[:, self.bond_pairs[:, 0]]  # from each atom to the one it hangs on
        lever = x[:, self.angle_triples[:, 2]] - x[:, self.angle_triples[:, 1]]  # and on to the next
        length2 = dot(step, step)[self.free_bonds]
        flat_r = length2 * length2.sqrt() / 3.0  # r**3/3 and -cos(theta) keep the volume element flat
        flat_angle = cos_angle(torch.cat((-step[:, :1], step[:, 2:]), 1), lever)
        third, fourth = self.torsion_quartets.T[2:]
        angle = torsion(step[:, 2:], lever[:, 1:], x[:, fourth] - x[:, third])
        angle = wrap(torch.where(self.follows, angle - angle[self.leaders], angle))
        return torch.cat((flat_r, flat_angle, angle)).T.contiguous()

    def forward(self, q: Vectors) -> tuple[Positions, Scalars]:
        """Internals (batch, D) to positions (batch, atoms, 3) [nm]; log-determinant zero.

        Rows off the chart have no positions that count: NaN, or a wrong isomer. `chart(q)` tells them.

        Raises:
            ValueError: the number of columns is not D.
        """
        if q.ndim != 2 or q.shape[1] != self.dim:
            raise ValueError(f"internals have shape {tuple(q.shape)}; expected (batch, {self.dim})")
        flat_r, along, angle = q.T.contiguous().split((self.n_bonds, self.n_angles, len(self.torsion_quartets)))
        r = self.lengths.to(q)[:, None].expand(-1, len(q)).index_copy(0, self.free_bonds, (3.0 * flat_r) ** (1 / 3))
        angle = torch.where(self.follows, angle + angle[self.leaders], angle)
        across = (1.0 - along * along).sqrt()
        zero = torch.zeros_like(r[0])
        second = torch.stack((r[0], zero, zero))
        third = torch.stack((r[0] + r[1] * along[0], r[1] * across[0], zero))
        x = torch.stack((torch.zeros_like(second), second, third), 1)
        reach = r[2:] * across[1:]
        local = torch.stack((r[2:] * along[1:], reach * angle.cos(), reach * angle.sin()))
        for suffix in self._levels:
            x = torch.cat((x, self._place(x, local, suffix)), 1)
        return x[:, self.atom_order].permute(2, 1, 0).contiguous(), q.new_zeros(len(q))

    def _place(self, x: Tensor, local: Tensor, suffix: str) -> Tensor:
        """Atoms of one level from the atoms placed so far and their positions in the frame of their references."""
        rows, frames, family = (getattr(self, f"{what}_{suffix}") for what in ("rows", "frames", "family"))
        bond, angle, torsion_ = (x[:, index] for index in frames.T)
        e1 = unit(bond - angle)
        normal = unit(cross(e1, torsion_ - angle))
        e2 = cross(normal, e1)
        a, b, c = local[:, rows]
        return bond[:, family] + a * e1[:, family] + b * e2[:, family] + c * normal[:, family]

    def moved_onto(self, x: Positions, onto: Positions) -> Positions:
        """Positions (batch, atoms, 3) as `forward` gives them, with the root atoms where those of `onto` are.

        The first root atom coincides, the second is in the same direction, the third in the same half plane: the six
        coordinates that flat internals leave out. Changing internals at fixed values of these has a unit Jacobian.
        """
        a, b, c = (onto[:, atom].to(x) for atom in self.zmatrix.root)
        e1 = torch.nn.functional.normalize(b - a, dim=1)
        e3 = torch.nn.functional.normalize(torch.linalg.cross(e1, c - b), dim=1)
        axes = torch.stack((e1, torch.linalg.cross(e3, e1), e3), 1)
        return a[:, None] + x @ axes

    def log_constraint_factor(self, x: Positions, masses: Tensor | None = None) -> Scalars:
        """ln det Zc / 2 of positions (batch, atoms, 3), which rigid bonds add to ln of the target; zero without them.

        Zc_ij = sum_k (1/m_k) grad_k sigma_i . grad_k sigma_j over the constraints sigma (Fixman's factor), with the
        molecule's own masses, or others (atoms,) [amu].
        """
        n = len(self.rigid_pairs)
        if n == 0:
            return x.new_zeros(len(x))
        one, two = self.rigid_pairs.T
        direction = torch.nn.functional.normalize(x[:, one] - x[:, two], dim=-1)
        gradient = x.new_zeros(len(x), n, self.n_atoms, 3)
        rigid = torch.arange(n, device=x.device)
        scale = (self.masses if masses is None else masses).to(x).rsqrt()
        gradient[:, rigid, one] = direction * scale[one, None]
        gradient[:, rigid, two] = -direction * scale[two, None]
        gradient = gradient.flatten(2)
        return 0.5 * torch.linalg.slogdet(gradient @ gradient.mT)[1]


def _constrained_lengths(molecule: Molecule, zmatrix: ZMatrix, bonds: list[tuple[int, int]]) -> list[float | None]:
    """Length [nm] of every z-matrix bond that is rigid, None where it is free."""
    rigid = {tuple(sorted(pair)): length for pair, length in molecule.constraints.items()}
    tree = {tuple(sorted(bond)) for bond in bonds}
    strange = [pair for pair in rigid if pair not in tree]
    if strange:
        names = ", ".join("-".join(zmatrix.labels[a] for a in pair) for pair in strange[:5])
        raise ValueError(
            f"{len(strange)} constraints are not single bonds of the z-matrix ({names}); rigid water, constrained "
            "angles and ring closures are not supported: build the System with constraints=None or HBonds"
        )
    return [rigid.get(tuple(sorted(bond))) for bond in bonds]


def _split(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (array[start : start + size] for start in range(0, len(array), size))
