"""Figures of tuning: divergences against sampling temperature, t* against data, the phase picture, levels.

What the figures of arXiv 2512.09152 show, for the small systems of `openmm_tsf.tuning` or for any model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .canvas import STYLE, footer, new_figure
from .plotting import BLUE, GREEN, ORANGE, PURPLE
from .tuning import LevelDecomposition, OptimalTemperature
from .tuning.replicates import CRITICAL, IsingReplicates
from .tuning.two_level import PhasePicture, TwoLevel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = ((BLUE, "o", "-"), (ORANGE, "s", (0, (5, 2))), (GREEN, "^", (0, (3, 1, 1, 1))), (PURPLE, "D", (0, (1, 1))))
"""Colour, marker and line of the first, second ... curve."""
DIRECTIONS: Mapping[str, dict[str, Any]] = {
    "fidelity": {"label": "KL(q$_t$ || p)", "color": BLUE, "linestyle": "-"},
    "diversity": {"label": "KL(p || q$_t$)", "color": ORANGE, "linestyle": (0, (5, 2))},
}
SHOWN = 3.0
"""Colours of t* end at 1/SHOWN and at SHOWN."""
LOWEST, HIGHEST = 0.4, 6.0
"""Axes of t* end here; lines and bands go on beyond."""
GREY = "#999999"
HELPS = {"facecolor": GREEN, "label": "cooling helps"}
HARMS = {"facecolor": ORANGE, "hatch": "///", "edgecolor": "white", "label": "cooling harms"}


def divergence_figure(curves: Mapping[str, OptimalTemperature], *, columns: int = 2, note: str = "") -> Figure:
    """Both divergences against sampling temperature, with t* and t' where they exist.

    Args:
        curves: what `optimal_sampling_temperature` gave, by the title of its panel; temperatures that are not trusted
            are left out.
        columns: panels in a row.
        note: small print.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        columns = min(columns, len(curves))
        figure, axes = new_figure(-(-len(curves) // columns), columns, width=3.5, height=2.6)
        for axis, (title, best) in zip(axes, curves.items(), strict=False):
            _divergences(axis, best)
            roots = ((name, getattr(best, root)) for name, root in (("t*", "t_star"), ("t'", "t_prime")))
            found = ", ".join(f"{name} = {root.value:.2f}" if root else f"no {name}" for name, root in roots)
            axis.set_title(f"{title}\n{found}")
        for axis in axes[len(curves) :]:
            axis.remove()
        for axis in axes[max(len(curves) - columns, 0) : len(curves)]:
            axis.set_xlabel("sampling temperature t")
        for axis in axes[::columns]:
            axis.set_ylabel("divergence [nat]")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
        footer(figure, f"Points: t* on the solid line, t' on the broken one. The model as trained is at t = 1.\n{note}")
    return figure


def _divergences(axis: Axes, best: OptimalTemperature) -> None:
    """One panel: the curves near 1 and near their minima."""
    t, trusted = best.temperatures.numpy(), best.trusted.numpy()
    lowest = 0.0
    for (name, style), root in zip(DIRECTIONS.items(), (best.t_star, best.t_prime), strict=True):
        curve = np.where(trusted, getattr(best, name).numpy(), np.nan)
        axis.plot(t, curve, linewidth=1.5, **style)
        lowest = max(lowest, *(float(np.interp(x, t, curve)) for x in (1.0, 0.7, 1.6)))
        if root:
            axis.plot(root.value, np.interp(root.value, t, curve), "o", color=style["color"], markersize=5)
    axis.axvline(1.0, color=GREY, linewidth=0.7, zorder=0)
    axis.set_xscale("log")
    _plain_ticks(axis, [0.3, 0.5, 1.0, 2.0, 3.0], "x")
    axis.set_xlim(0.3, 3.3)
    axis.set_ylim(0.0, 1.3 * lowest)


def size_figure(picture: PhasePicture, *, note: str = "") -> Figure:
    """t* against the number of samples, for several gaps: medians, and bands from quartile to quartile."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, (axis,) = new_figure(1, 1, width=5.2, height=3.2)
        for row, gap in enumerate(picture.gaps):
            colour, marker, line = SERIES[row % len(SERIES)]
            low, high = picture.spread[row].clamp(LOWEST / 2.0, 2.0 * HIGHEST).T.numpy()
            axis.fill_between(picture.sizes, low, high, color=colour, alpha=0.18, linewidth=0)
            median = picture.median[row].clamp(LOWEST / 2.0, 2.0 * HIGHEST).numpy()
            axis.plot(
                picture.sizes, median, color=colour, linestyle=line, marker=marker, markersize=3.5, label=f"{gap:g}"
            )
        _temperature_axis(axis)
        axis.set(xlabel="number of samples M", ylabel="t*", xscale="log")
        axis.legend(title="gap / T", loc="upper right")
        footer(figure, f"Medians, and bands from the lower to the upper quartile of replicates.\n{note}")
    return figure


def phase_figure(picture: PhasePicture, n_ground: int, n_excited: int, *, note: str = "") -> Figure:
    """Where to cool, to keep and to heat: t* over the number of samples and the gap, with the boundaries of theory.

    Args:
        picture: of gaps and sizes that ascend.
        n_ground, n_excited: of its states.
        note: small print.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, (axis,) = new_figure(1, 1, width=5.8, height=3.9)
        scale = {"cmap": "RdBu_r", "vmin": -math.log(SHOWN), "vmax": math.log(SHOWN)}
        colours = picture.median.clamp(1.0 / SHOWN, SHOWN).log().numpy()
        mesh = axis.pcolormesh(picture.sizes, picture.gaps, colours, shading="nearest", rasterized=True, **scale)
        bar = figure.colorbar(mesh, ax=axis, pad=0.02, aspect=28)
        ticks = [1.0 / SHOWN, 0.5, 0.7, 1.0, 1.4, 2.0, SHOWN]
        bar.set_ticks([math.log(t) for t in ticks], labels=[f"{t:.2g}" for t in ticks])
        bar.set_label("median t*")
        bar.outline.set_linewidth(0.6)
        _boundaries(axis, picture, n_ground, n_excited)
        axis.set(xlabel="number of samples M", ylabel="gap / T", xscale="log")
        _names(axis, picture)
        text = (
            f"{n_ground} ground and {n_excited} excited states. Solid: the larger of M = (n_g/n_e) exp(gap/T) and M = "
            "n_g ln n_g, about where t* settles at 1. Broken: the gap between heating and cooling of a model that has "
            "seen no excited state, ln[(M-1)(N/n_g^-1)]/f_e."
        )
        footer(figure, f"{text}\n{note}")
    return figure


def _boundaries(axis: Axes, picture: PhasePicture, n_ground: int, n_excited: int) -> None:
    """The size from which on t* is 1, and the gap between heating and cooling where it is not."""
    gaps, sizes = np.array(picture.gaps), np.array(picture.sizes)
    settled = np.array([TwoLevel(n_ground, n_excited, gap).settling_size() for gap in gaps])
    axis.plot(settled, gaps, color="black", linewidth=1.4, scalex=False)
    critical, row = [], picture.critical.numpy()
    for column in range(len(sizes)):
        above = np.flatnonzero(gaps > row[:, column])
        critical.append(row[above[0], column] if len(above) else np.nan)
    shown = np.array([math.isfinite(g) and TwoLevel(n_ground, n_excited, g).settling_size() > m
                      for g, m in zip(critical, sizes, strict=True)])  # fmt: skip
    axis.plot(sizes[shown], np.array(critical)[shown], color="black", linewidth=1.3, linestyle=(0, (5, 2)))


def _names(axis: Axes, picture: PhasePicture) -> None:
    """The phases by name, each at the cell of its middle."""
    from matplotlib.patheffects import withStroke

    x, y = np.meshgrid(np.log(picture.sizes), picture.gaps)
    median = picture.median.numpy()
    for name, where in (("cool", median < 0.9), ("heat", median > 1.1), ("keep", np.abs(median - 1.0) < 0.02)):
        if where.any():
            style = {"ha": "center", "va": "center", "weight": "bold", "fontsize": 11}
            style["path_effects"] = [withStroke(linewidth=3.0, foreground="white")]
            axis.text(float(np.exp(np.median(x[where]))), float(np.median(y[where])), name, **style)


def ising_figure(cells: Sequence[IsingReplicates], *, note: str = "") -> Figure:
    """Medians of t* and t' against the number of samples, one column for each temperature, one row for each lattice.

    Data sets without a finite fit stand apart, hollow; a median over fewer than 5 data sets is not drawn.
    """
    import matplotlib

    sides, temperatures = (sorted({getattr(cell, name) for cell in cells}) for name in ("side", "temperature"))
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(len(sides), len(temperatures), width=2.9, height=2.4)
        for axis, (side, temperature) in zip(axes, ((s, t) for s in sides for t in temperatures), strict=True):
            own = sorted((c for c in cells if (c.side, c.temperature) == (side, temperature)), key=lambda c: c.size)
            for (name, symbol), (colour, marker, line) in zip(
                (("t_star", "t*"), ("t_prime", "t'")), SERIES, strict=False
            ):
                for no_fit in (False, True):
                    _medians(axis, own, name, no_fit, {"color": colour, "marker": marker, "linestyle": line}, symbol)
            axis.set_title(f"{side} x {side}, T = {temperature:g} ({temperature / CRITICAL:.2f} T$_c$)")
            _temperature_axis(axis)
            axis.set_xscale("log")
        for axis in axes[-len(temperatures) :]:
            axis.set_xlabel("number of samples M")
        for axis in axes[:: len(temperatures)]:
            axis.set_ylabel("sampling temperature t")
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], color=colour, marker=marker, linestyle=line, markersize=4, label=symbol, **face)
            for (colour, marker, line), name in zip(SERIES, ("t*", "t'"), strict=False)
            for symbol, face in ((name, {}), (f"{name}, no finite fit: pseudocount", {"markerfacecolor": "white"}))
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=4)
        footer(figure, f"Medians over data sets, with 95 % intervals.\n{note}")
    return figure


def _medians(
    axis: Axes, cells: Sequence[IsingReplicates], name: str, no_fit: bool, style: dict[str, Any], symbol: str
) -> None:
    """One curve of medians with their intervals."""
    cells = [cell for cell in cells if int((cell.no_fit == no_fit).sum()) >= 5]
    if not cells:
        return
    rows = np.array([cell.median(name, no_fit=no_fit) for cell in cells]).clip(LOWEST / 2.0, 2.0 * HIGHEST)
    middle, low, high = rows.T
    shift = (0.96 if name == "t_star" else 1.04) * (1.0 if no_fit else 1.02)  # intervals side by side
    face = {"markerfacecolor": "white"} if no_fit else {}
    sizes = shift * np.array([cell.size for cell in cells])
    axis.errorbar(sizes, middle, (middle - low, high - middle), markersize=4, linewidth=1.1, **face, **style)


def levels_figure(
    decompositions: Mapping[str, tuple[LevelDecomposition, LevelDecomposition]], *, note: str = ""
) -> Figure:
    """Shares of the energy levels in the target, in the model as trained and at t*; below, what cooling does to each.

    Args:
        decompositions: by title, of the model at t = 1 and at t*.
        note: small print.
    """
    import matplotlib
    from matplotlib.patches import Patch

    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(2, len(decompositions), width=3.7, height=2.2)
        for column, (title, (one, star)) in enumerate(decompositions.items()):
            above, below = axes[column], axes[len(decompositions) + column]
            _shares(above, one, star)
            above.set_title(f"{title} (t* = {star.t:.2f})")
            _changes(below, one)
            x, labels = np.arange(len(one.energy)), (one.energy - one.energy[0]).tolist()
            every = -(-len(x) // 7)
            for axis in (above, below):
                axis.set_xticks(x[::every], labels=[f"{label:.3g}" for label in labels[::every]])
            below.set_xlabel("energy above the lowest level / T")
        axes[0].set_ylabel("share of the level")
        axes[len(decompositions)].set_ylabel("-d ln q$_t$/dt at t = 1")
        handles, _ = axes[0].get_legend_handles_labels()
        handles += [Patch(**HELPS), Patch(**HARMS)]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
        footer(
            figure, f"Levels from the lowest up, not to scale; bars below: how fast a level grows as t falls.\n{note}"
        )
    return figure


def _shares(axis: Axes, one: LevelDecomposition, star: LevelDecomposition) -> None:
    """Shares of the levels, side by side."""
    x = np.arange(len(one.energy))
    axis.bar(x, one.target.numpy(), width=0.8, color="#cccccc", label="target")
    axis.plot(x - 0.15, one.model, "o", color=ORANGE, markersize=5, label="model, t = 1")
    axis.plot(x + 0.15, star.model, "D", color=BLUE, markersize=4, label="model, t*")
    lowest = min(float(values[values > 0].min()) for values in (one.target, one.model, star.model))
    axis.set(yscale="log", ylim=(max(0.4 * lowest, 1e-6), 1.5))


def _changes(axis: Axes, one: LevelDecomposition) -> None:
    """What cooling does to each level, and whether that is what it needs."""
    x, change, helped = np.arange(len(one.energy)), -one.slope.numpy(), one.helped_by_cooling.numpy()
    for where, style in ((helped, HELPS), (~helped, HARMS)):
        axis.bar(x[where], change[where], width=0.8, **style)
    axis.axhline(0.0, color="black", linewidth=0.8)


def _temperature_axis(axis: Axes) -> None:
    """Logarithmic from LOWEST to HIGHEST, with a line at 1."""
    axis.axhline(1.0, color=GREY, linewidth=0.7, zorder=0)
    axis.set_yscale("log")
    _plain_ticks(axis, [0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0], "y")
    axis.set_ylim(LOWEST, HIGHEST)


def _plain_ticks(axis: Axes, ticks: Sequence[float], which: str) -> None:
    """These ticks and no others, as plain numbers."""
    from matplotlib.ticker import NullLocator

    own = axis.xaxis if which == "x" else axis.yaxis
    own.set_ticks(ticks, labels=[f"{t:g}" for t in ticks])
    own.set_minor_locator(NullLocator())
