"""The report stage: figures, metrics.json and report.html of a run directory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from . import analysis, plotting
from .assembly import open_energy
from .canvas import png, versions
from .config import relevant
from .edg.molecular import MolecularEDG
from .edg_plots import bound_figure
from .ensemble import Ensemble
from .files import whole, write_text
from .flow import Flow
from .report import alpha_left, alpha_left_bound, deviation, share_with_error, write_report
from .rundir import Progress, Run, RunError
from .stages import (
    ensemble_name,
    load_model,
    sample_done,
    sample_stage,
    seconds,
    simulate_done,
    simulate_stage,
    temperatures,
    train_done,
    train_stage,
    training_frames,
)
from .systems import Molecule
from .training import History
from .trajectories import Frames
from .typing import Energy, Positions, Steerable

MEASURED = ("simulate", "train", "sample")
FILES = ("metrics.json", "report.html", "energies.png")
N_FRAME_ENERGIES = 4000
N_STEERED = 1000
N_BETWEEN = {"flow": 20_000, "edg": 1_000}
"""Draws at each temperature between those of the ensembles, of each model."""
STEP_KELVIN = 25.0
"""Spacing of the temperatures in the figure of observables."""


def report_done(run: Run) -> bool:
    """Whether the report of the present ensembles is there."""
    return sample_done(run) and run.is_done("report", *FILES, key=_key(run))


def report_stage(run: Run, progress: Progress | None = None) -> None:
    """Write the pictures, metrics.json and report.html.

    Raises:
        RunError: there are no ensembles yet.
    """
    if not sample_done(run):
        raise RunError(
            f"{run.path} has no ensembles of its {run.config.model} yet: run the sample stage first (openmm-tsf sample "
            f"{run.path})"
        )
    seed, model = run.config.seed, load_model(run)
    molecule, frames = model.molecule, training_frames(run, model.molecule)
    ensembles = [Ensemble.load(run.path / f"{ensemble_name(t)}.npz") for t in temperatures(run)]
    target = ensembles[temperatures(run).index(run.config.sample.temperatures[0])]
    reference = analysis.reference_for(molecule)
    energy = open_energy(molecule, run.config.energy)
    with run.working("report", progress, lambda: energy.n_evaluations, resumes=False) as report:
        report(0, 4, "figures of the ensembles")
        figures = analysis.metrics(ensembles[0], target, molecule, reference=reference, seed=seed)
        figures |= _bounds(figures) | _other_targets(ensembles, target, molecule)
        report(1, 4, "observables")
        observables = _observables(model, energy, ensembles, seed, N_BETWEEN[run.config.model])
        report(2, 4, "pictures")
        drawn = plotting.figures(
            ensembles[0], target, molecule, frames=frames.positions, reference=reference, observables=observables,
            frame_energies=_frame_energies(energy, frames), history=_history(run), seed=seed,
            model="Generator" if isinstance(model, MolecularEDG) else "Flow",
        )  # fmt: skip
        if isinstance(model, MolecularEDG):
            drawn["training"] = bound_figure({molecule.name: _bounds_of_training(run)}, note=plotting.small_print(seed))
        pictures = {name: png(figure) for name, figure in drawn.items()}
        report(3, 4, "files")
        own = _of_generator(model, ensembles[0], target) if isinstance(model, MolecularEDG) else _of_flow(model, target)
        _write(run, figures | _account(run) | own | _of_frames(frames, molecule), pictures, molecule.name)
    run.update("report", done=True, key=_key(run))


def summary(run: Run) -> dict[str, str]:
    """The main figures of a reported run, ready to print: names and values with units."""
    found = json.loads((run.path / "metrics.json").read_text("utf-8"))
    hot, cold = (f"{found[f'temperature_{which}_kelvin']:g} K" for which in ("train", "target"))
    rows = {
        f"effective sample size, {hot}": f"{100 * found['ess_train']:.3g} %",
        f"effective sample size, {cold}": f"{100 * found['ess_target']:.3g} % of {found['n_draws_target']} draws",
        f"largest weight, {cold}": f"{100 * found['largest_weight_share_target']:.3g} % of all",
    }
    if found.get("alpha_left_target") is not None:
        raw = 100 * found["alpha_left_target_raw"]
        rows[f"alpha_L share, {cold}"] = f"{alpha_left(found, 'target')} reweighted, {raw:.3g} % raw"
    if found.get("reference_alpha_left") is not None:
        exact = share_with_error(found["reference_alpha_left"], found["reference_alpha_left_error"])
        rows["  long reference"] = exact
    rows["time"] = ", ".join(f"{stage} {found[f'seconds_{stage}']:.0f} s" for stage in MEASURED)
    return rows


def steering_spread(flow: Steerable, positions: Positions, first: float, second: float) -> float:
    """How far a flow is from the steering law [nat]: (max - min of T1 ln q_T1 - T2 ln q_T2) / |T1 - T2|.

    Flows with momenta steer jointly, so each frame gets one set of momenta for both temperatures.

    Args:
        flow: in double precision.
        positions: (frames, atoms, 3) [nm] on the chart, at least 1,000 for a figure to quote.
        first, second: the two temperatures [K], not the same.

    Source: Dibak, Klein, Noe, arXiv 2012.00429, eq. 4.
    """
    with torch.no_grad():
        momenta = torch.randn(len(positions), flow.n_momenta, generator=torch.Generator().manual_seed(0))
        one, two = (flow.at(t).joint_log_prob(positions, momenta) for t in (first, second))
        excess = first * one - second * two
    return float(excess.max() - excess.min()) / abs(first - second)


STAGES: dict[str, tuple[Callable[[Run], bool], Callable[[Run, Progress | None], None]]] = {
    "simulate": (simulate_done, simulate_stage),
    "train": (train_done, train_stage),
    "sample": (sample_done, sample_stage),
    "report": (report_done, report_stage),
}
"""Whether a stage is done, and what does it, in the order of a run."""


def _key(run: Run) -> str:
    """What a report depends on besides this package: the ensembles."""
    return " | ".join(str(run.record(f"sample {t:g} K").get("key")) for t in temperatures(run))


def _write(run: Run, figures: dict[str, Any], pictures: dict[str, bytes], name: str) -> None:
    for picture, content in pictures.items():
        with whole(run.path / f"{picture}.png") as temporary:
            temporary.write_bytes(content)
    settings = relevant(run.config)
    seed = settings.pop("seed")
    write_report(
        run.path / "report.html", name=name, metrics=figures, figures=pictures, settings=settings,
        versions=versions(), seed=seed,
    )  # fmt: skip
    write_text(run.path / "metrics.json", json.dumps(figures, indent=2, allow_nan=False) + "\n")


def _bounds(figures: dict[str, Any]) -> dict[str, Any]:
    """Bounds on the share of alpha_L where the draws do not show it; then there is no deviation from the reference."""
    found = {f"alpha_left_{which}_upper_bound": alpha_left_bound(figures, which) for which in ("train", "target")}
    return found | {"alpha_left_target_deviation": deviation(figures)}


def _account(run: Run) -> dict[str, Any]:
    """Time, energy evaluations, seed and versions."""
    names = {stage: [stage] for stage in MEASURED} | {"sample": [f"sample {t:g} K" for t in temperatures(run)]}
    counts = {
        f"n_energy_evaluations_{stage}": sum(run.record(name).get("n_energy_evaluations", 0) for name in parts)
        for stage, parts in names.items()
    }
    return {
        "n_energy_evaluations": sum(counts.values()),
        **counts,
        **{f"seconds_{stage}": round(seconds(run, stage), 2) for stage in MEASURED},
        "seed": run.config.seed,
        **{f"version_{name.replace('-', '_')}": number for name, number in versions().items()},
    }


def _of_frames(frames: Frames, molecule: Molecule) -> dict[str, Any]:
    facts: dict[str, Any] = {"n_training_frames": len(frames)}
    try:
        phi, _ = analysis.phi_psi(frames.positions, molecule)
        facts["n_phi_transitions_dynamics"] = analysis.count_transitions(phi, frames.n_walkers)
    except ValueError:  # no residue with both torsions
        facts["n_phi_transitions_dynamics"] = None
    return facts


def _of_flow(flow: Flow, target: Ensemble) -> dict[str, Any]:
    facts: dict[str, Any] = {"model": "flow", "n_parameters": flow.n_parameters}
    facts |= {"flow_kind": flow.settings.kind, "n_momenta": flow.n_momenta, "steers": flow.settings.steers}
    hot, cold = flow.training_temperature, target.temperature
    some = target.positions[:N_STEERED].to(torch.float64)
    spread = steering_spread(flow, some, hot, cold if cold != hot else 0.5 * hot)
    return facts | {"steering_spread_nat": spread if math.isfinite(spread) else None}


def _of_generator(generator: MolecularEDG, train: Ensemble, target: Ensemble) -> dict[str, Any]:
    low, high = generator.temperatures
    settings, bounds = generator.settings, {"train": train.log_z_bound, "target": target.log_z_bound}
    return {
        "model": "edg", "n_parameters": generator.n_parameters, "n_latents": generator.edg.latent_dim,
        "decoder": settings.decoder, "is_conditioned": settings.conditioned, "temperature_lowest_kelvin": low,
        "temperature_highest_kelvin": high, "steers": False,
        **{f"log_z_bound_{which}_nat": b if math.isfinite(b) else None for which, b in bounds.items()},
    }  # fmt: skip


def _other_targets(ensembles: Sequence[Ensemble], target: Ensemble, molecule: Any) -> dict[str, Any]:
    """ESS and alpha_L share of the targets after the first, under names that end in the temperature."""
    figures: dict[str, Any] = {}
    for ensemble in ensembles[1:]:
        if ensemble is target:
            continue
        found, ending = analysis.metrics(ensemble, ensemble, molecule), f"{ensemble.temperature:g}_kelvin"
        names = ("ess", "largest_weight_share", "alpha_left", "alpha_left_error")
        keys = {"alpha_left_error": "alpha_left_target_error"}
        figures |= {f"{name}_{ending}": found[keys.get(name, f"{name}_target")] for name in names}
    return figures


def _observables(
    model: Flow | MolecularEDG, energy: Energy, ensembles: Sequence[Ensemble], seed: int, most: int
) -> list[dict[str, float]] | None:  # fmt: skip
    """Observables from the lowest to the highest temperature: of the ensembles, and of fresh draws in between."""
    own = [ensemble.temperature for ensemble in ensembles]
    steps = max(2, math.ceil((max(own) - min(own)) / STEP_KELVIN) + 1)
    between = sorted({*np.linspace(min(own), max(own), steps).round(3).tolist()} - set(own))
    try:
        angles = [analysis.phi_psi(ensemble.positions, model.molecule)[0] for ensemble in ensembles]
    except ValueError:  # no residue with both torsions
        return None
    rows = [
        row
        for ensemble, phi in zip(ensembles, angles, strict=True)
        for row in analysis.observables_against_temperature(ensemble, [ensemble.temperature], phi)
    ]
    generator = torch.Generator().manual_seed(seed)
    most = min(most, *map(len, ensembles))
    rows += analysis.flow_observables(model, energy, between, n=most, explore=ensembles[0].explore, generator=generator)
    return sorted(rows, key=lambda row: row["temperature"])


def _frame_energies(energy: Any, frames: Frames) -> np.ndarray:
    """Energies [kJ/mol] of frames spread over the dynamics."""
    some = np.unique(np.linspace(0, len(frames) - 1, N_FRAME_ENERGIES).astype(int))
    return energy(torch.as_tensor(frames.positions[some], dtype=torch.float64)).numpy()


def _history(run: Run) -> list[dict[str, Any]] | None:
    if run.config.model != "flow":
        return None
    return History.from_json((run.path / "history.json").read_text("utf-8")).rows


def _bounds_of_training(run: Run) -> list[dict[str, float]]:
    return json.loads((run.path / "history.json").read_text("utf-8"))["rows"]
