"""What becomes of velocities after a Monte Carlo move decides what is sampled: alanine dipeptide at 600 K.

    python benchmarks/velocities.py

LangevinMiddle dynamics with a move every so many steps, and the means just before the moves. Velocities are kept as
they are, drawn anew from Maxwell-Boltzmann, or carried over at the time of the positions, which is what the package
does. Without constraints (1 fs) a move is four draws of the shipped flow. With rigid X-H bonds (2 fs) no flow ships:
there a walker stays where it is, and that must change nothing.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

import openmm_tsf as tsf
from openmm_tsf.flow_steps import FlowSteps, PlacedFlow
from openmm_tsf.langevin import BatchedLangevin, LangevinState
from openmm_tsf.units import kT

TEMPERATURE, WALKERS, STEPS = 600.0, 128, 30_000
HOW = ("no moves", "carried", "kept", "drawn anew")


def main() -> None:
    """Run everything and print a table."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    head = ("constraints", "every", "velocities", "<U>, kJ/mol", "bonds, kJ/mol", "kinetic, K")
    print("{:>12}{:>7}{:>13}{:>20}{:>18}{:>14}".format(*head))
    for constraints, every in ((None, 20), (None, 100), ("HBonds", 50)):
        for how in HOW:
            if constraints and how == "kept":
                continue  # nothing moves, so this is the same as no moves
            show(constraints, every, how)


def show(constraints: str | None, every: int, how: str) -> None:
    """One row: means and standard errors, walkers being what is independent."""
    flow = tsf.pretrained("ala2").requires_grad_(False)
    molecule = flow.molecule if constraints is None else tsf.alanine_dipeptide(constraints=constraints)
    energy = tsf.BatchedEnergy(molecule.system, molecule.positions, compile=True)
    timestep = 1.0 if constraints is None else 2.0
    dynamics = BatchedLangevin(molecule.system, energy, timestep_fs=timestep, friction_per_ps=1.0)
    generator = torch.Generator().manual_seed(1)
    x, _ = flow.at(TEMPERATURE).sample(WALKERS, generator=generator)
    target, steered = tsf.Target(energy, kT(TEMPERATURE)), flow.at(TEMPERATURE)
    x = FlowSteps(n_proposals=16).run(target.at(x), target, PlacedFlow(steered, x), generator=generator)[0].x
    state = dynamics.start(x.numpy(), torch.full((WALKERS,), TEMPERATURE), generator=generator)
    rows = []
    for _ in range(STEPS // every):
        state = dynamics.run(state, every, generator=generator)
        here = state.positions.permute(2, 0, 1).double()
        terms = energy.term_energies(here)
        total = torch.stack(list(terms.values())).sum(0)
        rows.append(torch.stack((total, terms["HarmonicBondForce"], dynamics.kinetic_temperatures(state).double())))
        if how != "no moves":
            new = here
            if constraints is None:
                walkers = target.at(here)
                new = FlowSteps(n_proposals=4).run(walkers, target, PlacedFlow(steered, here), generator=generator)[0].x
            state = moved(dynamics, state, how, here, new, generator)
    used = torch.stack(rows)[len(rows) // 10 :].mean(0).numpy()  # of each walker
    mean, error = used.mean(1), used.std(1) / np.sqrt(WALKERS)
    cells = [f"{a:.2f} +- {b:.2f}" for a, b in zip(mean, error, strict=True)]
    print(f"{constraints!s:>12}{every:>7}{how:>13}{cells[0]:>20}{cells[1]:>18}{cells[2]:>14}", flush=True)


def moved(
    dynamics: BatchedLangevin, state: LangevinState, how: str, here: torch.Tensor, new: torch.Tensor,
    generator: torch.Generator,
) -> LangevinState:  # fmt: skip
    """The state after a move of all walkers from `here` to `new`."""
    columns = new.permute(1, 2, 0)
    if how == "carried":
        which = (new != here).flatten(1).any(1) if not len(dynamics.constraints) else torch.ones(WALKERS).bool()
        return dynamics.moved(state, columns, which, generator=generator)
    if how == "kept":
        return dynamics.resume(columns, state.velocities, state.temperatures, state.step)
    return dynamics.start(new.numpy(), state.temperatures, generator=generator)


if __name__ == "__main__":
    main()
