"""Flows of double wells, trained at one temperature and used at others: the figure of the TSF paper, in minutes.

python examples/double_well.py                       # 5 dimensions: some three minutes
python examples/double_well.py --dim 20 --steps 2000
"""

import argparse
from pathlib import Path

import torch

import openmm_tsf as tsf
from openmm_tsf import canvas
from openmm_tsf.wells import random_wells, temper, temperature_ladder
from openmm_tsf.wells_plots import KINDS, marginals_figure, nll_figure
from openmm_tsf.wells_study import study

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--dim", type=int, default=5, help="dimensions")
parser.add_argument("--steps", type=int, default=600, help="training steps")
parser.add_argument("--samples", type=int, default=8000, help="of each temperature")
parser.add_argument("--seeds", type=int, default=2, help="flows of each kind")
parser.add_argument("--out", type=Path, default=Path("double_well"), help="directory of the figures")
options = parser.parse_args()

generator = torch.Generator().manual_seed(1)
wells = random_wells(options.dim, generator=generator)
ladder = temperature_ladder(0.1, 1.0, 10.0, 100)
samples = temper(wells, ladder, options.samples, generator=generator)
for temperature in (0.1, 1.0, 10.0):
    mean = wells(samples.at(temperature).double()).mean()
    exact = wells.at(temperature).mean_energy
    print(f"<U> at T = {temperature:g}: {mean:.3f} by parallel tempering, {exact:.3f} by quadrature")

training = tsf.TrainingSettings(steps=options.steps, energy_weight=0.0, evaluate_every=max(options.steps // 20, 1))
studies = []
for kind in KINDS:
    for seed in range(1, options.seeds + 1):
        settings = tsf.FlowSettings(kind=kind, blocks=4, hidden=48)
        done = study(wells, samples, settings, training, temperatures=[*ladder[::10], *ladder[-1:]], seed=seed)
        studies.append(done)
        cells = [f"{row['excess']:.3f} at {row['temperature']:.3g}" for row in done["scores"][::5]]
        print(f"{kind}, seed {seed}: nll beyond the exact one {', '.join(cells)}", flush=True)

options.out.mkdir(parents=True, exist_ok=True)
note = f"{options.samples:,} samples of each temperature. {canvas.small_print(1)}"
canvas.save(nll_figure(studies, note=note), options.out / "nll.png")
canvas.save(marginals_figure(samples, studies[:: options.seeds], note=note), options.out / "marginals.png")
print(f"{options.out / 'nll.png'} and {options.out / 'marginals.png'} are written")
