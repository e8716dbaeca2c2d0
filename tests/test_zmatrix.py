"""The tree of internal coordinates: complete, in order, readable, overridable, and strict about what cannot work."""

import dataclasses

import numpy as np
import openmm
import pytest
from molecules import MASSES, MOLECULES, acetonitrile, butane, handmade, peptide
from openmm import app

from openmm_tsf import torsions
from openmm_tsf.systems import Molecule
from openmm_tsf.zmatrix import KINDS, ZMatrix, ZRow, build_zmatrix


def leaders(z: ZMatrix) -> dict[str, str]:
    """Kind of the torsion of every atom that leads a family, by its label."""
    return {z.labels[row.atom]: row.kind for row, first in zip(z.rows, z.leaders, strict=True) if z.rows[first] is row}


def soft_quartets(z: ZMatrix) -> set[tuple[int, ...]]:
    """Atoms of every torsion on the circle, in both directions."""
    kinds = leaders(z)
    soft = [(r.atom, *r.references) for r in z.rows if kinds.get(z.labels[r.atom]) == "soft"]
    return {*soft, *(quartet[::-1] for quartet in soft)}


@pytest.mark.parametrize("name", MOLECULES)
def test_every_atom_is_placed_once_after_its_references(name):
    molecule = MOLECULES[name]()
    z = build_zmatrix(molecule)
    assert z.n_atoms == molecule.n_atoms
    placed = list(z.root)
    for row in z.rows:
        assert set(row.references) <= set(placed)
        placed.append(row.atom)
    assert sorted(placed) == list(range(molecule.n_atoms))


@pytest.mark.parametrize("name", MOLECULES)
def test_distances_are_bonds(name):
    molecule = MOLECULES[name]()
    z = build_zmatrix(molecule)
    pairs = [(z.root[1], z.root[0]), (z.root[2], z.root[1]), *((r.atom, r.bond) for r in z.rows)]
    assert {tuple(sorted(pair)) for pair in pairs} <= set(molecule.bonds)


@pytest.mark.parametrize("name", MOLECULES)
def test_levels_can_be_placed_at_once(name):
    z = build_zmatrix(MOLECULES[name]())
    placed = set(z.root)
    for level in z.levels:
        assert all(placed.issuperset(z.rows[i].references) for i in level)
        placed.update(z.rows[i].atom for i in level)
    assert sorted(i for level in z.levels for i in level) == list(range(len(z.rows)))


def test_alanine_dipeptide_has_the_torsions_that_chemists_expect(ala2):
    z = build_zmatrix(ala2)
    assert [z.labels[a] for a in z.root] == ["ACE1-C", "ALA2-N", "ALA2-CA"]
    kinds = leaders(z)
    assert {atom for atom, kind in kinds.items() if kind == "planar"} == {"ACE1-CH3", "NME3-C"}
    assert sum(kind == "soft" for kind in kinds.values()) == 5
    phi, psi = torsions.backbone(ala2)
    assert {phi, psi} <= soft_quartets(z)
    rest = [q for q in soft_quartets(z) if q not in {phi, psi, phi[::-1], psi[::-1]}]
    assert len(rest) == 2 * 3  # methyls, in both directions
    assert kinds["ALA2-H"] == "stiff"  # the improper torsion of the amide hydrogen at the root


ENDS = {
    "automatic": None,
    "from the N end": ("ACE1-CH3", "ACE1-C", "ALA2-N"),
    "from the C end": ("NME5-C", "NME5-N", "ALA4-C"),
}


@pytest.mark.parametrize("root", ENDS.values(), ids=ENDS)
def test_backbone_torsions_are_coordinates_whatever_the_direction_of_growth(root):
    molecule = peptide("ALA", "GLY", "ALA")
    z = build_zmatrix(molecule, root=root and [molecule.atom_labels.index(label) for label in root])
    wanted = {quartet for residue in range(3) for quartet in torsions.backbone(molecule, residue)}
    assert len(wanted) == 6
    assert wanted <= soft_quartets(z)
    assert sum(kind == "planar" for kind in leaders(z).values()) == 4


@pytest.mark.parametrize("omega", [180.0, 0.0])
def test_the_ring_of_proline_is_stiff_and_its_peptide_bond_planar(omega):
    molecule = peptide("PRO", omega=omega)
    index = molecule.atom_labels.index
    quartet = [index(label) for label in ("ACE1-CH3", "ACE1-C", "PRO2-N", "PRO2-CA")]
    assert abs(np.cos(torsions.dihedrals(molecule.positions[None], quartet)[0]) - np.cos(np.deg2rad(omega))) < 0.1
    z = build_zmatrix(molecule)
    ring = {f"PRO2-{name}" for name in ("N", "CA", "CB", "CG", "CD")}
    in_ring = [row for row in z.rows if {z.labels[row.bond], z.labels[row.angle]} <= ring]
    assert len(in_ring) > 5 and {row.kind for row in in_ring} == {"stiff"}
    assert leaders(z)["ACE1-CH3"] == "planar"
    phi = tuple(index(label) for label in ("ACE1-C", "PRO2-N", "PRO2-CA", "PRO2-C"))
    psi = tuple(index(label) for label in ("PRO2-N", "PRO2-CA", "PRO2-C", "NME3-N"))
    assert psi in soft_quartets(z) and phi not in soft_quartets(z)


def test_double_bonds_are_planar_and_ethers_soft():
    rows = [
        ("C1",),
        ("C2", "C1", 0.134),
        ("C3", "C2", "C1", 0.150, 124.0),
        ("C4", "C1", "C2", "C3", 0.150, 124.0, 180.0),
    ]
    rows += [("HC1a", "C1", "C2", "C3", 0.108, 119.0, 0.0), ("HC2a", "C2", "C1", "C4", 0.108, 119.0, 0.0)]
    for carbon, one, other in (("C3", "C2", "C1"), ("C4", "C1", "C2")):
        rows += [
            (f"H{carbon}{n}", carbon, one, other, 0.109, 110.0, phi) for n, phi in (("a", 0), ("b", 120), ("c", 240))
        ]
    butene = build_zmatrix(handmade("2-butene", rows))
    assert sum(kind == "planar" for kind in leaders(butene).values()) == 1
    assert sum(kind == "soft" for kind in leaders(butene).values()) == 2

    ether = [("C1",), ("O2", "C1", 0.143), ("C3", "O2", "C1", 0.143, 112.0)]
    for carbon, other in (("C1", "C3"), ("C3", "C1")):
        ether += [
            (f"H{carbon}{n}", carbon, "O2", other, 0.109, 110.0, p) for n, p in (("a", 60), ("b", 180), ("c", 300))
        ]
    assert sorted(leaders(build_zmatrix(handmade("ether", ether))).values()) == ["soft", "soft"]


def test_it_is_readable(ala2):
    z = build_zmatrix(ala2)
    text = str(z)
    assert all(label in text for label in z.labels)
    assert len(text.splitlines()) == 2 + len(z.rows)
    assert "difference to ALA2-HB1" in text


def test_it_is_frozen(ala2):
    z = build_zmatrix(ala2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        z.root = (0, 1, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        z.rows[0].kind = "soft"


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_are_taken_as_they_are():
    molecule = butane()
    labels = molecule.atom_labels.index
    h, c4, c3, c2 = (labels(f"MOL1-{name}") for name in ("HC4a", "C4", "C3", "C2"))
    other = labels("MOL1-HC3a")
    z = build_zmatrix(molecule, references={h: (c4, c3, other)}, kinds={h: "stiff"}, root=(c4, c3, c2))
    row = next(row for row in z.rows if row.atom == h)
    assert row == ZRow(h, c4, c3, other, "stiff")
    assert z.root == (c4, c3, c2)
    assert "stiff" not in {r.kind for r in build_zmatrix(molecule).rows if r.atom == h}


def test_a_circle_is_refused_by_name(ala2):
    labels = ala2.atom_labels.index
    h1, h2, c, n = (labels(a) for a in ("ACE1-H1", "ACE1-H2", "ACE1-CH3", "ACE1-C"))
    with pytest.raises(ValueError, match=r"circle.*ACE1-H1, ACE1-H2|circle.*ACE1-H2, ACE1-H1"):
        build_zmatrix(ala2, references={h1: (c, n, h2), h2: (c, n, h1)})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"references": {10: (10, 6, 4)}}, "four different atoms|circle"),
        ({"references": {10: (8, 8, 4)}}, "four different atoms"),
        ({"references": {10: (8, 6, 99)}}, "99|four different atoms|unplaced atoms"),
        ({"references": {10: (8, 6)}}, "three"),
        ({"references": {99: (8, 6, 4)}}, "99"),
        ({"references": {4: (8, 6, 10)}}, "root"),
        ({"kinds": {10: "floppy"}}, "floppy.*" + ", ".join(KINDS)),
        ({"kinds": {99: "soft"}}, "99"),
        ({"kinds": {4: "soft"}}, "root"),
        ({"root": (4, 4, 6)}, "three different atoms"),
        ({"root": (4, 6, 99)}, "99"),
        ({"root": (4, 6)}, "three"),
        ({"kinds": {10: "soft"}}, "ALA2-CB.*ALA2-C\\b"),
    ],
    ids=str,
)
def test_overrides_that_make_no_sense_are_refused(ala2, override, message):
    assert ala2.atom_labels[4] == "ACE1-C" and build_zmatrix(ala2).root[0] == 4
    with pytest.raises(ValueError, match=message):
        build_zmatrix(ala2, **override)


def test_a_validated_z_matrix_cannot_be_built_wrong():
    labels = tuple("abcd")
    with pytest.raises(ValueError, match="missing: d"):
        ZMatrix((0, 1, 2), (), labels)
    with pytest.raises(ValueError, match="placed twice"):
        ZMatrix((0, 1, 2), (ZRow(3, 0, 1, 2, "soft"), ZRow(3, 0, 1, 2, "soft")), labels)
    with pytest.raises(ValueError, match="refers to e before"):
        ZMatrix((0, 1, 2), (ZRow(3, 4, 1, 2, "soft"), ZRow(4, 0, 1, 2, "soft")), tuple("abcde"))


# --- molecules without such coordinates -------------------------------------------------------------------------------


def test_a_linear_angle_is_refused_by_name():
    with pytest.raises(ValueError, match=r"MOL1-C1-MOL1-C2-MOL1-N3 is 179 degrees"):
        build_zmatrix(acetonitrile())


def test_a_linear_triatomic_is_refused_by_name():
    molecule = handmade("carbon dioxide", [("C1",), ("O2", "C1", 0.116), ("O3", "C1", "O2", 0.116, 179.9)])
    with pytest.raises(ValueError, match=r"angle MOL1-O2-MOL1-C1-MOL1-O3 is 180 degrees"):
        build_zmatrix(molecule)


def test_an_angle_that_is_merely_wide_is_not_refused():
    molecule = handmade("wide", [("C1",), ("O2", "C1", 0.116), ("O3", "C1", "O2", 0.116, 150.0)])
    assert build_zmatrix(molecule).root == (1, 0, 2)


def test_two_atoms_are_too_few():
    system, topology = openmm.System(), app.Topology()
    residue = topology.addResidue("H2", topology.addChain())
    atoms = [topology.addAtom(name, app.element.hydrogen, residue) for name in ("H1", "H2")]
    topology.addBond(*atoms)
    for _ in atoms:
        system.addParticle(MASSES["H"])
    with pytest.raises(ValueError, match=r"at least 3 atoms, hydrogen has 2"):
        build_zmatrix(Molecule(system, topology, np.array([[0.0, 0.0, 0.0], [0.074, 0.0, 0.0]]), "hydrogen"))
