"""Generators on periodic lattices, and weights by a chain of steps."""

import math

import pytest
import torch
from molecules import perturbed, seeded
from torch import nn

from openmm_tsf.edg import EDGSettings, EDGTrainingSettings, build_edg, draw, encoder_log_prob, kl_bound, train_edg
from openmm_tsf.edg.bound import base_integral, integrand
from openmm_tsf.edg.encoder_chain import chain_paths, chain_sample
from openmm_tsf.edg.lattice import modes, shells
from openmm_tsf.edg.relaxed_ising import RelaxedIsing
from openmm_tsf.tuning.ising import square_lattice

LATTICE = (4, 3)
N = 12


class Flat:
    """U = 0: nothing but a dimension."""

    dim = N

    def __call__(self, x):
        return torch.zeros_like(x[:, 0])


class Coupled:
    """A Gaussian that does not know where it is on the lattice: U = sum over shells of v_k^2/(2 S_k)."""

    dim = N

    def __init__(self):
        self.basis, self.shell = modes(LATTICE), shells(LATTICE)
        self.spectrum = torch.linspace(1.5, 4.0, int(self.shell.max()) + 1)

    def __call__(self, x):
        return 0.5 * ((x @ self.basis).square() / self.spectrum[self.shell]).sum(1)

    @property
    def log_z(self):
        return 0.5 * (N * math.log(2.0 * math.pi) + float(self.spectrum.log()[self.shell].sum()))


def generator_of(score="gaussian", size=0.2, hidden=5):
    settings = EDGSettings(lattice=LATTICE, score=score, hidden=hidden, depth=2, width=0.7, spread=1.3)
    return perturbed(build_edg(Flat(), settings, seed=1), size, 2)


def exact_generator(target):
    """Of `Coupled`: gains g^2 = S - w^2, and the posterior of every mode."""
    edg = build_edg(target, EDGSettings(lattice=LATTICE, score="variational", hidden=2, depth=1, width=1.0), seed=0)
    with torch.no_grad():
        gain = torch.sqrt(target.spectrum - 1.0)
        edg.decoder.log_gain.copy_(gain.log())
        edg.score.gain.copy_(gain / target.spectrum)
        edg.score.log_width.copy_(-0.5 * target.spectrum.log())
    return edg


# --- modes ------------------------------------------------------------------------------------------------------------


def test_modes_are_orthonormal_and_shells_are_theirs():
    basis = modes((4, 6))
    assert torch.allclose(basis @ basis, torch.eye(24), atol=1e-12)
    assert torch.equal(basis, basis.T)
    adjacency = square_lattice(4)
    spectrum = modes((4, 4)) @ adjacency @ modes((4, 4))
    assert torch.allclose(spectrum, torch.diag(spectrum.diagonal()), atol=1e-12)
    p = 2.0 * torch.cos(torch.pi * torch.arange(4) / 2.0)
    assert torch.allclose(spectrum.diagonal().reshape(4, 4), p[:, None] + p, atol=1e-12)
    shell = shells((4, 6)).reshape(4, 6)
    for reflected in (shell.flip(0).roll(1, 0), shell.flip(1).roll(1, 1)):
        assert torch.equal(shell, reflected)
    assert len(shell.unique()) == 3 * 4


# --- symmetries -------------------------------------------------------------------------------------------------------


def moved(x, by):
    return x.unflatten(1, LATTICE).roll(by, (1, 2)).flatten(1)


def moved_modes(z, by):
    return moved(z @ modes(LATTICE), by) @ modes(LATTICE)


def asymmetries(edg):
    """How far decoder and score are from commuting with a translation and with a reversal of signs."""
    t, (z, x) = torch.linspace(0.05, 0.9, 6), (torch.randn(6, N, generator=seeded(k)) for k in (3, 4))
    found = []
    for there, there_modes, even in (
        (lambda y: moved(y, (1, 2)), lambda y: moved_modes(y, (1, 2)), lambda y: moved(y, (1, 2))),
        (lambda y: -y, lambda y: -y, lambda y: y),
    ):
        one, other = edg.decoder.conditional(z), edg.decoder.conditional(there_modes(z))
        found += [other.mean - there(one.mean), other.log_width - even(one.log_width)]
        one, other = edg.score.given(x), edg.score.given(there(x))
        found += [other.mean - there_modes(one.mean), other.log_width - one.log_width]
        here = edg.score.parts(z, one, t).correction
        found += [edg.score.parts(there_modes(z), other, t).correction - there_modes(here)]
        assert edg.score.corrected == bool(here.abs().max() > 0.05)
    assert one.log_width.std() > 0.01
    return max(float(y.detach().abs().max()) for y in found)


@pytest.mark.parametrize("score", ["gaussian", "variational"])
def test_decoder_and_score_commute_with_translations_and_signs(score):
    assert asymmetries(generator_of(score)) < 1e-12


@pytest.mark.parametrize("what", ["a bias", "a factor that differs within a shell"])
def test_the_law_of_symmetry_can_fail(what):
    edg = generator_of()
    net = edg.score.encoder
    if what == "a bias":
        net.near[0].bias = nn.Parameter(torch.full((10,), 0.3))
    else:
        net.shell.copy_(torch.arange(N).clamp(max=int(net.shell.max())))
    assert asymmetries(edg) > 1e-3


# --- what they can do -------------------------------------------------------------------------------------------------


def test_lattice_generators_start_simple():
    settings = EDGSettings(lattice=LATTICE, width=0.4, spread=2.0, hidden=4)
    edg = build_edg(Flat(), settings, seed=3)
    z, x = (torch.randn(5, N, generator=seeded(k)) for k in (1, 2))
    c = edg.decoder.conditional(z)
    assert torch.allclose(c.mean, 2.0 * z @ modes(LATTICE))
    assert torch.allclose(c.log_width.exp(), torch.full((5, N), 0.8))
    parts = edg.score.parts(z, edg.score.given(x), torch.full((5,), 0.3))
    assert torch.allclose(parts.base + parts.correction, -z)
    assert kl_bound(edg, Coupled(), 20, generator=seeded(1)).encoder == pytest.approx(0.0, abs=1e-12)


def test_coupled_gaussians_are_exact_without_a_network():
    """Whatever the spectrum: all weights are Z, up to what z_1 still knows of x."""
    target = Coupled()
    edg = exact_generator(target)
    drawn = draw(edg, target, n=500, generator=seeded(1))
    assert abs(drawn.log_z - target.log_z) < 4.0 * drawn.log_z_error < 0.01
    assert float(drawn.log_weights.std()) < 0.05
    assert drawn.ess > 0.998
    bound = kl_bound(edg, target, 4000, generator=seeded(2))
    gap = -0.5 * torch.log1p(-math.exp(-10.05) * (1.0 - 1.0 / target.spectrum))[target.shell].sum()
    assert bound.value + target.log_z == pytest.approx(float(gap), abs=4.0 * bound.error)
    assert bound.error < 2e-3
    perceptron = build_edg(target, EDGSettings(width=1.0), seed=0)
    assert kl_bound(perceptron, target, 400, generator=seeded(2)).value + target.log_z > 1.0


def test_training_on_a_lattice_lowers_the_bound():
    """The 3 x 3 Ising model, near its critical temperature; exact ln Z is known."""
    target = RelaxedIsing(3, 2.3, a=1.8, whitened=True)
    edg = build_edg(target, EDGSettings(lattice=(3, 3), hidden=3, depth=2, width=0.9), seed=1)
    before = kl_bound(edg, target, 2000, generator=seeded(5))
    settings = EDGTrainingSettings(steps=200, batch=32, learning_rate=3e-2, anneal_share=0.0, weight_average=0.98)
    train_edg(edg, target, settings, seed=1)
    after = kl_bound(edg, target, 2000, generator=seeded(5))
    assert before.value + target.log_z > 2.0
    assert -4.0 * after.error < after.value + target.log_z < 0.5
    drawn = draw(edg, target, n=1000, steps=30, generator=seeded(6))
    assert abs(drawn.log_z - target.log_z) < 4.0 * drawn.log_z_error < 0.3
    assert drawn.log_z_bound < target.log_z


# --- the bound --------------------------------------------------------------------------------------------------------


def test_the_integral_of_the_base_is_that_of_its_score():
    """Against a quadrature over times of E[|s|^2 + 2 div s + d], s the score of a Gaussian carried along, given z_0."""
    edg = generator_of("variational")
    x, z0 = (torch.randn(3, N, generator=seeded(k)) for k in (1, 2))
    with torch.no_grad():
        given = edg.score.given(x)
        got = base_integral(edg, z0, given)
        u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
        t, weight = edg.diffusion.times(u)
        a, sigma = edg.diffusion.scale(t)[:, None], edg.diffusion.width(t)[:, None]
        for row in range(3):
            mean, w = given.mean[row], given.log_width[row].exp()
            variance = (a * w) ** 2 + sigma**2
            square = ((a * (z0[row] - mean)) ** 2 + sigma**2) / variance**2
            prior = (a * z0[row]) ** 2 + sigma**2 - 1.0  # E|z_t|^2 less its mean over z_0
            exact = (weight[:, None] * (square - 2.0 / variance + 1.0 - prior)).sum() / 20_000
            assert float(got[row]) == pytest.approx(float(exact), rel=1e-5)


def test_only_the_correction_is_sampled():
    """Without one the integrand is zero, and the bound has the scatter of ln w alone."""
    edg = generator_of("variational")
    z, x = (torch.randn(4, N, generator=seeded(k)) for k in (1, 2))
    u, eps = torch.linspace(0.1, 0.9, 4), torch.randn(4, N, generator=seeded(3))
    assert not integrand(edg, z, edg.score.given(x), u, eps).any()


# --- weights by a chain -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 7])
def test_a_chain_is_exact_for_a_gaussian_encoder(steps):
    """For any number of steps: ln R is ln p_E of a Gaussian, but for z_K that still knows x a little."""
    edg = generator_of("variational")
    z, x = (torch.randn(200, N, generator=seeded(k)) for k in (1, 2))
    with torch.no_grad():
        given = edg.score.given(x)
        normal = torch.distributions.Normal(given.mean, given.log_width.exp()).log_prob(z).sum(1)
    off = chain_paths(edg, z, x, steps, generator=seeded(3)).log_prob - normal
    assert float(off.abs().max()) < 0.3
    assert abs(float(off.exp().mean()) - 1.0) < 0.02
    assert float(normal.std()) > 1.0


@pytest.mark.parametrize("steps", [1, 4])
def test_a_chain_is_normalised_for_any_score(steps, generator):
    """R averages to a density of z_0: E over z_0 ~ N(0, 2) of R/N(z_0; 0, 2) is 1."""
    settings = EDGSettings(hidden=8, depth=2)
    edg = perturbed(build_edg(RelaxedIsing(3, 2.5), settings, seed=0), 0.15, 1)
    x = torch.full((20_000, 9), 0.7)
    z = math.sqrt(2.0) * torch.randn(20_000, 9, generator=generator)
    log_p = (-0.25 * z.square() - 0.5 * math.log(4.0 * math.pi)).sum(1)
    ratio = (chain_paths(edg, z, x, steps, generator=generator).log_prob - log_p).exp()
    error = float(ratio.std()) / math.sqrt(20_000)
    assert abs(float(ratio.mean()) - 1.0) < 4.0 * error < 0.4


def test_paths_of_a_chain_both_ways(generator):
    """Paths drawn from z_K have the ratio that paths from z_0 have: E[q/p] over p of anything is its mean over q."""
    edg = perturbed(build_edg(RelaxedIsing(3, 2.5), EDGSettings(hidden=8, depth=2, latent_dim=1), seed=0), 0.15, 1)
    x = torch.full((40_000, 9), 0.7)
    drawn = chain_sample(edg, x, 5, generator=generator)
    log_normal = -0.5 * drawn.start[:, 0].square() - 0.5 * math.log(2.0 * math.pi)
    ratio = (log_normal - drawn.log_prob).exp()
    for power in (0, 1, 2):
        terms = ratio * drawn.start[:, 0] ** power
        expected = (1.0, 0.0, 1.0)[power]
        assert abs(float(terms.mean()) - expected) < 4.0 * float(terms.std()) / 200.0 < 0.3


def test_a_chain_of_many_steps_gives_the_bound(generator):
    """E ln w of a chain tends to what `kl_bound` estimates, and lies below that of the equation."""
    target = RelaxedIsing(3, 2.5, whitened=True)
    settings = EDGSettings(lattice=(3, 3), hidden=4, depth=2, width=0.9)
    edg = perturbed(build_edg(target, settings, seed=0), 0.1, 1)
    bound = kl_bound(edg, target, 10_000, generator=generator)
    with pytest.warns(UserWarning, match="1500 draws are worth .* ln Z is probably too low"):
        far, near = (draw(edg, target, n=1500, steps=steps, generator=seeded(1)) for steps in (1, 40))
    error = math.hypot(bound.error, float(near.log_weights.std()) / math.sqrt(1500))
    assert abs(near.log_z_bound + bound.value) < 4.0 * error < 0.5
    x, z = edg.at().sample(100, generator=generator)
    ode = encoder_log_prob(edg, z, x)
    chain = torch.stack([chain_paths(edg, z, x, 40, generator=generator).log_prob for _ in range(8)])
    assert float((chain.mean(0) - ode).mean()) < 0.0  # Jensen
    assert float(chain.std(0).mean()) > 0.05
    assert (far.n_function_evaluations, near.n_function_evaluations) == (1, 40)
    assert far.log_z_bound < near.log_z_bound + 4.0 * error


def test_weights_by_a_chain_have_the_mean_z():
    target = Coupled()
    edg = perturbed(exact_generator(target), 0.03, 1)
    for companions in (0, 2):
        drawn = draw(edg, target, n=3000, steps=3, companions=companions, generator=seeded(4))
        assert abs(drawn.log_z - target.log_z) < 4.0 * drawn.log_z_error < 0.2
        assert drawn.tolerance is None
        assert drawn.n_function_evaluations == 3 * (1 + companions)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [
    {"decoder": "hamiltonian"}, {"score": "plain"}, {"score": "energy"}, {"conditioned": True}, {"latent_dim": 3},
])  # fmt: skip
def test_settings_that_a_lattice_does_not_have(bad):
    with pytest.raises(ValueError, match="on a lattice"):
        EDGSettings(lattice=LATTICE, **bad)


def test_lattices_and_chains_of_the_wrong_size():
    with pytest.raises(ValueError, match=r"5 x 3 sites.*12 components"):
        build_edg(Flat(), EDGSettings(lattice=(5, 3)))
    with pytest.raises(ValueError, match="columns of a lattice must be a whole number of at least 1, not 0"):
        EDGSettings(lattice=(2, 0))
    with pytest.raises(ValueError, match=r"steps .* at least 1, not 0"):
        draw(generator_of(), Flat(), n=100, steps=0, generator=seeded(1))
