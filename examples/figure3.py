"""Alanine dipeptide by flows trained at 600 K alone: the figure of the TSF paper, and what it misses, in minutes.

python examples/figure3.py                                        # some ten minutes
python examples/figure3.py --flows tsf entropy --steps 2000 --frames 100000
"""

import argparse
from pathlib import Path

import openmm_tsf as tsf
from openmm_tsf import canvas
from openmm_tsf.dynamics import simulate
from openmm_tsf.portraits import of_exchange
from openmm_tsf.steering_plots import entropy_figure, histograms_figure, maps_figure
from openmm_tsf.steering_study import FLOWS, TEMPERATURES, exchanged, share_table, study

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--flows", nargs="+", default=list(FLOWS), choices=FLOWS)
parser.add_argument("--frames", type=int, default=40_000, help="of the training, 20 fs apart")
parser.add_argument("--walkers", type=int, default=128, help="that the frames are of")
parser.add_argument("--equilibration", type=float, default=20.0, help="of each walker [ps]")
parser.add_argument("--steps", type=int, default=300, help="of the training")
parser.add_argument("--draws", type=int, default=20_000, help="at each temperature")
parser.add_argument("--iterations", type=int, default=300, help="of parallel tempering alone, 200 fs each")
parser.add_argument("--corrected", type=int, default=50, help="iterations of parallel tempering with a flow")
parser.add_argument("--replicas", type=int, default=32, help="at each of five temperatures")
parser.add_argument("--out", type=Path, default=Path("figure3"), help="directory; what is there is not done again")
options = parser.parse_args()

model = "ff99sbildn-obc2"  # the force field of the paper
molecule = tsf.alanine_dipeptide(model=model)
energy = tsf.BatchedEnergy(molecule.system, molecule.positions)
given = {"molecule": molecule, "energy": energy, "n_replicas": options.replicas}
alone = exchanged(directory=options.out / "exchange", n_iterations=options.iterations, **given)
exact = of_exchange(alone, molecule, TEMPERATURES, model=model, source="parallel tempering")
print(f"parallel tempering: phi > 0 is {100 * exact.at(300).positive:.2f} % at 300 K", flush=True)

frames = simulate(
    molecule, temperature=600.0, n_frames=options.frames, spacing_fs=20.0, n_walkers=options.walkers,
    equilibration_ps=options.equilibration, directory=options.out / "frames", seed=1,
)  # fmt: skip
studies, corrected = [], {}
for name in options.flows:
    folder = options.out / name
    plan = {"model": model, "steps": options.steps, "n_draws": options.draws, "seed": 1, "directory": folder}
    found = study(name, molecule, frames, energy, **plan)
    record = exchanged(directory=folder / "exchange", n_iterations=options.corrected, flow=folder / "flow.tsf", **given)
    corrected[name] = of_exchange(record, molecule, TEMPERATURES, model=model, source="exchange with the flow")
    studies.append(found)
    print(f"{name}: ESS {100 * found.at(300, weighted=True).ess:.2g} % at 300 K", flush=True)
    if found.curve:
        print(f"{name}: its energy has the heat capacity {1000 * found.curve[0]['heat_capacity']:.1f} J/mol/K at 300 K")

print(share_table([exact], studies))
note = f"{options.draws:,} draws each, {options.steps} steps of training. {canvas.small_print(1)}"
canvas.save(maps_figure(exact, studies, corrected, note=note), options.out / "maps.png")
canvas.save(histograms_figure(exact, studies, corrected, note=note), options.out / "histograms.png")
canvas.save(entropy_figure([exact], studies, note=note), options.out / "entropy.png")
print(f"maps.png, histograms.png and entropy.png are written to {options.out}")
