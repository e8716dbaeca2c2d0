"""Which atom is placed from which: the tree of internal coordinates of one molecule.

Three root atoms fix the frame. Every other atom has three references (bonded, angle, torsion). Atoms that share
their references form a family: the first, the leader, carries the torsion of the family, the others their difference to
it, so that one soft torsion turns a whole methyl group or peptide plane.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np

from .systems import Molecule

LINEAR = np.deg2rad(165.0)
"""Reference angles wider than this are refused: their torsion is not defined."""

KINDS = {
    "soft": "turns freely; lives on the circle",
    "planar": "partial double bond (a peptide bond, say); stays within 90 degrees of cis or trans",
    "stiff": "one branch of width 2 pi about its reference",
}


@dataclass(frozen=True)
class ZRow:
    """One placed atom: `atom` from `bond` (at a distance), `angle` and `torsion`; `kind` of its torsion (see KINDS)."""

    atom: int
    bond: int
    angle: int
    torsion: int
    kind: str

    @property
    def references(self) -> tuple[int, int, int]:
        return self.bond, self.angle, self.torsion


@dataclass(frozen=True)
class ZMatrix:
    """A validated, frozen z-matrix.

    Attributes:
        root: three atoms; the first two and the last two are bonded, or at least not in one line.
        rows: one for every other atom, references before the atoms that use them.
        labels: atom names, for people.
    """

    root: tuple[int, int, int]
    rows: tuple[ZRow, ...]
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_references(self)

    @property
    def n_atoms(self) -> int:
        return len(self.rows) + 3

    @property
    def leaders(self) -> tuple[int, ...]:
        """For every row, the row that leads its family (itself when it is the leader)."""
        first: dict[tuple[int, int, int], int] = {}
        return tuple(first.setdefault(row.references, i) for i, row in enumerate(self.rows))

    @property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Rows that can be placed at the same time, in order of depth."""
        depth = dict.fromkeys(self.root, 0)
        levels: dict[int, list[int]] = {}
        for i, row in enumerate(self.rows):
            depth[row.atom] = 1 + max(depth[a] for a in row.references)
            levels.setdefault(depth[row.atom], []).append(i)
        return tuple(tuple(levels[d]) for d in sorted(levels))

    def __str__(self) -> str:
        name = self.labels
        lines = ["root: " + " - ".join(name[a] for a in self.root)]
        lines += [f"{'atom':12}{'bond':12}{'angle':12}{'torsion':12}coordinate"]
        for row, leader in zip(self.rows, self.leaders, strict=True):
            follows = self.rows[leader] is not row
            what = f"difference to {name[self.rows[leader].atom]}" if follows else row.kind
            lines.append("".join(f"{name[a]:12}" for a in (row.atom, *row.references)) + what)
        return "\n".join(lines)


def _check_references(z: ZMatrix) -> None:
    """Raise ValueError unless every atom is placed once, from three different atoms placed before it."""
    n, placed = len(z.labels), set(z.root)
    if len(placed) != 3 or not all(0 <= a < n for a in placed):
        raise ValueError(f"the z-matrix root needs three different atoms between 0 and {n - 1}, got {z.root}")
    for row in z.rows:
        used = {row.atom, *row.references}
        if len(used) != 4 or not all(0 <= a < n for a in used):
            raise ValueError(f"z-matrix row {row} needs four different atoms between 0 and {n - 1}")
        if row.kind not in KINDS:
            raise ValueError(
                f"z-matrix row of {z.labels[row.atom]} has kind {row.kind!r}; use one of {', '.join(KINDS)}"
            )
        if row.atom in placed:
            raise ValueError(f"atom {z.labels[row.atom]} is placed twice in the z-matrix")
        late = [z.labels[a] for a in row.references if a not in placed]
        if late:
            raise ValueError(f"z-matrix row of {z.labels[row.atom]} refers to {', '.join(late)} before it is placed")
        placed.add(row.atom)
    if len(placed) != n:
        missing = ", ".join(z.labels[a] for a in range(n) if a not in placed)
        raise ValueError(f"the z-matrix places {len(placed)} of {n} atoms; missing: {missing}")


def build_zmatrix(
    molecule: Molecule,
    *,
    root: Sequence[int] | None = None,
    references: Mapping[int, Sequence[int]] | None = None,
    kinds: Mapping[int, str] | None = None,
) -> ZMatrix:
    """The z-matrix of a molecule, from its bonds and its reference geometry.

    Args:
        molecule: a single molecule with at least three atoms.
        root: three atom indices to start from; by default the middle of the molecule (of the backbone, in a peptide).
        references: overrides, atom -> (bond, angle, torsion) atom indices.
        kinds: overrides of the kind of torsion, atom -> a key of KINDS.

    Raises:
        ValueError: fewer than three atoms, an override that refers in a circle or would have no effect, or a linear
            angle (named).
    """
    references, kinds = references or {}, kinds or {}
    graph = nx.Graph(molecule.bonds)
    graph.add_nodes_from(range(molecule.n_atoms))
    if molecule.n_atoms < 3:
        raise ValueError(f"internal coordinates need at least 3 atoms, {molecule.name} has {molecule.n_atoms}")
    root = tuple(int(a) for a in root) if root is not None else _choose_root(molecule, graph)
    _check_overrides(molecule.atom_labels, root, references, kinds)
    wanted = _tree_references(molecule, graph, root)
    for atom, refs in references.items():
        wanted[int(atom)] = tuple(int(a) for a in refs)
    order = _placement_order(wanted, root, molecule.atom_labels)
    rows = tuple(
        ZRow(atom, *wanted[atom], kind=kinds.get(atom) or _torsion_kind(molecule, graph, wanted[atom]))
        for atom in order
    )
    z = ZMatrix(root, rows, tuple(molecule.atom_labels))
    for row, leader in zip(z.rows, z.leaders, strict=True):
        if row.atom in kinds and z.rows[leader] is not row:
            first = z.labels[z.rows[leader].atom]
            raise ValueError(
                f"the torsion of {z.labels[row.atom]} is a difference to {first}; give the kind of {first}"
            )
    _refuse_linear(z, molecule.positions)
    return z


def _check_overrides(
    labels: Sequence[str], root: Sequence[int], references: Mapping[int, Sequence[int]], kinds: Mapping[int, str]
) -> None:
    """Raise ValueError for overrides of atoms that are not there or have no references."""
    n = len(labels)
    if len(root) != 3 or len(set(root)) != 3 or not all(0 <= a < n for a in root):
        raise ValueError(f"the z-matrix root needs three different atoms between 0 and {n - 1}, got {tuple(root)}")
    for what, overrides in (("references", references), ("kinds", kinds)):
        for atom in overrides:
            if not 0 <= atom < n:
                raise ValueError(f"{what} given for atom {atom}; atoms are 0 to {n - 1}")
            if atom in root:
                raise ValueError(f"{what} given for {labels[atom]}, a root atom, which has none; choose another root")
    for atom, refs in references.items():
        if len(refs) != 3:
            raise ValueError(f"references of {labels[atom]} must be three atoms, got {tuple(refs)}")


def _is_backbone(molecule: Molecule, atom: int) -> bool:
    return molecule.atom_labels[atom].split("-")[-1] in ("N", "CA", "C")


def _choose_root(molecule: Molecule, graph: nx.Graph) -> tuple[int, int, int]:
    """Three bonded atoms near the centre; C-N-CA of the middle residue where there is a backbone."""
    distance = nx.eccentricity(graph)

    def rank(atom: int) -> tuple:
        name = molecule.atom_labels[atom].split("-")[-1]
        backbone_n = name == "N" and {"C", "CA"} <= {molecule.atom_labels[b].split("-")[-1] for b in graph[atom]}
        heavy = sum(molecule.masses[b] > 3.5 for b in graph[atom])
        return not backbone_n, heavy < 2, graph.degree[atom] < 2, distance[atom], atom

    middle = min(graph, key=rank)
    if graph.degree[middle] < 2:
        raise ValueError(f"{molecule.name} has no atom with two bonds; internal coordinates need bonds in the topology")

    def side(atom: int) -> tuple:
        return not _is_backbone(molecule, atom), molecule.masses[atom] < 3.5, distance[atom], atom

    ends = sorted(sorted(graph[middle], key=side)[:2])
    return ends[0], middle, ends[1]


def _tree_references(molecule: Molecule, graph: nx.Graph, root: tuple[int, int, int]) -> dict[int, tuple[int, ...]]:
    """References of every atom outside the root along a breadth-first spanning tree of the bonds."""
    a, b, c = root
    parent, queue = {a: b, b: a, c: b}, [b, a, c]
    for atom in queue:
        for neighbour in sorted(graph[atom]):
            if neighbour not in parent:
                parent[neighbour] = atom
                queue.append(neighbour)
    size = dict.fromkeys(queue, 1)
    for atom in reversed(queue[3:]):
        size[parent[atom]] += size[atom]

    def up(atom: int) -> tuple[int, int, int]:
        j = parent[atom]
        return {a: (a, b, c), b: (b, a, c)}.get(j, (j, parent[j], parent[parent[j]]))

    # the leader of a family comes first: the backbone, else the heaviest branch
    first = sorted(queue[3:], key=lambda i: (not _is_backbone(molecule, i), -size[i], i))
    return {atom: up(atom) for atom in first}


def _placement_order(
    references: Mapping[int, tuple[int, ...]], root: tuple[int, int, int], labels: Sequence[str]
) -> list[int]:
    """Atoms so that references come first; the order given breaks ties.

    Raises:
        ValueError: the references run in a circle (the atoms are named).
    """
    order: list[int] = []
    placed, left = set(root), [a for a in references if a not in root]
    while left:
        ready = [a for a in left if placed.issuperset(references[a])]
        if not ready:
            names = ", ".join(labels[a] for a in left if 0 <= a < len(labels))
            raise ValueError(f"z-matrix references run in a circle or to unplaced atoms: {names}")
        order += ready
        placed.update(ready)
        left = [a for a in left if a not in placed]
    return order


def _torsion_kind(molecule: Molecule, graph: nx.Graph, references: Sequence[int]) -> str:
    """Kind of the torsion about the bond between the first two references."""
    j, k, third = references
    if not graph.has_edge(j, k) or graph.has_edge(j, third):
        return "stiff"  # an improper torsion, measured about its own centre
    bridges = graph.copy()
    bridges.remove_edge(j, k)
    if nx.has_path(bridges, j, k):
        return "stiff"  # in a ring
    if _is_planar(molecule, graph, j) and _is_planar(molecule, graph, k):
        return "planar"
    return "soft"


def _is_planar(molecule: Molecule, graph: nx.Graph, atom: int) -> bool:
    """Three neighbours in one plane, or a bent two-coordinated nitrogen or carbon."""
    around = [molecule.positions[b] - molecule.positions[atom] for b in graph[atom]]
    if len(around) == 3:
        u = [v / np.linalg.norm(v) for v in around]
        total = sum(np.arccos(np.clip(u[i] @ u[j], -1, 1)) for i, j in ((0, 1), (1, 2), (2, 0)))
        return bool(total > np.deg2rad(345.0))
    return len(around) == 2 and bool(molecule.masses[atom] < 15.0)


def _refuse_linear(z: ZMatrix, positions: np.ndarray) -> None:
    chains = {z.root} | {(r.atom, r.bond, r.angle) for r in z.rows} | {r.references for r in z.rows}
    for i, j, k in sorted(chains):
        u, v = positions[i] - positions[j], positions[k] - positions[j]
        angle = np.arccos(np.clip(u @ v / (np.linalg.norm(u) * np.linalg.norm(v)), -1, 1))
        if angle > LINEAR:
            names = "-".join(z.labels[a] for a in (i, j, k))
            raise ValueError(
                f"angle {names} is {np.rad2deg(angle):.0f} degrees, too close to linear for internal coordinates; "
                "give other references for that atom"
            )
