"""A flow in OpenMM's own replica exchange."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from openmm import app, unit

from openmm_tsf.checkpoint import flow_path
from openmm_tsf.exchange.flows import flow_of, use_flow
from openmm_tsf.exchange.move import NM_PER_PS, apply_steps, seed_from_numpy
from openmm_tsf.exchange.velocities import carried, lag_of, rescaled
from openmm_tsf.flow_steps import COUNTS, FlowSteps
from openmm_tsf.units import to_kelvin

if not hasattr(app, "ReplicaExchangeSampler"):
    raise ImportError("this OpenMM has no ReplicaExchangeSampler of its own; install 8.6 or newer, or use openmmtools")


class FlowReplicaExchangeSampler(app.ReplicaExchangeSampler):
    """`openmm.app.ReplicaExchangeSampler` with Metropolis steps of a flow after the dynamics of each replica.

    Args:
        states, simulation, stepsPerIteration, reinitializeVelocities: as OpenMM's.
        checkpoint: the flow, as in `FlowMove`.
        steps: which steps; a chain of 16 draws by default.

    Attributes:
        flow_statistics: counts of each state, as `FlowSteps.run` makes them.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: no such flow; when it runs, a System that is not the flow's.
    """

    def __init__(
        self, states: Sequence[dict], simulation: app.Simulation, stepsPerIteration: int, checkpoint: str | os.PathLike,
        *, steps: FlowSteps | None = None, reinitializeVelocities: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(list(states), simulation, stepsPerIteration, reinitializeVelocities)
        path = flow_path(checkpoint).resolve()
        self.flow = flow_of(str(path), use_flow(path))
        self.steps = FlowSteps() if steps is None else steps
        self.flow_statistics = [dict.fromkeys(COUNTS, 0) for _ in self.states]

    def simulateReplica(self, index: int, steps: int | None = None) -> None:
        """Dynamics of one replica, then the flow; arguments as OpenMM's."""
        self._prepare(index)
        super().simulateReplica(index, steps)
        context, state = self.simulation.context, self.replicaStateIndex[index]
        here = self.replicaConformation[index].getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        temperature = self.states[state].get("temperature")
        if temperature is None:
            temperature = self.simulation.integrator.getTemperature()
        generator = torch.Generator().manual_seed(seed_from_numpy(2**63 - 1))
        moved, counts = apply_steps(
            self.steps, self.flow, context, to_kelvin(temperature), np.array(here), energy=self._energy(state),
            generator=generator,
        )  # fmt: skip
        for name, number in counts.items():
            self.flow_statistics[state][name] += number
        if moved is None:
            context.setState(self.replicaConformation[index])  # energies may have been computed in the Context
            return
        velocities = self.replicaConformation[index].getVelocities(asNumpy=True).value_in_unit(NM_PER_PS)
        velocities = carried(
            context, np.array(velocities), np.array(here), moved, to_kelvin(temperature), seed_from_numpy(2**31 - 1)
        )
        self._put(index, moved, velocities)

    def _prepare(self, index: int) -> None:
        """Make up for OpenMM's scaling of velocities by s = sqrt(T'/T), which scales the half kick too.

        Wanted are s v + (s - 1) h with the half kick h, see `velocities.rescaled`; OpenMM will multiply by s.
        """
        old, new = (self.states[states[index]] for states in (self._previousReplicaStateIndex, self.replicaStateIndex))
        if self.reinitializeVelocities or "temperature" not in new or lag_of(self.simulation.context) == 0.0:
            return
        scale = math.sqrt(to_kelvin(new["temperature"]) / to_kelvin(old["temperature"]))
        if scale == 1.0:
            return
        context, here = self.simulation.context, self.replicaConformation[index]
        context.setState(here)
        velocities = np.array(here.getVelocities(asNumpy=True).value_in_unit(NM_PER_PS))
        positions = np.array(here.getPositions(asNumpy=True).value_in_unit(unit.nanometer))
        self._sampler.applyState(self.replicaStateIndex[index])
        velocities = rescaled(context, velocities, positions, scale) / scale
        self._put(index, positions, velocities)

    def _put(self, index: int, positions: np.ndarray, velocities: np.ndarray) -> None:
        """Positions [nm] and velocities [nm/ps] (A, 3) into the Context and the replica."""
        context = self.simulation.context
        context.setPositions(positions)
        context.setVelocities(velocities)
        self.replicaConformation[index] = context.getState(
            positions=True, velocities=True, parameters=True, integratorParameters=True
        )

    def _energy(self, state: int) -> Any:
        """The energy of a state that counts some force groups only; None where the Context's own is meant."""
        if "groups" not in self.states[state]:
            return None

        def energy(positions: torch.Tensor) -> torch.Tensor:
            found = []
            for x in positions:
                self.simulation.context.setPositions(x.numpy())
                value = self._sampler.computeEnergy(state).value_in_unit(unit.kilojoules_per_mole)
                found.append(value if np.isfinite(value) else np.inf)
            return torch.tensor(found, dtype=torch.float64)

        return energy
