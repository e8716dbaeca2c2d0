"""Langevin dynamics: right statistics, frames that interruptions do not change, and clear refusals."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import mdtraj as md
import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit

from openmm_tsf import batched_walkers, dynamics, walkers
from openmm_tsf.dcd import GrowingDcd
from openmm_tsf.dynamics import simulate
from openmm_tsf.energy import OpenMMEnergy
from openmm_tsf.systems import Molecule, alanine_dipeptide
from openmm_tsf.units import kT

SHORT = {"temperature": 600.0, "n_frames": 60, "spacing_fs": 6.0, "n_walkers": 3, "seed": 7, "equilibration_ps": 0.03}
SEGMENT = 18
"""Steps of three rows of SHORT."""


def triangle(constrained=False):
    """Three carbon atoms joined by stiff springs: three vibrations, nearly harmonic."""
    topology, system, bonds = app.Topology(), openmm.System(), openmm.HarmonicBondForce()
    residue = topology.addResidue("TRI", topology.addChain())
    for name in ("A", "B", "C"):
        topology.addAtom(name, app.element.carbon, residue)
        system.addParticle(12.0)
    atoms = list(topology.atoms())
    for i, j in ((0, 1), (1, 2), (0, 2)):
        topology.addBond(atoms[i], atoms[j])
        bonds.addBond(i, j, 0.15, 2e5)
    if constrained:
        system.addConstraint(0, 1, 0.15)
    system.addForce(bonds)
    positions = 0.15 * np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.75**0.5, 0.0]])
    return Molecule(system, topology, positions, "triangle")


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    """Segments of three rows for alanine dipeptide in SHORT, so that short runs have several."""
    monkeypatch.setattr(walkers, "ATOM_STEPS", 22 * SEGMENT)
    monkeypatch.setattr(batched_walkers, "ATOM_STEPS", 3 * 22 * SEGMENT)


@pytest.fixture(scope="module", params=["batched", "openmm"])
def short(request):
    """SHORT with either engine."""
    return {**SHORT, "engine": request.param}


@pytest.fixture(scope="module")
def vacuum():
    return alanine_dipeptide("vacuum")


@pytest.fixture(scope="module")
def whole_run(short, vacuum, tmp_path_factory):
    """The bytes of training.dcd, and the frames, of a run that nothing interrupts."""
    directory = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walkers, "ATOM_STEPS", 22 * SEGMENT)
        patch.setattr(batched_walkers, "ATOM_STEPS", 3 * 22 * SEGMENT)
        frames = simulate(vacuum, directory=directory, **short)
    return (directory / "training.dcd").read_bytes(), frames


def stop_after(n_calls, error=KeyboardInterrupt):
    calls = []

    def progress(done, total, message):
        calls.append((done, total, message))
        if len(calls) == n_calls:
            raise error

    return progress


def test_files_and_frames(short, whole_run, vacuum, tmp_path):
    calls = []
    frames = simulate(vacuum, directory=tmp_path / "new" / "run", progress=lambda *call: calls.append(call), **short)
    assert sorted(p.name for p in (tmp_path / "new" / "run").iterdir()) == [
        "simulation.npz",
        "topology.pdb",
        "training.dcd",
    ]
    loaded = md.load(str(tmp_path / "new/run/training.dcd"), top=str(tmp_path / "new/run/topology.pdb"))
    assert np.array_equal(loaded.xyz, frames.positions)
    assert (len(frames), frames.n_walkers, frames.positions.dtype) == (60, 3, np.float32)
    assert (frames.temperatures == 600.0).all()
    assert calls[0] == (0, 60, "equilibrating at 600 K, 0 of 0.03 ps")
    assert calls[-1] == (60, 60, "3 walkers at 600 K")
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)
    assert np.array_equal(frames.positions, whole_run[1].positions)


def test_walkers_and_times_differ_and_move_on_smoothly(whole_run):
    x = whole_run[1].positions.reshape(20, 3, 22, 3).astype(np.float64)
    assert np.abs(x[0, 0] - x[0, 1]).max() > 0.01
    assert (
        np.abs(x[:, 0] - x[:, 1]).mean() > 2 * np.abs(np.diff(x[:, 0], axis=0)).mean()
    )  # time-major, not walker-major
    assert np.abs(np.diff(x, axis=0)).max() < 0.07  # 6 fs at 600 K; a restart would jump


def test_seeds_and_settings_matter(short, whole_run, vacuum, tmp_path):
    other = simulate(vacuum, directory=tmp_path, **{**short, "seed": 8})
    assert np.abs(other.positions - whole_run[1].positions).max() > 0.01


def test_more_equilibration_drops_the_beginning(short, whole_run, vacuum, tmp_path):
    later = simulate(vacuum, directory=tmp_path, **{**short, "n_frames": 30, "equilibration_ps": 0.09})
    assert np.array_equal(later.positions, whole_run[1].positions[30:])


def test_number_of_frames_is_rounded_up(short, vacuum, tmp_path):
    frames = simulate(vacuum, directory=tmp_path, **{**short, "n_frames": 4, "equilibration_ps": 0.0})
    assert (len(frames), frames.n_times) == (6, 2)


@pytest.mark.parametrize("n_cores", [1, 3])
def test_number_of_threads_does_not_matter(short, whole_run, vacuum, tmp_path, monkeypatch, n_cores):
    monkeypatch.setattr(walkers, "n_cores", lambda: n_cores)
    torch.set_num_threads(n_cores)
    try:
        simulate(vacuum, directory=tmp_path, **short)
    finally:
        torch.set_num_threads(1)
    assert (tmp_path / "training.dcd").read_bytes() == whole_run[0]


@pytest.mark.parametrize("n_calls", [1, 2, 3, 6])
def test_interrupted_and_resumed(short, whole_run, vacuum, tmp_path, n_calls):
    with pytest.raises(KeyboardInterrupt):
        simulate(vacuum, directory=tmp_path, progress=stop_after(n_calls), **short)
    with pytest.raises(KeyboardInterrupt):
        simulate(vacuum, directory=tmp_path, progress=stop_after(2), **short)
    frames = simulate(vacuum, directory=tmp_path, **short)
    assert (tmp_path / "training.dcd").read_bytes() == whole_run[0]
    assert np.array_equal(frames.positions, whole_run[1].positions)


@pytest.mark.parametrize("junk", [10, 1000, 5000])
def test_frames_behind_the_last_state_are_cut_off(short, whole_run, vacuum, tmp_path, junk):
    with pytest.raises(KeyboardInterrupt):
        simulate(vacuum, directory=tmp_path, progress=stop_after(5), **short)
    with (tmp_path / "training.dcd").open("ab") as file:  # as after kill -9 between frames and state
        file.write(b"x" * junk)
    simulate(vacuum, directory=tmp_path, **short)
    assert (tmp_path / "training.dcd").read_bytes() == whole_run[0]


def test_another_state_gives_other_frames(short, whole_run, vacuum, tmp_path):
    """The control of the tests above: they would notice a state that is slightly off."""
    with pytest.raises(KeyboardInterrupt):
        simulate(vacuum, directory=tmp_path, progress=stop_after(4), **short)
    data = dict(np.load(tmp_path / "simulation.npz"))
    data["velocities"][0, 0, 0] += 1e-3  # nm/ps, a thousandth of what is usual
    np.savez(tmp_path / "simulation.npz", **data)
    simulate(vacuum, directory=tmp_path, **{**short})
    found = (tmp_path / "training.dcd").read_bytes()
    assert len(found) == len(whole_run[0])
    assert found != whole_run[0]


SCRIPT = """
    import signal
    import sys
    from openmm_tsf import batched_walkers, walkers
    from openmm_tsf.dynamics import simulate
    from openmm_tsf.energy import batched
    from openmm_tsf.systems import alanine_dipeptide
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell may ignore it
    batched.PAYS_OFF = float("inf")  # compiling would take longer than the test
    walkers.ATOM_STEPS = 22 * {steps}
    batched_walkers.ATOM_STEPS = 3 * 22 * {steps}
    simulate(
        alanine_dipeptide("vacuum"), directory=sys.argv[1], temperature=600.0, n_frames={n_frames}, spacing_fs=6.0,
        n_walkers=3, seed=7, equilibration_ps=0.03, engine=sys.argv[2], progress=lambda *call: print(*call, flush=True),
    )
"""


def start(directory, engine, steps, n_frames):
    script = textwrap.dedent(SCRIPT.format(steps=steps, n_frames=n_frames))
    return subprocess.Popen(
        [sys.executable, "-c", script, str(directory), engine],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_killed_and_resumed(short, vacuum, tmp_path):
    n_frames = {"batched": 150, "openmm": 600}[short["engine"]]  # some seconds, long after the signal
    process = start(tmp_path / "killed", short["engine"], SEGMENT, n_frames)
    for _ in range(4):
        process.stdout.readline()
    time.sleep(0.013)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    for name in ("killed", "whole"):
        simulate(vacuum, directory=tmp_path / name, **{**short, "n_frames": n_frames})
    killed, whole = ((tmp_path / name / "training.dcd").read_bytes() for name in ("killed", "whole"))
    assert killed == whole


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for children")
def test_ctrl_c_stops_at_once_within_a_segment(short, tmp_path):
    process = start(tmp_path, short["engine"], 10_000_000, 1_000_000)  # a segment of minutes
    process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert "KeyboardInterrupt" in errors
    assert int(np.load(tmp_path / "simulation.npz")["row"]) == 0


def test_a_complete_run_returns_at_once(short, whole_run, vacuum, tmp_path, monkeypatch):
    simulate(vacuum, directory=tmp_path, **short)
    stamp = (tmp_path / "training.dcd").stat().st_mtime_ns
    for name in ("BatchedWalkers", "OpenMMWalkers"):
        monkeypatch.setattr(dynamics, name, None)
    frames = simulate(vacuum, directory=tmp_path, **short)
    assert np.array_equal(frames.positions, whole_run[1].positions)
    assert (tmp_path / "training.dcd").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 500.0}, r"temperature was 600\.0, now 500\.0"),
        ({"seed": 8, "n_walkers": 5}, r"n_walkers was 3, now 5; seed was 7, now 8"),
        ({"n_frames": 61}, r"n_frames was 60, now 61"),
        ({"timestep_fs": 0.5}, r"timestep_fs was 1\.0, now 0\.5"),
    ],
)
def test_a_folder_of_another_run_is_refused(short, vacuum, tmp_path, change, message):
    with pytest.raises(KeyboardInterrupt):
        simulate(vacuum, directory=tmp_path, progress=stop_after(3), **short)
    before = (tmp_path / "training.dcd").read_bytes()
    with pytest.raises(
        ValueError, match="has a simulation with other settings: " + message + "; choose another folder"
    ):
        simulate(vacuum, directory=tmp_path, **{**short, **change})
    assert (tmp_path / "training.dcd").read_bytes() == before


def test_a_folder_of_another_molecule_is_refused(short, ala2, vacuum, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        simulate(vacuum, directory=tmp_path, progress=stop_after(1), **short)
    with pytest.raises(ValueError, match="molecule was '"):
        simulate(ala2, directory=tmp_path, **short)


def test_foreign_and_damaged_files_are_refused(short, vacuum, tmp_path):
    (tmp_path / "training.dcd").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"has a training\.dcd but no simulation\.npz"):
        simulate(vacuum, directory=tmp_path, **short)
    assert (tmp_path / "training.dcd").read_bytes() == b"precious"
    (tmp_path / "training.dcd").unlink()
    with pytest.raises(KeyboardInterrupt):
        simulate(vacuum, directory=tmp_path, progress=stop_after(5), **short)
    good = (tmp_path / "training.dcd").read_bytes()
    for bad in (good[:-1], good[:100], b"y" + good[1:]):
        (tmp_path / "training.dcd").write_bytes(bad)
        with pytest.raises(ValueError, match="is not the file that was written here"):
            simulate(vacuum, directory=tmp_path, **short)
        assert (tmp_path / "training.dcd").read_bytes() == bad
    (tmp_path / "simulation.npz").write_bytes((tmp_path / "simulation.npz").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"simulation\.npz is not the state of a simulation, or it is cut short"):
        simulate(vacuum, directory=tmp_path, **short)


def test_a_folder_in_use_is_refused(short, vacuum, tmp_path):
    pytest.importorskip("fcntl")
    with pytest.raises(KeyboardInterrupt):
        simulate(vacuum, directory=tmp_path, progress=stop_after(5), **short)
    other = GrowingDcd(tmp_path / "training.dcd", vacuum.topology, 0.001, 20, 3)
    with pytest.raises(ValueError, match=r"training\.dcd is being written by another process"):
        simulate(vacuum, directory=tmp_path, **short)
    other.close()


def test_full_disk_loses_nothing_that_was_complete(short, whole_run, vacuum, tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"training\.dcd"):
            simulate(vacuum, directory=tmp_path, **short)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert int(np.load(tmp_path / "simulation.npz")["row"]) > 5
    simulate(vacuum, directory=tmp_path, **short)
    assert (tmp_path / "training.dcd").read_bytes() == whole_run[0]


def test_folder_that_cannot_be_made(short, vacuum, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        simulate(vacuum, directory=tmp_path / "file" / "run", **short)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be finite and above 0 K"),
        ({"n_frames": 0}, "n_frames must be at least 1, not 0"),
        ({"n_walkers": 0}, "n_walkers must be at least 1, not 0"),
        ({"spacing_fs": 20.5}, r"spacing_fs=20\.5 is no multiple of timestep_fs=1"),
        ({"spacing_fs": 0.5}, r"spacing_fs=0\.5 is no multiple of timestep_fs=1"),
        ({"spacing_fs": -20.0}, "spacing_fs must be finite and above 0, not -20"),
        ({"friction_per_ps": 0.0}, "friction_per_ps must be finite and above 0, not 0"),
        ({"equilibration_ps": -1.0}, "equilibration_ps must be finite and at least 0, not -1"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"engine": None, "platform": "CUDDA"}, "no OpenMM platform 'CUDDA' here; available are"),
        ({"engine": "batched", "platform": "CPU"}, "platform = 'CPU' is an option of OpenMM"),
        ({"engine": "magic"}, "unknown engine 'magic'; choose from batched, openmm"),
    ],
)
def test_settings_that_make_no_sense(short, vacuum, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        simulate(vacuum, directory=tmp_path / "run", **{**short, **change})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("timestep", [6.0, 20.0])
@pytest.mark.parametrize("platform", ["CPU", "Reference"])
def test_an_exploded_walker_is_named(vacuum, tmp_path, timestep, platform):
    settings = {**SHORT, "timestep_fs": timestep, "spacing_fs": 60.0, "n_frames": 600, "platform": platform}
    with pytest.raises(
        ValueError, match=rf"walker \d exploded at about .* ps .*use a smaller timestep_fs than {timestep:g}"
    ):
        simulate(vacuum, directory=tmp_path, **settings)


@pytest.mark.parametrize("timestep", [6.0, 20.0])
def test_exploded_walkers_of_a_batch_are_named(vacuum, tmp_path, timestep):
    settings = {**SHORT, "timestep_fs": timestep, "spacing_fs": 60.0, "n_frames": 600, "engine": "batched"}
    with pytest.raises(ValueError, match=rf"walker.* exploded .*use a smaller timestep_fs than {timestep:g}"):
        simulate(vacuum, directory=tmp_path, **settings)


def test_constraints_hold_and_the_default_step_is_longer(short, tmp_path):
    molecule = alanine_dipeptide("vacuum", constraints="HBonds")
    frames = simulate(molecule, directory=tmp_path, **short)
    x = frames.positions.astype(np.float64)
    i, j = np.array(list(molecule.constraints)).T
    expected = np.array(list(molecule.constraints.values()))
    assert np.abs(np.linalg.norm(x[:, i] - x[:, j], axis=-1) - expected).max() < 1e-6
    free = [pair for pair in molecule.bonds if pair not in molecule.constraints]
    i, j = np.array(free).T
    assert np.linalg.norm(x[:, i] - x[:, j], axis=-1).std(axis=0).min() > 1e-3
    state = str(np.load(tmp_path / "simulation.npz")["settings"])
    assert '"timestep_fs": 2.0' in state


def test_walkers_start_apart_and_on_the_constraints(short, tmp_path):
    molecule = alanine_dipeptide("vacuum", constraints="HBonds")
    with pytest.raises(KeyboardInterrupt):
        simulate(molecule, directory=tmp_path, progress=stop_after(1), **{**short, "n_walkers": 30})
    state = np.load(tmp_path / "simulation.npz")
    x, v = state["positions"], state["velocities"]
    i, j = np.array(list(molecule.constraints)).T
    bonds = x[:, i] - x[:, j]
    assert np.linalg.norm(bonds, axis=-1) == pytest.approx(
        np.tile(list(molecule.constraints.values()), (30, 1)), rel=1e-6
    )
    assert np.abs(((v[:, i] - v[:, j]) * bonds).sum(axis=-1)).max() < 1e-5
    assert np.abs(np.diff(v, axis=0)).max(axis=(1, 2)).min() > 0.1
    n_free = 3 * 22 - len(molecule.constraints)
    kinetic = 0.5 * (molecule.masses[:, None] * v**2).sum(axis=(1, 2))
    assert kinetic.mean() == pytest.approx(n_free * kT(600.0) / 2, rel=4 * np.sqrt(2 / n_free / 30))


def test_frames_are_as_far_apart_in_time_as_asked(tmp_path):
    """Without friction the centre of mass flies freely."""
    settings = {**SHORT, "friction_per_ps": 1e-9, "platform": "Reference", "timestep_fs": 0.5, "spacing_fs": 20.0}
    frames = simulate(triangle(), directory=tmp_path, **settings)
    centres = frames.positions.astype(np.float64).mean(axis=1).reshape(-1, 3, 3)
    velocity = np.load(tmp_path / "simulation.npz")["velocities"].mean(axis=1)
    assert np.diff(centres, axis=0) == pytest.approx(np.tile(velocity * 0.020, (19, 1, 1)), rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("options", [{"platform": "Reference"}, {"engine": "batched"}], ids=str)
@pytest.mark.parametrize("constrained", [False, True])
def test_mean_energy_of_harmonic_vibrations(tmp_path, monkeypatch, constrained, options):
    """Equipartition: kT/2 for each vibration, and not that of a temperature 15 % lower."""
    monkeypatch.setattr(walkers, "ATOM_STEPS", 3 * 20_000)
    monkeypatch.setattr(batched_walkers, "ATOM_STEPS", 8 * 3 * 20_000)
    n, n_blocks = (200, 1) if "engine" in options else (8, 10)  # batches are as quick with more walkers
    molecule = triangle(constrained)
    frames = simulate(
        molecule, temperature=600.0 * unit.kelvin, n_frames=8000, spacing_fs=20.0, n_walkers=n, seed=3,
        directory=tmp_path, timestep_fs=2.0, friction_per_ps=50.0, equilibration_ps=0.3, **options,
    )  # fmt: skip
    energies, _ = OpenMMEnergy(molecule.system, "Reference").forces(frames.positions)
    blocks = energies.reshape(n_blocks, -1, n).mean(axis=1).ravel()
    mean, error = blocks.mean(), blocks.std(ddof=1) / np.sqrt(blocks.size)
    n_vibrations = 2 if constrained else 3
    assert abs(mean - n_vibrations * kT(600.0) / 2) < 4 * error
    assert abs(mean - n_vibrations * kT(510.0) / 2) > 4 * error
