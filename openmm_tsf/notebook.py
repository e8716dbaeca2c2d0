"""Ensembles in a notebook: structures in nglview, superposed on the backbone, and the same coloured by basin."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import mdtraj
import torch

from .ensemble import Ensemble, to_mdtraj
from .torsions import BASINS, basins, phi_psi

if TYPE_CHECKING:
    from nglview import NGLWidget

COLORS: Mapping[str, str] = {"alpha_L": "#d55e00", "alpha_R": "#009e73", "beta": "#0072b2"}
"""Colours of the basins (see `torsions.basins` for their bounds), told apart by colour-blind readers too."""


def view(ensemble: Ensemble, topology: Any, n: int = 100, *, generator: torch.Generator | None = None) -> NGLWidget:
    """Equally likely structures of an ensemble, all at once, superposed on the backbone.

    `nglview.show_mdtraj(superposed(ensemble, topology))` shows them one after the other instead.

    Args:
        ensemble: its weights choose the structures.
        topology: an `openmm.app.Topology`, an `mdtraj.Topology` or a Molecule.
        n: number of structures.
        generator: of the choice; by default a fresh one with a fixed seed.

    Raises:
        ImportError: nglview is not installed.
    """
    frames = superposed(ensemble, topology, n, generator)
    return _widget([(f"{frames.n_frames} structures at {ensemble.temperature:g} K", frames, "element")])


def view_basins(
    ensemble: Ensemble, topology: Any, n: int = 100, *, generator: torch.Generator | None = None
) -> NGLWidget:
    """As `view`, coloured by the basin of phi and psi.

    Vermilion: alpha_L (0 < phi < 2.4 rad); green: alpha_R (elsewhere with -120 < psi < 50 degrees); blue: beta (C5, PII
    and C7eq; the rest). Each basin that occurs is a component of the widget, named with its number of structures.

    Raises:
        ValueError: the molecule has no residue with phi and psi.
        ImportError: nglview is not installed.
    """
    frames = superposed(ensemble, topology, n, generator)
    members = basins(*phi_psi(frames.xyz, frames.topology))
    groups = [(name, frames[members == index]) for index, name in enumerate(BASINS)]
    shown = [(name, group) for name, group in groups if group.n_frames > 0]
    return _widget([(f"{name}: {group.n_frames} of {frames.n_frames}", group, COLORS[name]) for name, group in shown])


def superposed(
    ensemble: Ensemble, topology: Any, n: int = 100, generator: torch.Generator | None = None
) -> mdtraj.Trajectory:
    """n equally likely structures, turned and moved onto the first by the backbone (heavy atoms where there is none).

    Args:
        ensemble, topology, n, generator: as in `view`.
    """
    positions = ensemble.resampled(n, generator=generator or torch.Generator().manual_seed(0))
    frames = to_mdtraj(positions, topology)
    for choice in ("backbone", "element != H", "all"):
        atoms = frames.topology.select(choice)
        if len(atoms) >= 3:
            break
    return frames.superpose(frames, 0, atom_indices=atoms)


def _widget(groups: list[tuple[str, mdtraj.Trajectory, str]]) -> NGLWidget:
    """A widget with one component for each (label, structures, colour)."""
    import nglview

    widget = nglview.NGLWidget()
    for label, frames, color in groups:
        structure = nglview.TextStructure(_pdb(frames), ext="pdb")
        component = widget.add_structure(structure, name=label, default_representation=False)
        style = {"color_scheme": "element"} if color == "element" else {"color": color}
        component.add_representation("licorice", radius=0.04, multiple_bond="off", **style)
    widget.center()
    return widget


def _pdb(frames: mdtraj.Trajectory) -> str:
    """All structures as the models of one PDB text."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "models.pdb")
        frames.save_pdb(path)
        with open(path, encoding="ascii") as file:
            return file.read()
