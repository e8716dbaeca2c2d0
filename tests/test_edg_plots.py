"""Figures of diffusion generators: what they show, and that nothing is in the way of anything else."""

import pytest
import torch
from pictures import misplaced, words

from openmm_tsf.edg.targets import density_2d
from openmm_tsf.edg_plots import PlanePanel, bound_figure, log_z_figure, plane_figure


def test_draws_beside_densities(generator):
    panels = []
    for name, reach in (("MoG6", 7.0), ("Ring", 4.0)):
        target = density_2d(name)
        x = target.sample(300, generator=generator)
        wrong = torch.cat((x[:100] + 1.0, torch.full((3, 2), torch.nan)))
        panels.append(PlanePanel(name, target, {"exact draws": x, "generator": wrong}, reach))
    figure = plane_figure(panels, note="A note.")
    shown = words(figure)
    assert {"density", "exact draws", "generator", "MoG6", "Ring"} <= set(shown)
    assert any("300 draws" in text and "MoG6 ±7, Ring ±4" in text and "A note." in text for text in shown)
    axes = figure.axes
    assert len(axes) == 6
    assert [len(axis.lines[0].get_xdata()) for axis in axes if axis.lines] == [300, 100, 300, 100]
    picture = axes[3].images[0].get_array()  # a ring of radius 2: dark there, white in the middle
    n = len(picture)
    assert picture[n // 2, int(n * 0.75)] > 0.95 and picture[n // 2, n // 2] < 0.1
    rows = axes[0].images[0].get_array()
    assert rows[n // 2].max() > 0.95 > rows[:, n // 2].max()  # the hexagon's modes lie along x, not along y


HISTORY = [
    {"step": step, "bound": 3.0 - 0.002 * step, "heat": 20.0 if step < 300 else 1.0} for step in range(100, 1001, 100)
]


@pytest.mark.parametrize("log_z", [None, {"MoG2": 0.5, "Ring": 0.5}])
def test_training(log_z):
    figure = bound_figure({"MoG2": HISTORY, "Ring": HISTORY}, log_z, note="A note.")
    (axis,) = figure.axes
    x, y = axis.lines[0].get_data()
    assert list(x) == list(range(400, 1001, 100))  # 300 is a mean over steps that were hotter
    assert y[-1] == pytest.approx(1.0 + (0.5 if log_z else 0.0))
    assert axis.get_ylabel().startswith("bound of KL" if log_z else "bound less ln Z")
    assert not misplaced(figure)


def test_log_z_against_temperature():
    rows = [
        {"temperature": t, "exact": 200.0 + t, "estimate": 200.3 + t, "error": 0.1, "bound": 198.0 + t}
        for t in (2.4, 2.0, 2.2)
    ]
    figure = log_z_figure(rows, note="A note.")
    (axis,) = figure.axes
    found = {box.get_label(): box.lines[0].get_data() for box in axis.containers}
    assert list(found["bound"][0]) == [2.0, 2.2, 2.4]
    assert found["estimate"][1] == pytest.approx([0.3] * 3) and found["bound"][1] == pytest.approx([-2.0] * 3)
    assert not misplaced(figure)
