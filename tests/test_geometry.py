"""Angles and torsions against mdtraj, numpy and a plain construction."""

import math

import mdtraj
import numpy as np
import pytest
import torch
from molecules import place

from openmm_tsf import geometry


def columns(n: int, batch: int, seed: int) -> torch.Tensor:
    """Random vectors, component first."""
    return torch.randn(3, n, batch, generator=torch.Generator().manual_seed(seed))


def test_dot_cross_and_unit_are_those_of_numpy():
    a, b = columns(4, 5, 1), columns(4, 5, 2)
    x, y = a.permute(1, 2, 0).numpy(), b.permute(1, 2, 0).numpy()
    assert np.allclose(geometry.dot(a, b), (x * y).sum(-1), atol=1e-14)
    assert np.allclose(geometry.cross(a, b).permute(1, 2, 0), np.cross(x, y), atol=1e-14)
    assert np.allclose(geometry.unit(a).permute(1, 2, 0), x / np.linalg.norm(x, axis=-1, keepdims=True), atol=1e-14)


def test_cos_angle_of_known_angles():
    u = torch.tensor([[1.0, 0.0, 0.0]]).T[:, :, None]
    for degrees in (0.0, 1e-3, 30.0, 90.0, 150.0, 180.0):
        a = math.radians(degrees)
        v = 2.5 * torch.tensor([[math.cos(a), math.sin(a), 0.0]]).T[:, :, None]
        assert abs(float(geometry.cos_angle(u, v)) - math.cos(a)) < 1e-14


@pytest.mark.parametrize("angle", [-7.5, -math.pi, -3.0, 0.0, 1.0, math.pi, 3.2, 100.0])
def test_wrap_keeps_the_angle_and_the_range(angle):
    wrapped = float(geometry.wrap(torch.tensor(angle)))
    assert -math.pi <= wrapped < math.pi
    assert abs(math.remainder(wrapped - angle, geometry.TWO_PI)) < 1e-12


def test_torsions_equal_the_construction_with_their_sign():
    a, b, c = np.array([0.1, 0.0, 0.3]), np.array([0.0, 0.1, 0.0]), np.array([0.15, 0.12, -0.02])
    for degrees in (-179.0, -120.0, -60.0, -1e-4, 0.0, 59.0, 90.0, 179.9):
        d = place(a, b, c, 0.13, 105.0, degrees)
        found = geometry.dihedrals(torch.tensor(np.array([a, b, c, d]))[None], torch.tensor([[0, 1, 2, 3]]))
        assert abs(math.degrees(float(found)) - degrees) < 1e-9


def test_torsions_equal_those_of_mdtraj():
    x = np.random.default_rng(3).normal(size=(50, 6, 3)).astype(np.float32)
    quartets = [[0, 1, 2, 3], [5, 2, 0, 4], [1, 3, 5, 0]]
    topology = mdtraj.Topology()
    residue = topology.add_residue("X", topology.add_chain())
    for _ in range(6):
        topology.add_atom("C", mdtraj.element.carbon, residue)
    theirs = mdtraj.compute_dihedrals(mdtraj.Trajectory(x, topology), quartets)
    ours = geometry.dihedrals(torch.tensor(x, dtype=torch.float64), torch.tensor(quartets))
    assert float(geometry.wrap(ours - torch.tensor(theirs)).abs().max()) < 2e-4  # mdtraj works in single precision


def test_torsions_have_the_right_gradient():
    x = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(4), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: geometry.dihedrals(x, torch.tensor([[0, 1, 2, 3]])), x)
