"""A flow as a move in openmmtools: replica exchange of alanine dipeptide between 300 and 600 K.

    python examples/replica_exchange.py --iterations 200

Prints the acceptance of the flow's proposals at each temperature, and mean energies by MBAR beside those of the flow.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from openmm import unit
from openmmtools import mcmc, states
from openmmtools.multistate import MultiStateReporter, ReplicaExchangeSampler

import openmm_tsf as tsf
from openmm_tsf import multistate
from openmm_tsf.energy.platforms import on_one_core
from openmm_tsf.exchange import acceptance, read_exchange, rescaling, to_mdtraj

parser = argparse.ArgumentParser()
parser.add_argument("--iterations", type=int, default=200)
options = parser.parse_args()
np.random.seed(1)  # noqa: NPY002 - it is what openmmtools and its moves draw from

molecule = tsf.alanine_dipeptide()
ladder = [300.0, 378.0, 476.0, 600.0]
move = mcmc.SequenceMove(
    [
        mcmc.LangevinDynamicsMove(timestep=1.0 * unit.femtosecond, collision_rate=1.0 / unit.picosecond, n_steps=20),
        tsf.FlowMove("ala2", n_proposals=16),
    ]
)

with tempfile.TemporaryDirectory() as folder:
    storage = str(Path(folder) / "ladder.nc")
    sampler = rescaling(ReplicaExchangeSampler)(mcmc_moves=move, number_of_iterations=options.iterations)
    reporter = MultiStateReporter(storage, checkpoint_interval=1)
    thermodynamic = [states.ThermodynamicState(molecule.system, t * unit.kelvin) for t in ladder]
    sampler.create(thermodynamic, states.SamplerState(molecule.positions * unit.nanometer), reporter)
    with on_one_core():  # OpenMM's CPU platform is several times as fast for small molecules
        sampler.run()
    reporter.close()
    rows, record = acceptance(storage), read_exchange(storage)
    cold = to_mdtraj(storage, molecule, state=0)

for row in rows:
    print(f"{row['temperature']:.0f} K: {100 * row['share']:.0f} % of {row['proposed']} proposals accepted")
flow, energy = tsf.pretrained("ala2"), tsf.BatchedEnergy(molecule.system, molecule.positions)
generator = torch.Generator().manual_seed(1)
for row in multistate.observables(record, [300.0, 600.0], n_discard=options.iterations // 10):
    ensemble = tsf.draw(flow, energy, temperature=row["temperature"], n=2000, generator=generator)
    mean, error = ensemble.mean(ensemble.energy)
    print(
        f"<U> at {row['temperature']:.0f} K: {row['mean_energy']:.2f} +- {row['mean_energy_error']:.2f} kJ/mol by "
        f"exchange, {float(mean):.2f} +- {float(error):.2f} by the flow"
    )
print(f"{cold.n_frames} frames at 300 K, {multistate.round_trips(record).sum()} round trips")
