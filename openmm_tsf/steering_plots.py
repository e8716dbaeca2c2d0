"""Figures of flows of alanine dipeptide trained at 600 K: what figure 3 of arXiv 2108.01590 shows and misses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .analysis import N_BINS
from .canvas import STYLE, footer, new_figure
from .plotting import BLUE, GREEN, ORANGE, PURPLE
from .portraits import Exact, Portrait, Rows, steered_alone
from .steering_study import TEMPERATURES, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOKS: Mapping[str, dict[str, Any]] = {
    "real-nvp": {"label": "real-NVP", "color": ORANGE, "marker": "s"},
    "tsf": {"label": "TSF, Gaussian prior", "color": BLUE, "marker": "o"},
    "no-entropy": {"label": "ours, no entropy", "color": PURPLE, "marker": "v"},
    "entropy": {"label": "ours, entropy", "color": GREEN, "marker": "^"},
}
LINES: Mapping[str, dict[str, Any]] = {
    "drawn": {"color": ORANGE, "linewidth": 1.2},
    "reweighted": {"color": BLUE, "linewidth": 1.2},
    "exchange with the flow": {"color": GREEN, "linewidth": 1.2, "linestyle": (0, (4, 1.5))},
}
COLD, HOT = 300.0, 600.0
DEEPEST = 10.0
"""Free energy [kT] at which Ramachandran maps end."""
SHIFT = 0.012
"""Of points of one temperature apart from each other, a share of the temperature."""
Corrected = Mapping[str, Exact]


def maps_figure(exact: Exact, studies: Sequence[Study], corrected: Corrected, *, note: str = "") -> Figure:
    """Ramachandran maps: as drawn at 600 and 300 K, reweighted, and corrected by exchange, one column a flow.

    Args:
        exact: parallel tempering or a reference, in the first column.
        studies: one of each flow.
        corrected: exchanges with moves of the flows, by name of the flow; may lack some.
        note: small print.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(4, 1 + len(studies), width=2.2, height=2.2)
        grid = np.reshape(axes, (4, -1))
        for row, temperature in ((0, HOT), (1, COLD)):
            image = _map(grid[row, 0], exact.at(temperature))
            grid[row, 0].set_ylabel(f"{temperature:g} K\nψ [degrees]")
        grid[0, 0].set_title(exact.source, pad=16)
        for column, study in zip(grid.T[1:], studies, strict=True):
            column[0].set_title(LOOKS[study.flow]["label"], pad=16)
            for axis, temperature in zip(column, (HOT, COLD), strict=False):
                _map(axis, study.at(temperature))
            _map(column[2], study.at(COLD, weighted=True))
            _map(column[3], corrected[study.flow].at(COLD) if study.flow in corrected else None)
        for axis, what in zip(grid[2:, 1], ("reweighted", "exchange with the flow"), strict=True):
            axis.set_ylabel(f"{COLD:g} K, {what}\nψ [degrees]")
        for axis in grid[2:, 0]:
            axis.set_axis_off()
        for axis in (*grid[1, :1], *grid[3, 1:]):
            axis.set_xlabel("φ [degrees]")
        bar = figure.colorbar(image, ax=list(grid[2:, 0]), location="left", shrink=0.8, aspect=16)
        bar.set_label(r"free energy, $-\ln\,p$ [kT]")
        footer(
            figure,
            f"{N_BINS} by {N_BINS} bins; zero: the fullest cell of each map; blank: empty or beyond the scale. {note}",
        )
    return figure


def histograms_figure(exact: Exact, studies: Sequence[Study], corrected: Corrected, *, note: str = "") -> Figure:
    """Histograms of phi and of the energy at 600 and 300 K, one column a flow; arguments as in `maps_figure`."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(4, len(studies), width=2.75, height=1.95)
        grid = np.reshape(axes, (4, -1))
        for column, study in zip(grid.T, studies, strict=True):
            column[0].set_title(LOOKS[study.flow]["label"])
            for k, temperature in enumerate((HOT, COLD)):
                lines = {"drawn": study.at(temperature), "reweighted": study.at(temperature, weighted=True)}
                if study.flow in corrected:
                    lines["exchange with the flow"] = corrected[study.flow].at(temperature)
                _phi(column[k], exact.at(temperature), exact.source, lines)
                _energy(column[2 + k], exact.at(temperature), lines)
        for row, what in zip(grid, ("φ", "φ", "U", "U"), strict=True):
            row[0].set_ylabel(f"density of {what}")
        for k, temperature in enumerate((HOT, COLD)):
            for axis in (grid[k, -1], grid[2 + k, -1]):
                axis.text(1.02, 0.5, f"{temperature:g} K", transform=axis.transAxes, rotation=270, va="center")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 1 + len(studies)))
        per = f"φ: {N_BINS} bins, density per degree; U: per kJ/mol, around the reweighted mean"
        footer(figure, f"{per}; dotted: φ = 1 rad. {note}")
    return figure


def entropy_figure(exact: Sequence[Exact], studies: Sequence[Study], *, note: str = "") -> Figure:
    """Where the miss comes from: energies and heat capacities against temperature, and the share of phi > 0.

    The share is that of draws as they are, over the exact one: means of seeds with their standard error, the seeds
    behind them. The dashed line is `portraits.steered_alone` of the exact map at 600 K.

    Args:
        exact: of each model, a row of panels each.
        studies: of these models, any flows and seeds.
        note: small print.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(len(exact), 3, width=3.7, height=2.9)
        for k, right in enumerate(exact):
            row, mine = axes[3 * k : 3 * k + 3], [study for study in studies if study.model == right.model]
            _energy_error(row[0], right, mine)
            _heat_capacity(row[1], right, mine)
            _shares(row[2], right, mine)
            row[0].set_title(f"{right.model}: ⟨U⟩, flow less exact")
            row[1].set_title("Heat capacity")
            row[2].set_title("Share of φ > 0, drawn / exact")
            for axis in row:
                axis.set(xlabel="temperature [K]", xlim=(290, 615))
        for axis in (axes[0], axes[2]):
            axis.legend(loc="best", fontsize=7.0)
        seeds = len({study.seed for study in studies})
        what = (
            f"Seeds: {seeds}; lines are means, coloured bands hold all, bars are standard errors; grey: the exact one"
        )
        footer(figure, f"Trained at {HOT:g} K, energies shifted to agree there. {what}. {note}")
    return figure


def _map(axis: Axes, portrait: Portrait | None) -> Any:
    if portrait is None:
        axis.text(0.5, 0.5, "not done", transform=axis.transAxes, ha="center", color="#777777")
        axis.set(xticks=[], yticks=[], aspect="equal")
        return None
    cells = np.array(portrait.ramachandran)
    with np.errstate(divide="ignore"):
        depth = np.ma.masked_greater(-np.log(cells.T / cells.max()), DEEPEST)
    image = axis.imshow(
        depth, origin="lower", extent=(-180, 180, -180, 180), cmap="viridis", vmin=0, vmax=DEEPEST,
        interpolation="nearest",
    )  # fmt: skip
    axis.axvline(0.0, color="#666666", linewidth=0.6, linestyle=(0, (4, 3)))
    ticks = range(-180, 181, 180)
    axis.set(xticks=ticks, yticks=ticks, aspect="equal")
    percent = f"{100 * portrait.positive:.2g}"
    axis.text(0.0, 1.03, f"φ > 0: {percent} %", transform=axis.transAxes, fontsize=8, color="#444444")
    return image


def _phi(axis: Axes, exact: Portrait, source: str, lines: Mapping[str, Portrait]) -> None:
    """Densities of phi, on a logarithmic scale."""
    edges = np.linspace(-180.0, 180.0, N_BINS + 1)
    width, marginals = edges[1] - edges[0], {what: np.sum(p.ramachandran, axis=1) for what, p in lines.items()}
    right = np.sum(exact.ramachandran, axis=1) / width
    axis.set_yscale("log")
    axis.stairs(right, edges, fill=True, color="#cccccc", label=source, baseline=1e-9)
    for what, share in marginals.items():
        axis.stairs(share / width, edges, baseline=None, label=what, **LINES[what])
    axis.axvline(np.degrees(1.0), color="#666666", linewidth=0.8, linestyle=":")
    axis.set(
        xlim=(-180, 180), xticks=range(-180, 181, 90), ylim=(right.max() * 1e-5, right.max() * 5), xlabel="φ [degrees]"
    )


def _energy(axis: Axes, exact: Portrait, lines: Mapping[str, Portrait]) -> None:
    """Densities of the potential energy, over the range of the exact one."""
    axis.stairs(exact.energy_density, exact.energy_edges, fill=True, color="#cccccc")
    for what, portrait in lines.items():
        axis.stairs(portrait.energy_density, portrait.energy_edges, baseline=None, **LINES[what])
    axis.set(xlim=(exact.energy_edges[0], exact.energy_edges[-1]), ylim=(0, 1.4 * max(exact.energy_density)))
    axis.set(xlabel="potential energy [kJ/mol]", yticks=[])


def _energy_error(axis: Axes, exact: Exact, studies: Sequence[Study]) -> None:
    """<U>(T) - <U>(600 K) of flows less that of the exact one."""
    kelvin, mean, error = _columns(exact.rows, "mean_energy")
    axis.fill_between(kelvin, -error, error, color="#cccccc", linewidth=0, label=exact.source)
    for look, curves in _curves(studies):
        found = np.stack([np.interp(kelvin, *_columns(curve, "mean_energy")[:2]) for curve in curves])
        _band(axis, kelvin, found - found[:, -1:] - (mean - mean[-1]), look)
    _limit(axis, -12.0, 12.0)
    axis.set_ylabel("[kJ/mol]")


def _heat_capacity(axis: Axes, exact: Exact, studies: Sequence[Study]) -> None:
    """d<U>/dT of flows, and the exact one."""
    kelvin, value, error = (1000.0 * column for column in _columns(exact.rows, "heat_capacity"))
    axis.fill_between(kelvin / 1000.0, value - error, value + error, color="#cccccc", linewidth=0)
    for look, curves in _curves(studies):
        found = [_columns(curve, "heat_capacity") for curve in curves]
        _band(axis, found[0][0], 1000.0 * np.stack([slope for _, slope, _ in found]), look)
    _limit(axis, 0.9 * value.min(), 1.2 * value.max())
    axis.set_ylabel("[J/mol/K]")


def _shares(axis: Axes, exact: Exact, studies: Sequence[Study]) -> None:
    """Shares of phi > 0 of raw draws, over the exact ones."""
    kelvin, right, error = np.array([(p.temperature, p.positive, p.positive_error) for p in exact.portraits]).T
    if not right.all():
        axis.text(0.5, 0.5, f"{exact.source} was never there", transform=axis.transAxes, ha="center", color="#777777")
        return
    axis.fill_between(kelvin, 1.0 - error / right, 1.0 + error / right, color="#cccccc", linewidth=0)
    steered = [steered_alone(exact.at(HOT), temperature) for temperature in kelvin]
    axis.plot(kelvin, steered / right, color="black", linestyle=(0, (4, 2)), label="φ and ψ steered alone")
    there = np.array([exact.at(temperature).positive for temperature in TEMPERATURES])
    for k, (name, look) in enumerate(LOOKS.items()):
        mine = [study.raw for study in studies if study.flow == name]
        if mine:
            seeds = np.array([[portrait.positive for portrait in raw] for raw in mine]) / there
            alone = np.array([portrait.positive_error for portrait in mine[0]]) / there
            at = np.array(TEMPERATURES) * (1.0 + SHIFT * (k - 1.5))
            spread = seeds.std(0, ddof=1) / len(mine) ** 0.5 if len(mine) > 1 else alone
            axis.plot(at, seeds.T, ".", color=look["color"], markersize=3, alpha=0.5)
            axis.errorbar(at, seeds.mean(0), spread, markersize=4, linewidth=1.0, capsize=2, **look)
    _limit(axis, 0.0, 2.5)


def _limit(axis: Axes, low: float, high: float) -> None:
    """Let a flow that is far off leave the panel, and not flatten the others."""
    bottom, top = axis.get_ylim()
    axis.set_ylim(max(bottom, low), min(top, high))


def _columns(rows: Sequence[Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Temperatures, a quantity and its standard error, 0 where there is none."""
    keys = ("temperature", name, f"{name}_error")
    kelvin, value, error = (np.array([row.get(key, 0.0) for row in rows]) for key in keys)
    return kelvin, value, error


def _curves(studies: Sequence[Study]) -> Iterator[tuple[Mapping[str, Any], list[Rows]]]:
    """The look of each flow that steers, and the energies that its seeds have taken for U."""
    for name, look in LOOKS.items():
        if curves := [study.curve for study in studies if study.flow == name and study.curve]:
            yield look, curves


def _band(axis: Axes, kelvin: np.ndarray, values: np.ndarray, look: Mapping[str, Any]) -> None:
    """Mean of seeds, and a band from the lowest to the highest."""
    axis.fill_between(kelvin, values.min(0), values.max(0), color=look["color"], alpha=0.25, linewidth=0)
    axis.plot(kelvin, values.mean(0), color=look["color"], linewidth=1.3, label=look["label"])
