"""The stages of a run: simulate, train, sample, report.

Each is a function of an open run directory. It skips what is done, goes on where it was interrupted, and writes every
file whole or not at all.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict
from pathlib import Path

import torch

from .assembly import load_molecule, open_energy, start_flow
from .checkpoint import load_flow, save_flow
from .dynamics import simulate
from .edg.molecular import MolecularEDG
from .edg_checkpoint import load_molecular_edg
from .energy import BatchedEnergy, OpenMMEnergy
from .ensemble import Ensemble, draw, to_mdtraj
from .files import whole
from .flow import Flow
from .generator_stage import train_generator
from .rundir import Progress, Run, RunError
from .settings import Config, stage_seed
from .systems import Molecule
from .training import train
from .trajectories import Frames, load_frames


def simulate_stage(run: Run, progress: Progress | None = None) -> None:
    """Write topology.pdb and training.dcd: dynamics, or a checked copy of the user's own trajectory."""
    if simulate_done(run):
        return
    settings, molecule = run.config.simulate, load_molecule(run.config.molecule)
    with run.working("simulate", progress) as report:
        if settings.trajectory is None:
            frames = _simulated(run, molecule, report)
            n_evaluations = _count_steps(run.config, frames.n_walkers)
        else:
            frames = _imported(run, molecule)
            n_evaluations = 0
    run.update(
        "simulate", done=True, n_frames=len(frames.positions), n_walkers=frames.n_walkers,
        n_energy_evaluations=n_evaluations,
    )  # fmt: skip


def simulate_done(run: Run) -> bool:
    """Whether the training frames are there."""
    return run.is_done("simulate", "topology.pdb", "training.dcd")


MODEL_FILE = {"flow": "flow.tsf", "edg": "generator.edg"}
"""What a run of each model trains."""


def train_stage(run: Run, progress: Progress | None = None) -> None:
    """Write the trained model, flow.tsf or generator.edg, and history.json.

    Raises:
        RunError: there are no frames yet.
    """
    if train_done(run):
        return
    if not simulate_done(run):
        raise RunError(
            f"{run.path} has no training frames yet: run the simulate stage first (openmm-tsf simulate {run.path})"
        )
    config, molecule = run.config, load_molecule(run.config.molecule)
    if config.model == "edg":
        train_generator(run, molecule, training_frames(run, molecule), progress)
        return
    frames = training_frames(run, molecule)
    energy = open_energy(molecule, config.energy, len(frames) + config.train.steps * config.train.batch_draws)
    with run.working("train", progress, lambda: energy.n_evaluations) as report:
        flow = start_flow(molecule, frames, config)
        seed = stage_seed(config.seed, "train")
        history = train(flow, frames, energy, config.train, directory=run.path, seed=seed, progress=report)
        facts = {"seed": config.seed, "n_frames": len(frames), "best_step": history.best_step}
        save_flow(flow, run.path / "flow.tsf", extra=facts)
    run.update("train", done=True)
    (run.path / "training_state.pt").unlink(missing_ok=True)


def check_trained(run: Run, model: str | None = None) -> None:
    """Raises RunError where nothing is trained yet, or what is trained is of another model than wanted."""
    own = run.config.model
    if model is not None and own != model:
        raise RunError(f'{run.path} is a run of model = "{own}"; this needs one of model = "{model}"')
    if not train_done(run):
        name = {"flow": "flow", "edg": "generator"}[own]
        raise RunError(f"{run.path} has no trained {name} yet: run the train stage first (openmm-tsf train {run.path})")


def load_model(run: Run) -> Flow | MolecularEDG:
    """What the train stage made."""
    path = run.path / MODEL_FILE[run.config.model]
    return load_flow(path) if run.config.model == "flow" else load_molecular_edg(path)


def file_digest(path: Path) -> str:
    """What tells a flow's file from others."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def train_done(run: Run) -> bool:
    """Whether the trained model is there."""
    return run.is_done("train", MODEL_FILE[run.config.model], "history.json")


def sample_stage(run: Run, progress: Progress | None = None) -> None:
    """Write an ensemble at the training temperature and at each target, and equally likely frames of the targets.

    Raises:
        RunError: there is no trained model yet.
    """
    check_trained(run)
    missing = [t for t in temperatures(run) if not _ensemble_done(run, t)]
    if not missing:
        return
    model = load_model(run)
    energy = open_energy(model.molecule, run.config.energy, run.config.sample.n)
    for temperature in missing:
        _draw_one(run, model, energy, temperature, progress)


def sample_done(run: Run) -> bool:
    """Whether every ensemble is there, drawn from the present model."""
    return train_done(run) and all(_ensemble_done(run, temperature) for temperature in temperatures(run))


def temperatures(run: Run) -> list[float]:
    """Temperatures [K] of the ensembles of a run: of training first, then the targets."""
    return list(dict.fromkeys([run.config.simulate.temperature, *run.config.sample.temperatures]))


def ensemble_name(temperature: float) -> str:
    """File name without its ending: "ensemble_300K"."""
    return f"ensemble_{temperature:g}K"


def training_frames(run: Run, molecule: Molecule) -> Frames:
    """The frames that the simulate stage left."""
    record = run.record("simulate")
    return load_frames(
        run.path / "training.dcd", molecule, run.config.simulate.temperature, n_walkers=record["n_walkers"]
    )


def _simulated(run: Run, molecule: Molecule, progress: Progress) -> Frames:
    settings = run.config.simulate
    return simulate(
        molecule,
        temperature=settings.temperature,
        n_frames=settings.n_frames,
        spacing_fs=settings.spacing_fs,
        n_walkers=settings.n_walkers,
        directory=run.path,
        seed=stage_seed(run.config.seed, "simulate"),
        timestep_fs=settings.timestep_fs,
        friction_per_ps=settings.friction_per_ps,
        equilibration_ps=settings.equilibration_ps,
        **asdict(run.config.energy),
        progress=progress,
    )


def _imported(run: Run, molecule: Molecule) -> Frames:
    settings = run.config.simulate
    frames = load_frames(
        settings.trajectory, molecule, settings.temperature, n_walkers=settings.trajectory_walkers,
        stride=settings.trajectory_stride,
    )  # fmt: skip
    trajectory = to_mdtraj(frames.positions, molecule)
    with whole(run.path / "topology.pdb") as temporary:
        trajectory[0].save_pdb(str(temporary))
    with whole(run.path / "training.dcd") as temporary:
        trajectory.save_dcd(str(temporary))
    return frames


def _count_steps(config: Config, n_walkers: int) -> int:
    """Energy evaluations of the dynamics: one for each step of each walker, equilibration included."""
    settings = config.simulate
    rows = math.ceil(settings.n_frames / n_walkers)
    rows += math.ceil(1000.0 * settings.equilibration_ps / settings.spacing_fs)
    return rows * n_walkers * round(settings.spacing_fs / settings.timestep_fs)


def _ensemble_key(run: Run, temperature: float) -> str:
    """What an ensemble depends on; another key makes it anew."""
    settings = run.config.sample
    model = file_digest(run.path / MODEL_FILE[run.config.model])
    return f"{model} {temperature:g} K n={settings.n} explore={settings.explore:g} seed={run.config.seed}"


def _ensemble_done(run: Run, temperature: float) -> bool:
    name = ensemble_name(temperature)
    files = [f"{name}.npz", *([f"{name}.dcd"] if temperature in run.config.sample.temperatures else [])]
    return run.is_done(f"sample {temperature:g} K", *files, key=_ensemble_key(run, temperature))


def _draw_one(
    run: Run, model: Flow | MolecularEDG, energy: BatchedEnergy | OpenMMEnergy, temperature: float,
    progress: Progress | None,
) -> None:  # fmt: skip
    stage, name, n = f"sample {temperature:g} K", ensemble_name(temperature), run.config.sample.n
    generator = torch.Generator().manual_seed(stage_seed(run.config.seed, stage))
    before = energy.n_evaluations

    def labelled(done: int, total: int, message: str) -> None:
        report(done, total, f"{temperature:g} K, {message}")

    with run.working(stage, progress, lambda: energy.n_evaluations - before, resumes=False) as report:
        ensemble = draw(
            model, energy, temperature=temperature, n=n, generator=generator, explore=run.config.sample.explore,
            progress=labelled,
        )  # fmt: skip
        ensemble.save(run.path / f"{name}.npz")
        if temperature in run.config.sample.temperatures:
            save_frames(ensemble, model.molecule, run.path / f"{name}.dcd", generator)
    run.update(stage, done=True, key=_ensemble_key(run, temperature))


def save_frames(ensemble: Ensemble, molecule: Molecule, path: Path, generator: torch.Generator) -> None:
    """Write equally likely frames, as many as there are draws, in the format that the file's ending names."""
    with whole(path) as temporary:
        to_mdtraj(ensemble.resampled(generator=generator), molecule).save(str(temporary))


def seconds(run: Run, stage: str) -> float:
    """Time that a stage took over all its interruptions [s]; the sum over all temperatures for "sample"."""
    names = [f"sample {t:g} K" for t in temperatures(run)] if stage == "sample" else [stage]
    return sum(run.record(name).get("seconds", 0.0) for name in names)
