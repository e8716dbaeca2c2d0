"""The energy-based diffusion generator: its diffusion, decoders, scores, bound and encoder density."""

import copy
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from molecules import perturbed, seeded
from torch import nn

from openmm_tsf.checks import whole
from openmm_tsf.edg import (
    EDG,
    Conditional,
    EDGSettings,
    EDGTrainingSettings,
    HamiltonianDecoder,
    VariancePreserving,
    build_edg,
    draw,
    encoder_log_prob,
    encoder_ode,
    kl_bound,
    train_edg,
)  # fmt: skip
from openmm_tsf.edg.bound import base_integral, integrand
from openmm_tsf.edg.decoders import GaussianDecoder, tamed
from openmm_tsf.edg.encoder_chain import chain_paths
from openmm_tsf.edg.encoder_ode import check_pairs, encoder_paths
from openmm_tsf.edg.networks import leading, log_normal, slope, with_harmonics
from openmm_tsf.edg.proposal import EDGProposal
from openmm_tsf.edg.scores import GaussianScore, Given, Parts

DIFFUSION = VariancePreserving()


@pytest.fixture(autouse=True)
def networks_start_alike():
    """Whatever tests ran before, weights that are drawn without a generator are the same."""
    torch.manual_seed(1)


# --- systems with known answers ---------------------------------------------------------------------------------------


@dataclass
class Gaussian:
    """U = |x - mean|^2/(2 variance): ln Z = d ln(2 pi variance)/2."""

    dim: int = 1
    mean: float = 0.0
    variance: float = 1.0

    def __call__(self, x):
        return (x - self.mean).square().sum(1) / (2.0 * self.variance)

    @property
    def log_z(self):
        return 0.5 * self.dim * math.log(2.0 * math.pi * self.variance)


class Quartic:
    """U = sum x^4/4 - x^2 + x_0/3: every derivative is something else."""

    def __init__(self, dim=2):
        self.dim = dim

    def __call__(self, x):
        return (0.25 * x**4 - x**2).sum(1) + x[:, 0] / 3.0


class LinearDecoder(nn.Module):
    """x = gain z + sig xi."""

    latent_dim, dim, conditioned, n_slopes = 1, 1, False, 0

    def __init__(self, gain, sig):
        super().__init__()
        self.gain, self.sig = nn.Parameter(torch.tensor(gain)), sig

    def conditional(self, z, tau=None):
        return Conditional(self.gain * z, torch.full_like(z, math.log(self.sig)))


class ExactScore(nn.Module):
    """-(z - a m)/(a^2 v + sigma^2): of a Gaussian posterior N(m, v), m = gain x/(gain^2 + sig^2), all in one part."""

    latent_dim, dim = 1, 1

    def __init__(self, gain, sig, *, as_correction):
        super().__init__()
        self.corrected = as_correction
        self.gain, self.as_correction = gain / (gain**2 + sig**2), as_correction
        self.v = sig**2 / (gain**2 + sig**2)

    def given(self, x, tau=None):
        if self.as_correction:
            return Given(x, x, torch.zeros_like(x), torch.zeros_like(x), tau)
        return Given(x, x, self.gain * x, torch.full_like(x, 0.5 * math.log(self.v)), tau)

    def parts(self, z, given, t):
        a, sigma = DIFFUSION.scale(t)[:, None], DIFFUSION.width(t)[:, None]
        variance = a**2 * self.v + sigma**2
        s = -(z - a * self.gain * given.x) / variance
        if self.as_correction:
            return Parts(-z, -torch.ones_like(t), s + z)
        return Parts(s, -1.0 / variance[:, 0], torch.zeros_like(s))


def linear(gain, sig, *, as_correction=False):
    return EDG(LinearDecoder(gain, sig), ExactScore(gain, sig, as_correction=as_correction), DIFFUSION)


def exact_bound(edg, target, n_times=120):
    """The bound of a generator of one latent whose integrands are quadratic in (z_0, xi, eps): by quadrature."""
    nodes, weights = (torch.tensor(y) for y in np.polynomial.hermite_e.hermegauss(3))
    weights = weights / weights.sum()
    u, du = (torch.tensor(y) for y in np.polynomial.legendre.leggauss(n_times))
    z, xi, eps, u = (y.reshape(-1, 1) for y in torch.meshgrid(nodes, nodes, nodes, 0.5 * (u + 1.0), indexing="ij"))
    share = (weights[:, None, None, None] * weights[:, None, None] * weights[:, None] * 0.5 * du).reshape(-1)
    conditional = edg.decoder.conditional(z)
    x = conditional.sample(xi)
    given = edg.score.given(x)
    inner = integrand(edg, z, given, u[:, 0], eps) + base_integral(edg, z, given)
    return float((share * (target(x) - conditional.entropy + inner)).sum().detach()) + target.log_z


# --- diffusion --------------------------------------------------------------------------------------------------------


def test_diffusion_is_what_it_says():
    t = torch.linspace(0.0, 1.0, 20001)
    assert torch.allclose(torch.trapezoid(DIFFUSION.rate(t), t), DIFFUSION.integral(torch.ones(())))
    assert DIFFUSION.integral(torch.ones(())) == pytest.approx(DIFFUSION.total) == 10.05
    assert torch.allclose(DIFFUSION.scale(t) ** 2 + DIFFUSION.width(t) ** 2, torch.ones_like(t))
    z, eps = torch.tensor([[2.0]]), torch.tensor([[-1.0]])
    a = math.exp(-0.5 * (0.1 * 0.3 + 0.5 * 19.9 * 0.09))
    assert DIFFUSION.perturbed(z, torch.tensor([0.3]), eps).item() == pytest.approx(2 * a - math.sqrt(1 - a * a))


@pytest.mark.parametrize("finest", [0.3, 0.03, 0.003])
def test_the_clock_and_its_weights_integrate(finest):
    diffusion = VariancePreserving(finest=finest)
    u, du = (torch.tensor(y) for y in np.polynomial.legendre.leggauss(200))
    u, du = 0.5 * (u + 1.0), 0.5 * du
    t, weight = diffusion.times(u)
    assert torch.allclose(diffusion.clock(t), u, atol=1e-8)
    assert torch.allclose(diffusion.times(torch.tensor([0.0, 1.0]))[0], torch.tensor([0.0, 1.0]), atol=1e-12)
    # int g^2/2 exp(-Lambda) dt, whose integrand dies out as others do, has a closed form
    got = (du * weight * torch.exp(-diffusion.integral(t))).sum()
    assert float(got) == pytest.approx(-0.5 * math.expm1(-10.05), abs=1e-9)


def test_the_clock_bounds_what_diverges_at_the_start():
    t, weight = DIFFUSION.times(torch.linspace(0.0, 1.0, 1001))
    grown = weight / (DIFFUSION.width(t) ** 2 + DIFFUSION.finest**2)
    assert float((grown * DIFFUSION.scale(t)).max()) < 6.0  # uniform t: beta/2 over finest^2, 55 at the start
    assert torch.isfinite(grown).all()


@pytest.mark.parametrize("bad", [{"beta_min": 0.0}, {"beta_min": 3.0, "beta_max": 2.0}, {"finest": 0.0}])
def test_diffusions_that_make_no_sense(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        VariancePreserving(**bad)


# --- the bound --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_correction", [False, True])
@pytest.mark.parametrize(("gain", "sig"), [(0.8, 0.6), (2.0, 0.1), (0.1, 1.5)])
def test_linear_gaussian_identity(gain, sig, as_correction):
    """bound - KL = -ln(1 - exp(-Lambda)(1 - v))/2 with the exact score, whichever part it is in."""
    target = Gaussian(variance=1.7, mean=0.4)
    spread = gain**2 + sig**2
    kl = 0.5 * ((spread + 0.4**2) / 1.7 - 1.0 - math.log(spread / 1.7))
    gap = -0.5 * math.log1p(-math.exp(-DIFFUSION.total) * (1.0 - sig**2 / spread))
    assert gap > 1e-8
    bound = exact_bound(linear(gain, sig, as_correction=as_correction), target)
    assert bound - kl == pytest.approx(gap, abs=1e-6)
    assert bound - kl == pytest.approx(gap, rel=1e-3)  # the gap itself is 2e-5: see it, not only its absence


def test_the_identity_holds_for_a_short_diffusion(monkeypatch):
    """Where z_1 still knows a lot of x, which the formula has to charge."""
    short = VariancePreserving(beta_min=0.1, beta_max=2.0)
    monkeypatch.setitem(globals(), "DIFFUSION", short)
    edg = EDG(LinearDecoder(0.8, 0.3), ExactScore(0.8, 0.3, as_correction=True), short)
    v = 0.09 / 0.73
    gap = -0.5 * math.log1p(-math.exp(-1.05) * (1.0 - v))
    assert gap > 0.1
    kl = 0.5 * (0.73 - 1.0 - math.log(0.73))
    assert exact_bound(edg, Gaussian()) - kl == pytest.approx(gap, abs=1e-6)


def test_a_wrong_score_costs_its_error():
    """int g^2/2 E|score error|^2 dt, for an error that is a number: c^2 times the integral of the weights."""
    edg = linear(0.8, 0.6, as_correction=True)
    right = exact_bound(edg, Gaussian())
    parts = edg.score.parts

    def off(z, given, t):  # fmt: skip
        return parts(z, given, t)._replace(correction=parts(z, given, t).correction + 0.3 * DIFFUSION.scale(t)[:, None])

    edg.score.parts = off
    assert exact_bound(edg, Gaussian()) - right == pytest.approx(0.09 * -0.5 * math.expm1(-10.05), abs=1e-6)


def test_estimates_scatter_around_the_exact_bound(generator):
    edg, target = linear(0.8, 0.3, as_correction=True), Gaussian(variance=1.3)
    exact = exact_bound(edg, target) - target.log_z
    for times in (1, 3):
        sample = kl_bound(edg, target, 40_000, times=times, generator=generator)
        assert abs(sample.value - exact) < 4.0 * sample.error
        assert sample.value == pytest.approx(sample.energy - sample.entropy + sample.encoder)
        assert 0.0 < sample.error < 0.02
        assert sample.n_energy_evaluations == 40_000


@pytest.mark.parametrize("score", ["gaussian", "plain", "energy"])
def test_antithetic_divergence_equals_the_exact_one(score, generator):
    """E[correction . eps]/sigma with both signs against derivatives, at one time and x."""
    edg = perturbed(build_edg(Quartic(), EDGSettings(score=score, hidden=16, depth=2), seed=3), 0.2, 5)
    n, z0, x = 20_000, torch.tensor([[0.3, -0.8]]), torch.tensor([[1.1, 0.4]])
    for u in (0.1, 0.7):
        given, clock = edg.score.given(x), torch.tensor([u])
        t, weight = edg.diffusion.times(clock)
        eps = torch.randn(n, 2, generator=generator)
        many = Given(*(y if y is None else y.expand(n, -1) for y in given))
        with torch.no_grad():
            rows = integrand(edg, z0.expand(n, -1), many, clock.expand(n), eps) / weight
        z = edg.diffusion.perturbed(z0.expand(n, -1), t.expand(n), eps)
        c, divergence = encoder_ode.correction_and_divergence(edg.score, z, many, t.expand(n))
        base = edg.score.parts(z, many, t.expand(n)).base.detach()
        plain = (c * (c + 2.0 * base)).sum(1) + 2.0 * divergence
        error = math.hypot(rows.std(), plain.detach().std()) / math.sqrt(n)
        assert abs(rows.mean() - plain.mean()) < 4.0 * error


def test_antithetic_noise_keeps_the_start_of_time_quiet(generator):
    """Without the second sign the correction's term has the standard deviation |correction|/sigma."""
    edg = perturbed(build_edg(Quartic(), EDGSettings(score="plain", hidden=16, depth=2), seed=3), 0.2, 5)
    n, clock = 4000, torch.tensor([1e-3])
    given = edg.score.given(torch.tensor([[1.1, 0.4]]).expand(n, -1))
    z0, eps = torch.zeros(n, 2), torch.randn(n, 2, generator=generator)
    t, weight = (y.expand(n) for y in edg.diffusion.times(clock))
    rows = integrand(edg, z0, given, clock.expand(n), eps) / weight
    once = 2.0 * (edg.score.parts(edg.diffusion.perturbed(z0, t, eps), given, t).correction * eps).sum(1)
    once = once / edg.diffusion.width(t)
    assert float(rows.detach().std()) < 0.05 * float(once.detach().std())


@pytest.mark.parametrize("settings", [
    EDGSettings(hidden=8, depth=1), EDGSettings(hidden=8, depth=1, score="plain", latent_dim=3),
    EDGSettings(hidden=8, depth=1, score="energy"), EDGSettings(hidden=8, depth=1, latent_dim=1, conditioned=True),
    EDGSettings(hidden=8, depth=1, decoder="hamiltonian", stages=2, leaps=2),
    EDGSettings(hidden=8, depth=1, decoder="hamiltonian", stages=1, score="energy", conditioned=True),
    EDGSettings(hidden=8, depth=1, latent_dim=1, conditioned=True, harmonics=2),
    EDGSettings(hidden=8, depth=1, decoder="hamiltonian", stages=1, score="plain", harmonics=1),
], ids=lambda s: f"{s.decoder}-{s.score}-{s.harmonics}")  # fmt: skip
def test_gradients_equal_finite_differences(settings):
    """Of the bound with the same random numbers, along random directions of all parameters."""
    edg, target = perturbed(build_edg(Quartic(), settings, seed=1), 0.2, 2), Quartic()
    parameters = [p for p in edg.parameters()]
    along = [torch.randn(p.shape, generator=seeded(4)) for p in parameters]
    tau = torch.linspace(0.5, 2.0, 16) if settings.conditioned else 1.0

    def value(step):
        with torch.no_grad():
            for p, d in zip(parameters, along, strict=True):
                p.add_(step * d)
        sample = kl_bound(edg, target, 16, tau=tau, times=2, generator=seeded(9))
        with torch.no_grad():
            for p, d in zip(parameters, along, strict=True):
                p.sub_(step * d)
        return sample

    loss = kl_bound(edg, target, 16, tau=tau, times=2, generator=seeded(9)).loss
    got = sum((g * d).sum() for g, d in zip(torch.autograd.grad(loss, parameters), along, strict=True))
    h = 1e-5
    expected = (value(h).value - value(-h).value) / (2.0 * h)
    assert float(got) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_never_below_the_exact_divergence(seed):
    """Of generators with random weights, in one dimension, where KL(p_D || pi) is a quadrature."""
    target = Gaussian(variance=0.8, mean=0.5)
    for score in ("gaussian", "plain", "energy"):
        settings = EDGSettings(score=score, hidden=8, depth=2, width=0.5)
        edg = perturbed(build_edg(target, settings, seed=seed), 0.15, seed)
        sample = kl_bound(edg, target, 20_000, generator=seeded(seed))
        z = torch.linspace(-8.0, 8.0, 1001)[:, None]
        x = torch.linspace(-12.0, 12.0, 1201)[:, None]
        with torch.no_grad():
            c = edg.decoder.conditional(z)
            eps = (x - c.mean.T) * torch.exp(-c.log_width.T)
            joint = -0.5 * eps**2 - c.log_width.T - 0.5 * z.T**2 - math.log(2.0 * math.pi) + math.log(0.016)
        log_p = joint.logsumexp(1)
        assert float(log_p.exp().sum() * 0.02) == pytest.approx(1.0, abs=1e-4)
        kl = float((log_p.exp() * (log_p + target(x) + target.log_z)).sum() * 0.02)
        assert sample.value + target.log_z > kl - 3.0 * sample.error


# --- decoders ---------------------------------------------------------------------------------------------------------


def test_hamiltonian_decoder_is_its_definition():
    """Stage by stage from the formulas, the second half kick of every step taken by itself."""
    target, d = Quartic(3), 3
    decoder = HamiltonianDecoder(target, d, 2, leaps=2, latent_dim=4, step=0.2, hidden=8, depth=1, spread=1.5)
    decoder = perturbed(decoder.double(), 0.1, 3)
    z, tau = 3.0 * torch.randn(5, 4, generator=seeded(1)), torch.linspace(0.5, 2.0, 5)
    start = decoder.start(z)
    y = 1.5 * (z[:, :3] + start[:, :3])

    def force(y):
        here = y.detach().requires_grad_()
        return torch.autograd.grad((target(here) / tau).sum(), here)[0]

    def squash(q):
        return 8.0 * torch.tanh(q / 8.0)

    def kick(v, y, h, stage):
        q, t = decoder.kicks[stage](y / 1.5).chunk(2, 1)
        impulse = h / 2 * force(y) * torch.exp(squash(q) / 2)
        return v - impulse / torch.sqrt(1 + (h * impulse / 1.5) ** 2) - h / 2 * t

    for stage in range(2):
        h = tau.sqrt()[:, None] * decoder.log_steps[stage].exp()
        v = start[:, 3 * (stage + 1) : 3 * (stage + 2)] + z @ decoder.mixing[stage]
        for _ in range(2):
            v = kick(v, y, h, stage)
            q, t = decoder.drifts[stage](v).chunk(2, 1)
            y = y + h * (v * torch.exp(squash(q)) + t)
            v = kick(v, y, h, stage)
    h = tau[:, None] * decoder.log_step.exp()
    pull = h * force(y)
    assert pull.abs().max() > 1.0  # so that taming is seen
    got = decoder.conditional(z, tau)
    assert torch.allclose(got.mean, y - pull / torch.sqrt(1 + (pull / 1.5) ** 2), atol=1e-12)
    assert torch.allclose(got.log_width.exp(), torch.sqrt(2.0 * h).expand(5, 3))
    assert decoder.n_slopes == 5
    xi = torch.randn(5, 3, generator=seeded(2))
    normal = torch.distributions.Normal(got.mean, got.log_width.exp())
    assert torch.allclose(got.log_prob(got.sample(xi)), normal.log_prob(got.sample(xi)).sum(1))
    assert torch.allclose(got.entropy, normal.entropy().sum(1))


def test_a_langevin_step_alone_leaves_a_gaussian_where_it_is():
    """To first order in the step, and at any temperature: the decoder of no stages started in the target is in it."""
    decoder = HamiltonianDecoder(Gaussian(1), 1, 0, step=0.01, spread=100.0).double()
    c = decoder.conditional(torch.tensor([[0.01]]))
    assert c.mean.item() == pytest.approx(0.99)
    assert (c.mean**2 + c.log_width.exp() ** 2).item() == pytest.approx(1.0, abs=2e-4)
    c = decoder.conditional(torch.tensor([[0.02]]), torch.tensor([4.0]))
    assert c.mean.item() == pytest.approx(2.0 * 0.99)
    assert (c.mean**2 + c.log_width.exp() ** 2).item() == pytest.approx(4.0, abs=8e-4)


def test_dynamics_conserve_energy():
    """Without networks, the end of a short leapfrog trajectory has the energy of its start, to second order in h, and
    steps of sqrt(tau) times the length at temperature tau go where v sqrt(tau) goes at temperature 1."""
    target, h = Quartic(2), 0.01

    class Watched(HamiltonianDecoder):
        def _half_kick(self, y, g, h, stage, tau):
            self.seen.append((y, h))
            return super()._half_kick(y, g, h, stage, tau)

    decoder = Watched(target, 2, 1, leaps=60, step=h, hidden=4, depth=1, spread=50.0).double()
    decoder.seen, z = [], torch.randn(8, 2, generator=seeded(1)) / 50.0
    with torch.no_grad():
        decoder.mixing.mul_(50.0)
    decoder.conditional(z)
    first, last = decoder.seen[0][0], decoder.seen[-1][0]
    start = target(first) + 0.5 * (z @ decoder.mixing[0]).square().sum(1)
    path = torch.stack([y for y, _ in decoder.seen])
    speed = (path[2:] - path[:-2]) / (2.0 * h)
    energy = target(path[1:-1].flatten(0, 1)).view(-1, 8) + 0.5 * speed.square().sum(2)
    assert (path[-1] - first).abs().max() > 0.3
    assert torch.allclose(energy, start.expand_as(energy), atol=2e-3)
    decoder.seen = []
    decoder.conditional(z, torch.full((8,), 4.0))
    hot = decoder.seen[-1]
    assert torch.allclose(hot[1], torch.tensor(2.0 * h))
    with torch.no_grad():
        decoder.mixing.mul_(2.0)
    decoder.seen = []
    decoder.conditional(z)
    assert torch.allclose(hot[0], decoder.seen[-1][0], atol=1e-12)
    assert not torch.allclose(hot[0], last, atol=1e-2)


def test_copies_of_dynamics_share_the_target():
    """A target with parameters of its own is not trained, and not copied to another precision."""

    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.dim, self.stiffness = 2, nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return 0.5 * self.stiffness.detach() * x.square().sum(1)

    target = Learned()
    decoder = HamiltonianDecoder(target, 2, 1, hidden=4, depth=1).double()
    again = copy.deepcopy(decoder).float()
    assert again.target is decoder.target is target
    assert target.stiffness.dtype == torch.float64
    names = [name for name, _ in decoder.named_parameters()]
    assert names == [name for name, _ in again.named_parameters()]
    assert not any("target" in name or "stiffness" in name for name in names)
    assert next(again.parameters()).dtype == torch.float32
    assert next(decoder.parameters()).dtype == torch.float64


def test_forces_are_tamed():
    """Where U rises as x^4 a plain step would leave the numbers of single precision in a few stages."""
    decoder = HamiltonianDecoder(Quartic(2), 2, 6, step=0.3, hidden=4, depth=1, spread=2.0).float()
    z = torch.tensor([[40.0, -3.0], [1e3, 1e-3]], dtype=torch.float32)
    with torch.no_grad():
        decoder.mixing.zero_()  # nothing but forces moves draws
    c = decoder.conditional(z)
    assert c.mean.isfinite().all()
    # seven steps of a spread; a plain one of 0.05 U'(80) would be 1e5
    assert 2.0 < (c.mean - 2.0 * z).abs().max() < 7 * 2.0 + 0.1
    c.mean.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in decoder.parameters() if p.grad is not None)
    x = torch.tensor([1e-3, -2.0, 1e30, -1e-30], dtype=torch.float32, requires_grad=True)
    got = tamed(x, 2.0)
    assert torch.allclose(got, torch.tensor([1e-3, -math.sqrt(2.0), 2.0, 0.0], dtype=torch.float32))
    got.sum().backward()
    assert torch.allclose(x.grad, torch.tensor([1.0, 2.0**-1.5, 0.0, 1.0], dtype=torch.float32))


def test_decoders_start_simple_and_take_temperature():
    edg = build_edg(Quartic(), EDGSettings(spread=3.0, width=0.2, conditioned=True), seed=0)
    z = torch.randn(4, 2, generator=seeded(1))
    c = edg.decoder.conditional(z, torch.full((4,), 4.0))
    assert torch.allclose(c.mean, 3.0 * z)
    assert torch.allclose(c.log_width.exp(), torch.full((4, 2), 3.0 * 0.2 * 2.0))
    with pytest.raises(ValueError, match="give tau"):
        edg.decoder.conditional(z)
    assert torch.equal(leading(z, 3), torch.cat((z, torch.zeros(4, 1)), 1))
    assert torch.equal(leading(z, 1), z[:, :1])
    edg = build_edg(Quartic(), EDGSettings(spread=3.0, width=0.2, latent_dim=1), seed=0)
    assert torch.allclose(edg.decoder.conditional(z[:, :1]).log_width.exp(), torch.tensor([0.6, 3.0]))  # no latent, all


def test_harmonics_are_those_of_the_share_below():
    """Quarters of N(0, 1) are quarters of a turn; the other columns stay as they are."""
    quartile = 0.6744897501960817
    got = with_harmonics(torch.tensor([[-quartile, 5.0], [0.0, 6.0], [quartile, 7.0]]), 2, 1)
    turns = [[1.0, 0.0, 0.0, -1.0], [0.0, -1.0, 0.0, 1.0], [-1.0, 0.0, 0.0, -1.0]]
    expected = torch.tensor([[-quartile, 5.0, *turns[0]], [0.0, 6.0, *turns[1]], [quartile, 7.0, *turns[2]]])
    assert torch.allclose(got, expected, atol=1e-12)
    assert torch.equal(with_harmonics(expected, 0), expected)
    assert with_harmonics(expected, 3).shape == (3, 6 * 7)


def test_networks_with_harmonics_make_many_peaks():
    """Three wells in a row on a line. Without harmonics the same training ends 0.3 to 0.5 nat below ln Z."""

    class Threefold:
        dim = 1

        def __call__(self, x):
            return (0.5 * x.square() + 1.5 * torch.cos(6.0 * math.pi * torch.special.ndtr(x))).sum(1)

    x = torch.linspace(-8.0, 8.0, 4001)[:, None]
    log_z = math.log(float(torch.exp(-Threefold()(x)).sum() * 0.004))
    edg = build_edg(Threefold(), EDGSettings(hidden=32, depth=2, width=0.15, harmonics=3), seed=1)
    training = EDGTrainingSettings(steps=600, batch=256, anneal_from=0.3, learning_rate=1e-2, weight_average=0.98)
    train_edg(edg, Threefold(), training, seed=1)
    made = draw(edg, Threefold(), n=2000, generator=seeded(1))
    assert abs(made.log_z - log_z) < 4.0 * made.log_z_error < 0.06
    assert 0.0 < log_z - made.log_z_bound < 0.2


def test_scores_start_uninformed_and_are_what_they_say():
    """Before training s = -z, where the bound is E[ln p_D(x|z) + U]; the energy form is exact at t = 0."""
    z, x, t = torch.randn(4, 2, generator=seeded(1)), torch.randn(4, 2, generator=seeded(2)), torch.full((4,), 0.2)
    for score in ("gaussian", "plain"):
        edg = build_edg(Quartic(), EDGSettings(score=score), seed=0)
        parts = edg.score.parts(z, edg.score.given(x), t)
        assert torch.allclose(parts.base + parts.correction, -z)
        assert kl_bound(edg, Quartic(), 50, generator=seeded(1)).encoder == pytest.approx(0.0, abs=1e-12)
    edg = perturbed(build_edg(Quartic(), EDGSettings(score="energy", hidden=8), seed=0), 0.2, 1)
    here = z.clone().requires_grad_()
    log_joint = edg.decoder.conditional(here).log_prob(x) - 0.5 * (here**2).sum(1)
    (exact,) = torch.autograd.grad(log_joint.sum(), here)
    parts = edg.score.parts(z, edg.score.given(x), torch.zeros(4))
    assert torch.allclose(parts.base + parts.correction, exact)
    parts = edg.score.parts(z, edg.score.given(x), torch.ones(4))
    assert torch.allclose(parts.base + parts.correction, -z)
    names = {name.split(".")[0] for name, _ in edg.score.named_parameters()}
    assert names == {"plain"}  # the decoder is not a part of the score


# --- the encoder's density --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_correction", [False, True])
@pytest.mark.parametrize(("gain", "sig"), [(0.8, 0.6), (2.0, 0.1)])
def test_encoder_density_of_a_linear_generator(gain, sig, as_correction):
    """The equation is linear: z_1 = a m + (z_0 - m) sqrt((a^2 v + sigma^2)/v), with a and sigma at t = 1."""
    edg = linear(gain, sig, as_correction=as_correction)
    x, z = edg.at().sample(500, generator=seeded(3))
    v, m = edg.score.v, edg.score.gain * x
    a = math.exp(-0.5 * DIFFUSION.total)
    stretch = math.sqrt((a * a * v + 1.0 - a * a) / v)
    end = a * m + (z - m) * stretch
    exact = (-0.5 * end**2 - 0.5 * math.log(2.0 * math.pi) + math.log(stretch))[:, 0]
    got = encoder_log_prob(edg, z, x, rtol=1e-8, atol=1e-8)
    assert (got - exact).abs().max() < 1e-5
    posterior = torch.distributions.Normal(m, math.sqrt(v)).log_prob(z)[:, 0]
    away = (got - posterior).abs().max()  # z_1 starts from N(0, I) and not from what it is given x: of order a
    assert 1e-5 < away < 10.0 * a
    coarse = (encoder_log_prob(edg, z, x, rtol=1e-3, atol=1e-3) - exact).abs().max()
    assert (1e-5 < coarse < 1.0) if as_correction else coarse < 1e-10  # without a correction nothing is to be solved


def test_latents_of_the_encoder_have_its_density(generator):
    """Both ways along the equation; and E_pE[p_D(z, x)/p_E(z|x)] = p_D(x), which a quadrature over z knows."""
    edg = perturbed(build_edg(Quartic(1), EDGSettings(hidden=8, depth=2), seed=0), 0.3, 1)
    x = torch.full((4000, 1), 0.4)
    drawn = encoder_ode.encoder_sample(edg, x, 1e-7, 1e-7, generator=generator)
    again = encoder_ode.encoder_paths(edg, drawn.start, x, 1e-7, 1e-7)
    assert torch.allclose(again.end, drawn.end, atol=1e-5)
    assert torch.allclose(again.log_prob, drawn.log_prob, atol=1e-5)
    z = torch.linspace(-10.0, 10.0, 4001)[:, None]
    with torch.no_grad():
        exact = (log_normal(z) + edg.decoder.conditional(z).log_prob(x[:1].expand(4001, 1))).exp().sum() * 0.005
        ratio = (log_normal(drawn.start) + edg.decoder.conditional(drawn.start).log_prob(x) - drawn.log_prob).exp()
    assert abs(ratio.mean() - exact) < 4.0 * ratio.std() / math.sqrt(4000)
    assert ratio.std() < 5.0 * exact


@pytest.mark.parametrize("score", ["gaussian", "plain", "energy"])
def test_divergences_are_those_of_autograd(score):
    edg = perturbed(build_edg(Quartic(), EDGSettings(score=score, hidden=8, latent_dim=3), seed=0), 0.3, 1)
    z, t = torch.randn(4, 3, generator=seeded(1)), torch.tensor([0.0, 0.01, 0.3, 1.0])
    given = edg.score.given(torch.randn(4, 2, generator=seeded(2)))
    with torch.no_grad():
        correction, divergence = encoder_ode.correction_and_divergence(edg.score, z, given, t)
        total = divergence + edg.score.parts(z, given, t).divergence
    for row in range(4):
        one = Given(*(y if y is None else y[row : row + 1] for y in given))
        parts = edg.score.parts(z[row : row + 1], one, t[row : row + 1])
        assert torch.allclose(parts.correction, correction[row : row + 1])

        def field(y, one=one, row=row):
            parts = edg.score.parts(y, one, t[row : row + 1])
            return (parts.base + parts.correction)[0]

        jacobian = torch.autograd.functional.jacobian(field, z[row : row + 1])[:, 0]
        assert float(jacobian.diagonal().sum()) == pytest.approx(float(total[row]), rel=1e-9)


def test_densities_of_the_encoder_are_normalised():
    """By quadrature over one latent, for any score: this is what makes weights exact."""
    edg = perturbed(build_edg(Quartic(1), EDGSettings(hidden=8, depth=2), seed=0), 0.3, 1)
    z = torch.linspace(-12.0, 12.0, 2001)[:, None]
    log_p = encoder_log_prob(edg, z, torch.full_like(z, 0.7), rtol=1e-7, atol=1e-7)
    assert float(log_p.exp().sum() * 0.012) == pytest.approx(1.0, abs=1e-5)
    assert float((log_p + 0.5 * z[:, 0] ** 2).std()) > 0.5  # and it is not the prior


def test_mean_weights_are_partition_functions():
    """For a generator with random weights: E w = Z at three temperatures, within errors."""
    target = Gaussian(dim=2, variance=0.8, mean=0.3)
    edg = perturbed(
        build_edg(target, EDGSettings(hidden=8, depth=2, spread=0.3, width=2.8, conditioned=True), seed=0), 0.05, 1
    )
    for tau in (0.7, 1.0, 1.6):
        drawn = draw(edg, target, tau, 6000, generator=seeded(1))
        log_z = math.log(2.0 * math.pi * 0.8 * tau)
        assert abs(drawn.log_z - log_z) < 4.0 * drawn.log_z_error < 0.2
        assert drawn.log_z_bound < drawn.log_z
        bound = kl_bound(edg, target, 6000, tau=tau, generator=seeded(2))
        assert -bound.value < log_z + 3.0 * bound.error
        assert drawn.tolerance == (1e-4, 1e-4)
        assert 6 < drawn.n_function_evaluations < 200
        mean = (torch.softmax(drawn.log_weights, 0)[:, None] * drawn.x).sum(0)
        assert (mean - 0.3).abs().max() < 6.0 * math.sqrt(0.8 * tau / (drawn.ess * 6000))
        assert drawn.resampled(10, generator=seeded(1)).shape == (10, 2)
        more = draw(edg, target, tau, 6000, companions=3, generator=seeded(3))
        assert abs(more.log_z - log_z) < 4.0 * more.log_z_error
        assert more.ess > drawn.ess + 0.02
        assert drawn.log_z_bound < more.log_z_bound < log_z


class Border(LinearDecoder):
    """x = 9 on one side of z = 0, -9 on the other, and noise."""

    def conditional(self, z, tau=None):
        return Conditional(9.0 * torch.sign(z), torch.zeros_like(z))


class Halves:
    """Both halves of what `Border` draws, Z = 1."""

    dim = 1

    def __call__(self, x):
        half = 0.5 * math.log(2.0 * math.pi) + math.log(2.0)
        return half - torch.logaddexp(-0.5 * (x[:, 0] - 9.0) ** 2, -0.5 * (x[:, 0] + 9.0) ** 2)


@pytest.mark.parametrize("companions", [0, 1, 4])
def test_companions_give_back_what_lies_beyond_a_border(companions):
    """An encoder that knows nothing of x puts half of its latents where the decoder leads elsewhere. Weights of these
    never come: the others' mean is 1 - 2^-(k + 1) of Z, and without companions they are equal, of no error."""
    edg = EDG(Border(0.0, 1.0), ExactScore(0.0, 1.0, as_correction=False), DIFFUSION)
    drawn = draw(edg, Halves(), n=4000, companions=companions, generator=seeded(1))
    share = 1.0 - 0.5 ** (companions + 1)
    assert abs(drawn.log_z - math.log(share)) < 4.0 * drawn.log_z_error + 1e-4 < 0.05
    assert (drawn.ess > 0.999999) == (companions == 0)


# --- bad input --------------------------------------------------------------------------------------------------------


class Holes(Gaussian):
    """NaN above 1, +inf below -1."""

    def __call__(self, x):
        u = super().__call__(x)
        u = torch.where(x[:, 0] > 1.0, torch.nan, u)
        return torch.where(x[:, 0] < -1.0, torch.inf, u)


class Steep(Gaussian):
    """NaN above 1, with NaN for a gradient, so that dynamics have no x there."""

    def __call__(self, x):
        return super().__call__(x) + 0.0 * torch.sqrt(1.0 - x[:, 0])


@pytest.mark.parametrize("steps", [None, 5])
def test_draws_without_x_have_no_weight_and_disturb_no_other(steps):
    settings = EDGSettings(decoder="hamiltonian", hidden=8, stages=1)
    edg = perturbed(build_edg(Steep(dim=2), settings, seed=0), 0.1, 1)
    with pytest.warns(UserWarning, match="have an energy that is not finite and weigh nothing"):
        made = draw(edg, Steep(dim=2), n=400, steps=steps, generator=seeded(1))
    lost = torch.isinf(made.energy)
    assert 20 < made.n_nonfinite == int(lost.sum()) < 200
    assert torch.isfinite(made.log_weights[~lost]).all() and (made.log_weights[lost] == -math.inf).all()
    assert torch.isfinite(made.x).all()  # 0 for those lost
    if steps is None:
        proposal = EDGProposal(edg)
        x, log_prob, finite = proposal.propose(400, generator=seeded(2))
        assert 20 < int((~finite).sum()) < 200
        assert torch.isfinite(log_prob[finite]).all() and (log_prob[~finite] == -math.inf).all()
        v = torch.randn(400, 4, generator=seeded(3))
        x, volume, finite = proposal.from_latents(v)
        assert torch.isfinite(volume[finite]).all() and not torch.isfinite(x[~finite]).all(1).any()


@pytest.mark.parametrize("decoder", ["gaussian", "hamiltonian"])
def test_draws_that_are_not_finite_are_counted_and_left_out(decoder):
    edg = perturbed(build_edg(Holes(dim=2), EDGSettings(decoder=decoder, hidden=8, stages=1), seed=0), 0.1, 1)
    sample = kl_bound(edg, Holes(dim=2), 400, generator=seeded(1))
    assert 50 < sample.n_nonfinite < 300
    assert math.isfinite(sample.value)
    gradients = torch.autograd.grad(sample.loss, list(edg.parameters()))
    assert all(torch.isfinite(g).all() for g in gradients)
    assert any(g.any() for g in gradients)
    with pytest.warns(UserWarning, match=r"\d+ of 400 draws \(\d+ %\) have an energy that is not finite"):
        drawn = draw(edg, Holes(dim=2), 1.0, 400, generator=seeded(1))
    bad = (drawn.x[:, 0].abs() > 1.0)  # fmt: skip
    assert drawn.n_nonfinite == int(bad.sum()) and f"{drawn.n_nonfinite} without a finite energy" in repr(drawn)
    assert (drawn.log_weights[bad] == -math.inf).all()
    assert torch.isfinite(drawn.log_weights[~bad]).all()
    assert drawn.log_z_bound == -math.inf


def test_errors_that_say_what_is_wrong(monkeypatch):
    edg = build_edg(Quartic(), EDGSettings(hidden=8), seed=0)
    with pytest.raises(ValueError, match="3 dimensions, the generator 2"):
        kl_bound(edg, Quartic(3), 10, generator=seeded(1))
    with pytest.raises(ValueError, match="3 dimensions, the generator 2"):
        draw(edg, Quartic(3), generator=seeded(1))
    nowhere = Quartic()
    monkeypatch.setattr(Quartic, "__call__", lambda self, x: x.sum(1) * torch.nan)
    with pytest.raises(RuntimeError, match="none of 10 draws"):
        kl_bound(edg, nowhere, 10, generator=seeded(1))
    with pytest.raises(RuntimeError, match="none of 200 draws"):
        draw(edg, nowhere, n=200, generator=seeded(1))
    for energy, words in (
        (lambda self, x: x, r"shape \(10, 2\) for 10 rows"),
        (lambda self, x: x.detach().numpy().sum(1), "gave ndarray for 10 rows, not a tensor"),
        (lambda self, x: x.detach().sum(1), "have no gradient: compute them from x in torch"),
    ):
        monkeypatch.setattr(Quartic, "__call__", energy)
        with pytest.raises(ValueError, match=words):
            kl_bound(edg, nowhere, 10, generator=seeded(1))
    monkeypatch.setattr(Quartic, "__call__", lambda self, x: -1.0 / torch.relu(x[:, 0]))
    with pytest.raises(ValueError, match=r"gave \d+ of 200 draws an energy of -inf"):
        draw(edg, nowhere, n=200, generator=seeded(1))
    with pytest.raises(ValueError, match="draw at least 100"):
        draw(edg, nowhere, n=20, generator=seeded(1))
    with pytest.raises(ValueError, match="conditioned=True"):
        edg.at(0.5)
    with pytest.raises(ValueError, match="above 0"):
        edg.at(-1.0)
    with pytest.raises(ValueError, match=r"chunk, .* at least 1, not 0"):
        draw(edg, nowhere, n=200, chunk=0, generator=seeded(1))
    for bad in ({"rtol": -1.0}, {"atol": 0.0}):
        with pytest.raises(ValueError, match="tolerances are above 0"):
            draw(edg, nowhere, n=200, generator=seeded(1), **bad)
    nowhere.dim = None
    with pytest.raises(ValueError, match=r"has a whole number `dim`, .* it is None"):
        build_edg(nowhere, EDGSettings(hidden=8))
    for bad in ({"hidden": 0}, {"leaps": 0}, {"harmonics": -1}, {"latent_dim": 0}, {"stages": -1}):
        name, value = next(iter(bad.items()))
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least ., not {value}"):
            EDGSettings(**bad)


def test_numbers_of_draws_and_temperatures_that_make_no_sense():
    target, edg = Quartic(), build_edg(Quartic(), EDGSettings(hidden=8), seed=0)
    for bad in (150.5, -1, True, "9"):
        with pytest.raises(ValueError, match=f"the number of draws must be a whole number of at least 0, not {bad!r}"):
            whole("the number of draws", bad, 0)
    assert whole("the number of draws", np.int64(3)) == 3
    with pytest.raises(ValueError, match="the number of draws must be a whole number of at least 0, not -1"):
        draw(edg, target, n=-1, generator=seeded(1))
    with pytest.raises(ValueError, match="companions must be a whole number of at least 0, not -1"):
        draw(edg, target, n=200, companions=-1, generator=seeded(1))
    for n in (0, 1):
        with pytest.raises(ValueError, match=f"draws must be a whole number of at least 2, not {n}"):
            kl_bound(edg, target, n, generator=seeded(1))
    with pytest.raises(ValueError, match="times must be a whole number of at least 1, not 0"):
        kl_bound(edg, target, 10, times=0, generator=seeded(1))
    for tau in (-1.0, 0.0, math.nan, torch.linspace(0.0, 1.0, 10)):
        with pytest.raises(ValueError, match="temperatures must be finite and above 0"):
            kl_bound(edg, target, 10, tau=tau, generator=seeded(1))


def test_latents_and_x_that_do_not_go_together():
    edg = build_edg(Quartic(), EDGSettings(hidden=8), seed=0).float()
    z, x = torch.zeros(7, 2, dtype=torch.float32), torch.zeros(7, 2, dtype=torch.float32)
    check_pairs(edg, z, x)
    for other in (z[:6], torch.zeros(7, 3, dtype=torch.float32), z[0]):
        with pytest.raises(ValueError, match="need as many latents of size 2 as x of size 2, not arrays of shape"):
            check_pairs(edg, other, x)
    with pytest.raises(ValueError, match=r"in torch.float32; latents are in torch.float64 and x in torch.fl"):
        check_pairs(edg, z.double(), x)
    for paths in (encoder_paths, partial(chain_paths, steps=5, generator=seeded(1))):
        with pytest.raises(ValueError, match="need as many latents of size 2"):
            paths(edg, torch.zeros(7, 3, dtype=torch.float32), x)


def test_an_equation_that_does_not_converge():
    edg = perturbed(build_edg(Quartic(), EDGSettings(score="plain", hidden=16), seed=0), 0.5, 1)
    x, z = edg.at().sample(50, generator=seeded(1))
    with pytest.raises(RuntimeError, match=r"rtol = 1e-09.*after \d+ evaluations.*loosen"):
        encoder_ode.encoder_paths(edg, z, x, 1e-9, 1e-9, most_evaluations=30)
    with torch.no_grad():
        edg.score.net[-1].bias += math.inf
    with pytest.raises(RuntimeError, match=r"did not converge at rtol = 0.0001"):
        encoder_log_prob(edg, z, x)


def test_slopes_differentiate_again():
    x = torch.randn(3, 2, generator=seeded(1)).requires_grad_()
    g = slope(Quartic(), x, torch.tensor([1.0, 2.0, 4.0]))
    (hv,) = torch.autograd.grad(g.sum(), x)
    assert torch.allclose(hv, (3.0 * x**2 - 2.0) / torch.tensor([[1.0], [2.0], [4.0]]))
    with torch.no_grad():
        assert not slope(Quartic(), x, None).requires_grad


def test_decoder_and_score_are_of_one_diffusion_temperature_and_size():
    size, mild = {"hidden": 8, "depth": 1}, VariancePreserving(beta_max=5.0)
    decoder, score = GaussianDecoder(2, 2, **size), GaussianScore(2, 2, mild, **size)
    assert EDG(decoder, score).diffusion == mild
    with pytest.raises(ValueError, match=r"made for .*beta_max=5.0.*, not for .*beta_max=20.0"):
        EDG(decoder, score, VariancePreserving())
    with pytest.raises(ValueError, match="input of only one of decoder and score"):
        EDG(decoder, GaussianScore(2, 2, mild, conditioned=True, **size))
    with pytest.raises(ValueError, match="x has 2 components in the decoder, 3 in the score"):
        EDG(decoder, GaussianScore(2, 3, mild, **size))
