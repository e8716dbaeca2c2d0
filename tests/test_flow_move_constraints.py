"""FlowMove with rigid bonds: constraints hold, velocities fit, and the distribution is that of constrained dynamics."""

from __future__ import annotations

import math
from functools import cache

import laws
import numpy as np
import openmm
import pytest
import torch
from molecules import MOLECULES, dynamics, frames_of, internals_of, rigid_trimer, seeded, with_system
from movetools import flow_file, openmmtools_parts
from openmm import unit

from openmm_tsf import save_flow
from openmm_tsf.exchange import FlowMove
from openmm_tsf.flow import FlowSettings, build_flow
from openmm_tsf.torsions import phi_psi
from openmm_tsf.trajectories import Frames
from openmm_tsf.units import kT

pytestmark = pytest.mark.filterwarnings("ignore")  # what openmmtools and its like have to say

NM, PS, K = unit.nanometer, unit.picosecond, unit.kelvin
MIDDLE = 0.3
"""Mass of the middle atom of the trimer [amu]; the ends have what is left of three carbons."""
RATIO = MIDDLE / ((3 * 12.011 - MIDDLE) / 2)


@pytest.fixture(scope="module")
def omt():
    return openmmtools_parts()


# --- a free trimer with two rigid bonds -------------------------------------------------------------------------------


def light_trimer() -> openmm.System:
    """The rigid trimer with a light middle: p(cos) ~ sqrt((1 + m2/m1)^2 - cos^2), far from flat."""

    def change(system: openmm.System) -> None:
        for i, mass in enumerate((MIDDLE / RATIO, MIDDLE, MIDDLE / RATIO)):
            system.setParticleMass(i, mass)

    return with_system(rigid_trimer(), change).system


def moments(factor: bool) -> torch.Tensor:
    """<cos> and <cos^2>."""
    nodes, weights = np.polynomial.legendre.leggauss(400)
    p = weights * (np.sqrt((1 + RATIO) ** 2 - nodes**2) if factor else 1.0)
    return torch.tensor([0.0, (p * nodes**2).sum() / p.sum()])


def trimers(n: int, seed: int) -> np.ndarray:
    """n free trimers (n, 3, 3) [nm] of the distribution of constrained dynamics."""
    rng = np.random.default_rng(seed)
    c = rng.uniform(-1, 1, 4 * n)
    c = c[rng.random(4 * n) * (1 + RATIO) < np.sqrt((1 + RATIO) ** 2 - c**2)][:n]
    return internals_of("rigid trimer").forward(torch.tensor(-c)[:, None])[0].numpy()


def cosines(x: np.ndarray) -> torch.Tensor:
    """(n, 2) cos and cos^2."""
    u, v = x[:, 0] - x[:, 1], x[:, 2] - x[:, 1]
    c = (u * v).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1)
    return torch.tensor(np.stack((c, c**2), 1))


@pytest.fixture(scope="module")
def trimer_file(tmp_path_factory) -> str:
    """A flow of the free rigid trimer of carbons, made from angles that are spread evenly."""
    x = internals_of("rigid trimer").forward(torch.linspace(-0.99, 0.99, 400)[:, None])[0].numpy()
    frames = Frames(x, np.full(400, 300.0))
    flow = build_flow(rigid_trimer(), frames, FlowSettings(blocks=1, hidden=4), generator=seeded(1))
    path = tmp_path_factory.mktemp("flows") / "trimer.tsf"
    save_flow(flow, path)
    return str(path)


def trimer_series(omt, move, n_walkers: int, n_times: int) -> torch.Tensor:
    thermodynamic = omt.ThermodynamicState(light_trimer(), 300 * K)
    states = [omt.SamplerState(x * NM) for x in trimers(n_walkers, seed=2)]
    for i, state in enumerate(states):  # dynamics has to start from velocities of the temperature
        state.velocities = velocities(thermodynamic, state, omt, seed=i + 1)
    np.random.seed(1)  # noqa: NPY002
    series = []
    for _ in range(n_times):
        for state in states:
            move.apply(thermodynamic, state, context_cache=omt.cache)
        series.append(cosines(np.array([state.positions.value_in_unit(NM) for state in states])))
    return torch.stack(series)


def velocities(thermodynamic, state, omt, seed: int):
    context, _ = omt.cache.get_context(thermodynamic)
    context.setPositions(state.positions)
    context.setVelocitiesToTemperature(thermodynamic.temperature, seed)
    return context.getState(velocities=True).getVelocities(asNumpy=True)


def test_the_angle_has_the_factor_of_the_systems_own_masses(omt, trimer_file):
    """<cos^2> 0.25 with the factor, 1/3 without, 0.321 with the masses of the checkpoint's molecule."""
    move = FlowMove(trimer_file, 32)
    series = trimer_series(omt, move, 250, 2)
    assert move.statistics["n_accepted"] > 0.2 * move.statistics["n_proposed"]
    laws.stationary(series, moments(factor=True), resolution=0.08)
    assert float(laws.deviations(series, moments(factor=False))[1]) < -4.5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["independence", "latent", "mixed"])
def test_the_angle_has_it_for_long(omt, trimer_file, kind):
    series = trimer_series(omt, FlowMove(trimer_file, 32, kind, 1.0), 300, 15)
    laws.stationary(series, moments(factor=True), resolution=0.04)
    assert float(laws.deviations(series, moments(factor=False))[1]) < -10


def test_mixed_with_dynamics_the_angle_keeps_its_distribution(omt, trimer_file):
    langevin = omt.mcmc.LangevinDynamicsMove(timestep=2 * unit.femtosecond, collision_rate=5 / PS, n_steps=30)
    series = trimer_series(omt, omt.mcmc.SequenceMove([langevin, FlowMove(trimer_file, 32)]), 250, 2)
    laws.stationary(series, moments(factor=True), resolution=0.08)
    assert float(laws.deviations(series, moments(factor=False))[1]) < -4.5


@pytest.mark.slow
def test_an_external_field_is_sampled_at_fixed_orientation(omt, trimer_file):
    """A field on the last atom. As the moves turn nothing, the distribution of the angle at an orientation is known."""
    strength, internals, system = 40.0, internals_of("rigid trimer"), light_trimer()
    last = internals.zmatrix.root[2]
    field = openmm.CustomExternalForce(f"{strength}*z")
    field.addParticle(last, [])
    system.addForce(field)
    turn, _ = np.linalg.qr(np.random.default_rng(8).normal(size=(3, 3)))
    turn = turn * np.linalg.det(turn)
    c = np.linspace(-1, 1, 20_001)[1:-1]
    x = internals.forward(torch.tensor(-c)[:, None])[0].numpy() @ turn + 0.2
    weight = np.sqrt((1 + RATIO) ** 2 - c**2)
    p = weight * np.exp(-strength * x[:, last, 2] / kT(300.0))
    thermodynamic, move = omt.ThermodynamicState(system, 300 * K), FlowMove(trimer_file, 32)
    rows = np.random.default_rng(9).choice(len(c), 250, p=p / p.sum())
    states, series = [omt.SamplerState(x[row] * NM) for row in rows], []
    np.random.seed(1)  # noqa: NPY002
    for _ in range(2):
        for state in states:
            move.apply(thermodynamic, state, context_cache=omt.cache)
        series.append(cosines(np.array([state.positions.value_in_unit(NM) for state in states])))
    expected = torch.tensor([p @ c, p @ c**2]) / p.sum()
    laws.stationary(torch.stack(series), expected, resolution=0.08)
    with pytest.raises(AssertionError, match="not stationary"):
        laws.stationary(torch.stack(series), moments(factor=True), resolution=0.08)


# --- alanine dipeptide ------------------------------------------------------------------------------------------------


@cache
def rigid():
    return MOLECULES["ala2 rigid"]()


def lengths_and_rates(state) -> tuple[np.ndarray, np.ndarray]:
    """Relative errors of constrained lengths, and velocities along them [nm/ps]."""
    x, v = state.positions.value_in_unit(NM), state.velocities.value_in_unit(NM / PS)
    pairs, wanted = np.array(list(rigid().constraints)), np.array(list(rigid().constraints.values()))
    d, rate = x[pairs[:, 0]] - x[pairs[:, 1]], v[pairs[:, 0]] - v[pairs[:, 1]]
    found = np.linalg.norm(d, axis=1)
    return found / wanted - 1, (d * rate).sum(1) / found


@pytest.mark.parametrize("kind", ["independence", "latent"])
def test_constraints_hold_and_velocities_fit_after_every_accepted_move(omt, tmp_path, kind):
    thermodynamic = omt.ThermodynamicState(rigid().system, 600 * K)
    move = FlowMove(flow_file("ala2 rigid", tmp_path), 32, kind, 0.05, n_walk_steps=2)
    start = frames_of("ala2 rigid", 600)[::40]
    np.random.seed(1)  # noqa: NPY002
    twice_kinetic, drawn = [], 0
    masses = rigid().masses[:, None]
    for i, x in enumerate(start):
        state = omt.SamplerState(x * NM)
        state.velocities = velocities(thermodynamic, state, omt, seed=i + 1)
        for _ in range(4):
            before, was = state.velocities.value_in_unit(NM / PS).copy(), move.statistics["n_accepted"]
            move.apply(thermodynamic, state, context_cache=omt.cache)
            now = state.velocities.value_in_unit(NM / PS)
            if move.statistics["n_accepted"] == was:
                assert np.array_equal(before, now)
                continue
            drawn += 1
            length, rate = lengths_and_rates(state)
            assert np.abs(length).max() < 1e-6  # OpenMM's tolerance is 1e-5
            assert np.abs(rate).max() < 1e-3  # thermal velocities are about 1 nm/ps
            assert np.abs(now - before).max() > 0.0
            twice_kinetic.append(float((masses * now**2).sum()) / kT(600.0))
    n_free = 3 * 22 - 12
    assert drawn >= 20, f"{drawn} accepted applications test little"
    error = math.sqrt(2 * n_free / drawn)
    assert abs(np.mean(twice_kinetic) - n_free) < 4.5 * error  # Maxwell-Boltzmann on what is free


def test_without_velocities_there_are_none_to_redraw(omt, tmp_path):
    move, state = (
        FlowMove(flow_file("ala2 rigid", tmp_path), 64),
        omt.SamplerState(frames_of("ala2 rigid", 600)[0] * NM),
    )
    np.random.seed(1)  # noqa: NPY002
    for _ in range(4):
        move.apply(omt.ThermodynamicState(rigid().system, 600 * K), state, context_cache=omt.cache)
    assert move.statistics["n_accepted"] > 0 and state.velocities is None


@pytest.mark.slow
def test_a_mixture_with_langevin_dynamics_keeps_its_distribution(omt, tmp_path):
    """Energy, phi and psi at 600 K: dynamics alone beside dynamics and moves in turn, errors from autocorrelation."""
    from openmm_tsf import BatchedEnergy

    temperature, energy = 600.0, BatchedEnergy(rigid().system)

    def observe(x: np.ndarray) -> torch.Tensor:
        phi, psi = phi_psi(x, rigid())
        columns = energy(torch.tensor(x)).numpy(), np.cos(phi), np.sin(phi), np.cos(psi), np.sin(psi)
        return torch.tensor(np.stack(columns, 1))[:, None]  # times, one walker, observables

    alone = observe(dynamics(rigid(), 8000, temperature=temperature, spacing=50, seed=5))
    thermodynamic = omt.ThermodynamicState(rigid().system, temperature * K)
    langevin = omt.mcmc.LangevinDynamicsMove(timestep=1 * unit.femtosecond, collision_rate=5 / PS, n_steps=50)
    flow = FlowMove(flow_file("ala2 rigid", tmp_path), 16, "mixed", 0.05, n_walk_steps=2)
    state = omt.SamplerState(frames_of("ala2 rigid", 600)[-1] * NM)
    state.velocities = velocities(thermodynamic, state, omt, seed=1)
    np.random.seed(1)  # noqa: NPY002
    frames = []
    for _ in range(4000):
        langevin.apply(thermodynamic, state, context_cache=omt.cache)
        flow.apply(thermodynamic, state, context_cache=omt.cache)
        frames.append(np.array(state.positions.value_in_unit(NM)))
    assert flow.statistics["independence_accepted"] > 500 and flow.statistics["latent_accepted"] > 500
    both = observe(np.array(frames))
    laws.stationary(both, alone.mean((0, 1)), laws.errors_of_means(alone), resolution=0.15)
