"""The train stage of a run whose model is a diffusion generator."""

from __future__ import annotations

from .assembly import load_zmatrix, open_energy
from .edg import build_edg, train_edg
from .edg.curvature import WithCurvature
from .edg.encoder_ode import solver
from .edg.molecular import MolecularEDG
from .edg.molecule import MolecularTarget, molecular_target
from .edg_checkpoint import save_molecular_edg
from .energy import BatchedEnergy
from .rundir import Progress, Run
from .settings import stage_seed
from .systems import Molecule
from .trajectories import Frames


def train_generator(run: Run, molecule: Molecule, frames: Frames, progress: Progress | None = None) -> None:
    """Write generator.edg and history.json: training on the energy alone.

    The frames say where coordinates have their centres, how wide and how correlated stiff ones are, and where the
    windows of soft torsions lie; no frame is learned from.

    Raises:
        ModuleNotFoundError: the extra "edg" is not installed; said now, since draws will need it.

    Warns:
        UserWarning: as `train_edg` does.
    """
    solver()
    config, settings = run.config, run.config.edg
    energy = open_energy(molecule, config.energy, settings.steps * settings.batch)
    curved = settings.decoder == "hamiltonian" and not isinstance(energy, BatchedEnergy)
    u = WithCurvature(energy) if curved else energy
    with run.working("train", progress, lambda: energy.n_evaluations) as report:
        target = molecular_target(
            molecule, u, frames.positions, config.simulate.temperature, walled=True,
            zmatrix=load_zmatrix(molecule, config.zmatrix),
        )  # fmt: skip
        generator = trained(run, target, molecule, report)
        save_molecular_edg(generator, run.path / "generator.edg", extra={"seed": config.seed})
    run.update("train", done=True)
    (run.path / "edg_training.pt").unlink(missing_ok=True)


def trained(run: Run, target: MolecularTarget, molecule: Molecule, report: Progress) -> MolecularEDG:
    """The generator of a run for a target, trained or trained on."""
    config, settings = run.config, run.config.edg
    network = settings.network(int(target.internals.circular.sum()))
    edg = build_edg(target, network, seed=stage_seed(config.seed, "generator"))
    taus = [kelvin / config.simulate.temperature for kelvin in settings.temperatures]
    train_edg(
        edg, target, settings.training, seed=stage_seed(config.seed, "train"), directory=run.path,
        temperatures=taus, progress=report,
    )  # fmt: skip
    return MolecularEDG(edg, target, molecule, (settings.temperatures[0], settings.temperatures[-1]))
