"""Which engine computes the energy of a System: batches where possible, OpenMM's own otherwise or on demand."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from openmm_tsf.energy.agreement import EnergyMismatch
from openmm_tsf.energy.batched import BatchedEnergy
from openmm_tsf.energy.lepton import ExpressionError
from openmm_tsf.energy.openmm import OpenMMEnergy
from openmm_tsf.energy.unsupported import UnsupportedForce

ENGINES = ("batched", "openmm")


def choose_energy(
    system: Any,
    positions: Any = None,
    *,
    n: int | None = None,
    engine: str | None = None,
    platform: Any = None,
    precision: str | None = None,
    device_index: Any = None,
) -> BatchedEnergy | OpenMMEnergy:
    """The energy of a System by the engine asked for, or else by the fastest that can compute it.

    Args:
        system: the OpenMM System.
        positions: (A, 3) [nm], a sound geometry on which batched energies are compared with OpenMM's.
        n: how many configurations there are to come. It decides now, and not on the way, whether batches are compiled:
            results are then the same to the last bit however often the work is interrupted.
        engine: "batched", "openmm", or None: OpenMM if one of the next three is given, batched where the System allows,
            and OpenMM otherwise, with a warning that says why.
        platform, precision, device_index: of OpenMM, see `OpenMMEnergy`.

    Raises:
        ValueError: an unknown engine; an OpenMM option for the batched engine; a System that the engine cannot compute.
    """
    options = {"platform": platform, "precision": precision, "device_index": device_index}
    energy = batched_energy(system, positions, engine=engine, **options)
    if energy is None:
        return OpenMMEnergy(system, **options)
    if n is not None:
        energy.compile = energy.pays_off(n)
    return energy


def batched_energy(system: Any, positions: Any, *, engine: str | None, **options: Any) -> BatchedEnergy | None:
    """The batched energy of a System, on a GPU where there is one; None where `choose_energy` wants OpenMM."""
    given = [name for name, value in options.items() if value is not None]
    if engine not in (None, *ENGINES):
        raise ValueError(f"unknown engine {engine!r}; choose from {', '.join(ENGINES)}")
    if engine == "batched" and given:
        raise ValueError(f"{given[0]} = {options[given[0]]!r} is an option of OpenMM: say engine = 'openmm' with it")
    if engine == "openmm" or given:
        return None
    try:
        return BatchedEnergy(system, positions, device="cuda" if torch.cuda.is_available() else None)
    except (UnsupportedForce, ExpressionError, EnergyMismatch) as error:
        if engine == "batched":
            raise
        warnings.warn(f"energies one by one with OpenMM, because batches are not possible: {error}", stacklevel=3)
        return None
