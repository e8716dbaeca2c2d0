"""Velocities after Monte Carlo moves and exchanges of temperature: what leapfrog integrators need."""

import logging

import numpy as np
import openmm
import pytest
import torch
from openmm import unit

import openmm_tsf as tsf
from openmm_tsf.exchange import velocities as module
from openmm_tsf.exchange.velocities import carried, lag_of, rescaled
from openmm_tsf.langevin import BatchedLangevin
from openmm_tsf.units import kT

REFERENCE = openmm.Platform.getPlatformByName("Reference")
N, MASS, TEMPERATURE, STEP = 400, 2.0, 300.0, 0.002
OMEGA = 1.0 / STEP  # omega dt = 1: stiff, as X-H bonds are at 2 fs
SPRING = MASS * OMEGA**2


def oscillators(integrator):
    """N particles on springs to the origin."""
    system = openmm.System()
    force = openmm.CustomExternalForce("0.5*k*(x^2+y^2+z^2)")
    force.addGlobalParameter("k", SPRING)
    for i in range(N):
        system.addParticle(MASS)
        force.addParticle(i)
    system.addForce(force)
    return openmm.Context(system, integrator, REFERENCE)


def compound(*parts):
    made = openmm.CompoundIntegrator()
    for part in parts:
        made.addIntegrator(part)
    return made


def middle(seed=1):
    integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, 5.0, STEP)
    integrator.setRandomNumberSeed(seed)
    return integrator


def state(context):
    found = context.getState(positions=True, velocities=True)
    return found.getPositions(asNumpy=True)._value.copy(), found.getVelocities(asNumpy=True)._value.copy()


def equipartition(move_velocities, n_moves=60):
    """<k x^2>/kT and <m v^2>/kT, two steps after independent draws of x; exact LangevinMiddle has 1 and 1."""
    context = oscillators(middle())
    rng = np.random.default_rng(1)
    width = np.sqrt(kT(TEMPERATURE) / SPRING)
    context.setPositions(width * rng.normal(size=(N, 3)))
    context.setVelocitiesToTemperature(TEMPERATURE, 1)
    context.getIntegrator().step(500)
    potential, kinetic = [], []
    for _ in range(n_moves):
        x, v = state(context)
        new = width * rng.normal(size=x.shape)
        v = move_velocities(context, v, x, new)
        context.setPositions(new)
        context.setVelocities(v)
        context.getIntegrator().step(2)  # three would be half a period
        x, v = state(context)
        potential.append(SPRING * (x**2).mean() / kT(TEMPERATURE))
        kinetic.append(MASS * (v**2).mean() / kT(TEMPERATURE))
    return np.mean(potential[10:]), np.mean(kinetic[10:])


def test_carried_velocities_keep_the_distribution_of_the_integrator():
    potential, kinetic = equipartition(lambda c, v, x, new: carried(c, v, x, new, TEMPERATURE, 1))
    # 50 x 1,200 coordinates, correlated over some ten moves: a standard error of about 0.015
    assert abs(potential - 1.0) < 0.06
    assert abs(kinetic - 1.0) < 0.06


@pytest.mark.parametrize(
    "wrong",
    [
        lambda c, v, x, new: v,
        lambda c, v, x, new: (
            np.random.default_rng(int(1e6 * x[0, 0] ** 2)).normal(size=v.shape) * np.sqrt(kT(TEMPERATURE) / MASS)
        ),
    ],
    ids=["kept", "drawn anew"],
)
def test_velocities_kept_or_drawn_anew_do_not(wrong):
    potential, kinetic = equipartition(wrong)
    assert max(abs(potential - 1.0), abs(kinetic - 1.0)) > 0.2


@pytest.mark.parametrize(
    ("make", "half"),
    [
        (lambda: openmm.LangevinMiddleIntegrator(300, 1, 0.002), 1),
        (lambda: openmm.VerletIntegrator(0.002), 1),
        (lambda: openmm.NoseHooverIntegrator(300, 1, 0.002), 1),
        (lambda: openmm.QTBIntegrator(300, 1, 0.002), 1),
        (lambda: compound(openmm.LangevinMiddleIntegrator(300, 1, 0.002)), 1),
        (lambda: openmm.BrownianIntegrator(300, 1, 0.002), 0),
        (lambda: openmm.CustomIntegrator(0.002), 0),
    ],
)
def test_lag(make, half):
    assert lag_of(oscillators(make())) == half * 0.001


def test_where_velocities_do_not_lag_they_stay():
    context = oscillators(openmm.CustomIntegrator(STEP))
    v = np.random.default_rng(1).normal(size=(N, 3))
    assert carried(context, v, 0.1 * v, 0.2 * v, TEMPERATURE, 1) is v
    assert np.array_equal(rescaled(context, v, 0.1 * v, 1.5), 1.5 * v)


def test_rigid_bonds_keep_their_temperature_and_what_lies_across_stays(monkeypatch):
    molecule = tsf.alanine_dipeptide(constraints="HBonds")
    integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, 1.0, 1e-9)  # no half kick to speak of
    context = openmm.Context(molecule.system, integrator, REFERENCE)
    x = np.array(molecule.positions)
    turn = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    masses, n_free = molecule.masses[:, None], 3 * 22 - 12
    twice, kept = [], []
    for seed in range(1, 201):
        context.setPositions(x)
        context.setVelocitiesToTemperature(TEMPERATURE, seed)
        v = state(context)[1]
        again = carried(context, v, x, x, TEMPERATURE, seed)
        assert np.abs(again - v).max() < 1e-4  # the same place: the same velocities
        new = carried(context, v, x, x @ turn.T, TEMPERATURE, seed)
        twice.append((masses * new**2).sum() / kT(TEMPERATURE))
        kept.append((masses * new * v).sum() / kT(TEMPERATURE))
    assert abs(np.mean(twice) - n_free) < 4.0 * np.sqrt(2 * n_free / 200)
    assert np.mean(kept) > 0.6 * n_free


@pytest.mark.parametrize("constraints", [None, "HBonds"])
def test_after_a_clash_velocities_are_thermal(constraints):
    molecule = tsf.alanine_dipeptide(constraints=constraints)
    context = openmm.Context(molecule.system, openmm.LangevinMiddleIntegrator(TEMPERATURE, 1.0, 0.002), REFERENCE)
    x = np.array(molecule.positions)
    clash = x.copy()
    clash[4], clash[14] = x[5] + [0.005, 0.0, 0.0], x[5]
    context.setPositions(x)
    context.setVelocitiesToTemperature(TEMPERATURE, 1)
    v = carried(context, state(context)[1], clash, x, TEMPERATURE, 1)
    speeds = np.abs(v) / np.sqrt(kT(TEMPERATURE) / molecule.masses[:, None])
    assert speeds.max() < 6.0
    energy = tsf.BatchedEnergy(molecule.system, x)
    dynamics = BatchedLangevin(molecule.system, energy, timestep_fs=2.0, friction_per_ps=1.0)
    g = torch.Generator().manual_seed(1)
    start = dynamics.start(x, torch.tensor([TEMPERATURE, TEMPERATURE]), generator=g)
    columns = lambda a: torch.tensor(np.stack([a, x])).permute(1, 2, 0)  # noqa: E731
    broken = dynamics.resume(columns(clash), start.velocities, start.temperatures)
    after = dynamics.moved(broken, columns(x), torch.tensor([True, False]), generator=g)
    assert after.velocities[..., 0].isfinite().all()
    speeds = after.velocities[..., 0].numpy() / np.sqrt(kT(TEMPERATURE) / molecule.masses[:, None])
    assert np.abs(speeds).max() < 6.0
    assert torch.equal(after.velocities[..., 1], start.velocities[..., 1])


@pytest.mark.filterwarnings("ignore")
def test_exchanges_rescale_velocities(tmp_path):
    logging.disable(logging.WARNING)
    from openmmtools import mcmc, multistate, states

    from openmm_tsf.exchange import rescaling

    molecule = tsf.alanine_dipeptide()
    kelvin = [300.0 * unit.kelvin, 320.0 * unit.kelvin]
    dynamics = mcmc.LangevinDynamicsMove(timestep=1.0 * unit.femtosecond, n_steps=2)
    sampler = rescaling(multistate.ReplicaExchangeSampler)(mcmc_moves=dynamics, number_of_iterations=1)
    reporter = multistate.MultiStateReporter(str(tmp_path / "run.nc"), checkpoint_interval=1)
    start = states.SamplerState(molecule.positions * unit.nanometer)
    sampler.create([states.ThermodynamicState(molecule.system, t) for t in kelvin], start, reporter)
    sampler.run()
    context, _ = sampler.sampler_context_cache.get_context(sampler._thermodynamic_states[0])
    lag = lag_of(context)
    assert lag == 0.0005

    def full_step(replica):
        x = sampler._sampler_states[replica].positions.value_in_unit(unit.nanometer)
        v = sampler._sampler_states[replica].velocities.value_in_unit(unit.nanometer / unit.picosecond)
        return v + lag * module._accelerations(context, np.array(x))

    for _ in range(20):
        before, old = list(sampler._replica_thermodynamic_states), [full_step(0), full_step(1)]
        sampler._replica_thermodynamic_states = sampler._mix_replicas()
        after = list(sampler._replica_thermodynamic_states)
        if before != after:
            break
    assert before != after
    for replica, scale in ((0, kelvin[after[0]] / kelvin[before[0]]), (1, kelvin[after[1]] / kelvin[before[1]])):
        assert np.allclose(full_step(replica), np.sqrt(scale) * old[replica], atol=1e-4)
    reporter.close()
    logging.disable(logging.NOTSET)
