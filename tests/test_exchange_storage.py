"""Reading back runs of openmmtools: what was run is what is read, and files that cannot be read say why."""

import logging
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import netCDF4
import numpy as np
import pytest
import torch
from openmm import unit

import openmm_tsf as tsf
from openmm_tsf.exchange import FlowMove, acceptance, read_exchange, to_mdtraj
from openmm_tsf.exchange.netcdf import _flow_moves, open_run
from openmm_tsf.flow_steps import COUNTS
from openmm_tsf.units import kT

KELVIN = (420.0, 300.0, 600.0)
"""Of the states of the runs: not in order, as a user may have it."""
N_ITERATIONS = 6


def dynamics(n_steps: int = 5):
    from openmmtools import mcmc

    return mcmc.LangevinDynamicsMove(
        timestep=1.0 * unit.femtosecond, collision_rate=5.0 / unit.picosecond, n_steps=n_steps, reassign_velocities=True
    )


def create(molecule, path: Path, move, kelvin=KELVIN, **settings):
    """A replica exchange sampler that was created but not run, and its reporter."""
    from openmmtools import states
    from openmmtools.multistate import MultiStateReporter, ReplicaExchangeSampler

    logging.getLogger("openmmtools").setLevel(logging.ERROR)
    thermodynamic = [states.ThermodynamicState(molecule.system, t * unit.kelvin) for t in kelvin]
    sampler = ReplicaExchangeSampler(mcmc_moves=move, number_of_iterations=1000, online_analysis_interval=None)
    reporter = MultiStateReporter(str(path), **settings)
    sampler.create(thermodynamic, [states.SamplerState(molecule.positions * unit.nanometer)], reporter)
    return sampler, reporter


@pytest.fixture(scope="module")
def run(ala2, tmp_path_factory):
    """(path, moves, what happened in each iteration) of a short run with flow moves; frames every second iteration."""
    from openmmtools import mcmc

    np.random.seed(5)  # noqa: NPY002 - openmmtools draws from it
    path = tmp_path_factory.mktemp("run") / "run.nc"
    flows = [FlowMove("ala2", n_proposals=3), FlowMove("ala2", n_proposals=2, kind="mixed", n_walk_steps=2)]
    move = mcmc.SequenceMove([dynamics(), flows[0], mcmc.WeightedMove([(flows[1], 0.5), (dynamics(), 0.5)])])
    sampler, reporter = create(ala2, path, move, checkpoint_interval=2)
    happened = []
    for _ in range(N_ITERATIONS):
        sampler.run(1)
        happened.append(
            (
                np.array(sampler._replica_thermodynamic_states),
                np.array(sampler._energy_thermodynamic_states),
                np.array([s.positions.value_in_unit(unit.nanometer) for s in sampler.sampler_states]),
                np.array(sampler._n_proposed_matrix),
                np.array(sampler._n_accepted_matrix),
            )
        )
    moves = sampler.mcmc_moves
    reporter.close()
    return path, moves, [np.array(part) for part in zip(*happened, strict=True)]


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy of both files of the run, to be spoilt."""
    for source in run[0].parent.glob("*.nc"):
        shutil.copy(source, tmp_path)
    return tmp_path / run[0].name


# --- what was run is what is read -------------------------------------------------------------------------------------


def test_the_record_is_what_happened(run, ala2):
    path, _, (states, reduced, positions, proposed, accepted) = run
    record = read_exchange(path)
    assert record.sampler == "openmmtools"
    assert record.temperatures.tolist() == sorted(KELVIN)
    assert np.array_equal(record.temperatures[record.levels], np.array(KELVIN)[states])
    own = np.take_along_axis(reduced, states[:, :, None], 2)[:, :, 0] * kT(np.array(KELVIN)[states])
    assert np.allclose(record.energies, own, rtol=0, atol=1e-9)
    order = np.argsort(KELVIN)
    assert np.array_equal(record.swap_proposed, proposed.sum(0)[order][:, order])
    assert np.array_equal(record.swap_accepted, accepted.sum(0)[order][:, order])
    assert record.position_iterations.tolist() == [1, 3, 5]  # iterations 2, 4 and 6; the first is number 0 here
    assert record.positions.dtype == np.float32
    assert np.allclose(record.positions, positions[[1, 3, 5]], rtol=0, atol=1e-6)


def test_stored_frames_have_the_stored_energies(run, ala2):
    record = read_exchange(run[0])
    frames = torch.as_tensor(record.positions.reshape(-1, 22, 3), dtype=torch.float64)
    again = tsf.OpenMMEnergy(ala2.system)(frames).numpy()
    assert np.allclose(again, record.energies[record.position_iterations].ravel(), rtol=0, atol=0.05)
    late = record.energies[record.position_iterations - 1].ravel()
    assert not np.allclose(again, late, rtol=0, atol=0.05)  # the iteration before has other energies


def test_acceptance_is_that_of_the_moves(run):
    path, moves, _ = run
    rows = acceptance(path)
    assert [(row["state"], row["kind"]) for row in rows] == [
        (state, kind) for state in range(3) for kind in ("independence", "latent")
    ]
    for row in rows:
        sequence = list(moves[row["state"]])
        statistics = [sequence[1].statistics, sequence[2].move_set[0][0].statistics]
        assert row["temperature"] == KELVIN[row["state"]]
        for what in ("proposed", "accepted", "nonfinite", "off_chart"):
            assert row[what] == sum(each[f"{row['kind']}_{what}"] for each in statistics)
        assert row["unrepresentable"] == sum(each["unrepresentable"] for each in statistics)
        share = row["accepted"] / row["proposed"] if row["proposed"] else math.nan
        assert row["share"] == pytest.approx(share, nan_ok=True)
    independence = [row for row in rows if row["kind"] == "independence"]
    assert all(row["proposed"] >= 3 * N_ITERATIONS for row in independence)
    assert sum(row["accepted"] for row in independence) > 0
    totals = read_exchange(path).move_counts
    by_kelvin = sorted(independence, key=lambda row: row["temperature"])
    assert [total["independence_proposed"] for total in totals] == [row["proposed"] for row in by_kelvin]
    assert all(set(total) == set(COUNTS) for total in totals)


def test_flow_moves_are_found_however_deep():
    flow = {"_serialized__class_name": "FlowMove", "kind": "latent", "statistics": {}}
    other = {"_serialized__class_name": "LangevinDynamicsMove", "n_steps": 5}
    deep = {"move_set": [(flow, 0.3), ({"move_list": [other, {"move_list": [flow]}]}, 0.7)]}
    assert list(_flow_moves(deep)) == [flow, flow]
    assert list(_flow_moves(other)) == []


def test_frames_of_a_state_follow_the_state(run, ala2):
    path, _, (states, _, positions, _, _) = run
    trajectories = [to_mdtraj(path, topology, state) for state, topology in enumerate(3 * [ala2.topology])]
    for state, trajectory in enumerate(trajectories):
        assert trajectory.time.tolist() == [2, 4, 6]
        assert trajectory.unitcell_vectors is None  # openmmtools stores boxes of molecules without one
        for frame, iteration in enumerate((2, 4, 6)):
            replica = int(np.flatnonzero(states[iteration - 1] == state)[0])
            assert np.allclose(trajectory.xyz[frame], positions[iteration - 1, replica], rtol=0, atol=1e-6)
    assert to_mdtraj(path, ala2, 1).topology == to_mdtraj(path, ala2.mdtraj_topology, 1).topology
    assert np.array_equal(to_mdtraj(path, ala2).xyz, trajectories[0].xyz)


def test_open_and_closed_reporters_and_strings_are_accepted(ala2, tmp_path):
    path = tmp_path / "small.nc"
    sampler, reporter = create(ala2, path, dynamics(), checkpoint_interval=1, checkpoint_storage="elsewhere.nc")
    sampler.run(2)
    assert reporter.is_open()
    live = read_exchange(reporter)
    assert live.positions.shape == (2, 3, 22, 3)
    assert live.move_counts == ({}, {}, {}) and acceptance(reporter) == []
    for _ in range(3):  # HDF5 crashes the process if it opens a file twice
        assert np.array_equal(read_exchange(path).levels, live.levels) and acceptance(path) == []
    assert reporter.is_open()
    sampler.run(1)  # still can be written
    reporter.close()
    assert read_exchange(reporter).n_iterations == 3
    without = read_exchange(str(path))  # the checkpoint file has a name of its own
    assert without.n_iterations == 3 and without.positions.shape == (0, 3, 0, 3)


def test_analysis_particles_are_stored_more_often(ala2, tmp_path):
    whole = tmp_path / "whole.nc"
    sampler, reporter = create(
        ala2, whole, dynamics(), checkpoint_interval=3, analysis_particle_indices=tuple(range(22)), position_interval=2
    )
    sampler.run(4)
    reporter.close()
    assert read_exchange(whole).position_iterations.tolist() == [1, 3]
    assert to_mdtraj(whole, ala2).time.tolist() == [2, 4]

    part = tmp_path / "part.nc"
    heavy = tuple(ala2.mdtraj_topology.select("symbol != H"))
    sampler, reporter = create(
        ala2, part, dynamics(), checkpoint_interval=3, analysis_particle_indices=tuple(int(i) for i in heavy)
    )
    sampler.run(4)
    reporter.close()
    assert to_mdtraj(part, ala2).time.tolist() == [3]
    some = to_mdtraj(part, ala2.mdtraj_topology.subset(heavy))
    assert some.time.tolist() == [1, 2, 3, 4]
    assert np.allclose(some.xyz[2], to_mdtraj(part, ala2).xyz[0, heavy])
    assert read_exchange(part).positions.shape == (1, 3, 22, 3)
    with pytest.raises(ValueError, match="hold frames of 10 and 22 atoms; asked for frames of 3 atoms"):
        to_mdtraj(part, ala2.mdtraj_topology.subset([0, 1, 2]))


def test_only_whole_iterations_are_read(copy):
    before = read_exchange(copy)
    with netCDF4.Dataset(copy, "a") as data:  # as after a crash in the middle of iteration 6
        data.variables["last_iteration"][0] = 5
    after = read_exchange(copy)
    assert after.n_iterations == 5 and after.position_iterations.tolist() == [1, 3]
    assert np.array_equal(after.energies, before.energies[:5])


def test_a_run_goes_on_and_is_read_on(copy):
    from openmmtools.multistate import ReplicaExchangeSampler

    before = read_exchange(copy)
    sampler = ReplicaExchangeSampler.from_storage(str(copy))
    sampler.run(2)
    sampler._reporter.close()
    after = read_exchange(copy)
    assert after.n_iterations == N_ITERATIONS + 2
    assert np.array_equal(after.levels[:N_ITERATIONS], before.levels)
    for row, old in zip(after.move_counts, before.move_counts, strict=True):
        assert row["independence_proposed"] >= old["independence_proposed"] + 6


def test_a_run_of_another_process_can_be_looked_at(run, copy):
    code = f"import netCDF4; files = [netCDF4.Dataset(p, 'a') for p in {[str(p) for p in copy.parent.glob('*.nc')]}]"
    code += "; files[0].variables['last_iteration'][0]; print('open', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"open\n"
        with pytest.raises(OSError):
            netCDF4.Dataset(copy)  # HDF5 has locked it
        assert np.array_equal(read_exchange(copy).positions, read_exchange(run[0]).positions)
        writer.communicate(b"\n")
    assert writer.returncode == 0


def test_reading_prints_nothing(run):
    code = f"from openmm_tsf.exchange import acceptance, read_exchange; acceptance({str(run[0])!r})"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- what cannot be read ----------------------------------------------------------------------------------------------

READERS = (acceptance, read_exchange)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("suffix", ["", "_checkpoint"])
def test_a_file_cut_short_says_so(copy, reader, share, suffix):
    path = copy.with_name(f"run{suffix}.nc")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=r"run\.nc or its checkpoint file cannot be read .* cut short .* start anew"):
        reader(copy)
    assert time.perf_counter() - begin < 2.0  # without openmmtools' eight seconds of attempts


def test_other_files_are_refused(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.nc; give the path"):
        acceptance(tmp_path / "none.nc")
    with pytest.raises(ValueError, match="is it the checkpoint file"):
        acceptance(copy.with_name("run_checkpoint.nc"))
    with netCDF4.Dataset(tmp_path / "other.nc", "w") as data:
        data.title = "something else"
    with pytest.raises(ValueError, match="not the main file of an openmmtools multistate run"):
        read_exchange(tmp_path / "other.nc")
    text = tmp_path / "text.nc"
    text.write_text("hello")
    with pytest.raises(ValueError, match="is no NetCDF file"):
        read_exchange(text)


@pytest.mark.parametrize("kind", [OSError, RuntimeError, KeyError, IndexError, AttributeError])
def test_errors_of_the_caller_are_not_those_of_the_file(copy, kind):
    with pytest.raises(kind, match="my own"), open_run(copy):
        raise kind("my own")
    with pytest.raises(ValueError, match="cut short or damaged"), open_run(copy) as stored:
        stored.array("no such variable")


def test_without_its_checkpoint_file_only_frames_are_missing(copy, ala2):
    before = read_exchange(copy)
    copy.with_name("run_checkpoint.nc").unlink()
    after = read_exchange(copy)
    assert np.array_equal(after.energies, before.energies) and len(after.positions) == 0
    assert len(acceptance(copy)) == 6
    with pytest.raises(ValueError, match="hold frames of no atoms; asked for frames of 22 atoms"):
        to_mdtraj(copy, ala2)


def test_states_that_differ_in_more_than_temperature_are_no_ladder(copy):
    with netCDF4.Dataset(copy, "a") as data:
        data.variables["energies"][3, 1, 0] += 0.01
    with pytest.raises(ValueError, match="differ in more than temperature"):
        read_exchange(copy)


def test_nothing_to_read(ala2, tmp_path):
    sampler, reporter = create(ala2, tmp_path / "fresh.nc", dynamics(), kelvin=(300.0, 300.0, 600.0))
    with pytest.raises(ValueError, match="no iteration yet; run the sampler first"):
        read_exchange(reporter)
    sampler.run(1)
    with pytest.raises(ValueError, match=r"states of the same temperature \(300, 300, 600 K\)"):
        read_exchange(reporter)
    with pytest.raises(ValueError, match="states 0 to 2; asked for 3"):
        to_mdtraj(reporter, ala2, 3)
    assert to_mdtraj(reporter, ala2, 2).n_frames == 0
    reporter.close()
