"""Generators of clusters: their symmetries, what they are made of, and ln Z of small clusters against quadrature."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from molecules import perturbed, seeded

from openmm_tsf.edg import EDGSettings, EDGTrainingSettings, build_edg, draw, encoder_log_prob, kl_bound, train_edg
from openmm_tsf.edg.encoder_ode import encoder_sample
from openmm_tsf.edg.lennard_jones import LennardJones, relative_basis
from openmm_tsf.edg.networks import log_normal
from openmm_tsf.edg.pairs import BLUR, PairDecoder, Pairs, unit_vectors

SETTINGS = EDGSettings(decoder="pairs", score="pairs", stages=4, spread=0.9, width=0.05)


def roughened(n, size=0.03, **changes):
    """A generator with its parameters moved at random."""
    edg = build_edg(LennardJones(n), replace(SETTINGS, **changes), seed=1)
    perturbed(edg.decoder, size, 3)
    return edg


def moved(cluster, y, matrix, order):
    """The same clusters turned, mirrored and with particles exchanged."""
    return cluster.relative(cluster.positions(y)[:, order] @ matrix.T)


def test_neither_order_nor_orientation_matters():
    """The decoder's mean and the score move with the particles; ln p_E(z|x) stays."""
    cluster, edg = LennardJones(5), roughened(5)
    z, x, t = (
        torch.randn(6, 12, generator=seeded(1)),
        torch.randn(6, 12, generator=seeded(2)),
        torch.linspace(0.0, 1, 6),
    )
    matrix, _ = torch.linalg.qr(torch.randn(3, 3, generator=seeded(4)))
    matrix = -matrix * torch.linalg.det(matrix)  # a mirror image too
    order = torch.tensor([3, 0, 4, 1, 2])
    z2, x2 = (moved(cluster, y, matrix, order) for y in (z, x))
    one, two = edg.decoder.conditional(z), edg.decoder.conditional(z2)
    assert torch.allclose(moved(cluster, one.mean, matrix, order), two.mean)
    assert (one.mean - 0.9 * z).abs().max() > 0.1
    a, b = edg.score.parts(z, edg.score.given(x), t), edg.score.parts(z2, edg.score.given(x2), t)
    assert torch.allclose(moved(cluster, a.base, matrix, order), b.base)
    assert torch.allclose(a.divergence, b.divergence)
    assert a.correction.abs().max() == 0.0
    assert torch.allclose(encoder_log_prob(edg, z, x, 1e-8, 1e-8), encoder_log_prob(edg, z2, x2, 1e-8, 1e-8))


def test_sums_over_pairs_are_what_they_say():
    n = 4
    pairs, y = Pairs(n).double(), torch.randn(2, 9, generator=seeded(1))
    coefficients = torch.randn(2, 6, 3, generator=seeded(3))
    basis = relative_basis(n)
    positions = basis.T @ y.view(2, 3, 3)
    i, j = torch.triu_indices(n, n, 1)
    d = pairs.vectors(y)
    assert torch.allclose(d, positions[:, i] - positions[:, j])
    unit = unit_vectors(d)
    assert torch.allclose(unit, d / (d.square().sum(2, keepdim=True) + BLUR).sqrt())
    expected, around = torch.zeros_like(positions), torch.zeros(2, 6)
    for p in range(6):
        for q in range(6):
            if p != q and {int(i[p]), int(j[p])} & {int(i[q]), int(j[q])}:
                around[:, p] += coefficients[:, q, 0] / 4
        force = coefficients[:, p, :1] * d[:, p]
        expected[:, i[p]] += force
        expected[:, j[p]] -= force
    assert torch.allclose(basis.T @ pairs.back(coefficients[:, :, :1] * d).view(2, 3, 3), expected)
    assert torch.allclose(pairs.around(coefficients)[..., 0], around)


def test_latents_of_the_encoder_have_the_density_that_it_says():
    edg = roughened(4, width=0.2)
    x = edg.decoder.centre(torch.randn(5, 9, generator=seeded(1))).detach()
    path = encoder_sample(edg, x, 1e-8, 1e-8, generator=seeded(2))
    assert torch.allclose(encoder_log_prob(edg, path.start, x, 1e-8, 1e-8), path.log_prob, rtol=0.0, atol=1e-5)
    assert edg.score.given(x).axes is not None


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("most", [0, 24])
def test_jacobians_are_those_of_autograd(n, most, monkeypatch):
    """Whether they are sums over particles or over pairs."""
    monkeypatch.setattr("openmm_tsf.edg.pairs.MOST_BY_PAIRS", most)
    decoder = roughened(n, 0.03 if n == 5 else 0.2).decoder
    z = torch.randn(3, 3 * (n - 1), generator=seeded(1))
    y, matrix = decoder.centre_and_jacobian(z)
    assert torch.allclose(y, decoder.centre(z), rtol=0.0, atol=1e-14)
    exact = torch.autograd.functional.jacobian(lambda z: decoder.centre(z).sum(0), z).transpose(0, 1)
    assert (exact - 0.9 * torch.eye(3 * (n - 1))).abs().max() > 0.3
    assert torch.allclose(matrix, exact, rtol=0.0, atol=1e-13)


def test_coefficients_of_stages_lie_between_those_of_knots():
    decoder = PairDecoder(3, 20)
    with torch.no_grad():
        decoder.plain[2] = 1.0
        decoder.log_scale[:] = torch.arange(5.0)
    plain = torch.stack([push.plain[0] for push in decoder.pushes]) * 20
    expected = (1.0 - (torch.arange(20.0) - 9.5).abs() / 5.0).clamp_min(0.0)
    assert torch.allclose(plain, expected)
    scale = torch.stack([push.log_scale for push in decoder.pushes]) * 20
    assert torch.allclose(scale, (torch.arange(20.0) + 0.5) / 5.0)
    assert len(PairDecoder(3, 1).pushes) == 1
    with pytest.raises(ValueError, match="at least one stage, not 0"):
        PairDecoder(3, 0)


def test_newton_steps_find_where_a_configuration_came_from():
    edg = roughened(6, width=1e-6)
    z = torch.randn(50, 15, generator=seeded(1))
    off = []
    with torch.no_grad():
        x = edg.decoder.centre(z)
        edg.score.repeats = 2
        near = edg.decoder.backwards(x, 2)
        for edg.score.refinements in (1, 2, 4):
            off.append(float((edg.score.given(x).mean - z).abs().max()))
    assert (x - 0.9 * z).abs().max() > 0.3
    assert 0.1 > float((near - z).abs().max()) > 10.0 * off[0] and off[0] > 10.0 * off[1] and off[2] < 1e-8


def test_the_base_is_as_wide_as_newton_steps_are_off():
    """A guess that is no guess leaves latents unfound; to a base as narrow as the decoder they would be impossible."""
    edg = roughened(6, width=1e-6)
    z = torch.randn(200, 15, generator=seeded(1))
    edg.score.repeats, edg.score.refinements = 0, 1
    with torch.no_grad():
        x = edg.decoder.centre(z)
        given = edg.score.given(x)
    off = given.along_axes(z - given.mean)
    assert off.square().mean().sqrt() > 1e-3
    assert (off / given.log_width.exp()).square().mean(1).median() < 10.0


def test_the_base_is_the_posterior_of_a_narrow_decoder():
    """Laplace's approximation: its precision is minus the second derivative of ln p(z) p(x|z), where the first is 0."""
    edg = roughened(4, width=1e-3)
    z = torch.randn(3, 9, generator=seeded(1))
    x = edg.decoder.conditional(z).sample(torch.randn(3, 9, generator=seeded(2))).detach()
    edg.score.refinements = 4
    given = edg.score.given(x)
    precision = given.axes @ torch.diag_embed(torch.exp(-2.0 * given.log_width)) @ given.axes.transpose(1, 2)

    def log_joint(row, z):
        return edg.decoder.conditional(z[None]).log_prob(x[row, None])[0] - 0.5 * z.square().sum()

    for row in range(3):
        mean = given.mean[row].detach()
        first = torch.autograd.functional.jacobian(lambda z, row=row: log_joint(row, z), mean)
        second = torch.autograd.functional.hessian(lambda z, row=row: log_joint(row, z), mean)
        assert torch.allclose(precision[row].detach(), -second, rtol=0.0, atol=5e-3 * float(second.abs().max()))
        step = given.axes[row].T @ torch.linalg.solve(precision[row], first)  # to the mode
        assert (step / given.log_width[row].exp()).abs().max() < 0.02


def test_the_base_of_a_wide_decoder_that_is_linear_is_exact():
    """A new decoder is x = 0.9 z + w xi: the posterior of z is a Gaussian, with which all latents say the same of x."""
    edg = build_edg(LennardJones(4), replace(SETTINGS, width=0.3), seed=1).double()
    z = torch.randn(20, 9, generator=seeded(1))
    x = edg.decoder.conditional(z).sample(torch.randn(20, 9, generator=seeded(2))).detach()
    given = edg.score.given(x)
    log_prob = log_normal(z) + edg.decoder.conditional(z).log_prob(x) - given.log_prob(z)
    width = 0.9 * math.hypot(1.0, 0.3)
    assert torch.allclose(log_prob, log_normal(x / width) - 9.0 * math.log(width), rtol=0.0, atol=1e-6)


def test_the_bound_is_that_of_a_map():
    """The limit of narrow widths of what encoder and decoder make of it."""
    cluster, edg, n = LennardJones(4).softened(), roughened(4, width=1e-4), 50
    bound = kl_bound(edg, cluster, n, generator=seeded(5))
    z = torch.randn(n, 9, generator=seeded(5))
    conditional, given = edg.decoder.conditional(z), edg.score.given(edg.decoder.centre(z))
    inner = given.log_prob(given.mean) - 4.5  # ln p_E(z|x) is less by half the number of latents on average
    rows = cluster(conditional.mean) + log_normal(z) - conditional.entropy - inner
    assert bound.value == pytest.approx(float(rows.detach().mean()), abs=1e-3)
    assert torch.allclose(bound.x, conditional.mean)
    assert torch.allclose(bound.log_weights, -rows, rtol=0.0, atol=0.01)
    assert bound.encoder == 0.0 and bound.value == pytest.approx(bound.energy - bound.entropy)


def test_gradients_of_the_bound_are_finite_differences():
    cluster, edg = LennardJones(4).softened(), roughened(4)
    parameters = dict(edg.named_parameters())

    def value():
        return kl_bound(edg, cluster, 8, generator=seeded(5))

    value().loss.backward()
    for name in ("decoder.plain", "decoder.sense", "decoder.log_scale", "decoder.mixed"):
        parameter = parameters[name]
        direction = torch.randn(parameter.shape, generator=seeded(6))
        values = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                parameter += step * direction
                values.append(value().value)
            parameter += 1e-5 * direction
        expected = (values[0] - values[1]) / 2e-5
        assert float((parameter.grad * direction).sum()) == pytest.approx(expected, rel=1e-5)


def test_folds_are_seen_and_trained_away():
    """Of coefficients too large for four stages; gradients point to where determinants are positive."""
    edg = roughened(4, 0.3)
    z = torch.randn(200, 9, generator=seeded(1))
    x, log_det, folded = edg.decoder.centre_and_log_det(z)
    exact = torch.linalg.slogdet(edg.decoder.centre_and_jacobian(z)[1])
    assert torch.equal(folded, exact[0] < 0.0) and 2 < folded.sum() < 150
    assert torch.equal(log_det, exact[1])
    for rows, sign in ((folded, -1.0), (~folded, 1.0)):
        found, plain = (
            torch.autograd.grad(value[rows].sum(), edg.decoder.plain, retain_graph=True)[0]
            for value in (log_det, exact[1])
        )
        assert torch.allclose(found, sign * plain)
    bound = kl_bound(edg, LennardJones(4).softened(), 200, generator=seeded(1))
    assert bound.n_folded == int(folded.sum())
    assert torch.allclose(bound.x, x)


def trained(n):
    cluster = LennardJones(n)
    edg = build_edg(cluster.softened(), SETTINGS, seed=1)
    settings = EDGTrainingSettings(steps=200, batch=128, anneal_share=0.0, learning_rate=4e-3)
    train_edg(edg, cluster.softened(), settings, seed=1)
    return edg


def test_two_particles_have_the_exact_partition_function():
    drawn = draw(trained(2), LennardJones(2), n=2000, companions=1, generator=seeded(1), rtol=1e-3, atol=1e-3)
    assert abs(drawn.log_z - exact_log_z(2)) < 4.0 * drawn.log_z_error < 0.2
    assert drawn.ess > 0.4


def test_the_bound_of_three_particles_is_one():
    """Training brings it within 1.5 nat of ln Z, from 8, and not beyond."""
    cluster = LennardJones(3).softened()  # whose Z is hardly larger: e^-7 for an overlap
    first = kl_bound(build_edg(cluster, SETTINGS, seed=1), cluster, 4000, generator=seeded(2))
    bound = kl_bound(trained(3), cluster, 4000, generator=seeded(2))
    assert first.value + exact_log_z(3) > 5.0
    assert first.n_folded == 0 and bound.n_folded < 20
    assert -3.0 * bound.error < bound.value + exact_log_z(3) < 1.5


@pytest.mark.slow
def test_weights_of_three_particles_have_the_exact_mean():
    """Of networks that were never trained, on a cluster twenty times as hot in a trap as much stiffer."""
    cluster = LennardJones(3, temperature=20.0, trap=20.0)
    edg = roughened(3, 0.01, spread=0.95, width=0.3)
    drawn = draw(edg, cluster, n=4000, generator=seeded(1), rtol=1e-3, atol=1e-3)
    assert abs(drawn.log_z - exact_log_z(3, 20.0)) < 4.0 * drawn.log_z_error < 0.1
    chain = draw(edg, cluster, n=4000, companions=1, generator=seeded(2), steps=20)
    assert abs(chain.log_z - exact_log_z(3, 20.0)) < 4.0 * chain.log_z_error < 0.2


def exact_log_z(n, tau=1.0):
    """ln of the integral of exp(-u) over relative coordinates: over the distance of two particles, or over two
    distances of three and the angle between them. Temperature and trap are both tau."""
    r = torch.linspace(0.5, 8.0, 120 if n == 3 else 4001)
    pair = (r**-12 - 2.0 * r**-6) / tau
    if n == 2:  # y = (x_1 - x_2)/sqrt 2
        return math.log(float(torch.trapezoid(4.0 * math.pi * r**2 * torch.exp(-pair - r**2 / 4.0), r)) / 2.0**1.5)
    c, weight = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(100))
    a, b = r[:, None, None], r[None, :, None]
    third = (a**2 + b**2 - 2.0 * a * b * c).clamp_min(1e-6).sqrt()
    u = pair[:, None, None] + pair[None, :, None] + (third**-12 - 2.0 * third**-6) / tau
    u = u + (a**2 + b**2 + third**2) / 6.0  # sum |x_i - c|^2 = sum of squared distances/3
    inner = (torch.exp(-u) * weight).sum(2) * r[:, None] ** 2 * r[None, :] ** 2
    integral = torch.trapezoid(torch.trapezoid(inner, r), r) * 8.0 * math.pi**2
    return math.log(float(integral) / 3.0**1.5)  # |d(x_2 - x_1, x_3 - x_1)/dy| = 3^(3/2)


def test_clusters_are_narrow_by_default():
    edg = build_edg(LennardJones(3), EDGSettings(decoder="pairs", score="pairs", spread=2.0))
    assert edg.settings.width == 0.001 and edg.decoder.conditional(torch.zeros(1, 6)).log_width.exp().max() < 0.0021
    assert EDGSettings().width == 0.3 and EDGSettings(decoder="pairs", score="pairs", width=0.05).width == 0.05


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match='both "pairs" or neither'):
        EDGSettings(decoder="pairs")
    with pytest.raises(ValueError, match="one temperature"):
        EDGSettings(decoder="pairs", score="pairs", conditioned=True)
    with pytest.raises(ValueError, match="neither clusters nor lattices"):
        EDGSettings(decoder="pairs", score="pairs", harmonics=2)

    class Flat:
        dim = 6

        def __call__(self, x):
            return x.sum(1)

    with pytest.raises(ValueError, match="n >= 2 particles"):
        build_edg(Flat(), SETTINGS)
