"""Tables of the comparison in markdown: one for each group of targets, seeds of a method in one row."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
Column = Callable[[list[Row]], str]


def spread(key: str, *, scale: float = 1.0, digits: int = 3, unit: str = "") -> Column:
    """Mean over seeds and their standard deviation."""

    def cell(rows: list[Row]) -> str:
        values = [scale * row[key] for row in rows if row.get(key) is not None]
        if not values:
            return ""
        text = f"{statistics.mean(values):.{digits}f}"
        if len(values) > 1:
            text += f" ± {statistics.stdev(values):.{digits}f}"
        return text + unit

    return cell


def total(*keys: str, scale: float = 1.0, digits: int = 1) -> Column:
    """Mean over seeds of a sum."""
    return lambda rows: f"{scale * statistics.mean(sum(row[key] for key in keys) for row in rows):.{digits}f}"


def modes(rows: list[Row]) -> str:
    """Modes found in each seed, of how many."""
    return f"{' '.join(str(row['modes']) for row in rows)} of {rows[0]['modes_all']}"


def within_floor(rows: list[Row]) -> str:
    """Seeds whose reweighted MMD is within twice that of exact samples, as many as there are draws.

    Fewer effective draws than a fourth of them do not count: MMD^2 of a few draws is mostly noise, and below zero as
    often as above.
    """
    known = [row for row in rows if row.get("mmd_weighted") is not None]
    good = [
        row["mmd_weighted"] <= 2.0 * row["mmd_floor"] and row["n_mmd_effective"] >= row["n_mmd"] / 4.0 for row in known
    ]
    return f"{sum(good)} of {len(rows)}" if known else ""


ESS: dict[str, Column] = {"ESS": spread("ess"), "largest weight": spread("largest_share")}
LOG_Z: dict[str, Column] = {"ln Z less exact": spread("log_z_error"), "exact less bound": spread("bound_gap")}
COST: dict[str, Column] = {
    "CPU minutes": total("seconds_training", "seconds_drawing", scale=1.0 / 60.0),
    "energies, millions": total("evaluations_training", "evaluations_drawing", scale=1e-6, digits=2),
    "seeds": lambda rows: str(len(rows)),
}
COLUMNS: dict[str, dict[str, Column]] = {
    "2d": {
        "modes": modes, "MMD": spread("mmd", digits=4), "exact samples": spread("mmd_floor", digits=4),
        "MMD reweighted": spread("mmd_weighted", digits=4), "within 2 floors": within_floor, **ESS, **LOG_Z, **COST,
    },
    "wells": {
        **ESS, **LOG_Z, "<U>": spread("mean_energy"), "<U> reweighted": spread("mean_energy_weighted"),
        "exact": spread("mean_energy_exact"), **COST,
    },
    "logistic": {
        "accuracy": spread("accuracy", scale=100.0, digits=2, unit=" %"), "exact": spread("accuracy_exact", scale=100.0,
        digits=2, unit=" %"), "AUC": spread("auc", scale=100.0, digits=2, unit=" %"), "exact AUC": spread("auc_exact",
        scale=100.0, digits=2, unit=" %"), "mean, sigma": spread("mean_error"), "covariance":
        spread("covariance_error"), **ESS, **LOG_Z, **COST,
    },
    "lj": {
        **ESS, "ln Z": spread("log_z"), "bound, softened": spread("log_z_bound_softened"), "<u>": spread("mean_energy"),
        "<u> reweighted": spread("mean_energy_weighted"), **COST,
    },
    "ising": {
        "ln Z": spread("log_z_ising", digits=2), "exact": spread("log_z_ising_exact", digits=3),
        "bound": spread("bound_ising", digits=2), "exact less bound": spread("bound_gap", digits=2), "ESS": ESS["ESS"],
        **COST,
    },
    "molecule": {
        **ESS, "excess TV": spread("excess_tv"), "excess TV reweighted": spread("excess_tv_weighted"),
        "off chart": spread("share_off_chart"), "<u> reweighted": spread("mean_energy_weighted", digits=2), **COST,
    },
}  # fmt: skip
TITLES = {
    "2d": "Densities of the plane", "wells": "Double wells", "logistic": "Logistic regression",
    "lj": "Lennard-Jones clusters", "ising": "Ising model, 16 x 16", "molecule": "Alanine dipeptide",
}  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """All tables; runs that failed are listed below theirs."""
    parts = []
    for group, title in TITLES.items():
        mine = [row for row in rows if row["group"] == group]
        if mine:
            parts += [f"## {title}", "", *table([row for row in mine if "error" not in row], COLUMNS[group]), ""]
            failed = [row for row in mine if "error" in row]
            parts += [f"- {r['target']}, {r['method']}, seed {r['seed']} failed: {r['error']}" for r in failed]
            parts += [""] if failed else []
    return "\n".join(parts)


def table(rows: Sequence[Row], columns: dict[str, Column]) -> list[str]:
    """Lines of one table, a row for each target and method; columns that are empty everywhere are left out."""
    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row["target"], row["method"]), []).append(row)
    cells = {name: [column(seeds) for seeds in kinds.values()] for name, column in columns.items()}
    shown = {name: found for name, found in cells.items() if any(found)}
    lines = ["| " + " | ".join(["target", "method", *shown]) + " |", "|" + "---|" * (2 + len(shown))]
    for k, (target, method) in enumerate(kinds):
        lines.append("| " + " | ".join([target, method, *(found[k] for found in shown.values())]) + " |")
    return lines
