"""Batched parallel tempering: it keeps exact distributions whatever the flow, and goes on to the bit after a kill."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from molecules import (
    chain4,
    chain4_internals,
    chain4_log_z,
    harmonic_chain4,
    internals_of,
    mirrored,
    perturbed,
    rigid_harmonic_trimer,
    seeded,
)
from openmm import unit

from openmm_tsf import pretrained, tempering_storage
from openmm_tsf.energy import BatchedEnergy
from openmm_tsf.flow import FlowSettings, build_flow
from openmm_tsf.flow_batches import prepare
from openmm_tsf.flow_steps import COUNTS, KINDS, FlowSteps, PlacedFlow
from openmm_tsf.langevin import BatchedLangevin
from openmm_tsf.reference import load_reference
from openmm_tsf.systems import alanine_dipeptide
from openmm_tsf.tempering import BatchedTempering
from openmm_tsf.tempering_storage import load_tempering, run_tempering
from openmm_tsf.trajectories import Frames
from openmm_tsf.units import kT

LADDER = (300.0, 420.0, 600.0)


def chain4_flow(size=0.0, seed=1):
    """A flow of chain4 with the right means and covariances; its parameters are off by `size`."""
    x = internals_of("chain4").forward(chain4_internals(400, 600.0, 3))[0].numpy()
    settings = FlowSettings(blocks=1, hidden=6, depth=1, energy_order=2, entropy_order=1, quartic=False)
    flow = build_flow(harmonic_chain4(), Frames(x, np.full(400, 600.0)), settings, generator=seeded(seed))
    return perturbed(flow, size).requires_grad_(False)


def tempering(flow=None, molecule=None, temperatures=LADDER, **changes):
    molecule = molecule or harmonic_chain4()
    settings = {"n_replicas_per_temperature": 4, "n_dynamics_steps": 5, "timestep_fs": 0.5, "device": "cpu", **changes}
    return BatchedTempering(molecule, temperatures, flow=flow, steps=FlowSteps("mixed", n_proposals=3), **settings)


# --- it keeps distributions -------------------------------------------------------------------------------------------


def exact_start(n, seed=5):
    """Positions of n walkers of each temperature of the ladder, in the order of `start`."""
    rows = [internals_of("chain4").forward(chain4_internals(n, t, seed + k))[0] for k, t in enumerate(LADDER)]
    return torch.stack(rows, 1).flatten(0, 1).numpy()


def mean_energies():
    """Exact <U> [kJ/mol] of harmonic_chain4 on the ladder: -d ln Z / d beta."""
    step = 1e-4
    slope = [(chain4_log_z(t * (1 + step)) - chain4_log_z(t * (1 - step))) / (2 * step * t) for t in LADDER]
    return np.array([kT(t) * t * s for t, s in zip(LADDER, slope, strict=True)])


def deviations(one, n_iterations=16, n=400):
    """Mean energy of each level over iterations, less the exact one, in standard errors; and the last info.

    Errors are of means over replicas, which start independent; what exchanges correlate is little beside the number of
    them.
    """
    state = one.start(exact_start(n))
    sums = np.zeros((one.n_walkers, len(LADDER)))
    visits = np.zeros_like(sums)
    totals = 0
    for _ in range(n_iterations):
        state, info = one.iterate(state)
        rows = np.arange(one.n_walkers), info.levels
        sums[rows] += info.energies - mean_energies()[info.levels]
        visits[rows] += 1
        totals = totals + info.move_counts
    error = np.sqrt((sums**2).sum(0)) / visits.sum(0)
    assert (error < 0.02 * mean_energies()).all()
    return sums.sum(0) / visits.sum(0) / error, totals, info


FLOWS = {"none": None, "untrained": 0.0, "wrong": 0.4}


@pytest.mark.parametrize(
    ("quality", "swaps"),
    [("none", "neighbours"), ("none", "random"), ("untrained", "neighbours"), ("wrong", "random")],
)
def test_energies_of_every_temperature_stay_exact(quality, swaps):
    flow = None if FLOWS[quality] is None else chain4_flow(FLOWS[quality])
    off, counts, info = deviations(tempering(flow, n_replicas_per_temperature=400, swaps=swaps))
    assert np.abs(off).max() < 4.5
    assert info.swap_accepted.sum() > 50
    if flow is not None:
        found = dict(zip(COUNTS, counts.sum(0), strict=True))
        assert found["independence_proposed"] == 16 * 1200 * 3 and found["latent_proposed"] == 16 * 1200
        assert found["independence_accepted"] > 500 and found["latent_accepted"] > 500


@pytest.mark.parametrize("broken", ["score", "no test of swaps"])
def test_wrong_moves_and_swaps_are_noticed(broken, monkeypatch):
    if broken == "score":  # the Hastings term dropped
        monkeypatch.setattr("openmm_tsf.flow_batches.PreparedFlow.score", lambda self, x, generator: 0 * self.scores)
        draws = "openmm_tsf.flow_batches.PreparedFlow.propose"
        monkeypatch.setattr(draws, lambda self, n, generator: (self.draws[0], 0 * self.draws[1], self.draws[2]))
    else:
        monkeypatch.setattr("openmm_tsf.tempering.kT", lambda t: kT(t) if isinstance(t, float) else kT(1e6) + 0 * t)
    off, _, _ = deviations(tempering(chain4_flow(0.4), n_replicas_per_temperature=400))
    assert np.abs(off).max() > 8.0


def test_a_rigid_molecule_keeps_the_distribution_of_its_dynamics():
    """<cos^2> of a free trimer with two rigid bonds: with sqrt(4 - cos^2), and what the flow would have without."""
    molecule = rigid_harmonic_trimer()
    free = openmm.XmlSerializer.clone(molecule.system)
    free.removeForce(0)
    molecule = replace(molecule, system=free, positions=np.array(molecule.positions))
    cos = np.random.default_rng(1).uniform(-0.95, 0.95, 4000)
    x = np.zeros((4000, 3, 3))
    x[:, 0, 0], x[:, 2, 0], x[:, 2, 1] = 0.15, 0.15 * cos, 0.15 * np.sqrt(1 - cos**2)
    flow = build_flow(molecule, Frames(x, np.full(4000, 600.0)), FlowSettings(), generator=seeded(1))
    found = {}
    for name, wrong in (("right", False), ("without factor", True)):
        one = tempering(
            flow.requires_grad_(False), molecule, (300.0, 600.0), n_replicas_per_temperature=1500, n_dynamics_steps=1
        )
        if wrong:
            one._masses = one._masses * torch.tensor([1e-9, 1.0, 1e-9])  # the factor is then the same everywhere
        state, values = one.start(x[:3000]), []
        for iteration in range(24):
            state, info = one.iterate(state)
            if iteration >= 8:
                a, b = (info.positions[:, i] - info.positions[:, 1] for i in (0, 2))
                values.append((a * b).sum(1) ** 2 / 0.15**4)
        lengths = np.linalg.norm(info.positions[:, [0, 2]] - info.positions[:, [1]], axis=2)
        assert np.abs(lengths / 0.15 - 1.0).max() < 2e-6
        means = np.mean(values, 0)
        found[name] = means.mean(), means.std() / len(means) ** 0.5
    c = np.linspace(-1, 1, 20_001)
    wanted = float((c**2 * np.sqrt(4 - c**2)).sum() / np.sqrt(4 - c**2).sum())
    assert found["right"][1] < 0.002
    assert abs(found["right"][0] - wanted) < 4 * found["right"][1]
    assert abs(found["without factor"][0] - wanted) > 4 * found["without factor"][1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_alanine_dipeptide_has_the_energies_of_the_reference(kind):
    flow, reference = pretrained("ala2").requires_grad_(False), load_reference()
    one = BatchedTempering(
        flow.molecule, (300.0, 380.0, 480.0, 600.0), flow=flow, steps=FlowSteps(kind, n_proposals=6),
        n_replicas_per_temperature=16, n_dynamics_steps=25, swaps="random", device="cpu",
    )  # fmt: skip
    state, rows = one.start(), []
    for iteration in range(240):
        state, info = one.iterate(state)
        if iteration >= 40:
            rows.append([info.energies[info.levels == level].mean() for level in (0, 3)])
    blocks = np.array(rows).reshape(20, 10, 2).mean(1)
    for level, temperature in enumerate((300.0, 600.0)):
        known = reference.at(temperature)
        error = np.hypot(blocks[:, level].std(ddof=1) / 20**0.5, known.mean_energy_error)
        assert error < 2.0, "kJ/mol; a degree of freedom more or less is 1.2 at 300 K and 2.5 at 600 K"
        assert abs(blocks[:, level].mean() - known.mean_energy) < 4.0 * error


class Springs:
    """U = k |x|^2 / 2."""

    def __init__(self, k):
        self.k = k

    def evaluate(self, x):
        return 0.5 * self.k * (x * x).sum((0, 1)), -self.k * x


def after_moves(break_velocities):
    """x^2, v^2 and x v over their exact values of oscillators at omega dt = 1, after moves between dynamics."""
    dt, n, temperatures = 0.004, 40_000, torch.full((40_000,), 300.0)
    system = openmm.System()
    system.addParticle(1.0)
    langevin = BatchedLangevin(system, Springs(dt**-2), timestep_fs=1e3 * dt, friction_per_ps=20.0, dtype=torch.float64)
    g, width = seeded(1), (kT(300.0) * dt**2) ** 0.5
    state = langevin.start(width * torch.randn(n, 1, 3, generator=g), temperatures, generator=g)
    state, rows = langevin.run(state, 100, generator=g), []
    for _ in range(20):
        moved = torch.rand(n, generator=g) < 0.5
        new = langevin.moved(state, width * torch.randn(1, 3, n, generator=g), moved, generator=g)
        state = replace(new, velocities=state.velocities) if break_velocities else new
        state = langevin.run(state, 1, generator=g)
        x, v = state.positions / width, state.velocities / kT(300.0) ** 0.5
        rows.append([float((x * x).mean()), float((v * v).mean()), float((x * v).mean())])
    return np.array(rows).mean(0)


def test_velocities_after_a_move_are_those_that_dynamics_has():
    x2, v2, xv = after_moves(False)
    # half a step behind, v is what it is at the time of x plus omega dt/2 times x
    assert abs(x2 - 1.0) < 0.01 and abs(v2 - 1.0) < 0.01 and abs(xv - 0.5) < 0.01
    x2, v2, xv = after_moves(True)
    assert max(abs(x2 - 1.0), abs(v2 - 1.0)) > 0.05


# --- a batch of temperatures ------------------------------------------------------------------------------------------


def test_draws_and_scores_of_all_temperatures_together_are_those_of_each():
    flow = chain4_flow(0.2)
    x = torch.tensor(exact_start(4))
    parts = list(x.split([4, 6, 2]))
    for prepared, part, t in zip(prepare(flow, LADDER, parts, 5, 0.2, generator=seeded(1)), parts, LADDER, strict=True):
        placed = PlacedFlow(flow.at(t).exploring(0.2), part)
        assert torch.allclose(prepared.score(part, generator=seeded(1)), placed.score(part, generator=seeded(1)))
        drawn, log_q, valid = prepared.propose(5 * len(part), generator=seeded(1))
        assert valid.all() and len(drawn) == 5 * len(part)
        assert torch.allclose(log_q, placed.score(drawn, generator=seeded(1)), atol=1e-8)
        first = flow.zmatrix.root[0]
        assert torch.allclose(drawn[:, first], part[:, first].repeat(5, 1))
        with pytest.raises(ValueError, match=f"{5 * len(part)} draws were prepared, and 3 are asked for"):
            prepared.propose(3, generator=seeded(1))
        with pytest.raises(ValueError, match="not for other positions"):
            prepared.score(part.clone(), generator=seeded(1))


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_iteration_reports(kind, monkeypatch):
    energy = BatchedEnergy(harmonic_chain4().system, verify=False)
    asked = []
    evaluate = energy.evaluate
    monkeypatch.setattr(energy, "evaluate", lambda x: asked.append(x.shape[2]) or evaluate(x))
    one = BatchedTempering(
        harmonic_chain4(), LADDER, energy=energy, flow=chain4_flow(), n_replicas_per_temperature=3, n_dynamics_steps=7,
        steps=FlowSteps(kind, n_proposals=4, n_walk_steps=2), timestep_fs=0.5, device="cpu",
    )  # fmt: skip
    state = one.start()
    assert state.n_energy_evaluations == 9
    for iteration in range(3):
        before = state
        state, info = one.iterate(state)
        assert state.iteration == iteration + 1
        assert np.array_equal(info.levels, before.levels.numpy())
        assert info.positions.dtype == np.float32 and info.positions.shape == (9, 4, 3)
        exact = energy(torch.tensor(info.positions, dtype=torch.float64)).numpy()
        energy.n_evaluations -= 9
        assert np.allclose(info.energies, exact, atol=1e-2)
        assert np.array_equal(info.positions, state.dynamics.positions.permute(2, 0, 1).numpy())
        assert torch.equal(state.dynamics.temperatures, torch.tensor(LADDER)[state.levels])
        assert int((state.levels != before.levels).sum()) == info.swap_accepted.sum()
        met = {(0, 1): 0, (1, 2): 0, (0, 2): 0} | {((0, 1), (1, 2))[iteration % 2]: 3}
        assert {pair: info.swap_proposed[pair] for pair in met} == met
    assert state.n_energy_evaluations == sum(asked) + energy.n_evaluations
    counted = dict(zip(COUNTS, info.move_counts.sum(0).tolist(), strict=True))
    assert counted["independence_proposed"] == (0 if kind == "latent" else 36)
    assert counted["latent_proposed"] == (0 if kind == "independence" else 18)


def test_walkers_that_the_flow_cannot_represent_stay_and_are_counted():
    flow = pretrained("ala2").requires_grad_(False)
    positions = mirrored(flow.molecule).positions
    ends = []
    for its in (flow, None):
        one = BatchedTempering(
            flow.molecule, (300.0, 600.0), flow=its, steps=FlowSteps("mixed", n_proposals=2), device="cpu",
            n_replicas_per_temperature=2, n_dynamics_steps=2, timestep_fs=0.5,
        )  # fmt: skip
        state, info = one.iterate(one.start(positions * unit.nanometer))
        ends.append(state)
        if its is not None:
            counts = [dict(zip(COUNTS, row, strict=True)) for row in info.move_counts.tolist()]
            assert [c["unrepresentable"] for c in counts] == [2, 2]
            assert [c["independence_accepted"] + c["latent_accepted"] for c in counts] == [0, 0]
    assert torch.equal(ends[0].dynamics.positions, ends[1].dynamics.positions)


# --- directories ------------------------------------------------------------------------------------------------------


def equal(one, two):
    """Whether two records have the same bits, time apart."""
    arrays = ("temperatures", "levels", "energies", "swap_proposed", "swap_accepted", "positions")
    same = all(np.array_equal(getattr(one, name), getattr(two, name)) for name in (*arrays, "position_iterations"))
    return same and one.move_counts == two.move_counts and one.n_energy_evaluations == two.n_energy_evaluations


@pytest.fixture(scope="module")
def flow():
    return chain4_flow()


@pytest.fixture(scope="module")
def whole(flow, tmp_path_factory):
    """A directory with 12 iterations in one segment, and its record."""
    folder = tmp_path_factory.mktemp("whole")
    record = run_tempering(tempering(flow), folder, 12, store_every=5)
    assert [path.name for path in folder.iterdir()] == ["segment_000000000.npz"]
    return folder, record


@pytest.mark.parametrize(("with_flow", "swaps"), [(True, "random"), (False, "neighbours"), (False, "random")])
def test_pieces_give_the_bits_of_the_whole(flow, with_flow, swaps, tmp_path):
    rest = {"flow": flow if with_flow else None, "swaps": swaps}
    record = run_tempering(tempering(**rest), tmp_path / "one", 6)
    for n in (1, 4, 6):
        last = run_tempering(tempering(**rest), tmp_path / "two", n)
        assert last.n_iterations == n
    assert len(list((tmp_path / "two").iterdir())) == 3
    assert equal(record, last)
    assert equal(record, load_tempering(tmp_path / "two"))
    assert record.sampler == "batched" and record.n_replicas == 12
    assert record.move_counts[0].keys() == (set(COUNTS) if with_flow else set())
    other = run_tempering(tempering(**rest, seed=2), tmp_path / "three", 6)
    assert not equal(record, other)


def test_frames_are_stored_as_often_as_asked(whole):
    _, record = whole
    assert record.position_iterations.tolist() == [4, 9]
    assert record.positions.shape == (2, 12, 4, 3)
    assert record.levels.shape == record.energies.shape == (12, 12)
    energy = BatchedEnergy(harmonic_chain4().system, verify=False)
    for frame, iteration in zip(record.positions, record.position_iterations, strict=True):
        found = energy(torch.tensor(frame, dtype=torch.float64)).numpy()
        assert np.allclose(found, record.energies[iteration], atol=1e-2)


def test_segments_end_when_they_are_large(flow, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(tempering_storage, "SEGMENT_BYTES", 12 * 4 * 3 * 4)
    record = run_tempering(tempering(flow), tmp_path, 12, store_every=5)
    assert sorted(path.name[-6:-4] for path in tmp_path.iterdir()) == ["00", "10"]
    assert equal(record, whole[1])


KILLED = """
import os, sys, numpy, torch
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
sys.path.insert(0, "tests")
import test_tempering as t
t.tempering_storage.SEGMENT_SECONDS = 0.0
savez, n = numpy.savez, 0
def dying(file, **arrays):
    global n
    n += 1
    savez(file, **arrays)
    if n == 4:
        file.flush()
        file.truncate(file.tell() // 2)
        os.kill(os.getpid(), 9)
numpy.savez = dying
t.run_tempering(t.tempering(t.chain4_flow()), sys.argv[1], 12, store_every=5)
"""


def test_a_kill_in_the_middle_of_writing_loses_nothing_but_time(flow, whole, tmp_path):
    root = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, env=environment, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    assert len(list(tmp_path.glob("segment_*.npz"))) == 3
    assert len(list(tmp_path.glob(".segment_*.partial.npz"))) == 1
    assert load_tempering(tmp_path).n_iterations == 3
    assert equal(run_tempering(tempering(flow), tmp_path, 12, store_every=5), whole[1])
    assert not list(tmp_path.glob(".*"))


def test_an_interruption_keeps_what_is_complete(flow, whole, tmp_path):
    def stop(done, total, message):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tempering(tempering(flow), tmp_path, 12, store_every=5, progress=stop)
    assert load_tempering(tmp_path).n_iterations == 1
    assert equal(run_tempering(tempering(flow), tmp_path, 12, store_every=5), whole[1])


def test_progress_tells_of_acceptance_and_round_trips(flow, tmp_path):
    told = []
    run_tempering(tempering(flow, temperatures=(300.0, 310.0)), tmp_path, 16, progress=lambda *x: told.append(x))
    assert told[-1][:2] == (16, 16)
    record = load_tempering(tmp_path)
    trips = 0
    for path in record.levels.T:  # every return to the bottom after a visit to the top
        turns = [level for i, level in enumerate(path) if i == 0 or path[i - 1] != level]
        trips += sum(turns[i : i + 3] == [0, 1, 0] for i in range(len(turns)))
    counts = {name: sum(row[name] for row in record.move_counts) for name in COUNTS}
    proposed = counts["independence_proposed"] + counts["latent_proposed"]
    accepted = counts["independence_accepted"] + counts["latent_accepted"]
    swaps = 100 * record.swap_accepted.sum() / record.swap_proposed.sum()
    assert trips > 3
    text = f"{swaps:.0f} % of swaps and {100 * accepted / proposed:.0f} % of proposals accepted, {trips} round trips"
    assert told[-1][2] == text
    told.clear()
    run_tempering(tempering(flow, temperatures=(300.0, 310.0)), tmp_path, 17, progress=lambda *x: told.append(x))
    assert int(told[-1][2].split()[-3]) >= trips


def test_a_run_that_is_complete_is_only_read(flow, whole):
    folder, record = whole
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert equal(run_tempering(tempering(flow), folder, 5, store_every=5), record)
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, "seed was 1, now 2"),
        ({"swaps": "random"}, "swaps was 'neighbours', now 'random'"),
        (
            {"n_dynamics_steps": 6, "friction_per_ps": 2.0},
            "n_dynamics_steps was 5, now 6; friction_per_ps was 1",
        ),
        ({"temperatures": (300.0, 410.0, 600.0)}, r"temperatures was \[300.0, 420.0, 600.0\], now \[300.0, 410.0"),
        ({"flow": None}, "flow was '[0-9a-f]{16}', now None; steps was"),
        ({"flow": 0.1}, "flow was '[0-9a-f]{16}', now '[0-9a-f]{16}'; choose another folder"),
    ],
)
def test_another_run_in_the_same_directory_is_refused(flow, whole, changes, message):
    if changes.get("flow") is not None:
        changes = {"flow": chain4_flow(changes["flow"])}
    with pytest.raises(ValueError, match=f"has a parallel tempering with other settings: {message}"):
        run_tempering(tempering(**{"flow": flow, **changes}), whole[0], 14, store_every=5)
    with pytest.raises(ValueError, match="store_every was 5, now 1"):
        run_tempering(tempering(flow), whole[0], 14)


def pieces(folder):
    for n in (2, 4, 6):
        run_tempering(tempering(), folder, n)
    return sorted(folder.iterdir())


def cut(paths):
    paths[1].write_bytes(paths[1].read_bytes()[:-1000])


def altered(paths):
    data = bytearray(paths[1].read_bytes())
    data[len(data) // 2] ^= 255
    paths[1].write_bytes(data)


def foreign(paths):
    np.savez(paths[1], something=np.arange(3))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "is not a segment of a parallel tempering, or it is cut short or damaged"),
        (altered, "is not a segment of a parallel tempering, or it is cut short or damaged"),
        (foreign, "is not a segment of a parallel tempering: it has no end_levels"),
        (lambda paths: paths[1].unlink(), "begins with iteration 4, but those before it end with 2"),
    ],
    ids=["cut", "altered", "foreign", "missing"],
)
def test_damage_is_named_with_a_way_out(tmp_path, damage, message):
    paths = pieces(tmp_path)
    record = load_tempering(tmp_path)
    damage(paths)
    for work in (lambda: load_tempering(tmp_path), lambda: run_tempering(tempering(), tmp_path, 8)):
        with pytest.raises(ValueError, match=f"{message}.*; remove segment_.* to go on from iteration 2"):
            work()
    for path in paths[1:]:
        path.unlink(missing_ok=True)
    assert equal(run_tempering(tempering(), tmp_path, 6), record)


def test_two_processes_in_one_directory_are_noticed(tmp_path):
    def other(done, total, message):
        (tmp_path / "segment_000000000.npz").write_bytes(b"")

    with pytest.raises(ValueError, match="has appeared meanwhile: another process runs in this directory"):
        run_tempering(tempering(), tmp_path, 1, progress=other)


def test_a_directory_without_segments(tmp_path):
    with pytest.raises(ValueError, match="has no parallel tempering: there is no file segment"):
        load_tempering(tmp_path)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperatures": [300.0, 300.0]}, "more than once in a ladder: 300 K"),
        ({"temperatures": [600.0, 300.0]}, "must ascend"),
        ({"swaps": "all"}, "unknown swaps 'all'; choose from neighbours, random"),
        ({"n_replicas_per_temperature": 0}, "n_replicas_per_temperature must be a whole number of at least 1, not 0"),
        ({"n_dynamics_steps": 0}, "n_dynamics_steps must be a whole number of at least 1, not 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0, not -1"),
        ({"timestep_fs": -1.0}, "timestep_fs must be finite and above 0"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        tempering(**changes)


def test_a_flow_of_another_molecule_is_refused(flow):
    with pytest.raises(ValueError, match="the flow is of chain with 4 atoms; the System has 22 particles"):
        tempering(flow, alanine_dipeptide("vacuum"))


@pytest.mark.parametrize("name", ["n_iterations", "store_every"])
def test_numbers_of_iterations_that_make_no_sense(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, not 0"):
        run_tempering(tempering(), tmp_path, **{"n_iterations": 3, name: 0})


def test_rigid_bonds_allow_two_femtoseconds():
    assert BatchedTempering(chain4(), LADDER, device="cpu").settings["timestep_fs"] == 1.0
    assert BatchedTempering(rigid_harmonic_trimer(), LADDER, device="cpu").settings["timestep_fs"] == 2.0
