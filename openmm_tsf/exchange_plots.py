"""Figures of a replica exchange: acceptance, swaps and paths; Ramachandran maps; observables against temperature.

Like those of `plotting`, each figure belongs to nobody and names at its foot what it was made from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .canvas import FOOT, STYLE, footer
from .flow_steps import STEPS
from .mbar import Samples
from .multistate import frame_weights, move_acceptance, ramachandran, replica_paths, round_trips, swap_acceptance
from .plotting import BLUE, ORANGE, QUANTITIES, reference_value
from .records import ExchangeRecord
from .reference import Reference
from .series import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = dict(zip(STEPS, (BLUE, ORANGE), strict=True))
"""Of the kinds of flow moves."""
N_PATHS = 8
LONGEST_PATH = 300
"""Iterations of a path that can be told apart on the page."""
MOST_NUMBERS = 10
"""Temperatures up to which numbers are written into the panels."""
LEAST_EFFECTIVE = 20.0
"""Effective samples below which a row of observables is left out: its error bar cannot be trusted either."""
OBSERVABLES = QUANTITIES | {
    "alpha_right_free_energy_kt": (
        r"$-\ln\,p$($\alpha_\mathrm{R}$) [kT]",
        r"Free energy of $\alpha_\mathrm{R}$",
        1.0,
    ),
}
MARKS: Mapping[str, dict[str, Any]] = {
    "exchange": {"color": BLUE, "marker": "o", "markersize": 3.2, "linewidth": 1.3, "linestyle": "-"},
    "flow": {"color": ORANGE, "marker": "s", "markersize": 3.4, "linestyle": "none", "markerfacecolor": "none"},
    "reference": {"color": "#000000", "marker": "D", "markersize": 4.6, "linestyle": "none", "markerfacecolor": "none"},
}
LABELS = {"exchange": "exchange, MBAR", "flow": "flow, reweighted", "reference": "reference"}
Rows = Sequence[Mapping[str, float]]


def exchange_figure(record: ExchangeRecord, *, note: str = "") -> Figure:
    """Acceptance of flow moves, accepted swaps of temperatures, and the paths of up to 8 replicas.

    Args:
        record: of any sampler.
        note: small print.
    """
    import matplotlib
    from matplotlib.figure import Figure

    n_paths = min(N_PATHS, record.n_replicas)
    height = 3.1 + 0.7 + 0.3 * n_paths
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, height + FOOT), layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=[3.1, height - 3.1])
        moves, swaps = upper.subplots(1, 2, width_ratios=[1.45, 1.0])
        _moves(moves, record)
        _swaps(swaps, record)
        _paths(lower.subplots(), record, n_paths)
        footer(figure, f"{_counts(record)}\n{note}")
    return figure


def exchange_series(
    record: ExchangeRecord,
    temperature: float | int,
    phi: np.ndarray,
    psi: np.ndarray,
    *,
    n_discard: int = 0,
    n_effective: float | None = None,
    samples: Samples | None = None,
) -> Series:
    """What `plotting.ramachandran` shows of the stored frames, weighed by MBAR for one temperature [K].

    Args:
        phi, psi: (J * R,) [rad] of the stored frames.
        n_discard: iterations left out at the beginning.
        n_effective: independent samples at this temperature, correlation in time included; the ESS shown is at most
            that. By default it is Kish's share of the MBAR weights alone.
        samples: as in `multistate.frame_weights`.
    """
    samples = samples or Samples.of(record, n_discard, 1)
    weights = frame_weights(record, temperature, samples=samples)
    n = int(np.count_nonzero(samples.frame_iterations >= 0)) * record.n_replicas
    effective = float(1.0 / np.sum(weights**2))
    share = min(effective, math.inf if n_effective is None else n_effective) / n
    cells = ramachandran(record, temperature, phi, psi, samples=samples)
    return Series("reweighted", "Exchange, MBAR", float(temperature), n, share, cells, None, None)


def observables_exchange(
    exchange: Rows, flow: Rows = (), *, reference: Reference | None = None, note: str = ""
) -> Figure:
    """Mean energy, heat capacity and basin free energies against temperature, with differences in standard errors.

    The strip below each panel has the flow and the reference minus the exchange, over the error of the difference, at
    the temperatures that they share. Quantities that no row has are left out.

    Args:
        exchange: rows of `multistate.observables`.
        flow: rows with the same keys and `ess`, of reweighted draws.
        reference: shown at its temperatures within the ladder.
        note: small print.
    """
    import matplotlib
    from matplotlib.figure import Figure

    names = [name for name in OBSERVABLES if any(name in row for row in exchange)]
    span = [row["temperature"] for row in exchange]
    sources = {"exchange": _trusted(exchange), "flow": _trusted(flow)}
    sources["reference"] = _reference_rows(reference, names, min(span), max(span))
    rows = math.ceil(len(names) / 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.35 * rows + FOOT), layout="constrained")
        grid = figure.subplots(2 * rows, 2, squeeze=False, height_ratios=[3.0, 1.0] * rows, sharex=True)
        for index, name in enumerate(names):
            above, below = grid[2 * (index // 2) : 2 * (index // 2) + 2, index % 2]
            _values(above, sources, name)
            _differences(below, sources, name)
            below.set_xlabel("temperature [K]" if index >= len(names) - 2 else "")
        pad = 0.03 * (max(span) - min(span)) + 1.0
        grid[0, 0].set_xlim(min(span) - pad, max(span) + pad)
        grid[0, 0].legend(loc="upper left")
        omitted = len(exchange) + len(flow) - len(sources["exchange"]) - len(sources["flow"])
        footer(figure, f"{_worth(sources, omitted)}\n{note}")
    return figure


def _moves(axis: Axes, record: ExchangeRecord) -> None:
    """Bars of accepted flow moves, one group a temperature."""
    shares, n = move_acceptance(record), len(record.temperatures)
    axis.set(title="Flow moves accepted", xlabel="temperature [K]", ylabel="share of proposals [%]")
    axis.set_xticks(range(n), [f"{t:.0f}" for t in record.temperatures], rotation=0 if n <= MOST_NUMBERS else 90)
    axis.set(xlim=(-0.6, n - 0.4), ylim=(0, 100))
    width = min(0.76, 0.2 * n) / max(1, len(shares))
    for index, (kind, share) in enumerate(shares.items()):
        where = np.arange(n) + (index - (len(shares) - 1) / 2) * width
        axis.bar(where, 100 * share, 0.92 * width, color=COLORS[kind], label=kind)
        for x, value in zip(where, 100 * share, strict=True):
            if math.isfinite(value) and n * len(shares) <= 2 * MOST_NUMBERS:
                axis.text(x, value + 1.5, _digits(value), ha="center", va="bottom", fontsize=7, color="#444444")
    if not shares:
        axis.text(0.5, 0.5, "no flow moves", transform=axis.transAxes, color="#777777", ha="center")
        return
    highest = max(np.nanmax(100 * share) for share in shares.values())
    axis.set_ylim(0, min(112.0, 1.12 * highest + 6.0))
    if len(shares) > 1 or n > 1:
        axis.set_ylim(0, axis.get_ylim()[1] * 1.14)  # room for the legend
        axis.legend(loc="upper left", ncols=2)
    axis.set_yticks([tick for tick in axis.get_yticks() if tick <= 100])


def _swaps(axis: Axes, record: ExchangeRecord) -> None:
    """Matrix of accepted swaps, blank where none was proposed."""
    share, n = swap_acceptance(record), len(record.temperatures)
    image = axis.imshow(np.ma.masked_invalid(share), origin="lower", cmap="Blues", vmin=0.0, vmax=1.0)
    every = math.ceil(n / MOST_NUMBERS)
    ticks = range(0, n, every)
    axis.set_xticks(ticks, [f"{record.temperatures[i]:.0f}" for i in ticks], rotation=0 if n <= 6 else 90)
    axis.set_yticks(ticks, [f"{record.temperatures[i]:.0f}" for i in ticks])
    axis.set(title="Swaps accepted [%]", xlabel="temperature [K]", ylabel="temperature [K]")
    axis.spines[["top", "right"]].set_visible(True)
    if n > MOST_NUMBERS:
        axis.figure.colorbar(image, ax=axis, shrink=0.9, format=lambda value, _: f"{100 * value:.0f}")
        return
    for row, column in np.argwhere(np.isfinite(share)):
        value = share[row, column]
        color = "white" if value > 0.65 else "#222222"
        axis.text(column, row, _digits(100 * value), ha="center", va="center", fontsize=7.5, color=color)


def _paths(axis: Axes, record: ExchangeRecord, n_paths: int) -> None:
    """A strip for each replica, from the lowest temperature at its bottom to the highest at its top."""
    paths, n = replica_paths(record, n_paths), record.n_iterations
    first, top = max(0, n - LONGEST_PATH), max(1, len(record.temperatures) - 1)
    edges = np.arange(first, n + 1)
    for index, path in enumerate(paths.T):
        low = paths.shape[1] - 1 - index
        height = low + 0.78 * path[first:] / top
        axis.axhspan(low, low + 0.78, color="#f1f3f5", linewidth=0)
        axis.stairs(height, edges, baseline=low, fill=True, color=BLUE, alpha=0.16, linewidth=0)
        axis.stairs(height, edges, baseline=None, color=BLUE, linewidth=0.9)
    start = [f"{record.temperatures[level]:.0f} K" for level in paths[0]]
    axis.set_yticks([paths.shape[1] - 1 - index + 0.39 for index in range(len(start))], start)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.set(xlim=(first, n), ylim=(-0.1, paths.shape[1] - 0.1), xlabel="iteration", ylabel="began at")
    trips, part = int(round_trips(record).sum()), f"last {n - first} of {_spaced(n)}" if first else f"{_spaced(n)}"
    shown = "" if n_paths == record.n_replicas else f" in all {record.n_replicas} replicas"
    axis.set_title(f"Replica paths, {part} iterations; {_spaced(trips)} round trip{'s' * (trips != 1)}{shown}")


def _counts(record: ExchangeRecord) -> str:
    moves = sum(counts.get(f"{kind}_proposed", 0) for counts in record.move_counts for kind in STEPS)
    swaps = int(np.triu(record.swap_proposed, 1).sum())
    return (
        f"{record.sampler}: {_spaced(record.n_iterations)} iterations of {record.n_replicas} replicas; "
        f"{_spaced(moves)} flow proposals, {_spaced(swaps)} swaps tried (blank: none); strips: lowest temperature at "
        "the bottom, highest at the top."
    )


def _values(axis: Axes, sources: Mapping[str, Rows], name: str) -> None:
    label, title, scale = OBSERVABLES[name]
    for order, (source, rows) in enumerate(sources.items()):
        points = [(row["temperature"], scale * row[name], scale * row[f"{name}_error"]) for row in rows if name in row]
        points = [point for point in points if all(map(math.isfinite, point))]
        if points:
            x, y, error = np.transpose(points)
            axis.errorbar(
                x, y, error, capsize=2, elinewidth=1.0, label=LABELS[source], zorder=3 + order, **MARKS[source]
            )
    if not axis.containers:
        axis.text(0.5, 0.5, "no value with an error bar", transform=axis.transAxes, color="#777777", ha="center")
    axis.set(ylabel=label, title=title)
    axis.tick_params(labelbottom=False)


def _differences(axis: Axes, sources: Mapping[str, Rows], name: str) -> None:
    """(other - exchange) / error of the difference, on at least +- 3."""
    ours = {round(row["temperature"], 1): row for row in sources["exchange"] if name in row}
    largest = 2.5
    for source, rows in list(sources.items())[1:]:
        points = []
        for row in rows:
            base = ours.get(round(row["temperature"], 1))
            if base is not None and name in row:
                error = math.hypot(row[f"{name}_error"], base[f"{name}_error"])
                points.append((row["temperature"], (row[name] - base[name]) / error if error > 0 else math.nan))
        points = [point for point in points if math.isfinite(point[1])]
        if points:
            axis.plot(*np.transpose(points), **MARKS[source])
            largest = max(largest, *(abs(y) for _, y in points))
    axis.axhspan(-1, 1, color="#e9ecef", linewidth=0, zorder=0)
    axis.axhline(0, color=BLUE, linewidth=1.0, zorder=1)
    axis.set(ylim=(-1.2 * largest, 1.2 * largest), ylabel=r"$\Delta\,/\,\sigma$")
    axis.tick_params(labelbottom=True)


def _trusted(rows: Rows) -> list[Mapping[str, float]]:
    return [row for row in rows if row.get("n_effective", math.inf) >= LEAST_EFFECTIVE]


def _reference_rows(
    reference: Reference | None, names: Sequence[str], lowest: float | int, highest: float | int
) -> list[dict[str, float]]:
    """The reference under the keys of the other rows."""
    rows = []
    for state in () if reference is None else reference.states:
        if not lowest - 0.5 <= state.temperature <= highest + 0.5:
            continue
        row = {"temperature": state.temperature}
        for name in names:
            if name in QUANTITIES:
                row[name], row[f"{name}_error"] = reference_value(state, name)
        rows.append(row)
    return rows


def _worth(sources: Mapping[str, Rows], omitted: int) -> str:
    words = []
    for source in ("exchange", "flow"):
        numbers = [row["n_effective"] for row in sources[source] if "n_effective" in row]
        if numbers:
            low, high = (_spaced(round(value)) for value in (min(numbers), max(numbers)))
            words.append(f"{source} {low} to {high} effective samples at {len(numbers)} temperatures")
    if omitted:
        words.append(f"{omitted} rows below {LEAST_EFFECTIVE:g} left out")
    bars = "bars: one standard error (exchange: block jackknife; flow: bootstrap)"
    strips = "strips: difference from the exchange over its standard error, band: within one"
    return f"{'; '.join(words)}; {bars}; {strips}."


def _digits(percent: float | int) -> str:
    return f"{percent:.1f}" if 0 < percent < 10 else f"{percent:.0f}"


def _spaced(number: int) -> str:
    return f"{number:,}".replace(",", "\u2009")
