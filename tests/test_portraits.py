"""Portraits of draws, exchanges and the reference say what the functions behind them say, and with what errors."""

import numpy as np
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf import multistate, portraits
from openmm_tsf.portraits import Exact, of_draws, of_exchange, of_reference, of_walkers, steered_alone
from openmm_tsf.records import ExchangeRecord
from openmm_tsf.reference import load_reference
from openmm_tsf.torsions import alpha_left, phi_psi
from openmm_tsf.trajectories import Frames
from openmm_tsf.units import kT

TEMPERATURES = [300.0, 420.0, 600.0]


@pytest.fixture(scope="module")
def molecule():
    return tsf.alanine_dipeptide()


@pytest.fixture(scope="module")
def draws():
    """A few positions of the shipped flow, whose energies are made up."""
    return tsf.pretrained("ala2").at(600.0).sample(400, generator=torch.Generator().manual_seed(1))[0]


@pytest.fixture(scope="module")
def record(draws):
    """An exchange that visits each temperature with energies of oscillators; angles have nothing to do with them."""
    rng = np.random.default_rng(3)
    n, replicas = 120, 6
    levels = rng.permuted(np.tile(np.arange(3), (n, 2)), axis=1)
    energies = 30.0 * kT(np.array(TEMPERATURES)[levels]) * rng.gamma(30.0, 1.0 / 30.0, (n, replicas))
    stored = np.arange(1, n, 2)
    frames = draws.numpy()[rng.integers(len(draws), size=(len(stored), replicas))].astype(np.float32)
    return ExchangeRecord(
        "batched",
        np.array(TEMPERATURES),
        levels,
        energies,
        np.zeros((3, 3)),
        np.zeros((3, 3)),
        ({}, {}, {}),
        frames,
        stored,
    )


def test_the_exchange_is_that_of_multistate(record, molecule):
    found = of_exchange(record, molecule, TEMPERATURES, model="made up", source="exchange")
    assert found.n_iterations == record.n_iterations
    phi, psi = phi_psi(record.positions.reshape(-1, molecule.n_atoms, 3), molecule)
    thinned = portraits.with_frames(record)
    assert (thinned.energies[3] == record.energies[7]).all()
    rows = multistate.observables(thinned, TEMPERATURES, phi, psi, n_discard=6)
    for portrait, row in zip(found.portraits, rows, strict=True):
        assert portrait.left == pytest.approx(row["alpha_left"])
        assert portrait.left_error == pytest.approx(row["alpha_left_error"])
        assert abs(portrait.mean_energy - row["mean_energy"]) < 4.0 * portrait.mean_energy_error
        assert np.sum(portrait.ramachandran) == pytest.approx(1.0)
    assert Exact.from_json(found.to_json()) == found
    assert found.at(590.0).temperature == 600.0


def test_draws_raw_and_reweighted(draws, molecule):
    phi, _ = phi_psi(draws, molecule)
    positive = torch.tensor(phi > 0.0)
    log_prob = torch.where(positive, 0.0, -1.0)
    ensemble = tsf.Ensemble(draws, torch.zeros(len(draws)), log_prob, 300.0)
    raw, weighted = (of_draws(ensemble, molecule, weighted=flag) for flag in (False, True))
    share = float(positive.double().mean())
    assert 0.0 < raw.positive == pytest.approx(share)
    assert raw.positive_error == pytest.approx((share * (1.0 - share) / len(draws)) ** 0.5)
    assert weighted.positive == pytest.approx(share / (share + (1.0 - share) * np.e))
    assert (raw.mean_energy, raw.ess) == (None, None)
    assert weighted.ess == pytest.approx(ensemble.ess)


def test_walkers(draws, molecule):
    """Errors come from whole walkers: eight of which one is in alpha_L all the time give 1/8 +- 1/8."""
    phi, _ = phi_psi(draws, molecule)
    there, elsewhere = draws[alpha_left(phi)][0], draws[phi < 0.0][0]
    positions = torch.stack([there, *[elsewhere] * 7]).repeat(5, 1, 1).numpy()
    found = of_walkers(Frames(positions, np.full(40, 600.0), n_walkers=8), molecule)
    assert found == pytest.approx({"positive": 0.125, "positive_error": 0.125, "left": 0.125, "left_error": 0.125})


def test_the_reference_and_what_steering_its_map_alone_makes_of_it():
    """The second number is this package's reference; its map at 600 K, squared, has too little at positive phi."""
    found = of_reference(load_reference("ala2"), model="ff96-obc1")
    cold, hot = found.at(300.0), found.at(600.0)
    assert steered_alone(hot, 600.0) == pytest.approx(hot.positive)
    assert cold.positive == pytest.approx(0.00318, abs=5e-5)
    assert steered_alone(hot, 300.0) == pytest.approx(0.00215, abs=5e-5)
    assert cold.left_error <= cold.positive_error < 1.5 * cold.left_error
    assert found.rows[0]["heat_capacity"] == pytest.approx(0.2443, abs=5e-4)
    assert np.sum(np.array(hot.energy_density) * np.diff(hot.energy_edges)) == pytest.approx(1.0)


def test_two_states_give_back_their_energy_and_entropy():
    """ln odds = S - E/kT at both temperatures; the errors are those of many noisy pairs."""
    energy, entropy, rng = 12.0, -0.7, np.random.default_rng(2)
    share = {t: 1.0 / (1.0 + np.exp(energy / kT(t) - entropy)) for t in (300.0, 600.0)}

    def pair(noise):
        values = [share[t] * (1.0 + 0.02 * x) for t, x in zip(share, noise, strict=True)]
        of = zip(share, values, strict=True)
        return [portraits.Portrait(t, 1, None, v, 0.02 * v, 0, 0, None, None, [], [], [], 0.0) for t, v in of]

    found = portraits.two_states(*pair((0.0, 0.0)))
    assert (found[0], found[2]) == pytest.approx((energy, entropy))
    many = np.array([portraits.two_states(*pair(rng.normal(size=2))) for _ in range(2000)])
    assert many[:, [0, 2]].std(0) == pytest.approx([found[1], found[3]], rel=0.06)


def test_steering_alone_is_exact_without_entropy():
    """Cells of one energy each and one width follow p^(T0/T)."""
    energy = np.random.default_rng(1).normal(0.0, 4.0, (64, 64))
    cells = [np.exp(-energy / kT(t)) / np.exp(-energy / kT(t)).sum() for t in (600.0, 300.0)]
    hot = portraits.Portrait(600.0, 1, None, 0.5, 0.0, 0.0, 0.0, None, None, cells[0].tolist(), [], [], 0.0)
    assert steered_alone(hot, 300.0) == pytest.approx(cells[1][32:].sum())
