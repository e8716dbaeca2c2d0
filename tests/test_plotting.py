"""Figures: what they show is what was measured, labels are there and do not overlap, nothing global is touched."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from pictures import misplaced, words
from poses import posed_ensemble

from openmm_tsf import plotting, series
from openmm_tsf.analysis import phi_psi, ramachandran_histogram
from openmm_tsf.reference import Reference, ReferenceState


def reference(ala2, temperatures=(300.0, 600.0)) -> Reference:
    states = []
    for seed, temperature in enumerate(temperatures):
        exact = posed_ensemble(ala2, 3000, temperature, seed=90 + seed)
        energy = exact.energy.numpy()
        edges = series.energy_edges(energy)
        share = np.histogram(energy, edges)[0] / len(energy)
        cells = ramachandran_histogram(*phi_psi(exact.positions, ala2))
        numbers = (0.02, 0.0005, energy.mean(), 0.1, energy.var(), 3.0, 3000.0)
        states.append(ReferenceState(temperature, *map(float, numbers), cells, edges, share))
    return Reference(tuple(states), {})


def history(n: int = 200) -> list[dict]:
    rows = []
    for step in range(0, 10 * n, 10):
        held_out = -118.0 + 60.0 * math.exp(-step / 150) if step % 100 == 0 else None
        rows.append({"step": step, "loss": -120.0 + 60.0 * math.exp(-step / 150), "held_out_nll": held_out})
        rows[-1] |= {"ess_train": 0.5 if held_out else None, "learning_rate": 1e-3}
        rows[-1] |= {"energy_loss": math.nan if step == 500 else -80.0} if step > 300 else {}
    return rows


def observables(ess=(0.6, 0.3, 0.005)) -> list[dict]:
    names = ("mean_energy", "heat_capacity", "alpha_left_free_energy_kt")
    rows = []
    for index, share in enumerate(ess):
        row = {"temperature": 300.0 + 150.0 * index, "ess": share}
        rows.append(row | {name: 1.0 + index for name in names} | {f"{name}_error": 0.1 for name in names})
    return rows


@pytest.fixture(scope="module")
def ensembles():
    from openmm_tsf import alanine_dipeptide

    molecule = alanine_dipeptide()
    train = posed_ensemble(molecule, 3000, 600.0, seed=1)
    return molecule, train, posed_ensemble(molecule, 2000, 300.0, seed=2)


@pytest.fixture(scope="module")
def drawn(ensembles):
    molecule, train, target = ensembles
    frames = posed_ensemble(molecule, 4000, 600.0, seed=3)
    return plotting.figures(
        train,
        target,
        molecule,
        frames=frames.positions.numpy(),
        frame_energies=frames.energy.numpy()[:1000],
        reference=reference(molecule),
        history=history(),
        observables=observables(),
        seed=11,
    )


def test_every_figure_is_drawn(drawn):
    assert set(drawn) == {"ramachandran", "phi", "energies", "training", "observables"}


@pytest.mark.parametrize("name", ["ramachandran", "phi", "energies", "training", "observables"])
def test_small_print_names_seed_and_versions(drawn, name):
    foot = [text for text in words(drawn[name]) if "Seed 11" in text]
    assert len(foot) == 1
    assert f"torch {torch.__version__}" in foot[0]
    assert "openmm-tsf" in foot[0]


@pytest.mark.parametrize("name", ["ramachandran", "phi", "energies", "training", "observables"])
def test_labels_neither_overlap_nor_leave_the_page(drawn, name):
    assert misplaced(drawn[name]) == []


def test_misplaced_labels_are_found():
    figure = plotting.training_curves(history(5))
    figure.axes[0].text(0.0, 1.02, "over the title", transform=figure.axes[0].transAxes)
    assert len(misplaced(figure)) == 1


def test_misplaced_ticks_and_axis_labels_are_found():
    figure = plotting.training_curves(history(5))
    first = figure.axes[0]
    first.set_xticks([20.0, 20.5], ["one tick", "another"])
    (found,) = misplaced(figure)
    assert found == "'one tick' overlaps 'another'"
    first.set_xticks([])
    first.yaxis.set_label_coords(-0.9, 0.5)
    assert misplaced(figure) == [first.get_ylabel()]


def test_ramachandran_panels_show_the_histograms_on_one_scale(ensembles, drawn):
    molecule, _train, target = ensembles
    axes = [axis for axis in drawn["ramachandran"].axes if axis.images]
    titles = [axis.get_title(loc="left") for axis in axes]
    assert titles == [
        "Dynamics, 600 K",
        "Flow, as drawn, 600 K",
        "Flow, as drawn, 300 K",
        "Flow, reweighted, 300 K",
        "Reference, 300 K",
    ]
    assert len({axis.images[0].get_clim() for axis in axes}) == 1
    raw = ramachandran_histogram(*phi_psi(target.positions, molecule))
    shown = axes[2].images[0].get_array()
    assert np.array_equal(shown.mask, raw.T == 0)  # no cell of a single draw is beyond the scale
    offset = np.ma.masked_invalid(shown + np.log(np.where(raw.T > 0, raw.T, 1)))
    assert np.ptp(offset.compressed()) < 1e-9  # -ln p up to one constant
    other = axes[0].images[0].get_array()
    assert min(axis.images[0].get_array().min() for axis in axes) == pytest.approx(0.0)
    assert other.shape == (64, 64)
    text = words(drawn["ramachandran"])
    assert any("φ [degrees]" in word for word in text)
    assert any("ψ [degrees]" in word for word in text)
    assert f"n = 2\u2009000, ESS {100 * target.ess:.1f} %" in text


def test_one_ensemble_is_shown_once(ensembles):
    """Where the target's temperature is that of training, as of a generator trained there alone."""
    molecule, train, _target = ensembles
    drawn = plotting.figures(train, train, molecule, model="Generator")
    titles = [axis.get_title(loc="left") for axis in drawn["ramachandran"].axes if axis.images]
    assert titles == ["Generator, as drawn, 600 K", "Generator, reweighted, 600 K"]
    assert [len(drawn[name].axes) for name in ("phi", "energies")] == [1, 1]
    assert [words for name in drawn for words in misplaced(drawn[name])] == []


def test_phi_runs_along_the_horizontal_axis(ensembles):
    molecule, *_ = ensembles
    one = posed_ensemble(molecule, 500, 300.0, seed=5, left=0.3)  # alpha_L only: phi > 0, psi > 0; all else phi < 0
    panel = series.of_ensemble(one, molecule)[0]
    image = plotting.ramachandran([panel]).axes[0].images[0]
    assert image.get_extent() == [-180, 180, -180, 180]
    filled = ~image.get_array().mask
    lower_right = filled[:32, 32:]  # psi < 0, phi > 0
    upper_left = filled[32:, :32]  # psi > 0, phi < 0
    assert upper_left.sum() > 10 * max(1, lower_right.sum())


def test_histogram_counts_errors_and_what_is_off_scale():
    values = np.array([0.5, 0.5, 1.5, 9.0])
    plain = series.histogram(values, np.array([0.0, 1.0, 2.0]))
    assert plain.density.tolist() == [0.5, 0.25]
    assert plain.error.tolist() == pytest.approx([math.sqrt(2) / 4, 0.25])
    assert (plain.off_scale, plain.n) == (0.25, 4)
    weighted = series.histogram(values, np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 2.0, 0.0]))
    assert weighted.density.tolist() == [0.5, 0.5]
    assert weighted.off_scale == pytest.approx(0.0)


def test_series_are_raw_and_reweighted(ensembles):
    molecule, _train, target = ensembles
    raw, weighed = series.of_ensemble(target.reweighted(330.0), molecule)
    assert (raw.temperature, raw.ess, weighed.temperature) == (300.0, None, 330.0)
    centre = (weighed.energy.edges[1:] + weighed.energy.edges[:-1]) / 2
    mean = float(weighed.energy.density @ (centre * np.diff(weighed.energy.edges)))
    bin_width = float(np.diff(centre)[0])
    other = target.reweighted(330.0)
    assert mean == pytest.approx(float(other.mean(other.energy).value), abs=bin_width)
    assert float(weighed.phi.density.sum() * 360 / 64) == pytest.approx(1.0)


def test_draws_off_the_energy_scale_are_named(ensembles):
    molecule, _train, target = ensembles
    energy = target.energy.clone()
    energy[:200] += 1e4
    figure = plotting.energies(
        [series.of_ensemble(type(target)(target.positions, energy, target.log_prob, 300.0), molecule)]
    )
    assert any("10.0 % off scale" in word for word in words(figure))


def test_unknown_molecules_get_the_figures_that_need_no_backbone(ensembles):
    import mdtraj

    _molecule, train, target = ensembles
    assert set(plotting.figures(train, target, mdtraj.Topology())) == {"energies"}


def test_training_curves_take_what_is_there():
    figure = plotting.training_curves(
        [{"step": 0, "loss": 1.0}, {"step": 10, "loss": None}, {"step": 20, "loss": math.inf}]
    )
    assert words(figure).count("not recorded") == 3
    assert [len(axis.lines) for axis in figure.axes] == [1, 0, 0, 0]


def test_observables_leave_out_what_cannot_be_trusted(ensembles):
    figure = plotting.observables_figure(observables())
    assert any("1 with ESS below 1 % left out" in word for word in words(figure))
    assert len(figure.axes[0].lines[0].get_xdata()) == 2
    assert len(figure.axes[3].lines[0].get_xdata()) == 3


def test_what_begins_at_zero_ends_above_all_points():
    rows = [{**row, "ess": 0.91 + 0.001 * i} for i, row in enumerate(observables())]
    bottom, top = plotting.observables_figure(rows).axes[3].get_ylim()
    assert bottom == 0.0 and 93.0 < top < 100.0


def test_global_state_is_untouched(drawn):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plotting.training_curves(history(5))
    assert dict(matplotlib.rcParams) == before


def test_matplotlib_and_nglview_load_late_and_pyplot_never():
    code = """
import sys, openmm_tsf.plotting as plotting, openmm_tsf.report, openmm_tsf.notebook
assert not {"matplotlib", "nglview"} & set(sys.modules)
plotting.png(plotting.training_curves([{"step": 0, "loss": 1.0}]))
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_pictures_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    figure = plotting.training_curves(history(5))
    plotting.save(figure, path, dpi=50)
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")

    def interrupted(target, **_):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(figure, "savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plotting.save(figure, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]
