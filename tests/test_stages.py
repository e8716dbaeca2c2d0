"""Run directories and stages: what they write, skip, refuse, and how they go on after an interruption."""

import hashlib
import json
import shutil
import tomllib
from dataclasses import replace

import mdtraj
import numpy as np
import pytest
import torch

from openmm_tsf import __version__
from openmm_tsf.assembly import load_zmatrix, stage_seed
from openmm_tsf.checkpoint import CheckpointError, load_flow
from openmm_tsf.config import load_config, parse_config
from openmm_tsf.ensemble import Ensemble
from openmm_tsf.files import whole
from openmm_tsf.reporting import STAGES, steering_spread, summary
from openmm_tsf.rundir import RunError, open_run
from openmm_tsf.settings import ZMatrixSettings
from openmm_tsf.stages import sample_done, sample_stage, simulate_stage, train_done, train_stage, training_frames
from openmm_tsf.training import JUDGED_BY

pytestmark = pytest.mark.filterwarnings("ignore:.*is out of reach of this flow:UserWarning")


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def copied(tiny_run, tmp_path):
    """A copy of the finished run that a test may change."""
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture
def config(tiny_toml):
    return parse_config(tomllib.loads(tiny_toml))


def test_a_run_leaves_what_it_promises(tiny_run):
    promised = """config.toml topology.pdb training.dcd flow.tsf history.json ensemble_600K.npz ensemble_500K.npz
    ensemble_500K.dcd ramachandran.png energies.png phi.png training.png report.html metrics.json"""
    there = {path.name for path in tiny_run.iterdir()}
    assert set(promised.split()) <= there
    assert not [name for name in there if "partial" in name or name == "training_state.pt"]
    assert (tiny_run / "flow.tsf").stat().st_mode & 0o077 == (tiny_run / "config.toml").stat().st_mode & 0o077


def test_metrics_are_flat_and_complete(tiny_run):
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    promised = """ess_train ess_target ramachandran_kl ramachandran_excess_tv alpha_left_target alpha_left_target_error
    n_energy_evaluations seconds_simulate seconds_train seconds_sample seed version_openmm_tsf version_torch"""
    assert set(promised.split()) <= set(metrics)
    assert all(value is None or isinstance(value, int | float | str) for value in metrics.values())
    assert metrics["seed"] == 3
    assert metrics["version_openmm_tsf"] == __version__
    assert metrics["n_energy_evaluations_simulate"] == 20 * (20 + 30) * 10
    assert 0 < metrics["n_energy_evaluations_train"] - 4 * JUDGED_BY < 2000  # four evaluations
    assert metrics["n_energy_evaluations_sample"] == 2 * 200
    parts = [metrics[f"n_energy_evaluations_{stage}"] for stage in ("simulate", "train", "sample")]
    assert metrics["n_energy_evaluations"] == sum(parts)
    assert all(metrics[f"seconds_{stage}"] > 0 for stage in ("simulate", "train", "sample"))
    assert 0 < metrics["steering_spread_nat"] < 1e-9


def test_steering_spread_sees_a_flow_that_does_not_steer(tiny_run):
    flow = load_flow(tiny_run / "flow.tsf")
    x = Ensemble.load(tiny_run / "ensemble_500K.npz").positions.double()
    assert steering_spread(flow, x, 600.0, 300.0) < 1e-9

    class Tilted:
        """The same density at every temperature."""

        n_momenta = 0

        def at(self, temperature):
            return flow.at(600.0)

    assert steering_spread(Tilted(), x, 600.0, 300.0) > 1.0


def test_ensembles_and_frames_agree(tiny_run):
    ensemble = Ensemble.load(tiny_run / "ensemble_500K.npz")
    assert (len(ensemble), ensemble.temperature) == (200, 500.0)
    frames = mdtraj.load(tiny_run / "ensemble_500K.dcd", top=tiny_run / "topology.pdb")
    assert frames.n_frames == 200
    gaps = np.abs(frames.xyz[:, None] - ensemble.positions.numpy()[None]).max((2, 3)).min(1)
    assert gaps.max() < 1e-5  # every frame is one of the draws
    assert not np.allclose(frames.xyz, ensemble.positions.numpy(), atol=1e-3)  # and not simply all of them in order


def test_summary_shows_the_main_figures(tiny_run):
    with open_run(tiny_run) as run:
        rows = summary(run)
    assert any("600 K" in name for name in rows) and any("500 K" in name for name in rows)
    assert "of 200 draws" in rows["effective sample size, 500 K"]


def test_finished_stages_are_skipped(copied):
    before = {path.name: path.stat().st_mtime_ns for path in copied.iterdir()}
    with open_run(copied) as run:
        for name, (is_done, work) in STAGES.items():
            assert is_done(run), name
            if name != "report":
                work(run, None)
    after = {path.name: path.stat().st_mtime_ns for path in copied.iterdir()}
    assert {k: v for k, v in before.items() if k != ".lock"} == {k: v for k, v in after.items() if k != ".lock"}


def test_other_sampling_settings_redo_the_samples_only(copied, config):
    flow, hot = digest(copied / "flow.tsf"), digest(copied / "ensemble_600K.npz")
    changed = replace(config, sample=replace(config.sample, temperatures=(550.0, 500.0)))
    with open_run(copied, changed) as run:
        assert train_done(run) and not sample_done(run)
        assert not STAGES["report"][0](run)
        sample_stage(run)
        assert sample_done(run)
    assert (digest(copied / "flow.tsf"), digest(copied / "ensemble_600K.npz")) == (flow, hot)
    assert len(Ensemble.load(copied / "ensemble_550K.npz")) == 200
    assert load_config(copied / "config.toml") == changed


def test_a_missing_ensemble_is_drawn_again_and_is_the_same(copied, tiny_run):
    (copied / "ensemble_500K.npz").unlink()
    with open_run(copied) as run:
        assert not sample_done(run)
        sample_stage(run)
    old, new = (Ensemble.load(folder / "ensemble_500K.npz") for folder in (tiny_run, copied))
    assert torch.equal(new.positions, old.positions) and torch.equal(new.log_prob, old.log_prob)
    assert torch.allclose(new.energy, old.energy)


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("simulate", {"temperature": 500.0}, ["simulate.temperature", "was 600.0", "is now 500.0"]),
        ("train", {"steps": 41}, ["train.steps", "was 40", "is now 41"]),
        ("flow", {"blocks": 2}, ["flow.blocks", "was 1", "is now 2"]),
        ("molecule", {"model": "vacuum"}, ["molecule.model", "'ff96-obc1'", "'vacuum'"]),
        (None, {"seed": 4}, ["seed was 3 and is now 4", "--out"]),
    ],
)
def test_another_configuration_is_refused(copied, config, section, change, words):
    changed = replace(config, **({section: replace(getattr(config, section), **change)} if section else change))
    with pytest.raises(RunError) as error, open_run(copied, changed):
        pass
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert load_config(copied / "config.toml") == config


def test_what_has_not_begun_may_change_and_so_may_the_platform(tmp_path, config):
    with open_run(tmp_path / "run", config):
        pass
    changed = replace(config, seed=9, energy=replace(config.energy, platform="Reference"))
    with open_run(tmp_path / "run", changed) as run:
        assert run.config == changed
        run.update("simulate", done=False)
    with open_run(tmp_path / "run", replace(changed, energy=config.energy)) as run:
        assert run.config.energy.platform is None
    with pytest.raises(RunError, match="seed was 9 and is now 3"), open_run(tmp_path / "run", config):
        pass


def test_stages_say_what_has_to_come_first(tmp_path, config):
    with open_run(tmp_path / "run", config) as run:
        for name, needs in (("train", "simulate"), ("sample", "train"), ("report", "sample")):
            with pytest.raises(RunError, match=f"run the {needs} stage first"):
                STAGES[name][1](run, None)


def test_training_that_was_interrupted_ends_with_the_same_flow(tiny_run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.toml", "topology.pdb", "training.dcd"):
        shutil.copy(tiny_run / name, folder)
    records = json.loads((tiny_run / "stages.json").read_text())
    (folder / "stages.json").write_text(json.dumps({"simulate": records["simulate"]}))

    def interrupt(done: int, total: int, message: str) -> None:
        if done == 25:
            raise KeyboardInterrupt

    with open_run(folder) as run:
        with pytest.raises(KeyboardInterrupt):
            train_stage(run, interrupt)
        assert not train_done(run) and not (folder / "flow.tsf").exists()
        first = run.record("train")["seconds"]
        seen = []
        train_stage(run, lambda done, total, message: seen.append(done))
        assert train_done(run)
        assert run.record("train")["seconds"] > first > 0
        assert run.record("train")["n_energy_evaluations"] > records["train"]["n_energy_evaluations"]
    assert seen[0] == 20 and seen[1] == 21  # forces at the frames, then on from the checkpoint
    new, old = load_flow(folder / "flow.tsf").state_dict(), load_flow(tiny_run / "flow.tsf").state_dict()
    assert all(torch.equal(new[name], old[name]) for name in old)


def test_only_one_process_at_a_time(copied):
    with open_run(copied), pytest.raises(RunError, match="in use"), open_run(copied):
        pass
    with open_run(copied):
        pass


@pytest.mark.parametrize("text", ["{", "[]", '{"train": 5}'])
def test_damaged_records_are_refused(copied, text):
    (copied / "stages.json").write_text(text)
    with open_run(copied) as run, pytest.raises(RunError, match=r"stages\.json is damaged"):
        train_done(run)


def test_a_folder_with_foreign_results_is_refused(copied, tmp_path, config):
    (copied / "config.toml").unlink()
    with pytest.raises(RunError, match=r"but no config\.toml"), open_run(copied, config):
        pass
    with pytest.raises(RunError, match="not a run directory"), open_run(tmp_path / "absent"):
        pass
    assert not (tmp_path / "absent").exists()


def test_a_checkpoint_cut_in_half_is_refused(copied):
    path = copied / "flow.tsf"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (copied / "ensemble_500K.npz").unlink()
    with open_run(copied) as run, pytest.raises(CheckpointError, match=r"flow\.tsf"):
        sample_stage(run)
    assert not (copied / "ensemble_500K.npz").exists()


# --- the user's own trajectory ----------------------------------------------------------------------------------------


def own(config, path, **more):
    return replace(config, simulate=replace(config.simulate, trajectory=str(path), **more))


def test_training_from_the_users_own_trajectory(tiny_run, tmp_path, config):
    with open_run(tmp_path / "run", own(config, tiny_run / "training.dcd", trajectory_walkers=4)) as run:
        simulate_stage(run)
        assert run.record("simulate")["n_energy_evaluations"] == 0
    with open_run(tiny_run) as run:
        flow = load_flow(tiny_run / "flow.tsf")
        wanted = training_frames(run, flow.molecule)
    with open_run(tmp_path / "run") as run:
        frames = training_frames(run, flow.molecule)
    assert frames.n_walkers == 4
    assert np.abs(frames.positions - wanted.positions).max() < 1e-6
    assert mdtraj.load(tmp_path / "run" / "topology.pdb").n_atoms == 22


def spoil(frames: mdtraj.Trajectory, how: str) -> mdtraj.Trajectory:
    if how == "count":
        return frames.atom_slice(range(21))
    if how == "order":
        frames.xyz = frames.xyz[:, [*range(4), 6, 5, 4, *range(7, 22)]]
        return frames
    frames.xyz[7, 3] = np.nan
    return frames


@pytest.mark.parametrize(
    ("how", "words"),
    [("count", "of 22 atoms"), ("order", "wrong atom order"), ("nan", r"1 of 20 frames.*first frame 7")],
)
def test_bad_trajectories_are_refused(tiny_run, tmp_path, config, how, words):
    frames = spoil(mdtraj.load(tiny_run / "training.dcd", top=tiny_run / "topology.pdb"), how)
    path = tmp_path / ("bad.pdb" if how == "order" else "bad.dcd")
    frames[:20].save(str(path))
    with open_run(tmp_path / "run", own(config, path)) as run, pytest.raises(ValueError, match=words):
        simulate_stage(run)
    assert not list((tmp_path / "run").glob("training.dcd"))


# --- small parts ------------------------------------------------------------------------------------------------------


def test_seeds_of_stages_differ_and_stay_in_range():
    seeds = {stage_seed(seed, purpose) for seed in range(50) for purpose in ("simulate", "train", "sample 300 K")}
    assert len(seeds) == 150
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_files_are_whole_or_not_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"
    with whole(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_zmatrix_changes_by_label(ala2):
    plain = load_zmatrix(ala2, ZMatrixSettings())
    label = next(ala2.atom_labels[row.atom] for row in plain.rows if row.kind == "planar")
    lifted = load_zmatrix(ala2, ZMatrixSettings(kinds={label: "soft"}))
    kinds = {ala2.atom_labels[row.atom]: row.kind for row in lifted.rows}
    assert kinds[label] == "soft"
    with pytest.raises(ValueError, match=r"no atom 'ALA2-CQ'; there are .*ALA2-C"):
        load_zmatrix(ala2, ZMatrixSettings(kinds={"ALA2-CQ": "soft"}))
    circle = {"ALA2-CB": ("ALA2-HB1", "ALA2-CA", "ALA2-N"), "ALA2-HB1": ("ALA2-CB", "ALA2-CA", "ALA2-N")}
    with pytest.raises(ValueError, match=r"ALA2-(CB|HB1)"):
        load_zmatrix(ala2, ZMatrixSettings(references=circle))
