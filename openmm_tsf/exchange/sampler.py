"""Parallel tempering with openmmtools: create it, or go on with what is stored."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import unit

from openmm_tsf.energy.platforms import available_platforms, choose_platform
from openmm_tsf.exchange.move import FlowMove
from openmm_tsf.exchange.netcdf import open_run
from openmm_tsf.exchange.quiet import quiet_import
from openmm_tsf.systems import Molecule
from openmm_tsf.walkers import FEW_ATOMS, minimise

CHUNK = 10
"""Iterations between looks at the progress."""


def run_openmmtools(
    molecule: Molecule, temperatures: np.ndarray, storage: Path, n_iterations: int, *, move: FlowMove | None,
    n_dynamics_steps: int, timestep_fs: float, friction_per_ps: float, store_every: int, seed: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:  # fmt: skip
    """Run a ParallelTemperingSampler until its file has n_iterations.

    Args:
        molecule: one replica of it at each temperature, from the minimised reference geometry.
        temperatures: (K,) [K].
        storage: the NetCDF file; if it is there, the run goes on from its last checkpoint.
        n_iterations: in all.
        move: applied after the dynamics; None for plain parallel tempering. A stored run keeps the move it has.
        n_dynamics_steps: of Langevin dynamics in an iteration, of timestep_fs [fs] and friction_per_ps [1/ps].
        store_every: iterations between stored frames, which are the checkpoints.
        seed: of numpy's global generator; integrators have seeds of their own, so that runs are not repeatable.
        progress: told of the iterations.

    Raises:
        ValueError: the file is cut short or not of such a run.
    """
    with quiet_import():
        from openmmtools import cache, mcmc, multistate, states

    np.random.seed(seed)  # noqa: NPY002 - openmmtools knows no other
    if storage.exists():
        with open_run(storage):  # says what is wrong with it, which openmmtools would not
            pass
        reporter = multistate.MultiStateReporter(str(storage))
        sampler = multistate.ParallelTemperingSampler.from_storage(reporter)
    else:
        dynamics = mcmc.LangevinDynamicsMove(
            timestep=timestep_fs * unit.femtosecond, collision_rate=friction_per_ps / unit.picosecond,
            n_steps=n_dynamics_steps,
        )  # fmt: skip
        moves = dynamics if move is None else mcmc.SequenceMove([dynamics, move])
        sampler = multistate.ParallelTemperingSampler(
            mcmc_moves=moves, number_of_iterations=n_iterations, online_analysis_interval=None
        )
        reporter = multistate.MultiStateReporter(str(storage), checkpoint_interval=store_every)
        kelvin = [t * unit.kelvin for t in temperatures.tolist()]
        state = states.ThermodynamicState(molecule.system, kelvin[0])
        with redirect_stdout(sys.stderr):  # what it asks to be cited
            sampler.create(state, _start(molecule, states), reporter, temperatures=kelvin, n_temperatures=len(kelvin))
    platform, properties = choose_platform(
        "CPU" if molecule.n_atoms <= FEW_ATOMS and "CPU" in available_platforms() else None
    )
    sampler.sampler_context_cache = cache.ContextCache(platform=platform, platform_properties=properties or None)
    sampler.energy_context_cache = cache.ContextCache(platform=platform, platform_properties=properties or None)
    try:
        while sampler.iteration < n_iterations:
            sampler.extend(min(CHUNK, n_iterations - sampler.iteration))
            if progress is not None:
                progress(sampler.iteration, n_iterations, _message(sampler))
    finally:
        reporter.close()  # or opening the file again in this process crashes in HDF5


def _start(molecule: Molecule, states: Any) -> Any:
    platform, properties = choose_platform("Reference")
    context = openmm.Context(molecule.system, openmm.VerletIntegrator(0.001), platform, properties)
    return states.SamplerState(minimise(context, molecule) * unit.nanometer)


def _message(sampler: Any) -> str:
    moves = [move for state_moves in sampler.mcmc_moves for move in _leaves(state_moves)]
    counts = [move.statistics for move in moves if isinstance(move, FlowMove)]
    proposed, accepted = (sum(count[name] for count in counts) for name in ("n_proposed", "n_accepted"))
    return f"{100 * accepted / proposed:.0f} % of proposals accepted" if proposed else ""


def _leaves(move: Any) -> list[Any]:
    return [leaf for part in move.move_list for leaf in _leaves(part)] if hasattr(move, "move_list") else [move]
