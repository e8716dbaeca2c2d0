"""Exploring draws: a mixture of two torsion densities, scored as the mixture it is."""

import math

import pytest
import torch

from openmm_tsf.priors import WARMER, MolecularPrior

SHARE = 0.2


@pytest.fixture
def prior():
    """Two stiff coordinates, a backbone pair with barriers of several kT, and a lone torsion."""
    prior = MolecularPrior(2, [(0, 1), (2,)], energy_order=2, entropy_order=1)
    generator = torch.Generator().manual_seed(11)
    for parameter in prior.parameters():
        parameter.data = 0.8 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return prior.double()


def draws(density, n=40_000, seed=12):
    with torch.no_grad():
        return density.sample(n, generator=torch.Generator().manual_seed(seed))


def mean_and_error(values):
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_mixture_is_normalised_against_the_plain_density(prior, tau):
    """The mean of plain/mixture over draws of the mixture is one, and no ratio exceeds 1/(1 - share)."""
    mixture, plain = prior.at(tau, explore=SHARE), prior.at(tau)
    z, log_prob = draws(mixture)
    ratio = torch.exp(plain.log_prob(z) - log_prob).detach()
    mean, error = mean_and_error(ratio)
    assert abs(mean - 1.0) < 4.0 * error
    assert float(ratio.max()) <= 1.0 / (1.0 - SHARE) + 1e-9


def test_scoring_the_mixture_as_plain_would_show(prior):
    """Negative control: with the plain density in place of the mixture's the same mean is far from one."""
    z, log_prob = draws(prior.at(0.5))
    mean, error = mean_and_error(torch.exp(log_prob - prior.at(0.5, explore=SHARE).log_prob(z)).detach())
    assert abs(mean - 1.0) > 10.0 * error


def test_rare_places_are_drawn_as_often_as_the_mixture_says(prior):
    """Draws where the hotter density dominates come as often as quadrature over the pair says."""
    mixture = prior.at(0.5, explore=SHARE)
    grid = 2.0 * math.pi * torch.arange(128) / 128
    points = torch.cartesian_prod(grid, grid)
    factor = prior.factors[0]
    log_own = (factor.exponent(points, 0.5) - factor.log_z(0.5)).detach()
    log_warm = (factor.exponent(points, 0.5 * WARMER) - factor.log_z(0.5 * WARMER)).detach()
    rare = log_warm > log_own + 2.0
    cell = (2.0 * math.pi / 128) ** 2
    expected = float(((1 - SHARE) * log_own.exp() + SHARE * log_warm.exp())[rare].sum() * cell)
    alone = float(log_own.exp()[rare].sum() * cell)

    z, _ = draws(mixture)
    pair = z[:, 2:4]
    here = (factor.exponent(pair, 0.5 * WARMER) - factor.log_z(0.5 * WARMER)) > (
        factor.exponent(pair, 0.5) - factor.log_z(0.5) + 2.0
    )
    mean, error = mean_and_error(here.double())
    assert abs(mean - expected) < 4.0 * error + 0.01 * expected  # 1 %: cells that the border cuts
    assert expected > 3.0 * alone


def test_lone_torsions_and_stiff_coordinates_stay_at_their_temperature(prior):
    """Given the pair, nothing else is hotter: the ratio of the densities depends on the pair alone."""
    z, _ = draws(prior.at(0.5, explore=SHARE), n=50)
    other, _ = draws(prior.at(0.5, explore=SHARE), n=50, seed=13)
    swapped = torch.cat((other[:, :2], z[:, 2:4], other[:, 4:]), 1)
    mixture, plain = prior.at(0.5, explore=SHARE), prior.at(0.5)
    torch.testing.assert_close(
        mixture.log_prob(z) - plain.log_prob(z), mixture.log_prob(swapped) - plain.log_prob(swapped)
    )


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_impossible_shares_are_refused(prior, share):
    with pytest.raises(ValueError, match="share of exploring draws must be in 0"):
        prior.at(1.0, explore=share)
