"""Where flat internal coordinates are one to one: branches, planar bonds, and the handedness of centres.

The target is the Boltzmann distribution of the reference's isomer. A draw off the chart has weight zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import networkx as nx
import torch
from jaxtyping import Float
from torch import Tensor, nn

from .geometry import wrap
from .typing import Mask, Vectors
from .zmatrix import ZMatrix


class Chart(nn.Module):
    """The region of flat internals q (batch, D) that belongs to the reference's isomer.

    Inside means: r > 0, |cos theta| < 1, stiff torsions within pi of their reference, planar ones within 90 degrees of
    cis or trans (whichever the reference is), and every four-coordinated centre as handed as in the reference,
    labelled hydrogens included. Not watched are bridgeheads of which the z-matrix places a single neighbour, because
    ring closures hold the others; inverting one breaks bonds.

    Args:
        reference: (D,) internals of the reference positions.
        n_bonds, n_angles: number of bond and angle columns; torsions follow.
        bonds: all bonds of the molecule, to find the four-coordinated centres.
    """

    def __init__(
        self, reference: Tensor, n_bonds: int, n_angles: int, zmatrix: ZMatrix, bonds: Sequence[tuple[int, int]]
    ) -> None:
        super().__init__()
        self.n_bonds, self.first_torsion = n_bonds, n_bonds + n_angles
        self.labels, self.rows = zmatrix.labels, zmatrix.rows
        angles = reference[self.first_torsion :].clone()
        half_width = torch.full_like(angles, math.pi)
        for i, (row, leader) in enumerate(zip(zmatrix.rows, zmatrix.leaders, strict=True)):
            if leader == i and row.kind == "soft":
                half_width[i] = math.inf
            elif leader == i and row.kind == "planar":
                half_width[i] = math.pi / 2
                angles[i] = 0.0 if abs(float(angles[i])) < math.pi / 2 else math.pi
        self.register_buffer("centre", angles, persistent=False)
        self.register_buffer("half_width", half_width, persistent=False)
        self.centres, first, second, offset = _handed_centres(zmatrix, bonds)
        self.register_buffer("first", first.to(reference), persistent=False)
        self.register_buffer("second", second.to(reference), persistent=False)
        self.register_buffer("offset", offset.to(reference), persistent=False)
        hand = torch.sign(self._handedness(reference[None, self.first_torsion :]))[0]
        self.register_buffer("hand", hand, persistent=False)

    def on_branch(self, q: Vectors) -> Vectors:
        """The same internals with every stiff torsion within pi of its centre."""
        head, angle = q[:, : self.first_torsion], q[:, self.first_torsion :]
        centre = self.centre.to(q)
        moved = torch.where(self.half_width.isinf(), angle, wrap(angle - centre) + centre)
        return torch.cat((head, moved), 1)

    def forward(self, q: Vectors) -> Mask:
        """(batch,) True where q is inside."""
        return torch.stack([test.all(1) for test in self._tests(q)]).all(0)

    def excess(self, q: Vectors) -> Float[Tensor, "batch tests"]:
        """By how much torsions are beyond their branch [rad], and centres of the wrong hand [a sum of sines]: zero on
        the chart, (batch, n) of both, differentiable. Bonds and angles are left to the caller."""
        angle = q[:, self.first_torsion :]
        beyond = (angle - self.centre.to(q)).abs() - self.half_width.to(q)
        return torch.cat((beyond, -self._handedness(angle) * self.hand.to(q)), 1).clamp_min(0.0)

    def _tests(self, q: Vectors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        angle = q[:, self.first_torsion :]
        return (
            q[:, : self.n_bonds] > 0,
            q[:, self.n_bonds : self.first_torsion].abs() < 1,
            (angle - self.centre.to(q)).abs() < self.half_width.to(q),
            self._handedness(angle) * self.hand.to(q) > 0,
        )

    def _handedness(self, angle: Tensor) -> Tensor:
        """Signed area of the triangle of three neighbours seen along the bond to the fourth: (batch, centres)."""
        t2, t3 = angle @ self.first.to(angle).T, angle @ self.second.to(angle).T + self.offset.to(angle)
        return t2.sin() + (t3 - t2).sin() - t3.sin()

    def describe(self, q: Vectors) -> str:
        """Why rows of q are off the chart, with counts, for error messages; empty when none is."""
        lengths, angles, branches, hands = self._tests(q)
        found = []
        for what, test in (("bond length below zero", lengths), ("angle beyond linear", angles)):
            if n := int((~test.all(1)).sum()):
                found.append(f"{what} in {n}")
        for row, test, width in zip(self.rows, branches.T, self.half_width.tolist(), strict=True):
            if n := int((~test).sum()):
                name = "-".join(self.labels[a] for a in (row.atom, *row.references))
                flip = "cis/trans isomer changed at" if width < math.pi else "off the branch of torsion"
                found.append(f"{flip} {name} in {n}")
        for centre, test in zip(self.centres, hands.T, strict=True):
            if n := int((~test).sum()):
                found.append(f"centre {self.labels[centre]} inverted in {n}")
        return "; ".join(found)


def _handed_centres(zmatrix: ZMatrix, bonds: Sequence[tuple[int, int]]) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Centres with four neighbours, and how to read the angular positions t2, t3 of two neighbours relative to a third.

    t2 = first @ torsions, t3 = second @ torsions + offset. Where a ring closure hides the third neighbour, t3 is put
    opposite to t2, which leaves the sign of sin t2.
    """
    graph, n = nx.Graph(bonds), len(zmatrix.rows)
    centres, first, second, offset = [], [], [], []
    for centre in (c for c in graph if graph.degree[c] == 4):
        members = [i for i, row in enumerate(zmatrix.rows) if row.bond == centre and graph.has_edge(row.atom, centre)]
        if len({zmatrix.rows[i].references for i in members}) > 1:
            names = ", ".join(zmatrix.labels[zmatrix.rows[i].atom] for i in members)
            raise ValueError(
                f"atoms {names} around {zmatrix.labels[centre]} must share their z-matrix references, or an inverted "
                "centre could not be told"
            )
        if not members:
            continue
        leader = torch.zeros(n, dtype=torch.float64)
        steps = [torch.eye(n, dtype=torch.float64)[i] for i in members[1:]]
        if graph.has_edge(centre, zmatrix.rows[members[0]].torsion):  # the root: that neighbour is at zero
            leader[members[0]] = 1.0
            steps = [leader, *(leader + step for step in steps)]
        if not steps:
            continue
        centres.append(centre)
        first.append(steps[0])
        second.append(steps[1] if len(steps) > 1 else steps[0])
        offset.append(0.0 if len(steps) > 1 else math.pi)
    stack = lambda rows: torch.stack(rows) if rows else torch.zeros(0, n, dtype=torch.float64)  # noqa: E731
    return centres, stack(first), stack(second), torch.tensor(offset, dtype=torch.float64)
