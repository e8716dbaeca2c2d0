"""Flows of double wells, trained at T = 1 and scored from 0.1 to 10: figure 2 of arXiv 2108.01590, with error bands.

    python benchmarks/double_well.py --out wells            # 5 and 20 dimensions, three seeds of three flows
    python benchmarks/double_well.py --out wells --dims 5   # the first part of it

Results are kept in the directory as they come, one file for each flow, and what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import openmm_tsf as tsf
from openmm_tsf import canvas
from openmm_tsf.files import write_text
from openmm_tsf.wells import DoubleWells, TemperedSamples, random_wells, temper, temperature_ladder
from openmm_tsf.wells_plots import KINDS, marginals_figure, nll_figure
from openmm_tsf.wells_study import study

LADDER = temperature_ladder(0.1, 1.0, 10.0, 100)
SCORED = [LADDER[k] for k in (0, 6, 12, 18, 25, 31, 37, 43, 50, 56, 62, 68, 74, 80, 86, 92, 99)]
SYSTEM_SEED = 1


def main() -> None:
    """Run what is missing, print the table and draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of results")
    parser.add_argument("--dims", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=1000, help="training steps")
    parser.add_argument("--samples", type=int, default=20_000, help="of each temperature")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    options.out.mkdir(parents=True, exist_ok=True)
    for dim in options.dims:
        wells, samples = system(dim, options.samples)
        for seed in options.seeds:
            for kind in KINDS:
                done = run(wells, samples, kind, seed, options.steps, options.out)
                print(row(done), flush=True)
        note = f"{options.samples:,} samples by parallel tempering at each of {len(LADDER)} temperatures."
        shown = [read(options.out, dim, kind, options.seeds[0]) for kind in KINDS]
        figure = marginals_figure(samples, shown, note=f"{note} {canvas.small_print(options.seeds[0])}")
        canvas.save(figure, options.out / f"marginals_{dim}.png")
    everything = [read(options.out, d, k, s) for d in options.dims for k in KINDS for s in options.seeds]
    figure = nll_figure(everything, note=f"{note} {canvas.small_print(SYSTEM_SEED)}")
    canvas.save(figure, options.out / "double_well.png")


def system(dim: int, n: int) -> tuple[DoubleWells, TemperedSamples]:
    """The double wells of a dimension, and samples of them."""
    generator = torch.Generator().manual_seed(SYSTEM_SEED)
    wells = random_wells(dim, generator=generator)
    samples = temper(wells, LADDER, n, generator=generator)
    check = samples.at(1.0).double()
    mean, exact = wells(check).mean(), wells.at(1.0).mean_energy
    print(f"{dim} dimensions: <U> at T = 1 is {exact:.3f} by quadrature, {mean:.3f} by parallel tempering")
    return wells, samples


def run(wells: DoubleWells, samples: TemperedSamples, kind: str, seed: int, steps: int, out: Path) -> dict:
    """Train and score one flow, unless that is done."""
    path = place(out, wells.dim, kind, seed)
    if not path.exists():
        settings = tsf.FlowSettings(kind=kind, blocks=4, hidden=48)
        training = tsf.TrainingSettings(steps=steps, energy_weight=0.0, evaluate_every=50)
        done = study(wells, samples, settings, training, temperatures=SCORED, seed=seed)
        write_text(path, json.dumps(done))
    return read(out, wells.dim, kind, seed)


def place(out: Path, dim: int, kind: str, seed: int) -> Path:
    """Where the results of a flow are."""
    return out / f"{dim}_{kind}_{seed}.json"


def read(out: Path, dim: int, kind: str, seed: int) -> dict:
    """Results of a flow."""
    return json.loads(place(out, dim, kind, seed).read_text("utf-8"))


def row(done: dict) -> str:
    """What one flow gave, at five of the temperatures."""
    cells = [f"{r['excess']:9.3f} +- {r['excess_error']:.3f}" for r in done["scores"][::4]]
    return f"{done['dim']:>3}-d {done['kind']:>10} seed {done['seed']} {done['seconds']:5.0f} s" + "".join(cells)


if __name__ == "__main__":
    main()
