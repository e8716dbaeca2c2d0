"""Constants and the one place where units are taken off.

Inside the package everything is a plain number: lengths in nm, energies in kJ/mol, temperatures in K, time in the unit
that a name says, log-densities in nat.
"""

from __future__ import annotations

import math
from typing import Any

BOLTZMANN = 0.00831446261815324
"""Molar gas constant, kJ/mol/K (CODATA 2018, exact; the value OpenMM uses)."""


def kT(temperature: Any) -> Any:
    """Thermal energy [kJ/mol] of a temperature [K] (number, array or tensor)."""
    return BOLTZMANN * temperature


def to_float(value: Any, unit: Any, what: str) -> Any:
    """Take the unit off a value.

    Args:
        value: an `openmm.unit.Quantity`, or a plain number or array that is already in `unit`.
        unit: the `openmm.unit` unit wanted.
        what: name of the quantity, for the error.

    Raises:
        ValueError: the quantity has another dimension than `unit`.
    """
    if not hasattr(value, "value_in_unit"):
        return value
    try:
        return value.value_in_unit(unit)
    except TypeError as error:
        raise ValueError(f"{what} has unit {value.unit}; expected one compatible with {unit}") from error


def to_kelvin(temperature: Any) -> float:
    """A temperature as a positive, finite float [K].

    Args:
        temperature: a number in K or an `openmm.unit.Quantity`.

    Raises:
        ValueError: not a number, not finite, or not above zero.
    """
    if hasattr(temperature, "value_in_unit"):
        from openmm import unit

        temperature = to_float(temperature, unit.kelvin, "temperature")
    try:
        kelvin = float(temperature)
    except (TypeError, ValueError) as error:
        raise ValueError(f"temperature must be a number in kelvin, not {temperature!r}") from error
    if not (math.isfinite(kelvin) and kelvin > 0.0):
        raise ValueError(f"temperature must be finite and above 0 K, not {kelvin:g} K")
    return kelvin
