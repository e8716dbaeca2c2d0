"""A weighted 300 K ensemble from the flow that ships with the package, and what it says.

python examples/draw.py            # 20,000 draws, some seconds
python examples/draw.py -n 2000
"""

import argparse

import torch

import openmm_tsf as tsf
from openmm_tsf.torsions import alpha_left, phi_psi

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("-n", type=int, default=20_000, help="number of draws")
n = parser.parse_args().n

flow = tsf.pretrained("ala2")
molecule = flow.molecule
energy = tsf.BatchedEnergy(molecule.system, molecule.positions)
generator = torch.Generator().manual_seed(1)

ensemble = tsf.draw(flow, energy, temperature=300.0, n=n, generator=generator)
print(ensemble)
print(f"largest weight: {100 * ensemble.largest_weight_share:.2g} % of all")

mean_energy, error = ensemble.mean(ensemble.energy)
print(f"<U> at 300 K: {mean_energy:.2f} +- {error:.2f} kJ/mol")

phi, _ = phi_psi(ensemble.positions, molecule)
share, error = ensemble.mean(alpha_left(phi))
print(f"alpha_L at 300 K: {100 * share:.3f} +- {100 * error:.3f} %")

warmer = ensemble.reweighted(330.0)  # the same draws, weighed for another temperature
print(f"the same draws at 330 K: ESS {100 * warmer.ess:.0f} %")
