"""The paper figures are drawn on: style, layout, the small print at the foot, and files."""

from __future__ import annotations

import io
import os
import textwrap
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import numpy as np

from . import __version__
from .files import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PACKAGES = ("torch", "openmm", "mdtraj", "numpy")
FOOT, LINE = 0.24, 0.115
"""Height of one line of small print, and of each further one [inch]."""
MARGIN, MOST_PER_INCH = 0.008, 27.0
"""Beside the small print, a share of the width; and more of its letters than fit into an inch."""
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "mathtext.fontset": "dejavusans",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def new_figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of rows x columns panels of this size [inch], and its axes row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows + FOOT), layout="constrained")
    return figure, list(np.ravel(figure.subplots(rows, columns, squeeze=False)))


def from_zero(axis: Axes) -> None:
    """Let the y axis begin at 0 and end a little above what has been drawn."""
    axis.update_datalim([(0.0, 0.0)], updatex=False)
    axis.autoscale_view(scalex=False)
    axis.set_ylim(bottom=0.0)


def footer(figure: Figure, text: str) -> None:
    """Put the small print at the foot, below everything else; a figure too narrow for one line grows taller."""
    style = {"fontsize": 6.3, "color": "#666666", "ha": "left", "va": "bottom", "linespacing": 1.25}
    foot, (width, inches) = figure.text(MARGIN, 0.0, "", **style), figure.get_size_inches()
    for letters in range(round(MOST_PER_INCH * width), 20, -2):
        rule = {"width": letters, "break_long_words": False, "break_on_hyphens": False}
        lines = [line for part in text.strip().splitlines() for line in textwrap.wrap(part, **rule)]
        foot.set_text("\n".join(lines))
        if foot.get_window_extent().x1 <= (1.0 - MARGIN) * figure.bbox.x1:
            break
    more = LINE * max(0, len(lines) - 1)
    inches += more
    figure.set_size_inches(width, inches)
    figure.get_layout_engine().set(rect=(0, (FOOT + more) / inches, 1, 1 - (FOOT + more) / inches))
    foot.set_y(0.07 / inches)


def versions(*more: str) -> dict[str, str]:
    """Versions of this package, of those that its figures depend on, and of `more` packages."""
    found = {"openmm-tsf": __version__}
    for name in (*PACKAGES, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def small_print(seed: int, *more: str) -> str:
    """Seed and versions, those of `more` packages too, for the foot of a figure."""
    return f"Seed {seed}; " + ", ".join(f"{name} {number}" for name, number in versions(*more).items()) + "."


def save(figure: Figure, path: str | os.PathLike, *, dpi: int = 200) -> None:
    """Write a figure in the format that the path's ending says, whole or not at all."""
    with whole(path) as temporary:
        figure.savefig(temporary, dpi=dpi)


def png(figure: Figure, *, dpi: int = 160) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
