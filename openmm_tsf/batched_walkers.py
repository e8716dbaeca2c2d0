"""Independent walkers of Langevin dynamics, all advanced at once by batched energies."""

from __future__ import annotations

from typing import Any

import numpy as np
import openmm
import torch

from openmm_tsf.energy import BatchedEnergy
from openmm_tsf.energy.platforms import choose_platform
from openmm_tsf.langevin import BatchedLangevin
from openmm_tsf.systems import Molecule
from openmm_tsf.walkers import Plan, State, check_frames, minimise, seed_of

ATOM_STEPS = 10_000_000
"""Length of a segment, in atoms times steps of all walkers: some seconds for alanine dipeptide on one core."""


def device() -> str:
    """Where walkers are: on a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class BatchedWalkers:
    """All walkers as one batch in single precision, on a GPU where there is one.

    Args:
        molecule: what to simulate.
        plan: of the simulation.
        energy: of the molecule's System.
    """

    def __init__(self, molecule: Molecule, plan: Plan, energy: BatchedEnergy) -> None:
        self._molecule, self._plan = molecule, plan
        # decided now and not on the way, or the frames would depend on when a run was interrupted
        energy.compile = energy.pays_off(plan.n_rows * plan.n_walkers * plan.steps_per_row)
        self._device = device()
        self._dynamics = BatchedLangevin(
            molecule.system,
            energy,
            timestep_fs=plan.timestep_fs,
            friction_per_ps=plan.friction_per_ps,
            device=self._device,
        )
        self._temperatures = torch.full((plan.n_walkers,), plan.temperature, dtype=torch.float64)

    def start(self) -> State:
        """The minimised geometry for each walker, with velocities of its own."""
        platform, properties = choose_platform("Reference")
        context = openmm.Context(self._molecule.system, openmm.VerletIntegrator(0.001), platform, properties)
        positions = minimise(context, self._molecule)
        state = self._dynamics.start(positions, self._temperatures, generator=self._generator(0))
        return State(0, _rows(state.positions), _rows(state.velocities))

    @property
    def rows_per_segment(self) -> int:
        """Rows that make a segment."""
        return max(1, round(ATOM_STEPS / self._molecule.n_atoms / self._plan.n_walkers / self._plan.steps_per_row))

    def advance(self, state: State, n_rows: int) -> tuple[State, np.ndarray]:
        """The state n_rows later, and the positions (n_rows, W, A, 3) on the way."""
        plan, generator = self._plan, self._generator(state.row + 1)
        frames = np.empty((n_rows, *state.positions.shape))
        now = self._dynamics.resume(
            _columns(state.positions), _columns(state.velocities), self._temperatures,
            step=state.row * plan.steps_per_row,
        )  # fmt: skip
        for row in range(n_rows):
            now = self._dynamics.run(now, plan.steps_per_row, generator=generator)
            frames[row] = _rows(now.positions)
        for walker in range(plan.n_walkers):
            check_frames(frames[:, walker], self._molecule, plan, state.row, walker)
        return State(state.row + n_rows, frames[-1].copy(), _rows(now.velocities)), frames

    def close(self) -> None:
        """Nothing to end."""

    def _generator(self, row: int) -> torch.Generator:
        return torch.Generator(self._device).manual_seed(seed_of(self._plan.seed, row))


def _rows(values: torch.Tensor) -> np.ndarray:
    """(A, 3, W) as (W, A, 3) float64."""
    return values.permute(2, 0, 1).cpu().numpy().astype(np.float64)


def _columns(values: np.ndarray) -> Any:
    """(W, A, 3) as (A, 3, W)."""
    return torch.from_numpy(values).permute(1, 2, 0)
