"""The objects that a configuration names: molecule, z-matrix, energy, untrained flow, seeds."""

from __future__ import annotations

import difflib
from dataclasses import asdict

import torch

from .energy import BatchedEnergy, OpenMMEnergy, choose_energy
from .flow import Flow, build_flow
from .settings import Config, EnergySettings, MoleculeSettings, ZMatrixSettings, stage_seed
from .systems import Molecule, alanine_dipeptide
from .trajectories import Frames
from .zmatrix import ZMatrix, build_zmatrix


def load_molecule(settings: MoleculeSettings) -> Molecule:
    """The molecule that a configuration names.

    Raises:
        ValueError, OSError: see `alanine_dipeptide` and `Molecule.from_files`.
    """
    constraints = None if settings.constraints == "none" else settings.constraints
    if settings.structure is None:
        return alanine_dipeptide(settings.model, constraints)
    return Molecule.from_files(
        settings.structure,
        settings.parameters,
        force_field=settings.force_field or None,
        implicit_solvent=settings.implicit_solvent,
        constraints=constraints,
        name=settings.name,
    )


def open_energy(molecule: Molecule, settings: EnergySettings, n: int | None = None) -> BatchedEnergy | OpenMMEnergy:
    """The energy of a molecule by the engine that a configuration names, for n configurations to come."""
    return choose_energy(molecule.system, molecule.positions, n=n, **asdict(settings))


def load_zmatrix(molecule: Molecule, settings: ZMatrixSettings) -> ZMatrix:
    """The automatic z-matrix with the changes that a configuration asks for.

    Raises:
        ValueError: an atom that the molecule does not have, or what `build_zmatrix` refuses.
    """

    def index(label: str) -> int:
        if label not in molecule.atom_labels:
            near = difflib.get_close_matches(label, molecule.atom_labels, n=3) or molecule.atom_labels
            raise ValueError(f"[zmatrix] {molecule.name} has no atom {label!r}; there are {', '.join(near)}")
        return molecule.atom_labels.index(label)

    references = {index(atom): [index(a) for a in atoms] for atom, atoms in settings.references.items()}
    kinds = {index(atom): kind for atom, kind in settings.kinds.items()}
    root = [index(atom) for atom in settings.root] or None
    return build_zmatrix(molecule, root=root, references=references, kinds=kinds)


def start_flow(molecule: Molecule, frames: Frames, config: Config) -> Flow:
    """The untrained flow of a configuration, its stiff coordinates standardised by the frames that will train it."""
    early, _ = frames.split(config.train.held_out)
    return build_flow(
        molecule,
        early,
        config.flow,
        training_temperature=config.simulate.temperature,
        zmatrix=load_zmatrix(molecule, config.zmatrix),
        generator=torch.Generator().manual_seed(stage_seed(config.seed, "flow")),
    )
