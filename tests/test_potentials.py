"""Quartic potentials on the line: normalised, drawn as they are scored, steerable to rounding."""

import math

import laws
import numpy as np
import pytest
import torch
from molecules import seeded

from openmm_tsf import potentials
from openmm_tsf.potentials import CELLS, QuarticPotentials
from openmm_tsf.priors import MolecularPrior
from openmm_tsf.proposals import VectorFlow
from openmm_tsf.transforms import CircleCoupling, Compose, LineCoupling

TAUS = (2.0, 1.0, 0.5, 0.25)
SHAPES = {
    "as made": lambda n, g: torch.zeros(4, n),
    "gentle": lambda n, g: torch.cat((0.3 * torch.randn(3, n, generator=g), torch.randn(1, n, generator=g) - 4.0)),
    "skewed": lambda n, g: torch.stack(
        (
            torch.randn(n, generator=g),
            torch.rand(n, generator=g),
            3.0 * torch.randn(n, generator=g),
            torch.randn(n, generator=g) - 6.0,
        )
    ),
    "double wells": lambda n, g: torch.stack(
        (
            torch.randn(n, generator=g),
            -1.0 - 3.0 * torch.rand(n, generator=g),
            0.3 * torch.randn(n, generator=g),
            torch.rand(n, generator=g) - 1.0,
        )
    ),
    "wild": lambda n, g: 4.0 * torch.randn(4, n, generator=g),
}
"""(4, n): c1, c2 and c3, and what softplus makes the rest of c4 of."""


def of_shape(shape: str, n: int = 8, seed: int = 4) -> QuarticPotentials:
    made = QuarticPotentials(n)
    values = SHAPES[shape](n, seeded(seed))
    if shape != "as made":
        made.coefficients.data, made.quartic.data = values[:3].clone(), values[3].clone()
    return made.requires_grad_(False)


def reach(potential: QuarticPotentials, tau: float) -> float:
    """Half the width of a line beyond which every density is below exp(-60) of that at 0, by bounding the polynomial.

    |v| above 1 has e >= c4 v^4 - b |v|^3 with b = |c1| + |c2| + |c3|, and that grows from v = b/c4 on.
    """
    c1, c2, c3, c4 = potential.polynomials()
    b = c1.abs() + c2.abs() + c3.abs()
    return float(((b + (60.0 * tau * c4).sqrt()) / c4 + 1.0).max())


def density_of(potential: QuarticPotentials, i: int, tau: float):
    """ln of the density of coordinate i, from the parts of the definition."""
    log_z = potential.log_z(tau)[i]
    c = potential.polynomials()[:, i]
    return lambda v: -(c[0] * v + c[1] * v**2 + c[2] * v**3 + c[3] * v**4)[:, 0] / tau - log_z


def axis_of(potential: QuarticPotentials, i: int, tau: float, n: int = 200_003) -> torch.Tensor:
    """Points of the line that hold coordinate i at tau, others than those of the quadrature inside."""
    wide = laws.line(reach(potential, tau), 400_001)[:, None]
    log_p = density_of(potential, i, tau)(wide)
    inside = wide[log_p > log_p.max() - 60.0]
    return torch.linspace(float(inside[0]) - 1e-3, float(inside[-1]) + 1e-3, n)


# --- the polynomial ---------------------------------------------------------------------------------------------------


def test_energies_are_the_polynomials_that_they_say():
    potential = of_shape("wild", 5)
    v = 3.0 * torch.randn(20, 5, generator=seeded(1))
    c1, c2, c3 = potential.coefficients
    c4 = torch.log1p(potential.quartic.exp()) + 0.75 * c3**2 / (1.0 + 2.0 * c2.abs())
    expected = 0.5 * v**2 + c1 * v + c2 * v**2 + c3 * v**3 + c4 * v**4
    assert float(((potential(v) - expected) / (1.0 + expected.abs())).abs().max()) < 1e-12
    assert potential.n == 5


def test_potentials_start_as_nearly_gaussian():
    potential, v = QuarticPotentials(3).requires_grad_(False), laws.line(3.0, 50)[:, None].expand(-1, 3)
    assert float((potential(v) - 0.5 * v**2).abs().max()) < 0.21  # 0.0025 of v^4
    for tau in TAUS:
        assert float((potential.log_z(tau) - 0.5 * math.log(laws.TWO_PI * tau)).abs().max()) < 0.01 * tau


def test_a_cubic_term_alone_digs_no_second_well():
    """Where c2 is not negative the second derivative is positive everywhere, however large the others are."""
    for seed in range(5):
        potential = of_shape("wild", 50, seed)
        potential.coefficients[1].abs_()
        _, c2, c3, c4 = potential.polynomials()
        lowest = -c3 / (4.0 * c4)
        assert float((2.0 * c2 + 6.0 * c3 * lowest + 12.0 * c4 * lowest**2).min()) > 0
    two = of_shape("double wells", 50)
    c2 = two.polynomials()[1]
    assert float(c2.max()) < 0  # there are double wells to test with


# --- normalised -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("shape", SHAPES)
def test_densities_are_normalised(shape, tau):
    potential = of_shape(shape)
    for i in range(potential.n):
        laws.normalised(density_of(potential, i, tau), [axis_of(potential, i, tau)], atol=1e-9)


def test_a_constant_that_is_off_is_noticed():
    potential = of_shape("skewed")
    log_p = density_of(potential, 0, 1.0)
    with pytest.raises(AssertionError, match="integrates to"):
        laws.normalised(lambda v: log_p(v) + 1e-6, [axis_of(potential, 0, 1.0)])


@pytest.mark.parametrize("shape", ["gentle", "skewed", "double wells"])
@pytest.mark.parametrize("tau", [1.0, 0.4])
def test_the_constant_has_the_derivatives_of_the_integral(shape, tau):
    """d ln Z/dc_k = -<v^k>/tau, by autograd against moments by another quadrature."""
    potential = of_shape(shape).requires_grad_()
    found = torch.autograd.grad(potential.log_z(tau).sum(), list(potential.parameters()))
    fixed = of_shape(shape)
    moments = []
    for i in range(fixed.n):
        v = axis_of(fixed, i, tau)[:, None]
        p = density_of(fixed, i, tau)(v).softmax(0)
        moments.append(torch.stack([(p * v[:, 0] ** k).sum() for k in range(1, 5)]))
    slopes = torch.autograd.grad(
        potential.polynomials(), list(potential.parameters()), -torch.stack(moments, 1) / tau
    )  # fmt: skip
    for one, other in zip(found, slopes, strict=True):
        assert float((one - other).abs().max()) < 1e-8 * (1.0 + float(other.abs().max()))
        assert float(other.abs().max()) > 1e-3


# deep wells and a hump between them that is not in the middle: the line is measured from 0 outwards
LOPSIDED = {"k": 1.5, "a": 1.7, "s": 0.65, "tilt": 0.5}


def lopsided() -> QuarticPotentials:
    """k [(v + s)^2 - a^2]^2 + tilt v, 12.5 high between its wells."""
    k, a, s = LOPSIDED["k"], LOPSIDED["a"], LOPSIDED["s"]
    c1, c2, c3 = 4.0 * k * s * (s**2 - a**2) + LOPSIDED["tilt"], k * (6.0 * s**2 - 2.0 * a**2), 4.0 * k * s
    made = QuarticPotentials(1)
    made.coefficients.data = torch.tensor([[c1], [c2 - 0.5], [c3]])
    made.quartic.data = torch.tensor([math.log(math.expm1(k - 0.75 * c3**2 / (1.0 + 2.0 * abs(c2 - 0.5))))])
    return made.requires_grad_(False)


@pytest.mark.parametrize(
    "tau",
    [1.0, 0.1, 0.05],
)
def test_no_well_is_lost_when_it_is_cold(tau):
    """The deeper well is on the left, the nearer one on the right."""
    potential = lopsided()
    laws.normalised(density_of(potential, 0, tau), [laws.line(6.0, 60_001)], atol=1e-8)
    draws = potential.sample(1000, tau, generator=seeded(1))
    assert int((draws < 0).sum()) > 500


# --- faithful ---------------------------------------------------------------------------------------------------------


def fit(draws: torch.Tensor, log_density, axis: torch.Tensor, bins: int) -> float:
    """p-value of draws (n,) against bins of equal width over an axis, by Simpson's rule inside."""
    edges = torch.linspace(float(axis[0]), float(axis[-1]), bins + 1)
    nodes, weights = (torch.tensor(a) for a in np.polynomial.legendre.leggauss(6))
    half = 0.5 * (edges[1] - edges[0])
    points = ((edges[:-1] + half)[:, None] + half * nodes).reshape(-1, 1)
    expected = (log_density(points).exp().reshape(bins, 6) * weights * half).sum(1)
    assert abs(float(expected.sum()) - 1.0) < 1e-5, "the quadrature of the test itself is too coarse"
    index = torch.bucketize(draws.contiguous(), edges[1:-1])
    observed = torch.bincount(index, minlength=bins).double()
    return laws.chi_square(observed.numpy(), (len(draws) * expected).numpy())


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("shape", SHAPES)
def test_draws_follow_the_density(shape, tau, generator):
    """Every coordinate its own, and not its neighbour's; the smallest of the p-values is worth 8 times as much."""
    potential = of_shape(shape)
    draws = potential.sample(40_000, tau, generator=generator)
    assert draws.shape == (40_000, 8)
    axes = [axis_of(potential, i, tau, 11) for i in range(8)]
    p = [fit(draws[:, i], density_of(potential, i, tau), axes[i], 300) for i in range(8)]
    assert min(p) > 1e-3 / 8, p
    if shape != "as made":
        other = [fit(draws[:, i - 1], density_of(potential, i, tau), axes[i], 300) for i in range(8)]
        assert max(other) < 1e-6


def fine_axis(potential: QuarticPotentials, tau: float) -> tuple[torch.Tensor, int]:
    """The line of coordinate 0 from end to end, and 4 bins for each cell of the sampler."""
    return potential._grid(tau)[:, 0], 4 * CELLS


@pytest.mark.parametrize("shape", ["skewed", "double wells"])
def test_a_cell_constant_sampler_is_caught_and_ours_is_not(shape, generator):
    potential, tau = of_shape(shape, 1), 0.5
    (axis, bins), log_p = fine_axis(potential, tau), density_of(potential, 0, tau)
    assert fit(potential.sample(2_000_000, tau, generator=generator)[:, 0], log_p, axis, bins) > 1e-3
    middle = 0.5 * (axis[1:] + axis[:-1])
    cell = torch.multinomial(log_p(middle[:, None]).exp(), 2_000_000, replacement=True, generator=generator)
    spread = torch.rand(len(cell), generator=generator) - 0.5
    assert fit(middle[cell] + (axis[1] - axis[0]) * spread, log_p, axis, bins) < 1e-6


def test_an_envelope_that_is_no_bound_is_caught(generator, monkeypatch):
    potential, tau, exact = of_shape("double wells", 1), 0.5, potentials._envelope

    def cut(*what):
        bound, _ = exact(*what)
        bound = bound.clamp(max=float(bound.max()) - 0.3)
        total = bound.exp().cumsum(1)
        return bound, total / total[:, -1:]

    axis, log_p = axis_of(potential, 0, tau, 11), density_of(potential, 0, tau)
    assert fit(potential.sample(100_000, tau, generator=generator)[:, 0], log_p, axis, 300) > 1e-3
    monkeypatch.setattr(potentials, "_envelope", cut)
    assert fit(potential.sample(100_000, tau, generator=generator)[:, 0], log_p, axis, 300) < 1e-6


@pytest.mark.parametrize("tau", [*TAUS, 0.05])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_envelope_is_above_the_density_and_not_far(shape, tau):
    for seed in range(5):
        potential = of_shape(shape, 40, seed)
        grid, g = potential._grid(tau), seeded(seed)
        bound, total = potentials._envelope(potential.polynomials(), grid, tau)
        width = grid[1] - grid[0]
        for inside in (0.0, 0.5, 1.0, None, None):
            share = torch.rand(CELLS, 40, generator=g) if inside is None else torch.tensor(inside)
            log_p = -potential(grid[:-1] + width * share) / tau
            assert float((bound.T - log_p).min()) > -1e-9 * (1.0 + float(bound.abs().max()))
        assert torch.equal(total[:, -1], torch.ones(40)) and float(total.diff(dim=1).min()) >= 0
        accepted = (potential.log_z(tau) - bound.logsumexp(1) - width.log()).exp()
        least = 0.001 if shape == "wild" else 0.5  # a good part of the proposals is accepted
        assert least < float(accepted.min()) and float(accepted.max()) <= 1.0


def test_weights_between_temperatures_average_to_one(generator):
    prior = MolecularPrior(3, [(0,)], energy_order=2, entropy_order=1).requires_grad_(False)
    prior.stiff = of_shape("skewed", 3)
    prior.factors[0].entropy.coefficients.data += 0.5
    z, log_q = prior.at(1.0).sample(200_000, generator=generator)
    laws.mean_weight_is_one(prior.at(0.8).log_prob(z), log_q)
    with pytest.raises(AssertionError, match="mean of p/q"):
        laws.mean_weight_is_one(prior.at(0.8).log_prob(z) + 0.02, log_q)


# --- with torsions and couplings: normalised, faithful, steerable -----------------------------------------------------


def prior_of(shape: str, n_stiff: int, groups) -> MolecularPrior:
    """A prior with entropies, and stiff coordinates of a shape."""
    prior = MolecularPrior(n_stiff, groups, energy_order=2, entropy_order=1)
    prior.stiff = of_shape(shape, n_stiff)
    for factor in prior.factors:
        for part in (factor.marginal, factor.entropy):
            part.coefficients.data = 0.4 * torch.randn(part.coefficients.shape, generator=seeded(3))
    return prior.requires_grad_(False)


class Coupled:
    """A prior behind couplings, as a family; with `volume_preserving=False` it does not steer."""

    def __init__(self, prior: MolecularPrior, *, volume_preserving: bool = True) -> None:
        n, n_soft, size = prior.n_stiff, prior.n_soft, {"hidden": 8, "depth": 1}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            layers = [LineCoupling(n, n_soft, range(n), volume_preserving=volume_preserving, **size)]
            layers += [CircleCoupling(n, n_soft, [0], **size)]
            layers += [LineCoupling(n, n_soft, range(n // 2), volume_preserving=volume_preserving, **size)]
        self.prior, self.transform = prior, Compose(layers).requires_grad_(False)
        for parameter in self.transform.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=seeded(6))

    def at(self, tau: float) -> VectorFlow:
        return VectorFlow(self.prior.at(tau), self.transform, tau=tau)


@pytest.mark.parametrize("tau", [1.0, 0.4])
@pytest.mark.parametrize("shape", ["skewed", "double wells"])
def test_priors_with_widths_from_torsions_are_normalised(shape, tau):
    prior = prior_of(shape, 1, [(0,)])
    widest = float(prior.log_width(laws.circle(50)[:, None]).exp().max())
    half = widest * float(axis_of(prior.stiff, 0, tau).abs().max())
    laws.normalised(prior.at(tau).log_prob, [laws.line(half, 6001), laws.circle(48)], atol=1e-7)


@pytest.mark.parametrize("shape", ["gentle", "skewed", "double wells"])
def test_flows_steer(shape, generator):
    prior = prior_of(shape, 4, [(0, 1)])
    z = torch.randn(2000, 6, generator=generator)
    for tau in (2.0, 0.5, 0.25):
        laws.steerable(Coupled(prior), z, 1.0, tau, bound=1e-9)
        assert laws.steering_spread(Coupled(prior, volume_preserving=False), z, 1.0, tau) > 0.1


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_draws_through_couplings_are_scored_as_they_are_drawn(tau, generator):
    prior = prior_of("double wells", 4, [(0, 1)])
    laws.faithful(prior.at(tau), 1000, generator, atol=1e-10)
    flow = Coupled(prior).at(tau)
    x, log_q, valid = flow.propose(1000, generator=generator)
    assert valid.all() and float((flow.log_prob(x) - log_q).abs().max()) < 1e-8


def test_wells_swap_populations_as_they_should(generator):
    """exp(-e/tau) of two wells of unequal depth at three temperatures: shares against quadrature."""
    potential = of_shape("double wells", 1)
    shares = []
    for tau in (2.0, 1.0, 0.5):
        axis = axis_of(potential, 0, tau)
        p = density_of(potential, 0, tau)(axis[:, None]).softmax(0)
        share = float(p[axis > 0].sum())
        draws = potential.sample(100_000, tau, generator=generator)
        found = float((draws > 0).double().mean())
        assert abs(found - share) < 4.0 * math.sqrt(share * (1.0 - share) / 100_000)
        shares.append(share)
    assert max(shares) - min(shares) > 0.02


# --- single precision, randomness, shapes -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_single_precision_is_as_good_as_it_can_be(shape, generator):
    single, double = of_shape(shape, 40).float(), of_shape(shape, 40)
    for tau in TAUS:
        size = 1.0 + float(double.log_z(tau).abs().max())
        assert float((single.log_z(tau) - double.log_z(tau)).abs().max()) < 2e-5 * size
        grid = single._grid(tau)
        bound, _ = potentials._envelope(single.polynomials(), grid, tau)
        share = torch.rand(CELLS, 40, generator=generator).float()
        log_p = -single(grid[:-1] + (grid[1] - grid[0]) * share) / tau
        near = bound.T.amax(0) - 10.0 < bound.T
        assert float((bound.T - log_p)[near].min()) > -1e-5 * size
    draws = single.sample(40_000, 1.0, generator=generator)
    assert draws.dtype == torch.float32 and torch.isfinite(draws).all()
    p = [
        fit(draws[:, i].double(), density_of(double, i, 1.0), axis_of(double, i, 1.0, 11), 300) for i in (0, 17, 39)
    ]  # fmt: skip
    assert min(p) > 3e-4


def test_many_coordinates_are_drawn_independently(generator):
    draws = of_shape("gentle", 60).sample(20_000, 0.5, generator=generator)
    correlation = torch.corrcoef(draws.T) - torch.eye(60)
    assert float(correlation.abs().max()) < 5.0 / math.sqrt(20_000)


def test_randomness_comes_from_the_generator_alone():
    potential = of_shape("skewed")
    before = torch.random.get_rng_state()
    one, two, other = (potential.sample(50, 0.7, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("m", "n"), [(0, 3), (1, 1), (5, 3)])
def test_shapes_and_dtypes_do_not_depend_on_the_default(m, n, dtype, generator):
    torch.set_default_dtype(torch.float32 if dtype == torch.float64 else torch.float64)
    potential = QuarticPotentials(n).to(dtype)
    draws = potential.sample(m, 0.5, generator=generator)
    assert draws.shape == (m, n) and draws.dtype == dtype and not draws.requires_grad
    assert potential(draws).shape == (m, n) and potential.log_z(0.5).dtype == dtype


def test_priors_take_them_or_leave_them():
    plain = MolecularPrior(2, [(0,)], energy_order=1, entropy_order=0, anharmonic=False).requires_grad_(False)
    assert plain.stiff is None and isinstance(
        MolecularPrior(2, [], energy_order=1, entropy_order=0).stiff, QuarticPotentials
    )  # fmt: skip
    assert MolecularPrior(0, [(0,)], energy_order=1, entropy_order=0).stiff is None
    z = torch.randn(100, 3, generator=seeded(1))
    gauss = -0.5 * (z[:, :2] ** 2).sum(1) / 0.4 - math.log(laws.TWO_PI * 0.4) - math.log(laws.TWO_PI)
    assert float((plain.at(0.4).log_prob(z) - gauss).abs().max()) < 1e-12
