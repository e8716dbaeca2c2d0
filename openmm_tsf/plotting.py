"""Figures: Ramachandran maps, phi marginals, energies, training curves, observables against temperature.

Each function gives a `matplotlib.figure.Figure` that belongs to nobody: no pyplot, no global state, no display.
Colours are those of Okabe and Ito, which colour-blind readers can tell apart; line styles differ as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .analysis import N_BINS
from .canvas import STYLE, footer, from_zero, new_figure, png, save, small_print, versions
from .ensemble import LEAST_ESS, Ensemble
from .reference import Reference, ReferenceState
from .series import ENERGY_BINS, Histogram, Series, of_ensemble, of_frames, of_reference
from .torsions import ALPHA_LEFT
from .units import kT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "energies",
    "figures",
    "observables_figure",
    "phi_marginals",
    "png",
    "ramachandran",
    "reference_value",
    "save",
    "small_print",
    "training_curves",
    "versions",
]

LOOKS: Mapping[str, dict[str, Any]] = {
    "data": {"color": "#8c8c8c", "linewidth": 1.0, "linestyle": "-"},
    "raw": {"color": "#d55e00", "linewidth": 1.2, "linestyle": "-"},
    "reweighted": {"color": "#0072b2", "linewidth": 1.7, "linestyle": "-"},
    "reference": {"color": "#000000", "linewidth": 1.1, "linestyle": (0, (4, 2))},
}
GREEN, BLUE, ORANGE, PURPLE = "#009e73", "#0072b2", "#d55e00", "#cc79a7"
ALPHA_L = r"$\alpha_\mathrm{L}$"
QUANTITIES = {
    "mean_energy": ("⟨U⟩ [kJ/mol]", "Mean potential energy", 1.0),
    "heat_capacity": ("C [J/mol/K]", "Heat capacity of the potential energy", 1000.0),
    "alpha_left_free_energy_kt": (rf"$-\ln\,p$({ALPHA_L}) [kT]", f"Free energy of {ALPHA_L}", 1.0),
}
"""Axis label, title and factor to the axis' unit of each observable."""
DEEPEST = 12.0
"""Most kT on the colour scale of a Ramachandran map."""


def figures(
    train: Ensemble,
    target: Ensemble,
    topology: Any,
    *,
    frames: np.ndarray | None = None,
    frame_energies: np.ndarray | None = None,
    reference: Reference | None = None,
    history: Sequence[Mapping[str, Any]] | None = None,
    observables: Sequence[Mapping[str, float]] | None = None,
    model: str = "Flow",
    seed: int = 0,
) -> dict[str, Figure]:
    """Every figure of a run that can be drawn, by name: ramachandran, phi, energies, training, observables.

    Args:
        train: draws weighed at the training temperature; `target`: draws weighed at the temperature wanted. Where both
            are the same ensemble, it is shown once.
        topology: as in `analysis.backbone`; without phi and psi the maps and marginals are left out.
        frames: (N, A, 3) [nm] of the dynamics at the training temperature.
        frame_energies: (M,) [kJ/mol] of any sample of these frames.
        reference: shown where it has the temperatures.
        history: rows of training; `observables`: rows of `analysis.observables_against_temperature`.
        model: name of what drew them.
        seed: of the draws, for the small print.
    """
    note = small_print(seed)
    ensembles = [train] if target is train else [train, target]
    exact = [of_reference(reference, ensemble.temperature) for ensemble in ensembles]
    groups: list[list[Series]] = [
        [*of_ensemble(ensemble, topology, name=model), *([known] if known else [])]
        for ensemble, known in zip(ensembles, exact, strict=True)
    ]
    raw, cold = groups[0][0], groups[-1]
    data = [] if frames is None else [of_frames(frames, train.temperature, topology, frame_energies)]
    groups[0] = data + groups[0]
    drawn: dict[str, Figure] = {}
    if raw.ramachandran is not None:
        drawn["ramachandran"] = ramachandran([*data, *([] if target is train else [raw]), *cold], note=note)
        drawn["phi"] = phi_marginals(groups, note=note)
    drawn["energies"] = energies(groups, note=note)
    if history:
        drawn["training"] = training_curves(history, note=note)
    if observables:
        drawn["observables"] = observables_figure(observables, reference=reference, note=note)
    return drawn


def ramachandran(panels: Sequence[Series], *, note: str = "") -> Figure:
    """Free energies -ln p [kT] over phi and psi side by side, on one colour scale.

    Zero is the fullest cell of all panels, so equal colours are equal probabilities; the scale ends where the largest
    sample has a single draw in a cell. Empty cells and those beyond the scale are blank.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(1, len(panels), width=2.45 + 0.9 / len(panels), height=2.95)
        highest = max(series.ramachandran.max() for series in panels)
        finest = max(series.n for series in panels if series.kind != "reference" or len(panels) == 1)
        top = max(1.0, min(DEEPEST, math.ceil(math.log(highest * finest))))
        for axis, series in zip(axes, panels, strict=True):
            image = _map(axis, series, highest, top)
        for axis in axes[1:]:
            axis.set_yticklabels([])
        axes[0].set_ylabel("ψ [degrees]")
        bar = figure.colorbar(image, ax=list(axes), shrink=0.9, pad=0.012, aspect=24)
        bar.set_label(r"free energy, $-\ln\,p$ [kT]")
        bar.outline.set_linewidth(0.6)
        scale = "zero: fullest cell of all; blank: empty or beyond the scale"
        footer(figure, f"{N_BINS} by {N_BINS} bins; {scale}; dashed: {ALPHA_L}. {note}")
    return figure


def phi_marginals(groups: Sequence[Sequence[Series]], *, note: str = "") -> Figure:
    """Densities of phi on a logarithmic scale, one panel a group; bands are one standard error."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(1, len(groups), width=4.6, height=3.3)
        for axis, group in zip(axes, groups, strict=True):
            axis.axvspan(*np.degrees(ALPHA_LEFT), color="#f0e442", alpha=0.18, linewidth=0)
            axis.text(np.degrees(ALPHA_LEFT[1]) / 2, 1.01, ALPHA_L, transform=axis.get_xaxis_transform(), ha="center")
            for series in group:
                _line(axis, series, series.phi)
            axis.set_yscale("log")
            axis.set(xlabel="φ [degrees]", xlim=(-180, 180), xticks=range(-180, 181, 60), title=_temperatures(group))
            _floor(axis, [series.phi for series in group])
            axis.legend(loc="upper right")
        axes[0].set_ylabel("density [1/degree]")
        footer(figure, f"{N_BINS} bins; bands: one standard error; shaded: 0 < φ < 2.4 rad. {note}")
    return figure


def energies(groups: Sequence[Sequence[Series]], *, note: str = "") -> Figure:
    """Densities of the potential energy, one panel a group; bands are one standard error."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(1, len(groups), width=4.6, height=3.3)
        for axis, group in zip(axes, groups, strict=True):
            shown = [series for series in group if series.energy is not None]
            for series in shown:
                _line(axis, series, series.energy)
            low = min(series.energy.edges[0] for series in shown)
            axis.set(xlabel="potential energy [kJ/mol]", title=_temperatures(group))
            axis.set_xlim(low, max(series.energy.edges[-1] for series in shown))
            axis.set_ylim(0, 1.45 * max(series.energy.density.max() for series in shown))  # room for the legend
            axis.legend(loc="upper right")
        axes[0].set_ylabel("density [mol/kJ]")
        footer(figure, f"{ENERGY_BINS} bins (reference: its own); bands: one standard error. {note}")
    return figure


def training_curves(history: Sequence[Mapping[str, Any]], *, note: str = "") -> Figure:
    """Losses, ESS and learning rate against the training step.

    Args:
        history: rows with `step` and any of loss, held_out_nll, energy_loss [nat], ess_train (a share), learning_rate;
            a row may lack a key or hold None there.
        note: small print.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(2, 2, width=4.6, height=2.5)
        likelihood, energy, ess, rate = axes
        _curve(likelihood, history, "loss", "training frames", color=BLUE)
        _curve(likelihood, history, "held_out_nll", "held-out frames", color=ORANGE, marker=True)
        _robust_limits(likelihood, history, ("loss", "held_out_nll"))
        likelihood.set(ylabel=r"$-\ln\,q$ [nat]", title="Likelihood loss")
        _curve(energy, history, "energy_loss", "draws at the training temperature", color=GREEN)
        _robust_limits(energy, history, ("energy_loss",))
        energy.set(ylabel="energy loss [nat]", title="Energy loss")
        _curve(ess, history, "ess_train", "ESS", color=PURPLE, marker=True, scale=100.0)
        ess.set(ylabel="ESS [%]", title="Effective sample size at the training temperature", xlabel="step")
        from_zero(ess)
        _curve(rate, history, "learning_rate", "learning rate", color="#000000")
        rate.set(ylabel="learning rate", title="Learning rate", xlabel="step")
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
        likelihood.legend()
        last = max(row["step"] for row in history)
        for axis in axes:
            axis.set_xlim(-0.02 * last, 1.02 * last)
            if not axis.lines:
                axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, color="#777777", ha="center")
        footer(figure, f"{len(history)} records up to step {last}. {note}")
    return figure


def observables_figure(
    rows: Sequence[Mapping[str, float]], *, reference: Reference | None = None, note: str = ""
) -> Figure:
    """Mean energy, heat capacity, free energy of alpha_L and ESS against temperature, the reference beside them.

    Temperatures with an ESS below 1 % are left out of the first three: their error bars cannot be trusted either.
    """
    import matplotlib

    trusted = [row for row in rows if row["ess"] >= LEAST_ESS]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(2, 2, width=4.6, height=2.5)
        for axis, (name, (label, title, scale)) in zip(axes, QUANTITIES.items(), strict=False):
            _points(axis, trusted, name, reference, scale)
            axis.set(ylabel=label, title=title)
        axes[0].legend(loc="upper left")
        ess = [100.0 * row["ess"] for row in rows]
        axes[3].plot([row["temperature"] for row in rows], ess, "o-", color=PURPLE, markersize=3.5, linewidth=1.2)
        axes[3].set(ylabel="ESS [%]", title="Effective sample size")
        from_zero(axes[3])
        for axis in axes:
            axis.set(xlabel="temperature [K]" if axis in axes[2:] else "", xlim=_padded(rows))
        omitted = f"; {len(rows) - len(trusted)} with ESS below 1 % left out" if len(trusted) < len(rows) else ""
        footer(figure, f"{len(rows)} temperatures{omitted}; bars: one bootstrap standard error. {note}")
    return figure


def _padded(rows: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    temperature = [row["temperature"] for row in rows]
    pad = 0.04 * (max(temperature) - min(temperature)) + 1.0
    return min(temperature) - pad, max(temperature) + pad


def _map(axis: Axes, series: Series, highest: float, top: float) -> Any:
    with np.errstate(divide="ignore"):
        depth = -np.log(series.ramachandran / highest)
    depth = np.ma.masked_greater(np.ma.masked_invalid(depth.T), top)
    image = axis.imshow(
        depth, origin="lower", extent=(-180, 180, -180, 180), cmap="viridis", vmin=0, vmax=top, interpolation="nearest"
    )
    for bound in np.degrees(ALPHA_LEFT):
        axis.axvline(bound, color="#666666", linewidth=0.6, linestyle=(0, (4, 3)))
    ticks = range(-180, 181, 90)
    axis.set(xticks=ticks, yticks=ticks, xlabel="φ [degrees]", aspect="equal")
    axis.spines[["top", "right"]].set_visible(True)
    axis.set_title(f"{series.label}, {series.temperature:g} K", pad=17)
    axis.text(0, 1.03, _sizes(series, series.n), transform=axis.transAxes, fontsize=8.5, color="#444444")
    return image


def _sizes(series: Series, n: int) -> str:
    count = f"{n:,}".replace(",", "\u2009")
    if series.kind == "reference":
        return rf"$n_\mathrm{{eff}}$ = {count}"
    return f"n = {count}" + ("" if series.ess is None else f", ESS {100 * series.ess:.1f} %")


def _line(axis: Axes, series: Series, values: Histogram) -> None:
    style = LOOKS[series.kind]
    label = f"{series.label} ({_sizes(series, values.n)})"
    if values.off_scale > 0.005:
        label += f", {100 * values.off_scale:.1f} % off scale"
    if series.kind == "data":
        axis.stairs(values.density, values.edges, fill=True, color="#cccccc", linewidth=0, label=label, zorder=1)
        return
    order = 4 if series.kind == "reference" else 3
    axis.stairs(values.density, values.edges, baseline=None, label=label, zorder=order, **style)
    if series.kind == "reweighted":
        low, high = values.density - values.error, values.density + values.error
        axis.stairs(
            high, values.edges, baseline=low, fill=True, color=style["color"], alpha=0.25, linewidth=0, zorder=2
        )


def _temperatures(group: Sequence[Series]) -> str:
    last = max(group, key=lambda series: series.kind == "reweighted")
    return f"{last.temperature:g} K"


def _floor(axis: Axes, histograms: Sequence[Histogram]) -> None:
    smallest = min(float(values.density[values.density > 0].min()) for values in histograms)
    largest = max(float(values.density.max()) for values in histograms)
    lowest = max(smallest / 2, largest * 1e-7)
    axis.set_ylim(lowest, largest * max(30.0, (largest / lowest) ** 0.45))  # room for the legend, a third of the axis


def _column(history: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row["step"], row[name]) for row in history if row.get(name) is not None]
    steps, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    kept = np.isfinite(values)
    return steps[kept], values[kept]


def _curve(
    axis: Axes,
    history: Sequence[Mapping[str, Any]],
    name: str,
    label: str,
    *,
    color: str,
    marker: bool = False,
    scale: float = 1.0,
) -> None:
    steps, values = _column(history, name)
    if len(values) == 0:
        return
    few = marker and len(values) <= 60
    axis.plot(steps, scale * values, color=color, linewidth=1.2, marker="o" if few else None, markersize=3, label=label)


def _robust_limits(axis: Axes, history: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Limits that the first few, huge values do not set."""
    values = np.concatenate([_column(history, name)[1] for name in names])
    if len(values) > 20:
        low, high = values.min(), max(np.quantile(values, 0.97), values.min() + 1e-3)
        axis.set_ylim(low - 0.06 * (high - low), high + 0.15 * (high - low))


def _points(
    axis: Axes, rows: Sequence[Mapping[str, float]], name: str, reference: Reference | None, scale: float
) -> None:
    style = {"markersize": 3.5, "linewidth": 1.2, "capsize": 2, "color": BLUE}
    points = [(row["temperature"], scale * row[name], scale * row[f"{name}_error"]) for row in rows]
    _errorbar(axis, points, fmt="o-", label="flow, reweighted", **style)
    states = () if reference is None else reference.states
    exact = [(state.temperature, *(scale * x for x in reference_value(state, name))) for state in states]
    style = {"markersize": 5, "capsize": 2, "color": "#000000", "markerfacecolor": "none"}
    _errorbar(axis, exact, fmt="D", label="reference", zorder=4, **style)


def _errorbar(axis: Axes, points: Sequence[tuple[float, float, float]], **style: Any) -> None:
    finite = [point for point in points if all(map(math.isfinite, point))]
    if finite:
        axis.errorbar(*np.transpose(finite), **style)


def reference_value(state: ReferenceState, name: str) -> tuple[float, float]:
    """A quantity of `QUANTITIES` and its standard error at one temperature of the reference, in the unit of rows."""
    if name == "heat_capacity":
        factor = 1.0 / (kT(state.temperature) * state.temperature)
        return factor * state.energy_variance, factor * state.energy_variance_error
    if name == "alpha_left_free_energy_kt":
        return -math.log(state.alpha_left), state.alpha_left_error / state.alpha_left
    return state.mean_energy, state.mean_energy_error
