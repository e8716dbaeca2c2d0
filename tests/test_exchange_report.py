"""Report of an exchange: its figures are those of a system with known answers, and weak ones are called so."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import mdtraj
import numpy as np
import pytest
import torch
from pictures import misplaced, words
from poses import pose
from test_report import Checker

from openmm_tsf import canvas, exchange_facts, exchange_page, exchange_plots, exchange_report, multistate, plotting
from openmm_tsf.flow_steps import STEPS
from openmm_tsf.mbar import Samples
from openmm_tsf.records import ExchangeRecord
from openmm_tsf.reference import Reference, ReferenceState
from openmm_tsf.torsions import alpha_left, basins, phi_psi
from openmm_tsf.units import kT

TEMPERATURES = np.array([300.0, 420.0, 600.0])
COUNTS = {"independence_proposed": 1000, "independence_accepted": 400, "latent_proposed": 200, "latent_accepted": 30}


def energy_of(phi, psi):
    """A molecule that is stiff but for phi and psi [rad]: U [kJ/mol]."""
    return -100.0 + 5.0 * (1.0 - np.cos(phi + 1.4)) + 3.0 * (1.0 - np.cos(psi - 2.0))


def exact(temperature: float) -> dict[str, float]:
    """What quadrature says."""
    grid = -math.pi + 2.0 * math.pi * (np.arange(1000) + 0.5) / 1000
    phi, psi = (axis.ravel() for axis in np.meshgrid(grid, grid, indexing="ij"))
    u = energy_of(phi, psi)
    w = np.exp(-(u + 100.0) / kT(temperature))
    z = w.sum()
    mean = w @ u / z
    found = {"mean_energy": mean, "heat_capacity": w @ (u - mean) ** 2 / z / (kT(temperature) * temperature)}
    for index, name in enumerate(("alpha_left", "alpha_right", "beta")):
        found[name] = w[basins(phi, psi) == index].sum() / z
    return found | {"free_energy": -math.log(z) - 100.0 / kT(temperature)}


def drawn_angles(temperature: float, n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, 2) exact draws by rejection."""
    found = np.empty((0, 2))
    while len(found) < n:
        trial = rng.uniform(-math.pi, math.pi, (4 * n, 2))
        kept = rng.uniform(size=4 * n) < np.exp(-(energy_of(*trial.T) + 100.0) / kT(temperature))
        found = np.concatenate([found, trial[kept]])
    return found[:n]


def exchange_of(
    molecule, temperatures=TEMPERATURES, copies: int = 2, n: int = 400, every: int = 1, counts=COUNTS, seed: int = 5
) -> ExchangeRecord:
    """An exchange whose replicas forget everything in one iteration but their temperature."""
    rng, k = np.random.default_rng(seed), len(temperatures)
    level = np.repeat(np.arange(k), copies)
    pool = np.stack([drawn_angles(t, n * len(level), rng).reshape(n, -1, 2) for t in temperatures])
    levels, angles = np.empty((n, len(level)), dtype=np.int64), np.empty((n, len(level), 2))
    proposed, accepted = np.zeros((2, k, k), dtype=np.int64)
    for i in range(n):
        levels[i], angles[i] = level, pool[level, i, np.arange(len(level))]
        u = energy_of(*angles[i].T)
        for low in range(i % 2, k - 1, 2):
            pairs = zip(*(rng.permutation(np.flatnonzero(level == x)) for x in (low, low + 1)), strict=True)
            for a, b in list(pairs):
                gain = (1.0 / kT(temperatures[low]) - 1.0 / kT(temperatures[low + 1])) * (u[a] - u[b])
                proposed[low, low + 1] += 1
                if math.log(rng.uniform()) < gain:
                    accepted[low, low + 1] += 1
                    level = level.copy()
                    level[a], level[b] = low + 1, low
    kept = np.arange(0, n, every)
    frames = pose(molecule, *angles[kept].reshape(-1, 2).T).astype(np.float32)
    return ExchangeRecord(
        sampler="batched",
        temperatures=np.asarray(temperatures),
        levels=levels,
        energies=energy_of(*np.moveaxis(angles, 2, 0)),
        swap_proposed=proposed + proposed.T,
        swap_accepted=accepted + accepted.T,
        move_counts=(dict(counts),) * k,
        positions=frames.reshape(len(kept), len(level), *frames.shape[1:]),
        position_iterations=kept,
        n_energy_evaluations=12_345,
        seconds=6.7,
    )


class UniformFlow:
    """Draws phi and psi uniformly, at any temperature."""

    training_temperature = 600.0

    def __init__(self, molecule, share_valid: float = 1.0):
        self.molecule, self.share_valid = molecule, share_valid

    def at(self, temperature):
        return self

    def propose(self, n, *, generator):
        angles = (2.0 * torch.rand(n, 2, generator=generator) - 1.0) * math.pi
        valid = torch.rand(n, generator=generator) < self.share_valid
        return torch.as_tensor(pose(self.molecule, *angles.numpy().T)), torch.zeros(n), valid

    def log_constraint_factor(self, x):
        return torch.zeros(len(x))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    from openmm_tsf import alanine_dipeptide

    molecule = alanine_dipeptide()
    folder, said = tmp_path_factory.mktemp("exchange") / "new" / "folder", []
    found = exchange_report.write_exchange_report(
        folder,
        renamed(molecule, exchange_of(molecule))[1],
        renamed(molecule)[0],
        UniformFlow(molecule),
        lambda x: torch.as_tensor(energy_of(*phi_psi(x, molecule))),
        n_draws=2000,
        seed=11,
        progress=lambda *update: said.append(update),
    )
    return folder, found, said


def renamed(molecule, record=None):
    """The molecule under a name that has no reference."""
    return replace(molecule, name="toy"), record


def test_files_hold_what_is_returned(written):
    folder, found, said = written
    files = {"exchange.json", "exchange.html", "observables_exchange.csv", "exchange.png"}
    files |= {"ramachandran_exchange.png", "observables_exchange.png"}
    assert {path.name for path in folder.iterdir()} == files
    assert json.loads((folder / "exchange.json").read_text("utf-8")) == found
    assert all(value is None or isinstance(value, (int, float, str)) for value in found.values())
    lines = (folder / "observables_exchange.csv").read_text("utf-8").splitlines()
    assert lines[0].startswith("source,temperature,")
    assert len(lines) == 1 + 2 * 13
    assert [done for done, *_ in said] == sorted(done for done, *_ in said)
    assert said[-1][0] == said[-1][1] == 16


def test_figures_are_those_of_quadrature(written):
    _, found, _ = written
    for k, temperature in enumerate(TEMPERATURES):
        value, error = found[f"free_energy_{k}_nat"], found[f"free_energy_{k}_error_nat"]
        want = exact(temperature)["free_energy"] - exact(300.0)["free_energy"]
        assert abs(value - want) <= 4.0 * error
    for name, template in exchange_facts.TEMPLATES.items():
        want = exact(300.0)[name.removesuffix("_free_energy_kt")]
        want = -math.log(want) if name.endswith("_kt") else want
        for source in ("exchange", "flow"):
            value, error = (found[template.format(source, which)] for which in ("", "_error"))
            assert 0.0 < error < 0.3 * abs(want)
            assert abs(value - want) <= 4.0 * error, (name, source)
    assert abs(found["alpha_left_flow_raw"] - 2.4 / (2.0 * math.pi)) < 0.05
    assert abs(found["mean_energy_flow_difference"]) < 4.0
    assert found["alpha_left_exchange_deviation"] is None  # no reference


def test_rows_agree_with_quadrature_at_every_temperature(written):
    import csv

    folder, *_ = written
    with open(folder / "observables_exchange.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["source"] for row in rows} == {"exchange", "flow"}
    for row in rows:
        want, temperature = exact(float(row["temperature"])), float(row["temperature"])
        for name in ("mean_energy", "heat_capacity", "alpha_left", "alpha_right", "beta"):
            assert abs(float(row[name]) - want[name]) <= 4.5 * float(row[f"{name}_error"]), (row["source"], name)
        free = float(row["alpha_right_free_energy_kt"])
        assert free == pytest.approx(-math.log(float(row["alpha_right"])))
        assert float(row["alpha_right_free_energy"]) == pytest.approx(kT(temperature) * free)


def test_figures_account_for_moves_and_swaps(ala2, written):
    _, found, _ = written
    record = exchange_of(ala2)
    assert [found[f"independence_acceptance_{k}"] for k in range(3)] == [0.4] * 3
    assert [found[f"latent_acceptance_{k}"] for k in range(3)] == [0.15] * 3
    share = record.swap_accepted[0, 1] / record.swap_proposed[0, 1]
    assert found["swap_acceptance_0_1"] == pytest.approx(share)
    assert "swap_acceptance_0_2" not in found
    assert (found["n_energy_evaluations"], found["seconds"], found["seed"]) == (12_345, 6.7, 11)
    assert (found["n_iterations"], found["n_discarded_iterations"], found["n_draws_flow"]) == (400, 40, 2000)
    assert found["version_pymbar"] not in ("", None)


def test_page_is_whole_and_says_what_was_found(written):
    folder, found, _ = written
    text = (folder / "exchange.html").read_text("utf-8")
    checker = Checker(text)
    assert len(checker.sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in checker.sources)
    said = "".join(checker.words)
    for expected in (
        "toy: replica exchange from 300 to 600 K",
        "6 replicas on 3 temperatures, 400 iterations",
        "exchange, MBAR",
        "Acceptance, swaps and paths",
        f"{found['round_trips']:,} round trips",
        "as in exchange.json",
    ):
        assert expected in said
    assert "nan" not in said
    assert "$" not in said
    assert "Take care" not in said, said[said.index("Take care") :][:400]


def test_exchange_without_flow_moves_flow_or_torsions(ala2, tmp_path):
    record = exchange_of(ala2, counts={}, n=100)
    plain = SimpleNamespace(name="plain", positions=ala2.positions, mdtraj_topology=mdtraj.Topology(), constraints=())
    found = exchange_report.write_exchange_report(tmp_path, record, plain, None, None)
    assert found["alpha_left_exchange"] is found["ess_flow"] is found["mean_energy_flow_kj_per_mol"] is None
    assert not any(key.startswith(("independence", "latent")) for key in found)
    assert not (tmp_path / "ramachandran_exchange.png").exists()
    said = "".join(Checker((tmp_path / "exchange.html").read_text("utf-8")).words)
    assert "alpha_L" not in said
    assert "flow, reweighted" not in said
    assert "moves accepted" not in said.replace("Flow moves accepted at each", "")


def test_exchange_without_frames_says_so(ala2, tmp_path):
    record = exchange_of(ala2, n=60)
    empty = replace(record, positions=record.positions[:0], position_iterations=record.position_iterations[:0])
    found = exchange_report.write_exchange_report(tmp_path, empty, renamed(ala2)[0], None, None)
    assert found["alpha_left_exchange"] is None
    assert "No frames are stored" in (tmp_path / "exchange.html").read_text("utf-8")


@pytest.mark.parametrize("every", [1, 5])
def test_short_exchange_has_rough_errors_and_says_so(ala2, tmp_path, every):
    record = exchange_of(ala2, n=6, every=every)
    found = exchange_report.write_exchange_report(tmp_path, record, renamed(ala2)[0], None, None)
    assert found["free_energy_1_error_nat"] > 0.0
    assert "error bars come from 3 blocks" in (tmp_path / "exchange.html").read_text("utf-8")


@pytest.mark.parametrize("stored", [(59,), (58, 59)])
def test_frames_in_one_block_of_time_have_no_error_bars_and_the_page_says_so(ala2, tmp_path, stored):
    record = exchange_of(ala2, n=60)
    few = replace(record, positions=record.positions[list(stored)], position_iterations=np.array(stored))
    found = exchange_report.write_exchange_report(tmp_path, few, renamed(ala2)[0], None, None)
    assert found["mean_energy_exchange_error_kj_per_mol"] > 0.0
    assert found["alpha_left_exchange"] is not None
    assert found["alpha_left_exchange_error"] is found["alpha_right_exchange_error"] is None
    assert (tmp_path / "ramachandran_exchange.png").exists()
    said = "".join(Checker((tmp_path / "exchange.html").read_text("utf-8")).words)
    assert "The shares of the basins have no error bars" in said
    assert "too little alpha_L" not in said
    assert "nan" not in said


def test_untrained_flow_is_left_out_with_a_reason(ala2, tmp_path):
    record, flow = exchange_of(ala2, n=60), UniformFlow(ala2, share_valid=1e-5)
    found = exchange_report.write_exchange_report(
        tmp_path, record, renamed(ala2)[0], flow, lambda x: torch.zeros(len(x)), n_draws=10
    )
    assert (found["n_draws_flow"], found["ess_flow"]) == (0, None)
    said = "".join(Checker((tmp_path / "exchange.html").read_text("utf-8")).words)
    assert "The flow is left out from 300 K on" in said
    assert "flow, reweighted" not in said


def known(mean_energy: float) -> Reference:
    """A reference at 300 K with this mean energy [kJ/mol]."""
    want = exact(300.0)
    variance = want["heat_capacity"] * kT(300.0) * 300.0
    numbers = (300.0, want["alpha_left"], 1e-4, mean_energy, 0.01, variance, 0.1, 1e6)
    grid = np.full((64, 64), 1.0 / 64**2)
    return Reference((ReferenceState(*numbers, grid, np.linspace(-100.0, -80.0, 11), np.full(10, 0.1)),), {})


@pytest.mark.parametrize(("shift", "n_warnings"), [(0.0, 0), (3.0, 1)])
def test_distance_to_the_reference_is_measured(ala2, tmp_path, monkeypatch, shift, n_warnings):
    monkeypatch.setattr(exchange_report, "reference_for", lambda molecule: known(exact(300.0)["mean_energy"] + shift))
    found = exchange_report.write_exchange_report(tmp_path, exchange_of(ala2, n=300), ala2, None, None)
    error = math.hypot(found["mean_energy_exchange_error_kj_per_mol"], 0.01)
    gap = found["mean_energy_exchange_kj_per_mol"] - found["mean_energy_reference_kj_per_mol"]
    assert found["mean_energy_exchange_deviation"] == pytest.approx(gap / error)
    about = [words for words in exchange_page.warning_sentences(found) if "from the reference" in words]
    assert len(about) == n_warnings
    assert "a long reference has" in (tmp_path / "exchange.html").read_text("utf-8")


def test_basin_without_a_frame_is_not_called_a_deviation(ala2, tmp_path, monkeypatch):
    monkeypatch.setattr(exchange_report, "reference_for", lambda molecule: known(-95.0))
    record = exchange_of(ala2, n=60)
    still = replace(record, positions=np.broadcast_to(ala2.positions.astype(np.float32), record.positions.shape))
    assert not alpha_left(phi_psi(ala2.positions[None], ala2)[0]).any()
    found = exchange_report.write_exchange_report(tmp_path, still, ala2, None, None)
    assert found["alpha_left_exchange"] == 0.0
    assert found["alpha_left_exchange_deviation"] is found["alpha_left_exchange_free_energy_kt"] is None
    assert any("too little alpha_L" in sentence for sentence in exchange_page.warning_sentences(found))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"swap_acceptance_1_2": 0.04}, "Only 4\u00a0% of the exchanges between 420 and 600 K"),
        ({"round_trips": 0}, "No replica went from the lowest temperature"),
        ({"independence_acceptance_0": 0.001}, "0.1\u00a0% of the independence moves at 300 K"),
        ({"unrepresentable_2": 7}, "7 times a state at 600 K"),
        ({"n_effective_1": 20.0}, "420 K has 20 effective samples only"),
        ({"ess_flow": 0.05}, "effective sample size at 300 K is 5\u00a0%"),
        ({"alpha_left_flow_difference": -5.0}, "alpha_L share by the flow lies 5.0 standard errors"),
        ({"alpha_left_exchange": 0.0, "alpha_left_exchange_error": 0.0}, "too little alpha_L"),
        ({"alpha_left_exchange_error": None}, "all stored frames lie in one of the blocks"),
        ({"alpha_left_exchange": 0.02, "alpha_left_exchange_error": 0.01}, "known to 50\u00a0% of itself"),
    ],
)
def test_weak_figures_are_called_so(written, changes, expected):
    _, found, _ = written
    assert exchange_page.warning_sentences(found) == []
    (sentence,) = exchange_page.warning_sentences(found | changes)
    assert expected in sentence


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"energy": None}, "give energy, or flow=None"),
        ({"n_draws": 0}, "n_draws must be positive, not 0"),
        ({"n_discard": 37}, "40 iterations without the first 37 are too few"),
        ({"n_discard": -1}, "without the first -1"),
        (
            {"molecule": SimpleNamespace(name="water", positions=np.zeros((3, 3)), constraints=())},
            "22 atoms.*'water'.*3",
        ),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(ala2, tmp_path, changes, message):
    values = {"molecule": ala2, "flow": UniformFlow(ala2), "energy": lambda x: torch.zeros(len(x))} | changes
    with pytest.raises(ValueError, match=message):
        exchange_report.write_exchange_report(tmp_path / "no", exchange_of(ala2, n=40), **values)
    assert not (tmp_path / "no").exists()


# --- pictures ---------------------------------------------------------------------------------------------------------


def small_record(levels, temperatures=(300.0, 400.0, 500.0), counts=({}, {}, {}), proposed=None, accepted=None):
    levels, k = np.asarray(levels), len(temperatures)
    zeros = np.zeros((k, k), dtype=np.int64)
    return ExchangeRecord(
        sampler="openmmtools",
        temperatures=np.asarray(temperatures),
        levels=levels,
        energies=np.zeros(levels.shape),
        swap_proposed=zeros if proposed is None else np.asarray(proposed),
        swap_accepted=zeros if accepted is None else np.asarray(accepted),
        move_counts=tuple(counts),
        positions=np.zeros((0, levels.shape[1], 3, 3), dtype=np.float32),
        position_iterations=np.zeros(0, dtype=np.int64),
    )


def test_bars_matrix_and_paths_show_the_record():
    counts = [
        {"independence_proposed": 10, "independence_accepted": 5},
        {},
        {"independence_proposed": 4, "independence_accepted": 1},
    ]
    proposed, accepted = [[0, 10, 0], [10, 0, 0], [0, 0, 0]], [[0, 4, 0], [4, 0, 0], [0, 0, 0]]
    path = [0, 1, 2, 1, 0, 0, 1, 2, 2, 1, 0]
    record = small_record(np.stack([path, [2] * 11], 1), counts=counts, proposed=proposed, accepted=accepted)
    shares = multistate.move_acceptance(record)
    assert list(shares) == ["independence"]
    np.testing.assert_array_equal(shares["independence"], [0.5, math.nan, 0.25])
    figure = exchange_plots.exchange_figure(record, note=canvas.small_print(3))
    moves, swaps, paths = figure.axes
    heights = [bar.get_height() for bar in moves.patches]
    assert heights[0] == 50.0
    assert heights[2] == 25.0
    matrix = swaps.images[0].get_array()
    assert matrix[0, 1] == matrix[1, 0] == 0.4
    assert matrix.mask.sum() == 7
    assert "40" in [text.get_text() for text in swaps.texts]
    line = [patch for patch in paths.patches if getattr(patch, "get_data", None)][1].get_data()
    np.testing.assert_allclose(line.values, 1.0 + 0.78 * np.array(path) / 2)
    assert "2 round trips" in paths.get_title(loc="left")
    foot = [text for text in words(figure) if "Seed 3" in text]
    assert "openmmtools: 11 iterations of 2 replicas" in foot[0]
    assert "14 flow proposals, 10 swaps tried" in foot[0].replace("\n", " ")


@pytest.mark.parametrize(("k", "kinds"), [(2, ("latent",)), (5, ()), *((k, STEPS) for k in (2, 5, 9, 16))])
def test_labels_neither_overlap_nor_leave_the_page(k, kinds):
    rng = np.random.default_rng(k)
    counts = {f"{kind}_{what}": n for kind in kinds for what, n in (("proposed", 1000), ("accepted", 987))}
    proposed = 10 * (np.ones((k, k), dtype=int) - np.eye(k, dtype=int))
    levels = np.argsort(rng.uniform(size=(1200, k)), 1)
    record = small_record(levels, np.geomspace(300, 1200, k), (counts,) * k, proposed, proposed - proposed // 2)
    figure = exchange_plots.exchange_figure(record, note=canvas.small_print(1))
    assert misplaced(figure) == []
    assert "last 300 of 1\u2009200 iterations" in figure.axes[-1].get_title(loc="left")


def test_misplaced_labels_are_found():
    figure = exchange_plots.observables_exchange(rows(3), note="x" * 300)
    figure.axes[0].set_ylabel("words in the way " * 9)
    assert len(misplaced(figure)) > 2


def rows(n: int, names=("mean_energy", "heat_capacity"), **changes) -> list[dict]:
    values = {name: 2.0 for name in names} | {f"{name}_error": 0.5 for name in names} | {"n_effective": 1000.0}
    return [{"temperature": 300.0 + 50.0 * i} | values | changes for i in range(n)]


BASIN_COLUMNS = ("mean_energy", "heat_capacity", "alpha_left_free_energy_kt", "alpha_right_free_energy_kt")


@pytest.mark.parametrize("names", [BASIN_COLUMNS, BASIN_COLUMNS[:2]])
def test_observables_show_values_and_their_differences(names):
    other = rows(5, names, mean_energy=3.0) + rows(1, names, temperature=510.0, n_effective=3.0)
    figure = exchange_plots.observables_exchange(
        rows(5, names), other, reference=known(2.5), note=canvas.small_print(1)
    )
    assert len(figure.axes) == 2 * len(names)
    above, below = figure.axes[0], figure.axes[2]
    assert [line.get_label() for line in above.containers] == ["exchange, MBAR", "flow, reweighted", "reference"]
    flow, reference = (line for line in below.lines if line.get_marker() in "sD")
    np.testing.assert_allclose(flow.get_ydata(), 1.0 / math.hypot(0.5, 0.5))
    np.testing.assert_allclose(reference.get_ydata(), 0.5 / math.hypot(0.5, 0.01))
    assert any("1 rows below 20 left out" in text.replace("\n", " ") for text in words(figure))
    assert misplaced(figure) == []


def test_observables_without_error_bars_leave_a_panel_that_says_so():
    figure = exchange_plots.observables_exchange(rows(3, heat_capacity_error=math.nan), note=canvas.small_print(1))
    said = [[text.get_text() for text in axes.texts] for axes in figure.axes[:2]]
    assert said == [[], ["no value with an error bar"]]
    assert misplaced(figure) == []


def test_maps_of_the_exchange_are_weighed_and_count_what_they_are_worth(ala2):
    record = exchange_of(ala2, n=300)
    angles = phi_psi(record.positions.reshape(-1, 22, 3), ala2)
    panel = exchange_plots.exchange_series(record, 300.0, *angles, n_discard=30, n_effective=270.0)
    assert (panel.n, panel.ess) == (270 * 6, pytest.approx(1 / 6))
    same = exchange_plots.exchange_series(record, 300.0, *angles, n_effective=270.0, samples=Samples.of(record, 30, 4))
    assert (same.n, same.ess) == (panel.n, panel.ess)
    np.testing.assert_array_equal(same.ramachandran, panel.ramachandran)
    left = panel.ramachandran[32:57].sum()  # phi from 0 to 140.6 degrees
    assert abs(left - exact(300.0)["alpha_left"]) < 0.02
    assert alpha_left(angles[0]).mean() > left + 0.02  # unweighted frames have that of higher temperatures too
    figure = plotting.ramachandran([panel], note=canvas.small_print(1))
    assert misplaced(figure) == []
    assert any("ESS 16.7 %" in text for text in words(figure))


def test_even_steps_take_in_the_temperatures_of_the_reference(ala2):
    record = small_record(np.tile([0, 1, 2], (3, 1)), (300.0, 430.0, 600.0))
    state = known(0.0).states[0]
    reference = Reference(tuple(state._replace(temperature=t) for t in (250.0, 300.0, 424.0, 600.2)), {})
    assert exchange_report.observed_temperatures(record, reference) == [
        *range(300, 425, 25), 424.0, *range(450, 601, 25)
    ]  # fmt: skip
    assert len(exchange_report.observed_temperatures(small_record([[0, 1]], (10.0, 3000.0), ({}, {})))) == 17


def test_matplotlib_loads_late_and_pyplot_never():
    code = (
        "import sys, openmm_tsf.exchange_report; assert not {'matplotlib', 'pymbar', 'openmmtools'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
