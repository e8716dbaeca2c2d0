"""Several independent walkers of Langevin dynamics, advanced together: all at once, or by a few threads of OpenMM.

What a walker does in a segment is decided by its positions and velocities at the beginning and by (seed, walker, time),
and by nothing else: not by the thread, nor by what the thread did before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
import openmm

from openmm_tsf.checks import positive
from openmm_tsf.energy.platforms import PinnedThreads, available_platforms, choose_platform, is_gpu, n_cores
from openmm_tsf.systems import Molecule
from openmm_tsf.trajectories import BROKEN, bond_lengths

ATOM_STEPS = 110_000
"""Length of a segment, in atoms times steps of one walker: 1 to 3 s for alanine dipeptide on two cores, of which
restarting the walkers takes about 2 %. It must not depend on the clock, or the frames would."""
SLOW_RESTART = 10
"""GPUs need segments this many times as long, because restarting a Context takes tenths of a second there."""
FEW_ATOMS = 100
"""Up to this size the CPU is the default: walkers share its cores, while a GPU would mostly be launching kernels."""
STEPS_AT_ONCE = 100  # between looks at whether to stop


@dataclass(frozen=True)
class Plan:
    """All that decides the frames. Rows are times at which each walker has a frame; the first ones are dropped."""

    temperature: float
    n_frames: int
    spacing_fs: float
    n_walkers: int
    timestep_fs: float
    friction_per_ps: float
    equilibration_ps: float
    seed: int
    molecule: str
    engine: str

    def __post_init__(self) -> None:
        for name in ("n_frames", "n_walkers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("spacing_fs", "timestep_fs", "friction_per_ps"):
            positive(name, getattr(self, name))
        if not (math.isfinite(self.equilibration_ps) and self.equilibration_ps >= 0.0):
            raise ValueError(f"equilibration_ps must be finite and at least 0, not {self.equilibration_ps:g}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, not {self.seed}")
        if self.steps_per_row < 1 or not math.isclose(self.steps_per_row * self.timestep_fs, self.spacing_fs):
            raise ValueError(f"spacing_fs={self.spacing_fs:g} is no multiple of timestep_fs={self.timestep_fs:g}")

    @property
    def steps_per_row(self) -> int:
        return round(self.spacing_fs / self.timestep_fs)

    @property
    def n_dropped(self) -> int:
        return math.ceil(self.equilibration_ps * 1000.0 / self.spacing_fs - 1e-9)

    @property
    def n_rows(self) -> int:
        return self.n_dropped + math.ceil(self.n_frames / self.n_walkers)


@dataclass(frozen=True)
class State:
    """All walkers after `row` rows: positions [nm] and velocities [nm/ps], (W, A, 3) float64."""

    row: int
    positions: np.ndarray
    velocities: np.ndarray


class OpenMMWalkers:
    """Threads with a Context of OpenMM each, which serve one walker after the other."""

    def __init__(
        self,
        molecule: Molecule,
        plan: Plan,
        platform: Any = None,
        precision: str | None = None,
        device_index: Any = None,
    ) -> None:
        self._molecule, self._plan = molecule, plan
        unnamed = platform is None and precision is None and device_index is None
        if unnamed and molecule.n_atoms <= FEW_ATOMS and "CPU" in available_platforms():
            platform = "CPU"
        self._platform, self._properties = choose_platform(platform, precision, device_index)
        if "DeterministicForces" in self._platform.getPropertyNames():
            self._properties["DeterministicForces"] = "true"
        # The Reference platform has one source of random numbers for all its Contexts; GPUs run one Context best.
        n_threads = min(n_cores(), plan.n_walkers) if self._platform.getName() == "CPU" else 1
        self._threads = PinnedThreads(n_threads, pin=not is_gpu(self._platform))
        self._contexts: dict[int, openmm.Context] = {}

    def start(self) -> State:
        """The minimised geometry for each walker, with velocities of its own."""
        shape = (self._plan.n_walkers, self._molecule.n_atoms, 3)
        state = State(0, np.empty(shape), np.empty(shape))

        def work(index: int, _job: int, _stop: Event) -> None:
            context = self._context(index)
            minimise(context, self._molecule)
            for walker in range(self._plan.n_walkers):
                context.setVelocitiesToTemperature(self._plan.temperature, seed_of(self._plan.seed, walker, 0))
                state.positions[walker], state.velocities[walker] = _positions(context), _velocities(context)

        self._threads.share(work, [0])
        return state

    @property
    def rows_per_segment(self) -> int:
        """Rows that make a segment."""
        atom_steps = ATOM_STEPS * (SLOW_RESTART if is_gpu(self._platform) else 1)
        return max(1, round(atom_steps / self._molecule.n_atoms / self._plan.steps_per_row))

    def advance(self, state: State, n_rows: int) -> tuple[State, np.ndarray]:
        """The state n_rows later, and the positions (n_rows, W, A, 3) on the way."""
        frames = np.empty((n_rows, *state.positions.shape))
        velocities = np.empty_like(state.velocities)

        def work(index: int, walker: int, stop: Event) -> None:
            context = self._context(index)
            integrator = context.getIntegrator()
            integrator.setRandomNumberSeed(seed_of(self._plan.seed, walker, state.row + 1))
            context.reinitialize()
            context.setPositions(state.positions[walker])
            context.setVelocities(state.velocities[walker])
            for row in range(n_rows):
                if not self._step(integrator, state.row + row, walker, stop):
                    return
                frames[row, walker] = _positions(context)
            velocities[walker] = _velocities(context)
            check_frames(frames[:, walker], self._molecule, self._plan, state.row, walker)

        self._threads.share(work, range(self._plan.n_walkers))
        return State(state.row + n_rows, frames[-1].copy(), velocities), frames

    def close(self) -> None:
        """End the threads."""
        self._threads.close()
        self._contexts.clear()

    def _context(self, index: int) -> openmm.Context:
        if index not in self._contexts:
            plan = self._plan
            integrator = openmm.LangevinMiddleIntegrator(
                plan.temperature, plan.friction_per_ps, plan.timestep_fs / 1000.0
            )
            integrator.setConstraintTolerance(1e-7)
            self._contexts[index] = openmm.Context(self._molecule.system, integrator, self._platform, self._properties)
        return self._contexts[index]

    def _step(self, integrator: openmm.Integrator, row: int, walker: int, stop: Event) -> bool:
        """Go to the next row; False if told to stop."""
        left = self._plan.steps_per_row
        while left and not stop.is_set():
            try:
                integrator.step(min(left, STEPS_AT_ONCE))
            except openmm.OpenMMException as error:
                if "NaN" not in str(error):
                    raise
                raise exploded(self._plan, row, walker, "coordinates are not finite") from error
            left -= min(left, STEPS_AT_ONCE)
        return left == 0


def minimise(context: openmm.Context, molecule: Molecule) -> np.ndarray:
    """Put a Context on the nearest minimum to the reference geometry, on the constraints: (A, 3) [nm].

    Raises:
        ValueError: there is none.
    """
    context.setPositions(np.array(molecule.positions))
    openmm.LocalEnergyMinimizer.minimize(context)
    if not np.isfinite(_positions(context)).all():
        raise ValueError("the reference geometry cannot be minimised: positions are not finite; check the molecule")
    return _positions(context)


def check_frames(frames: np.ndarray, molecule: Molecule, plan: Plan, row: int, walker: int) -> None:
    """Refuse a walker that fell apart.

    Args:
        frames: (n, A, 3) [nm] of one walker.
        molecule: with the bonds.
        plan: of the simulation.
        row: of the first frame.
        walker: its number.

    Raises:
        ValueError: when, how, and what to do.
    """
    if not np.isfinite(frames).all():
        raise exploded(plan, row + int((~np.isfinite(frames)).any(axis=(1, 2)).argmax()), walker, "not finite")
    stretch = bond_lengths(frames, molecule) / bond_lengths(molecule.positions[None], molecule)
    if (stretch > BROKEN).any():
        first = int((stretch > BROKEN).any(axis=1).argmax())
        what = f"a bond is {stretch[first].max():.1f} times as long as it should be"
        raise exploded(plan, row + first, walker, what)


def exploded(plan: Plan, row: int, walker: int, what: str) -> ValueError:
    """The error of a walker that fell apart."""
    time = (row + 1) * plan.spacing_fs / 1000.0
    return ValueError(
        f"walker {walker} exploded at about {time:.3g} ps ({what}); "
        f"use a smaller timestep_fs than {plan.timestep_fs:g}, or check the molecule's forces"
    )


def seed_of(*numbers: int) -> int:
    """A seed made of numbers, 1 ... 2**31 - 1 (0 would make it choose its own)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) % (2**31 - 1) + 1


def _positions(context: openmm.Context) -> np.ndarray:
    return context.getState(positions=True).getPositions(asNumpy=True)._value


def _velocities(context: openmm.Context) -> np.ndarray:
    return context.getState(velocities=True).getVelocities(asNumpy=True)._value
