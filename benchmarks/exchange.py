"""What the flow's move is worth in replica exchange: alpha_L of alanine dipeptide at 300 K per energy evaluation.

    python benchmarks/exchange.py --out exchange                        # the three samplers, 2e7 evaluations each
    python benchmarks/exchange.py --out exchange --long 2e8             # plain samplers longer, for their own errors
    python benchmarks/exchange.py --out exchange --openmmtools 1e6      # the same inside openmmtools
    python benchmarks/exchange.py --costs                               # time and storage of FlowMove

Langevin dynamics at 300 K; parallel tempering on five temperatures from 300 to 600 K; the same with 16 draws of the
flow every 20 steps, and with 4 every 2 steps; all at 1 fs. Every run goes on where it stopped. Independent samples are
p(1 - p)/variance of the share p of alpha_L at 300 K, with the variance of block means about the p of the shipped
reference; once for many blocks and once for half as many, which agree if blocks are long enough. Transitions are
passages of phi between its cores, of each replica.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import itertools

import numpy as np
import torch

import openmm_tsf as tsf
from openmm_tsf.console import Bar
from openmm_tsf.flow_steps import FlowSteps
from openmm_tsf.ladder import geometric_ladder
from openmm_tsf.langevin import BatchedLangevin
from openmm_tsf.records import ExchangeRecord
from openmm_tsf.reference import load_reference
from openmm_tsf.tempering import BatchedTempering
from openmm_tsf.tempering_storage import run_tempering
from openmm_tsf.torsions import alpha_left, count_transitions, phi_psi

LOWEST, HIGHEST, LEVELS = 300.0, 600.0, 5
REPLICAS = 16
SETTINGS = {"plain": (100, 0), "flow": (20, 16), "flow often": (2, 4)}
"""Steps of dynamics and draws of the flow in an iteration."""
N_BLOCKS = 20
TRAINING = 8_362_032
"""Energy evaluations of the shipped flow: 7,360,000 steps of dynamics (128 walkers, 20 ps to equilibrate and 37.5 ps
for 240,000 frames) and 1,002,032 of the energy loss: `n_energy_evaluations_simulate` and `_train` in metrics.json."""


def main() -> None:
    """Run what is asked for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("exchange"))
    parser.add_argument("--evaluations", type=float, default=2e7)
    parser.add_argument("--long", type=float, default=None)
    parser.add_argument("--openmmtools", type=float, default=None)
    parser.add_argument("--only", choices=("langevin", *SETTINGS), default=None)
    parser.add_argument("--costs", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if options.costs:
        costs()
        return
    options.out.mkdir(parents=True, exist_ok=True)
    if options.openmmtools is not None:
        rows = [with_openmmtools(name, options) for name in SETTINGS]
    else:
        names = (options.only,) if options.only else ("langevin", *SETTINGS)
        rows = [batched(name, options) for name in names]
    show(rows)
    ending = "openmmtools" if options.openmmtools is not None else "batched"
    (options.out / f"exchange_{ending}.json").write_text(json.dumps(rows, indent=2) + "\n")


def batched(name: str, options: argparse.Namespace) -> dict[str, float | str]:
    """One of the samplers as a batch; its figures."""
    n = options.long if options.long and name in ("langevin", "plain") else options.evaluations
    flow = tsf.pretrained("ala2")
    if name == "langevin":
        return langevin(flow.molecule, round(n), options)
    n_steps, n_draws = SETTINGS[name]
    steps = FlowSteps(n_proposals=n_draws or 1)
    tempering = BatchedTempering(
        flow.molecule, geometric_ladder(LOWEST, HIGHEST, LEVELS), flow=flow if n_draws else None, steps=steps,
        n_replicas_per_temperature=REPLICAS, n_dynamics_steps=n_steps, seed=options.seed,
    )  # fmt: skip
    each = n_steps + (steps.n_energies if n_draws else 0)
    n_iterations = round(n / each / tempering.n_walkers)
    record = run_tempering(tempering, options.out / name.replace(" ", "_"), n_iterations, progress=Bar(name))
    return figures(name, record)


def langevin(molecule: tsf.Molecule, n: int, options: argparse.Namespace) -> dict[str, float | str]:
    """Dynamics at 300 K alone, as many walkers as the ladders have."""
    walkers = REPLICAS * LEVELS
    energy = tsf.BatchedEnergy(molecule.system, molecule.positions, compile=True)
    dynamics = BatchedLangevin(molecule.system, energy, timestep_fs=1.0, friction_per_ps=1.0)
    generator = torch.Generator().manual_seed(options.seed)
    state = dynamics.start(np.array(molecule.positions), torch.full((walkers,), LOWEST), generator=generator)
    begin, phis, tell = time.monotonic(), [], Bar("langevin")
    n_steps, _ = SETTINGS["plain"]
    n_rows = n // (n_steps * walkers)
    for row in range(n_rows):
        state = dynamics.run(state, n_steps, generator=generator)
        phis.append(phi_psi(state.positions.permute(2, 0, 1), molecule)[0])
        tell(row + 1, n_rows, "")
    phi, levels = np.array(phis), np.zeros((n_rows, walkers), dtype=int)
    return row_of("langevin", phi, levels, n_rows * walkers * n_steps, time.monotonic() - begin, {})


def figures(name: str, record: ExchangeRecord) -> dict[str, float | str]:
    """The figures of a record whose every iteration has a stored frame."""
    flat = record.positions.reshape(-1, *record.positions.shape[2:])
    phi = phi_psi(flat, tsf.alanine_dipeptide())[0].reshape(record.levels.shape)
    return row_of(name, phi, record.levels, record.n_energy_evaluations, record.seconds, record.move_counts[0])


def row_of(
    name: str, phi: np.ndarray, levels: np.ndarray, n_evaluations: int, seconds: float, counts: dict
) -> dict[str, float | str]:
    """Figures from phi (I, R) and levels (I, R); the first tenth is left out."""
    first = len(phi) // 10
    phi, levels, used = phi[first:], levels[first:], n_evaluations * (1 - first / len(phi)) / 1e6
    p = load_reference("ala2").at(LOWEST).alpha_left
    cold, left = levels == 0, alpha_left(phi)
    variance, doubled = (_variance(left & cold, cold, p, n) for n in (N_BLOCKS, N_BLOCKS // 2))
    return {
        "sampler": name, "evaluations": n_evaluations, "seconds": seconds,
        "transitions per 1e6": count_transitions(phi.ravel(), phi.shape[1]) / used,
        "alpha_L share": float((left & cold).sum() / cold.sum()), "error": np.sqrt(variance),
        "frames at 300 K per 1e6": float(cold.sum() / used),
        "independent samples per 1e6": p * (1 - p) / variance / used,
        "  with half as many blocks": p * (1 - p) / doubled / used,
        "acceptance at 300 K": counts["independence_accepted"] / counts["independence_proposed"] if counts else np.nan,
    }  # fmt: skip


def _variance(left: np.ndarray, cold: np.ndarray, p: float, n_blocks: int) -> float:
    """Of the share of `left` among `cold`, (I, R) masks, from blocks of iterations about the known p."""
    edges = np.linspace(0, len(cold), n_blocks + 1).astype(int)
    shares = np.array([left[a:b].sum() / cold[a:b].sum() for a, b in itertools.pairwise(edges)])
    return float(((shares - p) ** 2).mean() / n_blocks)


def with_openmmtools(name: str, options: argparse.Namespace) -> dict[str, float | str]:
    """Parallel tempering inside openmmtools, one replica at each temperature."""
    from openmm_tsf.exchange import FlowMove, read_exchange
    from openmm_tsf.exchange.sampler import most_energies, run_openmmtools

    logging.disable(logging.WARNING)
    n_steps, n_draws = SETTINGS[name]
    move = FlowMove("ala2", n_proposals=n_draws) if n_draws else None
    each = most_energies(n_steps, FlowSteps(n_proposals=n_draws) if n_draws else None)
    storage, clock = options.out / f"{name}.nc", options.out / f"{name}.seconds"
    begin = time.monotonic()
    run_openmmtools(
        tsf.alanine_dipeptide(), geometric_ladder(LOWEST, HIGHEST, LEVELS), storage,
        round(options.openmmtools / each / LEVELS), move=move, n_dynamics_steps=n_steps, timestep_fs=1.0,
        friction_per_ps=1.0, store_every=1, seed=options.seed, progress=Bar(f"openmmtools, {name}"),
    )  # fmt: skip
    seconds = time.monotonic() - begin + (float(clock.read_text()) if clock.exists() else 0.0)
    clock.write_text(f"{seconds}\n")
    record = read_exchange(storage)
    return figures(name, replace(record, seconds=seconds, n_energy_evaluations=each * record.levels.size))


def costs() -> None:
    """Time of FlowMove beside 100 Langevin steps, and bytes that it adds to an iteration's storage."""
    logging.disable(logging.WARNING)
    import yaml
    from openmm import unit
    from openmmtools import cache, mcmc, states, utils

    from openmm_tsf.energy.platforms import choose_platform, on_one_core

    flow = tsf.pretrained("ala2")
    platform, properties = choose_platform("CPU")
    contexts = cache.ContextCache(platform=platform, platform_properties=properties)
    x, _ = flow.at(300.0).sample(8, generator=torch.Generator().manual_seed(1))
    ladder = geometric_ladder(300.0, 600.0, 8)
    thermodynamic = [states.ThermodynamicState(flow.molecule.system, t * unit.kelvin) for t in ladder]
    replicas = [states.SamplerState(row.numpy() * unit.nanometer) for row in x]
    flow_move = tsf.FlowMove("ala2", n_proposals=16)
    langevin = mcmc.LangevinDynamicsMove(timestep=1.0 * unit.femtosecond, n_steps=100)
    energy = tsf.BatchedEnergy(flow.molecule.system, flow.molecule.positions)
    some = x[:1].repeat(16, 1, 1)
    times: dict[str, list[float]] = {"FlowMove": [], "100 Langevin steps": [], "its energies": []}
    pinned = on_one_core()
    pinned.__enter__()  # until the end: the dynamics at its best
    for round_ in range(12):
        for name, work in (
            (
                "FlowMove",
                lambda: [flow_move.apply(t, s, contexts) for t, s in zip(thermodynamic, replicas, strict=True)],
            ),
            (
                "100 Langevin steps",
                lambda: [langevin.apply(t, s, contexts) for t, s in zip(thermodynamic, replicas, strict=True)],
            ),
            ("its energies", lambda: [energy(batch) for _ in replicas for batch in (some[:1], some)]),
        ):
            begin = time.perf_counter()
            work()
            if round_ >= 2:
                times[name].append(time.perf_counter() - begin)
    print("8 replicas, one iteration, median of 10 in turn:")
    for name, values in times.items():
        print(f"  {name:20} {1e3 * np.median(values):8.1f} ms")
    print(f"  bytes of the move in an iteration's storage: {len(yaml.dump(utils.serialize(flow_move)))}")


def show(rows: list[dict[str, float | str]]) -> None:
    """A table, and how samplers compare with plain parallel tempering."""
    for key in rows[0]:
        print(f"{key:28}" + "".join(f"{row[key]:>16}" if key == "sampler" else f"{row[key]:16.6g}" for row in rows))
    by_name = {row["sampler"]: row["independent samples per 1e6"] for row in rows}
    for name in ("flow", "flow often"):
        if {"plain", name} <= by_name.keys():
            plain, flow = by_name["plain"], by_name[name]
            print(
                f"{name}: {flow / plain:.0f} times the independent samples of plain tempering per evaluation; training"
            )
            print(
                f"  took {TRAINING:,} and pays for itself in a run of {TRAINING * plain / (flow - plain):,.0f}; with it"
            )
            charged = (f"{flow * n / (n + TRAINING) / plain:.0f} in {n:.0e}" for n in (1e6, 1e7, 1e8))
            print(f"  charged: {', '.join(charged)}")


if __name__ == "__main__":
    main()
