"""Alanine dipeptide with given phi and psi, and ensembles made of such poses, for tests of what is looked at."""

import math

import numpy as np
import torch

from openmm_tsf.analysis import phi_psi
from openmm_tsf.ensemble import Ensemble
from openmm_tsf.units import kT

PHI_AXIS, PSI_AXIS = (6, 8), (8, 14)


def pose(molecule, phi: np.ndarray, psi: np.ndarray) -> np.ndarray:
    """Positions (N, 22, 3) [nm] of alanine dipeptide with these torsions (N,) [rad], the rest as in the reference."""
    start_phi, start_psi = phi_psi(molecule.positions[None], molecule)
    frames = np.repeat(molecule.positions[None], len(phi), 0)
    frames = _turned(frames, PHI_AXIS, np.asarray(phi) - start_phi)
    return _turned(frames, PSI_AXIS, np.asarray(psi) - start_psi)


def _turned(frames: np.ndarray, axis: tuple[int, int], angle: np.ndarray) -> np.ndarray:
    """Atoms after the end of the axis, turned about it."""
    origin = frames[:, axis[1]][:, None]
    unit = origin - frames[:, axis[0]][:, None]
    unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
    arm = frames[:, axis[1] + 1 :] - origin
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    along = (arm * unit).sum(-1, keepdims=True) * unit
    turned = along + cos * (arm - along) + sin * np.cross(np.broadcast_to(unit, arm.shape), arm)
    return np.concatenate([frames[:, : axis[1] + 1], origin + turned], 1)


def posed_ensemble(
    molecule, n: int = 2000, temperature: float = 300.0, seed: int = 0, left: float = 0.02, **changes
) -> Ensemble:
    """Poses about beta, alpha_R and (a share `left`) alpha_L, energies and imperfect densities to go with them."""
    rng = np.random.default_rng(seed)
    centre = np.radians([[60.0, 40.0], [-75.0, -20.0], [-75.0, 150.0], [-150.0, 155.0]])
    basin = rng.choice(4, n, p=[left, 0.3 - left, 0.4, 0.3])
    angles = centre[basin] + math.sqrt(temperature / 300.0) * 0.25 * rng.standard_normal((n, 2))
    energy = -100.0 + kT(temperature) * rng.gamma(20.0, 1.0, n)
    log_prob = -energy / kT(temperature) + 0.6 * rng.standard_normal(n)
    positions = torch.as_tensor(pose(molecule, *angles.T))
    values = {"temperature": temperature, "n_rejected": n // 100} | changes
    return Ensemble(positions, torch.as_tensor(energy), torch.as_tensor(log_prob), **values)
