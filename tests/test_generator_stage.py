"""Runs whose model is a diffusion generator: every stage, on a molecule with ln Z in closed form, and refusals."""

import json
import math
import shutil
import sys
import tomllib
from dataclasses import replace

import mdtraj
import numpy as np
import openmm
import pytest
import torch
from molecules import chain4_log_z, harmonic_chain4, seeded
from openmm import app, unit
from typer.testing import CliRunner

import openmm_tsf as tsf
from openmm_tsf import cli, ensemble
from openmm_tsf.config import ConfigError, load_config, parse_config
from openmm_tsf.edg.molecule import molecular_target
from openmm_tsf.edg_checkpoint import load_molecular_edg
from openmm_tsf.ensemble import Ensemble
from openmm_tsf.generator_stage import trained
from openmm_tsf.report import render
from openmm_tsf.reporting import STAGES, summary
from openmm_tsf.rundir import RunError, open_run
from openmm_tsf.sampling import describe_flow, sample_to_file
from openmm_tsf.settings import Config
from openmm_tsf.stages import sample_stage, train_done, train_stage

CHAIN = """
model = "edg"
seed = 3
[molecule]
structure = "chain.pdb"
parameters = "chain.xml"
name = "chain"
[simulate]
n_frames = 200
n_walkers = 20
equilibration_ps = 0.2
[edg]
latents = 2
hidden = 12
depth = 1
width = 0.9
steps = 250
batch = 64
learning_rate = 0.01
checkpoint_every = 10
[sample]
temperatures = [450.0]
n = 1000
"""


@pytest.fixture(scope="module")
def chain(tmp_path_factory, float64_in_fixtures):
    """A configuration of a molecule in files, and its run; copy it to change it."""
    folder = tmp_path_factory.mktemp("chain")
    molecule = harmonic_chain4()
    with open(folder / "chain.pdb", "w") as file:
        app.PDBFile.writeFile(molecule.topology, molecule.positions * unit.nanometer, file)
    (folder / "chain.xml").write_text(openmm.XmlSerializer.serialize(molecule.system))
    (folder / "chain.toml").write_text(CHAIN)
    with open_run(folder / "run", load_config(folder / "chain.toml")) as run:
        for _, work in STAGES.values():
            work(run, None)
    return folder


@pytest.fixture
def copied(chain, tmp_path):
    return shutil.copytree(chain / "run", tmp_path / "run")


def test_a_run_leaves_what_it_promises(chain):
    promised = """config.toml topology.pdb training.dcd generator.edg history.json ensemble_600K.npz ensemble_450K.npz
    ensemble_450K.dcd energies.png training.png report.html metrics.json"""
    there = {path.name for path in (chain / "run").iterdir()}
    assert set(promised.split()) <= there
    assert not {"flow.tsf", "edg_training.pt"} & there
    config = tomllib.loads((chain / "run" / "config.toml").read_text())
    assert config["model"] == "edg" and config["edg"]["temperatures"] == [450.0, 600.0]
    assert not {"flow", "train"} & set(config)
    assert load_config(chain / "run" / "config.toml") == load_config(chain / "chain.toml")


def test_ln_z_is_that_of_the_molecule_at_both_temperatures(chain):
    for temperature in (450.0, 600.0):
        ensemble = Ensemble.load(chain / "run" / f"ensemble_{temperature:g}K.npz")
        assert ensemble.ess > 0.3
        exact = chain4_log_z(temperature)
        assert abs(ensemble.log_z - exact) < 4.0 * ensemble.log_z_error
        assert ensemble.log_z_bound < exact
    frames = mdtraj.load(chain / "run" / "ensemble_450K.dcd", top=chain / "run" / "topology.pdb")
    assert frames.n_frames == 1000


def test_metrics_and_report_say_what_the_model_is(chain):
    metrics = json.loads((chain / "run" / "metrics.json").read_text())
    assert metrics["model"] == "edg" and metrics["is_conditioned"] and not metrics["steers"]
    assert metrics["n_energy_evaluations_train"] == 250 * 64 + 8  # by which a checkpoint knows its target
    assert metrics["log_z_bound_target_nat"] < metrics["log_z_target_nat"]
    page = (chain / "run" / "report.html").read_text()
    for words in (
        "chain at 450 K, from a diffusion generator trained from 450 to 600 K",
        "what temperature does to it is learned, not exact",
        "lower bound of ln Z [nat]",
        "The bound that training lowers",
        "edg.latents",
    ):
        assert words in page, words
    assert "from a flow" not in page and "flow.blocks" not in page
    with open_run(chain / "run") as run:
        rows = summary(run)
    assert "of 1000 draws" in rows["effective sample size, 450 K"]


def test_the_page_of_one_temperature_claims_no_steering(chain):
    metrics = json.loads((chain / "run" / "metrics.json").read_text())
    one = {"temperature_target_kelvin": 600.0, "temperature_lowest_kelvin": 600.0, "is_conditioned": False}
    page = render(name="x", metrics=metrics | one, figures={}, settings={}, versions={}, seed=1)
    assert "trained at 600 K on energies alone. Its" in page
    poor = render(name="x", metrics=metrics | {"ess_target": 0.004}, figures={}, settings={}, versions={}, seed=1)
    assert "out of reach of this diffusion generator" in poor


def test_training_that_was_interrupted_ends_with_the_same_generator(chain, copied):
    for name in ("generator.edg", "history.json"):
        (copied / name).unlink()
    records = json.loads((copied / "stages.json").read_text())
    (copied / "stages.json").write_text(json.dumps({"simulate": records["simulate"]}))

    def interrupt(done: int, total: int, message: str) -> None:
        if done == 45:
            raise KeyboardInterrupt

    with open_run(copied) as run:
        with pytest.raises(KeyboardInterrupt):
            train_stage(run, interrupt)
        assert not train_done(run)
        with pytest.raises(RunError, match=r"no trained generator yet: run the train stage first"):
            sample_stage(run)
        seen = []
        train_stage(run, lambda done, total, message: seen.append(done))
        assert train_done(run)
    assert seen[0] == 41
    new, old = (load_molecular_edg(folder / "generator.edg").edg for folder in (copied, chain / "run"))
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), old.parameters(), strict=True))


def test_changes_after_training_are_refused_and_of_sampling_are_not(copied):
    old = load_config(copied / "config.toml")
    with (
        pytest.raises(RunError, match=r"edg.latents was 2 and is now 3"),
        open_run(copied, replace(old, edg=replace(old.edg, latents=3))),
    ):
        pass
    with open_run(copied, replace(old, sample=replace(old.sample, n=300, temperatures=(500.0,)))) as run:
        assert train_done(run)
        sample_stage(run)
    assert len(Ensemble.load(copied / "ensemble_500K.npz")) == 300


def test_sample_and_info_take_a_generator(chain, tmp_path):
    rows, path = sample_to_file(
        str(chain / "run"), 500.0, n=200, out=tmp_path / "own.npz", at=None, explore=None, seed=1
    )
    assert len(Ensemble.load(path)) == 200
    assert rows["steering"] == "learned from 450 to 600 K, not exact" and "lower bound" in rows["ln Z"]
    rows, _ = sample_to_file(
        str(chain / "run" / "generator.edg"), 400.0, n=200, out=tmp_path / "own.dcd", at=450.0, explore=None, seed=1
    )
    assert "450 K, weighed for 400 K" in rows["run at"]
    title, facts, more = describe_flow(str(chain / "run"))
    assert title.endswith("generator.edg") and facts["model"] == "diffusion generator"
    assert facts["trained at"] == "450 to 600 K" and "internal coordinates" in more


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "RUN", "-T", "300"], "trained at 450 to 600 K, and cannot run at 300 K"),
        (["sample", "RUN", "-T", "500", "--explore", "0.1"], "no potentials of torsions"),
        (["sample", "RUN", "-T", "500", "--tuned"], "--tuned is for flows"),
        (["sample", "none.edg", "-T", "500"], "no diffusion generator at none.edg"),
        (["refine", "RUN", "-T", "500"], 'is a run of model = "edg"; this needs one of model = "flow"'),
        (["tune", "RUN", "-T", "500"], 'is a run of model = "edg"; this needs one of model = "flow"'),
        (["exchange", "RUN"], "is a diffusion generator, and a flow is needed here"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:1] + value[4:5]),
)
def test_what_is_of_flows_is_refused(copied, arguments, words):
    arguments = [str(copied) if a == "RUN" else a for a in arguments]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 1, done.output
    assert words in " ".join(done.output.split()), done.output


def test_energies_that_are_not_finite_in_places_are_named(copied):
    (copied / "stages.json").unlink()
    (copied / "generator.edg").unlink()
    molecule = harmonic_chain4()
    energy = tsf.BatchedEnergy(molecule.system)

    def holes(x):
        place = x.square().sum((1, 2))
        u = torch.where(place < 0.061, torch.nan, energy(x))
        return torch.where(place > 0.075, torch.inf, u)

    frames = mdtraj.load(copied / "training.dcd", top=copied / "topology.pdb").xyz
    target = molecular_target(molecule, holes, frames, 600.0, walled=True)
    words = r"\d+ of 16000 draws of training \(\d+ %\) had an energy that is not finite and taught nothing"
    with open_run(copied) as run, pytest.warns(UserWarning, match=words):
        generator = trained(run, target, molecule, lambda done, total, message: None)
    assert all(torch.isfinite(p).all() for p in generator.edg.parameters())


def test_what_draws_will_need_is_missed_before_training(copied, monkeypatch):
    (copied / "generator.edg").unlink()
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with open_run(copied) as run, pytest.raises(ModuleNotFoundError, match="pip install torchdiffeq"):
        train_stage(run)


# --- the configuration ------------------------------------------------------------------------------------------------


def test_a_generator_is_asked_for_by_its_model():
    config = parse_config({"model": "edg"})
    assert config.molecule.model == "ff96-obc1"  # the force field is not the model of the run
    assert (
        config.edg.temperatures == (300.0, 600.0) and config.edg.conditioned and config.edg.network(5).latent_dim == 5
    )
    assert (config.simulate.n_frames, config.sample.n, config.sample.explore) == (4_000, 10_000, 0.0)
    assert Config().edg is None and (Config().simulate.n_frames, Config().sample.n) == (400_000, 100_000)
    hot = parse_config({"model": "edg", "sample": {"temperatures": [600.0]}})
    assert hot.edg.temperatures == (600.0,) and not hot.edg.conditioned
    assert parse_config(json.loads(json.dumps({"model": "edg", "edg": {"temperatures": [250, 700]}}))).edg.conditioned


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"edg": {"latents": 3}}, r"\[edg\] has no effect on model = \"flow\"; did you mean model = \"edg\"\?"),
        ({"model": "edg", "flow": {"blocks": 2}}, r"\[flow\] has no effect on model = \"edg\""),
        ({"model": "edg", "train": {"steps": 2}}, r"\[train\] has no effect on model = \"edg\""),
        ({"model": "edq"}, 'model = \'edq\' must be one of "flow", "edg"'),
        ({"model": "edg", "sample": {"explore": 0.1}}, r"sample.explore = 0.1: model = \"edg\" has no potentials"),
        ({"model": "edg", "edg": {"temperatures": [400.0]}}, r"must have 300 and 600 K between them"),
        ({"model": "edg", "edg": {"temperatures": [600.0, 300.0]}}, "must be one, or the lowest and the highest"),
        ({"model": "edg", "edg": {"walkers": 8}}, "walkers = 8 need one temperature, not 300 to 600 K"),
        ({"model": "edg", "edg": {"batch": 8, "walkers": 9}}, "2 to batch = 8, not 9"),
        ({"model": "edg", "sample": {"n": 50}}, "sample.n = 50: fewer than 100 weights do not say"),
        ({"model": "edg", "edg": {"latents": 0}}, "latents = 0 must be at least 1"),
        ({"model": "edg", "edg": {"steps": 0}}, "steps must be a whole number of at least 1, not 0"),
        ({"model": "edg", "edg": {"hiden": 8}}, r"unknown key edg.hiden; did you mean edg.hidden\?"),
        ({"model": "edg", "edg": {"decoder": "vae"}}, "edg.decoder = 'vae' must be one of"),
        ({"model": "edg", "edg": {"width": 0.0}}, "width must be finite and above 0"),
    ],
)
def test_configurations_that_make_no_sense(table, words):
    with pytest.raises(ConfigError, match=words):
        parse_config(table)


# --- alanine dipeptide ------------------------------------------------------------------------------------------------


def test_alanine_dipeptide_from_frames_at_hand(tmp_path, ala2, monkeypatch):
    """The whole run in small, walkers included: a poor generator, but the right files, with Ramachandran maps."""
    monkeypatch.setattr(ensemble, "LEAST_ESS", 1.0)  # none is good enough
    drawn = tsf.pretrained("ala2").at(600.0).sample(400, generator=seeded(1))[0]
    mdtraj.Trajectory(drawn.numpy().astype(np.float32), ala2.mdtraj_topology).save(str(tmp_path / "own.dcd"))
    table = {
        "model": "edg",
        "simulate": {"trajectory": str(tmp_path / "own.dcd")},
        "edg": {
            "latents": 4,
            "hidden": 8,
            "depth": 1,
            "steps": 20,
            "batch": 32,
            "walkers": 8,
            "trajectory": 3,
        },
        "sample": {"temperatures": [600.0], "n": 150},
    }
    warned = pytest.warns(
        UserWarning, match="600 K is out of reach of this generator, which was trained there: ESS .* train longer$"
    )
    with open_run(tmp_path / "run", parse_config(table)) as run, warned:
        for _, work in STAGES.values():
            work(run, None)
    there = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"ramachandran.png", "phi.png", "ensemble_600K.dcd"} <= there
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["ramachandran_excess_tv_raw"] is not None and metrics["n_latents"] == 4
    assert not metrics["is_conditioned"]
    assert metrics["n_energy_evaluations_train"] == 20 * 32 + 20 * 8 * (3 + 1) + 8
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert math.isfinite(history["rows"][-1]["forward"]) and history["rows"][-1]["n_far"] < 8
