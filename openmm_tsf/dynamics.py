"""Training frames by Langevin dynamics: several walkers, resumable to the last bit.

A run advances in segments. At the beginning of each, every walker starts from its stored positions and velocities with
random numbers that only (seed, walker, time) decide; at its end, frames are appended to training.dcd and the new
state replaces the old. So a run that was interrupted, even by kill -9, goes on from the last whole segment and gives
the frames that it would have given.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from openmm import app, unit

from openmm_tsf import batched_walkers
from openmm_tsf.batched_walkers import BatchedWalkers
from openmm_tsf.dcd import GrowingDcd
from openmm_tsf.energy.engines import batched_energy
from openmm_tsf.files import whole
from openmm_tsf.settings import TIMESTEP_FS
from openmm_tsf.storage import read_npz, write_npz
from openmm_tsf.systems import Molecule
from openmm_tsf.trajectories import Frames, load_frames
from openmm_tsf.units import to_kelvin
from openmm_tsf.walkers import OpenMMWalkers, Plan, State

Progress = Callable[[int, int, str], None]
STATE_FILE = "simulation.npz"
N_WALKERS = {True: 128, False: 8}
"""Default numbers of walkers of batches and of OpenMM."""


def default_timestep_fs(molecule: Molecule) -> float:
    """Time step [fs] where none is given: 1, and 2 if bonds are constrained."""
    return TIMESTEP_FS[bool(molecule.constraints)]


def simulate(
    molecule: Molecule,
    *,
    temperature: Any,
    n_frames: int,
    spacing_fs: float,
    directory: str | Path,
    seed: int,
    n_walkers: int | None = None,
    timestep_fs: float | None = None,
    friction_per_ps: float = 1.0,
    equilibration_ps: float = 20.0,
    engine: str | None = None,
    platform: Any = None,
    precision: str | None = None,
    device_index: Any = None,
    progress: Progress | None = None,
) -> Frames:
    """Sample the Boltzmann distribution by Langevin dynamics; go on where an earlier call was interrupted.

    Walkers start from the minimised reference geometry with velocities of their own. Writes `training.dcd`,
    `topology.pdb` and `simulation.npz` (the state to go on from) into the directory. A run that is complete returns at
    once. With one engine the frames are the same to the last bit however often the run was interrupted and however
    many cores it had.

    Args:
        molecule: what to simulate; its constraints are kept.
        temperature: [K].
        n_frames: frames of all walkers together; rounded up to a multiple of n_walkers.
        spacing_fs: time between frames of a walker [fs], a multiple of the time step.
        directory: made if need be.
        seed: 0 or above; with the other settings it decides the frames.
        n_walkers: number of independent trajectories; by default 128 in batches and 8 with OpenMM.
        timestep_fs: [fs]; by default 1, and 2 if bonds are constrained.
        friction_per_ps: of the LangevinMiddle integrator [1/ps].
        equilibration_ps: time dropped at the beginning of each walker [ps].
        engine: "batched" (all walkers at once, in single precision), "openmm", or None: batches where the System
            allows and no platform is named.
        platform, precision, device_index: of OpenMM, see `OpenMMEnergy`; by default the CPU for molecules of up to 100
            atoms.
        progress: called with (frames so far, frames in all, message) after each segment.

    Raises:
        ValueError: settings that make no sense; a directory with a run of other settings or foreign files; an unknown
            platform; a walker that exploded.
        OSError: the directory cannot be written or the disk is full; what was complete before stays good.
    """
    timestep_fs = default_timestep_fs(molecule) if timestep_fs is None else float(timestep_fs)
    options = {"platform": platform, "precision": precision, "device_index": device_index}
    energy = batched_energy(molecule.system, molecule.positions, engine=engine, **options)
    n_walkers = N_WALKERS[energy is not None] if n_walkers is None else n_walkers
    name = "openmm" if energy is None else f"batched on {batched_walkers.device()}"
    plan = Plan(
        to_kelvin(temperature), n_frames, float(spacing_fs), n_walkers, timestep_fs, float(friction_per_ps),
        float(equilibration_ps), seed, molecule_digest(molecule), name,
    )  # fmt: skip
    directory = Path(directory).expanduser()
    state = _load_state(directory, plan)
    if state is None or state.row < plan.n_rows:
        walkers = OpenMMWalkers(molecule, plan, **options) if energy is None else BatchedWalkers(molecule, plan, energy)
        try:
            _run(molecule, plan, directory, state, walkers, progress or (lambda done, total, message: None))
        finally:
            walkers.close()
    return load_frames(directory / "training.dcd", molecule, plan.temperature, n_walkers=plan.n_walkers)


def _run(
    molecule: Molecule,
    plan: Plan,
    directory: Path,
    state: State | None,
    walkers: BatchedWalkers | OpenMMWalkers,
    progress: Progress,
) -> None:
    n_total = (plan.n_rows - plan.n_dropped) * plan.n_walkers
    if state is None:
        state = _begin(molecule, plan, directory, walkers)
    n_frames = max(0, state.row - plan.n_dropped) * plan.n_walkers
    dcd = GrowingDcd(
        directory / "training.dcd", molecule.topology, plan.timestep_fs / 1000.0, plan.steps_per_row, n_frames
    )
    try:
        while state.row < plan.n_rows:
            progress(dcd.n_frames, n_total, _message(plan, state.row))
            n_rows = min(walkers.rows_per_segment, plan.n_rows - state.row)
            n_dropped = max(0, plan.n_dropped - state.row)
            state, frames = walkers.advance(state, n_rows)
            dcd.append(frames[n_dropped:].reshape(-1, molecule.n_atoms, 3))
            _save_state(directory, plan, state)
        progress(dcd.n_frames, n_total, _message(plan, state.row))
    finally:
        dcd.close()


def _message(plan: Plan, row: int) -> str:
    if row < plan.n_dropped:
        done = row * plan.spacing_fs / 1000.0
        return f"equilibrating at {plan.temperature:g} K, {done:.3g} of {plan.equilibration_ps:g} ps"
    return f"{plan.n_walkers} walkers at {plan.temperature:g} K"


def _begin(molecule: Molecule, plan: Plan, directory: Path, walkers: BatchedWalkers | OpenMMWalkers) -> State:
    """A new directory with the topology and the state at time zero."""
    if (directory / "training.dcd").exists():
        raise ValueError(
            f"{directory} has a training.dcd but no {STATE_FILE} to go on from; move it away, or choose another folder"
        )
    directory.mkdir(parents=True, exist_ok=True)
    with whole(directory / "topology.pdb") as temporary, open(temporary, "w", encoding="utf-8") as file:
        app.PDBFile.writeFile(molecule.topology, molecule.positions * unit.nanometer, file, keepIds=True)
    state = walkers.start()
    _save_state(directory, plan, state)
    return state


def _save_state(directory: Path, plan: Plan, state: State) -> None:
    write_npz(
        directory / STATE_FILE,
        row=np.array(state.row),
        positions=state.positions,
        velocities=state.velocities,
        settings=np.array(json.dumps(asdict(plan))),
    )


def _load_state(directory: Path, plan: Plan) -> State | None:
    """The state to go on from, None in a new directory; refuses one of other settings."""
    path = directory / STATE_FILE
    if not path.is_file():
        return None
    data = read_npz(path, ("row", "positions", "velocities", "settings"), "the state of a simulation")
    settings = json.loads(str(data["settings"]))
    other = [f"{k} was {settings.get(k)!r}, now {v!r}" for k, v in asdict(plan).items() if settings.get(k) != v]
    if other:
        raise ValueError(f"{directory} has a simulation with other settings: {'; '.join(other)}; choose another folder")
    return State(int(data["row"]), data["positions"], data["velocities"])


def molecule_digest(molecule: Molecule) -> str:
    """Short hash of the forces, atoms, bonds and reference positions."""
    data = molecule.to_dict()
    data["system"] = re.sub(r' openmmVersion="[^"]*"', "", data["system"])
    return hashlib.sha256(json.dumps({**data, "name": ""}).encode()).hexdigest()[:16]
