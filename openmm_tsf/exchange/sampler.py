"""Parallel tempering with openmmtools: create it, or go on with what is stored."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from openmm import unit

from openmm_tsf.energy.platforms import available_platforms, choose_platform, on_one_core
from openmm_tsf.exchange.move import NM_PER_PS, FlowMove
from openmm_tsf.exchange.netcdf import open_run
from openmm_tsf.exchange.quiet import quiet_import
from openmm_tsf.exchange.velocities import rescaled
from openmm_tsf.flow_steps import FlowSteps
from openmm_tsf.records import RoundTrips
from openmm_tsf.systems import Molecule
from openmm_tsf.units import to_float
from openmm_tsf.walkers import FEW_ATOMS, minimise, seed_of

CHUNK = 10
"""Iterations between looks at the progress."""


def rescaling(sampler_class: Any) -> Any:
    """A replica exchange sampler of openmmtools that rescales velocities where it exchanges temperatures.

    openmmtools leaves the velocities of a replica as they are when its temperature changes, so that it begins the
    iteration too hot or too cold. With iterations of many picoseconds that is forgotten; with short ones it is not.

    Args:
        sampler_class: `ReplicaExchangeSampler` or `ParallelTemperingSampler`, of states with one System.

    Returns:
        a subclass, to be created, restored and run as the class itself.
    """

    class Rescaling(sampler_class):
        def _mix_replicas(self) -> Any:
            before = list(self._replica_thermodynamic_states)
            after = super()._mix_replicas()
            for replica, (old, new) in enumerate(zip(before, after, strict=True)):
                if old != new:
                    self._rescale(replica, int(old), int(new))
            return after

        def _rescale(self, replica: int, old: int, new: int) -> None:
            before, after = (self._thermodynamic_states[k] for k in (old, new))
            here, scale = self._sampler_states[replica], np.sqrt(after.temperature / before.temperature)
            if here.velocities is None or scale == 1.0:
                return
            # by the integrator that made the velocities: in a run that goes on, the cache does not know it yet
            moves = [move for move in _leaves(self._mcmc_moves[new]) if hasattr(move, "_get_integrator")]
            integrator = moves[-1]._get_integrator(after) if moves else None
            context, _ = self.sampler_context_cache.get_context(after, integrator)
            velocities, positions = (
                np.array(to_float(values, wanted, "of a sampler state"), dtype=np.float64)
                for values, wanted in ((here.velocities, NM_PER_PS), (here.positions, unit.nanometer))
            )
            here.velocities = rescaled(context, velocities, positions, scale) * NM_PER_PS

    Rescaling.__name__ = f"Rescaling{sampler_class.__name__}"
    return Rescaling


def run_openmmtools(
    molecule: Molecule, temperatures: np.ndarray, storage: Path, n_iterations: int, *, move: FlowMove | None,
    n_dynamics_steps: int, timestep_fs: float, friction_per_ps: float, store_every: int, seed: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:  # fmt: skip
    """Run a ParallelTemperingSampler that rescales velocities until its file has n_iterations.

    Args:
        molecule: one replica of it at each temperature, from the minimised reference geometry.
        temperatures: (K,) [K].
        storage: the NetCDF file; if it is there, the run goes on from its last checkpoint.
        n_iterations: in all.
        move: applied after the dynamics; None for plain parallel tempering. A stored run keeps the move it has.
        n_dynamics_steps: of Langevin dynamics in an iteration, of timestep_fs [fs] and friction_per_ps [1/ps].
        store_every: iterations between stored frames, which are the checkpoints.
        seed: of numpy's global generator, for the moves; integrators and exchanges have seeds of their own, so that
            runs are not repeatable.
        progress: told of the iterations.

    Raises:
        ValueError: the file is cut short or not of such a run.
    """
    with quiet_import():
        from openmmtools import cache, mcmc, multistate, states

    if storage.exists():
        with open_run(storage):  # says what is wrong with it, which openmmtools would not
            pass
        reporter = multistate.MultiStateReporter(str(storage))
        sampler = rescaling(multistate.ParallelTemperingSampler).from_storage(reporter)
    else:
        dynamics = mcmc.LangevinDynamicsMove(
            timestep=timestep_fs * unit.femtosecond, collision_rate=friction_per_ps / unit.picosecond,
            n_steps=n_dynamics_steps,
        )  # fmt: skip
        moves = dynamics if move is None else mcmc.SequenceMove([dynamics, move])
        sampler = rescaling(multistate.ParallelTemperingSampler)(
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
    # of where the run is, or one that goes on would draw what it has drawn before
    np.random.seed(seed_of(seed, sampler.iteration))  # noqa: NPY002 - the moves of openmmtools know no other
    pinned = on_one_core() if platform.getName() == "CPU" else nullcontext()
    try:
        with pinned:
            while sampler.iteration < n_iterations:
                sampler.extend(min(CHUNK, n_iterations - sampler.iteration))
                if progress is not None:
                    progress(sampler.iteration, n_iterations, _message(sampler, reporter))
    finally:
        reporter.close()  # or opening the file again in this process crashes in HDF5


def most_energies(n_dynamics_steps: int, steps: FlowSteps | None) -> int:
    """Energies, with forces or without, that a replica takes in an iteration of openmmtools, at most.

    Steps of dynamics, the exchange (its energy, and a force for velocities), and of a `FlowMove`: where the replica is,
    by the batched energy and by the Context; its proposals; two forces for velocities if one was accepted.
    """
    return n_dynamics_steps + 2 + (0 if steps is None else steps.n_energies + 3)


def _start(molecule: Molecule, states: Any) -> Any:
    platform, properties = choose_platform("Reference")
    context = openmm.Context(molecule.system, openmm.VerletIntegrator(0.001), platform, properties)
    return states.SamplerState(minimise(context, molecule) * unit.nanometer)


def _message(sampler: Any, reporter: Any) -> str:
    moves = [move for state_moves in sampler.mcmc_moves for move in _leaves(state_moves)]
    counts = [move.statistics for move in moves if isinstance(move, FlowMove)]
    proposed, accepted = (sum(count[name] for count in counts) for name in ("n_proposed", "n_accepted"))
    trips = RoundTrips(sampler.n_states, sampler.n_replicas)
    trips.follow(np.asarray(reporter.read_replica_thermodynamic_states())[1:])
    flow = f"{100 * accepted / proposed:.0f} % of proposals accepted, " if proposed else ""
    return f"{flow}{trips.counts.sum()} round trips"


def _leaves(move: Any) -> list[Any]:
    return [leaf for part in move.move_list for leaf in _leaves(part)] if hasattr(move, "move_list") else [move]
