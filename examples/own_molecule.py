"""From a PDB file to a weighted ensemble in Python: simulate, build, train, draw. Small settings, about a minute.

python examples/own_molecule.py
python examples/own_molecule.py --pdb mine.pdb --steps 2000 --frames 100000
"""

import argparse
import tempfile
from pathlib import Path

import torch
from openmm import app, unit

import openmm_tsf as tsf

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--pdb", type=Path, help="one molecule; by default alanine dipeptide, written for the occasion")
parser.add_argument("--steps", type=int, default=200, help="training steps")
parser.add_argument("--frames", type=int, default=4000, help="training frames")
options = parser.parse_args()

with tempfile.TemporaryDirectory() as folder:
    pdb = options.pdb
    if pdb is None:
        known = tsf.alanine_dipeptide("ff99sbildn-obc2")
        pdb = Path(folder, "ala2.pdb")
        with pdb.open("w") as file:
            app.PDBFile.writeFile(known.topology, known.positions * unit.nanometer, file)

    molecule = tsf.Molecule.from_files(pdb, force_field=("amber99sbildn.xml", "amber99_obc.xml"))
    energy = tsf.BatchedEnergy(molecule.system, molecule.positions)
    print(tsf.build_zmatrix(molecule))

    frames = tsf.simulate(
        molecule, temperature=600.0, n_frames=options.frames, spacing_fs=20.0, n_walkers=64, equilibration_ps=1.0,
        directory=folder, seed=1,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    flow = tsf.build_flow(molecule, frames, tsf.FlowSettings(blocks=2, hidden=32), generator=generator)
    settings = tsf.TrainingSettings(steps=options.steps, evaluate_every=10)
    history = tsf.train(flow, frames, energy, settings, directory=folder, seed=1)
    print(f"held-out -ln q: {history.rows[0]['held_out_nll']:.2f} -> {history.rows[-1]['held_out_nll']:.2f} nat")

    for temperature in (600.0, 450.0):
        print(tsf.draw(flow, energy, temperature=temperature, n=2000, generator=generator))
