"""What each part of the flow and of its training is worth, at the training temperature: alanine dipeptide at 600 K.

    python benchmarks/levers.py --out levers                      # every row, three seeds: hours
    python benchmarks/levers.py --out levers --rows old paths --seeds 1

A row is the default with some settings changed. Figures are of 600 K and above, so that what is chosen by them is still
"trained at 600 K only": ESS and likelihood of frames later in time, and how far the raw share of alpha_L is from the
reweighted one at 600 and 900 K, ln of their ratio [kT]. A difference between the two temperatures is energy taken for
entropy, or the other way round, and goes on growing where the molecule is cooled. The row of a mixture of temperatures
has frames below 600 K and stands apart. Results are kept, one file for each row and seed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

import openmm_tsf as tsf
from openmm_tsf.assembly import stage_seed
from openmm_tsf.console import Bar
from openmm_tsf.dynamics import simulate
from openmm_tsf.files import write_text
from openmm_tsf.flow import Flow, FlowSettings, build_flow
from openmm_tsf.ladder import geometric_ladder
from openmm_tsf.losses import likelihood_loss
from openmm_tsf.settings import Config
from openmm_tsf.tempering import BatchedTempering
from openmm_tsf.tempering_storage import run_tempering
from openmm_tsf.torsions import alpha_left, phi_psi
from openmm_tsf.training import TrainingSettings, train
from openmm_tsf.trajectories import Frames

COLD, HOT, WARM, N_LEVELS, N_REPLICAS = 300.0, 600.0, 900.0, 5, 32
MIXTURE = "frames of 300 to 600 K"
OLD = {"quartic": False, "harmonics": 2, "estimator": "plain"}
ROWS = {
    "default": {},
    "old": OLD,
    "old, quartic": OLD | {"quartic": True},
    "old, quartic, paths": OLD | {"quartic": True, "estimator": "path"},
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
    "energies at 600 and 900 K": {"energies_at": (HOT, WARM)},
    "energies at 900 K": {"energies_at": (WARM,)},
    MIXTURE: {},
}
"""Settings that differ from the default, of the flow or of the training."""


def settings_of(row: str, steps: int) -> tuple[FlowSettings, TrainingSettings]:
    """Those of a row."""
    of_flow = FlowSettings.__dataclass_fields__
    changes = ROWS[row]
    flow = replace(FlowSettings(), **{k: v for k, v in changes.items() if k in of_flow})
    training = replace(TrainingSettings(steps=steps), **{k: v for k, v in changes.items() if k not in of_flow})
    return flow, training


def frames_of(row: str, options: argparse.Namespace) -> Frames:
    """Frames of dynamics at 600 K; of one row, as many frames of parallel tempering at all its temperatures."""
    molecule, seed = tsf.alanine_dipeptide(), stage_seed(0, "levers")
    if row != MIXTURE:
        return simulate(
            molecule, temperature=HOT, n_frames=options.frames, spacing_fs=20.0, seed=seed,
            directory=options.out / "frames",
        )  # fmt: skip
    ladder = geometric_ladder(COLD, HOT, N_LEVELS)
    tempering = BatchedTempering(
        molecule, ladder, n_replicas_per_temperature=N_REPLICAS, n_dynamics_steps=20, timestep_fs=1.0, seed=seed
    )
    n, dropped = options.frames // (N_LEVELS * N_REPLICAS), 1000  # 20 ps to equilibrate, as in dynamics
    record = run_tempering(tempering, options.out / "tempering", dropped + n, progress=Bar("tempering"))
    return Frames(
        record.positions[dropped:].reshape(-1, molecule.n_atoms, 3),
        np.asarray(ladder)[record.levels[dropped:]].ravel(),
        n_walkers=N_LEVELS * N_REPLICAS,
    )


def learn(row: str, seed: int, frames: Frames, energy: tsf.BatchedEnergy, options: argparse.Namespace) -> dict:
    """Train one flow and say what that took."""
    of_flow, of_training = settings_of(row, options.steps)
    molecule = tsf.alanine_dipeptide()
    early, _ = frames.split(of_training.held_out)
    generator = torch.Generator().manual_seed(stage_seed(seed, "flow"))
    flow = build_flow(molecule, early, of_flow, generator=generator)
    folder = place(options.out, row, seed)
    started, cpu = time.perf_counter(), time.process_time()
    history = train(flow, frames, energy, of_training, directory=folder, seed=stage_seed(seed, "train"))
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    tsf.save_flow(flow, folder / "flow.tsf")
    return {
        "row": row, "seed": seed, "n_parameters": flow.n_parameters, "seconds": seconds, "cpu_seconds": cpu,
        "n_energy_evaluations": history.n_energy_evaluations, "best_step": history.best_step, "steps": options.steps,
        "n_frames": len(frames),
    }  # fmt: skip


def judge(flow: Flow, late: Frames, energy: tsf.BatchedEnergy, n: int) -> dict:
    """How good a flow is at its own temperature and above; `late` are frames that it was not trained on."""
    q, kept = flow.internals.of_frames(late.positions[:: max(1, len(late) // 20_000)])
    with torch.no_grad():
        loss = likelihood_loss(flow, q[kept], torch.full((int(kept.sum()),), HOT), generator=seeded(0))
    found = {"held_out_nll": float(loss.mean()), "n_draws": n}
    for kelvin in (HOT, WARM):
        ensemble = tsf.draw(flow, energy, temperature=kelvin, n=n, generator=seeded(99))
        member = torch.tensor(alpha_left(phi_psi(ensemble.positions, flow.molecule)[0])).double()
        w = torch.softmax(ensemble.log_weights.double(), 0)
        raw, exact = member.mean(), w @ member
        pull = member / raw - len(w) * w * (member / exact - 1.0) - 1.0
        found |= {
            f"ess_{kelvin:.0f}": ensemble.ess,
            f"largest_weight_share_{kelvin:.0f}": ensemble.largest_weight_share,
        }
        found |= {f"alpha_left_{kelvin:.0f}": float(torch.log(raw / exact))}
        found |= {f"alpha_left_error_{kelvin:.0f}": float(pull.std() / len(w) ** 0.5)}
    return found


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def place(out: Path, row: str, seed: int) -> Path:
    """Directory of a training."""
    return out / f"{row.replace(', ', '_').replace(' ', '-')}_{seed}"


def result(row: str, seed: int, energy: tsf.BatchedEnergy, options: argparse.Namespace) -> dict:
    """What was measured, now or before."""
    path = options.out / f"{row}_{seed}.json"
    if path.exists() and f"alpha_left_{WARM:.0f}" in (found := json.loads(path.read_text("utf-8"))):
        return found
    if not path.exists():
        found = learn(row, seed, frames_of(row, options), energy, options)
    flow = tsf.load_flow(place(options.out, row, seed) / "flow.tsf")
    _, late = frames_of("default", options).split(TrainingSettings().held_out)
    found |= judge(flow, late, energy, options.draws)
    write_text(path, json.dumps(found, indent=1))
    return found


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
    titles = ["row", "seed", "ESS at 600 K", "at 900 K", "nll of held-out frames", "alpha_L at 600 K, kT", "at 900 K"]
    titles += ["parameters", "cpu seconds"]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for seed in options.seeds:
        for row in options.rows:
            m = result(row, seed, energy, options)
            left = [f"{m[f'alpha_left_{t}']:+.3f} ± {m[f'alpha_left_error_{t}']:.3f}" for t in (600, 900)]
            print(
                f"| {row} | {seed} | {100 * m['ess_600']:.1f} % | {100 * m['ess_900']:.1f} % "
                f"| {m['held_out_nll']:.4f} | {' | '.join(left)} | {m['n_parameters']:,} | {m['cpu_seconds']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
