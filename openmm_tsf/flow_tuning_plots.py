"""The figure of a tuning: divergences, K and C, and ESS against the sampling temperature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .canvas import STYLE, footer, from_zero, new_figure
from .plotting import BLUE, GREEN, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def tuning_figure(facts: Mapping[str, Any], *, note: str = "") -> Figure:
    """Three panels against the sampling temperature t, with t* and t' and their intervals marked.

    Args:
        facts: of `FlowTuning.facts`.
        note: small print.
    """
    import matplotlib

    curves = {name: np.array(values, dtype=float) for name, values in facts["curves"].items()}
    t, trusted = curves["temperatures"], curves["trusted"] > 0

    def shown(name: str) -> np.ndarray:
        return np.where(trusted, curves[name], np.nan)

    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(1, 3, width=3.3, height=2.9)
        for name, colour, style, label in (
            ("fidelity", BLUE, "-", r"KL$(q_t\,\Vert\,p)$, fidelity"),
            ("diversity", ORANGE, (0, (5, 2)), r"KL$(p\,\Vert\,q_t)$, diversity"),
        ):
            axes[0].plot(t, shown(name), color=colour, linestyle=style, linewidth=1.5, label=label)
        _from_zero(axes[0], np.concatenate([shown("fidelity"), shown("diversity")]))
        axes[0].set(title="Divergences", ylabel="divergence [nat]")
        axes[1].plot(t, shown("covariance"), color=GREEN, linewidth=1.5, label="K, cooling gains")
        axes[1].plot(
            t, shown("variance"), color="black", linestyle=(0, (5, 2)), linewidth=1.2, label="C, heating gains"
        )
        axes[1].set(title="K = C at t*", ylabel="K, C")
        _ess(axes[2], t, 100.0 * shown("ess"), facts)
        for axis in axes:
            _marks(axis, facts, labelled=axis is axes[2])
            ticks = [x for x in (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0) if t[0] / 1.01 <= x <= 1.01 * t[-1]]
            axis.set(xscale="log", xlabel="sampling temperature t", xlim=(t[0], t[-1]))
            axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axis.minorticks_off()
            axis.legend(loc="best", frameon=True, facecolor="white", edgecolor="none", framealpha=0.9)
        kelvin, share = f"{facts['temperature']:g} K", f"{facts['left_out']:.2%}"
        footer(
            figure,
            f"Flow trained at {facts['training_temperature']:g} K, run at t times {kelvin} and compared with {kelvin}. "
            f"{share} of the draws left out, off the chart or as clashes. {note}",
        )
    return figure


def _from_zero(axis: Axes, values: np.ndarray) -> None:
    """From zero, or below it where estimates are; steep ends are cut off."""
    finite = values[np.isfinite(values)]
    if len(finite):
        low, high = finite.min(), np.quantile(finite, 0.9)
        axis.set_ylim(min(0.0, low) - 0.03 * (high - low), high + 0.05 * (high - low))


def _ess(axis: Axes, t: np.ndarray, ess: np.ndarray, facts: Mapping[str, Any]) -> None:
    axis.plot(t, ess, color="#666666", linewidth=1.5, label="of the search")
    checks = facts["checks"]
    axis.errorbar(
        [check["t"] for check in checks], [100.0 * check["ess"] for check in checks],
        yerr=[200.0 * check["ess_error"] for check in checks],
        color="black", fmt="o", markersize=4, capsize=2, linestyle="none", label="fresh draws",
    )  # fmt: skip
    axis.set(title="Worth of weighted draws", ylabel="ESS [%]")
    from_zero(axis)


def _marks(axis: Axes, facts: Mapping[str, Any], *, labelled: bool) -> None:
    axis.axvline(1.0, color="#999999", linewidth=0.7, zorder=0)
    for name, symbol, colour, style in (("t_star", "t*", BLUE, "-"), ("t_prime", "t'", ORANGE, (0, (5, 2)))):
        if (root := facts[name]) is None:
            continue
        label = f"{symbol} = {root['value']:.3f}" if labelled else None
        if None not in root["interval"]:
            axis.axvspan(*root["interval"], color=colour, alpha=0.18, linewidth=0, zorder=0)
        axis.axvline(root["value"], color=colour, linestyle=style, linewidth=0.9, label=label, zorder=1)
