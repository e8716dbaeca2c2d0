"""The shipped alanine dipeptide reference: its arrays agree with one another and with the paper trail they carry."""

from __future__ import annotations

import json
from importlib.resources import files

import numpy as np
import pytest

BOLTZMANN = 0.00831446261815324


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    path = files("openmm_tsf") / "data" / "ala2_ff96_reference.npz"
    assert path.stat().st_size < 200_000
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def test_has_both_ends_and_every_row(reference: dict[str, np.ndarray]) -> None:
    temperatures = reference["temperatures"]
    assert {300.0, 600.0} <= set(temperatures.tolist())
    assert np.all(np.diff(temperatures) > 0)
    for name in ("alpha_left", "phi_positive", "mean_energy", "energy_variance"):
        assert reference[name].shape == reference[f"{name}_error"].shape == temperatures.shape
        assert np.all(reference[f"{name}_error"] > 0)
    assert reference["ramachandran"].shape == (len(temperatures), 64, 64)
    assert reference["n_effective"].shape == temperatures.shape


def test_histograms_are_normalised(reference: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(reference["ramachandran"].sum(axis=(1, 2), dtype=float), 1.0, atol=1e-5)
    np.testing.assert_allclose(reference["energy_histogram"].sum(axis=1), 1.0, atol=1e-9)
    np.testing.assert_allclose(reference["basin_share"].sum(axis=1), 1.0, atol=1e-9)


def test_phi_is_the_first_axis(reference: dict[str, np.ndarray]) -> None:
    """The bins of phi > 0 hold the phi > 0 share; the transposed histogram does not."""
    histogram = reference["ramachandran"].astype(float)
    np.testing.assert_allclose(histogram[:, 32:, :].sum(axis=(1, 2)), reference["phi_positive"], rtol=1e-4)
    assert np.all(histogram[:, :, 32:].sum(axis=(1, 2)) > 5.0 * reference["phi_positive"])


def test_energy_histogram_has_the_mean(reference: dict[str, np.ndarray]) -> None:
    edges = reference["energy_edges"]
    centres = (edges[:, 1:] + edges[:, :-1]) / 2.0
    mean = np.sum(centres * reference["energy_histogram"], axis=1)
    width = edges[:, 1] - edges[:, 0]
    assert np.all(np.abs(mean - reference["mean_energy"]) < width / 2.0)


def test_mean_energy_rises_as_the_fluctuations_say(reference: dict[str, np.ndarray]) -> None:
    """d<U>/dT = var U / kT^2, integrated from the lowest to the highest temperature (trapezoid), within 5 errors."""
    temperatures = reference["temperatures"]
    capacity = reference["energy_variance"] / (BOLTZMANN * temperatures**2)
    error = reference["energy_variance_error"] / (BOLTZMANN * temperatures**2)
    np.testing.assert_allclose(reference["heat_capacity"], capacity, rtol=1e-9)
    rise = reference["mean_energy"][-1] - reference["mean_energy"][0]
    span = temperatures[-1] - temperatures[0]
    allowed = 5.0 * np.hypot(error.mean() * span, np.hypot(*reference["mean_energy_error"][[0, -1]]))
    assert abs(np.trapezoid(capacity, temperatures) - rise) < allowed
    assert allowed < 0.1 * rise


def test_alpha_left_is_sharp_and_where_others_found_it(reference: dict[str, np.ndarray]) -> None:
    """Error below 10 % of the share at 300 K, and the share consistent with plain dynamics, 0.26 +- 0.02 %."""
    cold = reference["temperatures"].tolist().index(300.0)
    share, error = reference["alpha_left"][cold], reference["alpha_left_error"][cold]
    assert error < 0.1 * share
    assert abs(share - 0.0026) < 4.0 * np.hypot(error, 0.0002)


def test_metadata_is_complete(reference: dict[str, np.ndarray]) -> None:
    metadata = json.loads(str(reference["metadata"]))
    for key in ("seed", "timestep_fs", "nanoseconds", "openmm", "pymbar", "method", "transitions", "n_blocks"):
        assert key in metadata
    assert metadata["transitions"] > 500
    assert metadata["picoseconds_per_walker"] > 100.0 * metadata["phi_autocorrelation_ps"]
    assert metadata["timestep_fs"] == 1.0
    assert reference["n_frames"] >= 10_000_000
