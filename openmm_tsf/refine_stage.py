"""The `refine` command: the flow of a run directory, made better at one temperature, in a file of its own."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .architecture import cannot_explore
from .assembly import open_energy
from .checkpoint import flow_info, load_flow, save_flow
from .files import write_text
from .refinement import OutOfReach, Refinement, RefinementSettings, refine
from .rundir import Progress, Run, RunError
from .sampling import steering
from .settings import stage_seed
from .stages import check_trained, file_digest


def settings_of(
    run: Run, *, n: int | None, rounds: int | None, steps: int | None, learning_rate: float | None,
    also: tuple[float, ...] = (),
) -> RefinementSettings:  # fmt: skip
    """What a command line means: None is the default, and batches are those of the run's training.

    Raises:
        ValueError: a value out of range.
    """
    default = RefinementSettings()
    training = replace(
        run.config.train,
        steps=_said(steps, default.training.steps),
        learning_rate=_said(learning_rate, default.training.learning_rate),
        ramp_start=default.training.ramp_start,
        ramp_end=default.training.ramp_end,
        evaluate_every=min(run.config.train.evaluate_every, default.training.evaluate_every),
    )
    n, rounds = _said(n, default.n), _said(rounds, default.rounds)
    return replace(default, n=n, rounds=rounds, also=also, training=training)


def _said(value: Any, default: Any) -> Any:
    return default if value is None else value


def refine_stage(
    run: Run, temperature: float, settings: RefinementSettings, progress: Progress | None = None, *,
    after: float | None = None,
) -> Refinement:  # fmt: skip
    """Write flow_<T>K.tsf and refinement_<T>K.json, or read the latter where they are there already.

    Args:
        run: with a trained flow.
        temperature: of the target [K].
        settings: of the refinement; the same ones go on with what was interrupted.
        progress: told of steps.
        after: go on from the flow that was refined at this temperature [K]; by default from the trained one.

    Raises:
        RunError: there is no such flow, or the temperature was refined with other settings.
        OutOfReach, ValueError: see `refine`.
    """
    start = _start(run, temperature, after)
    stage, path, history = _stage(temperature), flow_file(run, temperature), history_file(run, temperature)
    folder = run.path / f"refine_{temperature:g}K"
    facts = _facts(settings, start)
    _check_same(run, stage, facts, [path, folder])
    if run.is_done(stage, path.name, history.name):
        return Refinement.from_json(history.read_text("utf-8"))
    flow = load_flow(start)
    n = settings.rounds * (settings.n + settings.training.steps * settings.training.batch_draws)
    energy = open_energy(flow.molecule, run.config.energy, n)
    with run.working(stage, progress, lambda: energy.n_evaluations, resumes=folder.exists()) as report:
        run.update(stage, settings=facts)
        seed = stage_seed(run.config.seed, stage)
        try:
            done = refine(flow, energy, temperature, settings, directory=folder, seed=seed, progress=report)
        except OutOfReach:
            shutil.rmtree(folder)  # nothing to go on from
            raise
        so_far = [*flow_info(start)["extra"].get("refined_at", []), temperature]
        save_flow(flow, path, extra={"refined_at": so_far, "seed": run.config.seed, "ess_there": done.after.ess})
        write_text(history, done.to_json())
    run.update(stage, done=True)
    shutil.rmtree(folder)
    return done


def _start(run: Run, temperature: float, after: float | None) -> Path:
    """The flow to go on from."""
    check_trained(run, "flow")
    if after is None:
        return run.path / "flow.tsf"
    path = flow_file(run, after)
    if after == temperature:
        raise RunError(f"{path.name} is of {after:g} K itself: to refine more there, delete it and ask for more rounds")
    if not run.is_done(_stage(after), path.name):
        raise RunError(
            f"{run.path} has no flow refined at {after:g} K to go on from: make it first (openmm-tsf refine {run.path} "
            f"--temperature {after:g})"
        )
    return path


def _stage(temperature: float) -> str:
    return f"refine {temperature:g} K"


def flow_file(run: Run, temperature: float) -> Path:
    """Where the refined flow is."""
    return run.path / f"flow_{temperature:g}K.tsf"


def history_file(run: Run, temperature: float) -> Path:
    """Where it is written what the refinement did."""
    return run.path / f"refinement_{temperature:g}K.json"


def summary(run: Run, done: Refinement) -> dict[str, str]:
    """The main figures of a refinement, ready to print: names and values with units."""
    path = flow_file(run, done.temperature)
    flow = load_flow(path)
    settings, at_home = flow.settings, done.temperature == flow.training_temperature
    both, kept = (done.before, done.after), sum(r.kept for r in done.rounds[1:])
    ess = [f"{100 * r.ess:.2f} ± {100 * r.ess_error:.2f} %" for r in both]
    largest = [f"{100 * r.largest_weight_share:.2g} %" for r in both]
    seconds = run.record(_stage(done.temperature)).get("seconds", 0.0)
    unwatched = {} if settings.explores else {"rare basins": f"not watched: {cannot_explore(settings)}"}
    torsions = "fitted to weighted draws" + ("; undone" if done.fitted and not done.fitted.kept else "")
    elsewhere = "" if at_home else "; away from this temperature draw from the flow that it was made from"
    return {
        "effective sample size": f"{ess[0]} before, {ess[1]} after (Kish, unclipped, fresh draws)",
        "largest weight": f"{largest[0]} of all before, {largest[1]} after",
        "rounds": f"{kept} kept of {len(done.rounds) - 1}; {done.stopped}",
        **({} if done.fitted is None else {"torsions": torsions}),
        "energies": f"{done.n_energy_evaluations:,} evaluations, besides those of dynamics and training",
        "time": f"{seconds:.0f} s",
        "steering": f"{steering(settings)}, as before" + elsewhere,
        "to draw": f"openmm-tsf sample {path} --temperature {done.temperature:g}"
        if done.after is not done.before else f"no round was kept: {path.name} is flow.tsf as it was",
        **unwatched,
    }  # fmt: skip


def _facts(settings: RefinementSettings, start: Path) -> dict[str, Any]:
    """What the result depends on, flat."""
    flat = asdict(settings)
    training = flat.pop("training")
    facts = {**flat, **training, "flow": file_digest(start)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in facts.items()}  # as in JSON


def _check_same(run: Run, stage: str, now: dict[str, Any], made: list[Path]) -> None:
    before = run.record(stage).get("settings", {})
    there = [path for path in made if path.exists()]
    other = [f"{key} was {before.get(key)!r} and is now {now[key]!r}" for key in now if before.get(key) != now[key]]
    if before and other and there:
        raise RunError(
            f"{stage} was begun with other settings in {run.path}: {'; '.join(other[:3])}; give the same ones, or "
            f"delete {' and '.join(path.name for path in there)} to begin anew"
        )
