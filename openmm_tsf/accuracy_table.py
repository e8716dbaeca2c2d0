"""Records of flows, what they cost and what they are worth, and the table that they make; seeds of a model in a row."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import flow_info, load_flow
from .flow import Flow

Record = dict[str, Any]
STAGES = ("simulate", "train", "refine")
SAME = ("model", "training_temperature_kelvin", "refined_at_kelvin", "n_parameters", "n_frames", "steps")
"""Records that agree in these are seeds of one model."""


def describe(path: Path, model: str | None = None, *, run: Path | None = None) -> tuple[Flow, Record]:
    """The flow of a file, and who it is and what it cost, as far as a run directory tells.

    Args:
        path: of the flow.
        model: its name in the table; by default its kind, and where it was refined.
        run: directory of the run that the flow is of; by default where its file is.

    Raises:
        FileNotFoundError, CheckpointError: as in `load_flow`.
        ValueError: the run knows nothing of a refinement that the flow has had.
    """
    flow, info = load_flow(path), flow_info(path)
    extra = info["extra"]
    refined = extra.get("refined_at", [])
    places = " and ".join(f"{temperature:g}" for temperature in refined)
    name = flow.settings.kind + (f", refined at {places} K" if refined else "")
    facts = {
        "model": model or name,
        "kind": flow.settings.kind,
        "file": str(path.resolve()),
        "sha256": info["sha256"],
        "n_parameters": flow.n_parameters,
        "n_momenta": flow.n_momenta,
        "steers": flow.settings.steers,
        "training_temperature_kelvin": flow.training_temperature,
        "refined_at_kelvin": refined,
        "seed": extra.get("seed"),
        "n_frames": extra.get("n_frames"),
        "steps": None,
        "best_step": extra.get("best_step"),
    }
    return flow, facts | costs(path.parent if run is None else run, refined)


def costs(folder: Path, refinements: Sequence[float]) -> Record:
    """Energy evaluations and seconds of each stage of a run directory; None where there is none.

    Args:
        folder: of the run.
        refinements: temperatures [K] of those that count, their sum is `refine`.

    Raises:
        ValueError: there was no such refinement.
    """
    quantities = ("n_energy_evaluations", "seconds")
    found: Record = {f"{what}_{stage}": None for stage in STAGES for what in quantities}
    if not all((folder / name).is_file() for name in ("stages.json", "config.toml", "history.json")):
        return found
    stages = json.loads((folder / "stages.json").read_text("utf-8"))
    history = json.loads((folder / "history.json").read_text("utf-8"))
    config = tomllib.loads((folder / "config.toml").read_text("utf-8"))  # of whichever version
    missing = [temperature for temperature in refinements if f"refine {temperature:g} K" not in stages]
    if missing:
        raise ValueError(f"{folder} has no refinement at {missing[0]:g} K")
    refined = [stages[f"refine {temperature:g} K"] for temperature in refinements]
    for what in quantities:
        found |= {f"{what}_{stage}": stages.get(stage, {}).get(what) for stage in ("simulate", "train")}
        found[f"{what}_refine"] = sum(record[what] for record in refined) if refined else None
    return found | {
        "seed": config["seed"],
        "n_frames": stages["simulate"]["n_frames"],
        "steps": config["train"]["steps"],
        "best_step": history["best_step"],
    }


def table(records: Sequence[Record]) -> str:
    """Markdown: a table of costs and effective sample sizes, and one of distances for each temperature.

    Numbers of several seeds are their mean ± standard deviation; in brackets, where there are such, the standard error
    of one of them, that of the reference included.
    """
    models: dict[tuple, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r["model"], r["seed"] or 0)):
        models.setdefault(tuple(str(record[name]) for name in SAME), []).append(record)
    kelvin = sorted({record["temperature_kelvin"] for record in records}, reverse=True)
    parts = [_markdown(_cost_columns(kelvin), models)]
    for temperature in kelvin:
        rows = {key: [r for r in mine if r["temperature_kelvin"] == temperature] for key, mine in models.items()}
        there = {key: mine for key, mine in rows.items() if mine}
        parts.append(f"At {temperature:g} K:\n\n" + _markdown(DISTANCES, there))
    return "\n\n".join(parts)


Column = Callable[[list[Record]], str]


def _markdown(columns: dict[str, Column], models: dict[tuple, list[Record]]) -> str:
    lines = ["| model | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for key, records in models.items():
        lines.append(f"| {key[0]} | " + " | ".join(column(records) for column in columns.values()) + " |")
    return "\n".join(lines)


def _cost_columns(kelvin: Sequence[float]) -> dict[str, Column]:
    def ess(temperature: float, name: str) -> Column:
        return lambda records: _cell(
            [r.get(name) for r in records if r["temperature_kelvin"] == temperature], scale=100.0, digits=2, unit=" %"
        )

    columns: dict[str, Column] = {
        "seeds": lambda records: ", ".join(map(str, sorted({r["seed"] for r in records if r["seed"] is not None}))),
        "parameters": lambda records: f"{records[0]['n_parameters']:,}",
        "trained at": lambda records: f"{records[0]['training_temperature_kelvin']:g} K",
        "energies, million: frames / training / refinement": lambda records: _stages(
            records, "n_energy_evaluations", 1e-6, 2
        ),
        "minutes": lambda records: _stages(records, "seconds", 1.0 / 60.0, 1),
    }
    for temperature in kelvin:
        columns[f"ESS at {temperature:g} K"] = ess(temperature, "ess")
        columns[f"{temperature:g} K, first draws"] = ess(temperature, "ess_first")
    return columns


def _stages(records: list[Record], what: str, scale: float, digits: int) -> str:
    """Stage by stage, each run counted once."""
    runs = list({r["file"]: r for r in records}.values())
    return " / ".join(_cell([r[f"{what}_{stage}"] for r in runs], scale=scale, digits=digits) for stage in STAGES)


def _value(name: str, part: str | None = None, **how: Any) -> Column:
    def column(records: list[Record]) -> str:
        return _cell([(r if part is None else r.get(part, {})).get(name) for r in records], **how)

    return column


def _left(part: str) -> Column:
    def column(records: list[Record]) -> str:
        errors = [r.get(part, {}).get("alpha_left_deviation_error_kt") for r in records]
        value = _value("alpha_left_deviation_kt", part, sign="+")(records)
        return value if None in errors else f"{value} ({np.mean(errors):.3f})"

    return column


def _mirrored(records: list[Record]) -> str:
    shares = []
    for r in records:
        if r.get("n_draws"):
            total = r["n_draws"] + r["n_rejected"]
            shares.append((r["n_mirrored_draws"] + r["n_mirrored_rejected"]) / total)
    return _cell(shares, scale=100.0, digits=4, unit=" %")


DISTANCES: dict[str, Column] = {
    "ESS": _value("ess", scale=100.0, digits=2, unit=" %"),
    "largest weight": _value("largest_weight_share", scale=100.0, digits=4, unit=" %"),
    "Ramachandran KL raw": _value("ramachandran_kl", "raw", digits=5),
    "reweighted": _value("ramachandran_kl", "reweighted", digits=5),
    "excess TV raw": _value("ramachandran_excess_tv", "raw", digits=4),
    "reweighted ": _value("ramachandran_excess_tv", "reweighted", digits=4),
    "raw to own reweighted": _value("ramachandran_excess_tv_own", digits=4),
    "alpha_L raw, kT": _left("raw"),
    "alpha_L reweighted, kT": _left("reweighted"),
    "energy TV raw": _value("energy_tv", "raw", digits=4),
    "energy TV reweighted": _value("energy_tv", "reweighted", digits=4),
    "<U> raw": _value("mean_energy", "raw", digits=2),
    "<U> reweighted": _value("mean_energy", "reweighted", digits=2),
    "mirror images": _mirrored,
}


def _cell(values: list[Any], *, scale: float = 1.0, digits: int = 3, unit: str = "", sign: str = "") -> str:
    """Mean ± standard deviation; a dash where a value is missing."""
    if not values or None in values:
        return "-"
    numbers = scale * np.array(values, dtype=np.float64)
    mean = f"{numbers.mean():{sign}.{digits}f}"
    return f"{mean}{unit}" if len(numbers) == 1 else f"{mean} ± {numbers.std(ddof=1):.{digits}f}{unit}"
