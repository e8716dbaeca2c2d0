"""Flat internal coordinates and their chart: one to one, of constant volume, and of one isomer."""

import math

import laws
import mdtraj
import numpy as np
import openmm
import pytest
import torch
from molecules import (
    MOLECULES,
    butane,
    chain4,
    cyclopropane,
    frames_of,
    internals_of,
    mirrored,
    peptide,
    random_internals,
    trimer,
    with_system,
)

from openmm_tsf import torsions
from openmm_tsf.geometry import wrap
from openmm_tsf.internals import FlatInternals
from openmm_tsf.systems import Molecule, alanine_dipeptide
from openmm_tsf.zmatrix import build_zmatrix

FREE = [name for name in MOLECULES if "rigid" not in name]
WITH_FRAMES = ("ala2", "proline", "cis proline", "three residues")


def positions_of(internals: FlatInternals):
    return lambda q: internals.forward(q)[0]


def circular(internals: FlatInternals) -> torch.Tensor:
    """Every torsion column; stiff ones may come back a turn away from where a test put them."""
    return torch.arange(internals.dim) >= internals.dim - len(internals.zmatrix.rows)


def in_root_frame(x: np.ndarray, root: tuple[int, int, int]) -> np.ndarray:
    """Frames moved rigidly: first root atom at the origin, second on +x, third in the upper half of the x-y plane."""
    a, b, c = (x[:, i] for i in root)
    e1 = (b - a) / np.linalg.norm(b - a, axis=-1, keepdims=True)
    e2 = (c - a) - ((c - a) * e1).sum(-1, keepdims=True) * e1
    e2 /= np.linalg.norm(e2, axis=-1, keepdims=True)
    axes = np.stack((e1, e2, np.cross(e1, e2)), axis=1)
    return np.einsum("nij,naj->nai", axes, x - a[:, None])


def moved(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Every frame turned and shifted at random; no reflections."""
    g = torch.Generator().manual_seed(seed)
    turn, upper = torch.linalg.qr(torch.randn(len(x), 3, 3, generator=g))
    turn = turn * torch.sign(torch.diagonal(upper, dim1=1, dim2=2))[:, None]
    turn = turn * torch.sign(torch.linalg.det(turn))[:, None, None]
    return x @ turn.mT.to(x) + torch.randn(len(x), 1, 3, generator=g).to(x)


# --- one to one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MOLECULES)
def test_internals_and_positions_are_one_to_one(name, generator):
    internals = internals_of(name)
    q = random_internals(internals, 200, generator)
    x, log_det = internals.forward(q)
    back, log_det_back = internals.inverse(moved(x, 7))
    assert laws.difference(back, q, circular(internals)) < 1e-9
    again = internals.forward(back)[0]
    assert float((again - x).abs().max()) < 1e-10
    assert torch.equal(log_det, torch.zeros(len(q))) and torch.equal(log_det_back, torch.zeros(len(q)))


@pytest.mark.parametrize("name", MOLECULES)
def test_rows_do_not_mix(name, generator):
    internals = internals_of(name)
    q = random_internals(internals, 8, generator)
    laws.independent(positions_of(internals), q)
    laws.independent(lambda x: internals.inverse(x)[0], positions_of(internals)(q))
    poisoned = q.clone()
    poisoned[0] = math.nan
    assert internals.chart(poisoned).tolist() == [False, *[True] * (len(q) - 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", WITH_FRAMES)
def test_frames_of_dynamics_make_the_round_trip(name, dtype):
    internals = internals_of(name)
    x = torch.tensor(frames_of(name, 300)).to(dtype)
    q, _ = internals.inverse(x)
    back = internals.forward(q)[0]
    assert q.dtype == back.dtype == dtype
    error = np.abs(back.double().numpy() - in_root_frame(x.double().numpy(), internals.zmatrix.root)).max()
    assert error < {torch.float64: 1e-10, torch.float32: 1e-5}[dtype]  # nm


def test_the_number_of_coordinates_is_right():
    assert internals_of("ala2").dim == 60
    assert internals_of("ala2 rigid").dim == 48
    assert internals_of("trimer").dim == 3
    assert internals_of("rigid trimer").dim == 1
    assert internals_of("proline").dim == 3 * 26 - 6


def test_columns_are_what_their_names_say(generator):
    internals = internals_of("ala2")
    molecule = MOLECULES["ala2"]()
    x = internals.forward(random_internals(internals, 50, generator))[0]
    trajectory = mdtraj.Trajectory(x.numpy(), molecule.mdtraj_topology)
    columns = internals.inverse(x)[0]
    assert len(internals.names) == internals.dim == len(set(internals.names))
    follows = dict(zip(internals.zmatrix.rows, internals.zmatrix.leaders, strict=True))
    for i, name in enumerate(internals.names):
        kind, atoms = name.rstrip(")").split("(")
        index = [molecule.atom_labels.index(atom) for atom in atoms.split()]
        if kind == "r":
            expected = mdtraj.compute_distances(trajectory, [index])[:, 0] ** 3 / 3
        elif kind == "theta":
            expected = -np.cos(mdtraj.compute_angles(trajectory, [index])[:, 0])
        else:
            expected = mdtraj.compute_dihedrals(trajectory, [index])[:, 0]
            row = next(row for row in follows if row.atom == index[0])
            leader = internals.zmatrix.rows[follows[row]]
            if leader is not row:
                first = [leader.atom, *leader.references]
                expected = expected - mdtraj.compute_dihedrals(trajectory, [first])[:, 0]
        found = columns[:, i] - torch.tensor(expected)
        assert float((wrap(found) if kind == "phi" else found).abs().max()) < 1e-3, name


@pytest.mark.parametrize(("name", "residues"), [("ala2", 1), ("three residues", 3)])
def test_phi_and_psi_are_columns_and_equal_those_of_mdtraj(name, residues):
    internals, molecule, x = internals_of(name), MOLECULES[name](), frames_of(name, 300)
    trajectory = mdtraj.Trajectory(x, molecule.mdtraj_topology)
    q = internals.inverse(torch.tensor(x))[0]
    first = internals.dim - len(internals.zmatrix.rows)
    for compute, which in ((mdtraj.compute_phi, 0), (mdtraj.compute_psi, 1)):
        quartets, values = compute(trajectory)
        for residue in range(residues):
            wanted = torsions.backbone(molecule, residue)[which]
            rows = [(row.atom, *row.references) for row in internals.zmatrix.rows]
            column = first + next(i for i, row in enumerate(rows) if row in (wanted, wanted[::-1]))
            theirs = values[:, quartets.tolist().index(list(wanted))]
            assert internals.circular[column]
            assert float(wrap(q[:, column] - torch.tensor(theirs)).abs().max()) < 1e-3  # mdtraj's single precision


# --- constant volume --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FREE)
def test_the_volume_element_is_one(name, generator):
    internals = internals_of(name)
    q = random_internals(internals, 12, generator)
    log_volume = laws.log_volume_element(positions_of(internals), q)
    assert float(log_volume.abs().max()) < 1e-9


def test_plain_distances_and_angles_break_that(generator):
    internals = internals_of("ethanol")
    q = random_internals(internals, 12, generator)
    n, m = internals.n_bonds, internals.n_bonds + internals.n_angles
    plain = torch.cat(((3 * q[:, :n]) ** (1 / 3), torch.acos(-q[:, n:m]), q[:, m:]), 1)

    def to_positions(plain: torch.Tensor) -> torch.Tensor:
        flat = torch.cat((plain[:, :n] ** 3 / 3, -torch.cos(plain[:, n:m]), plain[:, m:]), 1)
        return internals.forward(flat)[0]

    log_volume = laws.log_volume_element(to_positions, plain)
    assert float(log_volume.max() - log_volume.min()) > 0.1
    expected = 2 * plain[:, :n].log().sum(1) + plain[:, n:m].sin().log().sum(1)
    assert float((log_volume - expected).abs().max()) < 1e-9


# --- constraints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in MOLECULES if "rigid" in name])
def test_rigid_bonds_keep_their_length(name, generator):
    internals, molecule = internals_of(name), MOLECULES[name]()
    x = internals.forward(random_internals(internals, 50, generator))[0]
    for (i, j), length in molecule.constraints.items():
        assert float(((x[:, i] - x[:, j]).norm(dim=1) - length).abs().max()) < 1e-14


@pytest.mark.parametrize("name", [name for name in MOLECULES if "rigid" in name])
def test_the_constraint_factor_is_the_one_of_fixman(name, generator):
    """With masses, sqrt(det J^T M J) over free internals and rigid motions is sqrt(det Zc) up to a constant."""
    internals, molecule = internals_of(name), MOLECULES[name]()
    q = random_internals(internals, 40, generator)
    jacobian = laws.with_rigid_motions(positions_of(internals), q)
    weighted = jacobian * torch.tensor(np.repeat(molecule.masses, 3)).sqrt()[:, None]
    expected = 0.5 * torch.linalg.slogdet(weighted.mT @ weighted)[1]
    x = internals.forward(q)[0]
    found = internals.log_constraint_factor(moved(x, 3))
    assert float(found.max() - found.min()) > 1e-3  # it varies, so that there is something to compare
    delta = found - expected
    assert float(delta.max() - delta.min()) < 1e-9


def test_without_constraints_there_is_no_factor():
    x = torch.tensor(frames_of("ala2", 300)[:5])
    assert torch.equal(internals_of("ala2").log_constraint_factor(x), torch.zeros(5))


def mean_square_cosine(factor: bool) -> float:
    """<cos^2> of the free trimer with two rigid bonds, by quadrature over its one flat coordinate."""
    internals = internals_of("rigid trimer")
    nodes, weights = (torch.tensor(a) for a in np.polynomial.legendre.leggauss(200))
    x = internals.forward(nodes[:, None])[0]
    weights = weights * internals.log_constraint_factor(x).exp() if factor else weights
    return float((weights * nodes**2).sum() / weights.sum())


def test_the_free_trimer_needs_the_factor():
    exact = (math.pi / 3 - math.sqrt(3) / 4) / (math.pi / 3 + math.sqrt(3) / 2)  # of sqrt(4 - cos^2): 0.3210
    assert abs(mean_square_cosine(factor=True) - exact) < 1e-9
    assert abs(mean_square_cosine(factor=False) - 1 / 3) < 1e-9


def test_the_factor_of_the_trimer_in_closed_form():
    internals = internals_of("rigid trimer")
    cosine = torch.linspace(-0.99, 0.99, 9)
    factor = internals.log_constraint_factor(internals.forward(cosine[:, None])[0])
    assert float((factor - 0.5 * torch.log((4 - cosine**2) / trimer().masses[0] ** 2)).abs().max()) < 1e-12


def many_trimers(copies: int, n: int, seed: int) -> np.ndarray:
    """cos^2 (n, copies) of free trimers with rigid bonds in OpenMM's constrained Langevin dynamics at 300 K."""
    system, x = openmm.System(), []
    for i in range(copies):
        for _ in range(3):
            system.addParticle(12.011)
        system.addConstraint(3 * i, 3 * i + 1, 0.15)
        system.addConstraint(3 * i + 1, 3 * i + 2, 0.15)
        x.append(trimer().positions)
    integrator = openmm.LangevinMiddleIntegrator(300.0, 5.0, 0.004)
    integrator.setRandomNumberSeed(seed)
    integrator.setConstraintTolerance(1e-8)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(np.concatenate(x))
    context.setVelocitiesToTemperature(300.0, seed)
    integrator.step(1000)
    values = []
    for _ in range(n):
        integrator.step(50)
        x = np.array(context.getState(positions=True).getPositions(asNumpy=True)._value).reshape(copies, 3, 3)
        u, v = x[:, 0] - x[:, 1], x[:, 2] - x[:, 1]
        values.append((u * v).sum(-1) / np.linalg.norm(u, axis=-1) / np.linalg.norm(v, axis=-1))
    return np.array(values) ** 2


@pytest.mark.slow
def test_constrained_dynamics_of_openmm_agrees_with_the_factor():
    means = many_trimers(copies=500, n=300, seed=3).mean(0)
    mean, error = means.mean(), means.std(ddof=1) / math.sqrt(len(means))
    assert error < 0.0025
    assert abs(mean - mean_square_cosine(factor=True)) < 4 * error
    assert abs(mean - mean_square_cosine(factor=False)) > 4 * error


def add_constraint(molecule: Molecule, i: int, j: int) -> Molecule:
    length = float(np.linalg.norm(molecule.positions[i] - molecule.positions[j]))
    return with_system(molecule, lambda system: system.addConstraint(i, j, length))


@pytest.mark.parametrize(
    ("molecule", "pair", "names"),
    [(trimer, (0, 2), "MOL1-C1-MOL1-C3"), (cyclopropane, None, "MOL1-C2-MOL1-C3"), (butane, (0, 3), "MOL1-C1-MOL1-C4")],
)
def test_constraints_other_than_bonds_of_the_z_matrix_are_refused(molecule, pair, names):
    molecule = molecule()
    z = build_zmatrix(molecule)
    tree = {tuple(sorted((row.atom, row.bond))) for row in z.rows} | {tuple(sorted(z.root[k : k + 2])) for k in (0, 1)}
    pair = pair or next(bond for bond in molecule.bonds if bond not in tree)  # the closure of a ring
    with pytest.raises(ValueError, match=rf"1 constraints are not single bonds of the z-matrix \({names}\)"):
        FlatInternals(add_constraint(molecule, *pair), z)


def test_neighbours_of_a_centre_must_share_their_references():
    molecule = butane()
    h, c4, c3, other = (molecule.atom_labels.index(f"MOL1-{name}") for name in ("HC4a", "C4", "C3", "HC3a"))
    z = build_zmatrix(molecule, references={h: (c4, c3, other)})
    with pytest.raises(ValueError, match=r"atoms .*MOL1-HC4a.* around MOL1-C4 must share their z-matrix references"):
        FlatInternals(molecule, z)


# --- the chart: what belongs to the isomer ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_FRAMES)
def test_dynamics_stays_on_the_chart(name):
    internals = internals_of(name)
    q, inside = internals.of_frames(frames_of(name, 300))
    assert inside.all() and internals.chart.describe(q) == ""


def swapped(x: np.ndarray, i: int, j: int) -> np.ndarray:
    """Positions (A, 3) with two atoms exchanged."""
    order = np.arange(len(x))
    order[[i, j]] = j, i
    return x[order]


CENTRES = [
    (name, centre)
    for name in ("ala2", "ethanol", "butane", "cyclopropane", "proline", "three residues")
    for centre in {
        "ala2": ("ACE1-CH3", "ALA2-CA", "ALA2-CB", "NME3-C"),
        "ethanol": ("MOL1-C1", "MOL1-C2"),
        "butane": ("MOL1-C1", "MOL1-C2", "MOL1-C3", "MOL1-C4"),
        "cyclopropane": ("MOL1-C1", "MOL1-C2", "MOL1-C3"),
        "proline": ("ACE1-CH3", "PRO2-CA", "PRO2-CB", "PRO2-CG", "PRO2-CD", "NME3-C"),
        "three residues": ("ALA2-CA", "ALA2-CB", "GLY3-CA", "ALA4-CA", "ALA4-CB"),
    }[name]
]


def neighbours(molecule: Molecule, centre: int) -> list[int]:
    return [a if b == centre else b for a, b in molecule.bonds if centre in (a, b)]


@pytest.mark.parametrize(("name", "centre"), CENTRES)
def test_an_inverted_centre_is_off_the_chart_and_named(name, centre):
    """Two hydrogens of a centre exchanged, or its one hydrogen reflected through the plane of two other neighbours."""
    internals, molecule = internals_of(name), MOLECULES[name]()
    index = molecule.atom_labels.index(centre)
    around = neighbours(molecule, index)
    hydrogens = [a for a in around if molecule.masses[a] < 3]
    assert len(around) == 4 and hydrogens
    x = molecule.positions.copy()
    if len(hydrogens) > 1:
        x = swapped(x, *hydrogens[:2])
    else:  # in the place of the side chain, which moves to that of the hydrogen
        beta = molecule.atom_labels.index(centre.replace("-CA", "-CB"))
        x = _reflected(molecule, index, hydrogens[0], beta)
    q, _ = internals.inverse(torch.tensor(x)[None])
    assert internals.chart(q).tolist() == [False]
    assert f"centre {centre} inverted in 1" in internals.chart.describe(q)
    with pytest.raises(ValueError, match=rf"1 of 1 frames.*centre {centre} inverted in 1"):
        internals.of_frames(x[None])


def _reflected(molecule: Molecule, centre: int, hydrogen: int, beta: int) -> np.ndarray:
    """Hydrogen and side chain mirrored in the plane that holds the centre and its two backbone neighbours."""
    x = molecule.positions.copy()
    one, two = (a for a in neighbours(molecule, centre) if a not in (hydrogen, beta))
    normal = np.cross(x[one] - x[centre], x[two] - x[centre])
    normal /= np.linalg.norm(normal)
    branch, queue = {hydrogen, beta}, [beta]
    for atom in queue:
        new = [a for a in neighbours(molecule, atom) if a != centre and a not in branch]
        branch.update(new)
        queue += new
    if {one, two} & branch:  # a ring: the rest stays, only the hydrogen goes to the other side
        branch = {hydrogen}
    for atom in branch:
        x[atom] -= 2 * normal * (normal @ (x[atom] - x[centre]))
    if branch == {hydrogen}:
        x[beta] -= 2 * normal * (normal @ (x[beta] - x[centre]))
    return x


@pytest.mark.parametrize("name", ["ala2", "ethanol", "butane", "proline", "three residues"])
def test_the_mirror_image_is_off_the_chart(name):
    internals, molecule = internals_of(name), MOLECULES[name]()
    q, _ = internals.inverse(torch.tensor(mirrored(molecule).positions)[None])
    assert internals.chart(q).tolist() == [False]
    assert internals.chart.describe(q).count("inverted in 1") == sum(
        len(neighbours(molecule, a)) == 4 for a in range(molecule.n_atoms)
    )


def test_d_alanine_frames_for_an_l_alanine_molecule_are_refused_by_name():
    d_alanine = frames_of("ala2", 300) * np.array([1.0, 1.0, -1.0])
    with pytest.raises(ValueError, match=r"300 of 300 frames are another isomer.*ALA2-CA inverted in 300") as error:
        internals_of("ala2").of_frames(d_alanine)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("methyl", ["ACE1-H{}", "ALA2-HB{}", "NME3-H{}"])
def test_methyl_hydrogens_may_turn_but_not_swap(methyl):
    internals, molecule = internals_of("ala2"), MOLECULES["ala2"]()
    one, two, three = (molecule.atom_labels.index(methyl.format(i)) for i in (1, 2, 3))
    turned = swapped(swapped(molecule.positions, one, two), two, three)
    q, _ = internals.inverse(torch.tensor(np.array([turned, swapped(molecule.positions, one, two)])))
    assert internals.chart(q).tolist() == [True, False]


@pytest.mark.parametrize("name", ["ala2", "proline", "cis proline", "three residues"])
def test_the_other_isomer_of_every_peptide_bond_is_off_the_chart(name):
    internals = internals_of(name)
    first = internals.dim - len(internals.zmatrix.rows)
    planar = [i for i, row in enumerate(internals.zmatrix.rows) if row.kind == "planar"]
    planar = [i for i in planar if internals.zmatrix.leaders[i] == i]
    assert len(planar) == {"three residues": 4}.get(name, 2)
    for i in planar:
        row = internals.zmatrix.rows[i]
        q = internals.reference.repeat(3, 1)
        q[:, first + i] += torch.tensor([0.8, math.pi / 2 + 0.6, math.pi])
        x = internals.forward(q)[0]
        q = internals.inverse(x)[0]
        assert internals.chart(q).tolist() == [True, False, False], internals.names[first + i]
        atoms = "-".join(internals.zmatrix.labels[a] for a in (row.atom, *row.references))
        assert internals.chart.describe(q) == f"cis/trans isomer changed at {atoms} in 2"
        with pytest.raises(ValueError, match=f"2 of 3 frames.*cis/trans.*{atoms} in 2"):
            internals.of_frames(x.numpy())


def test_a_few_strange_frames_are_left_out_with_a_warning():
    x = frames_of("ala2", 300).copy()
    x[[3, 77]] *= np.array([1.0, 1.0, -1.0])
    with pytest.warns(UserWarning, match=r"2 of 300 frames.*ALA2-CA inverted in 2.*left out"):
        q, inside = internals_of("ala2").of_frames(x)
    assert len(q) == 300 and torch.nonzero(~inside)[:, 0].tolist() == [3, 77]
    x[:16] = frames_of("ala2", 300)[:16] * np.array([1.0, 1.0, -1.0])
    with pytest.raises(ValueError, match=r"17 of 300 frames"):
        internals_of("ala2").of_frames(x)


@pytest.mark.parametrize("kind", ["stiff", "soft"])
def test_the_restriction_of_peptide_bonds_can_be_lifted(kind, generator):
    molecule = MOLECULES["ala2"]()
    atom = molecule.atom_labels.index("ACE1-CH3")
    default = internals_of("ala2")
    lifted = FlatInternals(molecule, build_zmatrix(molecule, kinds={atom: kind}))
    column = lifted.dim - len(lifted.zmatrix.rows) + [row.atom for row in lifted.zmatrix.rows].index(atom)
    assert bool(lifted.circular[column]) == (kind == "soft") and not default.circular[column]
    q = default.reference.repeat(2, 1)
    q[:, column] = torch.tensor([0.1, 2.0])
    x = default.forward(q)[0]
    assert default.chart(default.inverse(x)[0]).tolist() == [False, True]
    assert lifted.chart(lifted.inverse(x)[0]).tolist() == [True, True]
    assert float(laws.log_volume_element(positions_of(lifted), q).abs().max()) < 1e-9


def test_draws_outside_of_the_chart_are_told_with_their_reason():
    internals = internals_of("ala2")
    first = internals.dim - len(internals.zmatrix.rows)
    stiff = first + next(i for i, row in enumerate(internals.zmatrix.rows) if row.kind == "stiff")
    soft = int(torch.nonzero(internals.circular)[0])
    q = internals.reference.repeat(7, 1)
    q[1, 0] = -1e-4
    q[2, internals.n_bonds] = 1.001
    q[3, internals.n_bonds + 1] = -1.0
    q[4, stiff] += math.pi + 0.01
    q[5, stiff] -= math.pi + 0.01
    q[6, soft] += 100.0
    assert internals.chart(q).tolist() == [True, False, False, False, False, False, True]
    text = internals.chart.describe(q)
    assert "bond length below zero in 1" in text and "angle beyond linear in 2" in text
    assert "off the branch of torsion ALA2-H-ALA2-N-ACE1-C-ALA2-CA in 2" in text


def test_internals_of_positions_are_on_their_branch(generator):
    """Whatever the positions, every torsion comes back within its branch, so that no two columns mean one structure."""
    internals = internals_of("proline")
    x = torch.randn(200, MOLECULES["proline"]().n_atoms, 3, generator=generator)
    q, _ = internals.inverse(x)
    angle = q[:, internals.dim - len(internals.zmatrix.rows) :]
    centre = torch.where(internals.circular[-angle.shape[1] :], 0.0, internals.chart.centre)
    assert float((angle - centre).abs().max()) <= math.pi + 1e-12


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_wrong_shapes_are_refused_with_numbers():
    internals = internals_of("chain4")
    with pytest.raises(ValueError, match=r"\(2, 5, 3\); expected \(batch, 4, 3\)"):
        internals.inverse(torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match=r"\(2, 7\); expected \(batch, 6\)"):
        internals.forward(torch.zeros(2, 7))


def test_an_empty_batch_stays_empty():
    internals = internals_of("chain4")
    x, log_det = internals.forward(torch.zeros(0, 6))
    assert x.shape == (0, 4, 3) and log_det.shape == (0,)
    assert internals.inverse(x)[0].shape == (0, 6)
    assert internals.chart(torch.zeros(0, 6)).shape == (0,)


def test_gradients_pass_through_both_ways():
    internals = FlatInternals(chain4(), build_zmatrix(chain4()))
    q = random_internals(internals, 3, torch.Generator().manual_seed(2)).requires_grad_()
    assert torch.autograd.gradcheck(positions_of(internals), q)
    x = internals.forward(q)[0].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: internals.inverse(x)[0], x)


def test_models_of_alanine_dipeptide_share_their_coordinates():
    names = {FlatInternals(m, build_zmatrix(m)).names for m in (alanine_dipeptide(k) for k in MODELS)}
    assert len(names) == 1


MODELS = ("ff96-obc1", "ff99sbildn-obc2", "vacuum")


def test_l_and_cis_references_accept_their_own_kind():
    for molecule in (mirrored(MOLECULES["ala2"]()), peptide("PRO", omega=0.0)):
        internals = FlatInternals(molecule, build_zmatrix(molecule))
        assert internals.chart(internals.inverse(torch.tensor(molecule.positions)[None])[0]).tolist() == [True]
