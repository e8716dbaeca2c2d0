"""FlowMove as an MCMCMove of openmmtools: what it samples, what it writes, what it keeps, and what it refuses."""

from __future__ import annotations

import copy
import math
import pickle
import shutil

import laws
import numpy as np
import openmm
import pytest
import torch
from molecules import CHAIN4, MOLECULES, harmonic_chain4, internals_of
from movetools import chain4_observables, chain4_states, expected_chain4, flow_file, mirror, openmmtools_parts
from openmm import unit

from openmm_tsf.checkpoint import CheckpointError
from openmm_tsf.exchange import FlowMove, use_flow
from openmm_tsf.flow_steps import COUNTS, KINDS

pytestmark = pytest.mark.filterwarnings("ignore")  # what openmmtools and its like have to say

NM, K = unit.nanometer, unit.kelvin


@pytest.fixture(scope="module")
def chain4_file(tmp_path_factory) -> str:
    """A rough flow of `harmonic_chain4`, trained at 600 K as far as its covariances are."""
    return str(flow_file("chain4", tmp_path_factory.mktemp("flows")))


@pytest.fixture(scope="module")
def omt():
    return openmmtools_parts()


def positions(state) -> np.ndarray:
    return np.array(state.positions.value_in_unit(NM))


def numbers(move: FlowMove, what: str) -> int:
    return sum(move.statistics[f"{kind}_{what}"] for kind in ("independence", "latent"))


# --- what it samples --------------------------------------------------------------------------------------------------


def sampled(omt, move, thermodynamic, starts, n_times: int, seed: int = 1):
    """Observables (times, walkers, ...) of chain4 with a move applied to every walker, n_times over."""
    np.random.seed(seed)  # noqa: NPY002 - what decides moves of openmmtools
    states, series = [omt.SamplerState(x * NM) for x in starts], []
    for _ in range(n_times):
        for state in states:
            move.apply(thermodynamic, state, context_cache=omt.cache)
        series.append(chain4_observables(np.array([positions(state) for state in states])))
    return torch.stack(series)


@pytest.mark.parametrize(
    ("temperature", "kind"), [(300.0, "independence"), (600.0, "independence"), (300.0, "mixed"), (600.0, "latent")]
)
def test_the_temperature_of_the_state_is_kept(omt, chain4_file, temperature, kind):
    move = FlowMove(chain4_file, 64, kind, 0.7, n_walk_steps=2)
    starts = chain4_states(40, temperature, seed=2)
    series = sampled(omt, move, omt.ThermodynamicState(harmonic_chain4().system, temperature * K), starts, 2)
    assert numbers(move, "accepted") > 0.05 * numbers(move, "proposed")
    laws.stationary(series, expected_chain4(temperature), resolution=0.18)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [300.0, 600.0])
def test_the_temperature_of_the_state_is_kept_for_long(omt, chain4_file, temperature, kind):
    move = FlowMove(chain4_file, 16, kind, 0.7, n_walk_steps=2)
    starts = chain4_states(100, temperature, seed=2)
    series = sampled(omt, move, omt.ThermodynamicState(harmonic_chain4().system, temperature * K), starts, 12)
    laws.stationary(series, expected_chain4(temperature), resolution=0.1)


def test_another_temperature_is_noticed(omt, chain4_file):
    move = FlowMove(chain4_file, 64)
    thermodynamic = omt.ThermodynamicState(harmonic_chain4().system, 900 * K)
    series = sampled(omt, move, thermodynamic, chain4_states(40, 300.0, seed=2), 2)
    with pytest.raises(AssertionError, match="not stationary"):
        laws.stationary(series, expected_chain4(300.0), resolution=0.18)


def lambda_system() -> openmm.System:
    """chain4 with a global parameter that scales its torsion, 1 by default."""
    system = openmm.XmlSerializer.clone(harmonic_chain4().system)
    torsion = openmm.CustomTorsionForce("lambda_torsion*k*(1 - cos(theta - t0))")
    torsion.addGlobalParameter("lambda_torsion", 1.0)
    for name in ("k", "t0"):
        torsion.addPerTorsionParameter(name)
    torsion.addTorsion(2, 0, 1, 3, [CHAIN4["barrier"], CHAIN4["centre"]])
    system.removeForce(2)
    system.addForce(torsion)
    return system


def test_energies_are_those_of_the_states_global_parameters(omt, chain4_file):
    """One move, states of different Hamiltonians in turn: each keeps its own distribution."""
    move, lambdas = FlowMove(chain4_file, 64), (0.1, 1.0)
    compound = [omt.with_lambda(lambda_system(), 400.0, value) for value in lambdas]
    starts = [chain4_states(40, 400.0, seed=3, barrier=value * CHAIN4["barrier"]) for value in lambdas]
    np.random.seed(1)  # noqa: NPY002
    states = [[omt.SamplerState(x * NM) for x in xs] for xs in starts]
    series = []
    for _ in range(2):
        for i in range(40):
            for k, thermodynamic in enumerate(compound):  # in turn, so that nothing of the other may be left over
                move.apply(thermodynamic, states[k][i], context_cache=omt.cache)
        series.append(torch.stack([chain4_observables(np.array([positions(s) for s in row])) for row in states], 2))
    series = torch.stack(series)
    for k, value in enumerate(lambdas):
        barrier = value * CHAIN4["barrier"]
        laws.stationary(series[..., k], expected_chain4(400.0, barrier=barrier), resolution=0.15)
    with pytest.raises(AssertionError, match="not stationary"):
        laws.stationary(series[..., 0], expected_chain4(400.0), resolution=0.15)


def test_a_system_without_batched_form_is_sampled_by_the_context(omt, chain4_file):
    """The torsion at a tenth of its barrier, as a compound bond: the checkpoint's energy would be another."""
    system = openmm.XmlSerializer.clone(harmonic_chain4().system)
    system.removeForce(2)
    compound = openmm.CustomCompoundBondForce(4, "k*(1 - cos(dihedral(p1, p2, p3, p4) - t0))")
    for name in ("k", "t0"):
        compound.addPerBondParameter(name)
    compound.addBond([2, 0, 1, 3], [0.1 * CHAIN4["barrier"], CHAIN4["centre"]])
    system.addForce(compound)
    from openmm_tsf.energy import BatchedEnergy
    from openmm_tsf.energy.unsupported import UnsupportedForce

    with pytest.raises(UnsupportedForce):
        BatchedEnergy(system)
    starts = chain4_states(60, 300.0, seed=4, barrier=0.1 * CHAIN4["barrier"])
    move = FlowMove(chain4_file, 32)
    series = sampled(omt, move, omt.ThermodynamicState(system, 300 * K), starts, 2)
    assert move.statistics["n_accepted"] > 100
    laws.stationary(series, expected_chain4(300.0, barrier=0.1 * CHAIN4["barrier"]), resolution=0.15)
    with pytest.raises(AssertionError, match="not stationary"):
        laws.stationary(series, expected_chain4(300.0), resolution=0.15)


def test_with_an_external_field_the_orientation_stays(omt, chain4_file):
    """With a field the energy depends on the orientation: it stays that of the root atoms, bonds and angle aside."""
    system = openmm.XmlSerializer.clone(harmonic_chain4().system)
    field = openmm.CustomExternalForce("20*z")
    field.addParticle(3, [])
    system.addForce(field)
    move = FlowMove(chain4_file, 8, "mixed", 0.5)
    turn, _ = np.linalg.qr(np.random.default_rng(4).normal(size=(3, 3)))
    x = chain4_states(1, 300.0, seed=5)[0] @ (turn * np.linalg.det(turn)) + np.array([0.3, -0.2, 0.1])
    state, thermodynamic = omt.SamplerState(x * NM), omt.ThermodynamicState(system, 300 * K)
    root = internals_of("chain4").zmatrix.root
    np.random.seed(3)  # noqa: NPY002
    for _ in range(20):
        move.apply(thermodynamic, state, context_cache=omt.cache)
    assert move.statistics["n_accepted"] > 0
    new = positions(state)
    _, b, c = (new[i] - new[root[0]] for i in root)
    _, q, r = (x[i] - x[root[0]] for i in root)
    assert np.abs(new[root[0]] - x[root[0]]).max() < 1e-12  # the first root atom stays
    assert np.allclose(b / np.linalg.norm(b), q / np.linalg.norm(q), atol=1e-9)  # the second in its direction
    normal, new_normal = np.cross(q, r), np.cross(b, c)
    cosine = normal @ new_normal / np.linalg.norm(normal) / np.linalg.norm(new_normal)
    assert abs(cosine - 1) < 1e-9  # the third in its half plane


# --- what it writes ---------------------------------------------------------------------------------------------------


def test_positions_change_exactly_when_something_is_accepted(omt, chain4_file):
    thermodynamic = omt.ThermodynamicState(harmonic_chain4().system, 300 * K)
    state = omt.SamplerState(chain4_states(1, 300.0, seed=2)[0] * NM)
    velocities = np.random.default_rng(1).normal(size=(4, 3))
    state.velocities = velocities * NM / unit.picosecond
    move, changed = FlowMove(chain4_file, 1), 0
    np.random.seed(1)  # noqa: NPY002
    for _ in range(40):
        before, accepted = positions(state), move.statistics["n_accepted"]
        move.apply(thermodynamic, state, context_cache=omt.cache)
        same = np.array_equal(before, positions(state))
        assert same == (move.statistics["n_accepted"] == accepted)
        changed += not same
    assert 0 < changed < 40
    assert np.array_equal(state.velocities.value_in_unit(NM / unit.picosecond), velocities)  # no constraints
    assert move.statistics["n_applied"] == move.statistics["n_proposed"] == 40
    assert move.statistics["n_accepted"] == changed


def test_a_state_that_the_flow_cannot_represent_is_left_alone_and_counted(omt):
    molecule = MOLECULES["ala2"]()
    state = omt.SamplerState(mirror(molecule.positions) * NM)
    before = positions(state)
    moves = [FlowMove("ala2", 2, kind) for kind in KINDS]
    for move in moves:
        move.apply(omt.ThermodynamicState(molecule.system, 300 * K), state, context_cache=omt.cache)
        assert move.statistics["unrepresentable"] == 1 and move.statistics["n_accepted"] == 0
    assert np.array_equal(positions(state), before)


def test_nothing_is_remembered_from_earlier_calls(omt, chain4_file):
    """A state rounded to single precision, as storage does, goes on the same in a move that never saw the original."""
    thermodynamic = omt.ThermodynamicState(harmonic_chain4().system, 300 * K)
    old, found = FlowMove(chain4_file, 4, "mixed", 0.5), []
    state = omt.SamplerState(chain4_states(1, 300.0, seed=2)[0] * NM)
    np.random.seed(1)  # noqa: NPY002
    for _ in range(5):
        old.apply(thermodynamic, state, context_cache=omt.cache)
    rounded = positions(state).astype(np.float32).astype(np.float64)
    for move in (old, FlowMove(chain4_file, 4, "mixed", 0.5)):
        again = omt.SamplerState(rounded * NM)
        np.random.seed(2)  # noqa: NPY002
        for _ in range(10):
            move.apply(thermodynamic, again, context_cache=omt.cache)
        found.append(positions(again))
    assert np.array_equal(*found) and not np.array_equal(found[0], rounded)


def test_energies_are_those_of_the_positions_given_now(omt, chain4_file, monkeypatch):
    """What the move asks the energy of is the state's own positions, bit for bit, and then the proposals once."""
    from openmm_tsf.energy import BatchedEnergy

    asked, call = [], BatchedEnergy.__call__

    def watched(self, x):
        asked.append(x.clone())
        return call(self, x)

    monkeypatch.setattr(BatchedEnergy, "__call__", watched)
    x = chain4_states(1, 300.0, seed=2)[0].astype(np.float32)  # as a reporter hands them back
    state = omt.SamplerState(x * NM)
    thermodynamic = omt.ThermodynamicState(harmonic_chain4().system, 300 * K)
    FlowMove(chain4_file, 16).apply(thermodynamic, state, context_cache=omt.cache)
    assert [len(a) for a in asked] == [1, 16] and all(a.dtype == torch.float64 for a in asked)
    assert np.array_equal(asked[0][0].numpy(), x.astype(np.float64))


# --- in samplers ------------------------------------------------------------------------------------------------------


def test_mcmc_sampler_sequences_and_weighted_moves(omt, chain4_file):
    thermodynamic = omt.ThermodynamicState(harmonic_chain4().system, 300 * K)
    start = omt.SamplerState(chain4_states(1, 300.0, seed=2)[0] * NM)
    flow = FlowMove(chain4_file, 4)
    langevin = omt.mcmc.LangevinDynamicsMove(timestep=0.5 * unit.femtosecond, n_steps=5)
    for move in (
        flow,
        omt.mcmc.SequenceMove([langevin, flow]),
        omt.mcmc.WeightedMove([(flow, 0.5), (langevin, 0.5)]),
        omt.mcmc.SequenceMove([omt.mcmc.WeightedMove([(flow, 1.0)]), langevin]),
    ):
        applied = flow.statistics["n_applied"]
        np.random.seed(1)  # noqa: NPY002
        sampler = omt.mcmc.MCMCSampler(thermodynamic, copy.deepcopy(start), move=move)
        sampler.run(n_iterations=6)
        run = sampler.move  # samplers may copy their move
        flows = [m for m in flatten(run) if isinstance(m, FlowMove)]
        assert sum(m.statistics["n_applied"] for m in flows) > (applied if flows[0] is flow else 0)
        assert np.isfinite(positions(sampler.sampler_state)).all()
        assert not np.array_equal(positions(sampler.sampler_state), positions(start))


def flatten(move):
    """The moves inside a move."""
    inner = getattr(move, "move_list", None) or [m for m, _ in getattr(move, "move_set", [])]
    return [m for part in inner for m in flatten(part)] if inner else [move]


def test_the_same_numpy_seed_gives_the_same_chain(omt, chain4_file):
    thermodynamic, found = omt.ThermodynamicState(harmonic_chain4().system, 300 * K), []
    for seed in (1, 1, 2):
        state, move = omt.SamplerState(chain4_states(1, 300.0, seed=2)[0] * NM), FlowMove(chain4_file, 8, "mixed", 0.5)
        np.random.seed(seed)  # noqa: NPY002
        before = torch.get_rng_state()
        for _ in range(4):
            move.apply(thermodynamic, state, context_cache=omt.cache)
        assert torch.equal(before, torch.get_rng_state())
        found.append((positions(state), move.statistics))
    assert np.array_equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert not np.array_equal(found[0][0], found[2][0])


def test_units_and_the_global_cache_are_not_needed(omt, chain4_file):
    """Without a cache it uses openmmtools' own; angstroms are understood."""
    thermodynamic = omt.ThermodynamicState(harmonic_chain4().system, 300 * K)
    x = chain4_states(1, 300.0, seed=2)[0]
    found = []
    for quantity in (x * NM, 10.0 * x * unit.angstrom):
        state = omt.SamplerState(quantity)
        np.random.seed(5)  # noqa: NPY002
        FlowMove(chain4_file, 16).apply(thermodynamic, state)
        found.append(positions(state))
    assert np.allclose(*found, atol=1e-9) and not np.allclose(found[0], x, atol=1e-6)


# --- what it keeps ----------------------------------------------------------------------------------------------------


def applied(omt, chain4_file, **settings) -> FlowMove:
    """A move with a history."""
    move = FlowMove(chain4_file, 5, "mixed", 0.25, **settings)
    state = omt.SamplerState(chain4_states(1, 300.0, seed=2)[0] * NM)
    for _ in range(3):
        move.apply(omt.ThermodynamicState(harmonic_chain4().system, 300 * K), state, context_cache=omt.cache)
    return move


def test_its_state_is_small_plain_and_whole(omt, chain4_file):
    from openmmtools import utils

    move = applied(omt, chain4_file, n_adapt=2, n_walk_steps=3, explore=0.1)
    serialised = utils.serialize(move)
    assert len(repr(serialised)) < 2000
    copies = [utils.deserialize(serialised), copy.deepcopy(move), copy.copy(move), pickle.loads(pickle.dumps(move))]
    for other in copies:
        assert type(other) is FlowMove and other.__getstate__() == move.__getstate__()
        assert other.flow is move.flow  # loaded once
        assert other.step_size == move.step_size
    assert len(pickle.dumps(move)) < 2000
    assert set(COUNTS) <= set(move.statistics) and all(type(v) is int for v in move.statistics.values())
    state = move.__getstate__()
    assert state["checkpoint"].endswith(".tsf") and len(state["sha256"]) == 64
    for name in ("kind", "n_proposals", "n_walk_steps", "step_size", "explore", "n_adapt", "statistics"):
        assert name in state


def test_copies_count_for_themselves(omt, chain4_file):
    move = applied(omt, chain4_file)
    other, before = copy.deepcopy(move), move.statistics
    state = omt.SamplerState(chain4_states(1, 300.0, seed=2)[0] * NM)
    other.apply(omt.ThermodynamicState(harmonic_chain4().system, 300 * K), state, context_cache=omt.cache)
    assert move.statistics == before and other.statistics["n_applied"] == before["n_applied"] + 1
    stolen = move.statistics
    stolen["n_applied"] = 99  # what is read is a copy
    assert move.statistics == before


def test_statistics_can_be_written_and_add_up(omt, chain4_file):
    move, fresh = applied(omt, chain4_file), FlowMove(chain4_file, 5, "mixed", 0.25)
    fresh.statistics = move.statistics  # as MPI propagation and resuming do
    assert fresh.statistics == move.statistics and fresh.step_size == move.step_size
    s = move.statistics
    assert s["n_applied"] == 3 and s["n_proposed"] == s["independence_proposed"] + s["latent_proposed"]
    assert s["independence_proposed"] == 15 and s["latent_proposed"] == 12
    assert s["n_accepted"] == s["independence_accepted"] + s["latent_accepted"]
    with pytest.raises(ValueError, match="n_applied"):
        fresh.statistics = {"n_accepted": 3}


def test_sequences_pass_statistics_on(omt, chain4_file):
    sequence = omt.mcmc.SequenceMove([omt.mcmc.LangevinDynamicsMove(), applied(omt, chain4_file)])
    other = copy.deepcopy(sequence)
    other.move_list[1].statistics = FlowMove(chain4_file).statistics
    other.statistics = sequence.statistics
    assert other.move_list[1].statistics == sequence.move_list[1].statistics


def test_the_step_size_adapts_in_equilibration_and_is_frozen_then(omt, chain4_file):
    thermodynamic = omt.ThermodynamicState(harmonic_chain4().system, 300 * K)
    state = omt.SamplerState(chain4_states(1, 300.0, seed=2)[0] * NM)
    move, sizes = FlowMove(chain4_file, kind="latent", step_size=0.001, n_walk_steps=4, n_adapt=30), []
    np.random.seed(1)  # noqa: NPY002
    for i in range(45):
        if i == 42:
            move = copy.deepcopy(move)  # a copy, or a resumed run, knows that equilibration is over
        move.apply(thermodynamic, state, context_cache=omt.cache)
        sizes.append(move.step_size)
    assert sizes[0] != 0.001 and len(set(sizes[:30])) > 15
    assert sizes[29] > 10 * 0.001  # hardly a tiny step is rejected
    assert len(set(sizes[29:])) == 1  # the thirty-first application changes nothing
    unadapted = FlowMove(chain4_file, kind="latent", step_size=0.001)
    unadapted.apply(thermodynamic, state, context_cache=omt.cache)
    assert unadapted.step_size == 0.001


# --- what it refuses --------------------------------------------------------------------------------------------------


def refused(omt, move, system, x, message, **settings):
    with pytest.raises(ValueError, match=message):
        move.apply(
            omt.ThermodynamicState(system, 300 * K, **settings), omt.SamplerState(x * NM), context_cache=omt.cache
        )


def permuted(molecule, i: int, j: int) -> openmm.System:
    """The System with two particles exchanged, in masses, bonds and all."""
    system, old = openmm.System(), molecule.system
    where = {i: j, j: i}
    for k in range(old.getNumParticles()):
        system.addParticle(old.getParticleMass(where.get(k, k)))
    bonds = openmm.HarmonicBondForce()
    for force in old.getForces():
        if isinstance(force, openmm.HarmonicBondForce):
            for k in range(force.getNumBonds()):
                a, b, *parameters = force.getBondParameters(k)
                bonds.addBond(where.get(a, a), where.get(b, b), *parameters)
    system.addForce(bonds)
    return system


def test_flows_of_other_molecules_are_refused_by_name(omt, chain4_file):
    ala2 = MOLECULES["ala2"]()
    refused(omt, FlowMove(chain4_file), ala2.system, ala2.positions, "the flow is of chain with 4 atoms.*22 particles")
    chain = harmonic_chain4()
    name = "alanine-dipeptide"
    refused(omt, FlowMove("ala2"), chain.system, chain.positions, f"{name}.*22 atoms.*4 particles")


@pytest.mark.parametrize(
    ("i", "j", "message"), [(4, 5, "order of atoms"), (1, 4, "order of atoms"), (7, 11, "order of")]
)
def test_another_order_of_atoms_is_refused(omt, i, j, message):
    """C and O, methyl H and methyl C, and two hydrogens on different carbons, which masses do not tell apart."""
    ala2 = MOLECULES["ala2"]()
    refused(omt, FlowMove("ala2"), permuted(ala2, i, j), ala2.positions, message)


def test_other_constraints_are_refused(omt):
    rigid = MOLECULES["ala2 rigid"]()
    refused(
        omt, FlowMove("ala2"), rigid.system, rigid.positions, r"constrains 12 bonds that are free in the flow \(.*H"
    )


def test_constraints_that_are_missing_are_refused(omt, tmp_path):
    free = MOLECULES["ala2"]()
    move = FlowMove(flow_file("ala2 rigid", tmp_path))
    refused(omt, move, free.system, free.positions, "12 rigid bonds that the System does not constrain")
    longer = openmm.XmlSerializer.clone(MOLECULES["ala2 rigid"]().system)
    i, j, length = longer.getConstraintParameters(0)
    longer.setConstraintParameters(0, i, j, 1.01 * length)
    refused(omt, move, longer, free.positions, "1 constrained bonds have other lengths")


def test_a_barostat_is_refused(omt, chain4_file):
    from openmmtools.testsystems import LennardJonesFluid

    fluid = LennardJonesFluid(nparticles=20)
    x = fluid.positions.value_in_unit(NM)
    refused(omt, FlowMove(chain4_file), fluid.system, x, "barostat.*without pressure", pressure=1 * unit.atmosphere)
    refused(omt, FlowMove(chain4_file), fluid.system, x, "periodic")


def test_positions_that_are_not_finite_are_refused(omt, chain4_file):
    x = harmonic_chain4().positions.copy()
    x[2, 1] = math.nan
    refused(omt, FlowMove(chain4_file), harmonic_chain4().system, x, "1 of 4 atoms.*not finite.*H1")


def test_checkpoints_that_moved_or_changed_are_refused_with_advice(omt, tmp_path):
    """In another process, that is: this one has the flow in memory."""
    from openmm_tsf.exchange import flows

    path = flow_file("chain4", tmp_path, seed=71)
    move = FlowMove(path)
    stored = pickle.dumps(move)
    there, elsewhere = tmp_path / "chain4.tsf", tmp_path / "elsewhere.tsf"
    assert there == path
    shutil.move(path, elsewhere)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flows, "_FLOWS", {})
        again = pickle.loads(stored)  # reading storage works all the same
        state = omt.SamplerState(harmonic_chain4().positions * NM)
        thermodynamic = omt.ThermodynamicState(harmonic_chain4().system, 300 * K)
        with pytest.raises(CheckpointError, match=f"moved or deleted.*{move.sha256[:12]}.*use_flow"):
            again.apply(thermodynamic, state, context_cache=omt.cache)
        shutil.copy(flow_file("chain4", tmp_path / "other", seed=72), there)
        with pytest.raises(CheckpointError, match=r"has changed: its hash is .*use_flow"):
            again.apply(thermodynamic, state, context_cache=omt.cache)
        assert use_flow(elsewhere) == move.sha256  # the path argument that the message offers
        again.apply(thermodynamic, state, context_cache=omt.cache)
        assert again.statistics["n_applied"] == 1


def test_settings_and_files_that_make_no_sense_are_refused(tmp_path, chain4_file):
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        FlowMove(tmp_path / "nowhere.tsf")
    (tmp_path / "text.tsf").write_text("hello")
    with pytest.raises(CheckpointError, match=r"text\.tsf"):
        FlowMove(tmp_path / "text.tsf")
    for settings in ({"kind": "gibbs"}, {"n_proposals": 0}, {"step_size": -1.0}, {"n_adapt": -1}, {"explore": 1.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            FlowMove(chain4_file, **settings)


def test_a_stored_move_of_another_version_is_refused(chain4_file):
    state = FlowMove(chain4_file).__getstate__()
    del state["sha256"]
    with pytest.raises(ValueError, match="lacks sha256"):
        FlowMove.__new__(FlowMove).__setstate__(state)
