"""Constraints: lengths hold, nothing but the constraints' own directions moves, and failures are said."""

import math

import numpy as np
import openmm
import pytest
import torch
from molecules import butane, seeded
from openmm import app, unit

from openmm_tsf import constraints as module
from openmm_tsf.constraints import ConstraintError, Constraints
from openmm_tsf.systems import alanine_dipeptide

WALKERS = 40


def of_system(system):
    rows = [system.getConstraintParameters(i) for i in range(system.getNumConstraints())]
    masses = [system.getParticleMass(i)._value for i in range(system.getNumParticles())]
    return [(i, j) for i, j, _ in rows], [row[2]._value for row in rows], masses


def of_molecule(molecule):
    lengths = molecule.constraints or {
        (i, j): float(np.linalg.norm(molecule.positions[i] - molecule.positions[j])) for i, j in molecule.bonds
    }
    return list(lengths), list(lengths.values()), molecule.masses.tolist(), torch.tensor(molecule.positions)


def water():
    """Rigid, one of two molecules turned against the other."""
    force_field = app.ForceField("tip3p.xml")
    modeller = app.Modeller(app.Topology(), [] * unit.nanometer)
    modeller.addSolvent(force_field, numAdded=2)
    system = force_field.createSystem(modeller.topology)
    return *of_system(system), torch.tensor(np.array(modeller.positions._value, dtype=float))


def methane():
    """All ten distances of a tetrahedron and its centre: one more than there are degrees of freedom."""
    x = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) * 0.109 / math.sqrt(3.0)
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    return pairs, [float((x[i] - x[j]).norm()) for i, j in pairs], [12.011, *[1.008] * 4], x


def trimer(middle=12.0, angle=110.0):
    x = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1 - math.cos(math.radians(angle)), math.sin(math.radians(angle)), 0]])
    return [(0, 1), (1, 2)], [0.15, 0.15], [12.0, middle, 12.0], 0.15 * x


CASES = {
    "ala2, X-H": lambda: of_molecule(alanine_dipeptide("vacuum", constraints="HBonds")),
    "ala2, all bonds": lambda: of_molecule(alanine_dipeptide("vacuum", constraints="AllBonds")),
    "ala2, X-H and angles": lambda: of_molecule(alanine_dipeptide("vacuum", constraints=app.HAngles)),
    "butane, all bonds": lambda: of_molecule(butane()),
    "water": water,
    "methane": methane,
    "trimer": trimer,
    "sharp trimer, light middle": lambda: trimer(0.5, 40.0),
}


@pytest.fixture(params=CASES)
def case(request):
    """(pairs, lengths, masses), positions (A, 3, W) near the lengths, velocities (A, 3, W)."""
    pairs, lengths, masses, x = CASES[request.param]()
    g = seeded(3)
    x = x[..., None] + 0.004 * torch.randn(*x.shape, WALKERS, generator=g)
    v = torch.randn(x.shape, generator=g) * (2.5 / torch.tensor(masses)).sqrt()[:, None, None]
    return (pairs, lengths, masses), x, v


def stretch(spec, x):
    """Relative errors of lengths (C, W)."""
    i, j = torch.tensor(spec[0]).T
    return (x[j] - x[i]).norm(dim=1) / torch.tensor(spec[1], dtype=x.dtype)[:, None] - 1.0


def along(spec, v, x):
    """Velocities along unit vectors of the constraints (C, W) [nm/ps]."""
    i, j = torch.tensor(spec[0]).T
    d = x[j] - x[i]
    return ((v[j] - v[i]) * d / d.norm(dim=1, keepdim=True)).sum(1)


def shake(spec, x, reference, sweeps=5000):
    """One constraint after the other until all hold: the textbook, as an oracle for one walker (A, 3)."""
    x, (pairs, lengths, masses) = x.clone(), spec
    for _ in range(sweeps):
        for (i, j), length in zip(pairs, lengths, strict=True):
            r, d = reference[j] - reference[i], x[j] - x[i]
            step = (length**2 - d @ d) / (2.0 * (r @ d) * (1.0 / masses[i] + 1.0 / masses[j]))
            x[i] -= step * r / masses[i]
            x[j] += step * r / masses[j]
        if float(stretch(spec, x[..., None]).abs().max()) < 1e-13:
            return x
    raise AssertionError("the oracle did not converge")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 2e-6)])
def test_lengths_hold(case, dtype, bound):
    spec, x, v = case
    x, v = x.to(dtype), v.to(dtype)
    constraints = Constraints(*spec, dtype=dtype)
    reference = constraints.positions(x, x)
    assert float(stretch(spec, x).abs().max()) > 1e-3
    assert float(stretch(spec, reference).abs().max()) < bound
    moved = reference + 0.002 * v
    assert float(stretch(spec, moved).abs().max()) > 1e-3
    assert float(stretch(spec, constraints.positions(moved, reference)).abs().max()) < bound


def test_same_as_textbook_shake(case):
    spec, x, v = case
    constraints = Constraints(*spec, dtype=torch.float64, tolerance=1e-13)
    reference = constraints.positions(x, x)
    moved = reference + 0.002 * v
    found = constraints.positions(moved, reference)
    for walker in range(3):
        wanted = shake(spec, moved[..., walker], reference[..., walker])
        assert float((found[..., walker] - wanted).abs().max()) < 1e-11


def test_velocities_are_projected(case):
    spec, x, v = case
    masses = torch.tensor(spec[2])[:, None, None]
    constraints = Constraints(*spec, dtype=torch.float64, tolerance=1e-13)
    x = constraints.positions(x, x)
    projected = constraints.velocities(v, x)
    removed = v - projected
    assert float(along(spec, v, x).abs().max()) > 1.0
    assert float(along(spec, projected, x).abs().max()) < 1e-9
    # orthogonal in the metric of the masses, and an inner force: neither momentum nor angular momentum change
    assert float((masses * removed * projected).sum((0, 1)).abs().max()) < 1e-9
    assert float((masses * removed).sum(0).abs().max()) < 1e-10
    assert float((masses * torch.linalg.cross(x, removed, dim=1)).sum(0).abs().max()) < 1e-10
    assert float((constraints.velocities(projected, x) - projected).abs().max()) < 1e-10


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 2e-7), (torch.float32, 1e-3)])
def test_velocities_to_the_default_tolerance(case, dtype, bound):
    spec, x, v = case
    x, v = x.to(dtype), v.to(dtype)
    constraints = Constraints(*spec, dtype=dtype)
    x = constraints.positions(x, x)
    assert float(along(spec, constraints.velocities(v, x), x).abs().max()) < bound


@pytest.mark.parametrize(("make", "newton"), [(CASES["ala2, X-H"], False), (lambda: trimer(0.5, 40.0), True)])
def test_newton_steps_in_only_where_needed(monkeypatch, make, newton):
    calls = []
    solve = torch.linalg.solve_ex
    monkeypatch.setattr(torch.linalg, "solve_ex", lambda *args: calls.append(args) or solve(*args))
    *spec, x = make()
    x = x[..., None] + 0.002 * torch.randn(*x.shape, WALKERS, generator=seeded(4))
    constraints = Constraints(*spec, dtype=torch.float64)
    assert float(stretch(spec, constraints.positions(x, x)).abs().max()) < 1e-9
    assert bool(calls) == newton


def test_few_iterations_for_hydrogens(monkeypatch):
    """What the speed rests on: CH3 groups need four iterations in single precision."""
    *spec, x = CASES["ala2, X-H"]()
    constraints = Constraints(*spec, dtype=torch.float32)
    reference = (x[..., None] + 0.004 * torch.randn(*x.shape, 500, generator=seeded(5))).float()
    reference = constraints.positions(reference, reference)
    v = torch.randn(reference.shape, generator=seeded(6), dtype=torch.float32)
    v *= (5.0 / torch.tensor(spec[2], dtype=torch.float32)).sqrt()[:, None, None]
    monkeypatch.setattr(module, "MOST_ITERATIONS", 5)  # the last of which only looks
    monkeypatch.setattr(torch.linalg, "solve_ex", None)
    constraints.positions(reference + 0.002 * constraints.velocities(v, reference), reference)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_a_lost_walker_does_not_spoil_the_others(case, bad):
    spec, x, v = case
    constraints = Constraints(*spec, dtype=torch.float64)
    reference = constraints.positions(x, x)
    moved = reference + 0.002 * v
    moved[1, 0, 5] = bad
    v[1, 0, 5] = bad
    shift = constraints.position_shift(moved, constraints.directions(reference))
    others = torch.arange(WALKERS) != 5
    assert float(stretch(spec, (moved + shift)[..., others]).abs().max()) < 1e-9
    assert not bool((stretch(spec, (moved + shift)[..., [5]]).abs() < 1e-3).all())
    if not math.isfinite(bad):
        projected = constraints.velocities(v, reference)
        assert float(along(spec, projected, reference)[:, others].abs().max()) < 1e-6


def test_what_cannot_be_met_is_said():
    *spec, x = CASES["ala2, X-H"]()
    constraints = Constraints(*spec, dtype=torch.float64)
    x = x[..., None].repeat(1, 1, 20)
    moved = x.clone()
    i, j = spec[0][3]  # N-H, alone
    for walker in (3, 11):  # turned by 90 degrees: no way back along the old direction
        d = x[j, :, walker] - x[i, :, walker]
        across = torch.linalg.cross(d, torch.tensor([0.3, 0.5, 0.8]))
        moved[j, :, walker] = x[i, :, walker] + 0.2 * across / across.norm()
    with pytest.raises(ConstraintError, match=rf"in 2 of 20 walkers \(3, 11; atoms {i} and {j} of walker 3, for one\)"):
        constraints.positions(moved, x)


@pytest.mark.parametrize(
    ("pairs", "lengths", "message"),
    [
        ([(0, 3)], [0.1], "between atoms 0 and 3 is not between two of the 3 atoms"),
        ([(-1, 1)], [0.1], "is not between two of the 3 atoms"),
        ([(1, 1)], [0.1], "is not between two of the 3 atoms"),
        ([(0, 1), (1, 0)], [0.1, 0.1], "between atoms 1 and 0 is there twice"),
        ([(0, 1)], [0.0], "has length 0 nm"),
        ([(0, 1)], [math.nan], "has length nan nm"),
        ([(1, 2)], [0.1], "between atoms 1 and 2 involves a particle without mass"),
        ([(0, 1)], [0.1, 0.1], "zip"),
    ],
)
def test_refusals(pairs, lengths, message):
    with pytest.raises(ValueError, match=message):
        Constraints(pairs, lengths, [1.0, 1.0, 0.0])


def test_precision_is_refused_where_it_is_not_to_be_had():
    with pytest.raises(ValueError, match=r"tolerance 1e-08 is below the precision of torch\.float32"):
        Constraints([(0, 1)], [0.1], [1.0, 1.0], tolerance=1e-8)
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ValueError, match=r"call torch\.set_float32_matmul_precision\('highest'\)"):
            Constraints([(0, 1)], [0.1], [1.0, 1.0])
        Constraints([(0, 1)], [0.1], [1.0, 1.0], dtype=torch.float64)
        Constraints([], [], [1.0, 1.0])
    finally:
        torch.set_float32_matmul_precision("highest")


def test_same_lengths_as_openmm():
    """OpenMM's own applyConstraints moves along the current directions too, to its own tolerance."""
    molecule = alanine_dipeptide("vacuum", constraints="HBonds")
    integrator = openmm.VerletIntegrator(0.001)
    context = openmm.Context(molecule.system, integrator, openmm.Platform.getPlatformByName("Reference"))
    x = molecule.positions + np.random.default_rng(1).normal(scale=0.003, size=molecule.positions.shape)
    context.setPositions(x)
    context.applyConstraints(1e-12)
    wanted = context.getState(positions=True).getPositions(asNumpy=True)._value
    constraints = Constraints(*of_system(molecule.system), dtype=torch.float64, tolerance=1e-13)
    x = torch.tensor(x)[..., None]
    assert np.abs(constraints.positions(x, x)[..., 0].numpy() - wanted).max() < 1e-10
