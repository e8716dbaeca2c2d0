"""The paper figures are drawn on: style, layout, the small print at the foot, and files."""

from __future__ import annotations

import io
import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import numpy as np

from . import __version__
from .files import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PACKAGES = ("torch", "openmm", "mdtraj", "numpy")
FOOT = 0.24
"""Height of the small print [inch]."""
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


def footer(figure: Figure, text: str) -> None:
    """Put the small print at the foot, below everything else."""
    inches = figure.get_size_inches()[1]
    figure.get_layout_engine().set(rect=(0, FOOT / inches, 1, 1 - FOOT / inches))
    figure.text(0.008, 0.07 / inches, text.strip(), fontsize=6.3, color="#666666", ha="left", va="bottom")


def versions() -> dict[str, str]:
    """Versions of this package and of those that its figures depend on."""
    found = {"openmm-tsf": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def small_print(seed: int) -> str:
    """Seed and versions, for the foot of a figure."""
    return f"Seed {seed}; " + ", ".join(f"{name} {number}" for name, number in versions().items()) + "."


def save(figure: Figure, path: str | os.PathLike, *, dpi: int = 200) -> None:
    """Write a figure in the format that the path's ending says, whole or not at all."""
    with whole(path) as temporary:
        figure.savefig(temporary, dpi=dpi)


def png(figure: Figure, *, dpi: int = 160) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
