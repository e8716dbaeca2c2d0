"""BatchedEnergy: every term and whole molecules against OpenMM, the laws, bad configurations, bad input, and trust."""

import copy
import inspect
import json
import math
import os
import pickle
import re
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from forcefields import (
    EXCLUSIONS,
    EXPRESSIONS,
    OPTIONAL,
    PERIODIC,
    SUPPORTED,
    TABLES,
    TERMS,
    UNSUPPORTED,
    WHOLE,
    WHOLE_OPTIONAL,
    N,
    built,
    chained_gb,
    custom_angles,
    custom_bonds,
    custom_external,
    custom_nonbonded,
    everything,
    gbsa_obc,
    harmonic_bonds,
    hot_frames,
    missing_atoms,
    mixture,
    nonbonded,
    openmm_says,
    other_breakage,
    packings,
    singles_gb,
    system_of,
    tiny,
)
from laws import independent
from openmm import unit

from openmm_tsf.energy import BatchedEnergy, agreement, batched, compiled
from openmm_tsf.energy.terms import read_system
from openmm_tsf.energy.unsupported import UnsupportedForce
from openmm_tsf.systems import alanine_dipeptide

ABSOLUTE = {torch.float64: 1e-6, torch.float32: 2e-3}  # kJ/mol
RELATIVE = {torch.float64: 1e-9, torch.float32: 1e-5}
FORCE = {torch.float64: 1e-8, torch.float32: 1e-4}  # of the largest force of a frame
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
KINDS = [*TERMS, *WHOLE, "everything"]
FEWER = [*TERMS, "ala2, ff96-obc1", "alanines, ff14SB, GBn2", "alanines, ff19SB with CMAP", "everything"]
TINY = 1e-5  # GiB


@cache
def system_named(kind: str) -> openmm.System:
    if kind == "everything":
        return everything()
    for whole in (WHOLE, WHOLE_OPTIONAL):
        if kind in whole:
            molecule = whole[kind]()
            return (molecule if not isinstance(molecule, tuple) else molecule[0]()).system
    return built(TERMS[kind])


@cache
def engine(kind: str) -> BatchedEnergy:
    """The eager engine of a System by name, shared by tests: ask it for differences of its counters only."""
    return BatchedEnergy(system_named(kind), compile=False)


@cache
def frames_named(kind: str) -> np.ndarray:
    """Twenty to twenty-four frames (B, A, 3) [nm]: plain, perturbed, clashing and far apart."""
    frames = mixture(hot_frames(kind) if kind in WHOLE or kind in WHOLE_OPTIONAL else packings(N, 6))
    frames.flags.writeable = False
    return frames


def calm(kind: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The first half of the frames: no clashes, nothing far apart."""
    frames = frames_named(kind)
    return torch.tensor(frames[: len(frames) // 2], dtype=dtype)


def disagreement(energies: np.ndarray, forces: np.ndarray, expected: tuple, dtype: torch.dtype) -> str:
    """What is further from OpenMM than it may be; empty if nothing is."""
    bound = ABSOLUTE[dtype] + RELATIVE[dtype] * np.abs(expected[0])
    off = np.abs(energies - expected[0])
    scale = np.abs(expected[1]).max((1, 2))
    force_off = np.abs(forces - expected[1]).max((1, 2))
    words = []
    for row in np.flatnonzero(~(off <= bound)):
        words.append(f"frame {row}: U {energies[row]:.9g}, OpenMM {expected[0][row]:.9g}, off by {off[row]:.1e}")
    for row in np.flatnonzero(~(force_off <= FORCE[dtype] * scale + 1e-12)):
        words.append(f"frame {row}: forces off by {force_off[row]:.1e}, largest {scale[row]:.1e}")
    return "; ".join(words)


def agrees(system: openmm.System, energy: BatchedEnergy, positions: np.ndarray, dtype: torch.dtype, **options) -> None:
    """Energies, forces and gradients are OpenMM's, for the positions as the dtype has them."""
    x = torch.tensor(positions, dtype=dtype)
    expected = openmm_says(system, x.double().numpy(), **options)
    assert np.isfinite(expected[0]).all(), "choose other frames"
    energies, forces = energy.forces(x)
    wrong = disagreement(energies, forces, expected, dtype)
    assert not wrong, wrong
    x.requires_grad_()
    u = energy(x)
    (gradient,) = torch.autograd.grad(u.sum(), x)
    assert u.dtype == gradient.dtype == dtype
    wrong = disagreement(u.detach().double().numpy(), -gradient.double().numpy(), expected, dtype)
    assert not wrong, f"differentiated by the caller: {wrong}"


# --- equal to OpenMM --------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_equals_openmm(kind, dtype):
    positions = frames_named(kind)
    if dtype == torch.float64:
        assert np.ptp(openmm_says(system_named(kind), positions[:5])[0]) > 1.0, "frames that differ show a mix-up"
    agrees(system_named(kind), engine(kind), positions, dtype)


def test_the_comparison_can_fail():
    """A Coulomb constant of 138.935456 is off by 1e-8, charges by half of that."""
    system = system_named("NonbondedForce")
    other = openmm.XmlSerializer.clone(system)
    force = other.getForce(0)
    for i in range(N):
        charge, sigma, epsilon = force.getParticleParameters(i)
        force.setParticleParameters(i, charge * (1 + 6e-9), sigma, epsilon)
    expected = openmm_says(other, frames_named("NonbondedForce"))
    energies, forces = engine("NonbondedForce").forces(frames_named("NonbondedForce"))
    assert "off by" in disagreement(energies, forces, expected, torch.float64)
    scaled = (energies * (1 + 3e-5), forces * (1 + 2e-4))
    assert "forces off" in disagreement(*scaled, (energies, forces), torch.float32)


CHARMM = pytest.param("alanines, CHARMM36", marks=pytest.mark.slow)  # seconds to read its files


@pytest.mark.parametrize("kind", [*OPTIONAL, "alanines, ff14SB, GBn2, cutoff", CHARMM])
def test_right_or_refused_by_name(kind):
    """What need not have a batched form either has a right one or says so; nothing in between."""
    if kind in OPTIONAL:
        build, words = OPTIONAL[kind]
        system, positions = built(build), mixture(packings(N, 6))
    else:
        build, words = WHOLE_OPTIONAL[kind]
        system, positions = build().system, frames_named(kind)
    try:
        energy = BatchedEnergy(system, compile=False)
    except UnsupportedForce as error:
        assert re.search(rf"(?is){words}.*use OpenMMEnergy$", str(error)), error
        return
    agrees(system, energy, positions, torch.float64)
    agrees(system, energy, positions, torch.float32)


@pytest.mark.parametrize("switch", [0.0, 0.35])
@pytest.mark.parametrize("dielectric", [1.0, 78.3])
def test_pairs_on_both_sides_of_the_cutoff(switch, dielectric):
    """The energy jumps at the cutoff where nothing switches it off; a pair beyond it counts as nothing."""
    force = openmm.NonbondedForce()
    force.addParticle(0.7, 0.3, 1.1)
    force.addParticle(-0.4, 0.33, 0.6)
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffNonPeriodic)
    force.setCutoffDistance(0.5)
    force.setReactionFieldDielectric(dielectric)
    force.setUseSwitchingFunction(switch > 0)
    force.setSwitchingDistance(switch)
    system = system_of(force, n_atoms=2)
    distances = [0.2, 0.35 - 1e-7, 0.35 + 1e-7, 0.42, 0.5 - 1e-3, 0.5 - 1e-9, 0.5 + 1e-9, 0.51, 3.0]
    direction = np.array([0.6, -0.48, 0.64])
    positions = np.array([[[0.1, 0.2, 0.3], [0.1, 0.2, 0.3] + r * direction] for r in distances])
    energy = BatchedEnergy(system, positions, compile=False)
    agrees(system, energy, positions, torch.float64)
    energies, forces = energy.forces(positions)
    assert not energies[-3:].any()
    assert not forces[-3:].any()
    assert np.abs(forces[5]).max() > 1e-3


@pytest.mark.parametrize("kind", ["everything", "two of a kind", "ala2, ff96-obc1"])
def test_term_energies_are_those_of_the_forces_of_openmm(kind):
    system, x = openmm.XmlSerializer.clone(system_named(kind)), calm(kind)
    terms = engine(kind).term_energies(x)
    assert torch.allclose(sum(terms.values()), engine(kind)(x), rtol=1e-12, atol=1e-9)
    assert all(values.shape == (len(x),) for values in terms.values())
    classes = sorted({type(force).__name__ for force in system.getForces()})
    for force in system.getForces():
        force.setForceGroup(classes.index(type(force).__name__))
    for group, name in enumerate(classes):
        expected = openmm_says(system, x.numpy(), groups=1 << group)[0]
        found = sum((u.numpy() for label, u in terms.items() if label.startswith(name)), np.zeros(len(x)))
        assert np.abs(found - expected).max() < 1e-6 + 1e-9 * np.abs(expected).max(), name
    assert not [label for label in terms if "CMMotionRemover" in label]


def test_no_force_and_no_energy():
    for forces in ([], [openmm.CMMotionRemover()], [openmm.HarmonicBondForce(), openmm.CMAPTorsionForce()]):
        energy = BatchedEnergy(system_of(*forces), compile=False)
        x = torch.tensor(packings(N, 3)).requires_grad_()
        u = energy(x)
        assert torch.equal(u, torch.zeros(3))
        assert not energy.forces(x)[1].any()
        u.sum().backward()
        assert not x.grad.any()


@pytest.mark.parametrize("build", [nonbonded, custom_nonbonded, gbsa_obc, chained_gb], ids=lambda build: build.__name__)
@pytest.mark.parametrize("n_atoms", [1, 2])
def test_one_atom_and_two(build, n_atoms):
    """With one atom there are no pairs."""
    system = system_of(build(n_atoms=n_atoms), n_atoms=n_atoms)
    agrees(system, BatchedEnergy(system, compile=False), packings(n_atoms, 4), torch.float64)


def test_nearly_linear_angles():
    """arccos of a rounded cosine would be off by 1e-8 rad near a straight angle, and its slope by everything."""
    force = openmm.HarmonicAngleForce()
    force.addAngle(0, 1, 2, 2.0, 500.0)
    system = system_of(force, n_atoms=3)
    turned = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]
    bends = [0.1, 1e-2, 1e-3, 1e-4]
    bent = [[[0.15, 0.0, 0.0], [0.0, 0.0, 0.0], [-0.14 * math.cos(b), 0.14 * math.sin(b), 0.0]] for b in bends]
    energy = BatchedEnergy(system, np.array(bent) @ turned, compile=False)
    agrees(system, energy, np.array(bent) @ turned, torch.float64)
    straight = np.array([[[0.15, 0.0, 0.0], [0.0, 0.0, 0.0], [-0.14, 0.0, 0.0]]])
    energies, forces = energy.forces(straight)
    assert np.isfinite(forces).all()
    assert energies[0] == np.inf or energies[0] == pytest.approx(openmm_says(system, straight)[0][0], abs=1e-4)


# --- global parameters ------------------------------------------------------------------------------------------------

GLOBALS = {
    "scale": 0.4,
    "stiffness": 0.9,
    "bend": -2.0,
    "tilt": 1.0,
    "pull": 0.1,
    "lambda_electrostatics": 0.2,
    "lambda_sterics": 1.0,
    "strength": 20.0,
    "screening": 5.0,
    "softness": 0.1,
}


@pytest.mark.parametrize("name", GLOBALS)
def test_global_parameters_are_honoured(name):
    positions = frames_named("everything")[:6]
    changed = {name: GLOBALS[name]}
    energy = BatchedEnergy(system_named("everything"), parameters=changed, compile=False)
    agrees(system_named("everything"), energy, positions, torch.float64, parameters=changed)
    assert np.abs(energy.forces(positions)[0] - engine("everything").forces(positions)[0]).max() > 1e-2


def test_all_global_parameters_at_once_and_in_copies():
    positions = frames_named("everything")[:6]
    energy = BatchedEnergy(system_named("everything"), parameters=GLOBALS, compile=False)
    for version in (energy, copy.deepcopy(energy), pickle.loads(pickle.dumps(energy))):
        agrees(system_named("everything"), version, positions, torch.float64, parameters=GLOBALS)


def test_one_parameter_of_two_forces():
    system = system_of(custom_bonds(), custom_nonbonded(EXCLUSIONS))
    system.getForce(1).setGlobalParameterDefaultValue(0, 1.7)
    positions = packings(N, 4)
    for parameters in ({}, {"scale": 0.3}):
        energy = BatchedEnergy(system, parameters=parameters, compile=False)
        agrees(system, energy, positions, torch.float64, parameters=parameters)
    system.getForce(1).setGlobalParameterDefaultValue(0, 0.7)  # OpenMM makes no Context of that
    with pytest.raises((ValueError, openmm.OpenMMException), match="scale"):
        BatchedEnergy(system, compile=False)


@pytest.mark.parametrize("names", ["r0 depth a", "far", "r", "theta x y", "q s", "I B C", "s1 q2 B1 r2"])
def test_global_parameters_of_one_force_mean_nothing_to_another(names):
    """Parameters, intermediates, values and coordinates of other forces have these names too."""
    force = openmm.CustomExternalForce(" + ".join(names.split()))
    for name in names.split():
        force.addGlobalParameter(name, 7.7)
    force.addParticle(3, [])
    forces = [custom_bonds(), harmonic_bonds(), custom_angles(), chained_gb()]
    if set(names.split()) & {"x", "y"}:  # coordinates of this very force
        force = openmm.CustomBondForce(" + ".join([*names.split(), "r"]))
        for name in names.split():
            force.addGlobalParameter(name, 7.7)
        force.addBond(0, 1, [])
        forces.append(custom_external())
    system = system_of(force, *forces)
    agrees(system, BatchedEnergy(system, compile=False), packings(N, 4), torch.float64)


def test_unknown_global_parameters_are_refused():
    with pytest.raises(ValueError, match=r"(?s)lambda_restraints.*lambda_sterics"):
        BatchedEnergy(system_named("everything"), parameters={"lambda_restraints": 1.0})
    with pytest.raises(ValueError, match="lambda_sterics"):
        BatchedEnergy(system_named("HarmonicBondForce"), parameters={"lambda_sterics": 1.0})


# --- the laws ---------------------------------------------------------------------------------------------------------


def along(x: torch.Tensor, seed: int = 4) -> torch.Tensor:
    """A direction of unit length for each row."""
    d = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    return d / d.flatten(1).norm(dim=1)[:, None, None]


@pytest.mark.parametrize("kind", FEWER)
def test_gradient_is_minus_force_and_a_finite_difference(kind):
    x, h = calm(kind), 1e-6
    d = along(x)
    energy = engine(kind)
    x.requires_grad_()
    weights = torch.linspace(0.5, 2.0, len(x))
    (gradient,) = torch.autograd.grad((energy(x) * weights).sum(), x)
    x = x.detach()
    forces = torch.from_numpy(energy.forces(x)[1])
    assert torch.allclose(gradient, -weights[:, None, None] * forces, rtol=1e-9, atol=1e-9 * float(forces.abs().max()))
    difference = (energy(x + h * d) - energy(x - h * d)) / (2 * h)
    scale = forces.flatten(1).norm(dim=1)
    assert ((difference + (forces * d).sum((1, 2))).abs() < 1e-5 * scale + 1e-4).all()


@pytest.mark.parametrize("kind", FEWER)
def test_second_derivatives_are_finite_differences_of_forces(kind):
    """The better of two steps counts for each frame, since Born radii have kinks that a step may cross."""
    x = calm(kind)
    d = along(x)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(engine(kind)(x).sum(), x, create_graph=True)
    (product,) = torch.autograd.grad((gradient * d).sum(), x)
    x, errors = x.detach(), []
    for h in (1e-6, 1e-7):
        difference = -(engine(kind).forces(x + h * d)[1] - engine(kind).forces(x - h * d)[1]) / (2 * h)
        errors.append(np.abs(product.numpy() - difference).max((1, 2)))
    error, size = np.minimum(*errors), product.abs().amax((1, 2))
    assert (error < 1e-5 * size.numpy() + 1e-3).all(), error
    assert size.min() > 0.1, "flat frames test nothing"


def test_derivatives_in_every_direction():
    """Of the weights above the energy too, as losses have them."""
    x = torch.tensor(packings(3, 2), requires_grad=True)
    energy = BatchedEnergy(tiny(), compile=False)
    assert torch.autograd.gradcheck(energy, x, rtol=1e-5)
    assert torch.autograd.gradgradcheck(energy, x, rtol=1e-5)


def test_second_derivatives_where_the_force_vanishes():
    """At the minimum, and out of the plane of a flat molecule, forces are zero and second derivatives are not."""
    force = openmm.HarmonicBondForce()
    force.addBond(0, 1, 0.25, 1e4)
    force.addBond(1, 2, 0.2, 1e4)
    system = system_of(force, n_atoms=3)
    energy = BatchedEnergy(system, compile=False)
    x = torch.tensor([[[0.0, 0.0, 0.0], [0.25, 0.0, 0.0], [0.25, 0.5, 0.0]]])
    for row in range(9):
        y = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(y).sum(), y, create_graph=True)
        (column,) = torch.autograd.grad(gradient.flatten()[row], y)
        step = torch.zeros(9)
        step[row] = 1e-6
        step = step.reshape(1, 3, 3)
        difference = -(energy.forces(x + step)[1] - energy.forces(x - step)[1]) / 2e-6
        assert np.abs(column.numpy() - difference).max() < 1e-2, f"coordinate {row}"


@DTYPES
@pytest.mark.parametrize("kind", ["everything", "ala2, ff96-obc1"])
def test_rows_are_independent(kind, dtype):
    x, energy = calm(kind, dtype), engine(kind)
    atol = 1e-12 if dtype == torch.float64 else 2e-6
    independent(energy, x, atol)
    independent(lambda x: torch.from_numpy(energy.forces(x)[1]), x, atol)


@pytest.mark.parametrize("kind", ["everything", "ala2, ff96-obc1"])
@pytest.mark.parametrize("n", [1, 2, 17, 1000])
def test_batches_of_any_size(kind, n):
    x = calm(kind)
    whole = engine(kind).forces(x)
    rows = np.random.default_rng(n).integers(len(x), size=n)
    energies, forces = engine(kind).forces(x[rows])
    assert (energies.shape, forces.shape) == ((n,), (n, x.shape[1], 3))
    assert energies == pytest.approx(whole[0][rows], rel=1e-12)
    assert np.abs(forces - whole[1][rows]).max() < 1e-12 * np.abs(whole[1]).max()


@pytest.mark.parametrize("kind", ["everything", "alanines, ff14SB, OBC2"])
def test_pieces_give_what_the_whole_gives(kind):
    x = calm(kind).repeat(8, 1, 1)
    x += 0.01 * along(x)
    small = BatchedEnergy(system_named(kind), compile=False, memory_limit=TINY)
    whole = engine(kind)
    for a, b in zip(small.forces(x), whole.forces(x), strict=True):
        assert np.abs(a - b).max() < 1e-12 * np.abs(b).max()
    gradients = []
    for energy in (small, whole):
        y = x.clone().requires_grad_()
        weights = torch.linspace(0.5, 2.0, len(x))
        (gradient,) = torch.autograd.grad((energy(y) * weights).sum(), y, create_graph=True)
        (gradient**2).sum().backward()
        gradients.append((gradient.detach(), y.grad))
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() < 1e-11 * b.abs().max()
    assert (small.n_evaluations, small.n_nonfinite) == (2 * len(x), 0)
    columns = x.permute(1, 2, 0).contiguous()
    for a, b in zip(small.evaluate(columns), whole.evaluate(columns), strict=True):
        assert (a - b).abs().max() < 1e-12 * b.abs().max()


def test_pieces_follow_the_memory_limit():
    """A limit that is too small for one frame still serves, and no limit makes sense at or below zero."""
    x = calm("everything")
    energy = BatchedEnergy(system_named("everything"), compile=False, memory_limit=1e-9)
    assert torch.allclose(energy(x), engine("everything")(x), rtol=1e-12)
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="memory_limit"):
            BatchedEnergy(system_named("everything"), compile=False, memory_limit=limit)


@DTYPES
def test_empty_batches(dtype):
    energy, x = engine("everything"), torch.zeros(0, N, 3, dtype=dtype)
    before = energy.n_evaluations
    u = energy(x)
    assert (u.shape, u.dtype) == ((0,), dtype)
    energies, forces = energy.forces(x)
    assert (energies.shape, forces.shape) == ((0,), (0, N, 3))
    assert all(values.shape == (0,) for values in energy.term_energies(x).values())
    energies, forces = energy.evaluate(torch.zeros(N, 3, 0, dtype=dtype))
    assert (energies.shape, forces.shape) == ((0,), (N, 3, 0))
    x.requires_grad_()
    energy(x).sum().backward()
    assert x.grad.shape == (0, N, 3)
    assert energy.n_evaluations == before


# --- how it is asked --------------------------------------------------------------------------------------------------


@DTYPES
def test_dtype_and_graph_follow_the_input(dtype):
    energy, x = engine("everything"), calm("everything", dtype)
    u = energy(x)
    assert (u.dtype, u.requires_grad, u.shape, u.device) == (dtype, False, (len(x),), x.device)
    assert energy(x.requires_grad_()).requires_grad
    with torch.no_grad():
        assert not energy(x).requires_grad
    doubled = (x * 2.0) / 2.0  # no leaf
    (gradient,) = torch.autograd.grad(energy(doubled).sum(), x)
    assert torch.isfinite(gradient).all()
    energies, forces = energy.forces(x)
    assert isinstance(energies, np.ndarray)
    assert isinstance(forces, np.ndarray)


def test_float64_is_float64_whatever_the_default():
    x = calm("everything")
    expected = engine("everything").forces(x)
    torch.set_default_dtype(torch.float32)
    energy = BatchedEnergy(system_named("everything"), compile=False)
    for version in (energy, engine("everything")):
        for a, b in zip(version.forces(x), expected, strict=True):
            assert np.array_equal(a, b)
    assert torch.get_default_dtype() == torch.float32


def test_strides_do_not_matter():
    energy, x = engine("everything"), calm("everything")
    expected, forces = energy(x), energy.forces(x)[1]
    views = {
        "reversed": (x.flip(0)[::2], expected.flip(0)[::2]),
        "batch last": (x.permute(1, 2, 0).contiguous().permute(2, 0, 1), expected),
        "every other": (torch.stack([x, x + 1.0], 1).flatten(0, 1)[::2], expected),
        "expanded": (x[:1].expand(5, -1, -1), expected[:1].expand(5)),
    }
    for name, (view, value) in views.items():
        assert torch.allclose(energy(view), value, rtol=1e-12), name
    leaf = x[:1].clone().requires_grad_()
    energy(leaf.expand(5, -1, -1)).sum().backward()
    assert np.abs(leaf.grad.numpy() + 5 * forces[:1]).max() < 1e-11 * np.abs(forces).max()
    assert np.array_equal(energy.forces(np.asfortranarray(x.numpy()))[1], forces)


def test_without_gradients_and_under_inference_mode():
    energy, x = engine("everything"), calm("everything")
    expected = energy.forces(x)
    columns = x.permute(1, 2, 0).contiguous()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            inside = x.clone()
            for y in (x, inside):
                assert torch.allclose(energy(y), torch.from_numpy(expected[0]), rtol=1e-12)
                assert np.abs(energy.forces(y)[1] - expected[1]).max() < 1e-12 * np.abs(expected[1]).max()
            assert np.abs(energy.evaluate(columns)[0].numpy() - expected[0]).max() < 1e-9
            assert set(energy.term_energies(inside)) == set(energy.term_energies(x))
    after = x.clone().requires_grad_()
    energy(after).sum().backward()  # nothing from inference mode has stayed behind
    assert np.abs(after.grad.numpy() + expected[1]).max() < 1e-11 * np.abs(expected[1]).max()


@DTYPES
def test_evaluate_is_the_same_in_another_layout(dtype):
    energy, x = engine("everything"), calm("everything", dtype)
    energies, forces = energy.forces(x)
    columns = x.permute(1, 2, 0).contiguous().requires_grad_()
    u, f = energy.evaluate(columns)
    assert (u.shape, f.shape, u.dtype, f.dtype) == ((len(x),), columns.shape, dtype, dtype)
    assert not u.requires_grad
    assert not f.requires_grad
    close = 1e-12 if dtype == torch.float64 else 1e-5
    assert np.abs(u.double().numpy() - energies).max() < close * np.abs(energies).max()
    assert np.abs(f.permute(2, 0, 1).double().numpy() - forces).max() < close * np.abs(forces).max()


def test_evaluate_leaves_what_is_not_finite():
    energy, x = engine("everything"), calm("everything")
    columns = x.permute(1, 2, 0).contiguous()
    expected = energy.evaluate(columns)
    columns[2, 1, 3] = math.nan
    u, f = energy.evaluate(columns)
    good = [i for i in range(len(x)) if i != 3]
    assert not math.isfinite(u[3])
    assert not torch.isfinite(f[..., 3]).all()
    assert torch.equal(u[good], expected[0][good])
    assert torch.equal(f[..., good], expected[1][..., good])


def test_arrays_and_quantities():
    energy, x = engine("everything"), calm("everything").numpy()
    expected = energy.forces(torch.tensor(x))
    x.flags.writeable = False
    for given in (x, x * 10.0 * unit.angstrom, unit.Quantity(x.tolist(), unit.nanometer)):
        energies, forces = energy.forces(given)
        assert energies == pytest.approx(expected[0], rel=1e-9)
        assert np.abs(forces - expected[1]).max() < 1e-9 * np.abs(expected[1]).max()
    single = energy.forces(x.astype(np.float32))
    assert single[0] == pytest.approx(energy(torch.tensor(x).float()).double().numpy(), rel=1e-5)
    with pytest.raises(ValueError, match="positions has unit"):
        energy.forces(x * unit.kelvin)


def test_positions_for_the_comparison_come_in_many_forms(ala2):
    frames, x = hot_frames("ala2, vacuum"), ala2.positions
    for given in (x, frames, x * unit.nanometer, 10.0 * frames * unit.angstrom, torch.tensor(frames)):
        BatchedEnergy(ala2.system, given, compile=False)
    for given in (x[:-1], frames[:, :, :2], frames[None]):
        with pytest.raises(ValueError, match=r"expected .*22, 3\)"):
            BatchedEnergy(ala2.system, given, compile=False)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda energy: pickle.loads(pickle.dumps(energy))])
def test_copies_work_on_their_own(make):
    x = calm("everything")
    energy = BatchedEnergy(system_named("everything"), compile=False, memory_limit=TINY)
    expected = energy.forces(x)
    other = make(energy)
    assert (other.n_evaluations, other.n_nonfinite, other.n_atoms) == (0, 0, N)
    for a, b in zip(other.forces(x), expected, strict=True):
        assert np.array_equal(a, b)
    assert (energy.n_evaluations, other.n_evaluations) == (len(x), len(x))


def test_counters():
    energy, x = BatchedEnergy(system_named("everything"), compile=False), calm("everything")
    assert (energy.n_evaluations, energy.n_nonfinite, energy.n_atoms) == (0, 0, N)
    energy(x)
    x[[1, 4]] = math.nan
    energy(x)
    assert (energy.n_evaluations, energy.n_nonfinite) == (2 * len(x), 2)
    energy.forces(x)
    assert (energy.n_evaluations, energy.n_nonfinite) == (3 * len(x), 4)
    y = x.requires_grad_()
    energy(y).sum().backward()
    assert (energy.n_evaluations, energy.n_nonfinite) == (4 * len(x), 6)


def test_nothing_around_it_changes():
    x = calm("everything")
    system, before = system_named("everything"), x.clone()
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002  (the global state is what is looked at)

    def surroundings() -> tuple:
        numpy_state = np.random.get_state()  # noqa: NPY002
        return (
            torch.random.get_rng_state().tolist(),
            str(numpy_state),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            dict(os.environ),
            openmm.XmlSerializer.serialize(system),
        )

    expected = surroundings()
    for positions in (None, x.numpy()):
        energy = BatchedEnergy(system, positions, compile=False)
        energy(x)
        energy.forces(x)
        energy.evaluate(x.permute(1, 2, 0).contiguous())
        energy.term_energies(x)
        energy(x.clone().requires_grad_()).sum().backward()
    array = x.numpy().copy()
    array[2] = math.nan
    kept = array.copy()
    energy.forces(array)
    energy(torch.from_numpy(array))
    assert np.array_equal(array, kept, equal_nan=True)
    assert torch.equal(x, before)
    assert surroundings() == expected


def test_the_system_is_a_copy():
    system = system_of(harmonic_bonds())
    x = torch.tensor(packings(N, 3))
    energy = BatchedEnergy(system, compile=False)
    expected = energy(x)
    system.getForce(0).setBondParameters(0, 0, 1, 0.5, 1e6)
    system.removeForce(0)
    assert torch.equal(energy(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(energy))(x), expected)


def test_engines_do_not_interfere():
    one, two = (BatchedEnergy(system_named(kind), compile=False) for kind in ("everything", "two of a kind"))
    x = calm("everything")
    expected = one(x), two(x)
    assert not torch.allclose(*expected)
    three = BatchedEnergy(system_named("everything"), compile=False, parameters=GLOBALS)
    three(x.float())
    assert torch.equal(one(x), expected[0])
    assert torch.equal(two(x), expected[1])
    assert (one.n_evaluations, two.n_evaluations, three.n_evaluations) == (2 * len(x), 2 * len(x), len(x))


def test_nothing_is_cached():
    energy, x = engine("everything"), calm("everything")
    before = energy(x)
    x[4, 3, 0] += 1e-9
    assert (energy(x) != before).nonzero().flatten().tolist() == [4]


def test_constraints_are_not_applied():
    system, free = (openmm.XmlSerializer.clone(alanine_dipeptide(constraints="HBonds").system) for _ in range(2))
    while free.getNumConstraints():
        free.removeConstraint(0)
    x = calm("ala2, vacuum")
    assert torch.equal(BatchedEnergy(system, compile=False)(x), BatchedEnergy(free, compile=False)(x))


# --- bad configurations -----------------------------------------------------------------------------------------------

BAD = {
    "nan": lambda x: x.__setitem__((3, 1), math.nan),
    "inf": lambda x: x.__setitem__((3, 1), math.inf),
    "too far to square": lambda x: x.__setitem__((3, 1), torch.finfo(x.dtype).max / 2),
    "coincident, not bonded": lambda x: x.__setitem__(0, x[21].clone()),
    "coincident, bonded": lambda x: x.__setitem__(0, x[1].clone()),
    "all at the origin": lambda x: x.zero_(),
}


@DTYPES
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", ["ala2, ff96-obc1", "ala2, vacuum"])
def test_bad_configurations_are_infinite_and_leave_their_neighbours_alone(kind, bad, dtype):
    energy, rows = engine(kind), [0, 3, 4, 9]
    sound = calm(kind, dtype)
    x = sound.clone()
    for row in rows:
        BAD[bad](x[row])
    good = [i for i in range(len(x)) if i not in rows]
    expected = energy.forces(sound)
    before = energy.n_evaluations, energy.n_nonfinite
    energies, forces = energy.forces(x)
    assert np.array_equal(energies[good], expected[0][good])
    assert np.array_equal(forces[good], expected[1][good])
    assert (energies[rows] == np.inf).all()
    assert not forces[rows].any()
    leaf = x.clone().requires_grad_()
    u = energy(leaf)
    assert (u[rows] == math.inf).all()
    (u**2).sum().backward()  # the derivative of this loss is not finite at the bad rows
    assert not leaf.grad[rows].any()
    expected_gradient = -2 * torch.from_numpy(expected[0])[:, None, None] * torch.from_numpy(expected[1])
    scale = float(expected_gradient.abs().max())
    assert (leaf.grad - expected_gradient)[good].abs().max() < (1e-11 if dtype == torch.float64 else 1e-5) * scale
    assert energy.n_evaluations - before[0] == 2 * len(x)
    assert energy.n_nonfinite - before[1] == 2 * len(rows)


def test_coordinates_that_no_force_looks_at():
    """An atom without forces may be anywhere, but not nowhere."""
    force = openmm.HarmonicBondForce()
    force.addBond(0, 1, 0.15, 1e4)
    x = torch.tensor(packings(3, 4))
    x[1, 2] = math.nan
    x[2, 2, 0] = math.inf
    for system in (system_of(force, n_atoms=3), system_of(n_atoms=3)):
        energies, forces = BatchedEnergy(system, compile=False).forces(x)
        assert np.isinf(energies).tolist() == [False, True, True, False]
        assert np.isfinite(forces).all()


def test_second_derivatives_beside_a_bad_configuration():
    energy, x = engine("ala2, ff96-obc1"), calm("ala2, ff96-obc1")
    products = []
    for spoil in (False, True):
        y = x.clone()
        if spoil:
            y[2, 3] = math.nan
            y[5, 0] = y[5, 21].clone()
        y.requires_grad_()
        (gradient,) = torch.autograd.grad(energy(y).sum(), y, create_graph=True)
        (product,) = torch.autograd.grad((gradient * along(x)).sum(), y)
        products.append(product)
    good = [i for i in range(len(x)) if i not in (2, 5)]
    assert torch.equal(products[0][good], products[1][good])
    assert not products[1][[2, 5]].any()


def test_pieces_with_bad_configurations():
    x = calm("everything").repeat(20, 1, 1)
    x[::7] = math.nan
    energy = BatchedEnergy(system_named("everything"), compile=False, memory_limit=TINY)
    energies, forces = energy.forces(x)
    bad = np.zeros(len(x), bool)
    bad[::7] = True
    assert np.array_equal(energies == np.inf, bad)
    assert not forces[bad].any()
    assert energy.n_nonfinite == bad.sum()


def test_a_close_contact_is_no_bad_configuration():
    """In float64 the wall is finite as near as this; in float32 it may overflow, and then counts."""
    x = calm("ala2, ff96-obc1")[:1].clone()
    for distance in (0.1, 0.01, 1e-3):
        x[0, 0] = x[0, 21] + torch.tensor([distance, 0.0, 0.0])
        agrees(system_named("ala2, ff96-obc1"), engine("ala2, ff96-obc1"), x.numpy(), torch.float64)
    x[0, 0] = x[0, 21] + torch.tensor([1e-5, 0.0, 0.0])
    energies, forces = engine("ala2, ff96-obc1").forces(x.float())
    assert energies[0] > 1e20
    assert np.isfinite(forces).all()
    assert (energies[0] < np.inf) or not forces.any()


@pytest.mark.parametrize("kind", TERMS)
def test_coincident_atoms_are_infinite_or_finite_and_never_nan(kind):
    """For each term alone; a finite energy must be OpenMM's."""
    x = calm(kind)[:3].clone()
    for row, (i, j) in enumerate(((0, 1), (3, 7), (8, 6))):
        x[row, i] = x[row, j].clone()
    energies, forces = engine(kind).forces(x)
    assert not np.isnan(energies).any()
    assert np.isfinite(forces).all()
    finite = energies < np.inf
    assert not forces[~finite].any()
    if "CustomNonbonded" in kind or kind == "NonbondedForce":
        assert not finite.any()
    try:
        expected, expected_forces = openmm_says(system_named(kind), x.numpy())
    except openmm.OpenMMException:
        return
    sound = finite & np.isfinite(expected) & np.isfinite(expected_forces).all((1, 2))
    assert energies[sound] == pytest.approx(expected[sound], rel=1e-6, abs=1e-5)


# --- bad input --------------------------------------------------------------------------------------------------------


def refused(system: openmm.System, words: str, kind: type = UnsupportedForce) -> None:
    """The System is refused in these words, comparison or not, by an error that points to OpenMMEnergy."""
    for verify in (True, False):
        with pytest.raises(kind, match=f"(?is){words}.*OpenMMEnergy"):
            BatchedEnergy(system, verify=verify)


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_forces_are_refused_by_name(kind):
    refused(system_of(harmonic_bonds(), UNSUPPORTED[kind]()), kind)


def test_every_class_of_force_is_either_supported_or_tried_above():
    classes = {
        name for name, value in vars(openmm).items() if inspect.isclass(value) and issubclass(value, openmm.Force)
    }
    others = {"Force", "AndersenThermostat", "RPMDMonteCarloBarostat"}  # the last cannot be copied with a System
    assert classes - others <= SUPPORTED | set(UNSUPPORTED)
    assert not SUPPORTED & set(UNSUPPORTED)


def test_a_thermostat_is_refused_or_without_effect():
    system = system_of(harmonic_bonds(), openmm.AndersenThermostat(300.0, 1.0))
    try:
        energy = BatchedEnergy(system, compile=False)
    except UnsupportedForce:
        refused(system, "AndersenThermostat")
        return
    agrees(system, energy, packings(N, 3), torch.float64)


@pytest.mark.parametrize("kind", PERIODIC)
def test_periodic_boxes_are_refused(kind):
    system = built(PERIODIC[kind])
    words = kind if kind in ("PME", "Ewald", "LJPME") else "(periodic|cutoff)"
    refused(system, f"{type(system.getForce(0)).__name__}.*{words}")


def test_a_box_that_nothing_uses_does_no_harm():
    system = system_of(harmonic_bonds(), nonbonded())
    system.setDefaultPeriodicBoxVectors([0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5])
    agrees(system, BatchedEnergy(system, compile=False), packings(N, 3), torch.float64)


@pytest.mark.parametrize("kind", TABLES)
def test_continuous_tables_are_refused_by_name(kind):
    system = built(TABLES[kind])
    refused(system, f"{type(system.getForce(0)).__name__}.*shape")


@pytest.mark.parametrize("kind", EXPRESSIONS)
def test_expressions_that_mean_nothing_are_refused(kind):
    """OpenMM refuses them too, so that there is nowhere to point to."""
    build, words = EXPRESSIONS[kind]
    for verify in (True, False):
        with pytest.raises(ValueError, match=f"(?s){words}"):
            BatchedEnergy(built(build), verify=verify)


@pytest.mark.parametrize("atom", [N, 99, -1])
@pytest.mark.parametrize("kind", missing_atoms(0))
def test_missing_atoms_are_named(kind, atom):
    system = built(missing_atoms(atom)[kind])
    for verify in (True, False):
        with pytest.raises(ValueError, match=rf"(?s){kind}.*(?<![\d-]){atom}\b"):
            BatchedEnergy(system, verify=verify)


@pytest.mark.parametrize("kind", other_breakage())
def test_rows_that_do_not_fit_are_named(kind):
    build, words = other_breakage()[kind]
    for verify in (True, False):
        with pytest.raises(ValueError, match=f"(?s){words}"):
            BatchedEnergy(built(build), verify=verify)


def test_too_few_parameters_are_refused():
    """OpenMM cannot even copy such a System."""
    force = custom_bonds()
    force.addBond(0, 1, [1.0])
    with pytest.raises((ValueError, openmm.OpenMMException)):
        BatchedEnergy(system_of(force), verify=False)


def test_gb_models_that_openmm_has_not():
    """Without a first value that sums over pairs: OpenMM refuses it, and without any value it ends the process."""
    with pytest.raises((ValueError, openmm.OpenMMException), match="CustomGBForce"):
        BatchedEnergy(system_of(singles_gb()))
    done = python("""
        from forcefields import system_of, valueless_gb
        from openmm_tsf.energy import BatchedEnergy
        try:
            BatchedEnergy(system_of(valueless_gb()))
        except ValueError as error:
            print("refused:", error)
    """)
    assert done.returncode == 0, f"the process ended with {done.returncode}"
    assert "CustomGBForce" in done.stdout


def test_virtual_sites_are_refused():
    system = system_of(harmonic_bonds())
    system.setParticleMass(5, 0.0)
    system.setVirtualSite(5, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    with pytest.raises(ValueError, match="virtual site"):
        BatchedEnergy(system)


def test_what_is_no_system_is_refused(ala2):
    with pytest.raises(TypeError, match=r"expected an openmm.System, not Molecule; pass its .system"):
        BatchedEnergy(ala2)
    with pytest.raises(TypeError, match=r"expected an openmm.System, not str"):
        BatchedEnergy("system.xml")
    with pytest.raises(ValueError, match=r"(?i)(no|zero|0) (atoms|particles)"):
        BatchedEnergy(openmm.System())


def test_wrong_shapes_say_what_was_expected():
    energy, x = engine("everything"), calm("everything")
    before = energy.n_evaluations
    with pytest.raises(ValueError, match=r"shape \(12, 8, 3\).*expected \(batch, 9, 3\)"):
        energy(x[:, :8])
    for wrong in (x[0], x.flatten(1), x.transpose(1, 2), x[..., :2], x[None]):
        with pytest.raises(ValueError, match=r"expected \(batch, 9, 3\)"):
            energy.forces(wrong)
    with pytest.raises(ValueError, match=r"shape"):
        energy.term_energies(x[:, :8])
    assert energy.n_evaluations == before


WRONG_DTYPE = r"(Type|Value)Error(?=.*\b(torch\.)?{}\b)(?=.*float32)(?=.*float64)"
WRONG_INPUT = {
    "two axes": ("torch.zeros(9, 3)", r"ValueError.*expected \(batch, 9, 3\)"),
    "two coordinates": ("torch.zeros(4, 9, 2)", r"ValueError.*expected \(batch, 9, 3\)"),
    **{
        dtype: (f"torch.ones(4, 9, 3, dtype=torch.{dtype})", WRONG_DTYPE.format(dtype))
        for dtype in ("int64", "bool", "float16", "bfloat16", "complex64", "complex128")
    },
}


def python(code: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """A process of its own, without the shape checks of the tests."""
    here = str(Path(__file__).parent)
    everywhere = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": here, **environment}
    arguments = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(arguments, env=everywhere, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def messages():
    """What a user reads for each of `WRONG_INPUT`, from __call__ and from forces, no shape checks in between."""
    inputs = {name: expression for name, (expression, _) in WRONG_INPUT.items()}
    done = python(f"""
        import json, random, torch
        from forcefields import everything
        from openmm_tsf.energy import BatchedEnergy
        random.seed(5)
        state = random.getstate()
        energy, said = BatchedEnergy(everything(), compile=False), {{}}
        energy.forces(torch.rand(4, 9, 3))
        said["random state kept"] = random.getstate() == state
        for name, expression in {inputs!r}.items():
            for how in ("__call__", "forces"):
                try:
                    getattr(energy, how)(eval(expression))
                    said[name + how] = "nothing"
                except Exception as error:
                    said[name + how] = type(error).__name__ + ": " + str(error)
        said["n"] = energy.n_evaluations
        print(json.dumps(said))
    """)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_wrong_input_counts_for_nothing(messages):
    assert messages["n"] == 4
    assert messages["random state kept"]  # not to be seen from inside: the shape checks use it


@pytest.mark.parametrize("kind", WRONG_INPUT)
def test_wrong_input_is_told_from_right(messages, kind):
    assert re.search(f"(?s){WRONG_INPUT[kind][1]}", messages[f"{kind}__call__"]), messages[f"{kind}__call__"]


@pytest.mark.parametrize("kind", ["two axes", "two coordinates", "float16", "complex64", "complex128"])
def test_wrong_input_of_forces(messages, kind):
    assert re.search(f"(?s){WRONG_INPUT[kind][1]}", messages[f"{kind}forces"]), messages[f"{kind}forces"]


# --- trust ------------------------------------------------------------------------------------------------------------

MISREAD = [
    ("HarmonicBondForce", "getBondParameters"),
    ("HarmonicAngleForce", "getAngleParameters"),
    ("PeriodicTorsionForce", "getTorsionParameters"),
    ("RBTorsionForce", "getTorsionParameters"),
    ("CMAPTorsionForce", "getMapParameters"),
    ("CustomBondForce", "getBondParameters"),
    ("CustomBondForce", "getGlobalParameterDefaultValue"),
    ("CustomAngleForce", "getAngleParameters"),
    ("CustomTorsionForce", "getTorsionParameters"),
    ("CustomExternalForce", "getParticleParameters"),
    ("NonbondedForce", "getParticleParameters"),
    ("NonbondedForce", "getExceptionParameters"),
    ("CustomNonbondedForce", "getParticleParameters"),
    ("GBSAOBCForce", "getParticleParameters"),
    ("GBSAOBCForce", "getSolventDielectric"),
    ("CustomGBForce", "getParticleParameters"),
]


def misread(value):
    """The same, but the last number off by one part in ten thousand."""
    if isinstance(value, unit.Quantity):
        return unit.Quantity(misread(value._value), value.unit)
    if isinstance(value, tuple | list):
        return type(value)([*value[:-1], misread(value[-1])]) if value else value
    return value * 1.0001


@pytest.mark.parametrize(("name", "getter"), MISREAD)
def test_a_misread_parameter_is_caught_and_the_term_named(monkeypatch, name, getter):
    right = getattr(getattr(openmm, name), getter)
    monkeypatch.setattr(getattr(openmm, name), getter, lambda *arguments: misread(right(*arguments)))
    others = [kind for kind in SUPPORTED - {name} if kind not in name and name not in kind]
    with pytest.raises(ValueError, match=rf"\b{name}\b.*\d") as caught:
        BatchedEnergy(system_named("everything"), compile=False)
    assert type(caught.value).__name__ == "EnergyMismatch"
    assert not [kind for kind in others if kind in str(caught.value)]


def test_the_comparison_is_on_the_positions_given_and_can_be_left_out(monkeypatch):
    sound = engine("everything")
    right = openmm.NonbondedForce.getParticleParameters
    monkeypatch.setattr(openmm.NonbondedForce, "getParticleParameters", lambda *a: misread(right(*a)))
    x = frames_named("everything")[:3]
    for positions in (None, x, x[0]):
        with pytest.raises(ValueError, match="NonbondedForce"):
            BatchedEnergy(system_named("everything"), positions, compile=False)
    energy = BatchedEnergy(system_named("everything"), compile=False, verify=False)
    assert np.abs(energy.forces(x)[0] - sound.forces(x)[0]).max() > 1e-4


def test_a_wrong_spring_constant_is_caught_at_the_very_minimum(monkeypatch):
    """Perturbed copies of the given positions see what the positions themselves do not."""
    force = openmm.HarmonicBondForce()
    force.addBond(0, 1, 0.15, 1e5)
    x = np.array([[0.0, 0.0, 0.0], [0.15, 0.0, 0.0]])
    system = system_of(force, n_atoms=2)
    BatchedEnergy(system, x, compile=False)
    right = openmm.HarmonicBondForce.getBondParameters
    monkeypatch.setattr(openmm.HarmonicBondForce, "getBondParameters", lambda *a: misread(right(*a)))
    with pytest.raises(ValueError, match="HarmonicBondForce"):
        BatchedEnergy(system, x, compile=False)


def test_a_forgotten_term_is_caught(monkeypatch):
    monkeypatch.setattr(openmm.PeriodicTorsionForce, "getNumTorsions", lambda force: 0)
    with pytest.raises(ValueError, match="PeriodicTorsionForce"):
        BatchedEnergy(system_named("everything"), compile=False)


def test_a_comparison_on_nothing_is_no_comparison():
    """Where OpenMM's own energy is not finite on any configuration, nothing has been verified."""
    force = openmm.CustomBondForce("sqrt(r-5)")
    force.addBond(0, 1, [])
    for system, positions in ((system_of(force), None), (system_of(harmonic_bonds()), np.full((N, 3), math.nan))):
        with pytest.raises(ValueError, match="finite"):
            BatchedEnergy(system, positions, compile=False)
        BatchedEnergy(system, positions, compile=False, verify=False)
    with pytest.raises(ValueError, match=r"scale.*nan"):
        BatchedEnergy(system_named("CustomBondForce"), parameters={"scale": math.nan}, compile=False)


def test_the_comparison_goes_term_by_term():
    x = frames_named("everything")[:4].copy()
    system, energy = openmm.XmlSerializer.clone(system_named("everything")), engine("everything")
    field = read_system(system)
    rows = agreement.agreements(system, field, {}, x)
    assert [row.label for row in rows] == list(energy.term_energies(torch.tensor(x)))
    assert all(row.allowed and row.n == 4 for row in rows)
    angles = next(force for force in system.getForces() if isinstance(force, openmm.HarmonicAngleForce))
    *atoms, angle, k = angles.getAngleParameters(3)
    angles.setAngleParameters(3, *atoms, angle, k * 1.001)
    (wrong,) = [row for row in agreement.agreements(system, field, {}, x) if not row.allowed]
    assert wrong.label == "HarmonicAngleForce"
    assert wrong.energy_error > 1e-4
    assert wrong.force_error > 1e-6


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=["float32", "float64"]
)
@pytest.mark.skipif(compiled.obstacle(torch.device("cpu")) is not None, reason="torch.compile cannot work here")
def test_compiled_equals_eager_and_openmm(dtype):
    energy = BatchedEnergy(tiny(), compile=True)
    positions = mixture(packings(3, 6))
    agrees(tiny(), energy, positions, dtype)
    x = torch.tensor(positions[:6], dtype=dtype)
    eager = BatchedEnergy(tiny(), compile=False)
    x[2] = math.nan
    x[4, 0] = x[4, 1].clone()
    results = []
    for version in (energy, eager):
        y = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(version(y).sum(), y, create_graph=True)
        (product,) = torch.autograd.grad((gradient * along(x)).sum(), y)
        results.append((*map(torch.from_numpy, version.forces(x)), product))
    close = 1e-11 if dtype == torch.float64 else 1e-4
    for a, b in zip(*results, strict=True):
        sound = torch.isfinite(b)
        assert torch.equal(torch.isfinite(a), sound)
        assert (a[sound] - b[sound]).abs().max() < close * b[sound].abs().max()
    for n in (0, 1, 7, 33):  # no size is special
        y = torch.tensor(packings(3, n, seed=n) if n else np.zeros((0, 3, 3)), dtype=dtype)
        assert torch.allclose(energy(y), eager(y), rtol=close, atol=10 * close)


def test_when_to_compile(monkeypatch):
    """False never, True at once, None as soon as it pays; tried once for each dtype, even where it fails."""
    tried = []
    monkeypatch.setattr(batched, "compile_kernel", lambda kernel, example: tried.append(example.dtype))
    monkeypatch.setattr(batched, "PAYS_OFF", 3 * 100 - 1)  # three pairs
    x = torch.tensor(packings(3, 40))
    for compile, expected in ((False, [0] * 4), (True, [1, 1, 1, 2]), (None, [0, 0, 1, 1])):
        tried.clear()
        energy, counts = BatchedEnergy(tiny(), compile=compile), []
        for frames in (x, x, x, x.float()):
            energy.forces(frames)
            counts.append(len(tried))
        assert counts == expected, compile


FALLBACK = """
    import json, warnings
    import numpy as np, torch
    from forcefields import openmm_says, packings, tiny
    from openmm_tsf.energy import BatchedEnergy
    x, off = packings(3, 40), []
    expected = openmm_says(tiny(), x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            energy = BatchedEnergy(tiny(), compile=True)
            energies, forces = energy.forces(x)
            largest = np.abs(expected[1]).max()
            off += [np.abs(energies - expected[0]).max(), np.abs(forces - expected[1]).max() / largest]
            y = torch.tensor(x, dtype=torch.float32, requires_grad=True)
            energy(y).sum().backward()
            off.append(np.abs(y.grad.numpy() + expected[1]).max() / largest * 1e-4)
    print(json.dumps({"off": off, "said": [str(warning.message) for warning in caught]}))
"""


def fallback(**environment: str) -> dict:
    done = python(FALLBACK, OPENMM_TSF_CHECK_SHAPES="0", **environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert max(report["off"]) < 1e-7
    return report


@pytest.mark.parametrize("compiler", ["/no/such/compiler", pytest.param("false", marks=pytest.mark.slow)])
def test_without_a_compiler_it_says_so_once_and_is_right(tmp_path, compiler):
    """Whether there is none or one that fails."""
    report = fallback(CXX=compiler, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert len(report["said"]) == 1
    assert "compile" in report["said"][0]


def test_a_cache_in_a_folder_with_a_space_is_right(tmp_path):
    report = fallback(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "a cache of kernels"))
    assert len(report["said"]) <= 1


# --- memory, and CUDA -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_stays_within_its_limit():
    """Peak memory beyond input and output, eager, for more frames than fit."""
    done = python("""
        import resource, torch
        from openmm_tsf import alanine_dipeptide
        from openmm_tsf.energy import BatchedEnergy
        molecule, limit, n = alanine_dipeptide(), 0.25, 100_000
        energy = BatchedEnergy(molecule.system, compile=False, memory_limit=limit)
        x = torch.tensor(molecule.positions, dtype=torch.float32) + 0.005 * torch.randn(n, 22, 3)
        energy(x[:100])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        energies, forces = energy.forces(x)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        output = (energies.nbytes + forces.nbytes) / 2**30
        print((after - before) / 2**20 - output, limit)
    """)
    assert done.returncode == 0, done.stderr
    used, limit = map(float, done.stdout.split())
    assert used < 1.2 * limit


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("kind", ["everything", "ala2, ff96-obc1", "alanines, ff14SB, GBn2"])
def test_cuda_equals_openmm(kind, dtype):
    x = torch.tensor(frames_named(kind), dtype=dtype)
    expected = openmm_says(system_named(kind), x.double().numpy())
    energy = engine(kind)
    wrong = disagreement(*energy.forces(x.cuda()), expected, dtype)
    assert not wrong, wrong
    y = x.cuda().requires_grad_()
    u = energy(y)
    assert (u.device.type, u.dtype) == ("cuda", dtype)
    (gradient,) = torch.autograd.grad(u.sum(), y)
    wrong = disagreement(u.detach().double().cpu().numpy(), -gradient.double().cpu().numpy(), expected, dtype)
    assert not wrong, wrong
    assert energy(x).device.type == "cpu"  # and back again


@pytest.mark.gpu
def test_cuda_laws():
    x = calm("everything").cuda()
    energy = BatchedEnergy(system_named("everything"), compile=False, memory_limit=TINY)
    expected = engine("everything").forces(x)
    assert np.abs(energy.forces(x)[1] - expected[1]).max() < 1e-11 * np.abs(expected[1]).max()
    first, again = engine("everything").forces(x), engine("everything").forces(x)
    assert np.array_equal(first[1], again[1])  # no atomic additions in an order of their own
    spoilt = x.clone()
    spoilt[3] = math.nan
    energies, forces = energy.forces(spoilt)
    good = [i for i in range(len(x)) if i != 3]
    assert energies[3] == np.inf
    assert np.abs(forces[good] - expected[1][good]).max() < 1e-11 * np.abs(expected[1]).max()
    u, f = energy.evaluate(x.permute(1, 2, 0).contiguous())
    assert u.device.type == f.device.type == "cuda"
    for other in (copy.deepcopy(energy), pickle.loads(pickle.dumps(energy))):
        assert other(x).device.type == "cuda"
    assert energy(x[:0]).shape == (0,)


@pytest.mark.gpu
def test_cuda_compiled():
    energy, positions = BatchedEnergy(tiny(), compile=True), mixture(packings(3, 6))
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor(positions, dtype=dtype)
        wrong = disagreement(*energy.forces(x.cuda()), openmm_says(tiny(), x.double().numpy()), dtype)
        assert not wrong, wrong


# --- found in review --------------------------------------------------------------------------------------------------


def test_tables_keep_to_their_ends_as_in_openmm():
    """OpenMM clamps the place in a discrete table; nan stays nan, and harms its own configuration only."""
    force = openmm.CustomNonbondedForce("table(floor(20*r)-4)*r")
    force.addTabulatedFunction("table", openmm.Discrete1DFunction([3.0, 5.0, 11.0]))
    force.addParticle([])
    force.addParticle([])
    system = system_of(force, n_atoms=2)
    x = np.zeros((5, 2, 3))
    x[:, 1, 0] = [0.05, 0.21, 0.26, 0.31, 3.0]
    energy = BatchedEnergy(system, x, compile=False)
    np.testing.assert_allclose(energy.forces(x)[0], openmm_says(system, x)[0], rtol=1e-12)
    x[2, 1, 0] = math.nan
    assert np.isinf(energy.forces(x)[0]).tolist() == [False, False, True, False, False]


def test_tables_of_constants_are_in_double_precision():
    force = openmm.CustomNonbondedForce("table(k)*r")
    force.addGlobalParameter("k", 1.0)
    force.addTabulatedFunction("table", openmm.Discrete1DFunction([3.0, 1.0 / 3.0]))
    force.addParticle([])
    force.addParticle([])
    BatchedEnergy(system_of(force, n_atoms=2), compile=False)


@pytest.mark.parametrize("text", ["5", "5*step(r-0.1)"])
def test_energies_without_a_slope(text):
    force = openmm.CustomNonbondedForce(text)
    for _ in range(3):
        force.addParticle([])
    energies, forces = BatchedEnergy(system_of(force, n_atoms=3), compile=False).forces(packings(3, 2))
    assert energies == pytest.approx(15.0)
    assert not forces.any()


@pytest.mark.parametrize("n", [16, 17])
def test_positions_made_in_inference_mode(n):
    energy = engine("everything")
    with torch.inference_mode():
        x = torch.tensor(frames_named("everything")[:1]).repeat(n, 1, 1)
        u, forces = energy.evaluate(x.permute(1, 2, 0).contiguous())
        torch.testing.assert_close(energy(x), u)
    assert forces.isfinite().all()


def test_energies_alone_equal_those_with_forces():
    energy, x = engine("everything"), torch.tensor(frames_named("everything"))
    before = energy.n_evaluations
    alone = energy(x)
    assert not alone.requires_grad
    torch.testing.assert_close(alone, energy(x.clone().requires_grad_()).detach(), rtol=1e-12, atol=0.0)
    assert energy.n_evaluations == before + 2 * len(x)
