"""OpenMM's own energies and forces, one configuration after the other, as a differentiable torch function."""

from __future__ import annotations

import math
from collections.abc import Iterator
from threading import Event
from typing import Any

import numpy as np
import openmm
import torch
from openmm import unit
from torch.autograd.function import once_differentiable

from openmm_tsf.energy.platforms import PinnedThreads, choose_platform, is_gpu, n_cores
from openmm_tsf.typing import Positions, Scalars
from openmm_tsf.units import to_float

HIGHEST = 1e6
"""Energies beyond this size [kJ/mol] count as overflowed: exp(-U/kT) is zero at any temperature, and past it the
fixed-point forces of OpenMM's GPU platforms (largest value 2^31 kJ/mol/nm) wrap around without a sign of it."""
CLOSEST = 1e-6
"""Atoms nearer to each other than this [nm] coincide: single precision cannot tell them apart."""
FARTHEST = 1e4
"""Coordinates beyond this [nm] are as good as infinite: single precision resolves less than a picometre there."""
BLOCK = 64


class OpenMMEnergy:
    """Potential energy U(x) [kJ/mol] of an OpenMM System, differentiable through OpenMM's forces.

    Configurations are evaluated one by one in Contexts that are made once: one on a GPU, one for each core otherwise,
    each served by a thread on its own core. Nothing is cached.

    A configuration gets U = +inf and zero force, and is counted in `n_nonfinite`, if a coordinate is not finite or
    beyond `FARTHEST`, if two atoms coincide, if its energy is not finite or beyond `HIGHEST`, or if a force is not
    finite. It is so on every platform, and without effect on the others of the batch. Constraints are not applied: the
    energy is that of the positions as they are.

    Copies and pickles make Contexts of their own and count from zero.

    Args:
        system: the OpenMM System; kept as a copy.
        platform: None (CUDA, HIP, OpenCL, CPU, Reference: the first that works), a name or an `openmm.Platform`.
        precision: "single", "mixed" (default) or "double" on GPUs.
        device_index: number(s) of the GPU.
        n_contexts: number of Contexts, each with a thread; by default 1 on GPUs and the number of cores otherwise.

    Attributes:
        n_evaluations: configurations asked for so far.
        n_nonfinite: how many of them had U = +inf.

    Raises:
        TypeError: `system` is not an OpenMM System.
        ValueError: the platform is not available (the message lists what is), virtual sites, or bad options.
    """

    def __init__(
        self,
        system: Any,
        platform: Any = None,
        *,
        precision: str | None = None,
        device_index: Any = None,
        n_contexts: int | None = None,
    ) -> None:
        if not isinstance(system, openmm.System):
            hint = "; pass its .system" if hasattr(system, "system") else ""
            raise TypeError(f"expected an openmm.System, not {type(system).__name__}{hint}")
        if any(system.isVirtualSite(i) for i in range(system.getNumParticles())):
            raise ValueError("the System has virtual sites, whose positions are no free coordinates; use one without")
        if n_contexts is not None and n_contexts < 1:
            raise ValueError(f"n_contexts must be at least 1, not {n_contexts}")
        self._system = openmm.XmlSerializer.clone(system)
        self._platform, self._properties = choose_platform(platform, precision, device_index)
        self._options = (self._platform.getName(), precision, device_index, n_contexts)
        on_gpu = is_gpu(self._platform)
        self._threads = PinnedThreads(n_contexts or (1 if on_gpu else n_cores()), pin=not on_gpu)
        self._contexts: dict[int, openmm.Context] = {}
        self.n_atoms: int = system.getNumParticles()
        self.n_evaluations = 0
        self.n_nonfinite = 0

    @property
    def platform(self) -> str:
        """Name of the platform in use."""
        return self._platform.getName()

    @property
    def n_contexts(self) -> int:
        """Number of Contexts, and of threads that serve them."""
        return len(self._threads)

    def __call__(self, positions: Positions) -> Scalars:
        """Energies (B,) [kJ/mol] of positions (B, A, 3) [nm], in their dtype and on their device.

        Forces are computed in the same pass if a gradient can be asked for. Second derivatives are not available.

        Raises:
            ValueError: `positions` does not have the shape (B, A, 3) with the System's number of atoms A.
        """
        self._check_shape(tuple(positions.shape))
        with_forces = torch.is_grad_enabled() and positions.requires_grad
        return _Energy.apply(positions, self, with_forces)

    def forces(self, positions: Any) -> tuple[np.ndarray, np.ndarray]:
        """Energies (B,) [kJ/mol] and forces (B, A, 3) [kJ/mol/nm] of positions (B, A, 3), as numpy arrays.

        Args:
            positions: array or tensor [nm], or a Quantity.

        Raises:
            ValueError: wrong shape.
        """
        positions = to_float(positions, unit.nanometer, "positions")
        if isinstance(positions, torch.Tensor):
            positions = positions.detach().cpu()
        positions = np.asarray(positions)
        self._check_shape(positions.shape)
        return self._evaluate(positions, with_forces=True)

    def close(self) -> None:
        """End the threads and free the Contexts now, instead of when this object is collected."""
        self._threads.close()
        self._contexts.clear()

    def __reduce__(self) -> tuple:
        return _rebuild, (openmm.XmlSerializer.serialize(self._system), *self._options)

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 3 or shape[1:] != (self.n_atoms, 3):
            raise ValueError(
                f"positions have shape {tuple(shape)}; expected (batch, {self.n_atoms}, 3), as the System has "
                f"{self.n_atoms} particles"
            )

    def _evaluate(self, positions: np.ndarray, with_forces: bool) -> tuple[np.ndarray, np.ndarray]:
        """Energies and, if asked for, forces (empty otherwise); OpenMM sees sound float64 numpy arrays only."""
        x = np.ascontiguousarray(positions, dtype=np.float64)
        energies = np.full(len(x), np.inf)
        forces = np.zeros(x.shape if with_forces else (0, *x.shape[1:]))

        def work(index: int, rows: np.ndarray, stop: Event) -> None:
            context = self._context(index)
            for row in rows:
                if stop.is_set():
                    return
                energies[row] = evaluate_one(context, x[row], forces[row] if with_forces else None)

        sound = np.flatnonzero(is_sound(x))
        n_threads = min(len(self._threads), math.ceil(len(sound) / 4))
        self._threads.share(work, _blocks(sound, n_threads), n_threads)
        self.n_evaluations += len(x)
        self.n_nonfinite += int(np.isinf(energies).sum())
        return energies, forces

    def _context(self, index: int) -> openmm.Context:
        # Made by the thread that will use it: OpenMM's own thread then starts on the same core.
        if index not in self._contexts:
            integrator = openmm.VerletIntegrator(0.001)
            self._contexts[index] = openmm.Context(self._system, integrator, self._platform, self._properties)
        return self._contexts[index]


class ContextEnergy:
    """Potential energy U(x) [kJ/mol] by a Context that somebody else made, one configuration after the other.

    What is sound and what is +inf is as in `OpenMMEnergy`. The Context is left with the last positions.

    Args:
        context: of any integrator and platform, with its global parameters set.
    """

    def __init__(self, context: openmm.Context) -> None:
        self._context = context

    @torch.no_grad()
    def __call__(self, positions: Positions) -> Scalars:
        """Energies (B,) [kJ/mol] of positions (B, A, 3) [nm], not differentiable."""
        x = np.ascontiguousarray(positions.detach().cpu().numpy(), dtype=np.float64)
        energies = np.full(len(x), np.inf)
        for row in np.flatnonzero(is_sound(x)):
            energies[row] = evaluate_one(self._context, x[row], None)
        return torch.from_numpy(energies).to(positions)


class _Energy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, positions: torch.Tensor, energy: OpenMMEnergy, with_forces: bool) -> torch.Tensor:
        energies, forces = energy._evaluate(positions.detach().to("cpu", torch.float64).numpy(), with_forces)
        if with_forces:
            ctx.save_for_backward(torch.from_numpy(forces).to(positions))
        return torch.from_numpy(energies).to(positions)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (forces,) = ctx.saved_tensors
        # A zero force stays zero whatever comes from above: the derivative of a loss at U = +inf is often nan.
        return torch.where(forces == 0.0, 0.0, -grad[:, None, None] * forces), None, None


def _rebuild(
    system: str, platform: str, precision: str | None, device_index: Any, n_contexts: int | None
) -> OpenMMEnergy:
    system = openmm.XmlSerializer.deserialize(system)
    return OpenMMEnergy(system, platform, precision=precision, device_index=device_index, n_contexts=n_contexts)


def evaluate_one(context: openmm.Context, positions: np.ndarray, forces: np.ndarray | None) -> float:
    """Energy [kJ/mol] of one configuration, +inf if that or a force is no sound number; fills forces if sound."""
    context.setPositions(positions)
    try:
        state = context.getState(energy=True, forces=forces is not None)
    except openmm.OpenMMException as error:
        if "NaN" in str(error) or "infinite" in str(error):
            return math.inf
        raise
    # The unit is known: the bare number is taken, since building Quantities costs as much as a tenth of the energy.
    energy = state.getPotentialEnergy()._value
    if not abs(energy) <= HIGHEST:
        return math.inf
    if forces is not None:
        found = state.getForces(asNumpy=True)._value
        if not np.isfinite(found).all():
            return math.inf
        forces[:] = found
    return energy


def is_sound(x: np.ndarray) -> np.ndarray:
    """Rows (B,) whose coordinates are all finite and whose atoms are all apart."""
    sound = (np.abs(x) <= FARTHEST).all(axis=(1, 2))
    # If two atoms are within CLOSEST of each other, then two neighbours along any unit vector are as close. A skew
    # vector, so that flat molecules do not all need the second look.
    along = np.sort(np.where(sound[:, None, None], x, 0.0) @ np.array([0.3, 0.5, np.sqrt(0.66)]), axis=1)
    for row in np.flatnonzero(sound & (np.diff(along, axis=1) < CLOSEST).any(axis=1)):
        i, j = np.triu_indices(x.shape[1], 1)
        sound[row] = (np.linalg.norm(x[row, i] - x[row, j], axis=1) >= CLOSEST).all()
    return sound


def _blocks(rows: np.ndarray, n_threads: int) -> Iterator[np.ndarray]:
    """Rows in pieces small enough for threads to share evenly, whatever else their cores have to do."""
    if len(rows):
        size = min(BLOCK, math.ceil(len(rows) / n_threads))
        yield from (rows[start : start + size] for start in range(0, len(rows), size))
