"""Figures of diffusion generators: draws beside densities of the plane, training, and ln Z against temperature."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .canvas import STYLE, footer, new_figure
from .plotting import BLUE, GREEN, ORANGE
from .typing import Vectors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .edg import Target

CELLS = 240
"""Cells of the picture of a density, along each axis."""
SHOWN = 2000
"""Most draws that are shown as points."""
INK = "#1b1b1b"
FEW = 10
"""Points of a curve below which they are marked."""
LINES = ("-", (0, (5, 2)), (0, (3, 1, 1, 1)), (0, (1, 1)))
LOOKS = {"estimate": (BLUE, "o"), "bound": (ORANGE, "v")}


@dataclass(frozen=True, eq=False)
class PlanePanel:
    """A density of the plane and draws that are meant to be of it.

    Args:
        title: of its row.
        target: U(x) of x (B, 2).
        draws: x (n, 2) of each sampler, by the title of its column, all of equal weight.
        reach: the picture shows the square from -reach to reach.
    """

    title: str
    target: Target
    draws: Mapping[str, Vectors]
    reach: float


def plane_figure(panels: Sequence[PlanePanel], *, note: str = "") -> Figure:
    """A row for each density: the density itself, then the draws of each sampler on a pale copy of it.

    Args:
        panels: all with the same samplers.
        note: small print.
    """
    import matplotlib

    columns = ["density", *panels[0].draws]
    with matplotlib.rc_context(STYLE):
        height = 1.85 + 0.25 / len(panels)  # a line of titles on top
        figure, axes = new_figure(len(panels), len(columns), width=1.75, height=height)
        for row, panel in enumerate(panels):
            here = axes[row * len(columns) : (row + 1) * len(columns)]
            _density(here[0], panel, 1.0)
            for axis, x in zip(here[1:], panel.draws.values(), strict=True):
                _density(axis, panel, 0.3)
                points = x[torch.isfinite(x).all(1)][:SHOWN].detach().cpu().numpy()
                axis.plot(*points.T, ".", color=INK, markersize=1.6, alpha=0.5, markeredgewidth=0, rasterized=True)
            here[0].set_ylabel(panel.title, fontweight="bold")
            for axis, title in zip(here, columns, strict=True):
                axis.set(xlim=(-panel.reach, panel.reach), ylim=(-panel.reach, panel.reach), xticks=[], yticks=[])
                axis.set_aspect("equal")
                axis.spines[:].set_visible(False)
                if row == 0:
                    axis.set_title(title)
        n = max(min(len(x), SHOWN) for panel in panels for x in panel.draws.values())
        reaches = ", ".join(f"{panel.title} ±{panel.reach:g}" for panel in panels)
        footer(figure, f"At most {n:,} draws in a panel. Axes reach {reaches}.\n{note}")
    return figure


@torch.no_grad()
def _density(axis: Axes, panel: PlanePanel, alpha: float) -> None:
    """exp(-U), white where it is nothing; its fourth root is shown, so that wide modes are seen beside narrow ones."""
    line = (torch.arange(CELLS, dtype=torch.float64) + 0.5) * (2.0 * panel.reach / CELLS) - panel.reach
    u = panel.target(torch.cartesian_prod(line, line)).double()
    picture = torch.exp(-0.25 * (u - u.min())).reshape(CELLS, CELLS).T.numpy()
    extent = (-panel.reach, panel.reach, -panel.reach, panel.reach)
    axis.imshow(picture, origin="lower", extent=extent, cmap="Blues", vmin=0.0, vmax=1.1, alpha=alpha)


def bound_figure(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], log_z: Mapping[str, float] | None = None, *, note: str = ""
) -> Figure:  # fmt: skip
    """The bound of the relative entropy against steps of training.

    Args:
        histories: rows of training by target, each with step, bound (less ln Z) and heat.
        log_z: exact ones; their targets' bounds are shown with ln Z added, which is then at least zero.
        note: small print.
    """
    import matplotlib

    known = log_z or {}
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = new_figure(1, 1, width=5.4, height=3.2)
        colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, len(histories)))
        for colour, line, (name, rows) in zip(colours, itertools.cycle(LINES), histories.items(), strict=False):
            # a row is a mean over the steps since the one before, which may have been hotter
            cold = [row for before, row in itertools.pairwise(rows) if before["heat"] == 1.0]
            steps, bound = ([row[key] for row in cold] for key in ("step", "bound"))
            style = {"color": colour, "linestyle": line, "linewidth": 1.4, "label": name}
            if len(cold) < FEW:
                style["marker"] = "o"
            axis.plot(steps, np.array(bound) + known.get(name, 0.0), **style)
        if set(known) >= set(histories):
            axis.axhline(0.0, color=INK, linewidth=0.7)
            axis.set_ylabel("bound of KL(model || target) [nat]")
        else:
            axis.set_ylabel("bound less ln Z [nat]")
        if not any(line.get_xdata().size for line in axis.lines if line.get_label() in histories):
            axis.text(0.5, 0.5, "too few steps to show", transform=axis.transAxes, color="#777777", ha="center")
        axis.set_xlabel("step, once the target is at its own temperature")
        axis.legend(ncols=2)
        footer(figure, note or " ")
    return figure


def log_z_figure(rows: Sequence[Mapping[str, float]], *, note: str = "") -> Figure:
    """Estimates and bounds of ln Z less the exact one, against temperature.

    Args:
        rows: each with temperature, exact, estimate, error (standard error of the estimate) and bound [nat].
        note: small print.
    """
    import matplotlib

    ordered = sorted(rows, key=lambda row: row["temperature"])
    temperatures = [row["temperature"] for row in ordered]
    exact = np.array([row["exact"] for row in ordered])
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = new_figure(1, 1, width=5.0, height=3.0)
        axis.axhline(0.0, color=GREEN, linewidth=1.0, label="exact")
        for name, (colour, marker) in LOOKS.items():
            values = np.array([row[name] for row in ordered]) - exact
            bars = [row["error"] for row in ordered] if name == "estimate" else None
            axis.errorbar(
                temperatures, values, yerr=bars, color=colour, marker=marker, markersize=4, linewidth=1.2, label=name
            )
        axis.set(xlabel="temperature", ylabel="ln Z less the exact one [nat]")
        axis.legend()
        footer(figure, note or " ")
    return figure
