"""What each part of the flow and of its training is worth, at the training temperature: alanine dipeptide at 600 K.

    python benchmarks/levers.py --out levers                      # every row, three seeds: hours
    python benchmarks/levers.py --out levers --rows old paths --seeds 1

A row is the default with some settings changed. Figures are of 600 K alone, ESS and likelihood of frames later in time,
so that what is chosen by them is still "trained at 600 K only". Results are kept, one file for each row and seed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import openmm_tsf as tsf
from openmm_tsf.assembly import stage_seed
from openmm_tsf.dynamics import simulate
from openmm_tsf.files import write_text
from openmm_tsf.flow import FlowSettings, build_flow
from openmm_tsf.losses import likelihood_loss
from openmm_tsf.settings import Config
from openmm_tsf.training import TrainingSettings, train
from openmm_tsf.trajectories import Frames

OLD = {"quartic": False, "harmonics": 2, "estimator": "plain"}
ROWS = {
    "default": {},
    "old": OLD,
    "old, quartic": OLD | {"quartic": True},
    "old, quartic, paths": OLD | {"quartic": True, "estimator": "path"},
    "two harmonics": {"harmonics": 2},
    "four harmonics": {"harmonics": 4},
    "no entropies": {"entropy_order": 0},
    "likelihood alone": {"energy_weight": 0.0},
    "energy weight 0.8": {"energy_weight": 0.8},
    "no flattened draws": {"flatten": 1.0},
    "half the batch": {"batch_frames": 256, "batch_draws": 232},
    "twice the batch": {"batch_frames": 1024, "batch_draws": 928},
    "wider": {"hidden": 128},
    "more blocks": {"blocks": 10},
    "deeper conditioners": {"depth": 3},
    "momenta": {"momenta": True},
    "half the rate": {"learning_rate": 1e-3},
    "slow average": {"weight_average": 0.997},
}
"""Settings that differ from the default, of the flow or of the training."""


def settings_of(row: str, steps: int) -> tuple[FlowSettings, TrainingSettings]:
    """Those of a row."""
    of_flow = FlowSettings.__dataclass_fields__
    changes = ROWS[row]
    flow = replace(FlowSettings(), **{k: v for k, v in changes.items() if k in of_flow})
    training = replace(TrainingSettings(steps=steps), **{k: v for k, v in changes.items() if k not in of_flow})
    return flow, training


def measure(row: str, seed: int, frames: Frames, energy: tsf.BatchedEnergy, options: argparse.Namespace) -> dict:
    """Train one flow and say how good it is at its own temperature."""
    of_flow, of_training = settings_of(row, options.steps)
    molecule = tsf.alanine_dipeptide()
    early, late = frames.split(of_training.held_out)
    generator = torch.Generator().manual_seed(stage_seed(seed, "flow"))
    flow = build_flow(molecule, early, of_flow, generator=generator)
    folder = options.out / f"{row.replace(', ', '_').replace(' ', '-')}_{seed}"
    started, cpu = time.perf_counter(), time.process_time()
    history = train(flow, frames, energy, of_training, directory=folder, seed=stage_seed(seed, "train"))
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    tsf.save_flow(flow, folder / "flow.tsf")
    hot = flow.training_temperature
    ensemble = tsf.draw(flow, energy, temperature=hot, n=options.draws, generator=torch.Generator().manual_seed(99))
    q, kept = flow.internals.of_frames(late.positions[:: max(1, len(late) // 20_000)])
    with torch.no_grad():
        loss = likelihood_loss(
            flow, q[kept], torch.full((int(kept.sum()),), hot), generator=torch.Generator().manual_seed(0)
        )
    return {
        "row": row, "seed": seed, "ess_600": ensemble.ess, "largest_weight_share": ensemble.largest_weight_share,
        "held_out_nll": float(loss.mean()), "n_parameters": flow.n_parameters, "seconds": seconds, "cpu_seconds": cpu,
        "n_energy_evaluations": history.n_energy_evaluations, "best_step": history.best_step, "steps": options.steps,
        "n_frames": len(frames), "n_draws": options.draws,
    }  # fmt: skip


def main() -> None:
    """Do what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of results")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--frames", type=int, default=Config().simulate.n_frames)
    parser.add_argument("--draws", type=int, default=100_000)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    molecule = tsf.alanine_dipeptide()
    energy = tsf.BatchedEnergy(molecule.system, molecule.positions)
    frames = simulate(
        molecule, temperature=600.0, n_frames=options.frames, spacing_fs=20.0, seed=stage_seed(0, "levers"),
        directory=options.out / "frames",
    )  # fmt: skip
    print(
        "| row | seed | ESS at 600 K | nll of held-out frames | parameters | cpu seconds |\n|---|---|---|---|---|---|"
    )
    for seed in options.seeds:
        for row in options.rows:
            path = options.out / f"{row}_{seed}.json"
            if not path.exists():
                write_text(path, json.dumps(measure(row, seed, frames, energy, options), indent=1))
            m = json.loads(path.read_text("utf-8"))
            print(
                f"| {row} | {seed} | {100 * m['ess_600']:.1f} % | {m['held_out_nll']:.4f} | {m['n_parameters']:,} "
                f"| {m['cpu_seconds']:.0f} |", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
