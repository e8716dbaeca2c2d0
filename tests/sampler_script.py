"""Replica exchange with a FlowMove, as a program of its own: to be killed, or to run on several MPI ranks.

Usage: python sampler_script.py STORAGE N_ITERATIONS [--die-at ITERATION]. After each iteration every rank adds one line
of JSON to STORAGE.RANK: iteration, and the statistics of all moves.
"""

import json
import logging
import os
import signal
import sys

logging.disable(logging.WARNING)

import torch  # noqa: E402
from mpiplus import mpiplus  # noqa: E402
from openmm import unit  # noqa: E402
from openmmtools import mcmc, multistate, states  # noqa: E402

import openmm_tsf as tsf  # noqa: E402

TEMPERATURES = (300.0, 424.0, 600.0)


def create(storage: str, n_iterations: int, kind: str = "mixed") -> multistate.ReplicaExchangeSampler:
    """Three temperatures of alanine dipeptide, FlowMove after a few steps of dynamics."""
    molecule = tsf.alanine_dipeptide()
    flow_move = tsf.FlowMove("ala2", n_proposals=4, kind=kind, n_walk_steps=1, n_adapt=3)
    dynamics = mcmc.LangevinDynamicsMove(timestep=1.0 * unit.femtosecond, n_steps=5)
    sampler = multistate.ReplicaExchangeSampler(
        mcmc_moves=mcmc.SequenceMove([dynamics, flow_move]), number_of_iterations=n_iterations
    )
    thermodynamic = [states.ThermodynamicState(molecule.system, t * unit.kelvin) for t in TEMPERATURES]
    start = states.SamplerState(molecule.positions * unit.nanometer)
    reporter = multistate.MultiStateReporter(storage, checkpoint_interval=1)
    sampler.create(thermodynamic, start, reporter)
    return sampler


def main() -> None:
    """Create, then run one iteration after the other."""
    torch.set_num_threads(1)
    storage, n_iterations = sys.argv[1], int(sys.argv[2])
    die_at = int(sys.argv[4]) if len(sys.argv) > 4 else None
    comm = mpiplus.get_mpicomm()
    rank = 0 if comm is None else comm.rank
    sampler = create(storage, n_iterations)
    for _ in range(n_iterations):
        sampler.run(1)
        with open(f"{storage}.{rank}", "a") as file:
            file.write(json.dumps([sampler.iteration, [m.statistics for m in sampler.mcmc_moves]]) + "\n")
        if sampler.iteration == die_at and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
