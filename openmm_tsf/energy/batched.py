"""The energy of a whole batch of configurations in one torch computation, equal to OpenMM's."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import openmm
import torch
from openmm import unit
from torch import Tensor
from torch.autograd.function import once_differentiable

from openmm_tsf.energy.agreement import Agreement, agreements, check_agreement
from openmm_tsf.energy.compiled import LANES, Kernel, compile_kernel
from openmm_tsf.energy.terms import ForceField, read_system, value_and_forces
from openmm_tsf.typing import Positions, Scalars
from openmm_tsf.units import to_float

WORKING_SET = 2**18
"""Pairs times configurations of a chunk on the CPU: a row of pairs then fits the second-level cache."""
BUFFERS = 80
"""Values for each pair and configuration that are alive at once, at most (73 were found in GBn2), and twice as many for
second derivatives."""
PAYS_OFF = 6e7
"""Pairs times configurations after which compiling (some ten seconds) has paid for itself."""


class BatchedEnergy:
    """Potential energy U(x) [kJ/mol] of an OpenMM System for batches of configurations, differentiable twice.

    The parameters are read out of the System; the terms are torch operations, batched along the last axis, compiled
    where a compiler is present. Computes in the dtype of the positions that it is given.

    At construction every term is compared with OpenMM's Reference platform (`verify`). Constraints are not applied. A
    configuration gets U = +inf and zero force, and is counted in `n_nonfinite`, if its energy, or one of its forces
    where these are computed, is not finite; this is without effect on the others of the batch.

    Supported: HarmonicBondForce, HarmonicAngleForce, PeriodicTorsionForce, RBTorsionForce, CMAPTorsionForce,
    NonbondedForce (NoCutoff and CutoffNonPeriodic), CustomBondForce, CustomAngleForce, CustomTorsionForce,
    CustomExternalForce; CustomNonbondedForce, CustomGBForce and GBSAOBCForce without cutoff; CMMotionRemover.

    Args:
        system: the OpenMM System; kept as a copy.
        positions: (A, 3) or (B, A, 3) [nm], array, tensor or Quantity: where to compare with OpenMM; random packings by
            default.
        parameters: values of global parameters; the System's defaults for the others.
        device: where to compute, as in "cuda"; by default where the positions are. Results go back to them.
        compile: None to compile as soon as so much has been asked for that it pays, True at first use, False never.
        memory_limit: of temporaries [GiB]; batches are cut into chunks accordingly.
        verify: compare with OpenMM now.

    Attributes:
        compile: as above; may be set later.
        n_atoms: number of atoms A.
        n_evaluations: configurations asked for so far.
        n_nonfinite: how many of them had U = +inf.

    Raises:
        TypeError: `system` is not an OpenMM System.
        UnsupportedForce: a force without a batched form; `OpenMMEnergy` takes any System.
        ExpressionError: a custom expression that cannot be read.
        EnergyMismatch: a term differs from OpenMM's; the message names it.
        ValueError: no atoms, unknown parameters, contradictions in a force.
    """

    def __init__(
        self,
        system: Any,
        positions: Any = None,
        *,
        parameters: Mapping[str, float] | None = None,
        device: Any = None,
        compile: bool | None = None,
        memory_limit: float = 2.0,
        verify: bool = True,
    ) -> None:
        if not isinstance(system, openmm.System):
            hint = "; pass its .system" if hasattr(system, "system") else ""
            raise TypeError(f"expected an openmm.System, not {type(system).__name__}{hint}")
        if not memory_limit > 0.0:
            raise ValueError(f"memory_limit must be above 0 GiB, not {memory_limit:g}")
        self._system = openmm.XmlSerializer.clone(system)
        self._device = None if device is None else torch.device(device)
        self._options = {"parameters": dict(parameters or {}), "memory_limit": memory_limit, "device": device}
        self.compile = compile
        self._field = read_system(self._system, parameters)
        self.n_atoms: int = system.getNumParticles()
        self.n_evaluations = 0
        self.n_nonfinite = 0
        self._fields: dict[tuple, ForceField] = {}
        self._kernels: dict[tuple, Kernel | None] = {}
        self._asked: dict[tuple, int] = {}
        self._poses = _poses(positions, self.n_atoms)
        if verify:
            check_agreement(self._system, self._field, self._options["parameters"], self._poses)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the terms."""
        return self._field.labels

    def __call__(self, positions: Positions) -> Scalars:
        """Energies (B,) [kJ/mol] of positions (B, A, 3) [nm], in their dtype and on their device.

        Raises:
            TypeError: positions are no float32 or float64 tensor.
            ValueError: `positions` does not have the shape (B, A, 3) with the System's number of atoms A.
        """
        self._check(positions)
        if torch.is_grad_enabled() and positions.requires_grad:
            return _Energy.apply(positions, self)
        return self._energies(positions)

    def forces(self, positions: Any) -> tuple[np.ndarray, np.ndarray]:
        """Energies (B,) [kJ/mol] and forces (B, A, 3) [kJ/mol/nm] of positions (B, A, 3), as numpy arrays.

        Args:
            positions: array or tensor [nm], or a Quantity; float64 unless it is float32.

        Raises:
            ValueError: wrong shape.
        """
        positions = to_float(positions, unit.nanometer, "positions")
        if not isinstance(positions, Tensor):
            array = np.asarray(positions)
            positions = torch.from_numpy(array.astype(np.float32 if array.dtype == np.float32 else np.float64))
        self._check(positions)
        energies, forces = self._sound(positions.detach())
        return energies.cpu().numpy(), forces.cpu().numpy()

    def term_energies(self, positions: Positions) -> dict[str, Scalars]:
        """Energies (B,) [kJ/mol] of each term, of positions (B, A, 3) [nm]; not counted, +inf left as it is."""
        self._check(positions)
        field = self._field_for(positions)
        with torch.no_grad():
            chunks = [positions[rows].permute(1, 2, 0) for rows in self._chunks(len(positions), positions)]
            return {
                label: torch.cat([positions.new_empty(0), *(field.term(label)(chunk) for chunk in chunks)])
                for label in self.labels
            }

    def agreements(self, positions: Any = None) -> list[Agreement]:
        """How far each term is from OpenMM's Reference platform, in float64.

        Args:
            positions: as at construction.
        """
        return agreements(self._system, self._field, self._options["parameters"], _poses(positions, self.n_atoms))

    @torch.inference_mode(False)
    def evaluate(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (batch,) and forces (atoms, 3, batch) of positions (atoms, 3, batch), the engine's own layout.

        For dynamics: one pass, no graph, not counted as evaluations, and what is not finite is left as it is.
        """
        if positions.ndim != 3 or positions.shape[:2] != (self.n_atoms, 3):
            raise ValueError(f"positions have shape {tuple(positions.shape)}; expected ({self.n_atoms}, 3, batch)")
        n = positions.shape[2]
        kernel = self._kernel_for(positions, n)
        energies, forces = positions.new_empty(n), torch.empty_like(positions)
        for rows in self._chunks(n, positions):
            energies[rows], forces[..., rows] = _padded(kernel, positions[..., rows])
        return energies, forces

    def pays_off(self, n: int) -> bool:
        """Whether compiling is worth its time for n configurations."""
        return n * max(1, len(self._field.pairs)) > PAYS_OFF

    def __reduce__(self) -> tuple:
        return _rebuild, (openmm.XmlSerializer.serialize(self._system), {**self._options, "compile": self.compile})

    def _check(self, positions: Any) -> None:
        if not isinstance(positions, Tensor) or positions.dtype not in (torch.float32, torch.float64):
            what = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
            raise TypeError(f"positions must be a float32 or float64 tensor, not {what}")
        if positions.ndim != 3 or positions.shape[1:] != (self.n_atoms, 3):
            raise ValueError(
                f"positions have shape {tuple(positions.shape)}; expected (batch, {self.n_atoms}, 3), as the System "
                f"has {self.n_atoms} particles"
            )

    @torch.inference_mode(False)
    def _energies(self, positions: Tensor) -> Tensor:
        """Energies (B,), +inf where something is not finite; without forces, unless these are in a compiled kernel."""
        here = positions.new_empty(0, device=self._device or positions.device)
        if self._compiled_for(here, len(positions)) is not None:
            return self._sound(positions, n_asked=0)[0]
        field, energies = self._field_for(here), positions.new_empty(len(positions))
        with torch.no_grad():
            for rows in self._chunks(len(positions), here):
                x = positions[rows].to(here.device).permute(1, 2, 0).contiguous()
                energy = field(x)
                energies[rows] = torch.where(energy.isfinite() & x.isfinite().all(0).all(0), energy, torch.inf)
        self._count(energies)
        return energies

    @torch.inference_mode(False)
    def _sound(self, positions: Tensor, n_asked: int | None = None) -> tuple[Tensor, Tensor]:
        """Energies (B,) and forces (B, A, 3); +inf and zero where something is not finite. Counts."""
        here = positions.new_empty(0, device=self._device or positions.device)
        kernel = self._kernel_for(here, len(positions) if n_asked is None else n_asked)
        energies, forces = positions.new_empty(len(positions)), torch.empty_like(positions)
        for rows in self._chunks(len(positions), here):
            x = positions[rows].to(here.device).permute(1, 2, 0)
            energy, force = _padded(kernel, x)
            sound = energy.isfinite() & (force + x).isfinite().all(0).all(0)
            energies[rows] = torch.where(sound, energy, torch.inf).to(energies.device)
            forces[rows] = torch.where(sound, force, 0.0).permute(2, 0, 1).to(energies.device)
        self._count(energies)
        return energies, forces

    def _count(self, energies: Tensor) -> None:
        self.n_evaluations += len(energies)
        self.n_nonfinite += int((energies == torch.inf).sum())

    def _chunks(self, n: int, like: Tensor, buffers: int = BUFFERS) -> Iterator[slice]:
        pairs = max(1, len(self._field.pairs))
        size = self._options["memory_limit"] * 2**30 / (buffers * pairs * like.element_size())
        if like.device.type == "cpu":
            size = min(size, WORKING_SET / pairs)
        size = max(1, int(size) // LANES) * LANES
        return (slice(start, min(start + size, n)) for start in range(0, n, size))

    def _field_for(self, like: Tensor) -> ForceField:
        key = like.dtype, like.device
        if key not in self._fields:
            self._fields[key] = copy.deepcopy(self._field).to(like.device, like.dtype)
        return self._fields[key]

    def _kernel_for(self, like: Tensor, n: int) -> Kernel:
        """Energies and forces in one pass; compiled as soon as that pays, n configurations being asked for now."""
        compiled = self._compiled_for(like, n)
        return value_and_forces(self._field_for(like)) if compiled is None else compiled

    def _compiled_for(self, like: Tensor, n: int) -> Kernel | None:
        # the number of threads is part of what is compiled
        key = like.dtype, like.device, torch.get_num_threads()
        self._asked[key] = self._asked.get(key, 0) + n
        wanted = self.pays_off(self._asked[key]) if self.compile is None else self.compile
        if wanted and key not in self._kernels:
            example = torch.tensor(self._poses).to(like).permute(1, 2, 0)
            self._kernels[key] = compile_kernel(value_and_forces(self._field_for(like)), example)
        return self._kernels.get(key) if wanted else None


class _Energy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, positions: Tensor, energy: BatchedEnergy) -> Tensor:
        energies, forces = energy._sound(positions.detach())
        ctx.energy = energy
        ctx.save_for_backward(positions, forces, energies < torch.inf)
        return energies

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        positions, forces, sound = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants second derivatives
            forces = _Forces.apply(positions, forces, sound, ctx.energy)
        # Zero whatever comes from above: the derivative of a loss at U = +inf is often nan.
        return torch.where(sound[:, None, None], -grad[:, None, None] * forces, 0.0), None


class _Forces(torch.autograd.Function):
    """Forces, already known, whose derivative is a product with the Hessian."""

    @staticmethod
    def forward(ctx: Any, positions: Tensor, forces: Tensor, sound: Tensor, energy: BatchedEnergy) -> Tensor:
        ctx.energy = energy
        ctx.save_for_backward(positions, sound)
        return forces.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        positions, sound = ctx.saved_tensors
        energy = ctx.energy
        field, products = energy._field_for(positions), torch.empty_like(positions)
        for rows in energy._chunks(len(positions), positions, buffers=2 * BUFFERS):
            with torch.enable_grad():
                x = positions[rows].detach().requires_grad_(True)
                (slope,) = torch.autograd.grad(field(x.permute(1, 2, 0)).sum(), x, create_graph=True)
                (product,) = torch.autograd.grad(slope, x, -grad[rows])
            products[rows] = product
        return torch.where(sound[:, None, None], products, 0.0), None, None, None


def _rebuild(system: str, options: Mapping[str, Any]) -> BatchedEnergy:
    return BatchedEnergy(openmm.XmlSerializer.deserialize(system), **options, verify=False)


def _padded(kernel: Kernel, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel on contiguous positions, their batch padded to whole vector registers."""
    n = positions.shape[2]
    padded = positions
    if n % LANES or not positions.is_contiguous() or positions.is_inference():
        padded = positions.new_empty(*positions.shape[:2], -(-n // LANES) * LANES)
        padded[..., :n] = positions
        padded[..., n:] = positions[..., -1:]
    with torch.no_grad():  # compiled kernels are made anew where the mode changes
        energies, forces = kernel(padded)
    return energies[:n], forces[..., :n]


def _poses(positions: Any, n_atoms: int) -> np.ndarray:
    """Configurations (B, A, 3) [nm] to compare on: those given and perturbed copies, or random packings."""
    rng = np.random.default_rng(0)
    if positions is None:
        side = round(np.ceil(n_atoms ** (1 / 3)))
        grid = 0.2 * np.stack(np.meshgrid(*[np.arange(side)] * 3), -1).reshape(-1, 3)
        return np.stack([rng.permutation(grid)[:n_atoms] + rng.uniform(-0.05, 0.05, (n_atoms, 3)) for _ in range(4)])
    given = to_float(positions, unit.nanometer, "positions")
    given = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given, dtype=np.float64)
    if given.ndim not in (2, 3) or given.shape[-2:] != (n_atoms, 3):
        raise ValueError(f"positions have shape {given.shape}; expected (batch, {n_atoms}, 3) or ({n_atoms}, 3)")
    given = given.reshape(-1, n_atoms, 3)[:4]
    return np.concatenate([given, *(given + rng.normal(scale=s, size=given.shape) for s in (0.002, 0.02))])
