"""`openmm-tsf exchange`: settings, ladder, both samplers, going on, refusals."""

import json

import numpy as np
import pytest
from molecules import frames_of, seeded
from typer.testing import CliRunner

import openmm_tsf as tsf
from openmm_tsf import exchange_stage
from openmm_tsf.cli import app
from openmm_tsf.config import ConfigError
from openmm_tsf.dynamics import default_timestep_fs
from openmm_tsf.exchange_settings import (
    ExchangeSettings,
    changed_settings,
    has_iterations,
    load_exchange_settings,
    make_settings,
    settle,
)
from openmm_tsf.exchange_stage import run_exchange, settings_of, summary
from openmm_tsf.flow import build_flow
from openmm_tsf.tempering import BatchedTempering
from openmm_tsf.trajectories import Frames

LADDER = (300.0, 600.0, 4, "geometric")
NO_LADDER = (None, None, None, None)
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
    assert not has_iterations(tmp_path)
    assert settle(tmp_path, other) == other  # nothing has run
    (tmp_path / "segments").mkdir()
    (tmp_path / "segments/segment_000000000.npz").touch()
    with pytest.raises(ValueError, match=r"kind is 'latent' there, 'mixed' now; .*seed is 2 there, 1 now; only -n may"):
        settle(tmp_path, settings)
    assert load_exchange_settings(tmp_path) == other
    assert settle(tmp_path, changed_settings(other, n_iterations=4)).n_iterations == 4


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
        ({"n_iterations": 3}, "n_iterations must be at least 4, which error bars take, not 3"),
        ({"timestep_fs": 0.0}, "timestep_fs must be finite and above 0, not 0"),
        ({"timestep_fs": -1.0}, "timestep_fs must be finite and above 0, not -1"),
        ({"timestep_fs": float("nan")}, "timestep_fs = nan must be a finite number"),
        ({"friction_per_ps": -1.0}, "friction_per_ps must be finite and at least 0, not -1"),
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
    _, settings = settings_of("ala2", tmp_path, None, "310, 400,500", NO_LADDER)
    assert settings.temperatures == (310.0, 400.0, 500.0)
    for source, out, kelvin, ladder, message in (
        ("ala2", None, None, LADDER, "--out DIR"),
        ("ala2", tmp_path, "300;400", NO_LADDER, "numbers with commas"),
        ("ala2", tmp_path, "300,400", (None, None, 3, None), "--temperatures, or a ladder by .* not both"),
        ("ala2", tmp_path, None, (300.0, 600.0, 4, "linear"), "unknown ladder 'linear'"),
        ("nothing", tmp_path, None, LADDER, "no pretrained flow 'nothing'"),
        ("nothing.tsf", tmp_path, None, LADDER, "no flow at nothing.tsf"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            settings_of(source, out, None, kelvin, ladder)


def test_what_a_command_line_changes_in_an_exchange(tmp_path):
    begun = make_settings(flow="ala2", temperatures=[300, 410, 600], n_iterations=7, timestep_fs=0.5, plain=True)
    settle(tmp_path, begun)

    def asked(n=None, temperatures=None, ladder=NO_LADDER, **others):
        return settings_of(str(tmp_path), None, n, temperatures, ladder, **others)[1]

    assert asked(kind=None, plain=None) == begun
    assert asked(temperatures="300,410,600", n_proposals=16) == begun
    assert asked(ladder=(300.0, None, 3, None)) == begun
    assert asked(n=5) == changed_settings(begun, n_iterations=5)
    assert asked(n_proposals=64).n_proposals == 64
    assert asked(timestep_fs=2.0).timestep_fs == 2.0
    assert asked(ladder=(None, None, None, "geometric")).temperatures == (300.0, 424.264, 600.0)
    assert asked(ladder=(None, 450.0, 2, None)).temperatures == (300.0, 450.0)
    with pytest.raises(ConfigError, match="kind = 'hmc'"):
        asked(kind="hmc")
    with pytest.raises(ValueError, match="give a flow, or no --out"):
        settings_of(str(tmp_path), tmp_path / "y", None, None, NO_LADDER)


def test_default_time_step():
    free, held = (tsf.alanine_dipeptide(constraints=kind) for kind in (None, "HBonds"))
    assert (default_timestep_fs(free), default_timestep_fs(held)) == (1.0, 2.0)
    with pytest.raises(ValueError, match="timestep_fs must be finite and above 0, not 0"):
        BatchedTempering(free, [300.0, 600.0], timestep_fs=0.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sampler", ["batched", "openmmtools"])
def test_settings_may_change_until_something_has_run(tmp_path, sampler):
    common = {"flow": "ala2", "temperatures": [300.0, 600.0], "sampler": sampler, "plain": True}
    small = {"n_replicas": 2, "n_dynamics_steps": 50, "n_iterations": 4}
    with pytest.raises(Exception, match=r"(?i)not finite|nan"):
        run_exchange(tmp_path, make_settings(**common, **small, timestep_fs=60.0), n_draws=200)
    assert not has_iterations(tmp_path)
    assert load_exchange_settings(tmp_path).timestep_fs == 60.0
    _, again = settings_of(str(tmp_path), None, None, None, NO_LADDER, timestep_fs=0.5)
    found = run_exchange(tmp_path, again, n_draws=200)
    assert found["n_iterations"] == 4
    assert load_exchange_settings(tmp_path).timestep_fs == 0.5
    assert has_iterations(tmp_path)
    with pytest.raises(ValueError, match=r"timestep_fs is 0\.5 there, 60\.0 now"):
        run_exchange(tmp_path, changed_settings(again, timestep_fs=60.0))
    if sampler == "openmmtools":
        from openmm_tsf.exchange.netcdf import open_run

        with open_run(tmp_path / "exchange.nc") as run:
            assert "0.5" in str(run.reporter.read_dict("mcmc_moves/move0")["timestep"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sampler", ["batched", "openmmtools"])
def test_run_and_go_on(tmp_path, sampler):
    common = {"flow": "ala2", "temperatures": [300.0, 424.0, 600.0], "sampler": sampler, **SMALL}
    told = []
    settings = make_settings(**common, n_iterations=12)
    first = run_exchange(tmp_path, settings, n_draws=200, progress=lambda *message: told.append(message))
    assert any("% of proposals" in words and words.endswith("round trips") for _, _, words in told)
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
    assert run_exchange(tmp_path, make_settings(**common, n_iterations=5), n_draws=200)["n_iterations"] == 20
    with pytest.raises(ValueError, match="exchange with other settings: n_proposals is 4 there, 5 now; only -n"):
        run_exchange(tmp_path, make_settings(**(common | {"n_proposals": 5}), n_iterations=20))
    refused = CliRunner().invoke(app, ["exchange", str(tmp_path), "--proposals", "64", "--temperatures", "300,600"])
    assert refused.exit_code == 1
    for part in ("temperatures is (300.0, 424.0, 600.0) there, (300.0, 600.0) now", "n_proposals is 4 there, 64 now"):
        assert part in " ".join(refused.stderr.split())
    edited = tmp_path / "exchange.toml"
    edited.write_text(edited.read_text().replace("n_dynamics_steps = 5", "n_dynamics_steps = 500"))
    refused = CliRunner().invoke(app, ["exchange", str(tmp_path)])
    assert refused.exit_code == 1
    assert "n_dynamics_steps is 5 there, 500 now" in " ".join(refused.stderr.split())
    other = "batched" if sampler == "openmmtools" else "openmmtools"
    with pytest.raises(ValueError, match=f"sampler is '{sampler}' there, '{other}' now"):
        run_exchange(tmp_path, make_settings(**(common | {"sampler": other}), n_iterations=20))
    (tmp_path / "exchange.sealed.toml").unlink()
    if sampler == "openmmtools":
        with pytest.raises(ValueError, match=r"exchange\.sealed\.toml is missing"):
            run_exchange(tmp_path, make_settings(**common, n_iterations=20))
    else:  # the segments know too
        with pytest.raises(ValueError, match="n_dynamics_steps was 5, now 500"):
            run_exchange(tmp_path, load_exchange_settings(tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_plain_exchange_has_no_moves(tmp_path):
    settings = make_settings(flow="ala2", temperatures=[300.0, 600.0], plain=True, n_iterations=12, **SMALL)
    found = run_exchange(tmp_path, settings, n_draws=200)
    assert not any(key.startswith("independence") for key in found)
    assert "independence proposals" not in summary(found)


def test_a_flow_that_cannot_explore_is_refused_before_anything_begins(tmp_path):
    frames = Frames(frames_of("ala2", 200), np.full(200, 600.0))
    settings = tsf.FlowSettings(kind="tsf", blocks=1, hidden=4, depth=1)
    flow = build_flow(tsf.alanine_dipeptide(), frames, settings, generator=seeded(1))
    tsf.save_flow(flow, tmp_path / "flow.tsf")
    given = {"flow": str(tmp_path / "flow.tsf"), "temperatures": [300.0, 600.0], "explore": 0.2, **SMALL}
    with pytest.raises(ValueError, match=r"explore = 0\.2 is not possible: flows of kind 'tsf'"):
        run_exchange(tmp_path / "exchange", make_settings(**given))
    assert not (tmp_path / "exchange").exists()


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
    line = ["exchange", "ala2", "--out", str(tmp_path / "x"), "--levels", "2", "-n", "4", "--proposals", "8", "--plain"]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    assert seen["settings"].temperatures == (300.0, 600.0)
    assert (seen["settings"].n_proposals, seen["settings"].plain) == (8, True)
    assert "25 % accepted" in done.output
    few = CliRunner().invoke(app, ["exchange", "ala2", "--out", str(tmp_path / "y"), "-n", "3"])
    assert few.exit_code == 2
    assert "4" in few.stderr
    bad = CliRunner().invoke(app, ["exchange", "ala2", "--out", str(tmp_path / "y"), "--temperatures", "600,300"])
    assert bad.exit_code == 1
    assert "600" in bad.stderr
    still = CliRunner().invoke(app, ["exchange", "ala2", "--out", str(tmp_path / "y"), "--timestep", "0"])
    assert still.exit_code == 1
    assert "timestep_fs must be finite and above 0" in " ".join(still.stderr.split())
    assert not (tmp_path / "y").exists()


def test_a_run_directory_is_exchanged_beside_its_flow(tmp_path):
    tsf.save_flow(tsf.pretrained("ala2"), tmp_path / "flow.tsf")
    directory, settings = settings_of(str(tmp_path), None, None, None, LADDER)
    assert directory == tmp_path / "exchange"
    assert settings.flow == str(tmp_path / "flow.tsf")
