"""What tuning the sampling temperature is worth to flows of alanine dipeptide trained on 300 to 60,000 frames.

    python benchmarks/flow_tuning.py --out flow_tuning              # everything: hours on one core
    python benchmarks/flow_tuning.py --out quick --sizes 300 --pool 1280 --held-out 1280 --steps 20 --draws 2000

Flows are trained at 600 K, by likelihood of the frames alone and with the usual energy loss as well. The energy loss
shows a flow what the frames do not, and so hides what tuning mends. Each is tuned for 300 and 600 K, with held-out
frames at 600 K, and drawn from at t = 1, t* and t': ESS of the weighted draws, and energies and Ramachandran map of the
draws as they come, against the reference. Results are kept, one file for each flow, and training goes on from where it
was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

import openmm_tsf as tsf
from openmm_tsf.analysis import alpha_left, kl_divergence, phi_psi, ramachandran_histogram, total_variation
from openmm_tsf.canvas import save, small_print
from openmm_tsf.dynamics import simulate
from openmm_tsf.files import write_text
from openmm_tsf.flow import FlowSettings, build_flow
from openmm_tsf.flow_tuning import tune_flow
from openmm_tsf.flow_tuning_plots import tuning_figure
from openmm_tsf.plotting import ramachandran
from openmm_tsf.reference import ReferenceState, load_reference
from openmm_tsf.series import of_ensemble, of_reference
from openmm_tsf.settings import stage_seed
from openmm_tsf.training import TrainingSettings, train
from openmm_tsf.trajectories import Frames

SIZES = (300, 1000, 10_000, 60_000)
TRAINING = {"likelihood": {"energy_weight": 0.0, "estimator": "plain"}, "energies": {}}
"""Settings of the training that differ from the default."""
TEMPERATURES = (300.0, 600.0)
N_WALKERS = 128


def frames_of(options: argparse.Namespace) -> tuple[Frames, Frames]:
    """Frames to train on, in an order without time so that fewer are worth fewer and no more; and held-out ones."""
    rows = -(-(options.pool + options.held_out) // N_WALKERS) * N_WALKERS
    frames = simulate(
        tsf.alanine_dipeptide(), temperature=600.0, n_frames=rows, spacing_fs=100.0, n_walkers=N_WALKERS,
        seed=stage_seed(0, "flow tuning"), directory=options.out / "frames",
    )  # fmt: skip
    early, late = frames.split(options.held_out / rows)
    order = np.random.default_rng(1).permutation(len(early))
    return Frames(early.positions[order], early.temperatures[order]), late


def compared(ensemble: tsf.Ensemble, state: ReferenceState, molecule: tsf.Molecule) -> dict[str, float]:
    """Draws as they come, and reweighted, against the reference."""
    angles = phi_psi(ensemble.positions, molecule)
    energy = ensemble.energy.numpy()
    mean, error = ensemble.mean(ensemble.energy)
    shares = {"raw": None, "reweighted": torch.softmax(ensemble.log_weights, 0).numpy()}
    maps = {name: ramachandran_histogram(*angles, weights) for name, weights in shares.items()}
    members = alpha_left(angles[0])
    return {
        "temperature": ensemble.temperature, "run_at": ensemble.sampling_temperature, "ess": ensemble.ess,
        "largest_weight_share": ensemble.largest_weight_share,
        "raw_median_energy": float(np.median(energy)),
        "raw_energy_beyond_median": float(np.mean(energy > _median(state))),
        "mean_energy": float(mean), "mean_energy_error": float(error), "reference_energy": state.mean_energy,
        "raw_kl_ramachandran": kl_divergence(state.ramachandran, maps["raw"], 1e-5),
        **{f"{name}_tv_ramachandran": total_variation(state.ramachandran, h) for name, h in maps.items()},
        "raw_alpha_left": float(members.mean()), "reference_alpha_left": state.alpha_left,
    }  # fmt: skip


def _median(state: ReferenceState) -> float:
    """Of the energies of the reference [kJ/mol]."""
    share = np.cumsum(state.energy_histogram) / np.sum(state.energy_histogram)
    return float(np.interp(0.5, share, state.energy_edges[1:]))


def trained(
    how: str, size: int, frames: Frames, energy: tsf.BatchedEnergy, seed: int, options: argparse.Namespace
) -> tuple[tsf.Flow, dict[str, Any]]:
    """A flow of so many frames, read if it is there, and what its training was like."""
    folder = options.out / f"{how}_{size}_{seed}"
    settings = replace(TrainingSettings(steps=options.steps), **TRAINING[how])
    part = Frames(frames.positions[:size], frames.temperatures[:size])
    path, record = folder / "flow.tsf", folder / "training.json"
    if not record.exists():
        generator = torch.Generator().manual_seed(stage_seed(seed, "flow"))
        flow = build_flow(
            tsf.alanine_dipeptide(), part.split(settings.held_out)[0], FlowSettings(), generator=generator
        )
        begin = time.process_time()
        history = train(flow, part, energy, settings, directory=folder, seed=stage_seed(seed, "train"))
        tsf.save_flow(flow, path)
        facts = {"best_step": history.best_step, "cpu_seconds": time.process_time() - begin}
        write_text(record, json.dumps(facts))
    return tsf.load_flow(path), json.loads(record.read_text("utf-8"))


def measure(
    how: str,
    size: int,
    frames: Frames,
    held_out: Frames,
    energy: tsf.BatchedEnergy,
    seed: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Train one flow, tune it for each temperature, and compare what it draws before and after."""
    flow, training = trained(how, size, frames, energy, seed, options)
    reference, found = load_reference(), {}
    for kelvin in TEMPERATURES:
        name = f"{how}_{size}_{seed}_{kelvin:g}K"
        tuning = tune_flow(
            flow, energy, kelvin, frames=held_out if kelvin == flow.training_temperature else None,
            n_checked=options.draws, generator=torch.Generator().manual_seed(7),
        ).facts()  # fmt: skip
        save(tuning_figure(tuning, note=small_print(seed)), options.out / f"tuning_{name}.png")
        rows, panels = {}, []
        roots = {"as trained": {"value": 1.0}, "t*": tuning["t_star"], "t'": tuning["t_prime"]}
        for label, root in roots.items():
            if root is None:
                continue
            ensemble = tsf.draw(
                flow, energy, temperature=kelvin, at=root["value"] * kelvin, n=options.draws,
                generator=torch.Generator().manual_seed(99),
            )  # fmt: skip
            rows[label] = compared(ensemble, reference.at(kelvin), flow.molecule)
            raw, run_at = of_ensemble(ensemble, flow.molecule)[0], round(ensemble.sampling_temperature)
            panels.append(replace(raw, label=label, temperature=float(run_at)))
        panels.append(of_reference(reference, kelvin))
        note = f"Trained on {size:,} frames at 600 K, {how}. {small_print(seed)}"
        save(ramachandran(panels, note=note), options.out / f"maps_{name}.png")
        found[f"{kelvin:g}"] = {"tuning": tuning, "draws": rows}
    facts = {"training": how, "frames": size, "seed": seed, "steps": options.steps, "draws": options.draws}
    return {**facts, **training, "temperatures": found}


def table(results: list[dict[str, Any]]) -> str:
    """All of it as markdown."""
    lines = [
        "| training | frames | seed | T, K | t* | t' | K - C | run at | ESS | raw median energy | reference mean "
        "| raw KL of map | raw TV of map | reweighted TV |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for made in results:
        for kelvin, found in made["temperatures"].items():
            tuning = found["tuning"]
            roots = [_shown(tuning[name]) for name in ("t_star", "t_prime")]
            if tuning["diagnostics"]["target_mean_from"] == "reweighting":
                roots[1] += f" ({tuning['n_effective']:.0f} effective draws)"
            low, high = tuning["diagnostics"]["difference_interval"]
            for label, d in found["draws"].items():
                lines.append(
                    f"| {made['training']} | {made['frames']:,} | {made['seed']} | {kelvin} | {roots[0]} | {roots[1]} "
                    f"| {low:.2f} ... {high:.2f} | {label}: {d['run_at']:.0f} K | {100 * d['ess']:.2g} % "
                    f"| {d['raw_median_energy']:.1f} | {d['reference_energy']:.1f} | {d['raw_kl_ramachandran']:.3f} "
                    f"| {d['raw_tv_ramachandran']:.3f} | {d['reweighted_tv_ramachandran']:.3f} |"
                )
    return "\n".join(lines) + "\n"


def _shown(root: dict[str, Any] | None) -> str:
    if root is None:
        return "none"
    low, high = root["interval"]
    return f"{root['value']:.3f}" + ("" if low is None or high is None else f" [{low:.3f}, {high:.3f}]")


def main() -> None:
    """Do what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of results")
    parser.add_argument("--training", nargs="+", default=list(TRAINING), choices=TRAINING)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of frames")
    parser.add_argument("--pool", type=int, default=max(SIZES), help="frames that these are taken from")
    parser.add_argument("--held-out", type=int, default=12_800, help="further frames, for t' at 600 K")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--draws", type=int, default=20_000)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    warnings.filterwarnings("ignore", ".* out of reach of this flow")  # the table has the ESS
    options.out.mkdir(parents=True, exist_ok=True)
    too_many = [size for size in options.sizes if size > options.pool]
    if too_many:
        parser.error(f"{too_many[0]:,} frames are more than the pool of {options.pool:,}")
    molecule = tsf.alanine_dipeptide()
    energy = tsf.BatchedEnergy(molecule.system, molecule.positions)
    frames, held_out = frames_of(options)
    results = []
    for seed in options.seeds:
        for how in options.training:
            for size in options.sizes:
                path = options.out / f"{how}_{size}_{seed}.json"
                if not path.exists():
                    made = measure(how, size, frames, held_out, energy, seed, options)
                    write_text(path, json.dumps(made, indent=1, allow_nan=False))
                results.append(json.loads(path.read_text("utf-8")))
                write_text(options.out / "table.md", table(results))
    print(table(results))


if __name__ == "__main__":
    main()
