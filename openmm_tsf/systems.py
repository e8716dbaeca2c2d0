"""Molecules: what is simulated, trained on and sampled.

A `Molecule` is one molecule in vacuum or implicit solvent: an OpenMM System, its Topology and reference positions.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openmm
from openmm import app, unit

from openmm_tsf.molfiles import constraint_option, read_files
from openmm_tsf.units import to_float

if TYPE_CHECKING:
    import mdtraj

FORBIDDEN_FORCES = {
    "MonteCarloBarostat": "barostat",
    "MonteCarloAnisotropicBarostat": "barostat",
    "MonteCarloMembraneBarostat": "barostat",
    "MonteCarloFlexibleBarostat": "barostat",
    "AndersenThermostat": "thermostat",
}


@dataclass(frozen=True, eq=False)
class Molecule:
    """One molecule with its forces; frozen, arrays are read-only.

    Args:
        system: the OpenMM System; kept as a copy, so that later edits of the original have no effect here.
        topology: names, elements and bonds of the atoms.
        positions: reference geometry (A, 3) [nm] or a Quantity, kept as float64 [nm]; its isomer is the one sampled.
        name: for file names and messages.

    Raises:
        ValueError: more than one molecule, virtual sites, a periodic box, a barostat or thermostat, massless
            particles, sizes that do not match, or positions that are not finite.
    """

    system: openmm.System
    topology: app.Topology
    positions: np.ndarray | unit.Quantity = field(repr=False)
    name: str = "molecule"

    def __post_init__(self) -> None:
        positions = np.array(to_float(self.positions, unit.nanometer, "positions"), dtype=np.float64, order="C")
        positions.flags.writeable = False
        object.__setattr__(self, "positions", positions)
        object.__setattr__(self, "system", openmm.XmlSerializer.clone(self.system))
        _check_sizes(self)
        _check_forces(self.system)
        _check_particles(self.system)
        _check_one_molecule(self)

    @classmethod
    def from_files(
        cls,
        structure: str | Path,
        parameters: str | Path | None = None,
        *,
        force_field: str | Path | tuple[str | Path, ...] | None = None,
        implicit_solvent: Any = None,
        constraints: Any = None,
        name: str | None = None,
    ) -> Molecule:
        """Read a molecule, in one of three ways.

        * ``("ala.prmtop", "ala.inpcrd", implicit_solvent="OBC1")``: Amber files (a PDB may stand for the inpcrd),
        * ``("ala.pdb", force_field=("amber99sbildn.xml", "amber99_obc.xml"))``: PDB and OpenMM force-field files,
        * ``("ala.pdb", "system.xml")``: PDB and a serialized OpenMM System.

        Args:
            structure: the file with the coordinates (with two files their order does not matter).
            parameters: Amber prmtop or serialized System XML; None where `force_field` is given.
            force_field: OpenMM force-field XML names or files.
            implicit_solvent: for prmtop: None, "HCT", "OBC1", "OBC2", "GBn", "GBn2", or the `openmm.app` object. With
                a force field the solvent is one of the XML files.
            constraints: None, "HBonds", "AllBonds", or the `openmm.app` object. A serialized System has its own.
            name: name of the molecule; that of the first file by default.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: files of an unknown kind or that cannot be read, a combination that makes no sense, or what
                `Molecule` refuses.
        """
        system, topology, positions = read_files(
            structure,
            parameters,
            force_field=force_field,
            implicit_solvent=implicit_solvent,
            constraints=constraints,
        )
        return cls(system, topology, positions, name or Path(structure).stem)

    @property
    def n_atoms(self) -> int:
        """Number of atoms A."""
        return self.system.getNumParticles()

    @cached_property
    def masses(self) -> np.ndarray:
        """Masses (A,) [amu], read-only."""
        masses = np.array(list(_masses(self.system)))
        masses.flags.writeable = False
        return masses

    @cached_property
    def bonds(self) -> tuple[tuple[int, int], ...]:
        """Bonded pairs (i, j), i < j, sorted, as the topology has them."""
        return _bonds(self.topology)

    @cached_property
    def constraints(self) -> dict[tuple[int, int], float]:
        """Pairs (i, j), i < j, held at a fixed distance [nm]."""
        found = {}
        for index in range(self.system.getNumConstraints()):
            i, j, distance = self.system.getConstraintParameters(index)
            found[min(i, j), max(i, j)] = distance.value_in_unit(unit.nanometer)
        return dict(sorted(found.items()))

    @cached_property
    def atom_labels(self) -> tuple[str, ...]:
        """Labels like "ACE1-CH3" (residue name, residue number, atom name), made unique by "@index" if they are not."""
        labels = [f"{a.residue.name}{a.residue.id}-{a.name}" for a in self.topology.atoms()]
        return tuple(x if labels.count(x) == 1 else f"{x}@{i}" for i, x in enumerate(labels))

    @cached_property
    def mdtraj_topology(self) -> mdtraj.Topology:
        """The topology in mdtraj's form."""
        import mdtraj

        return mdtraj.Topology.from_openmm(self.topology)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-safe values; `from_dict` gives back the same molecule to the last bit."""
        return {
            "name": self.name,
            "system": openmm.XmlSerializer.serialize(self.system),
            "atoms": [_atom_entry(atom) for atom in self.topology.atoms()],
            "bonds": [list(pair) for pair in self.bonds],
            "positions": self.positions.tolist(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Molecule:
        """Rebuild what `to_dict` gave.

        Raises:
            ValueError: an entry is missing or has a wrong form.
        """
        try:
            system = openmm.XmlSerializer.deserialize(data["system"])
            topology = _topology(data["atoms"], data["bonds"])
            positions, name = np.array(data["positions"], dtype=np.float64), str(data["name"])
        except (KeyError, TypeError, IndexError, ValueError, openmm.OpenMMException) as error:
            raise ValueError(f"not a molecule written by to_dict: {type(error).__name__}: {error}") from error
        return cls(system, topology, positions, name)


def alanine_dipeptide(model: str = "ff96-obc1", constraints: Any = None) -> Molecule:
    """Alanine dipeptide (ACE-ALA-NME, 22 atoms, L, both peptide bonds trans).

    Args:
        model: "ff96-obc1": Amber ff96 with OBC1 implicit solvent (openmmtools' AlanineDipeptideImplicit);
            "ff99sbildn-obc2": Amber ff99SB-ILDN with `amber96_obc.xml`, as in the paper on temperature-steerable flows
            (arXiv 2108.01590); "vacuum": Amber ff96 without solvent (openmmtools' AlanineDipeptideVacuum).
        constraints: None, or "HBonds" (`openmm.app.HBonds`) to hold X-H bonds rigid.

    Raises:
        ValueError: unknown model.
        ImportError: openmmtools, whose data files are read, is not installed.
    """
    solvent = {"ff96-obc1": app.OBC1, "ff99sbildn-obc2": None, "vacuum": None}
    if model not in solvent:
        raise ValueError(f"unknown alanine dipeptide model {model!r}; choose from {', '.join(solvent)}")
    constraints = constraint_option(constraints)
    folder = _openmmtools_data() / "alanine-dipeptide-gbsa"
    prmtop = app.AmberPrmtopFile(str(folder / "alanine-dipeptide.prmtop"))
    positions = app.AmberInpcrdFile(str(folder / "alanine-dipeptide.crd")).getPositions(asNumpy=True)
    if model == "ff99sbildn-obc2":
        force_field = app.ForceField("amber99sbildn.xml", "amber96_obc.xml")
        system = force_field.createSystem(prmtop.topology, nonbondedMethod=app.NoCutoff, constraints=constraints)
    else:
        system = prmtop.createSystem(implicitSolvent=solvent[model], constraints=constraints)
    return Molecule(system, prmtop.topology, positions, f"alanine-dipeptide-{model}")


def _openmmtools_data() -> Path:
    # Found, not imported: importing openmmtools takes seconds and makes pymbar print warnings.
    spec = importlib.util.find_spec("openmmtools")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("alanine_dipeptide reads its parameters from openmmtools, which is not installed")
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def _masses(system: openmm.System) -> Iterator[float]:
    return (system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(system.getNumParticles()))


def _bonds(topology: app.Topology) -> tuple[tuple[int, int], ...]:
    pairs = ((bond[0].index, bond[1].index) for bond in topology.bonds())
    return tuple(sorted({(min(pair), max(pair)) for pair in pairs}))


def _atom_entry(atom: app.topology.Atom) -> list:
    residue, symbol = atom.residue, atom.element.symbol if atom.element else None
    return [atom.name, symbol, residue.index, residue.name, residue.id, residue.insertionCode, residue.chain.id]


def _topology(atoms: list, bonds: list) -> app.Topology:
    topology, chains, residues = app.Topology(), {}, {}
    for name, symbol, residue, residue_name, residue_id, insertion_code, chain_id in atoms:
        if chain_id not in chains:
            chains[chain_id] = topology.addChain(chain_id)
        if residue not in residues:
            residues[residue] = topology.addResidue(residue_name, chains[chain_id], residue_id, insertion_code)
        element = app.Element.getBySymbol(symbol) if symbol else None
        topology.addAtom(name, element, residues[residue])
    added = list(topology.atoms())
    for i, j in bonds:
        topology.addBond(added[i], added[j])
    return topology


def _check_sizes(molecule: Molecule) -> None:
    n_system, n_topology = molecule.system.getNumParticles(), molecule.topology.getNumAtoms()
    shape = molecule.positions.shape
    if not n_system == n_topology or shape != (n_system, 3) or n_system == 0:
        raise ValueError(
            f"sizes differ: the System has {n_system} particles, the topology {n_topology} atoms, "
            f"positions have shape {shape}; all three must describe the same molecule"
        )
    bad = ~np.isfinite(molecule.positions).all(axis=1)
    if bad.any():
        raise ValueError(f"{bad.sum()} of {n_system} atoms have positions that are not finite, first {bad.argmax()}")


def _check_forces(system: openmm.System) -> None:
    for force in system.getForces():
        kind = FORBIDDEN_FORCES.get(type(force).__name__)
        if kind:
            raise ValueError(f"the System has a {kind} ({type(force).__name__}); remove it with system.removeForce(i)")
    periodic = [type(f).__name__ for f in system.getForces() if f.usesPeriodicBoundaryConditions()]
    if periodic:
        raise ValueError(
            f"{len(periodic)} forces use a periodic box ({', '.join(periodic)}); "
            "make the System in vacuum or implicit solvent (nonbondedMethod=NoCutoff)"
        )


def _check_particles(system: openmm.System) -> None:
    n = system.getNumParticles()
    sites = [i for i in range(n) if system.isVirtualSite(i)]
    if sites:
        raise ValueError(f"{len(sites)} virtual sites (first: particle {sites[0]}); use a force field without them")
    massless = [i for i, mass in enumerate(_masses(system)) if not mass > 0.0]
    if massless:
        raise ValueError(
            f"{len(massless)} particles have no mass (first: {massless[0]}); frozen atoms are not supported"
        )


def _check_one_molecule(molecule: Molecule) -> None:
    sizes = _component_sizes(molecule.n_atoms, molecule.bonds)
    if len(sizes) == 1:
        return
    shown = ", ".join(map(str, sizes[:5])) + (", ..." if len(sizes) > 5 else "")
    hint = (
        "the topology has no bonds (add CONECT records, or topology.createStandardBonds())"
        if not molecule.bonds
        else "keep one (openmm.app.Modeller.delete), or add the bonds that the topology lacks"
    )
    raise ValueError(f"one molecule expected, found {len(sizes)} of {shown} atoms; {hint}")


def _component_sizes(n_atoms: int, bonds: tuple[tuple[int, int], ...]) -> list[int]:
    parent = list(range(n_atoms))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j in bonds:
        parent[root(i)] = root(j)
    _, sizes = np.unique([root(i) for i in range(n_atoms)], return_counts=True)
    return sorted(map(int, sizes), reverse=True)
