"""Langevin dynamics of many walkers at once, each at a temperature of its own.

One time step is that of OpenMM's LangevinMiddleIntegrator, constraints and removal of the centre of mass's motion
included; walkers are the last axis, as in the batched energies. States go in and come out, nothing is hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import openmm
import torch
from jaxtyping import Bool, Float, Int
from openmm import unit
from torch import Tensor

from openmm_tsf.checks import positive
from openmm_tsf.constraints import ConstraintError, Constraints, Coordinates, listed
from openmm_tsf.swaps import exchange, neighbour_pairs
from openmm_tsf.systems import FORBIDDEN_FORCES
from openmm_tsf.units import BOLTZMANN, kT

STEPS_BETWEEN_CHECKS = 100
HARDEST = 10.0
"""Half kicks beyond so many thermal speeds are of a clash: nothing of such velocities is worth keeping."""

PerWalker = Float[Tensor, " walkers"]
PerWalkerMask = Bool[Tensor, " walkers"]


@dataclass(frozen=True, eq=False)
class LangevinState:
    """All walkers after `step` steps; with the generator's state, all that decides how they go on.

    Args:
        positions: [nm].
        velocities: [nm/ps], half a step behind, as in OpenMM.
        forces: at the positions [kJ/mol/nm].
        energies: at the positions [kJ/mol].
        temperatures: float64 [K].
        step: number of steps since the start.
        n_swaps: number of calls of `swap` since the start.
    """

    positions: Coordinates
    velocities: Coordinates
    forces: Coordinates
    energies: PerWalker
    temperatures: PerWalker
    step: int = 0
    n_swaps: int = 0


@dataclass(frozen=True, eq=False)
class SwapInfo:
    """How often neighbouring temperatures were to be exchanged in one `swap`, and how often they were.

    Args:
        levels: the temperatures there are, ascending [K].
        n_tried: between levels k and k + 1.
        n_accepted: of these.
    """

    levels: Float[Tensor, " levels"]
    n_tried: Int[Tensor, " neighbours"]
    n_accepted: Int[Tensor, " neighbours"]


class BatchedLangevin:
    """The LangevinMiddle integrator of OpenMM for a batch of walkers.

    One step: v += dt F(x)/m, less what would change constrained lengths; x += v dt/2; v = a v + sqrt((1 - a^2) kT/m) R
    with a = exp(-friction dt) and normal R; x += v dt/2; constraints, whose correction over dt goes to v too. Every
    `frequency` steps it begins with the removal of the centre of mass's motion, if the System has a CMMotionRemover.
    Particles without mass stay. Harmonic oscillators have the exact variances of x and v, whatever the time step.

    Args:
        system: the OpenMM System: masses, constraints, CMMotionRemover.
        energy: with `evaluate(x (A, 3, W)) -> (energies (W,) [kJ/mol], forces (A, 3, W) [kJ/mol/nm])`, as
            `BatchedEnergy` has.
        timestep_fs: [fs].
        friction_per_ps: [1/ps], 0 for none.
        dtype, device: of positions and velocities.
        constraint_tolerance: relative; see `Constraints`.

    Attributes:
        n_degrees_of_freedom: that velocities have, for the kinetic temperature.

    Raises:
        ValueError: a time step or friction that makes no sense; virtual sites; a barostat or thermostat; what
            `Constraints` refuses.

    Source: Z. Zhang, X. Liu, K. Yan, M. E. Tuckerman, J. Liu, J. Phys. Chem. A 123, 6056 (2019).
    """

    def __init__(
        self,
        system: openmm.System,
        energy: Any,
        *,
        timestep_fs: float,
        friction_per_ps: float,
        dtype: torch.dtype = torch.float32,
        device: Any = "cpu",
        constraint_tolerance: float | None = None,
    ) -> None:
        positive("timestep_fs", timestep_fs)
        if not (math.isfinite(friction_per_ps) and friction_per_ps >= 0.0):
            raise ValueError(f"friction_per_ps must be finite and at least 0, not {friction_per_ps:g}")
        _check_system(system)
        self._energy, self._dtype, self._device = energy, dtype, torch.device(device)
        self._timestep_fs, self._timestep = timestep_fs, 0.001 * timestep_fs
        self._decay = math.exp(-friction_per_ps * self._timestep)
        masses = [system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(system.getNumParticles())]
        self._masses = self._to_device(masses)[:, None, None]
        self._inverse_masses = torch.where(self._masses > 0.0, 1.0 / self._masses, 0.0)
        self._massless = (self._masses.flatten() == 0.0).nonzero().squeeze(1)
        self._mass_shares = (self._masses / self._masses.sum()).view(1, -1)
        self._removal = [f.getFrequency() for f in system.getForces() if isinstance(f, openmm.CMMotionRemover)]
        self.constraints = _constraints(system, masses, dtype=dtype, device=device, tolerance=constraint_tolerance)
        fixed = 3 * len(self._massless) + len(self.constraints) + (3 if self._removal else 0)
        self.n_degrees_of_freedom = 3 * len(masses) - fixed

    @torch.no_grad()
    def start(self, positions: Any, temperatures: Any, *, generator: torch.Generator) -> LangevinState:
        """A state with Maxwell-Boltzmann velocities.

        Args:
            positions: (A, 3), the same for all walkers, or (W, A, 3) [nm]; put onto the constraints.
            temperatures: (W,) [K].
            generator: of the velocities.

        Raises:
            ValueError: shapes that do not fit, numbers that are not finite, temperatures that are not above 0.
        """
        temperatures = torch.as_tensor(temperatures, dtype=torch.float64).to(self._device)
        # copied from numpy, because torch warns about arrays that are read-only
        x = self._to_device(np.array(positions) if isinstance(positions, np.ndarray) else positions)
        x = (x.expand(len(temperatures), *x.shape) if x.ndim == 2 else x).permute(1, 2, 0).contiguous()
        self._check_start(x, temperatures)
        v = _float32_like(x, generator).normal_(generator=generator).to(x) * self._thermal_speeds(temperatures)
        if len(self.constraints):
            x = self.constraints.positions(x, x)
            v = self.constraints.velocities(v, x)
        return self.resume(x, v, temperatures)

    @torch.no_grad()
    def resume(
        self, positions: Coordinates, velocities: Coordinates, temperatures: PerWalker, step: int = 0, n_swaps: int = 0
    ) -> LangevinState:
        """The state with these positions [nm] and velocities [nm/ps], its forces and energies computed."""
        x, v = (self._to_device(values).contiguous() for values in (positions, velocities))
        energies, forces = self._energy.evaluate(x)
        temperatures = temperatures.to(self._device, torch.float64)
        return LangevinState(x, v, forces.clone(), energies.clone(), temperatures, step, n_swaps)

    @torch.no_grad()
    def run(self, state: LangevinState, n_steps: int, *, generator: torch.Generator) -> LangevinState:
        """The state n_steps later. A run in pieces gives the same bits as one in a whole.

        Raises:
            ValueError: walkers whose energy or positions are not finite any more, or that cannot meet their
                constraints: which, and when.
        """
        x, v = state.positions.clone(), state.velocities.clone()
        energies, forces = state.energies, state.forces
        half, decay = 0.5 * self._timestep, self._decay
        # full tables: products with axes to expand are twice as slow
        kick = (self._timestep * self._inverse_masses).expand_as(x).contiguous()
        spread = (math.sqrt(1.0 - decay**2) * self._thermal_speeds(state.temperatures)).expand_as(x).contiguous()
        noise = _float32_like(x, generator)
        for step in range(state.step, state.step + n_steps):
            self._remove_motion(v, step)
            v.addcmul_(forces, kick)
            try:
                directions = self._project(v, x)
                x.add_(v, alpha=half)
                noise.normal_(generator=generator)
                v.mul_(decay).addcmul_(noise.to(x), spread)
                x.add_(v, alpha=half)
                self._constrain(x, v, directions)
            except ConstraintError as error:
                raise ValueError(f"step {step + 1} of {self._timestep_fs:g} fs: {error}") from error
            energies, forces = self._energy.evaluate(x)
            if (step + 1) % STEPS_BETWEEN_CHECKS == 0:
                self._check(x, energies, step + 1)
        self._check(x, energies, state.step + n_steps)
        moved = {"positions": x, "velocities": v, "forces": forces.clone(), "energies": energies.clone()}
        return replace(state, **moved, step=state.step + n_steps)

    @torch.no_grad()
    def swap(self, state: LangevinState, *, generator: torch.Generator) -> tuple[LangevinState, SwapInfo]:
        """Exchange temperatures between walkers of neighbouring levels, by Metropolis' rule on the energies.

        Levels 0-1, 2-3, ... in one call and 1-2, 3-4, ... in the next; each walker of a level meets a random one of the
        other, as far as there are enough.
        """
        levels, level_of = torch.unique(state.temperatures, return_inverse=True)
        pairs = neighbour_pairs(level_of, len(levels), state.n_swaps, generator=generator)
        energies, betas = state.energies.double(), 1.0 / kT(levels)
        new, n_tried, n_accepted = exchange(level_of, energies, betas, pairs, generator=generator)
        state = replace(self.at_temperatures(state, levels[new]), n_swaps=state.n_swaps + 1)
        return state, SwapInfo(levels.cpu(), n_tried.diagonal(1), n_accepted.diagonal(1))

    @torch.no_grad()
    def at_temperatures(self, state: LangevinState, temperatures: PerWalker) -> LangevinState:
        """The state with other temperatures [K] of its walkers, to which their velocities are rescaled."""
        new = temperatures.to(state.temperatures)
        velocities = self._rescaled(state, torch.sqrt(new / state.temperatures).to(self._dtype))
        return replace(state, velocities=velocities, temperatures=new)

    @torch.no_grad()
    def moved(
        self, state: LangevinState, positions: Coordinates, moved: PerWalkerMask, *, generator: torch.Generator
    ) -> LangevinState:
        """The state after a Monte Carlo move of some walkers, with their forces computed anew.

        Velocities at the time of the positions stay, see `_half_kick` for the half step that they are behind. Those
        along rigid bonds, which have none, are drawn along the old ones before those along the new ones are taken off.
        After a clash, with forces beyond all measure, all are drawn anew.

        To draw all of them anew each time would heat: alanine dipeptide with rigid X-H bonds at 600 K and 2 fs, drawn
        anew every 50 steps, by 64 K (`benchmarks/velocities.py`).

        Args:
            state: before the move.
            positions: [nm], on the constraints; those of walkers that stayed are not looked at.
            moved: which walkers did.
            generator: of what is drawn.
        """
        x = torch.where(moved, self._to_device(positions), state.positions)
        new = self.resume(x, state.velocities, state.temperatures, state.step, state.n_swaps)
        v = state.velocities + self._half_kick(state)
        noise = _float32_like(x, generator).normal_(generator=generator).to(x) * self._thermal_speeds(
            state.temperatures
        )
        if len(self.constraints):
            v = v + noise - self.constraints.velocities(noise, state.positions)
        kicks = self._half_kick(state).abs() / self._thermal_speeds(state.temperatures).clamp_min(1e-30)
        v = torch.where((kicks <= HARDEST).all(0).all(0), v, noise)
        if len(self.constraints):
            v = self.constraints.velocities(v, x)
        return replace(new, velocities=torch.where(moved, v - self._half_kick(new), state.velocities))

    def kinetic_energies(self, state: LangevinState) -> PerWalker:
        """[kJ/mol]."""
        return 0.5 * (self._masses * state.velocities**2).sum((0, 1))

    def kinetic_temperatures(self, state: LangevinState) -> PerWalker:
        """[K]; their mean is that of the thermostat."""
        return 2.0 * self.kinetic_energies(state) / (self.n_degrees_of_freedom * BOLTZMANN)

    def _to_device(self, values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=self._dtype).to(self._device)

    def _thermal_speeds(self, temperatures: Tensor) -> Tensor:
        """sqrt(kT/m) (A, 1, W) [nm/ps]."""
        return (self._inverse_masses * kT(temperatures)).sqrt().to(self._dtype)

    def _remove_motion(self, v: Tensor, step: int) -> None:
        if any(step % frequency == 0 for frequency in self._removal):
            v.sub_((self._mass_shares @ v.flatten(1)).view(1, *v.shape[1:]))
            if len(self._massless):
                v.index_fill_(0, self._massless, 0.0)

    def _project(self, v: Tensor, x: Tensor) -> Tensor | None:
        """Take from v what would change constrained lengths; the directions of the constraints, for `_constrain`."""
        if not len(self.constraints):
            return None
        directions = self.constraints.directions(x)
        # The correction of positions takes out all but (1 - a)/2 of what is left here; without friction, all of it.
        if self._decay < 1.0:
            v.add_(self.constraints.velocity_shift(v, directions, slack=2.0 / (1.0 - self._decay)))
        return directions

    def _constrain(self, x: Tensor, v: Tensor, directions: Tensor | None) -> None:
        if directions is not None:
            shift = self.constraints.position_shift(x, directions)
            x.add_(shift)
            v.add_(shift, alpha=1.0 / self._timestep)

    def _rescaled(self, state: LangevinState, scale: Tensor) -> Tensor:
        """Velocities for temperatures scale^2 as high; to the bit the same where scale is 1."""
        return scale * state.velocities + (scale - 1.0) * self._half_kick(state)

    def _half_kick(self, state: LangevinState) -> Tensor:
        """(dt/2) F/m, on the constraints, which leads from the velocities to those at the time of the positions.

        Half a step behind, v is correlated with x. The velocity at the time of x is independent of x, and scales with
        sqrt(T).
        """
        half_kick = 0.5 * self._timestep * self._inverse_masses * state.forces
        return self.constraints.velocities(half_kick, state.positions) if len(self.constraints) else half_kick

    def _check_start(self, x: Tensor, temperatures: Tensor) -> None:
        shape = (len(self._masses), 3, *temperatures.shape)
        if temperatures.ndim != 1 or tuple(x.shape) != shape or len(temperatures) == 0:
            raise ValueError(
                f"positions and temperatures do not fit: {tuple(x.shape[2:])} walkers of {tuple(x.shape[:2])} "
                f"coordinates, temperatures {tuple(temperatures.shape)}, {len(self._masses)} atoms in the System"
            )
        if not bool((temperatures.isfinite() & (temperatures > 0.0)).all()) or not bool(x.isfinite().all()):
            raise ValueError("positions must be finite, temperatures finite and above 0 K")

    def _check(self, x: Tensor, energies: Tensor, step: int) -> None:
        walkers = (~(energies + x.sum((0, 1))).isfinite()).nonzero().squeeze(1).tolist()
        if walkers:
            raise ValueError(
                f"{len(walkers)} of {len(energies)} walkers exploded within {STEPS_BETWEEN_CHECKS} steps before step "
                f"{step} (walkers {listed(walkers)}: energy or positions are not finite); use a smaller timestep_fs "
                f"than {self._timestep_fs:g}, or check the molecule's forces"
            )


def _float32_like(x: Tensor, generator: torch.Generator) -> Tensor:
    # Single precision is enough for noise, as in OpenMM's GPU platforms, and six times as fast to draw.
    return torch.empty(x.shape, dtype=torch.float32, device=generator.device)


def _check_system(system: openmm.System) -> None:
    sites = [i for i in range(system.getNumParticles()) if system.isVirtualSite(i)]
    if sites:
        raise ValueError(f"the System has {len(sites)} virtual sites (first: particle {sites[0]}); use one without")
    forces = [name for name in (type(force).__name__ for force in system.getForces()) if name in FORBIDDEN_FORCES]
    if forces:
        raise ValueError(f"{', '.join(forces)} cannot act in batched dynamics; remove it with system.removeForce(i)")


def _constraints(system: openmm.System, masses: list[float], **options: Any) -> Constraints:
    rows = [system.getConstraintParameters(index) for index in range(system.getNumConstraints())]
    lengths = [row[2].value_in_unit(unit.nanometer) for row in rows]
    return Constraints([(i, j) for i, j, _ in rows], lengths, masses, **options)
