"""The `tune` command: at which temperature to run a flow, as a table, a file and a figure; and `sample --tuned`."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .assembly import open_energy
from .canvas import save, small_print
from .checkpoint import flow_path, load_flow
from .energy import choose_energy
from .files import write_text
from .flow import Flow
from .flow_tuning import FORMAT, tune_flow
from .flow_tuning_plots import tuning_figure
from .report import percent
from .rundir import Progress, Run
from .settings import stage_seed
from .stages import check_trained, file_digest, temperatures, training_frames
from .systems import Molecule
from .tempered_draws import SPAN, check_steers
from .trajectories import Frames
from .typing import Energy

Facts = dict[str, Any]
FEWEST_EFFECTIVE = 100.0
"""Effective draws below which nothing is to be learnt of the target by reweighting."""
LITTLE = 0.01
"""Share of draws off the chart that closed forms, which know no chart, do not feel."""


def tuning_name(temperature: float) -> str:
    """File name without its ending: "tuning_300K"."""
    return f"tuning_{temperature:g}K"


def tune_run(
    run: Run, temperature: float | None = None, *, n: int, span: tuple[float, float] = SPAN,
    progress: Progress | None = None,
) -> list[tuple[Path, Facts]]:  # fmt: skip
    """Tune the flow of a run directory, and write tuning_<T>K.json and .png there.

    At the temperature of its frames, those that the flow was not trained on say what is missed.

    Args:
        run: with a trained flow.
        temperature: of the target [K]; by default each of the run's own.
        n: draws at each sampling temperature of the search.
        span: lowest and highest sampling temperature, in multiples of the target's.
        progress: told of the draws.

    Returns:
        the files and what they hold.

    Raises:
        RunError: there is no trained flow yet.
        ValueError: see `tune_flow`.
    """
    check_trained(run, "flow")
    path = run.path / "flow.tsf"
    flow, config = load_flow(path), run.config
    check_steers(flow)
    made = []
    for kelvin in temperatures(run) if temperature is None else [temperature]:
        stage, target = f"tune {kelvin:g} K", run.path / f"{tuning_name(kelvin)}.json"
        seed = stage_seed(config.seed, stage)
        key = f"{file_digest(path)} n={n} from {span[0]:g} to {span[1]:g} seed={seed}"
        if not run.is_done(stage, target.name, f"{target.stem}.png", key=key):
            frames = _held_out(run, flow.molecule, kelvin)
            energy = open_energy(flow.molecule, config.energy, 20 * n)
            with run.working(stage, progress, lambda e=energy: e.n_evaluations, resumes=False) as report:
                _write(_tuned(flow, energy, kelvin, path, n, span, seed, frames, report), target)
            run.update(stage, done=True, key=key)
        made.append((target, read_tuning(target)))
    return made


def tune_file(
    source: str, temperature: float, *, out: Path, n: int, span: tuple[float, float] = SPAN, seed: int = 1,
    progress: Progress | None = None,
) -> tuple[Path, Facts]:  # fmt: skip
    """The same for a checkpoint or a pretrained flow, of which there are no frames; files go to the folder `out`."""
    path = flow_path(source)
    flow = load_flow(path)
    check_steers(flow)
    if not out.is_dir():
        raise FileNotFoundError(2, "no such folder", str(out))
    target = out / f"{tuning_name(temperature)}.json"
    energy = choose_energy(flow.molecule.system, flow.molecule.positions, n=20 * n)
    _write(_tuned(flow, energy, temperature, path, n, span, seed, None, progress), target)
    return target, read_tuning(target)


def tuned_temperature(
    source: str, flow: Flow, energy: Energy, temperature: float, seed: int, progress: Progress | None = None
) -> tuple[float | None, str]:
    """Where to run a flow for a target [K]: t* times its temperature, None without a t*; and how that is known.

    The file that `tune` left beside the flow is taken, if it is of this very flow; otherwise t* is found now.

    Warns:
        UserWarning: there is no t*, or weighted draws are worth less there.
    """
    path = flow_path(source)
    file = path.parent / f"{tuning_name(temperature)}.json"
    facts = read_tuning(file) if file.is_file() else {}
    known = facts.get("flow") == file_digest(path)
    if not known:
        facts = tune_flow(
            flow, energy, temperature, generator=torch.Generator().manual_seed(seed), progress=progress
        ).facts()
    how = f"of {file}" if known else f"found now ({facts['n_energy_evaluations']:,} energies)"
    if facts["t_star"] is None:
        warnings.warn(f"the flow runs at {temperature:g} K itself: {facts['statement']}", stacklevel=2)
        return None, how
    if (loss := _loss_of_weight(facts)) is not None:
        warnings.warn(loss, stacklevel=2)
    return facts["t_star"]["value"] * temperature, how


def _loss_of_weight(facts: Facts) -> str | None:
    """What t*, which serves draws as they are, costs those that are weighted; None if that is within error."""
    checks = {check["name"]: check for check in facts["checks"]}
    trained, star = checks["as trained"], checks["t*"]
    if trained["ess"] - star["ess"] <= 2.0 * math.hypot(trained["ess_error"], star["ess_error"]):
        return None
    best = _best_for_weights(facts)[0] * facts["temperature"]
    return (
        f"at t* draws are closest to the target as they come, but worth less once weighted: ESS {percent(star['ess'])} "
        f"instead of {percent(trained['ess'])}; for weighted draws leave out --tuned, or take --at {best:.4g}"
    )


def read_tuning(path: Path) -> Facts:
    """What `tune` wrote.

    Raises:
        ValueError: the file is damaged or something else.
    """
    try:
        facts = json.loads(path.read_text("utf-8"))
        fine = facts["format"] == FORMAT and {"flow", "t_star", "statement", "checks", "highest_ess"} <= set(facts)
    except (ValueError, KeyError, TypeError):
        fine = False
    if not fine:
        raise ValueError(f"{path} is not what tune wrote, or is damaged: delete it")
    return facts


def _tuned(
    flow: Flow, energy: Energy, temperature: float, path: Path, n: int, span: tuple[float, float], seed: int,
    frames: Frames | None, progress: Progress | None,
) -> Facts:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    tuning = tune_flow(
        flow, energy, temperature, frames=frames, n=n, span=span, generator=generator, progress=progress
    )  # fmt: skip
    return {**tuning.facts(), "flow": file_digest(path), "seed": seed}


def _write(facts: Facts, target: Path) -> None:
    save(tuning_figure(facts, note=small_print(facts["seed"])), target.with_suffix(".png"))
    write_text(target, json.dumps(facts, indent=1, allow_nan=False) + "\n")


def _held_out(run: Run, molecule: Molecule, temperature: float) -> Frames | None:
    """Frames that the flow was not trained on, if they are of this temperature."""
    if not np.isclose(run.config.simulate.temperature, temperature, rtol=1e-6):
        return None
    return training_frames(run, molecule).split(run.config.train.held_out)[1]


# --- in words ---------------------------------------------------------------------------------------------------------


def rows(facts: Facts) -> dict[str, str]:
    """The table of a tuning, ready to print: names and values with units."""
    d, closed, target = facts["diagnostics"], facts["closed_forms"], facts["temperature"]
    checks = {check["name"]: check for check in facts["checks"]}
    trained, star = checks["as trained"], checks.get("t*")
    difference = _between(d["difference"], d["difference_interval"])
    clashes = f"{percent(trained['off_chart'])} off the chart, {percent(trained['clashes'])} left out as clashes"
    shown = {
        "K, C": f"{d['covariance']:.4g} and {d['variance']:.4g} (C of the latent density: {closed['variance']:.4g})",
        "K - C": f"{difference}: {d['fidelity']} the temperature for fidelity",
        "<Ehat> of draws - target": f"{_between(d['gap'], d['gap_interval'])}: {d['diversity']} it for diversity",
        "t*, fidelity": _root(facts["t_star"], target),
        "t', diversity": f"{_root(facts['t_prime'], target)}; the target by {_source(facts)}",
        "effective sample size": "; ".join(_ess(name, check) for name, check in checks.items()),
        "for weighted draws": _for_weights(facts),
        "energy of draws": f"{trained['mean_energy']:.2f} kJ/mol as trained"
        + (f", {star['mean_energy']:.2f} at t*" if star else ""),
        "draws at t = 1": f"{clashes}; the largest weight is {percent(trained['largest_weight_share'])}",
    }
    if closed["virial"] is not None:
        shown["latent virial / D"] = _between(**closed["virial"]) + _closed(", so that t* =", closed["t_star"])
    if closed["t_prime"] is not None:
        counted = ", draws off the chart counted" if trained["off_chart"] > LITTLE else ""
        shown["held-out frames"] = "in latent space" + _closed(" t' =", closed["t_prime"]) + counted
    return shown | {
        "that is": facts["statement"], "energies": f"{facts['n_energy_evaluations']:,} evaluations"
    }  # fmt: skip


def _root(root: dict[str, Any] | None, temperature: float) -> str:
    if root is None:
        return "none where it was looked for"
    low, high = root["interval"]
    needless = None not in (low, high) and low <= 1.0 <= high
    advice = "1 is as good" if needless else f"run at {root['value'] * temperature:.4g} K"
    return f"{_between(root['value'], root['interval'])}: {advice}"


def _best_for_weights(facts: Facts) -> tuple[float, float]:
    """The t with the highest ESS there is a measurement of, and that: of fresh draws, or of all draws reweighted."""
    return max(((row["t"], row["ess"]) for row in (*facts["checks"], facts["highest_ess"])), key=lambda pair: pair[1])


def _for_weights(facts: Facts) -> str:
    t, ess = _best_for_weights(facts)
    return f"{percent(ess)}, the highest seen, at t = {t:.4g}: sample --at {t * facts['temperature']:.4g}"


def _source(facts: Facts) -> str:
    """Where <Ehat> of the target is from, and whether that is worth anything."""
    source, n = facts["diagnostics"]["target_mean_from"], facts["n_effective"]
    if source != "reweighting":
        return source
    return f"reweighting, worth {n:.3g} draws" + ("" if n >= FEWEST_EFFECTIVE else ": TOO FEW to rely on")


def _ess(name: str, check: dict[str, Any]) -> str:
    return (
        f"{100 * check['ess']:.3g} ± {100 * check['ess_error']:.1g} % {name if name == 'as trained' else 'at ' + name}"
    )


def _closed(before: str, value: dict[str, Any] | None) -> str:
    return "" if value is None else f"{before} {_between(**value)}"


def _between(value: float | None, interval: list[float | None]) -> str:
    """A number and its interval."""
    low, high = ("?" if x is None else f"{x:.4g}" for x in interval)
    return f"{'beyond reach' if value is None else format(value, '.4g')} [{low}, {high}]"
