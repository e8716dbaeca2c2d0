"""FlowMove in the samplers of openmmtools and OpenMM: run, extend, kill, restore, two MPI ranks."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from openmm import LangevinMiddleIntegrator, Platform, app, unit

import openmm_tsf as tsf
from openmm_tsf.exchange.flows import use_flow
from openmm_tsf.flow_steps import COUNTS, FlowSteps

logging.getLogger("pymbar").setLevel(logging.CRITICAL)
pytestmark = pytest.mark.filterwarnings("ignore")  # what openmmtools, netCDF4 and mpiplus have to say

SCRIPT = Path(__file__).with_name("sampler_script.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
MPIRUN = Path(sys.executable).with_name("mpirun")
needs_mpi = pytest.mark.skipif(not MPIRUN.is_file() and not shutil.which("mpirun"), reason="needs the extra mpi")


@pytest.fixture(scope="module")
def openmmtools():
    logging.disable(logging.WARNING)
    import openmmtools
    import openmmtools.mcmc
    import openmmtools.multistate
    import openmmtools.states

    yield openmmtools
    logging.disable(logging.NOTSET)


@pytest.fixture
def parts(openmmtools):
    """A thermodynamic state at 300 K, a sampler state, and dynamics followed by the flow."""
    np.random.seed(1)  # noqa: NPY002
    molecule = tsf.alanine_dipeptide()
    state = openmmtools.states.ThermodynamicState(molecule.system, 300.0 * unit.kelvin)
    # not the minimum of the energy, which hardly anything is accepted from at high temperature
    drawn, _ = tsf.pretrained("ala2").at(420.0).sample(1, generator=torch.Generator().manual_seed(1))
    start = openmmtools.states.SamplerState(drawn[0].numpy() * unit.nanometer)
    dynamics = openmmtools.mcmc.LangevinDynamicsMove(timestep=1.0 * unit.femtosecond, n_steps=3)
    move = openmmtools.mcmc.SequenceMove([dynamics, tsf.FlowMove("ala2", n_proposals=4)])
    return state, start, move


def flow_statistics(sampler):
    return [move.statistics[1] for move in sampler.mcmc_moves]


def restored(openmmtools, cls, storage):
    return getattr(openmmtools.multistate, cls).from_storage(openmmtools.multistate.MultiStateReporter(str(storage)))


@pytest.mark.parametrize("cls", ["ReplicaExchangeSampler", "MultiStateSampler", "ParallelTemperingSampler"])
def test_create_run_extend_restore(openmmtools, parts, tmp_path, cls):
    state, start, move = parts
    temperatures = [t * unit.kelvin for t in (300.0, 420.0, 600.0)]
    sampler = getattr(openmmtools.multistate, cls)(mcmc_moves=move, number_of_iterations=2)
    reporter = openmmtools.multistate.MultiStateReporter(str(tmp_path / "run.nc"), checkpoint_interval=1)
    if cls == "ParallelTemperingSampler":
        sampler.create(state, start, reporter, temperatures=temperatures, n_temperatures=3)
    else:
        states = [openmmtools.states.ThermodynamicState(state.system, t) for t in temperatures]
        sampler.create(states, [start] * 3, reporter)
    sampler.run()
    sampler.extend(1)
    before = flow_statistics(sampler)
    assert [s["n_applied"] for s in before] == [3, 3, 3]
    assert [s["independence_proposed"] for s in before] == [12, 12, 12]
    assert sum(s["n_accepted"] for s in before) > 0
    del sampler
    reporter.close()
    again = restored(openmmtools, cls, tmp_path / "run.nc")
    assert flow_statistics(again) == before
    again.extend(2)
    after = flow_statistics(again)
    assert [s["n_applied"] for s in after] == [5, 5, 5]
    assert all(new[key] >= old[key] for new, old in zip(after, before, strict=True) for key in COUNTS)
    positions = np.array([s.positions.value_in_unit(unit.nanometer) for s in again.sampler_states])
    assert np.isfinite(positions).all()


def test_energies_of_the_sampler_are_those_of_the_positions_that_the_flow_left(openmmtools, parts, tmp_path):
    state, start, _ = parts
    states = [openmmtools.states.ThermodynamicState(state.system, t * unit.kelvin) for t in (300.0, 600.0)]
    sampler = openmmtools.multistate.MultiStateSampler(mcmc_moves=tsf.FlowMove("ala2"), number_of_iterations=2)
    reporter = openmmtools.multistate.MultiStateReporter(str(tmp_path / "run.nc"), checkpoint_interval=1)
    sampler.create(states, [start, start], reporter)
    sampler.run()
    reduced = reporter.read_energies(2)[0]
    energy = tsf.OpenMMEnergy(state.system, "Reference")
    x = torch.tensor(np.array([s.positions.value_in_unit(unit.nanometer) for s in sampler.sampler_states]))
    kT = np.array([300.0, 600.0]) * 0.00831446261815324
    assert np.abs(energy(x).numpy()[:, None] / kT - reduced).max() < 1e-3
    assert all(m.statistics["n_accepted"] > 0 for m in sampler.mcmc_moves)


def test_weighted_move_picks_the_flow_sometimes(openmmtools, parts):
    state, start, _ = parts
    np.random.seed(1)  # noqa: NPY002
    dynamics = openmmtools.mcmc.LangevinDynamicsMove(timestep=1.0 * unit.femtosecond, n_steps=1)
    move = openmmtools.mcmc.WeightedMove([(tsf.FlowMove("ala2", n_proposals=2), 0.5), (dynamics, 0.5)])
    openmmtools.mcmc.MCMCSampler(state, start, move=move).run(12)
    assert 0 < move.statistics[0]["n_applied"] < 12


def test_killed_without_warning_and_restored(openmmtools, tmp_path):
    storage = tmp_path / "run.nc"
    command = [sys.executable, str(SCRIPT), str(storage), "1000"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT, cwd=tmp_path
    )
    while process.poll() is None and len(reports(storage, 0)) < 3:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    lines = reports(storage, 0)
    sampler = restored(openmmtools, "ReplicaExchangeSampler", storage)
    assert sampler.iteration >= 3
    first = flow_statistics(sampler)
    assert first == [moves[1] for moves in dict(lines)[sampler.iteration]]
    adapted = [s["step_size_per_million"] for s in first]
    sampler.run(2)
    second = flow_statistics(sampler)
    assert [s["n_applied"] for s in second] == [s["n_applied"] + 2 for s in first]
    assert [s["step_size_per_million"] for s in second] == adapted  # frozen after three applications
    assert len(set(adapted)) > 1 or adapted[0] != 100_000


@needs_mpi
def test_two_ranks_have_the_same_statistics(tmp_path):
    done = run_on_two_ranks(tmp_path, "3")
    assert done.returncode == 0, done.stderr
    first, second = (reports(tmp_path / "run.nc", rank) for rank in (0, 1))
    assert len(first) == 3
    assert first == second
    last = first[-1][1]
    assert [moves[1]["n_applied"] for moves in last] == [3, 3, 3]
    assert all(moves[1]["step_size_per_million"] != 100_000 for moves in last)  # adapted


@needs_mpi
def test_one_rank_dies_and_the_run_can_be_restored(openmmtools, tmp_path):
    done = run_on_two_ranks(tmp_path, "50", "--die-at", "2")
    assert done.returncode != 0
    sampler = restored(openmmtools, "ReplicaExchangeSampler", tmp_path / "run.nc")
    assert sampler.iteration >= 1
    before = [s["n_applied"] for s in flow_statistics(sampler)]
    sampler.run(1)
    assert [s["n_applied"] for s in flow_statistics(sampler)] == [n + 1 for n in before]


def reports(storage, rank):
    """What a rank has reported so far, whole lines only."""
    path = Path(f"{storage}.{rank}")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def run_on_two_ranks(folder, *arguments):
    mpirun = str(MPIRUN) if MPIRUN.is_file() else shutil.which("mpirun")
    command = [mpirun, "-n", "2", sys.executable, str(SCRIPT), str(folder / "run.nc"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=folder, timeout=300)


def simulation(constraints=None, temperature=300.0):
    molecule = tsf.alanine_dipeptide(constraints=constraints)
    integrator = LangevinMiddleIntegrator(temperature, 1.0, 0.001)
    made = app.Simulation(molecule.topology, molecule.system, integrator, Platform.getPlatformByName("Reference"))
    made.context.setPositions(np.array(molecule.positions))
    made.context.setVelocitiesToTemperature(temperature, 1)
    return made


def test_openmm_sampler(tmp_path):
    states = [{"temperature": t * unit.kelvin} for t in (300.0, 420.0, 600.0)]
    sampler = tsf.FlowReplicaExchangeSampler(states, simulation(), 2, "ala2", steps=FlowSteps(n_proposals=4))
    reference = tsf.OpenMMEnergy(sampler.simulation.system, "Reference")
    wrong = []

    def compare(s):
        for conformation, energies in zip(s.replicaConformation, s.replicaStateEnergy, strict=True):
            x = conformation.getPositions(asNumpy=True).value_in_unit(unit.nanometer)[None]
            found = [e.value_in_unit(unit.kilojoules_per_mole) for e in energies]
            wrong.append(np.abs(reference.forces(x)[0] - found).max())

    sampler.reporters.append(compare)
    sampler.simulate(3)
    assert max(wrong) < 1e-6  # energies in the exchange are those of the positions after the flow
    assert [s["independence_proposed"] for s in sampler.flow_statistics] == [12, 12, 12]
    assert sum(s["independence_accepted"] for s in sampler.flow_statistics) > 0


def test_openmm_sampler_with_force_groups_counts_those_only():
    made = simulation()
    for force in made.system.getForces():
        force.setForceGroup(1 if type(force).__name__ == "CustomGBForce" else 0)
    made.context.reinitialize(preserveState=True)
    states = [{"temperature": 600.0 * unit.kelvin, "groups": groups} for groups in ({0, 1}, {0})]
    sampler = tsf.FlowReplicaExchangeSampler(states, made, 1, "ala2", steps=FlowSteps(n_proposals=3))
    x = torch.tensor(tsf.alanine_dipeptide().positions)[None].clone()
    vacuum = tsf.alanine_dipeptide("vacuum")
    assert abs(float(sampler._energy(1)(x)) - float(tsf.BatchedEnergy(vacuum.system)(x))) < 1e-6
    sampler.simulate(2)
    assert [s["independence_proposed"] for s in sampler.flow_statistics] == [6, 6]


def test_openmm_sampler_refuses_another_molecule():
    states = [{"temperature": t * unit.kelvin} for t in (300.0, 600.0)]
    sampler = tsf.FlowReplicaExchangeSampler(states, simulation("HBonds"), 1, "ala2")
    with pytest.raises(ValueError, match="constrains 12 bonds that are free in the flow"):
        sampler.simulate(1)


def test_numpy_seed_decides_and_ranks_differ(openmmtools, parts, monkeypatch):
    from openmm_tsf.exchange import move

    state, start, _ = parts

    def positions(seed):
        np.random.seed(seed)  # noqa: NPY002
        here = openmmtools.states.SamplerState(start.positions)
        tsf.FlowMove("ala2", n_proposals=8).apply(state, here)
        return here.positions.value_in_unit(unit.nanometer)

    assert np.array_equal(positions(1), positions(1))
    assert not np.array_equal(positions(1), positions(2))
    alone = positions(1)
    monkeypatch.setattr(move, "_rank", lambda: 1)
    assert not np.array_equal(positions(1), alone)


def test_the_checkpoint_moved(openmmtools, parts, tmp_path):
    from openmm_tsf.exchange import flows

    state, start, _ = parts
    flow = tsf.pretrained("ala2")
    path, other = tmp_path / "here" / "flow.tsf", tmp_path / "there.tsf"
    path.parent.mkdir()
    digest = tsf.save_flow(flow, path, extra={"note": "moved"})
    stored = tsf.FlowMove(path).__getstate__()
    path.rename(other)
    flows._FLOWS.pop(digest)
    move = object.__new__(tsf.FlowMove)
    move.__setstate__(stored)
    with pytest.raises(tsf.CheckpointError, match=r"moved or deleted; .*use_flow"):
        move.apply(state, start)
    tsf.save_flow(flow, path, extra={"note": "another"})
    with pytest.raises(tsf.CheckpointError, match="has changed: its hash is"):
        move.apply(state, start)
    assert use_flow(other) == digest
    move.apply(state, start)
    assert move.statistics["n_applied"] == 1


def test_parameters_changed_in_the_context_are_noticed():
    """The energy is the Context's own, also after updateParametersInContext."""
    from openmm_tsf.exchange.contexts import walkers_of

    made = simulation()
    context, x = made.context, np.array(tsf.alanine_dipeptide().positions)
    bonds = next(f for f in made.system.getForces() if type(f).__name__ == "HarmonicBondForce")
    before = float(walkers_of(context, 300.0, x, None)[1].energy)
    i, j, length, k = bonds.getBondParameters(0)
    bonds.setBondParameters(0, i, j, 1.5 * length, k)
    bonds.updateParametersInContext(context)
    after = float(walkers_of(context, 300.0, x, None)[1].energy)
    context.setPositions(x)
    wanted = context.getState(energy=True).getPotentialEnergy().value_in_unit(unit.kilojoules_per_mole)
    assert abs(after - wanted) < 1e-6 * abs(wanted)
    assert abs(after - before) > 10.0


def test_openmm_sampler_scales_velocities_at_the_time_of_the_positions(monkeypatch):
    states = [{"temperature": t * unit.kelvin} for t in (300.0, 600.0)]
    sampler = tsf.FlowReplicaExchangeSampler(states, simulation(), 0, "ala2", steps=FlowSteps(n_proposals=1))
    sampler.simulateReplica(0, 3)
    monkeypatch.setattr(FlowSteps, "run", lambda self, walkers, *_, **__: (walkers, dict.fromkeys(COUNTS, 0)))
    before = sampler.replicaConformation[0]
    sampler.replicaStateIndex = [1, 0]
    sampler.simulateReplica(0, 0)
    after = sampler.replicaConformation[0]

    def full_step(state):
        context = sampler.simulation.context
        context.setPositions(state.getPositions())
        forces = context.getState(forces=True).getForces(asNumpy=True)._value
        return state.getVelocities(asNumpy=True)._value + 0.0005 * forces / tsf.alanine_dipeptide().masses[:, None]

    assert np.allclose(full_step(after), np.sqrt(2.0) * full_step(before), atol=1e-8)


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_goes_on_draws_anew(openmmtools, tmp_path, monkeypatch):
    from openmm_tsf.exchange import move
    from openmm_tsf.exchange.sampler import run_openmmtools

    drawn, real = [], move.seed_from_numpy
    monkeypatch.setattr(move, "seed_from_numpy", lambda most: drawn.append(real(most)) or drawn[-1])
    flow_move = tsf.FlowMove("ala2", n_proposals=2)
    for n in (2, 4):
        run_openmmtools(
            tsf.alanine_dipeptide(), np.array([300.0, 600.0]), tmp_path / "run.nc", n, move=flow_move,
            n_dynamics_steps=2, timestep_fs=1.0, friction_per_ps=1.0, store_every=1, seed=1,
        )  # fmt: skip
    assert len(drawn) >= 8
    assert len(set(drawn)) == len(drawn)
