"""Double wells: what quadrature says of them is right, and parallel tempering samples it at every temperature."""

import math
from itertools import pairwise

import pytest
import torch
from molecules import seeded
from scipy.integrate import quad

from openmm_tsf import wells as module
from openmm_tsf.wells import DoubleWells, random_wells, temper, temperature_ladder

SLANTED = DoubleWells(torch.tensor([0.7, -0.2]).double(), torch.tensor([[1.0, 0.4], [-0.3, 0.8]]).double())


def test_energy_by_hand():
    wells = DoubleWells(torch.tensor([0.5, -1.0]), torch.tensor([[0.0, 2.0], [1.0, 0.0]]), b=-3.0, c=2.0)
    x = torch.tensor([[1.0, 0.5], [0.0, 0.0]])  # y = (1, 1)
    assert torch.allclose(wells(x), torch.tensor([0.5 - 1.0 + 2 * (-3.0 + 2.0), 0.0]))
    assert wells(x.float()).dtype == torch.float32


def test_cold_wells_are_harmonic():
    """Two Gaussians of curvature -4 b in each direction; corrections are of order T."""
    wells, tau = DoubleWells(torch.zeros(3), 2.0 * torch.eye(3)), 1e-4
    exact = wells.at(tau)
    assert exact.mean_energy == pytest.approx(3 * (-4.0 + 0.5 * tau), abs=tau)
    entropy = 3 * (0.5 * math.log(2 * math.pi * math.e * tau / 16.0) + math.log(2.0)) - 3 * math.log(2.0)
    assert exact.entropy == pytest.approx(entropy, abs=3 * tau)


@pytest.mark.parametrize("tau", [0.1, 1.0, 10.0])
def test_one_dimension_is_that_of_scipy(tau):
    wells, edge = DoubleWells(torch.tensor([0.8]), torch.tensor([[-1.5]])), 4.0

    def boltzmann(x, power=0):
        u = float(wells(torch.tensor([[x]])))
        return u**power * math.exp(-(u + 6.0) / tau)

    options = {"points": [-1.0, 0.0, 1.0], "epsabs": 0.0, "epsrel": 1e-11, "limit": 200}
    z = quad(boltzmann, -edge, edge, **options)[0]
    energy = quad(boltzmann, -edge, edge, args=(1,), **options)[0] / z
    exact = wells.at(tau)
    assert float(exact.log_z) == pytest.approx(math.log(z) + 6.0 / tau, abs=1e-9)
    assert exact.mean_energy == pytest.approx(energy, abs=1e-9)
    assert exact.entropy == pytest.approx(math.log(z) + (energy + 6.0) / tau, abs=1e-8)


@pytest.mark.parametrize("tau", [0.5, 4.0])
def test_the_density_is_normalised_and_its_entropy_is_minus_its_mean_logarithm(tau):
    exact, edge = SLANTED.at(tau), 9.0
    side = torch.linspace(-edge, edge, 1201)
    x = torch.cartesian_prod(side, side)
    log_p = exact.log_prob(x)
    cell = float(side[1] - side[0]) ** 2
    assert float(log_p.exp().sum()) * cell == pytest.approx(1.0, abs=1e-9)
    assert -float((log_p.exp() * log_p).sum()) * cell == pytest.approx(exact.entropy, abs=1e-8)
    y = x @ SLANTED.mix.T
    assert torch.allclose(exact.means(lambda y: y * y), (log_p.exp()[:, None] * y * y).sum(0) * cell, atol=1e-8)


def test_the_law_of_steering_and_the_slope_of_ln_z():
    wells, x = random_wells(5, generator=seeded(1)), torch.randn(200, 5, generator=seeded(2))
    cold, warm = wells.at(0.3), wells.at(2.0)
    same = 0.3 * cold.log_prob(x) - 2.0 * warm.log_prob(x)
    assert float(same.max() - same.min()) < 1e-12 * float(wells(x).abs().max()) * 10
    step = 1e-4
    slope = (float(wells.at(1 / (1 + step)).log_z) - float(wells.at(1 / (1 - step)).log_z)) / (2 * step)
    assert slope == pytest.approx(-wells.at(1.0).mean_energy, abs=1e-5)


def test_random_wells_are_as_said_and_follow_the_seed():
    wells = [random_wells(20, generator=seeded(seed)) for seed in (1, 1, 2)]
    assert torch.equal(wells[0].mix, wells[1].mix) and torch.equal(wells[0].a, wells[1].a)
    assert not torch.equal(wells[0].mix, wells[2].mix)
    for system in wells:
        values = torch.linalg.svdvals(system.mix)
        assert 0.5**0.5 - 1e-12 < values.min() < values.max() < 2.0**0.5 + 1e-12
        assert system.a.abs().max() < 1.0 and system.a.std() > 0.3


def test_directions_of_random_matrices_are_uniform():
    """The corner of a Haar matrix has mean 0 and mean square 1/d; QR without the signs has a corner of one sign."""
    corners = torch.stack([module._orthogonal(3, generator)[0, 0] for generator in [seeded(3)] for _ in range(4000)])
    assert abs(float(corners.mean())) < 4.5 * (1 / 3 / 4000) ** 0.5
    assert abs(float((corners**2).mean()) - 1 / 3) < 4.5 * (4 / 45 / 4000) ** 0.5


def test_ladders_hold_their_three_temperatures():
    ladder = temperature_ladder(0.1, 1.0, 10.0, 100)
    assert len(ladder) == 100 and ladder == sorted(set(ladder))
    assert ladder[0] == 0.1 and 1.0 in ladder and ladder[-1] == 10.0
    assert temperature_ladder(0.9, 1.0, 10.0, 3) == [0.9, 1.0, 10.0]
    assert max(b / a for a, b in pairwise(ladder)) < 1.05


# --- parallel tempering -----------------------------------------------------------------------------------------------

SMALL = DoubleWells(torch.tensor([0.05, -0.1, 0.2]).double(), random_wells(3, generator=seeded(4)).mix)
"""With tilts so small that either well is seen at every temperature."""
LADDER = temperature_ladder(0.15, 1.0, 10.0, 20)


def deviations(samples, wells):
    """Of means, shares of the wells and energies from quadrature, in standard errors by blocks of time: (K, 4 d)."""
    rows = []
    for tau, x in zip(samples.temperatures, samples.x.double(), strict=True):
        y, exact = x @ wells.mix.T, wells.at(tau)
        functions = (lambda y: y, lambda y: (y > 0).double(), lambda y: y * y, wells.well)
        seen = torch.cat([f(y) for f in functions], 1).view(20, -1, 4 * wells.dim).mean(1)
        expected = torch.cat([exact.means(f) for f in functions])
        rows.append((seen.mean(0) - expected) / (seen.std(0) / 20**0.5))
    return torch.stack(rows)


def test_tempering_samples_every_temperature():
    samples = temper(SMALL, LADDER, 16_000, n_replicas=32, generator=seeded(5))
    found = deviations(samples, SMALL)
    assert found.abs().max() < 5.0  # 240 numbers of Student's t of 19 degrees of freedom
    assert found.pow(2).mean() < 2.0
    assert samples.x.shape == (20, 16_000, 3)
    assert samples.swaps_accepted.min() > 0.5 and samples.moves_accepted.min() > 0.1
    assert samples.n_energy_evaluations == 20 * 32 * 600 * 3


@pytest.mark.parametrize("wrong", ["exchange", "moves"])
def test_wrong_tempering_is_noticed(monkeypatch, wrong):
    if wrong == "exchange":
        right = module.exchange
        monkeypatch.setattr(module, "exchange", lambda levels, u, *rest, **kw: right(levels, 0.5 * u, *rest, **kw))
    else:
        step = module._step
        monkeypatch.setattr(module, "_step", lambda wells, y, taus, *rest: step(wells, y, 1.2 * taus, *rest))
    samples = temper(SMALL, LADDER, 16_000, n_replicas=32, generator=seeded(5))
    assert deviations(samples, SMALL).pow(2).mean() > 4.0


def test_samples_follow_the_generator_and_are_as_many_as_asked_for():
    first, second = (temper(SMALL, [0.5, 1.0], 33, n_replicas=8, generator=seeded(6)) for _ in range(2))
    assert torch.equal(first.x, second.x) and first.x.shape == (2, 33, 3)
    assert torch.equal(first.at(1.0), first.x[1])
    with pytest.raises(ValueError, match=r"no samples at 0.7, only at 2 temperatures from 0.5 to 1"):
        first.at(0.7)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="singular"):
        DoubleWells(torch.zeros(2), torch.ones(2, 2))
    with pytest.raises(ValueError, match="2 tilts need a matrix"):
        DoubleWells(torch.zeros(2), torch.ones(1, 2))
    for b, c in ((-1.0, 0.0), (-1.0, math.nan), (0.0, 1.0), (-math.inf, 1.0)):
        with pytest.raises(ValueError, match="two wells need b < 0 < c"):
            DoubleWells(torch.zeros(2), torch.eye(2), b=b, c=c)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature must be finite"):
            SMALL.at(temperature)
    with pytest.raises(ValueError, match="at least 1 dimension"):
        random_wells(0, generator=seeded(1))
    for ladder in ([1.0], [1.0, 0.5], [0.0, 1.0], [1.0, 1.0]):
        with pytest.raises(ValueError, match="ascending"):
            temper(SMALL, ladder, 8, generator=seeded(1))
    with pytest.raises(ValueError, match="low < middle < high"):
        temperature_ladder(0.1, 0.1, 10.0, 5)
    with pytest.raises(ValueError, match="at least 3"):
        temperature_ladder(0.1, 1.0, 10.0, 2)


def test_samples_split_in_time():
    samples = temper(SMALL, [0.5, 1.0], 40, n_replicas=8, generator=seeded(6))
    early, late = samples.split(0.25)
    assert early.x.shape == (2, 30, 3) and late.x.shape == (2, 10, 3)
    assert torch.equal(torch.cat((early.at(1.0), late.at(1.0))), samples.at(1.0))
