"""Figures of draws against distributions that are known, costs against run directories, and the table of them."""

import importlib.util
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf import accuracy, accuracy_table
from openmm_tsf.checkpoint import pretrained_path
from openmm_tsf.ensemble import draw
from openmm_tsf.reference import load_reference
from openmm_tsf.torsions import phi_psi

ROOT = Path(__file__).parents[1]
N = 40_000


@pytest.fixture(scope="module")
def state():
    return load_reference("ala2").at(300.0)


@pytest.fixture(scope="module")
def script():
    """benchmarks/accuracy.py as a module."""
    spec = importlib.util.spec_from_file_location("accuracy_script", ROOT / "benchmarks" / "accuracy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draws_from(cells: np.ndarray, state, *, log_weights=None, **changes) -> accuracy.Draws:
    """Draws with angles from `cells` and energies from the reference; `log_weights` are of the cells."""
    rng = np.random.default_rng(7)
    cell = rng.choice(cells.size, size=N, p=cells.ravel() / cells.sum())
    phi, psi = (-math.pi + (i + rng.random(N)) * math.tau / 64 for i in np.unravel_index(cell, (64, 64)))
    bins = rng.choice(100, size=N, p=state.energy_histogram / state.energy_histogram.sum())
    energy = state.energy_edges[bins] + rng.random(N) * np.diff(state.energy_edges)[bins]
    log_w = torch.zeros(N) if log_weights is None else torch.from_numpy(log_weights.ravel()[cell])
    values = {
        "temperature": 300.0, "energy": torch.from_numpy(energy), "log_weights": log_w, "phi": phi, "psi": psi,
        "n_rejected": 0, "n_rejected_first": 0, "n_mirrored": (0, 0),
    }  # fmt: skip
    return accuracy.Draws(**(values | changes))


def test_exact_draws_have_no_distance(state):
    """Excesses scatter by the noise of 40,000 draws, a few thousandths; free energies by their errors."""
    found = accuracy.figures(draws_from(state.ramachandran, state), state)
    assert found["ess"] == pytest.approx(1.0)
    assert found["ess_first"] is None
    assert abs(found["ramachandran_excess_tv_own"]) < 1e-12
    for part in ("raw", "reweighted"):
        assert abs(found[part]["ramachandran_excess_tv"]) < 0.004
        assert abs(found[part]["energy_excess_tv"]) < 0.004
        assert abs(found[part]["mean_energy"] - state.mean_energy) < 5.0 * found[part]["mean_energy_error"]
        deviation, error = (found[part][f"alpha_left_{name}_kt"] for name in ("deviation", "deviation_error"))
        assert abs(deviation) < 3.0 * error
        assert 0.5 < error / (state.alpha_left * N) ** -0.5 < 1.5  # of a count
    json.dumps(found, allow_nan=False)


def test_wrong_draws_are_far_and_their_weights_bring_them_back(state):
    cells = state.ramachandran / state.ramachandran.sum()
    broad = np.sqrt(cells) / np.sqrt(cells).sum()
    log_weights = 0.5 * np.log(np.maximum(cells, 1e-300))  # what is empty is never drawn
    found = accuracy.figures(draws_from(broad, state, log_weights=log_weights), state)
    apart = 0.5 * np.abs(cells - broad).sum()
    raw, weighted = found["raw"], found["reweighted"]
    assert 0.5 * apart < raw["ramachandran_excess_tv"] < apart  # noise adds less to a distance than it has alone
    assert 0.5 * apart < found["ramachandran_excess_tv_own"] < apart
    assert abs(weighted["ramachandran_excess_tv"]) < 0.1 * apart
    assert found["ess"] == pytest.approx(1.0 / (cells[broad > 0] ** 2 / broad[broad > 0]).sum(), rel=0.05)
    assert abs(raw["alpha_left_deviation_kt"]) > 10.0 * raw["alpha_left_deviation_error_kt"]
    assert abs(weighted["alpha_left_deviation_kt"]) < 3.0 * weighted["alpha_left_deviation_error_kt"]


def test_weights_that_know_nothing_of_the_angles_leave_no_excess_of_their_own(state):
    noise = 0.5 * torch.randn(N, generator=torch.Generator().manual_seed(3))
    exact = draws_from(state.ramachandran, state)
    found = accuracy.figures(replace(exact, log_weights=noise), state)
    assert found["ess"] == pytest.approx(math.exp(-0.25), rel=0.02)
    assert abs(found["ramachandran_excess_tv_own"]) < 0.003


def test_energies_beyond_the_reference_count(state):
    exact = draws_from(state.ramachandran, state)
    energy = exact.energy.clone()
    energy[: N // 4] = torch.inf
    energy[N // 4 : N // 2] = -1e6
    energy[0] = state.energy_edges[-1] + 1.0
    log_weights = torch.where(torch.isinf(energy), -torch.inf, 0.0)
    found = accuracy.figures(replace(exact, energy=energy, log_weights=log_weights), state)
    assert found["n_infinite_energy"] == N // 4 - 1
    assert found["raw"]["energy_tv"] == pytest.approx(0.5, abs=0.02)
    assert found["reweighted"]["energy_tv"] == pytest.approx(1 / 3, abs=0.02)
    assert math.isfinite(found["raw"]["mean_energy"])


def test_nothing_in_alpha_left_and_no_reference_give_none(state):
    phi = np.full(N, -1.0)
    found = accuracy.figures(draws_from(state.ramachandran, state, phi=phi), state)
    assert found["raw"]["alpha_left"] == 0.0
    assert found["raw"]["alpha_left_free_energy_kt"] is found["raw"]["alpha_left_deviation_kt"] is None
    alone = accuracy.figures(draws_from(state.ramachandran, state), None)
    assert alone["reference"] is alone["raw"]["ramachandran_kl"] is alone["raw"]["alpha_left_deviation_kt"] is None
    assert alone["raw"]["alpha_left_free_energy_kt"] > 0
    assert alone["raw"].keys() == found["raw"].keys() == found["reweighted"].keys()


def test_mirror_images_are_told(ala2):
    x = torch.tensor(ala2.positions)[None] + 0.005 * torch.randn(4, 22, 3, generator=torch.Generator().manual_seed(0))
    both = torch.cat((x, x * torch.tensor([1.0, 1.0, -1.0]), torch.full_like(x[:1], torch.nan)))
    assert accuracy.mirrored(both, ala2).tolist() == 4 * [False] + 4 * [True] + [False]


def test_draws_in_parts_are_those_of_draw(monkeypatch):
    flow = tsf.pretrained("ala2")
    energy = tsf.BatchedEnergy(flow.molecule.system, flow.molecule.positions)
    monkeypatch.setattr(accuracy, "PART", 60)
    seen = []
    draws = accuracy.collect(
        flow, energy, 450.0, 100, generator=torch.Generator().manual_seed(5), progress=lambda *all: seen.append(all[:2])
    )
    assert seen == [(60, 100), (100, 100)]
    first = draw(flow, energy, temperature=450.0, n=60, generator=torch.Generator().manual_seed(5))
    assert torch.equal(draws.energy[:60], first.energy)
    assert torch.equal(draws.log_weights[:60], first.log_weights)
    assert np.array_equal(draws.phi[:60], phi_psi(first.positions, flow.molecule)[0])
    found = accuracy.figures(draws, None)
    assert len(draws) == found["n_draws"] == 100
    assert found["ess_first"] == pytest.approx(first.ess)
    assert found["n_mirrored_draws"] == 0


# --- costs ------------------------------------------------------------------------------------------------------------


def test_costs_are_those_of_the_run(tiny_run, tmp_path):
    stages = json.loads((tiny_run / "stages.json").read_text("utf-8"))
    flow, facts = accuracy_table.describe(tiny_run / "flow.tsf")
    assert facts["n_parameters"] == flow.n_parameters
    assert (facts["model"], facts["seed"], facts["n_frames"], facts["steps"]) == ("anharmonic", 3, 600, 40)
    for stage in ("simulate", "train"):
        assert facts[f"n_energy_evaluations_{stage}"] == stages[stage]["n_energy_evaluations"] > 0
        assert facts[f"seconds_{stage}"] == stages[stage]["seconds"]
    assert facts["seconds_refine"] is None

    run = tmp_path / "run"
    run.mkdir()
    for name in ("stages.json", "config.toml", "history.json"):
        shutil.copy(tiny_run / name, run)
    stages["refine 500 K"] = {"n_energy_evaluations": 77, "seconds": 5.0, "done": True}
    stages["refine 600 K"] = {"n_energy_evaluations": 100, "seconds": 1.0, "done": True}
    (run / "stages.json").write_text(json.dumps(stages), "utf-8")
    for chain, name, cost in (([500.0], "500", (77, 5.0)), ([600.0, 500.0], "600 and 500", (177, 6.0))):
        path = tmp_path / f"{name}.tsf"
        tsf.save_flow(flow, path, extra={"refined_at": chain, "seed": 3})
        assert accuracy_table.describe(path)[1]["seconds_train"] is None  # no run around it
        _, refined = accuracy_table.describe(path, run=run)
        assert refined["model"] == f"anharmonic, refined at {name} K"
        assert (refined["n_energy_evaluations_refine"], refined["seconds_refine"]) == cost
        assert refined["n_energy_evaluations_train"] == facts["n_energy_evaluations_train"]
    with pytest.raises(ValueError, match="no refinement at 400 K"):
        accuracy_table.costs(run, [500.0, 400.0])


def test_a_flow_without_a_run_has_no_costs():
    _, facts = accuracy_table.describe(pretrained_path("ala2"), "shipped")
    assert facts["model"] == "shipped"
    assert facts["seconds_simulate"] is facts["n_energy_evaluations_train"] is facts["steps"] is None


# --- the table --------------------------------------------------------------------------------------------------------


def record(seed, ess, temperature=300.0, **changes):
    means = {"alpha_left_deviation_kt": 0.01 * seed, "alpha_left_deviation_error_kt": 0.02, "ramachandran_kl": 0.001}
    return {
        "model": "ours", "file": f"{seed}.tsf", "seed": seed, "n_parameters": 1234567, "n_frames": 1, "steps": 2,
        "training_temperature_kelvin": 600.0, "refined_at_kelvin": None, "temperature_kelvin": temperature, "ess": ess,
        "ess_first": ess, "n_energy_evaluations_simulate": 1_000_000 * seed, "n_energy_evaluations_train": 2_000_000,
        "n_energy_evaluations_refine": None, "seconds_simulate": 60.0, "seconds_train": 90.0, "seconds_refine": None,
        "raw": means, "reweighted": means, "n_draws": 90, "n_rejected": 10, "n_mirrored_draws": 0,
        "n_mirrored_rejected": 1, **changes,
    }  # fmt: skip


def rows(text, name):
    return [[cell.strip() for cell in line.split("|")[2:-1]] for line in text.splitlines() if f"| {name} |" in line]


def test_seeds_of_a_model_share_a_row():
    both = [record(seed, ess, t) for t in (300.0, 600.0) for seed, ess in ((1, 0.90), (2, 0.94))]
    text = accuracy_table.table([*both, record(1, None, model="lost", file="x", raw={}, reweighted={}, n_draws=None)])
    costs, hot, cold = rows(text, "ours")
    assert costs[:3] == ["1, 2", "1,234,567", "600 K"]
    assert costs[3:5] == ["1.50 ± 0.71 / 2.00 ± 0.00 / -", "1.0 ± 0.0 / 1.5 ± 0.0 / -"]
    assert costs[5] == cold[0] == hot[0] == "92.00 ± 2.83 %"
    assert "+0.015 ± 0.007 (0.020)" in cold
    assert cold[-1] == "1.0000 ± 0.0000 %"
    assert rows(text, "lost")[1] == len(cold) * ["-"]
    assert text.index("At 600 K") < text.index("At 300 K")
    lines = text.splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 2


def test_models_that_differ_in_training_are_apart():
    text = accuracy_table.table([record(1, 0.9), record(2, 0.8, steps=3)])
    assert [row[0] for row in rows(text, "ours")[:2]] == ["1", "2"]


# --- what flows are compared with -------------------------------------------------------------------------------------

TINY = ("--steps", "10", "--hidden", "4", "--seed", "3")


def test_measure_keeps_what_is_done(script, tmp_path, capsys):
    arguments = ["measure", "ala2", "--out", str(tmp_path), "--n", "50", "--temperatures", "300"]
    for _ in range(2):
        script.measure(script.parse(arguments))
    (path,) = tmp_path.iterdir()
    assert capsys.readouterr().out.count("ESS") == 1
    found = json.loads(path.read_text("utf-8"))
    assert (found["n_draws"], found["said"], found["temperature_kelvin"]) == (50, "done", 300.0)
    path.write_text(json.dumps({**found, "file": "elsewhere.tsf"}), "utf-8")
    with pytest.raises(SystemExit, match=r"is of elsewhere\.tsf"):
        script.measure(script.parse(arguments))


def test_spline_is_trained_on_frames_at_300_k(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "N_REPLICAS", 8)
    arguments = ("--frames", "160", "--spacing", "2", "--equilibration", "0.01", *TINY)
    for _ in range(2):  # the second finds all done
        script.spline(script.parse(["spline", "--out", str(tmp_path / "run"), *arguments]))
    flow, facts = accuracy_table.describe(tmp_path / "run" / "flow.tsf")
    assert (facts["kind"], flow.training_temperature, facts["n_frames"]) == ("spline", 300.0, 160)
    assert facts["n_energy_evaluations_simulate"] == 25 * 2 * 40 + 40
    trained = json.loads((tmp_path / "run" / "history.json").read_text("utf-8"))
    assert trained["n_energy_evaluations"] == 0


def test_papers_models_take_frames_of_a_run(script, tiny_run, tmp_path):
    where = ("--frames-from", str(tiny_run), "--out", str(tmp_path / "run"))
    script.paper(script.parse(["paper", "--kind", "tsf", *where, "--frames", "300", *TINY]))
    flow, facts = accuracy_table.describe(tmp_path / "run" / "flow.tsf")
    source = accuracy_table.costs(tiny_run, [])
    assert (facts["kind"], flow.training_temperature, flow.n_momenta, facts["n_frames"]) == ("tsf", 600.0, 60, 300)
    for name in ("n_energy_evaluations_simulate", "seconds_simulate"):
        assert facts[name] == source[name]


@pytest.mark.parametrize("kind", ["tsf", "real-nvp", "spline"])
def test_baselines_have_as_many_parameters_as_asked(script, kind):
    counts = [
        sum(p.numel() for part in script.modules_of(kind, hidden) for p in part.parameters())
        for hidden in (script.hidden_for(kind, 50_000), script.hidden_for(kind, 50_000) + 1)
    ]
    assert counts[0] <= 50_000 < counts[1]
    with pytest.raises(SystemExit, match="too few"):
        script.hidden_for(kind, 10)
