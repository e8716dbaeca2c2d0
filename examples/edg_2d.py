"""Diffusion generators of densities of the plane, from their energies alone: a picture of draws beside densities.

python examples/edg_2d.py                          # two densities, some two minutes
python examples/edg_2d.py --targets MoG2 "MoG2(i)" MoG6 MoG9 Ring Ring5
"""

import argparse
import time
from pathlib import Path

import torch

from openmm_tsf import canvas
from openmm_tsf.edg import EDGSettings, EDGTrainingSettings, build_edg, draw, train_edg
from openmm_tsf.edg.mmd import mmd
from openmm_tsf.edg.targets import DENSITIES_2D, density_2d, modes_found
from openmm_tsf.edg_plots import PlanePanel, bound_figure, plane_figure
from openmm_tsf.weights import FEWEST

torch.set_num_threads(1)  # for tensors this small, more of them wait for each other
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--targets", nargs="+", choices=DENSITIES_2D, default=["MoG6", "Ring5"])
parser.add_argument("--steps", type=int, default=4000, help="of training")
parser.add_argument("--batch", type=int, default=512, help="draws in a step")
parser.add_argument("--draws", type=int, default=5000, help="that are weighed")
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--out", type=Path, default=Path("edg_2d"), help="directory of the figures")
options = parser.parse_args()
if options.steps < 1 or options.draws < FEWEST:
    parser.error(f"need at least 1 step and {FEWEST} draws")

panels, histories, log_z = [], {}, {}
for name in options.targets:
    target, generator, begin = density_2d(name), torch.Generator().manual_seed(options.seed), time.perf_counter()
    reach = 4.0 if name == "Ring" else 7.0
    edg = build_edg(target, EDGSettings(spread=0.7 * reach), seed=options.seed)
    training = EDGTrainingSettings(steps=options.steps, batch=options.batch, record_every=max(1, options.steps // 40))
    history = train_edg(edg, target, training, seed=options.seed)
    made = draw(edg, target, n=options.draws, generator=generator)
    even = made.resampled(generator=generator)
    exact = target.sample(options.draws, generator=generator).double()
    print(
        f"{name}: {modes_found(target, made.x)} of {target.n_modes} modes, ESS {100.0 * made.ess:.1f} %, "
        f"ln Z {made.log_z:.3f} +- {made.log_z_error:.3f} (exact {target.log_z():.3f}, bound {made.log_z_bound:.3f}), "
        f"MMD {mmd(made.x, exact):.3f} raw, {mmd(made.x, exact, made.log_weights.softmax(0)):.3f} reweighted; "
        f"{history.n_energy_evaluations:,} energies, {time.perf_counter() - begin:.0f} s",
        flush=True,
    )
    panels.append(PlanePanel(name, target, {"exact draws": exact, "generator": made.x, "reweighted": even}, reach))
    histories[name], log_z[name] = history.rows, target.log_z()

options.out.mkdir(parents=True, exist_ok=True)
note = f"{options.steps:,} steps of {options.batch} draws. {canvas.small_print(options.seed)}"
canvas.save(plane_figure(panels, note=note), options.out / "draws.png")
canvas.save(bound_figure(histories, log_z, note=note), options.out / "training.png")
print(f"{options.out / 'draws.png'} and {options.out / 'training.png'} are written")
