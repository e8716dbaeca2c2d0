"""Latent densities: normalised at every temperature, drawn as they are scored, and steerable to rounding."""

import math

import laws
import pytest
import scipy.stats
import torch

from openmm_tsf.priors import GRID, MolecularPrior, TorusFactor, TorusPotential

TAUS = (1.0, 0.5, 0.25)


def randomise(module: torch.nn.Module, size: float, seed: int) -> None:
    """Fourier coefficients at random, falling off with the harmonic as those of smooth potentials do."""
    g = torch.Generator().manual_seed(seed)
    for potential in module.modules():
        if isinstance(potential, TorusPotential):
            falloff = 1.0 / (1.0 + (potential.modes**2).sum(-1))
            noise = torch.randn(potential.coefficients.shape, generator=g)
            potential.coefficients.data = size * falloff * noise
    module.requires_grad_(False)


def random_factor(dim: int, *, energy: float = 3.0, entropy: float = 1.0, seed: int = 11) -> TorusFactor:
    factor = TorusFactor(dim, 4, 2)
    randomise(factor.marginal, energy, seed)
    randomise(factor.entropy, entropy, seed + 1)
    return factor


def random_prior(n_stiff: int, groups, *, seed: int = 5, entropy_order: int = 2) -> MolecularPrior:
    prior = MolecularPrior(n_stiff, groups, energy_order=3, entropy_order=entropy_order)
    for factor in prior.factors:
        randomise(factor.marginal, 2.0, seed)
        randomise(factor.entropy, 0.4, seed + 1)
    if prior.stiff is not None:
        prior.stiff.requires_grad_(False)  # gradients of it have their own tests
    return prior


def factor_log_prob(factor: TorusFactor, tau: float):
    """ln of the density of the angles of one factor, from the parts of the definition."""
    log_z = factor.log_z(tau)
    return lambda a: factor.entropy(a) - factor.energy(a) / tau - log_z


# --- Fourier series ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2])
def test_potentials_are_the_series_that_they_say(dim, generator):
    potential = TorusPotential(dim, 3)
    randomise(potential, 1.0, 1)
    modes = potential.modes.tolist()
    assert len(modes) == len({tuple(m) for m in modes}) == ((2 * 3 + 1) ** dim - 1) // 2
    assert not {tuple(m) for m in modes} & {tuple(-k for k in m) for m in modes}
    a = laws.TWO_PI * torch.rand(20, dim, generator=generator)
    alpha, beta = potential.coefficients
    series = sum(
        alpha[i] * torch.cos(a @ torch.tensor(m, dtype=a.dtype))
        + beta[i] * torch.sin(a @ torch.tensor(m, dtype=a.dtype))
        for i, m in enumerate(modes)
    )
    assert float((potential(a) - series).abs().max()) < 1e-12
    assert float((potential(a + laws.TWO_PI) - potential(a)).abs().max()) < 1e-12


@pytest.mark.parametrize("dim", [1, 2])
def test_values_and_slopes_on_the_grid_are_those_of_the_series(dim):
    potential = TorusPotential(dim, 3)
    randomise(potential, 1.0, 2)
    axis = torch.arange(GRID[dim]) * (laws.TWO_PI / GRID[dim])
    points = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    assert float((potential.on_grid().flatten() - potential(points)).abs().max()) < 1e-11
    slopes = laws.jacobians(lambda a: potential(a)[:, None], points)[:, 0]
    for d in range(dim):
        assert float((potential.on_grid(d).flatten() - slopes[:, d]).abs().max()) < 1e-11


@pytest.mark.parametrize("dim", [1, 2])
def test_no_second_derivative_exceeds_the_bound(dim, generator):
    potential = TorusPotential(dim, 4)
    randomise(potential, 1.0, 3)
    a = laws.TWO_PI * torch.rand(100, dim, generator=generator)
    hessians = torch.stack([torch.autograd.functional.hessian(lambda x: potential(x[None])[0], x) for x in a])
    largest = float(torch.linalg.eigvalsh(hessians).abs().max())
    assert 0.1 * float(potential.curvature_bound()) < largest <= float(potential.curvature_bound())


def test_three_angles_have_no_potential():
    with pytest.raises(ValueError, match="1 or 2 angles, not 3"):
        TorusPotential(3, 1)


# --- normalised -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("dim", [1, 2])
def test_torsion_factors_are_normalised(dim, tau):
    factor = random_factor(dim)
    axes = [laws.circle({1: 700, 2: 150}[dim])] * dim  # other points than those of the quadrature inside
    laws.normalised(factor_log_prob(factor, tau), axes)


@pytest.mark.parametrize("tau", [1.0, 0.4])
@pytest.mark.parametrize(
    ("n_stiff", "groups"), [(0, [(0, 1)]), (1, [(0,)]), (2, [(0,)]), (1, [(0, 1)]), (1, [(1,), (0,)]), (2, [])], ids=str
)
def test_priors_are_normalised(n_stiff, groups, tau):
    prior = random_prior(n_stiff, groups)
    a = laws.TWO_PI * torch.rand(1000, prior.n_soft, generator=torch.Generator().manual_seed(1))
    widest = float(prior.log_width(a).exp().max())
    axes = [laws.line(9.0 * math.sqrt(tau) * widest, 110)] * n_stiff + [laws.circle(48)] * prior.n_soft
    laws.normalised(prior.at(tau).log_prob, axes, atol=1e-8)


def test_a_wrong_constant_is_noticed():
    prior = random_prior(1, [(0,)])
    axes = [laws.line(30.0, 300), laws.circle(100)]
    with pytest.raises(AssertionError, match="integrates to"):
        laws.normalised(lambda z: prior.at(0.5).log_prob(z) + 1e-6, axes)


def test_the_marginal_of_the_torsions_is_the_integral_over_the_rest():
    prior, tau = random_prior(1, [(0,), (1,)]), 0.5
    a = laws.TWO_PI * torch.rand(7, 2, generator=torch.Generator().manual_seed(2))
    u = laws.line(60.0, 4001)
    z = torch.cat((u.repeat(len(a))[:, None], a.repeat_interleave(len(u), 0)), 1)
    integral = prior.at(tau).log_prob(z).reshape(len(a), -1).logsumexp(1) + math.log(float(u[1] - u[0]))
    assert float((integral - prior.at(tau).log_prob_torsions(a)).detach().abs().max()) < 1e-9


# --- faithful ---------------------------------------------------------------------------------------------------------

SHARP = 12.0
"""Size of the coefficients [kT] of peaked potentials."""
COARSE = {1: (40, 12), 2: (20, 12)}
FINE = {1: (4 * GRID[1], 2), 2: (2 * GRID[2], 2)}
"""Bins along each angle, coarse ones and such that divide the cells of the sampler; quadrature points inside."""
COLD = {1: 0.03, 2: 0.25}
"""tau at which peaks are a few cells wide."""


def draws_follow(factor: TorusFactor, draws: torch.Tensor, tau: float, how: dict) -> None:
    bins, inside = how[factor.dim]
    laws.follow(draws, factor_log_prob(factor, tau), bins, inside=inside)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("energy", [3.0, SHARP], ids=["smooth", "sharp"])
@pytest.mark.parametrize("dim", [1, 2])
def test_torsions_are_drawn_as_they_are_scored(dim, energy, tau, generator):
    factor = random_factor(dim, energy=energy)
    draws = factor.sample(100_000, tau, generator=generator)
    assert draws.shape == (100_000, dim) and float(draws.abs().max()) <= math.pi
    draws_follow(factor, draws, tau, COARSE)


class CellConstant(TorusFactor):
    """The bias to look for: cells by the density at their centre, uniform inside, scored by the smooth density."""

    def sample(self, n, tau, *, generator):
        axis = torch.arange(GRID[self.dim]) * (laws.TWO_PI / GRID[self.dim])
        points = torch.cartesian_prod(*[axis] * self.dim).reshape(-1, self.dim)
        density = torch.exp(self.entropy(points) - self.energy(points) / tau)
        cell = torch.multinomial(density, n, replacement=True, generator=generator)
        inside = (torch.rand(n, self.dim, generator=generator) - 0.5) * (laws.TWO_PI / GRID[self.dim])
        return points[cell] + inside


@pytest.mark.parametrize("dim", [1, 2])
def test_a_cell_constant_sampler_is_caught_and_ours_is_not(dim, generator):
    factor, tau = random_factor(dim, energy=SHARP), COLD[dim]
    draws_follow(factor, factor.sample(100_000, tau, generator=generator), tau, FINE)
    factor.__class__ = CellConstant
    draws = factor.sample(100_000, tau, generator=generator)
    with pytest.raises(AssertionError, match=r"do not follow.*p = "):
        draws_follow(factor, draws, tau, FINE)


def test_an_envelope_that_is_no_bound_is_caught(generator, monkeypatch):
    factor = random_factor(1)
    bound = factor._envelope(0.5)
    monkeypatch.setattr(TorusFactor, "_envelope", lambda self, tau: bound.clamp(max=float(bound.max()) - 0.5))
    draws = factor.sample(100_000, 0.5, generator=generator)
    with pytest.raises(AssertionError, match="do not follow"):
        draws_follow(factor, draws, 0.5, COARSE)


@pytest.mark.parametrize("energy", [0.5, 3.0, SHARP])
@pytest.mark.parametrize("tau", [*TAUS, 2.0])
@pytest.mark.parametrize("dim", [1, 2])
def test_the_envelope_is_an_upper_bound(dim, tau, energy, generator):
    factor = random_factor(dim, energy=energy)
    side = GRID[dim]
    envelope = factor._envelope(tau)
    for corner in (0.0, 0.49999, None):  # centres, corners, anywhere
        offset = torch.rand(side**dim, dim, generator=generator) - 0.5 if corner is None else torch.tensor(corner)
        index = torch.cartesian_prod(*[torch.arange(side)] * dim).reshape(-1, dim)
        angles = (index + offset) * (laws.TWO_PI / side)
        room = envelope - (factor.entropy(angles) - factor.energy(angles) / tau)
        assert float(room.min()) > -1e-10
    # and it is of use: a good part of the proposals is accepted
    log_area = float(envelope.logsumexp(0)) + dim * math.log(laws.TWO_PI / side)
    assert math.exp(float(factor.log_z(tau)) - log_area) > 0.02


@pytest.mark.parametrize("tau", TAUS)
def test_log_prob_of_draws_is_that_of_log_prob(tau, generator):
    laws.faithful(random_prior(4, [(0, 2), (1,)]).at(tau), 1000, generator, atol=1e-11)


def test_weights_between_temperatures_average_to_one(generator):
    prior = random_prior(3, [(0, 1), (2,)])
    z, log_q = prior.at(1.0).sample(200_000, generator=generator)
    with torch.no_grad():
        laws.mean_weight_is_one(prior.at(0.8).log_prob(z), log_q)
        with pytest.raises(AssertionError, match="mean of p/q"):
            laws.mean_weight_is_one(prior.at(0.8).log_prob(z) + 0.02, log_q)


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_stiff_coordinates_are_gaussians_of_the_width_that_the_torsions_give(tau, generator):
    prior = random_prior(3, [(0,), (1,)])
    with torch.no_grad():
        z, _ = prior.at(tau).sample(50_000, generator=generator)
        u, a = z[:, :3], z[:, 3:]
        width = prior.log_width(a).exp() * math.sqrt(tau)
    assert float(width.max() / width.min()) > 1.5
    assert scipy.stats.kstest((u / width).flatten().numpy(), "norm").pvalue > 1e-3
    narrow = (width < width.median())[:, 0]  # not only on average over the torsions
    assert scipy.stats.kstest((u / width)[narrow].flatten().numpy(), "norm").pvalue > 1e-3
    assert scipy.stats.kstest((u / width.mean())[narrow].flatten().numpy(), "norm").pvalue < 1e-6


def test_draws_are_differentiable_in_the_widths(generator):
    prior = random_prior(2, [(0,)]).requires_grad_()
    z, log_prob = prior.at(1.0).sample(10, generator=generator)
    grads = torch.autograd.grad(z.sum() + log_prob.sum(), prior.factors[0].entropy.coefficients)
    assert float(grads[0].abs().min()) > 0


# --- steerable --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entropy_order", [0, 2])
def test_priors_steer(entropy_order, generator):
    prior = random_prior(4, [(0, 2), (1,)], entropy_order=entropy_order)
    z = torch.randn(2000, prior.dim, generator=generator) * 3.0
    for tau in (0.5, 0.25, 2.0):
        laws.steerable(prior, z, 1.0, tau, bound=1e-11)


def test_an_entropy_that_the_widths_do_not_carry_breaks_that(generator):
    prior = random_prior(4, [(0,)])
    z = torch.randn(2000, prior.dim, generator=generator)

    class Broken:
        def at(self, tau):
            steered = prior.at(tau)
            wide = 1.1 * prior.log_width(z[:, 4:])[:, 0]

            class Density:
                def log_prob(self, z):
                    return (
                        steered.log_prob_torsions(z[:, 4:])
                        - 4 * wide
                        - 0.5 * (z[:, :4] ** 2).sum(1) * torch.exp(-2 * wide) / tau
                        - 2 * math.log(laws.TWO_PI * tau)
                    )

            return Density()

    assert laws.steering_spread(Broken(), z, 1.0, 0.5) > 1e-3


def test_basins_gain_entropy_on_heating():
    """Two wells of equal depth and unequal width of the stiff coordinates: populations at any tau follow exp(s)."""
    factor = TorusFactor(1, 2, 1).requires_grad_(False)
    prior = MolecularPrior(6, [(0,)], energy_order=2, entropy_order=1)
    prior.factors[0] = factor
    factor.entropy.coefficients.data[0, 0] = 0.8  # s = 0.8 cos a
    factor.marginal.coefficients.data[0] = torch.tensor([0.8, 4.0])  # m = s - e, e = -4 cos 2a
    a = laws.circle(2000)[:, None]
    for tau in (0.25, 0.5, 1.0, 2.0):
        density = prior.at(tau).log_prob_torsions(a).exp()
        left, right = float(density[a[:, 0].cos() < 0].sum()), float(density[a[:, 0].cos() > 0].sum())
        exact = torch.exp(0.8 * a.cos() + 4.0 * torch.cos(2 * a) / tau)
        assert abs(right / left - float(exact[a.cos() > 0].sum() / exact[a.cos() < 0].sum())) < 1e-9
        assert abs(math.log(right / left) - 1.6) < 0.3  # the same at every temperature: an entropy, not an energy


# --- exploring: a share of the torsions from a hotter density ---------------------------------------------------------


@pytest.mark.parametrize(("n_stiff", "groups"), [(1, [(0,)]), (0, [(0, 1)]), (0, [(0,), (1,)])], ids=str)
def test_exploring_densities_are_normalised(n_stiff, groups):
    prior = random_prior(n_stiff, groups)
    axes = [laws.line(30.0, 400)] * n_stiff + [laws.circle(100)] * prior.n_soft
    laws.normalised(prior.at(0.5, explore=0.3).log_prob, axes, atol=1e-8)


@pytest.mark.parametrize("groups", [[(0,)], [(0, 1)], [(0, 2), (1,)]], ids=str)
def test_exploring_draws_are_scored_as_they_are_drawn(groups, generator):
    prior = random_prior(2, groups).requires_grad_(False)
    exploring = prior.at(0.5, explore=0.3)
    laws.faithful(exploring, 1000, generator, atol=1e-11)
    if prior.n_soft < 3:
        z, _ = exploring.sample(100_000, generator=generator)
        bins, inside = COARSE[prior.n_soft]
        laws.follow(z[:, 2:], exploring.log_prob_torsions, bins, inside=inside)
        with pytest.raises(AssertionError, match="do not follow"):
            laws.follow(z[:, 2:], prior.at(0.5).log_prob_torsions, bins, inside=inside)
    z, log_q = exploring.sample(100_000, generator=generator)
    laws.mean_weight_is_one(prior.at(0.5).log_prob(z), log_q)


def test_exploring_reaches_what_is_rare_and_is_bounded_below(generator):
    prior = random_prior(2, [(0, 1)])
    plain, exploring = prior.at(0.25), prior.at(0.25, explore=0.2)
    z = torch.cat((torch.randn(2000, 2, generator=generator), 6.28 * torch.rand(2000, 2, generator=generator)), 1)
    ratio = exploring.log_prob(z) - plain.log_prob(z)
    assert float(ratio.min()) > math.log(0.8) - 1e-9  # no more than the share is lost anywhere
    assert float(ratio.max()) > 2.0


def test_exploring_nothing_is_the_plain_density(generator):
    prior = random_prior(2, [(0,)])
    z = torch.randn(50, 3, generator=generator)
    assert torch.equal(prior.at(0.5, explore=0.0).log_prob(z), prior.at(0.5).log_prob(z))


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0, math.nan])
def test_the_share_that_explores_is_checked(share):
    with pytest.raises(ValueError, match="share of exploring draws"):
        random_prior(1, [(0,)]).at(1.0, explore=share)


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_angles_count_modulo_a_turn(generator):
    prior = random_prior(2, [(0, 1)]).at(0.7)
    z, log_prob = prior.sample(100, generator=generator)
    turns = torch.tensor([0.0, 0.0, 1.0, -3.0]) * laws.TWO_PI
    assert float((prior.log_prob(z + turns) - log_prob).abs().max()) < 1e-10


def test_the_same_generator_gives_the_same_draws():
    prior = random_prior(2, [(0, 1), (2,)]).at(0.7)
    one, two, other = (prior.sample(50, generator=torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_global_random_state_is_left_alone():
    prior = random_prior(2, [(0,)]).at(1.0)
    before = torch.random.get_rng_state()
    prior.sample(10, generator=torch.Generator().manual_seed(1))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(("n_stiff", "groups"), [(2, []), (0, [(0,)]), (3, [(0,), (1, 2)])], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_draws_have_the_dtype_of_the_prior_whatever_the_default_is(n_stiff, groups, dtype, generator):
    torch.set_default_dtype(torch.float32)
    prior = MolecularPrior(n_stiff, groups, energy_order=2, entropy_order=1).to(dtype)
    for n in (0, 7):
        z, log_prob = prior.at(0.5).sample(n, generator=generator)
        assert z.shape == (n, prior.dim) and log_prob.shape == (n,)
        assert z.dtype == log_prob.dtype == dtype


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan, math.inf])
def test_temperatures_must_be_positive(tau):
    with pytest.raises(ValueError, match="tau must be finite and above 0"):
        random_prior(1, [(0,)]).at(tau)


@pytest.mark.parametrize("groups", [[(0, 0)], [(1,)], [(0,), (0,)], [(0, 2)], [(0, 1, 2)]], ids=str)
def test_groups_must_hold_every_torsion_once(groups):
    with pytest.raises(ValueError, match=r"once|1 or 2 angles"):
        MolecularPrior(1, groups, energy_order=1, entropy_order=1)
