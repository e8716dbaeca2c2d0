"""`openmm-tsf exchange`: settings, ladder, both samplers, going on, refusals."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import openmm_tsf as tsf
from openmm_tsf import exchange_stage
from openmm_tsf.cli import app
from openmm_tsf.config import ConfigError
from openmm_tsf.exchange_settings import ExchangeSettings, load_exchange_settings, make_settings, settle
from openmm_tsf.exchange_stage import run_exchange, settings_of, summary

LADDER = (300.0, 600.0, 4, "geometric")
SMALL = {"n_replicas": 2, "n_dynamics_steps": 5, "n_proposals": 4}


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(exchange_stage, "N_DRAWS", 200)


def test_settings_come_back_from_the_directory(tmp_path):
    settings = make_settings(flow="ala2", temperatures=[300, 400.5], n_iterations=7, kind="mixed", timestep_fs=0.5)
    assert settle(tmp_path, settings) == settings == load_exchange_settings(tmp_path)
    longer = make_settings(flow="ala2", temperatures=[300, 400.5], n_iterations=9, kind="mixed", timestep_fs=0.5)
    assert settle(tmp_path, longer).n_iterations == 9
    assert settle(tmp_path, settings).n_iterations == 7
    other = make_settings(flow="ala2", temperatures=[300, 400.5], n_iterations=9, kind="latent", seed=2)
    with pytest.raises(ValueError, match=r"kind is 'mixed' there, 'latent' now; .*seed is 1 there, 2 now"):
        settle(tmp_path, other)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperatures": [300.0]}, "2"),
        ({"temperatures": [300.0, 300.0]}, "300"),
        ({"temperatures": [400.0, 300.0]}, "300"),
        ({"temperatures": [-1.0, 300.0]}, "-1"),
        ({"sampler": "yank"}, 'sampler = \'yank\' must be one of "batched", "openmmtools"'),
        ({"kind": "hmc"}, "kind = 'hmc'"),
        ({"n_proposals": 0}, "n_proposals must be a whole number of at least 1, not 0"),
        ({"n_iterations": 0}, "n_iterations must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"n_walkers": 3}, "unknown key n_walkers"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        make_settings(**({"flow": "ala2", "temperatures": [300.0, 400.0]} | values))


def test_what_a_command_line_means(tmp_path):
    directory, settings = settings_of("ala2", tmp_path, 5, None, LADDER, seed=3)
    assert directory == tmp_path
    assert settings == ExchangeSettings("ala2", (300.0, 377.976, 476.22, 600.0), n_iterations=5, seed=3)
    _, settings = settings_of("ala2", tmp_path, None, None, (300.0, 600.0, 4, "flow"))
    inner = np.array(settings.temperatures[1:-1])
    assert np.all(np.abs(inner / [377.976, 476.22] - 1.0) < 0.05)
    assert not np.allclose(inner, [377.976, 476.22], rtol=1e-4)
    _, settings = settings_of("ala2", tmp_path, None, "310, 400,500", LADDER)
    assert settings.temperatures == (310.0, 400.0, 500.0)
    for source, out, kelvin, ladder, message in (
        ("ala2", None, None, LADDER, "--out DIR"),
        ("ala2", tmp_path, "300;400", LADDER, "numbers with commas"),
        ("ala2", tmp_path, None, (300.0, 600.0, 4, "linear"), "unknown ladder 'linear'"),
        ("nothing", tmp_path, None, LADDER, "no pretrained flow 'nothing'"),
        ("nothing.tsf", tmp_path, None, LADDER, "no flow at nothing.tsf"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            settings_of(source, out, None, kelvin, ladder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sampler", ["batched", "openmmtools"])
def test_run_and_go_on(tmp_path, sampler):
    common = {"flow": "ala2", "temperatures": [300.0, 424.0, 600.0], "sampler": sampler, **SMALL}
    first = run_exchange(tmp_path, make_settings(**common, n_iterations=12), n_draws=200)
    replicas = 6 if sampler == "batched" else 3
    assert (first["n_iterations"], first["n_replicas"]) == (12, replicas)
    assert sum(first[f"independence_proposed_{k}"] for k in range(3)) == 12 * replicas * 4
    begun = load_exchange_settings(tmp_path)
    second = run_exchange(tmp_path, make_settings(**common, n_iterations=20), n_draws=200)
    assert second["n_iterations"] == 20
    assert sum(second[f"independence_proposed_{k}"] for k in range(3)) == 20 * replicas * 4
    assert second["seconds"] > first["seconds"] > 0.0
    assert begun.n_iterations == 12
    assert json.loads((tmp_path / "exchange.json").read_text())["n_iterations"] == 20
    import mdtraj

    frames = mdtraj.load(str(tmp_path / "frames_300K.dcd"), top=str(tmp_path / "topology.pdb"))
    assert frames.n_atoms == 22
    assert frames.n_frames == 20 * replicas // 3
    rows = summary(second)
    assert rows["iterations"] == f"20 of {replicas} replicas"
    assert "independence proposals" in rows
    with pytest.raises(ValueError, match="exchange with other settings: n_proposals is 4 there, 5 now"):
        run_exchange(tmp_path, make_settings(**(common | {"n_proposals": 5}), n_iterations=20))


@pytest.mark.filterwarnings("ignore")
def test_plain_exchange_has_no_moves(tmp_path):
    settings = make_settings(flow="ala2", temperatures=[300.0, 600.0], plain=True, n_iterations=12, **SMALL)
    found = run_exchange(tmp_path, settings, n_draws=200)
    assert not any(key.startswith("independence") for key in found)
    assert "independence proposals" not in summary(found)


@pytest.mark.filterwarnings("ignore")
def test_a_netcdf_cut_short_is_an_error_that_says_so(tmp_path):
    common = {"flow": "ala2", "temperatures": [300.0, 600.0], "sampler": "openmmtools", **SMALL}
    run_exchange(tmp_path, make_settings(**common, n_iterations=11), n_draws=200)
    path = tmp_path / "exchange.nc"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"exchange\.nc"):
        run_exchange(tmp_path, make_settings(**common, n_iterations=12), n_draws=200)


def test_the_command(tmp_path, monkeypatch):
    seen = {}

    def pretend(directory, settings, progress):
        seen.update(directory=directory, settings=settings)
        return run_exchange_result

    run_exchange_result = {
        "n_temperatures": 2, "temperature_0_kelvin": 300.0, "temperature_1_kelvin": 600.0, "n_iterations": 3,
        "n_replicas": 4, "round_trips": 1, "n_effective_0": 5.0, "swap_acceptance_0_1": 0.25,
    }  # fmt: skip
    monkeypatch.setattr(exchange_stage, "run_exchange", pretend)
    line = ["exchange", "ala2", "--out", str(tmp_path / "x"), "--levels", "2", "-n", "3", "--proposals", "8", "--plain"]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    assert seen["settings"].temperatures == (300.0, 600.0)
    assert (seen["settings"].n_proposals, seen["settings"].plain) == (8, True)
    assert "25 % accepted" in done.output
    bad = CliRunner().invoke(app, ["exchange", "ala2", "--out", str(tmp_path / "y"), "--temperatures", "600,300"])
    assert bad.exit_code == 1
    assert "600" in bad.stderr


def test_a_run_directory_is_exchanged_beside_its_flow(tmp_path):
    tsf.save_flow(tsf.pretrained("ala2"), tmp_path / "flow.tsf")
    directory, settings = settings_of(str(tmp_path), None, None, None, LADDER)
    assert directory == tmp_path / "exchange"
    assert settings.flow == str(tmp_path / "flow.tsf")
