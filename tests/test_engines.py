"""Which engine computes energies, and that every stage runs on the one asked for."""

import tomllib
import warnings
from dataclasses import replace

import numpy as np
import openmm
import pytest
import torch

from openmm_tsf.assembly import open_energy
from openmm_tsf.config import ConfigError, load_config, parse_config
from openmm_tsf.energy import BatchedEnergy, OpenMMEnergy, choose_energy
from openmm_tsf.ensemble import Ensemble
from openmm_tsf.reporting import STAGES
from openmm_tsf.rundir import open_run
from openmm_tsf.settings import EnergySettings
from openmm_tsf.systems import Molecule, alanine_dipeptide


def with_centroid_bond(molecule: Molecule) -> Molecule:
    """The molecule with a force that has no batched form."""
    system = openmm.XmlSerializer.clone(molecule.system)
    force = openmm.CustomCentroidBondForce(2, "0.5*(distance(g1,g2)-0.5)^2")
    for atoms in ([0, 1], [10, 11]):
        force.addGroup(atoms)
    force.addBond([0, 1])
    system.addForce(force)
    return Molecule(system, molecule.topology, molecule.positions, "with a centroid bond")


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, BatchedEnergy),
        ({"engine": "batched"}, BatchedEnergy),
        ({"engine": "openmm"}, OpenMMEnergy),
        ({"platform": "Reference"}, OpenMMEnergy),
        ({"engine": "openmm", "platform": "CPU"}, OpenMMEnergy),
    ],
    ids=str,
)
def test_the_engine_follows_the_options(ala2, options, kind):
    for energy in (choose_energy(ala2.system, ala2.positions, **options), open_energy(ala2, EnergySettings(**options))):
        assert isinstance(energy, kind)
        if "platform" in options:
            assert energy.platform == options["platform"]


def test_what_is_to_come_decides_about_compiling(ala2):
    """And not what has been: or an interrupted run would go on with other last bits."""
    assert choose_energy(ala2.system, n=1000).compile is False
    assert choose_energy(ala2.system, n=10_000_000).compile is True
    assert choose_energy(ala2.system).compile is None


def test_both_engines_agree(ala2):
    x = torch.tensor(ala2.positions[None] + np.random.default_rng(3).normal(scale=0.01, size=(20, 22, 3)))
    batched, one_by_one = (choose_energy(ala2.system, engine=e)(x) for e in ("batched", "openmm"))
    assert (batched - one_by_one).abs().max() < 1e-3  # OpenMM's CPU platform is in single precision
    assert (choose_energy(ala2.system, platform="Reference")(x) - batched).abs().max() < 1e-6


def test_what_cannot_be_batched_runs_on_openmm_and_says_why(ala2):
    molecule = with_centroid_bond(ala2)
    with pytest.warns(UserWarning, match="one by one with OpenMM, because.*CustomCentroidBondForce"):
        energy = choose_energy(molecule.system, molecule.positions)
    assert isinstance(energy, OpenMMEnergy)
    with pytest.raises(ValueError, match=r"CustomCentroidBondForce.*use OpenMMEnergy"):
        choose_energy(molecule.system, molecule.positions, engine="batched")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "jax"}, "unknown engine 'jax'; choose from batched, openmm"),
        ({"engine": "batched", "precision": "mixed"}, "precision = 'mixed' is an option of OpenMM"),
        ({"engine": "batched", "device_index": 0}, "device_index = 0 is an option of OpenMM"),
        ({"engine": "openmm", "platform": "Abacus"}, "no OpenMM platform 'Abacus' here"),
    ],
)
def test_options_that_make_no_sense(ala2, options, message):
    with pytest.raises(ValueError, match=message):
        choose_energy(ala2.system, ala2.positions, **options)


def test_the_configuration_names_the_engine(tmp_path):
    with pytest.raises(ConfigError, match="platform = 'CPU' is for engine = \"openmm\""):
        parse_config({"energy": {"engine": "batched", "platform": "CPU"}})
    with pytest.raises(ConfigError, match=r"energy\.engine = 'gpu' must be one of \"batched\", \"openmm\""):
        parse_config({"energy": {"engine": "gpu"}})


def whole_run(folder, toml, energy, n=120):
    """A run directory with every stage done by one engine; fewer steps than `tiny_toml` asks for."""
    config = parse_config(tomllib.loads(toml))
    config = replace(
        config,
        energy=energy,
        simulate=replace(config.simulate, n_frames=400),
        train=replace(config.train, steps=20),
        sample=replace(config.sample, n=n),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is out of reach")
        with open_run(folder, config) as run:
            for _, work in STAGES.values():
                work(run, None)
    return folder


def check_run(folder, molecule, n=120):
    ensemble = Ensemble.load(folder / "ensemble_500K.npz")
    energies, _ = OpenMMEnergy(molecule.system, "Reference").forces(ensemble.positions.double())
    finite = np.isfinite(ensemble.energy.numpy())
    assert len(ensemble) == n and finite.mean() > 0.5
    # stored positions are in single precision, and an untrained flow draws clashes with steep energies
    usual = finite & (np.abs(energies) < 1e3)
    assert usual.sum() > 10
    assert np.abs(ensemble.energy.numpy() - energies)[usual].max() < 0.5
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize("platform", ["CPU", pytest.param("Reference", marks=pytest.mark.slow)])
def test_every_stage_runs_on_openmm(tmp_path, ala2, tiny_toml, platform, monkeypatch):
    monkeypatch.setattr("openmm_tsf.energy.engines.BatchedEnergy", None)  # nothing may fall back to it
    folder = whole_run(tmp_path / "run", tiny_toml, EnergySettings(engine="openmm", platform=platform))
    assert load_config(folder / "config.toml").energy.platform == platform
    check_run(folder, ala2)


def test_every_stage_runs_in_batches(tmp_path, ala2, tiny_toml, monkeypatch):
    monkeypatch.setattr("openmm_tsf.energy.engines.OpenMMEnergy", None)
    check_run(whole_run(tmp_path / "run", tiny_toml, EnergySettings(engine="batched")), ala2)


@pytest.mark.gpu
def test_every_stage_runs_on_cuda(tmp_path, ala2, tiny_toml):
    check_run(whole_run(tmp_path / "run", tiny_toml, EnergySettings(engine="openmm", platform="CUDA")), ala2)


def test_constrained_molecules_run_in_batches_too(tmp_path):
    from openmm_tsf.dynamics import simulate

    molecule = alanine_dipeptide("vacuum", constraints="HBonds")
    frames = simulate(
        molecule, temperature=600.0, n_frames=64, spacing_fs=10.0, directory=tmp_path, seed=1, n_walkers=16,
        equilibration_ps=0.1, engine="batched",
    )  # fmt: skip
    i, j = np.array(list(molecule.constraints)).T
    lengths = np.linalg.norm(frames.positions[:, i] - frames.positions[:, j], axis=-1)
    assert np.abs(lengths - np.array(list(molecule.constraints.values()))).max() < 2e-6
