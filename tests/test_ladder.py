"""Ladders: geometric, equal exchange by the flow's free energies, and refusals."""

import copy

import numpy as np
import pytest
import torch
from molecules import seeded
from openmm import unit
from scipy.special import i0e, i1e

from openmm_tsf import pretrained
from openmm_tsf.ladder import check_ladder, flow_ladder, geometric_ladder, mean_energy
from openmm_tsf.priors import MolecularPrior
from openmm_tsf.vectors import LineCoordinates


@pytest.fixture(scope="module")
def flow():
    return pretrained("ala2").requires_grad_(False)


@pytest.fixture(scope="module")
def bumpy(flow):
    """A flow of two stiff coordinates and two torsions with barriers of 8 k_B 600 K, whose closed form is known."""
    prior = MolecularPrior(2, [(0,), (1,)], energy_order=1, entropy_order=0, anharmonic=False)
    prior = prior.double().requires_grad_(False)
    for factor in prior.factors:
        factor.marginal.coefficients[0, 0] = BARRIER
    other = copy.deepcopy(flow)
    other.prior, other.internals = prior, LineCoordinates(prior.dim)
    return other


BARRIER = 8.0


def acceptance(flow, ladder, n, seed=1):
    """Share of exchanges accepted between neighbours, and its standard error, by draws from the prior.

    E follows from the law of steering: it is the difference of ln q at two temperatures, up to a constant.
    """
    taus, rows = np.asarray(ladder) / flow.training_temperature, []
    g, one, other = seeded(seed), flow.prior.at(1.0), flow.prior.at(2.0)
    for tau in taus:
        z = flow.prior.at(tau).sample(n, generator=g)[0]
        rows.append((one.log_prob(z) - other.log_prob(z)) / (1.0 / 2.0 - 1.0))
    found = []
    for k in range(len(taus) - 1):
        a = torch.exp((1.0 / taus[k] - 1.0 / taus[k + 1]) * (rows[k] - rows[k + 1])).clamp(max=1.0)
        found.append((float(a.mean()), float(a.std()) / n**0.5))
    return np.array(found).T


def spread(flow, ladder):
    """Largest over smallest (beta_i - beta_j)(<E>_j - <E>_i), less 1."""
    taus = ladder / flow.training_temperature
    energies = np.array([mean_energy(flow, tau) for tau in taus])
    products = -np.diff(1.0 / taus) * np.diff(energies)
    return products.max() / products.min() - 1.0


def test_geometric():
    ladder = geometric_ladder(300.0, 600.0 * unit.kelvin, 6)
    assert ladder[0] == 300.0 and ladder[-1] == 600.0
    assert np.allclose(ladder[1:] / ladder[:-1], 2.0**0.2, rtol=1e-12)
    assert geometric_ladder(250, 500, 2).tolist() == [250.0, 500.0]


def test_mean_energy_is_that_of_the_prior(bumpy):
    for tau in (0.1, 0.5, 1.0, 3.0):
        exact = 2 * 0.5 * tau - 2 * BARRIER * i1e(BARRIER / tau) / i0e(BARRIER / tau)
        assert mean_energy(bumpy, tau) == pytest.approx(exact, abs=1e-6)


def test_mean_energy_of_the_pretrained_flow_is_that_of_its_draws(flow):
    means, errors = [], []
    for tau in (0.5, 1.0):
        z = flow.prior.at(tau).sample(20_000, generator=seeded(3))[0]
        energy = (flow.prior.at(1.0).log_prob(z) - flow.prior.at(2.0).log_prob(z)) / (0.5 - 1.0)
        means.append(float(energy.mean()))
        errors.append(float(energy.std()) / len(z) ** 0.5)
    difference = mean_energy(flow, 1.0) - mean_energy(flow, 0.5)
    assert np.hypot(*errors) < 0.01 * difference
    assert abs(means[1] - means[0] - difference) < 4 * np.hypot(*errors)


@pytest.mark.parametrize("n", [2, 3, 6, 30])
def test_flow_ladder_has_equal_steps(flow, n):
    ladder = flow_ladder(flow, 300.0 * unit.kelvin, 600, n)
    assert len(check_ladder(ladder)) == n
    assert ladder[0] == 300.0 and ladder[-1] == 600.0
    assert spread(flow, ladder) < 1e-5
    assert n == 2 or spread(flow, geometric_ladder(300, 600, n)) > 0.002


def test_neighbours_of_the_pretrained_flow_exchange_equally_often(flow):
    share, error = acceptance(flow, flow_ladder(flow, 300, 600, 6), 20_000)
    assert error.max() < 0.005
    assert np.abs(share - share.mean()).max() < 4 * error.max()
    assert 0.5 < share.mean() < 0.7


def test_heat_capacities_that_change_need_another_ladder_than_the_geometric(bumpy):
    """Torsions freeze at 600 K and turn freely at 6000 K: the geometric ladder exchanges unequally, that of the flow
    does as well as the product of differences describes acceptance, which is for Gaussian energies."""
    ours, error = acceptance(bumpy, flow_ladder(bumpy, 300, 20_000, 8), 20_000)
    geometric, _ = acceptance(bumpy, geometric_ladder(300, 20_000, 8), 20_000)
    assert error.max() < 0.005
    assert np.ptp(geometric) > 0.12
    assert np.ptp(ours) < 0.3 * np.ptp(geometric)


@pytest.mark.parametrize("make", [geometric_ladder, None], ids=["geometric", "flow"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((300, 600, 1), "a ladder needs at least 2 temperatures, not 1"),
        ((600, 300, 4), "the lowest temperature, 600 K, must be below the highest, 300 K"),
        ((300, 300, 4), "the lowest temperature, 300 K, must be below the highest, 300 K"),
        ((-300, 300, 4), "temperature must be finite and above 0 K, not -300 K"),
    ],
)
def test_ends_that_make_no_sense(flow, make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(*arguments) if make else flow_ladder(flow, *arguments)


@pytest.mark.parametrize(
    "given",
    [
        [300, 400.0, 600],
        (300.0 * unit.kelvin, 400.0 * unit.kelvin, 600.0 * unit.kelvin),
        np.array([300.0, 400.0, 600.0]),
        [300.0, 400.0, 600.0] * unit.kelvin,
        np.array([300.0, 400.0, 600.0]) * unit.kelvin,
    ],
    ids=["numbers", "quantities", "array", "quantity of a list", "quantity of an array"],
)
def test_ladders_with_and_without_units(given):
    ladder = check_ladder(given)
    assert ladder.dtype == np.float64
    assert ladder.tolist() == [300.0, 400.0, 600.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([300, 400, 400, 500, 500], "temperatures more than once in a ladder: 400 K, 500 K; leave each one once"),
        ([300, 500, 400, 600], "must ascend; found 500 K before 400 K: sort them"),
        ([600, 300], "must ascend; found 600 K before 300 K"),
        ([300], r"at least 2 temperatures, not 1 \(300 K\)"),
        ([], r"at least 2 temperatures, not 0 \(none\)"),
        ([0, 300], "above 0 K, not 0 K"),
        ([300, float("nan")], "finite and above 0 K, not nan K"),
        ([300, "hot"], "must be a number in kelvin, not 'hot'"),
        ([300 * unit.nanometer, 400 * unit.nanometer], "expected one compatible with kelvin"),
        (300, "a ladder is a row of temperatures, not 300"),
    ],
)
def test_what_is_no_ladder(given, message):
    with pytest.raises(ValueError, match=message):
        check_ladder(given)
