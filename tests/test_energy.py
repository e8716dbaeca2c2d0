"""OpenMMEnergy: values, gradients, bad configurations, platforms, threads and copies."""

import copy
import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import openmm
import pytest
import torch
from openmm import unit

from openmm_tsf.energy import OpenMMEnergy
from openmm_tsf.energy import platforms as platforms_module
from openmm_tsf.energy.platforms import PinnedThreads, available_platforms, choose_platform
from openmm_tsf.systems import alanine_dipeptide

PLATFORMS = [name for name in ("Reference", "CPU", "CUDA", "OpenCL") if name in available_platforms()]
TOLERANCE = {"Reference": 1e-9, "CPU": 5e-3, "CUDA": 5e-3, "OpenCL": 5e-3}  # kJ/mol


@pytest.fixture(scope="module")
def frames():
    """Twenty distorted frames of alanine dipeptide, (20, 22, 3) nm."""
    x = alanine_dipeptide().positions + 0.005 * np.random.default_rng(7).normal(size=(20, 22, 3))
    return torch.from_numpy(x)


@pytest.fixture(scope="module")
def reference(frames):
    """Energies and forces of the frames, from a plain loop over OpenMM's Reference platform with units and all."""
    context = openmm.Context(
        alanine_dipeptide().system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    energies, forces = [], []
    for x in frames.numpy():
        context.setPositions(x * unit.nanometer)
        state = context.getState(getEnergy=True, getForces=True)
        energies.append(state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole))
        forces.append(state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer))
    return np.array(energies), np.array(forces)


@pytest.fixture(scope="module", params=PLATFORMS)
def energy(request):
    return OpenMMEnergy(alanine_dipeptide().system, request.param, n_contexts=2)


def exact(ala2):
    return OpenMMEnergy(ala2.system, "Reference", n_contexts=1)


def test_equals_openmm(energy, frames, reference):
    energies, forces = energy.forces(frames)
    assert np.abs(energies - reference[0]).max() < TOLERANCE[energy.platform]
    assert np.abs(forces - reference[1]).max() < 1e-4 * np.abs(reference[1]).max()
    assert np.ptp(reference[0]) > 10.0  # frames that differ, so that a mix-up of rows would show
    assert np.array_equal(energy(frames).numpy(), energies)


def test_gradient_is_minus_force(energy, frames, reference):
    x = frames.clone().requires_grad_()
    weights = torch.linspace(0.5, 2.0, len(x))
    (energy(x) * weights).sum().backward()
    expected = -weights[:, None, None] * torch.from_numpy(reference[1])
    assert (x.grad - expected).abs().max() < 1e-4 * expected.abs().max()


def test_gradient_is_a_finite_difference(ala2, frames):
    energy, x, h = exact(ala2), frames[:1].clone().requires_grad_(), 1e-5
    energy(x).sum().backward()
    for atom, axis in ((0, 0), (8, 1), (21, 2)):
        step = torch.zeros_like(frames[:1])
        step[0, atom, axis] = h
        difference = (energy(frames[:1] + step) - energy(frames[:1] - step)) / (2 * h)
        assert x.grad[0, atom, axis].item() == pytest.approx(difference.item(), rel=1e-5, abs=1e-3)


def test_dtype_is_kept_and_second_derivatives_are_refused(ala2, frames):
    energy = exact(ala2)
    x = frames.float().requires_grad_()
    u = energy(x)
    (gradient,) = torch.autograd.grad((u**2).sum(), x, create_graph=True)
    assert u.dtype == gradient.dtype == torch.float32
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_forces_only_when_a_gradient_can_be_asked_for(ala2, frames, monkeypatch):
    energy, asked = exact(ala2), []
    inner = energy._evaluate
    monkeypatch.setattr(energy, "_evaluate", lambda x, with_forces: asked.append(with_forces) or inner(x, with_forces))
    energy(frames)
    with torch.no_grad():
        energy(frames.clone().requires_grad_())
    energy(frames.clone().requires_grad_())
    assert asked == [False, False, True]


BAD = {
    "nan": lambda x: x.__setitem__((3, 1), torch.nan),
    "inf": lambda x: x.__setitem__((3, 1), torch.inf),
    "far": lambda x: x.__setitem__((3, 1), 1e300),
    "clash": lambda x: x.__setitem__(0, x[21] + 1e-3),
    "coincident, not bonded": lambda x: x.__setitem__(0, x[21]),
    "coincident, bonded": lambda x: x.__setitem__(0, x[1]),
    "all at the origin": lambda x: x.zero_(),
}


@pytest.mark.parametrize("with_forces", [False, True])
@pytest.mark.parametrize("kind", BAD)
def test_bad_configurations_are_infinite_and_leave_their_neighbours_alone(energy, frames, kind, with_forces):
    x, rows = frames.clone(), [0, 7, 8, 19]
    for row in rows:
        BAD[kind](x[row])
    good = [i for i in range(20) if i not in rows]
    expected = energy.forces(frames)
    n_evaluations, n_nonfinite = energy.n_evaluations, energy.n_nonfinite
    if with_forces:
        energies, forces = energy.forces(x)
        assert np.array_equal(forces[good], expected[1][good])
        assert not forces[rows].any()
    else:
        energies = energy(x).numpy()
    assert np.array_equal(energies[good], expected[0][good])
    assert (energies[rows] == np.inf).all()
    assert energy.n_evaluations - n_evaluations == 20
    assert energy.n_nonfinite - n_nonfinite == 4
    again = energy.forces(frames)
    assert np.array_equal(again[0], expected[0])
    assert np.array_equal(again[1], expected[1])


@pytest.mark.parametrize("platform", PLATFORMS)
def test_what_double_precision_would_bear_counts_too(platform):
    """Springs alone are finite for atoms at one place, and for a molecule far away, but not on every platform."""
    system, bonds = openmm.System(), openmm.HarmonicBondForce()
    for _ in range(3):
        system.addParticle(12.0)
    bonds.addBond(0, 1, 0.15, 1e5)
    bonds.addBond(1, 2, 0.15, 1e5)
    system.addForce(bonds)
    apart = torch.tensor([[0.0, 0.0, 0.0], [0.15, 0.0, 0.0], [0.3, 0.0, 0.0]])
    together = apart.clone()
    together[2] = apart[0] + 1e-8
    energy = OpenMMEnergy(system, platform)
    energies, _ = energy.forces(torch.stack([apart, together, apart + 1e5, apart]))
    assert energies == pytest.approx([0.0, np.inf, np.inf, 0.0], abs=1e-3)
    assert energy.n_nonfinite == 2


def test_a_close_contact_is_no_bad_configuration(energy, frames):
    x = frames[:1].clone()
    x[0, 0] = x[0, 21] + torch.tensor([0.1, 0.0, 0.0])
    energies, forces = energy.forces(x)
    assert 1e4 < energies[0] < 1e6
    assert np.abs(forces).max() > 1e4


def test_zero_gradient_at_infinity_even_if_the_loss_is_not_finite(ala2, frames):
    x = frames[:3].clone()
    x[1, 0] = torch.nan
    x.requires_grad_()
    (exact(ala2)(x) ** 2).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert not x.grad[1].any()
    assert x.grad[0].any()


def test_nothing_is_cached(ala2, frames):
    energy, x = exact(ala2), frames.clone()
    before = energy(x)
    x[4, 8, 0] += 1e-9  # far below what printing shows
    after = energy(x)
    assert (after != before).nonzero().flatten().tolist() == [4]
    x[5] = x[6]
    assert energy(x)[5] == before[6]


def test_wrong_shapes_say_what_was_expected(ala2, frames):
    energy = exact(ala2)
    with pytest.raises(ValueError, match=r"shape \(20, 21, 3\); expected \(batch, 22, 3\), as the System has 22 part"):
        energy(frames[:, :21])
    for x in (frames[0], frames.reshape(20, 66), frames.transpose(1, 2)):
        with pytest.raises(ValueError, match=r"expected \(batch, 22, 3\)"):
            energy.forces(x)
    with pytest.raises(ValueError, match="positions has unit"):
        energy.forces(frames.numpy() * unit.kelvin)
    assert energy.n_evaluations == 0


def test_empty_batch_quantity_and_strided_views(ala2, frames, reference):
    energy = exact(ala2)
    assert energy(frames[:0]).shape == (0,)
    assert energy.forces(frames[:0])[1].shape == (0, 22, 3)
    angstrom = frames.numpy() * 10.0 * unit.angstrom
    assert energy.forces(angstrom)[0] == pytest.approx(reference[0], abs=1e-6)
    assert np.array_equal(energy(frames.flip(0)[::2]).numpy(), energy(frames).numpy()[::-2])


def test_many_contexts_give_what_one_gives(ala2, frames):
    x = frames.repeat(15, 1, 1)
    one, three = OpenMMEnergy(ala2.system, "CPU", n_contexts=1), OpenMMEnergy(ala2.system, "CPU", n_contexts=3)
    assert (one.n_contexts, three.n_contexts) == (1, 3)
    for a, b in zip(one.forces(x), three.forces(x), strict=True):
        assert np.array_equal(a, b)
    assert len(three._contexts) > 1


def test_system_is_a_copy_and_constraints_are_not_applied(frames):
    molecule = alanine_dipeptide(constraints="HBonds")
    system = openmm.XmlSerializer.clone(molecule.system)
    energy = OpenMMEnergy(system, "Reference")
    free = openmm.XmlSerializer.clone(system)
    while free.getNumConstraints():
        free.removeConstraint(0)
    system.removeForce(0)
    assert np.array_equal(energy(frames).numpy(), OpenMMEnergy(free, "Reference")(frames).numpy())


def test_what_is_no_system_is_refused(ala2):
    with pytest.raises(TypeError, match=r"expected an openmm.System, not Molecule; pass its .system"):
        OpenMMEnergy(ala2)
    with pytest.raises(TypeError, match=r"expected an openmm.System, not str"):
        OpenMMEnergy("system.xml")
    with pytest.raises(ValueError, match="n_contexts must be at least 1, not 0"):
        OpenMMEnergy(ala2.system, n_contexts=0)
    system = openmm.XmlSerializer.clone(ala2.system)
    system.setParticleMass(5, 0.0)
    system.setVirtualSite(5, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    with pytest.raises(ValueError, match="virtual sites"):
        OpenMMEnergy(system)


def test_other_openmm_errors_are_not_swallowed(ala2, frames):
    system = openmm.XmlSerializer.clone(ala2.system)
    force = openmm.CustomExternalForce("sqrt(y_undefined*x)")
    force.addGlobalParameter("y_undefined", 1.0)
    force.addParticle(99, [])
    system.addForce(force)
    with pytest.raises((openmm.OpenMMException, ValueError)):
        OpenMMEnergy(system, "Reference")(frames)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda energy: pickle.loads(pickle.dumps(energy))])
def test_copies_work_on_their_own(ala2, frames, make):
    energy = exact(ala2)
    expected = energy(frames)
    other = make(energy)
    assert (other.n_evaluations, other.platform, other.n_contexts) == (0, "Reference", 1)
    energy.close()
    assert torch.equal(other(frames), expected)


def test_platform_by_name_object_and_preference(ala2):
    assert OpenMMEnergy(ala2.system, "reference").platform == "Reference"
    assert OpenMMEnergy(ala2.system, openmm.Platform.getPlatformByName("CPU")).platform == "CPU"
    assert OpenMMEnergy(ala2.system).platform != "Reference"  # the slow one is the last resort
    assert choose_platform("CPU", "double", 3)[1] == {"Threads": "1"}


def test_unknown_platform_and_precision(ala2):
    with pytest.raises(ValueError, match=r"no OpenMM platform 'CUDDA' here; available are Reference, CPU"):
        OpenMMEnergy(ala2.system, "CUDDA")
    with pytest.raises(ValueError, match=r"unknown precision 'half'; choose from single, mixed, double"):
        OpenMMEnergy(ala2.system, precision="half")


def test_platforms_that_do_not_work_are_passed_over_or_named(monkeypatch):
    broken = lambda name, properties: "no device" if name == "CPU" else None  # noqa: E731
    monkeypatch.setattr(platforms_module, "_try", broken)
    monkeypatch.setattr(platforms_module, "PREFERENCE", ("CPU", "Reference"))
    assert choose_platform()[0].getName() == "Reference"
    with pytest.raises(ValueError, match=r"no working OpenMM platform \(CPU: no device\); installed: .*Reference"):
        choose_platform("CPU")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no control over cores on this system")
def test_pinned_threads_have_a_core_each_and_leave_the_caller_alone():
    before = os.sched_getaffinity(0)
    threads, seen = PinnedThreads(len(before)), {}
    threads.share(lambda index, job, stop: seen.setdefault(index, os.sched_getaffinity(0)), range(50))
    assert all(len(mask) == 1 for mask in seen.values())
    assert len({min(mask) for mask in seen.values()}) == len(seen)
    assert os.sched_getaffinity(0) == before
    threads.close()


def test_an_error_in_one_job_stops_the_others_and_is_raised():
    threads, done = PinnedThreads(2), []

    def work(index, job, stop):
        if job == 3:
            raise RuntimeError("job 3")
        done.append(job)

    with pytest.raises(RuntimeError, match="job 3"):
        threads.share(work, range(100_000))
    assert len(done) < 100_000
    threads.share(work, [4, 5])  # and the threads still serve
    assert done[-2:] in ([4, 5], [5, 4])
    threads.close()


@pytest.mark.parametrize("ending", ["pass", "energy.close(); raise SystemExit(0)"])
def test_the_interpreter_ends_with_threads_alive(ending):
    script = f"""
        import torch
        from openmm_tsf.energy import OpenMMEnergy
        from openmm_tsf.systems import alanine_dipeptide
        molecule = alanine_dipeptide()
        energy = OpenMMEnergy(molecule.system, "CPU", n_contexts=2)
        print(energy(torch.tensor(molecule.positions).expand(40, -1, -1)).shape)
        {ending}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "40" in done.stdout


def test_garbage_collection_ends_the_threads(ala2, frames):
    import gc
    import threading
    import time

    before = threading.active_count()
    energy = OpenMMEnergy(ala2.system, "CPU", n_contexts=2)
    energy(frames)
    assert threading.active_count() > before
    del energy
    gc.collect()
    end = time.monotonic() + 10.0
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() <= before
