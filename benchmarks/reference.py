"""Long reference for alanine dipeptide (ff96 + OBC1, unconstrained): biased replica exchange in OpenMM.

    python benchmarks/reference.py run --minutes 60 --out DIR       # sample; the same command goes on where it stopped
    python benchmarks/reference.py analyse --out DIR --write FILE   # MBAR, error bars, the shipped .npz
    python benchmarks/reference.py check --temperature 600 --timestep 1 --minutes 2   # plain dynamics, no bias

Five replicas between 300 and 600 K share one fixed bias V(phi, psi), learned first, which makes phi and psi diffuse
freely. U and V are recorded apart, and MBAR over all states takes frames back to exp(-U/kT) exactly. Configurations do
not depend on masses, so hydrogens weigh 4 amu and the time step is 2 fs; `check` tells what that costs.
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
from openmm import unit
from reference_analysis import BOLTZMANN
from scipy.ndimage import gaussian_filter

TEMPERATURES = np.geomspace(300.0, 600.0, 5)
SEED = 2026
FRAME_STEPS, SWAP_STEPS, CHUNK_STEPS = 40, 80, 40_000
LEARNING_ROUNDS, LEARNING_STEPS = 8, 32_000
BIAS_SIZE, BIAS_CAP, BIAS_SHARE = 36, 30.0, 0.85
DIHEDRALS = {"phi": (4, 6, 8, 14), "psi": (6, 8, 14, 16), "omega_1": (1, 4, 6, 8), "omega_2": (8, 14, 16, 18)}
CENTRES = ((8, 6, 14, 10), (1, 0, 2, 3), (10, 11, 12, 13), (18, 19, 20, 21))
BIAS_GROUP = 1


def dihedral(positions: np.ndarray, atoms: tuple[int, int, int, int]) -> np.ndarray:
    """Torsion angles [rad] in (-pi, pi], shape (...), of positions (..., atoms, 3) [nm]; IUPAC sign."""
    a, b, c, d = (positions[..., i, :] for i in atoms)
    axis = c - b
    first, second = np.cross(b - a, axis), np.cross(axis, d - c)
    sine = np.linalg.norm(axis, axis=-1) * np.sum((b - a) * second, axis=-1)
    return np.arctan2(sine, np.sum(first * second, axis=-1))


def handedness(positions: np.ndarray) -> np.ndarray:
    """Signs (..., 4) of CA and the three methyl carbons, hydrogens labelled."""
    triples = []
    for centre, i, j, k in CENTRES:
        u, v, w = (positions[..., atom, :] - positions[..., centre, :] for atom in (i, j, k))
        triples.append(np.sum(u * np.cross(v, w), axis=-1))
    return np.sign(np.stack(triples, axis=-1))


class Walkers:
    """Replicas with one Context each; the temperature wanders between them, the configuration stays.

    Args:
        temperatures: one per walker [K].
        timestep: [fs]; hydrogen_mass: [amu], configurations do not depend on it; seed: of velocities and noise.
    """

    def __init__(self, temperatures: np.ndarray, *, timestep: float, hydrogen_mass: float, seed: int) -> None:
        from openmmtools.testsystems import AlanineDipeptideImplicit

        molecule = AlanineDipeptideImplicit(constraints=None)
        for atom in molecule.topology.atoms():
            if atom.element.symbol == "H":
                molecule.system.setParticleMass(atom.index, hydrogen_mass)
        self.cmap = openmm.CMAPTorsionForce()
        self.cmap.addMap(BIAS_SIZE, np.zeros(BIAS_SIZE**2))
        self.cmap.addTorsion(0, *DIHEDRALS["phi"], *DIHEDRALS["psi"])
        self.cmap.setForceGroup(BIAS_GROUP)
        molecule.system.addForce(self.cmap)
        self.temperatures, self.generator = np.array(temperatures), np.random.default_rng(seed)
        self.state = np.arange(len(temperatures))
        self.start = np.asarray(molecule.positions.value_in_unit(unit.nanometer))
        self.isomer = handedness(self.start)
        platform = openmm.Platform.getPlatformByName("CPU")
        self.contexts = []
        for number, temperature in enumerate(temperatures):
            integrator = openmm.LangevinMiddleIntegrator(float(temperature), 1.0, timestep * 1e-3)
            integrator.setRandomNumberSeed(seed + number + 1)
            context = openmm.Context(molecule.system, integrator, platform, {"Threads": "1"})
            context.setPositions(self.start)
            openmm.LocalEnergyMinimizer.minimize(context, 10.0)
            context.setVelocitiesToTemperature(float(temperature), seed + 100 + number)
            self.contexts.append(context)

    def set_bias(self, table: np.ndarray) -> None:
        """Put V [kJ/mol], nodes (phi, psi) at 2 pi i / BIAS_SIZE, into every replica."""
        self.cmap.setMapParameters(0, BIAS_SIZE, table.T.ravel())
        for context in self.contexts:
            self.cmap.updateParametersInContext(context)

    def save(self) -> dict[str, np.ndarray]:
        """Positions, velocities and temperature indices, to go on from."""
        states = [context.getState(positions=True, velocities=True) for context in self.contexts]
        positions = [state.getPositions(asNumpy=True)._value for state in states]
        velocities = [state.getVelocities(asNumpy=True)._value for state in states]
        return {"positions": np.array(positions), "velocities": np.array(velocities), "state": self.state}

    def restore(self, saved: dict[str, np.ndarray]) -> None:
        """Go on from what `save` gave (with fresh random numbers)."""
        self.state = saved["state"].copy()
        for walker, context in enumerate(self.contexts):
            context.setPositions(saved["positions"][walker])
            context.setVelocities(saved["velocities"][walker])
            context.getIntegrator().setTemperature(self.temperatures[self.state[walker]])

    def swap(self, energies: np.ndarray) -> tuple[int, int]:
        """Metropolis exchange between neighbouring temperatures, given U + V [kJ/mol]; accepted and tried."""
        beta = 1.0 / (BOLTZMANN * self.temperatures)
        accepted = tried = 0
        for low in range(self.generator.integers(2), len(beta) - 1, 2):
            i, j = np.flatnonzero(self.state == low)[0], np.flatnonzero(self.state == low + 1)[0]
            log_ratio = (beta[low] - beta[low + 1]) * (energies[i] - energies[j])
            tried += 1
            if np.log(self.generator.random()) < log_ratio:
                accepted += 1
                self._set_state(i, low + 1)
                self._set_state(j, low)
        return accepted, tried

    def _set_state(self, walker: int, state: int) -> None:
        scale = np.sqrt(self.temperatures[state] / self.temperatures[self.state[walker]])
        context = self.contexts[walker]
        context.setVelocities(scale * context.getState(velocities=True).getVelocities(asNumpy=True)._value)
        context.getIntegrator().setTemperature(self.temperatures[state])
        self.state[walker] = state

    def run(self, n_steps: int) -> dict[str, np.ndarray]:
        """Frames every FRAME_STEPS, swaps every SWAP_STEPS: arrays (frames, walkers) in kJ/mol and rad."""
        n_frames, n_walkers = n_steps // FRAME_STEPS, len(self.contexts)
        positions = np.empty((n_frames, n_walkers, *self.start.shape))
        energies, swaps = np.empty((2, n_frames, n_walkers)), np.zeros(2, dtype=int)
        states = np.empty((n_frames, n_walkers), dtype=np.int8)
        for frame in range(n_frames):
            states[frame] = self.state
            for walker, context in enumerate(self.contexts):
                context.getIntegrator().step(FRAME_STEPS)
                state = context.getState(positions=True, energy=True)
                bias = context.getState(energy=True, groups={BIAS_GROUP})
                positions[frame, walker] = state.getPositions(asNumpy=True)._value
                energies[:, frame, walker] = state.getPotentialEnergy()._value, bias.getPotentialEnergy()._value
            if (frame + 1) % (SWAP_STEPS // FRAME_STEPS) == 0:
                swaps += self.swap(energies[0, frame])
        frames = {name: dihedral(positions, atoms).astype(np.float32) for name, atoms in DIHEDRALS.items()}
        frames |= {"energy": energies[0] - energies[1], "bias": energies[1], "state": states, "swaps": swaps}
        frames["same_isomer"] = (handedness(positions) == self.isomer).all(-1)
        return frames


def learned_bias(table: np.ndarray, frames: dict[str, np.ndarray]) -> np.ndarray:
    """A flatter bias [kJ/mol] (BIAS_SIZE, BIAS_SIZE): add kT ln of the sampled density, cap the depth it fills."""
    width = 2.0 * np.pi / BIAS_SIZE
    index = [np.rint(frames[name].ravel() / width).astype(int) % BIAS_SIZE for name in ("phi", "psi")]
    counts = np.zeros((BIAS_SIZE, BIAS_SIZE))
    np.add.at(counts, tuple(index), 1.0)
    density = gaussian_filter(counts, 1.0, mode="wrap") + 0.3
    new = table + BIAS_SHARE * BOLTZMANN * TEMPERATURES[2] * np.log(density)
    return np.clip(new - new.max() + BIAS_SHARE * BIAS_CAP, 0.0, None)


def learn(walkers: Walkers) -> np.ndarray:
    """The fixed bias [kJ/mol], from a few rounds of sampling and flattening."""
    table = np.zeros((BIAS_SIZE, BIAS_SIZE))
    for number in range(LEARNING_ROUNDS):
        frames = walkers.run(LEARNING_STEPS // 2 if number == 0 else LEARNING_STEPS)
        table = learned_bias(table, frames)
        walkers.set_bias(table)
        print(f"round {number}: phi > 0 share of frames {np.mean(frames['phi'] > 0):.3f}", flush=True)
    return table


def write_atomic(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz so that a name is there only with all of its content."""
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **arrays)
    os.replace(partial, path)


def run(out: Path, minutes: float, timestep: float, hydrogen_mass: float) -> None:
    """Sample into out/chunk_*.npz for some minutes, going on from the last whole chunk."""
    begun = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    number = len(list(out.glob("chunk_?????.npz")))
    walkers = Walkers(TEMPERATURES, timestep=timestep, hydrogen_mass=hydrogen_mass, seed=SEED + 1000 * number)
    if not (out / "bias.npz").exists():
        table = learn(walkers)
        write_atomic(out / "bias.npz", {"table": table, **walkers.save()})
        settings = {"seed": SEED, "timestep_fs": timestep, "hydrogen_mass_amu": hydrogen_mass, "friction_per_ps": 1.0}
        settings |= {"frame_steps": FRAME_STEPS, "swap_steps": SWAP_STEPS, "openmm": openmm.__version__}
        settings |= {"sampled_temperatures": TEMPERATURES.tolist(), "chunk_steps": CHUNK_STEPS}
        (out / "settings.json").write_text(json.dumps(settings))
    walkers.set_bias(np.load(out / "bias.npz")["table"])
    if number:
        last = np.load(out / f"chunk_{number - 1:05d}.npz")
        walkers.restore({key: last[key] for key in ("positions", "velocities")} | {"state": last["last_state"]})
    while time.monotonic() - begun < 60.0 * minutes:
        frames = walkers.run(CHUNK_STEPS)
        saved = walkers.save()
        saved["last_state"] = saved.pop("state")
        write_atomic(out / f"chunk_{number:05d}.npz", frames | saved)
        left, swaps = np.mean(frames["phi"] > 0), frames["swaps"]
        print(f"chunk {number}: {time.monotonic() - begun:.0f} s, phi > 0 {left:.3f}, swaps {swaps}", flush=True)
        number += 1


def bond_temperature(positions: np.ndarray, gradient: np.ndarray, bonds: list[tuple[int, int, float]]) -> float:
    """Configurational temperature of the stiffest coordinates [K], where a time step errs first.

    For v = (r - r0) grad r of a bond, integration by parts gives <div v> = <v . grad U>/kT exactly, with
    div v = 2 + 4 (r - r0)/r and v . grad U = (r - r0) (grad_j U - grad_i U) . (x_j - x_i)/r; summed over bonds.

    Args:
        positions, gradient: (frames, atoms, 3) in nm and kJ/mol/nm; bonds: atoms and length r0 [nm].
    """
    work = divergence = 0.0
    for i, j, length in bonds:
        vector = positions[:, j] - positions[:, i]
        distance = np.linalg.norm(vector, axis=-1)
        pull = np.sum((gradient[:, j] - gradient[:, i]) * vector, axis=-1) / distance
        work += np.mean((distance - length) * pull)
        divergence += np.mean(2.0 + 4.0 * (distance - length) / distance)
    return float(work / (BOLTZMANN * divergence))


def check_block(context: openmm.Context, bonds: list, n_frames: int, n_steps: int) -> tuple[float, ...]:
    """Means over a block: U, U^2, alpha_L share, phi > 0 share, bond temperature."""
    energies, positions, gradients = [], [], []
    for _ in range(n_frames):
        context.getIntegrator().step(n_steps)
        state = context.getState(positions=True, energy=True, forces=True)
        energies.append(state.getPotentialEnergy()._value)
        positions.append(state.getPositions(asNumpy=True)._value)
        gradients.append(-state.getForces(asNumpy=True)._value)
    positions, energies = np.array(positions), np.array(energies)
    phi = dihedral(positions, DIHEDRALS["phi"])
    shares = np.mean((phi > 0) & (phi < 2.4)), np.mean(phi > 0)
    bond = bond_temperature(positions, np.array(gradients), bonds)
    return energies.mean(), np.mean(energies**2), *shares, bond


def check(temperature: float, minutes: float, timestep: float, hydrogen_mass: float, seed: int) -> None:
    """Plain Langevin dynamics at one temperature: <U>, var U, shares and bond temperature, with block errors."""
    walkers = Walkers(np.array([temperature]), timestep=timestep, hydrogen_mass=hydrogen_mass, seed=seed)
    context = walkers.contexts[0]
    harmonic = next(f for f in context.getSystem().getForces() if isinstance(f, openmm.HarmonicBondForce))
    parameters = [harmonic.getBondParameters(index) for index in range(harmonic.getNumBonds())]
    bonds = [(i, j, length._value) for i, j, length, _ in parameters]
    context.getIntegrator().step(round(20_000 / timestep))
    begun, blocks = time.monotonic(), []
    while time.monotonic() - begun < 60.0 * minutes or len(blocks) < 3:
        blocks.append(check_block(context, bonds, 1000, round(8 / timestep)))
    blocks = np.array(blocks)
    mean = blocks.mean(axis=0)
    blocks[:, 1] += mean[0] ** 2 - 2.0 * mean[0] * blocks[:, 0]
    mean, error = blocks.mean(axis=0), blocks.std(axis=0, ddof=1) / np.sqrt(len(blocks))
    print(f"{temperature:g} K, {timestep:g} fs, H {hydrogen_mass:g} amu, {len(blocks)} blocks of 8 ps:")
    for name, value, deviation in zip(("<U>", "var U", "alpha_L", "phi > 0", "T of bonds"), mean, error, strict=True):
        print(f"  {name} {value:.4f} +- {deviation:.4f}")


def main() -> None:
    """Parse the command line and run one of the three parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("run", "analyse", "check"))
    parser.add_argument("--out", type=Path, help="directory of raw frames (run, analyse)")
    parser.add_argument("--write", type=Path, help="the .npz to make (analyse)")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--timestep", type=float, default=2.0, help="fs")
    parser.add_argument("--hydrogen-mass", type=float, default=4.0, help="amu")
    parser.add_argument("--temperature", type=float, default=600.0, help="K (check)")
    parser.add_argument("--seed", type=int, default=SEED, help="of the check; the run has its own")
    parser.add_argument("--core", type=int, help="pin to this core: OpenMM's CPU platform is several times faster so")
    options = parser.parse_args()
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    if options.part == "run":
        run(options.out, options.minutes, options.timestep, options.hydrogen_mass)
    elif options.part == "analyse":
        reference_analysis.analyse(options.out, options.write)
    else:
        check(options.temperature, options.minutes, options.timestep, options.hydrogen_mass, options.seed)


if __name__ == "__main__":
    main()
