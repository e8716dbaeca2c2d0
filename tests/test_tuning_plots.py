"""Figures of tuning: every curve and name is there, nothing overlaps, and what cannot be drawn is left out."""

import pytest
import torch
from molecules import seeded
from pictures import misplaced, words

from openmm_tsf.tuning import energy_level_decomposition, optimal_sampling_temperature
from openmm_tsf.tuning.ising import fit_ising, sample_spins, square_lattice
from openmm_tsf.tuning.replicates import IsingReplicates
from openmm_tsf.tuning.two_level import TwoLevel, fit_two_level, phase_picture
from openmm_tsf.tuning_plots import divergence_figure, ising_figure, levels_figure, phase_figure, size_figure

LATTICE = square_lattice(3)


@pytest.fixture(scope="module")
def states():
    return fit_ising(sample_spins(LATTICE, 60, temperature=3.0, generator=seeded(2))).against(LATTICE, 3.0)


@pytest.fixture(scope="module")
def picture():
    sizes = [5, 10, 20, 50, 100, 300, 1000]
    return phase_picture(20, 80, [2.0, 4.0, 6.0, 8.0], sizes, n_replicates=20, generator=seeded(3))


def test_divergences(states):
    best = optimal_sampling_temperature(states)
    mixed = torch.zeros(1, 10, dtype=torch.long)
    mixed[0, 5:7] = torch.tensor([3, 2])
    none = optimal_sampling_temperature(fit_two_level(TwoLevel(3, 7, 5.0), mixed).energies(0))
    figure = divergence_figure({"one": best, "another": best, "no roots": none}, note="small print")
    assert not misplaced(figure)
    shown = " ".join(words(figure))
    assert f"t* = {best.t_star.value:.2f}" in shown and f"t' = {best.t_prime.value:.2f}" in shown
    assert "no t*" in shown and "no t'" in shown and "small print" in shown
    line = figure.axes[0].lines[0]
    assert list(line.get_ydata()) == best.fidelity.tolist()
    dot = figure.axes[0].lines[1]
    assert float(dot.get_xdata()[0]) == best.t_star.value


def test_sizes(picture):
    figure = size_figure(picture, note="small print")
    assert not misplaced(figure)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["2", "4", "6", "8"]
    assert list(figure.axes[0].lines[2].get_ydata()) == picture.median[2].tolist()


def test_phases(picture):
    """Names stand where they are true, and the boundary is where the theory puts it."""
    figure = phase_figure(picture, 20, 80, note="small print")
    assert not misplaced(figure)
    axis = figure.axes[0]
    places = {text.get_text(): text.get_position() for text in axis.texts}
    assert set(places) == {"cool", "heat", "keep"}
    assert places["cool"][1] > 5.5 > places["heat"][1]
    assert places["keep"][0] > max(places["cool"][0], places["heat"][0])
    settled, critical = axis.lines
    assert list(settled.get_xdata()) == [TwoLevel(20, 80, gap).settling_size() for gap in picture.gaps]
    assert ((critical.get_ydata() > 5.0) & (critical.get_ydata() < 6.0)).all() and len(critical.get_ydata()) > 2


def test_ising():
    values = torch.linspace(0.7, 1.3, 12)
    some = torch.arange(12) < 6
    cells = [
        IsingReplicates(side, t, m, values + 1.0 / m, values + 2.0 / m, some)
        for side in (3, 4) for t in (2.0, 4.4) for m in (10, 100)
    ]  # fmt: skip
    cells.append(IsingReplicates(3, 2.0, 1000, values, values, torch.arange(12) < 2))  # two data sets: not drawn
    figure = ising_figure(cells, note="small print")
    assert not misplaced(figure)
    assert [axis.get_title(loc="left")[:5] for axis in figure.axes] == ["3 x 3", "3 x 3", "4 x 4", "4 x 4"]
    sizes = [len(container.lines[0].get_xdata()) for container in figure.axes[0].containers]
    assert sizes == [3, 2, 3, 2]
    first = figure.axes[1].containers[0].lines[0]
    assert list(first.get_ydata()) == [c.median("t_star", no_fit=False)[0] for c in cells[2:4]]


def test_levels(states):
    best = optimal_sampling_temperature(states)
    one, star = (energy_level_decomposition(states.at(t)) for t in (1.0, best.t_star.value))
    figure = levels_figure({"a title": (one, star)}, note="small print")
    assert not misplaced(figure)
    above, below = figure.axes
    assert [bar.get_height() for bar in above.patches] == one.target.tolist()
    heights = {round(bar.get_x() + 0.4): bar.get_height() for bar in below.patches}
    assert [heights[k] for k in range(len(one.slope))] == (-one.slope).tolist()
    assert f"t* = {star.t:.2f}" in above.get_title(loc="left")
