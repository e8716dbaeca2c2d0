"""Units come off at the door, and nothing wrong gets through it."""

import math

import numpy as np
import pytest
import torch
from openmm import unit

from openmm_tsf.units import BOLTZMANN, kT, to_float, to_kelvin


def test_boltzmann_is_the_one_of_openmm():
    r = unit.MOLAR_GAS_CONSTANT_R.value_in_unit(unit.kilojoule_per_mole / unit.kelvin)
    assert math.isclose(BOLTZMANN, r, rel_tol=1e-14)
    assert math.isclose(BOLTZMANN, 1.380649e-23 * 6.02214076e23 / 1000, rel_tol=1e-14)


def test_kt_takes_numbers_arrays_and_tensors():
    assert math.isclose(kT(300.0), 2.494338785445972, rel_tol=1e-14)
    assert np.allclose(kT(np.array([300.0, 600.0])), [kT(300.0), kT(600.0)], rtol=1e-15)
    assert torch.equal(kT(torch.tensor([300.0])), torch.tensor([kT(300.0)]))


def test_to_float_takes_the_unit_off_and_leaves_plain_numbers():
    assert math.isclose(to_float(1.5 * unit.angstrom, unit.nanometer, "length"), 0.15)
    assert to_float(0.15, unit.nanometer, "length") == 0.15
    x = to_float(np.ones((2, 3)) * unit.angstrom, unit.nanometer, "positions")
    assert np.allclose(x, 0.1) and isinstance(x, np.ndarray)


def test_to_float_names_what_has_the_wrong_dimension():
    with pytest.raises(ValueError, match=r"bond length has unit .*kelvin.* nanometer"):
        to_float(3.0 * unit.kelvin, unit.nanometer, "bond length")


@pytest.mark.parametrize("value", [300, 300.0, "300", np.float32(300), torch.tensor(300.0), 300 * unit.kelvin])
def test_to_kelvin_accepts(value):
    kelvin = to_kelvin(value)
    assert isinstance(kelvin, float) and math.isclose(kelvin, 300.0)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, -math.inf, 0 * unit.kelvin, -5 * unit.kelvin])
def test_to_kelvin_refuses_what_is_no_temperature(value):
    with pytest.raises(ValueError, match="above 0 K, not"):
        to_kelvin(value)


@pytest.mark.parametrize("value", [None, "warm", [300.0, 600.0], np.array([300.0, 600.0]), 1j])
def test_to_kelvin_refuses_what_is_no_number(value):
    with pytest.raises(ValueError, match="must be a number in kelvin"):
        to_kelvin(value)


@pytest.mark.parametrize("value", [1.0 * unit.kilojoule_per_mole, 1.0 * unit.nanometer])
def test_to_kelvin_refuses_other_quantities(value):
    with pytest.raises(ValueError, match="temperature has unit"):
        to_kelvin(value)
