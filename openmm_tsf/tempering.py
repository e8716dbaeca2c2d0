"""Parallel tempering of one small molecule, all walkers at once: dynamics, Metropolis moves with a flow, exchanges.

For when the storage machinery of openmmtools costs more than the physics. Everything is a batch in single precision;
energies of Metropolis moves and of exchanges after them are in double precision. `BatchedTempering` is what one
iteration does, state in and state out; `run_tempering` repeats it and keeps the results in a directory.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import openmm
import torch
from jaxtyping import Float
from openmm import unit
from torch import Tensor

from openmm_tsf import batched_walkers
from openmm_tsf.dynamics import default_timestep_fs, molecule_digest
from openmm_tsf.energy import BatchedEnergy
from openmm_tsf.energy.platforms import choose_platform
from openmm_tsf.exchange.contexts import check_flow, read_facts
from openmm_tsf.flow import Flow, flow_digest
from openmm_tsf.flow_batches import prepare
from openmm_tsf.flow_steps import COUNTS, FlowSteps, PlacedFlow
from openmm_tsf.ladder import check_ladder
from openmm_tsf.langevin import BatchedLangevin, LangevinState
from openmm_tsf.metropolis import Target, Walkers
from openmm_tsf.swaps import Levels, exchange, neighbour_pairs, random_pairs
from openmm_tsf.systems import Molecule
from openmm_tsf.typing import Proposal
from openmm_tsf.units import kT, to_float
from openmm_tsf.walkers import minimise, seed_of

SWAPS = ("neighbours", "random")
MANY_ITERATIONS = 200
"""Energies are compiled if that pays in so many iterations. It must not depend on how many there are, or a run that is
extended would not go on with the same bits."""


@dataclass(frozen=True, eq=False)
class TemperingState:
    """All that decides how a parallel tempering goes on.

    Args:
        iteration: number of iterations since the start.
        dynamics: positions, velocities and temperatures of all walkers.
        levels: number of each walker's temperature.
        generators: states of the random generators of dynamics and of moves.
        n_energy_evaluations: since the start, by walkers and proposals.
    """

    iteration: int
    dynamics: LangevinState
    levels: Levels
    generators: tuple[Tensor, Tensor]
    n_energy_evaluations: int


@dataclass(frozen=True, eq=False)
class IterationInfo:
    """What one iteration gave, all as numpy arrays on the CPU.

    Args:
        levels: (W,) of the walkers during the iteration.
        energies: (W,) [kJ/mol] at its end, before the exchange of temperatures.
        positions: (W, A, 3) float32 [nm] there.
        swap_proposed, swap_accepted: (K, K), symmetric.
        move_counts: (K, n) of the flow move at each temperature, columns `flow_steps.COUNTS`; zeros without a flow.
    """

    levels: np.ndarray
    energies: np.ndarray
    positions: np.ndarray
    swap_proposed: np.ndarray
    swap_accepted: np.ndarray
    move_counts: np.ndarray


class BatchedTempering:
    """Parallel tempering as a batch: `state = tempering.start()`, then `state, info = tempering.iterate(state)`.

    An iteration is n_dynamics_steps of Langevin dynamics, a move with the flow at each temperature, if there is one,
    and an exchange of temperatures between walkers. Each of the three leaves the joint Boltzmann distribution of all
    walkers as it is, so a poor flow costs time and nothing else. Walkers that accept a proposal of the flow keep
    their velocities as far as they can (`BatchedLangevin.moved`); where the flow cannot represent a walker, that one
    stays, and is counted.

    Args:
        molecule: what to simulate; its constraints are kept.
        temperatures: the ladder (K,) [K], ascending.
        energy: of the molecule's System; made if not given.
        flow: of the same molecule; None for plain parallel tempering.
        steps: what a move with the flow is.
        n_replicas_per_temperature: walkers are K times as many.
        n_dynamics_steps: of an iteration.
        timestep_fs: [fs]; by default 1, and 2 if bonds are constrained.
        friction_per_ps: [1/ps].
        swaps: "neighbours": walkers of neighbouring temperatures meet, even and odd pairs in turn; "random": randomly
            chosen pairs of all walkers, as in arXiv 2108.01590.
        seed: 0 or above; decides everything, on one device with one number of threads.
        device: of dynamics and energies; by default the GPU where there is one.

    Attributes:
        temperatures: (K,) [K].
        n_walkers: W.
        settings: all that decides the results, as JSON can hold it.

    Raises:
        ValueError: temperatures that are no ladder, settings that make no sense, a flow of another molecule.
        UnsupportedForce: the System has no batched form; use the exchange of openmmtools.

    Source: R. H. Swendsen, J.-S. Wang, Phys. Rev. Lett. 57, 2607 (1986); with flows M. Dibak, L. Klein, F. Noe, arXiv
    2108.01590.
    """

    def __init__(
        self, molecule: Molecule, temperatures: Any, *, energy: BatchedEnergy | None = None, flow: Flow | None = None,
        steps: FlowSteps | None = None, n_replicas_per_temperature: int = 8, n_dynamics_steps: int = 100,
        timestep_fs: float | None = None, friction_per_ps: float = 1.0, swaps: str = "neighbours", seed: int = 1,
        device: Any = None,
    ) -> None:  # fmt: skip
        for name, value, least in (
            ("n_replicas_per_temperature", n_replicas_per_temperature, 1),
            ("n_dynamics_steps", n_dynamics_steps, 1),
            ("seed", seed, 0),
        ):
            if not (isinstance(value, int) and value >= least):
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
        if swaps not in SWAPS:
            raise ValueError(f"unknown swaps {swaps!r}; choose from {', '.join(SWAPS)}")
        self.molecule, self.flow, self.steps = molecule, flow, steps or FlowSteps()
        self.temperatures = check_ladder(temperatures)
        self.n_walkers = n_replicas_per_temperature * len(self.temperatures)
        self._n_steps, self._swaps, self._seed = n_dynamics_steps, swaps, seed
        self._device = torch.device(batched_walkers.device() if device is None else device)
        self._energy = energy or BatchedEnergy(molecule.system, molecule.positions, device=self._device)
        if self._energy.compile is None:
            self._energy.compile = self._energy.pays_off(MANY_ITERATIONS * self.n_walkers * n_dynamics_steps)
        if flow is not None:
            check_flow(flow, read_facts(molecule.system))
        dynamics = {
            "timestep_fs": default_timestep_fs(molecule) if timestep_fs is None else float(timestep_fs),
            "friction_per_ps": float(friction_per_ps),
        }
        self._dynamics = BatchedLangevin(molecule.system, self._energy, device=self._device, **dynamics)
        self._ladder = torch.tensor(self.temperatures, device=self._device)
        self._masses = torch.tensor(np.array(molecule.masses))
        self._places = (self._device, self._device if flow is None else flow.prior.like.device)
        self.settings: dict[str, Any] = {
            "temperatures": self.temperatures.tolist(), "n_replicas_per_temperature": n_replicas_per_temperature,
            "n_dynamics_steps": n_dynamics_steps, **dynamics, "swaps": swaps, "seed": seed,
            "molecule": molecule_digest(molecule), "flow": None if flow is None else flow_digest(flow),
            "steps": None if flow is None else asdict(self.steps),
        }  # fmt: skip

    def start(self, positions: Any = None) -> TemperingState:
        """Walkers 0 ... W - 1 at levels 0 ... K - 1, 0 ... K - 1, ..., with velocities of their own.

        Args:
            positions: (A, 3) or (W, A, 3) [nm] or a Quantity; by default the minimised reference geometry.

        Raises:
            ValueError: shapes that do not fit, or numbers that are not finite.
        """
        if positions is None:
            platform, properties = choose_platform("Reference")
            integrator = openmm.VerletIntegrator(0.001)
            positions = minimise(openmm.Context(self.molecule.system, integrator, platform, properties), self.molecule)
        positions = np.asarray(to_float(positions, unit.nanometer, "positions"), dtype=np.float64)
        generators = [
            torch.Generator(place).manual_seed(seed_of(self._seed, i)) for i, place in enumerate(self._places)
        ]
        levels = torch.arange(self.n_walkers, device=self._device) % len(self.temperatures)
        dynamics = self._dynamics.start(positions, self._ladder[levels], generator=generators[0])
        return TemperingState(0, dynamics, levels, _states(generators), self.n_walkers)

    def resume(
        self, iteration: int, positions: np.ndarray, velocities: np.ndarray, levels: np.ndarray,
        generators: tuple[Tensor, Tensor], n_energy_evaluations: int,
    ) -> TemperingState:  # fmt: skip
        """The state with these positions [nm] and velocities [nm/ps] (W, A, 3), its forces computed anew."""
        columns = (torch.from_numpy(values).permute(1, 2, 0) for values in (positions, velocities))
        now = torch.tensor(levels, dtype=torch.int64, device=self._device)
        dynamics = self._dynamics.resume(*columns, self._ladder[now], step=iteration * self._n_steps)
        return TemperingState(iteration, dynamics, now, generators, n_energy_evaluations)

    @torch.no_grad()
    def iterate(self, state: TemperingState) -> tuple[TemperingState, IterationInfo]:
        """One iteration: dynamics, the flow's move, exchange of temperatures.

        Raises:
            ValueError: walkers that exploded; which, and what to do.
        """
        generators = [_generator(place, values) for place, values in zip(self._places, state.generators, strict=True)]
        levels, k = state.levels, len(self.temperatures)
        dynamics = self._dynamics.run(state.dynamics, self._n_steps, generator=generators[0])
        n_evaluations = self._n_steps * self.n_walkers
        energies, counts = dynamics.energies.double(), np.zeros((k, len(COUNTS)), dtype=np.int64)
        if self.flow is not None:
            dynamics, energies, counts, n_more = self._flow_move(self.flow, dynamics, levels, generators)
            n_evaluations += n_more
        if self._swaps == "random":
            pairs = random_pairs(levels, generator=generators[0])
        else:
            pairs = neighbour_pairs(levels, k, state.iteration, generator=generators[0])
        betas = 1.0 / kT(self._ladder)
        new_levels, proposed, accepted = exchange(levels, energies, betas, pairs, generator=generators[0])
        info = IterationInfo(
            levels.cpu().numpy(), energies.cpu().numpy(), dynamics.positions.permute(2, 0, 1).cpu().numpy(),
            proposed.numpy(), accepted.numpy(), counts,
        )  # fmt: skip
        dynamics = self._dynamics.at_temperatures(dynamics, self._ladder[new_levels])
        total = state.n_energy_evaluations + n_evaluations
        return TemperingState(state.iteration + 1, dynamics, new_levels, _states(generators), total), info

    def _flow_move(
        self, flow: Flow, dynamics: LangevinState, levels: Levels, generators: list[torch.Generator]
    ) -> tuple[LangevinState, Float[Tensor, " walkers"], np.ndarray, int]:
        """The state after the flow's move at each level, energies in double precision, counts, and evaluations."""
        energy = _Counted(self._energy)
        x = dynamics.positions.permute(2, 0, 1).to(self._places[1], torch.float64).contiguous()

        def factor(x: Tensor) -> Tensor:
            return flow.internals.log_constraint_factor(x, self._masses)

        now = Target(energy, kT(float(self.temperatures[0])), factor).at(x)
        new_x, energies = now.x.clone(), now.energy.clone()
        counts = np.zeros((len(self.temperatures), len(COUNTS)), dtype=np.int64)
        rows = [(levels == level).nonzero().squeeze(1).to(x.device) for level in range(len(self.temperatures))]
        parts, ladder = [x[mine] for mine in rows], self.temperatures.tolist()
        flows: list[Proposal] = [PlacedFlow(flow.at(t), part) for t, part in zip(ladder, parts, strict=True)]
        if self.steps.kind != "latent":
            many = self.steps.n_proposals, self.steps.explore
            flows = prepare(flow, ladder, parts, *many, generator=generators[1])
        for level, mine in enumerate(rows):
            walkers = Walkers(parts[level], now.energy[mine], now.log_factor[mine])
            target = Target(energy, kT(ladder[level]), factor)
            after, found = self.steps.run(walkers, target, flows[level], generator=generators[1])
            new_x[mine], energies[mine] = after.x, after.energy
            counts[level] = [found[name] for name in COUNTS]
        moved = (new_x != x).flatten(1).any(1).to(self._device)
        if moved.any():
            columns = new_x.permute(1, 2, 0).to(self._device)
            dynamics = self._dynamics.moved(dynamics, columns, moved, generator=generators[0])
            energy.n += self.n_walkers
        return dynamics, energies.to(self._device), counts, energy.n


class _Counted:
    """An energy that counts what it was asked for."""

    def __init__(self, energy: BatchedEnergy) -> None:
        self.energy, self.n = energy, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.n += len(x)
        return self.energy(x)


def _generator(place: torch.device, values: Tensor) -> torch.Generator:
    generator = torch.Generator(place)
    generator.set_state(values)
    return generator


def _states(generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
    dynamics, moves = (generator.get_state() for generator in generators)
    return dynamics, moves
