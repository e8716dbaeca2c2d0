"""Velocities after a Monte Carlo move, as the integrator that goes on with them wants them.

OpenMM's integrators begin a step with a whole kick, so that between steps velocities are half a kick, (dt/2) F/m,
behind positions. That half kick belongs to where the molecule was. A move that leaves it as it is heats, and not a
little: `benchmarks/velocities.py` measures it.
"""

from __future__ import annotations

import math

import numpy as np
import openmm
from openmm import unit

from openmm_tsf.units import kT

LEAPFROG = (
    openmm.LangevinMiddleIntegrator,
    openmm.LangevinIntegrator,
    openmm.NoseHooverIntegrator,
    openmm.VerletIntegrator,
    openmm.VariableLangevinIntegrator,
    openmm.QTBIntegrator,
    openmm.DPDIntegrator,
    openmm.VariableVerletIntegrator,
)
"""Integrators that begin with a whole kick. Custom ones are taken to end a step with velocities and positions at one
time, as all of openmmtools do."""
HARDEST = 10.0
"""Half kicks beyond so many thermal speeds are of a clash: nothing of such velocities is worth keeping."""
TOLERANCE = 1e-6
"""Relative, of velocity constraints."""


def lag_of(context: openmm.Context) -> float:
    """By how much the velocities of a Context's integrator are behind its positions [ps]: 0, or half a time step."""
    integrator = context.getIntegrator()
    if isinstance(integrator, openmm.CompoundIntegrator):
        integrator = integrator.getIntegrator(integrator.getCurrentIntegrator())
    half = 0.5 if isinstance(integrator, LEAPFROG) else 0.0
    return half * integrator.getStepSize().value_in_unit(unit.picosecond)


def carried(
    context: openmm.Context,
    velocities: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    temperature: float,
    seed: int,
) -> np.ndarray:
    """Velocities (A, 3) [nm/ps] after a move, the same as before at the time of the positions, as far as they can be.

    Where bonds are rigid, Maxwell-Boltzmann velocities along the old constraints are added and those along the new ones
    taken off, so that they are of the right temperature on the new constraints and the others are kept. Drawing all of
    them anew would be as right for a time step that goes to zero; at a usual one it heats the stiff degrees of freedom,
    whose velocities a leapfrog integrator keeps slower than Maxwell and Boltzmann do.

    After a clash, with forces beyond all measure, all of them are drawn anew.

    Args:
        context: its positions and velocities are changed.
        velocities: (A, 3) [nm/ps], as they went with the positions `before`.
        before, after: positions (A, 3) [nm], on the constraints.
        temperature: [K].
        seed: of what is added.
    """
    lag, rigid = lag_of(context), context.getSystem().getNumConstraints() > 0
    if lag == 0.0 and not rigid:
        return velocities
    thermal = np.sqrt(kT(temperature) / _masses(context))
    noise = np.random.default_rng(seed).normal(size=velocities.shape) * thermal
    half_kick = lag * _accelerations(context, before)
    if not (np.abs(half_kick) <= HARDEST * thermal).all():
        velocities = noise
    elif rigid:
        velocities = velocities + noise - _projected(context, noise - half_kick)
    else:
        velocities = velocities + half_kick
    return _projected(context, velocities - lag * _accelerations(context, after))


def rescaled(context: openmm.Context, velocities: np.ndarray, positions: np.ndarray, scale: float) -> np.ndarray:
    """Velocities (A, 3) [nm/ps] times `scale` at the time of the positions (A, 3) [nm].

    Args:
        context: its positions and velocities are changed.
        scale: square root of the ratio of the temperatures.
    """
    half_kick = _projected(context, lag_of(context) * _accelerations(context, positions))
    return scale * velocities + (scale - 1.0) * half_kick


def _projected(context: openmm.Context, velocities: np.ndarray) -> np.ndarray:
    """Velocities without what would change constrained lengths at the present positions."""
    context.setVelocities(velocities)
    if context.getSystem().getNumConstraints() > 0:
        context.applyVelocityConstraints(TOLERANCE)
    found = context.getState(velocities=True).getVelocities(asNumpy=True)
    return found.value_in_unit(unit.nanometer / unit.picosecond)


def _accelerations(context: openmm.Context, positions: np.ndarray) -> np.ndarray:
    """F/m (A, 3) [nm/ps^2] at positions, which the Context keeps."""
    context.setPositions(positions)
    forces = context.getState(forces=True).getForces(asNumpy=True)
    return forces.value_in_unit(unit.kilojoule_per_mole / unit.nanometer) / _masses(context)


def _masses(context: openmm.Context) -> np.ndarray:
    """(A, 1) [amu]; infinite for particles without mass."""
    system = context.getSystem()
    masses = np.array([system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(system.getNumParticles())])
    return np.where(masses > 0.0, masses, math.inf)[:, None]
