"""Reading molecules from the files that OpenMM users have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openmm
from openmm import app

PRMTOP = {".prmtop", ".parm7"}
INPCRD = {".inpcrd", ".crd", ".rst7", ".restrt", ".ncrst"}
PDB = {".pdb", ".ent"}
PDBX = {".cif", ".mmcif", ".pdbx"}
KNOWN = "prmtop (.prmtop .parm7), inpcrd (.inpcrd .crd .rst7), PDB (.pdb .cif), System (.xml)"


def read_files(
    structure: str | Path,
    parameters: str | Path | None,
    *,
    force_field: Any,
    implicit_solvent: Any,
    constraints: Any,
) -> tuple[openmm.System, app.Topology, Any]:
    """System, topology and positions (a Quantity); arguments and errors as in `Molecule.from_files`."""
    files = [_existing(path) for path in (structure, parameters) if path is not None]
    coordinates, description = _sort_files(files, force_field is not None)
    topology, positions = _read_structure(coordinates)
    constraints = constraint_option(constraints)
    if description is None:
        _refuse("implicit_solvent", implicit_solvent, "add an XML such as 'implicit/obc2.xml' to force_field")
        system = _from_force_field(topology, force_field, constraints, coordinates)
    elif description.suffix.lower() in PRMTOP:
        topology, system = _from_prmtop(description, solvent_option(implicit_solvent), constraints)
    else:
        _refuse("implicit_solvent", implicit_solvent, "the serialized System already has its forces")
        _refuse("constraints", constraints, "the serialized System already has its own")
        system = _from_xml(description)
    # A CRYST1 record or box line says nothing here: whether the forces are periodic is what counts.
    topology.setPeriodicBoxVectors(None)
    return system, topology, positions


def constraint_option(value: Any) -> Any:
    """None or an `openmm.app` constraint object, from that or its name ("HBonds", "AllBonds", "HAngles")."""
    return _option(value, "constraints", ("HBonds", "AllBonds", "HAngles"))


def solvent_option(value: Any) -> Any:
    """None or an `openmm.app` implicit-solvent object, from that or its name."""
    return _option(value, "implicit_solvent", ("HCT", "OBC1", "OBC2", "GBn", "GBn2"))


def _option(value: Any, what: str, names: tuple[str, ...]) -> Any:
    by_name = {name.lower(): getattr(app, name) for name in names}
    if value is None or any(value is known for known in by_name.values()):
        return value
    if isinstance(value, str) and value.lower() in {"none", *by_name}:
        return by_name.get(value.lower())
    raise ValueError(f"unknown {what} {value!r}; choose from None, {', '.join(names)}")


def _refuse(what: str, value: Any, advice: str) -> None:
    if value is not None:
        raise ValueError(f"{what}={value!r} has no effect here; {advice}")


def _existing(path: str | Path) -> Path:
    found = Path(path).expanduser()
    if not found.is_file():
        raise FileNotFoundError(f"no such file: {found}")
    return found


def _sort_files(files: list[Path], has_force_field: bool) -> tuple[Path, Path | None]:
    """The file with coordinates, and the one with parameters (None with a force field)."""
    kinds = [file.suffix.lower() for file in files]
    for file, kind in zip(files, kinds, strict=True):
        if kind not in PRMTOP | INPCRD | PDB | PDBX | {".xml"}:
            raise ValueError(f"{file.name}: unknown kind of file; known are {KNOWN}")
    coordinates = [f for f, k in zip(files, kinds, strict=True) if k in INPCRD | PDB | PDBX]
    descriptions = [f for f, k in zip(files, kinds, strict=True) if k in PRMTOP | {".xml"}]
    if has_force_field and len(coordinates) == 1 and not descriptions and kinds[0] not in INPCRD:
        return coordinates[0], None
    if not has_force_field and len(coordinates) == len(descriptions) == 1:
        inpcrd_and_xml = coordinates[0].suffix.lower() in INPCRD and descriptions[0].suffix.lower() == ".xml"
        if not inpcrd_and_xml:
            return coordinates[0], descriptions[0]
    given = " + ".join([f.name for f in files] + (["force_field"] if has_force_field else []))
    raise ValueError(
        f"cannot make a molecule from {given}; give prmtop + inpcrd, PDB + force_field, or PDB + System XML"
    )


def _read_structure(path: Path) -> tuple[app.Topology, Any]:
    kind = path.suffix.lower()
    try:
        if kind in INPCRD:
            return app.Topology(), app.AmberInpcrdFile(str(path)).getPositions(asNumpy=True)
        reader = app.PDBFile if kind in PDB else app.PDBxFile
        file = reader(str(path))
        return file.topology, file.getPositions(asNumpy=True)
    except Exception as error:
        raise ValueError(f"{path.name} cannot be read: {_one_line(error)}") from error


def _from_force_field(topology: app.Topology, names: Any, constraints: Any, path: Path) -> openmm.System:
    names = (names,) if isinstance(names, str | Path) else tuple(names)
    try:
        return app.ForceField(*map(str, names)).createSystem(
            topology, nonbondedMethod=app.NoCutoff, constraints=constraints, rigidWater=False
        )
    except Exception as error:
        raise ValueError(f"{path.name} with force field {', '.join(map(str, names))}: {_one_line(error)}") from error


def _from_prmtop(path: Path, solvent: Any, constraints: Any) -> tuple[app.Topology, openmm.System]:
    try:
        prmtop = app.AmberPrmtopFile(str(path))
        return prmtop.topology, prmtop.createSystem(
            nonbondedMethod=app.NoCutoff, implicitSolvent=solvent, constraints=constraints, rigidWater=False
        )
    except Exception as error:
        raise ValueError(f"{path.name} cannot be used: {_one_line(error)}") from error


def _from_xml(path: Path) -> openmm.System:
    try:
        system = openmm.XmlSerializer.deserialize(path.read_text())
    except Exception as error:
        raise ValueError(f"{path.name} is not a serialized OpenMM System: {_one_line(error)}") from error
    if not isinstance(system, openmm.System):
        raise ValueError(f"{path.name} holds a serialized {type(system).__name__}, not a System; is it a force_field?")
    return system


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
