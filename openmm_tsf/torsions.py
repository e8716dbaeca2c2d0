"""Backbone torsions of frames, the basins they fall into, and passages between these.

Angles are in rad on [-pi, pi], IUPAC sign.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mdtraj
import numpy as np
import torch
from torch import Tensor

from . import geometry

ALPHA_LEFT = (0.0, 2.4)
"""Bounds of phi [rad]; phi > 0 alone would count beta wrapped past 180 degrees too."""
ALPHA_RIGHT = (math.radians(-120.0), math.radians(50.0))
"""Bounds of psi [rad] outside alpha_L."""
CORE_LEFT, CORE_RIGHT = (0.5, 2.0), (-2.8, -0.5)
BASINS = ("alpha_L", "alpha_R", "beta")
CHUNK = 65_536


def backbone(topology: Any, residue: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Atom indices (4,) of phi and psi of one residue.

    Args:
        topology: an `openmm.app.Topology`, an `mdtraj.Topology` or a Molecule.
        residue: counts the residues that have both torsions, from 0.

    Raises:
        ValueError: the molecule has no such residue.
    """
    topology = getattr(topology, "mdtraj_topology", topology)
    if not isinstance(topology, mdtraj.Topology):
        topology = mdtraj.Topology.from_openmm(topology)
    from mdtraj.geometry.dihedral import indices_phi, indices_psi

    psi_of = {tuple(map(int, quartet[:3])): tuple(map(int, quartet)) for quartet in indices_psi(topology)}
    phis = [tuple(map(int, quartet)) for quartet in indices_phi(topology)]
    pairs = [(quartet, psi_of[quartet[1:]]) for quartet in phis if quartet[1:] in psi_of]
    if not 0 <= residue < len(pairs):
        raise ValueError(f"the molecule has {len(pairs)} residues with both phi and psi; asked for number {residue}")
    return pairs[residue]


def dihedrals(positions: Tensor | np.ndarray, quartet: Sequence[int]) -> np.ndarray:
    """Torsion angles (N,) [rad] of four atoms in positions (N, A, 3)."""
    atoms = positions[:, list(quartet)]  # a copy, so arrays may be read-only
    atoms = atoms if isinstance(atoms, Tensor) else torch.as_tensor(atoms)
    index = torch.arange(4)[None]
    parts = [geometry.dihedrals(part.double(), index)[:, 0] for part in atoms.split(CHUNK)]
    return torch.cat(parts).numpy()


def phi_psi(positions: Tensor | np.ndarray, topology: Any, residue: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """phi and psi (N,) [rad] of one residue; arguments as in `backbone`."""
    phi, psi = backbone(topology, residue)
    return dihedrals(positions, phi), dihedrals(positions, psi)


def alpha_left(phi: np.ndarray) -> np.ndarray:
    """Which angles [rad] lie in alpha_L: 0 < phi < 2.4."""
    return (phi > ALPHA_LEFT[0]) & (phi < ALPHA_LEFT[1])


def basins(phi: np.ndarray, psi: np.ndarray) -> np.ndarray:
    """Basin (N,) of each pair of angles [rad], an index into `BASINS`.

    alpha_L: 0 < phi < 2.4 rad; alpha_R: elsewhere with -120 < psi < 50 degrees; beta (C5, PII, C7eq): the rest.
    """
    right = (psi > ALPHA_RIGHT[0]) & (psi < ALPHA_RIGHT[1])
    return np.where(alpha_left(phi), 0, np.where(right, 1, 2))


def count_transitions(phi: np.ndarray, n_walkers: int = 1) -> int:
    """Passages from the core 0.5 < phi < 2.0 rad to the core -2.8 < phi < -0.5 or back.

    Args:
        phi: (N,) [rad] of time-major frames: row = time * n_walkers + walker.
        n_walkers: each is followed by itself.
    """
    core = np.where((phi > CORE_LEFT[0]) & (phi < CORE_LEFT[1]), 1, 0)
    core = np.where((phi > CORE_RIGHT[0]) & (phi < CORE_RIGHT[1]), -1, core).reshape(-1, n_walkers)
    return sum(int(np.count_nonzero(np.diff(walker[walker != 0]))) for walker in core.T)
