"""Molecules: the three models, the three ways from files, exact round trips, and what is refused."""

import json

import numpy as np
import openmm
import pytest
from openmm import app, unit

from openmm_tsf.systems import Molecule, _openmmtools_data, alanine_dipeptide

AMBER = _openmmtools_data() / "alanine-dipeptide-gbsa"


def energy(system, positions):
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    return context.getState(energy=True).getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)


@pytest.fixture(scope="module")
def pdb(tmp_path_factory):
    path = tmp_path_factory.mktemp("pdb") / "ala.pdb"
    molecule = alanine_dipeptide()
    with path.open("w") as file:
        app.PDBFile.writeFile(molecule.topology, molecule.positions * unit.nanometer, file)
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model", "name"), [("ff96-obc1", "AlanineDipeptideImplicit"), ("vacuum", "AlanineDipeptideVacuum")]
)
@pytest.mark.parametrize("constraints", [None, "HBonds"])
def test_equals_the_openmmtools_test_system(model, name, constraints):
    from openmmtools import testsystems

    theirs = getattr(testsystems, name)(constraints=getattr(app, constraints) if constraints else None)
    ours = alanine_dipeptide(model, constraints=constraints)
    moved = ours.positions + 0.01 * np.random.default_rng(3).normal(size=(22, 3))
    assert energy(ours.system, moved) == energy(theirs.system, moved)
    assert np.array_equal(ours.positions, theirs.positions.value_in_unit(unit.nanometer))
    assert len(ours.constraints) == theirs.system.getNumConstraints() == (12 if constraints else 0)


def test_the_models_differ(ala2):
    energies = [energy(alanine_dipeptide(m).system, ala2.positions) for m in ("ff96-obc1", "ff99sbildn-obc2", "vacuum")]
    assert min(abs(a - b) for i, a in enumerate(energies) for b in energies[:i]) > 5.0


def test_unknown_model_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'ff14'; choose from ff96-obc1, ff99sbildn-obc2, vacuum"):
        alanine_dipeptide("ff14")


def test_properties(ala2):
    assert ala2.n_atoms == 22
    assert ala2.positions.dtype == np.float64
    assert ala2.masses.sum() == pytest.approx(144.17, abs=0.05)
    assert len(ala2.bonds) == 21
    assert all(i < j for i, j in ala2.bonds)
    assert list(ala2.bonds) == sorted(ala2.bonds)
    assert ala2.atom_labels[1] == "ACE1-CH3"
    assert ala2.atom_labels == tuple(str(a) for a in ala2.mdtraj_topology.atoms)
    constraints = alanine_dipeptide(constraints=app.HBonds).constraints
    assert set(constraints) <= set(ala2.bonds)
    assert constraints[6, 7] == pytest.approx(0.101)


def test_is_the_L_trans_isomer(ala2):
    x = ala2.positions
    at = {label: x[i] for i, label in enumerate(ala2.atom_labels)}
    n, ca, c, cb = (at[f"ALA2-{name}"] for name in ("N", "CA", "C", "CB"))
    assert np.dot(np.cross(n - ca, c - ca), cb - ca) > 0.0  # L; the D enantiomer has the other sign
    for first, second in (("ACE1-CH3", "ALA2-CA"), ("ALA2-CA", "NME3-C")):
        assert np.linalg.norm(at[first] - at[second]) > 0.36  # trans, about 0.38 nm; cis, about 0.28 nm


def test_frozen_and_detached(ala2):
    with pytest.raises(ValueError, match="read-only"):
        ala2.positions[0, 0] = 1.0
    with pytest.raises(ValueError, match="read-only"):
        ala2.masses[0] = 1.0
    with pytest.raises(AttributeError):
        ala2.name = "other"
    system = alanine_dipeptide().system
    molecule = Molecule(system, ala2.topology, ala2.positions)
    system.setParticleMass(0, 100.0)
    assert molecule.masses[0] == pytest.approx(1.008, abs=1e-3)


def test_quantities_are_stripped(ala2):
    molecule = Molecule(ala2.system, ala2.topology, ala2.positions * 10.0 * unit.angstrom)
    assert np.allclose(molecule.positions, ala2.positions, atol=1e-12)
    with pytest.raises(ValueError, match="positions has unit"):
        Molecule(ala2.system, ala2.topology, ala2.positions * unit.kelvin)


@pytest.mark.parametrize("constraints", [None, "HBonds"])
@pytest.mark.parametrize("model", ["ff96-obc1", "ff99sbildn-obc2"])
def test_dict_round_trip_is_exact(model, constraints):
    molecule = alanine_dipeptide(model, constraints=constraints)
    text = json.dumps(molecule.to_dict())
    back = Molecule.from_dict(json.loads(text))
    moved = molecule.positions + 0.01 * np.random.default_rng(4).normal(size=(22, 3))
    assert np.array_equal(back.positions, molecule.positions)
    assert energy(back.system, moved) == energy(molecule.system, moved)
    for name in ("name", "bonds", "constraints", "atom_labels", "mdtraj_topology"):
        assert getattr(back, name) == getattr(molecule, name)
    assert json.dumps(back.to_dict()) == text


@pytest.mark.parametrize("entry", ["name", "system", "atoms", "bonds", "positions"])
def test_from_dict_refuses_what_is_not_a_molecule(ala2, entry):
    data = ala2.to_dict()
    with pytest.raises(ValueError, match="not a molecule written by to_dict"):
        Molecule.from_dict({key: value for key, value in data.items() if key != entry})
    with pytest.raises(ValueError, match=r"not a molecule|sizes differ|one molecule"):
        Molecule.from_dict({**data, entry: [] if entry != "system" else "<System>"} if entry != "name" else {})


def test_from_amber_files_in_either_order(ala2):
    files = AMBER / "alanine-dipeptide.prmtop", AMBER / "alanine-dipeptide.crd"
    for pair in (files, files[::-1]):
        for solvent in ("obc1", app.OBC1):
            molecule = Molecule.from_files(*pair, implicit_solvent=solvent)
            assert energy(molecule.system, ala2.positions) == energy(ala2.system, ala2.positions)
    assert molecule.name == "alanine-dipeptide"
    assert energy(Molecule.from_files(*files).system, ala2.positions) != energy(ala2.system, ala2.positions)
    assert len(Molecule.from_files(*map(str, files), constraints="HBonds").constraints) == 12


def test_from_pdb_and_force_field(ala2, pdb):
    molecule = Molecule.from_files(pdb, force_field=("amber99sbildn.xml", "amber96_obc.xml"), name="dipeptide")
    expected = energy(alanine_dipeptide("ff99sbildn-obc2").system, ala2.positions)
    assert energy(molecule.system, ala2.positions) == pytest.approx(expected, abs=1e-9)
    assert molecule.name == "dipeptide"
    assert len(Molecule.from_files(pdb, force_field="amber99sbildn.xml", constraints=app.HBonds).constraints) == 12


def test_a_box_in_the_file_alone_says_nothing(pdb, tmp_path):
    boxed = tmp_path / "boxed.pdb"
    boxed.write_text("CRYST1   30.000   30.000   30.000  90.00  90.00  90.00 P 1           1\n" + pdb.read_text())
    assert app.PDBFile(str(boxed)).topology.getPeriodicBoxVectors() is not None
    molecule = Molecule.from_files(boxed, force_field="amber99sbildn.xml")
    assert molecule.topology.getPeriodicBoxVectors() is None


def test_from_pdb_and_system_xml(ala2, pdb, tmp_path):
    xml = tmp_path / "system.xml"
    xml.write_text(openmm.XmlSerializer.serialize(ala2.system))
    for pair in ((pdb, xml), (xml, pdb)):
        molecule = Molecule.from_files(*pair)
        assert energy(molecule.system, ala2.positions) == energy(ala2.system, ala2.positions)
        assert molecule.bonds == ala2.bonds
        assert molecule.positions == pytest.approx(ala2.positions, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"cannot make a molecule from ala\.pdb; give prmtop \+ inpcrd"),
        ({"force_field": "amber99sbildn.xml", "implicit_solvent": "OBC2"}, r"add an XML such as 'implicit/obc2.xml'"),
        ({"force_field": "amber99sbildn.xml", "constraints": "h-bonds"}, r"unknown constraints 'h-bonds'; choose"),
        ({"force_field": "nonsense.xml"}, r"nonsense\.xml"),
        ({"force_field": "tip3p.xml"}, r"No template found for residue"),
        ({"parameters": "system.xml", "constraints": "HBonds"}, r"already has its own"),
        ({"parameters": "integrator.xml"}, r"serialized VerletIntegrator, not a System"),
        ({"parameters": "broken.xml"}, r"broken\.xml is not a serialized OpenMM System"),
        ({"parameters": "molecule.top"}, r"molecule\.top: unknown kind of file; known are prmtop"),
        ({"parameters": "broken.prmtop"}, r"broken\.prmtop cannot be used"),
        ({"parameters": "system.xml", "force_field": "amber99sbildn.xml"}, r"ala\.pdb \+ system\.xml \+ force_field"),
    ],
)
def test_files_that_make_no_sense(ala2, pdb, tmp_path, options, message):
    (tmp_path / "system.xml").write_text(openmm.XmlSerializer.serialize(ala2.system))
    (tmp_path / "integrator.xml").write_text(openmm.XmlSerializer.serialize(openmm.VerletIntegrator(0.001)))
    for name in ("broken.xml", "broken.prmtop", "molecule.top"):
        (tmp_path / name).write_text("nonsense")
    if "parameters" in options:
        options = {**options, "parameters": tmp_path / options["parameters"]}
    with pytest.raises(ValueError, match=message) as caught:
        Molecule.from_files(pdb, **options)
    assert "\n" not in str(caught.value)


def test_missing_file(pdb, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        Molecule.from_files(tmp_path / "none.pdb", force_field="amber99sbildn.xml")
    with pytest.raises(FileNotFoundError, match="no such file"):
        Molecule.from_files(pdb, tmp_path / "none.xml")


def test_default_box_vectors_alone_are_no_periodic_box(ala2):
    system = openmm.XmlSerializer.clone(ala2.system)
    system.setDefaultPeriodicBoxVectors((3, 0, 0), (0, 3, 0), (0, 0, 3))
    assert Molecule(system, ala2.topology, ala2.positions).n_atoms == 22


@pytest.mark.parametrize(
    ("force", "message"),
    [
        (openmm.MonteCarloBarostat(1.0, 300.0), r"barostat \(MonteCarloBarostat\)"),
        (openmm.MonteCarloAnisotropicBarostat((1, 1, 1), 300.0), r"barostat"),
        (openmm.MonteCarloMembraneBarostat(1.0, 0.0, 300.0, 0, 0), r"barostat"),
        (openmm.MonteCarloFlexibleBarostat(1.0, 300.0), r"barostat"),
        (openmm.AndersenThermostat(300.0, 1.0), r"thermostat \(AndersenThermostat\)"),
    ],
)
def test_barostats_and_thermostats_are_refused(ala2, force, message):
    system = openmm.XmlSerializer.clone(ala2.system)
    system.addForce(force)
    with pytest.raises(ValueError, match=message + r".*remove it with system.removeForce"):
        Molecule(system, ala2.topology, ala2.positions)


def test_periodic_box_is_refused(ala2):
    system = openmm.XmlSerializer.clone(ala2.system)
    force = openmm.NonbondedForce()
    force.setNonbondedMethod(openmm.NonbondedForce.PME)
    for _ in range(22):
        force.addParticle(0.0, 0.1, 0.0)
    system.addForce(force)
    with pytest.raises(ValueError, match=r"1 forces use a periodic box \(NonbondedForce\).*NoCutoff"):
        Molecule(system, ala2.topology, ala2.positions)


def test_more_than_one_molecule_is_refused(ala2):
    modeller = app.Modeller(ala2.topology, ala2.positions * unit.nanometer)
    for shift in (2.0, 3.0):
        modeller.add(ala2.topology, (ala2.positions + shift) * unit.nanometer)
    system = openmm.System()
    for _ in range(66):
        system.addParticle(12.0)
    with pytest.raises(ValueError, match=r"one molecule expected, found 3 of 22, 22, 22 atoms; keep one"):
        Molecule(system, modeller.topology, modeller.positions)


def test_topology_without_bonds_says_so(ala2):
    data = {**ala2.to_dict(), "bonds": []}
    with pytest.raises(ValueError, match=r"found 22 of 1, 1, 1, 1, 1, \.\.\. atoms; the topology has no bonds"):
        Molecule.from_dict(data)


def test_virtual_sites_and_massless_particles_are_refused(ala2):
    system = openmm.XmlSerializer.clone(ala2.system)
    system.setParticleMass(5, 0.0)
    with pytest.raises(ValueError, match=r"1 particles have no mass \(first: 5\)"):
        Molecule(system, ala2.topology, ala2.positions)
    system.setVirtualSite(5, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    with pytest.raises(ValueError, match=r"1 virtual sites \(first: particle 5\)"):
        Molecule(system, ala2.topology, ala2.positions)


def test_sizes_and_positions_are_checked(ala2):
    with pytest.raises(
        ValueError, match=r"System has 22 particles, the topology 22 atoms, positions have shape \(21, 3\)"
    ):
        Molecule(ala2.system, ala2.topology, ala2.positions[:21])
    with pytest.raises(ValueError, match=r"System has 22 particles, the topology 0 atoms"):
        Molecule(ala2.system, app.Topology(), ala2.positions)
    broken = ala2.positions.copy()
    broken[[4, 7], 1] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"2 of 22 atoms have positions that are not finite, first 4"):
        Molecule(ala2.system, ala2.topology, broken)
