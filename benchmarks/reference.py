"""Long reference for alanine dipeptide (ff96 + OBC1, unconstrained): biased replica exchange in batches.

    python benchmarks/reference.py run --minutes 60 --out DIR       # sample; the same command goes on where it stopped
    python benchmarks/reference.py analyse --out DIR --write FILE   # MBAR, error bars, the shipped .npz
    python benchmarks/reference.py check --temperature 600 --timestep 1 --minutes 2   # plain dynamics, no bias

Hundreds of walkers between 300 and 600 K share one fixed bias V(phi, psi), learned first, which makes phi and psi
diffuse freely, and exchange temperatures. U and V are recorded apart, and MBAR over all states takes frames back to
exp(-U/kT) exactly. `run --part 1` samples beside `run --part 0`, on another core, with the bias that part 0 learned.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import openmm
import reference_analysis
import torch
from reference_analysis import BOLTZMANN
from scipy.ndimage import gaussian_filter

import openmm_tsf as tsf
from openmm_tsf.geometry import dihedrals
from openmm_tsf.langevin import BatchedLangevin, LangevinState

TEMPERATURES = np.geomspace(300.0, 600.0, 5)
WALKERS_PER_TEMPERATURE = 64
SEED = 2026
TIMESTEP_FS, FRICTION_PER_PS = 1.0, 1.0
FRAME_STEPS, SWAP_STEPS, CHUNK_STEPS = 40, 80, 20_000
LEARNING_ROUNDS, LEARNING_STEPS = 8, 10_000
BIAS_SIZE, BIAS_CAP, BIAS_SHARE = 36, 30.0, 0.85
DIHEDRALS = {"phi": (4, 6, 8, 14), "psi": (6, 8, 14, 16), "omega_1": (1, 4, 6, 8), "omega_2": (8, 14, 16, 18)}
CENTRES = ((8, 6, 14, 10), (1, 0, 2, 3), (10, 11, 12, 13), (18, 19, 20, 21))


def rows(x: torch.Tensor) -> torch.Tensor:
    """Positions (walkers, atoms, 3) of positions (atoms, 3, walkers)."""
    return x.permute(2, 0, 1)


def handedness(positions: np.ndarray) -> np.ndarray:
    """Signs (..., 4) of CA and the three methyl carbons, hydrogens labelled."""
    triples = []
    for centre, i, j, k in CENTRES:
        u, v, w = (positions[..., atom, :] - positions[..., centre, :] for atom in (i, j, k))
        triples.append(np.sum(u * np.cross(v, w), axis=-1))
    return np.sign(np.stack(triples, axis=-1))


class Biased:
    """Dynamics of all walkers in U + V, with V a table over (phi, psi).

    Args:
        table: V [kJ/mol], (BIAS_SIZE, BIAS_SIZE), nodes (phi, psi) at 2 pi i / BIAS_SIZE.
        timestep: [fs].
    """

    def __init__(self, table: np.ndarray, timestep: float = TIMESTEP_FS) -> None:
        self.molecule = tsf.alanine_dipeptide()
        self.isomer = handedness(self.molecule.positions)
        cmap = openmm.CMAPTorsionForce()
        cmap.addMap(BIAS_SIZE, table.T.ravel())
        cmap.addTorsion(0, *DIHEDRALS["phi"], *DIHEDRALS["psi"])
        system, alone = self.molecule.system, openmm.System()
        for _ in range(self.molecule.n_atoms):
            alone.addParticle(1.0)
        alone.addForce(openmm.XmlSerializer.clone(cmap))
        system.addForce(cmap)
        energy = tsf.BatchedEnergy(system, self.molecule.positions, compile=True)
        self.bias = tsf.BatchedEnergy(alone, self.molecule.positions, compile=False)
        self.dynamics = BatchedLangevin(system, energy, timestep_fs=timestep, friction_per_ps=FRICTION_PER_PS)

    def start(self, generator: torch.Generator) -> LangevinState:
        """Every walker at the reference geometry."""
        levels = np.tile(TEMPERATURES, WALKERS_PER_TEMPERATURE)
        return self.dynamics.start(self.molecule.positions, levels, generator=generator)

    def run(
        self, state: LangevinState, n_steps: int, generator: torch.Generator
    ) -> tuple[LangevinState, dict[str, np.ndarray]]:
        """The state n_steps later; frames every FRAME_STEPS as arrays (frames, walkers) in kJ/mol and rad."""
        quartets = torch.tensor(list(DIHEDRALS.values()))
        frames, swaps = [], np.zeros(2, dtype=int)
        for frame in range(n_steps // FRAME_STEPS):
            state = self.dynamics.run(state, FRAME_STEPS, generator=generator)
            level = np.searchsorted(TEMPERATURES, state.temperatures.numpy() - 1e-6).astype(np.int8)
            x, bias = rows(state.positions), self.bias.evaluate(state.positions)[0]
            angles = dict(zip(DIHEDRALS, dihedrals(x, quartets).T.numpy(), strict=True))
            same = (handedness(x.numpy()) == self.isomer).all(-1)
            found = {"energy": (state.energies - bias).numpy(), "bias": bias.numpy(), "state": level}
            frames.append(angles | found | {"same_isomer": same})
            if (frame + 1) % (SWAP_STEPS // FRAME_STEPS) == 0:
                state, info = self.dynamics.swap(state, generator=generator)
                swaps += [int(info.n_accepted.sum()), int(info.n_tried.sum())]
        return state, {key: np.stack([frame[key] for frame in frames]) for key in frames[0]} | {"swaps": swaps}


def learned_bias(table: np.ndarray, frames: dict[str, np.ndarray]) -> np.ndarray:
    """A flatter bias [kJ/mol] (BIAS_SIZE, BIAS_SIZE): add kT ln of the sampled density, cap the depth it fills."""
    width = 2.0 * np.pi / BIAS_SIZE
    index = [np.rint(frames[name].ravel() / width).astype(int) % BIAS_SIZE for name in ("phi", "psi")]
    counts = np.zeros((BIAS_SIZE, BIAS_SIZE))
    np.add.at(counts, tuple(index), 1.0)
    density = gaussian_filter(counts, 1.0, mode="wrap") + 0.3
    new = table + BIAS_SHARE * BOLTZMANN * TEMPERATURES[2] * np.log(density)
    return np.clip(new - new.max() + BIAS_SHARE * BIAS_CAP, 0.0, None)


def learn(generator: torch.Generator) -> tuple[np.ndarray, LangevinState]:
    """The fixed bias [kJ/mol], from a few rounds of sampling and flattening, and the walkers after them."""
    table, state = np.zeros((BIAS_SIZE, BIAS_SIZE)), None
    for number in range(LEARNING_ROUNDS):
        biased = Biased(table)
        if state is None:
            state = biased.start(generator)
        else:
            state = biased.dynamics.resume(state.positions, state.velocities, state.temperatures)
        state, frames = biased.run(state, LEARNING_STEPS, generator)
        table = learned_bias(table, frames)
        print(f"round {number}: phi > 0 share of frames {np.mean(frames['phi'] > 0):.3f}", flush=True)
    return table, state


def write_atomic(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz so that a name is there only with all of its content."""
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **arrays)
    os.replace(partial, path)


def saved(state: LangevinState) -> dict[str, np.ndarray]:
    """What `restored` needs."""
    kept = {name: getattr(state, name).numpy() for name in ("positions", "velocities", "temperatures")}
    return {f"last_{name}": value for name, value in kept.items()}


def restored(biased: Biased, arrays: dict[str, np.ndarray]) -> LangevinState:
    """The state that was `saved`."""
    names = ("positions", "velocities", "temperatures")
    return biased.dynamics.resume(*(torch.from_numpy(arrays[f"last_{name}"]) for name in names))


def run(out: Path, minutes: float, part: int) -> None:
    """Sample into out/chunk_<part>_*.npz for some minutes, going on from the last whole chunk."""
    begun = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    number = len(list(out.glob(f"chunk_{part}_?????.npz")))
    generator = torch.Generator().manual_seed(SEED + 1000 * number + 1_000_000 * part)
    if not (out / "bias.npz").exists():
        if part != 0:
            raise SystemExit("part 0 has not learned the bias yet")
        table, state = learn(generator)
        settings = {"seed": SEED, "timestep_fs": TIMESTEP_FS, "hydrogen_mass_amu": 1.008, "openmm": openmm.__version__}
        settings |= {"friction_per_ps": FRICTION_PER_PS, "frame_steps": FRAME_STEPS, "swap_steps": SWAP_STEPS}
        settings |= {"sampled_temperatures": TEMPERATURES.tolist(), "chunk_steps": CHUNK_STEPS}
        settings |= {"walkers_per_temperature": WALKERS_PER_TEMPERATURE, "engine": "BatchedEnergy, float32"}
        (out / "settings.json").write_text(json.dumps(settings | {"torch": torch.__version__}))
        write_atomic(out / "bias.npz", {"table": table, **saved(state)})
    start = dict(np.load(out / "bias.npz"))
    biased = Biased(start["table"])
    last = dict(np.load(out / f"chunk_{part}_{number - 1:05d}.npz")) if number else start
    state = restored(biased, last)
    while time.monotonic() - begun < 60.0 * minutes:
        state, frames = biased.run(state, CHUNK_STEPS, generator)
        write_atomic(out / f"chunk_{part}_{number:05d}.npz", frames | saved(state))
        left, swaps = np.mean(frames["phi"] > 0), frames["swaps"]
        print(f"chunk {number}: {time.monotonic() - begun:.0f} s, phi > 0 {left:.3f}, swaps {swaps}", flush=True)
        number += 1


def bond_terms(
    x: np.ndarray, gradient: np.ndarray, bonds: list[tuple[int, int, float]]
) -> tuple[np.ndarray, np.ndarray]:
    """What makes up the configurational temperature of bonds, the stiffest coordinates, where a time step errs first.

    For v = (r - r0) grad r of a bond, integration by parts gives <div v> = <v . grad U>/kT exactly, with
    div v = 2 + 4 (r - r0)/r and v . grad U = (r - r0) (grad_j U - grad_i U) . (x_j - x_i)/r; summed over bonds.

    Args:
        x, gradient: (walkers, atoms, 3) in nm and kJ/mol/nm; bonds: atoms and length r0 [nm].

    Returns:
        v . grad U [kJ/mol] and div v of each walker.
    """
    work, divergence = np.zeros(len(x)), np.zeros(len(x))
    for i, j, length in bonds:
        vector = x[:, j] - x[:, i]
        distance = np.linalg.norm(vector, axis=-1)
        work += (distance - length) * np.sum((gradient[:, j] - gradient[:, i]) * vector, axis=-1) / distance
        divergence += 2.0 + 4.0 * (distance - length) / distance
    return work, divergence


def observed(dynamics: BatchedLangevin, state: LangevinState, bonds: list) -> np.ndarray:
    """Of each walker (rows): U, U^2, alpha_L, phi > 0, the two terms of bonds, kinetic temperature."""
    x = rows(state.positions).double().numpy()
    phi = dihedrals(rows(state.positions), torch.tensor([DIHEDRALS["phi"]])).numpy()[:, 0]
    energies = state.energies.double().numpy()
    terms = bond_terms(x, -rows(state.forces).double().numpy(), bonds)
    kinetic = dynamics.kinetic_temperatures(state).double().numpy()
    return np.array([energies, energies**2, (phi > 0) & (phi < 2.4), phi > 0, *terms, kinetic])


def figures(means: np.ndarray) -> dict[str, float]:
    """What `check` prints, from means over walkers of what was `observed`."""
    u, square, left, positive, work, divergence, kinetic = means
    bonds = work / divergence / BOLTZMANN
    return {
        "<U>, kJ/mol": u,
        "var U": square - u**2,
        "alpha_L": left,
        "phi > 0": positive,
        "T of bonds, K": bonds,
        "T of velocities, K": kinetic,
    }


def check(temperature: float, minutes: float, timestep: float, n_walkers: int = 256) -> None:
    """Plain Langevin dynamics at one temperature, errors by jackknife over walkers, which are independent."""
    molecule = tsf.alanine_dipeptide()
    energy = tsf.BatchedEnergy(molecule.system, molecule.positions, compile=True)
    dynamics = BatchedLangevin(molecule.system, energy, timestep_fs=timestep, friction_per_ps=FRICTION_PER_PS)
    harmonic = next(f for f in molecule.system.getForces() if isinstance(f, openmm.HarmonicBondForce))
    parameters = [harmonic.getBondParameters(index) for index in range(harmonic.getNumBonds())]
    bonds = [(i, j, length._value) for i, j, length, _ in parameters]
    generator = torch.Generator().manual_seed(SEED)
    state = dynamics.start(molecule.positions, np.full(n_walkers, temperature), generator=generator)
    state = dynamics.run(state, round(20_000 / timestep), generator=generator)
    begun, total, n = time.monotonic(), 0.0, 0
    while time.monotonic() - begun < 60.0 * minutes or n < 100:
        state = dynamics.run(state, round(50 / timestep), generator=generator)
        total, n = total + observed(dynamics, state, bonds), n + 1
    means = total / n
    print(f"{temperature:g} K, {timestep:g} fs, {n_walkers} walkers of {0.05 * n:.4g} ps after 20 ps:")
    left_out = [figures(np.delete(means, walker, axis=1).mean(axis=1)) for walker in range(n_walkers)]
    for name, value in figures(means.mean(axis=1)).items():
        error = np.std([found[name] for found in left_out]) * np.sqrt(n_walkers - 1)
        print(f"  {name:20} {value:.4f} +- {error:.4f}")


def main() -> None:
    """Parse the command line and run one of the three parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "analyse", "check"))
    parser.add_argument("--out", type=Path, help="directory of raw frames (run, analyse)")
    parser.add_argument("--write", type=Path, help="the .npz to make (analyse)")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--part", type=int, default=0, help="of several runs beside each other (run)")
    parser.add_argument("--timestep", type=float, default=TIMESTEP_FS, help="fs (check)")
    parser.add_argument("--temperature", type=float, default=600.0, help="K (check)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "run":
        run(options.out, options.minutes, options.part)
    elif options.what == "analyse":
        reference_analysis.analyse(options.out, options.write)
    else:
        check(options.temperature, options.minutes, options.timestep)


if __name__ == "__main__":
    main()
