"""Figures of flows of double wells: nll against temperature, and marginals; what figure 2 of arXiv 2108.01590 shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .canvas import STYLE, footer, new_figure
from .plotting import BLUE, GREEN, ORANGE
from .wells import TemperedSamples
from .wells_study import N_MARGINALS, edges, marginals

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS: Mapping[str, dict[str, Any]] = {
    "real-nvp": {"label": "real-NVP", "color": ORANGE, "linestyle": (0, (5, 2))},
    "tsf": {"label": "TSF, Gaussian prior", "color": BLUE, "linestyle": "-"},
    "anharmonic": {"label": "TSF, quartic prior", "color": GREEN, "linestyle": (0, (3, 1, 1, 1))},
}
LEAST = 1e-4
"""Smallest excess [nat] that is drawn; seeds whose estimate is below, or below zero, are drawn there."""
Studies = Sequence[Mapping[str, Any]]


def nll_figure(studies: Studies, *, note: str = "") -> Figure:
    """nll against temperature, beside that of the exact density, and the difference of the two below.

    Args:
        studies: what `wells_study.study` gave, of any dimensions, kinds and seeds; lines are means over seeds, bands
            reach from the lowest seed to the highest.
        note: small print.
    """
    import matplotlib

    dims = sorted({study["dim"] for study in studies})
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(2, len(dims), width=4.6, height=2.9)
        for column, dim in enumerate(dims):
            above, below = axes[column], axes[len(dims) + column]
            of_dim = [study for study in studies if study["dim"] == dim]
            rows = of_dim[0]["scores"]
            for kind, style in KINDS.items():
                of_kind = [study for study in of_dim if study["kind"] == kind]
                if of_kind:
                    _curve(above, of_kind, "nll", style)
                    _curve(below, of_kind, "excess", style)
            exact = [row["exact"] for row in rows]
            above.plot([row["temperature"] for row in rows], exact, color="black", linewidth=1.0, label="exact")
            room = 0.15 * (max(exact) - min(exact))
            above.set_ylim(min(exact) - room, max(exact) + 5.0 * room)
            above.set(title=f"{dim} dimensions", ylabel="nll [nat]", xscale="log")
            below.set(xlabel="temperature", ylabel="nll beyond the exact one [nat]", xscale="log", yscale="log")
            for axis in (above, below):
                axis.axvline(1.0, color="#999999", linewidth=0.7, zorder=0)
                axis.xaxis.set_major_formatter("{x:g}")
        axes[0].legend(loc="upper left")
        footer(figure, f"Trained at T = 1. {_seeds(studies)}\n{note}")
    return figure


def _curve(axis: Axes, studies: Studies, what: str, style: Mapping[str, Any]) -> None:
    """Mean of the seeds, and a band from the lowest to the highest."""
    temperatures = [row["temperature"] for row in studies[0]["scores"]]
    values = np.array([[row[what] for row in study["scores"]] for study in studies])
    if what == "excess":
        values = values.clip(LEAST)
    axis.fill_between(temperatures, values.min(0), values.max(0), color=style["color"], alpha=0.25, linewidth=0)
    axis.plot(temperatures, values.mean(0), linewidth=1.5, **style)


def _seeds(studies: Studies) -> str:
    sizes = {(study["dim"], study["kind"]): study["n_parameters"] for study in studies}
    listed = ", ".join(f"{kind} in {dim}-d {n:,}" for (dim, kind), n in sorted(sizes.items()))
    n_seeds = len({study["seed"] for study in studies})
    return f"{n_seeds} seeds: means, and bands from the lowest to the highest. Parameters: {listed}."


def marginals_figure(samples: TemperedSamples, studies: Studies, *, note: str = "") -> Figure:
    """Marginals of the first five coordinates at the lowest temperature, at 1 and at the highest.

    Args:
        samples: by parallel tempering; the grey areas.
        studies: of the same system, one of each kind.
        note: small print.
    """
    import matplotlib

    temperatures = [samples.temperatures[0], 1.0, samples.temperatures[-1]]
    columns = min(N_MARGINALS, samples.x.shape[2])
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(len(temperatures), columns, width=2.0, height=1.7)
        for k, temperature in enumerate(temperatures):
            bins = edges(samples, temperature)
            exact = marginals(samples.at(temperature), bins)
            for i in range(columns):
                axis = axes[k * columns + i]
                axis.stairs(exact[i], bins[i], fill=True, color="#cccccc", label="parallel tempering")
                for study in studies:
                    style = KINDS[study["kind"]]
                    axis.stairs(study["marginals"][f"{temperature:g}"][i], bins[i], linewidth=1.0, **style)
                axis.set_ylim(0.0, 1.25 * max(exact[i]))
                axis.set_yticks([])
                if k == 0:
                    axis.set_title(f"$x_{i + 1}$")
                if i == 0:
                    axis.set_ylabel(f"T = {temperature:g}")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
        footer(figure, f"The first {columns} of {samples.x.shape[2]} coordinates; flows trained at T = 1.\n{note}")
    return figure
