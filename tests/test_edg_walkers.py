"""Walkers of training: their equilibrium, the opposite divergence, and what a generator learns of them."""

import math
from dataclasses import replace

import pytest
import torch
from molecules import perturbed, seeded

from openmm_tsf.edg import EDGSettings, EDGTrainingSettings, build_edg, draw, kl_bound, train_edg
from openmm_tsf.edg.lennard_jones import LennardJones
from openmm_tsf.edg.networks import log_normal
from openmm_tsf.edg.walkers import FAR, Walkers, learn_from, log_density, near


class Correlated:
    """U = x K x/2 in two dimensions."""

    dim = 2
    stiffness = torch.tensor([[3.0, 1.2], [1.2, 0.8]], dtype=torch.float64)
    log_z = math.log(2.0 * math.pi) - 0.5 * math.log(3.0 * 0.8 - 1.2**2)

    def __call__(self, x):
        return 0.5 * ((x @ self.stiffness.to(x)) * x).sum(1)

    def samples(self, n, generator):
        root = torch.linalg.cholesky(torch.linalg.inv(self.stiffness))
        return torch.randn(n, 2, generator=generator) @ root.T


class Quartic:
    """U = x^4 in one dimension."""

    dim = 1

    def __call__(self, x):
        return x[:, 0] ** 4


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_walkers_come_to_the_target_and_stay(tau):
    """From far away, by steps so long that without the test of Metropolis they would be off."""
    walkers = Walkers(1.5 + 0.1 * torch.randn(20_000, 1, generator=seeded(1)), step=0.5)
    x = torch.linspace(-4.0, 4.0, 4001)
    weight = torch.exp(-(x**4) / tau)
    expected = [float((x**k * weight).sum() / weight.sum()) for k in (2, 4)]
    generator = seeded(2)
    for _ in range(60):
        energy = walkers.move(Quartic(), 3, tau=tau, generator=generator)
    assert torch.equal(energy, Quartic()(walkers.x) / tau)
    found = [(float((walkers.x**k).mean()), float((walkers.x**k).std()) / 20_000**0.5) for k in (1, 2, 4)]
    assert abs(found[0][0]) < 4.0 * found[0][1]
    for (mean, error), exact in zip(found[1:], expected, strict=True):
        assert abs(mean - exact) < 4.0 * error < 0.06 * exact


def test_step_sizes_find_the_wanted_acceptance():
    for step in (0.001, 10.0):
        walkers, generator, shares = Walkers(Correlated().samples(500, seeded(1)), step), seeded(2), []
        for i in range(200):
            before = walkers.x
            walkers.move(Correlated(), 4, generator=generator)
            if i >= 150:
                shares.append(float((walkers.x != before).any(1).double().mean()))
        assert 0.7 < sum(shares) / 50 < 0.9
    assert Walkers(Correlated().samples(500, seeded(1))).step == pytest.approx(0.02, rel=0.5)


def test_walkers_stay_where_energies_are():
    class Holes(Correlated):
        def __call__(self, x):
            return torch.where(x[:, 0] > 0.0, torch.nan, super().__call__(x))

    walkers, generator = Walkers(-Correlated().samples(200, seeded(1)).abs(), step=0.3), seeded(2)
    for _ in range(10):
        energy = walkers.move(Holes(), 3, generator=generator)
    assert torch.isfinite(energy).all() and (walkers.x[:, 0] <= 0.0).all()
    assert 0.01 < walkers.step < 1.0


def test_draws_that_are_offered_bring_walkers_where_they_should_be():
    """From one of two states that nothing else connects to the shares that weights give them."""
    share, drawn_share, n = 0.8, 0.3, 20_000

    def log_weight(x):
        right = x[:, 0] > 0.0
        return torch.where(right, math.log(share / drawn_share), math.log((1.0 - share) / (1.0 - drawn_share)))

    walkers, generator = Walkers(-torch.ones(n, 1), step=1.0), seeded(1)
    for _ in range(30):
        x = torch.where(torch.rand(n, 1, generator=generator) < drawn_share, 1.0, -1.0)
        walkers.offer(x, log_weight(x), log_weight(walkers.x), generator=generator)
    assert abs(float((walkers.x > 0).double().mean()) - share) < 4.0 * math.sqrt(share * (1 - share) / n)
    few = Walkers(-torch.ones(5, 1), step=1.0)
    few.offer(torch.ones(3, 1), torch.zeros(3), torch.full((5,), -torch.inf), generator=generator)
    assert few.x[:, 0].tolist() == [1.0, 1.0, 1.0, -1.0, -1.0]
    few.offer(-torch.ones(5, 1), torch.zeros(5), torch.full((5,), torch.nan), generator=generator)
    assert few.x[:, 0].tolist() == [1.0, 1.0, 1.0, -1.0, -1.0]


@pytest.mark.parametrize("decoder", ["gaussian", "hamiltonian"])
def test_offers_keep_walkers_at_equilibrium_with_a_hot_target(decoder):
    """Dynamics depend on temperature, so the density of walkers has to be that of draws at the same one."""
    heat, n, generator = 30.0, 4000, seeded(1)
    target = Correlated()
    edg = build_edg(target, EDGSettings(decoder=decoder, spread=9.0, hidden=32, width=0.5), seed=1).double()
    walkers = Walkers(math.sqrt(heat) * target.samples(n, generator), step=0.1)
    taken = 0
    for _ in range(60):
        made = kl_bound(edg, target, n, tau=heat, generator=generator)
        own = learn_from(edg, walkers.x, target(walkers.x) / heat, tau=heat, generator=generator)[1]
        before = walkers.x
        walkers.offer(made.x, made.log_weights, own, generator=generator)
        taken += int((walkers.x != before).any(1).sum())
    energy = target(walkers.x) / heat  # of the exponential distribution
    assert taken > n
    assert abs(float(energy.mean()) - 1.0) < 4.0 / math.sqrt(n)


def clusters(n):
    edg = build_edg(LennardJones(n), EDGSettings(decoder="pairs", score="pairs", stages=4, spread=0.9), seed=1)
    perturbed(edg.decoder, 0.03, 3)
    return edg


def test_densities_of_maps_are_their_determinants():
    edg = clusters(4)
    z = torch.randn(20, 9, generator=seeded(1))
    x, jacobian = edg.decoder.centre_and_jacobian(z)
    exact = log_normal(z) - torch.linalg.slogdet(jacobian)[1]
    found = log_density(edg, x, torch.randn(20, 9, generator=seeded(2)))
    assert torch.allclose(found, exact, rtol=0.0, atol=1e-4)
    assert (exact - log_normal(x / 0.9)).abs().max() > 0.3


def poor(latents=1):
    """Not trained; its encoder knows x, and is too wide."""
    edg = build_edg(Correlated(), EDGSettings(hidden=12, depth=1, latent_dim=latents, width=0.8), seed=1).double()
    perturbed(edg, 0.3)
    return edg


def test_densities_of_networks_have_the_marginal_of_x_for_their_mean():
    """E[p_D(z) p_D(x|z)/p_E(z|x)] = p_D(x), whatever the encoder; by quadrature over one latent."""
    edg, n = poor(), 40_000
    grid = torch.linspace(-8.0, 8.0, 2001)
    for x in Correlated().samples(4, seeded(1)):
        with torch.no_grad():
            inner = edg.decoder.conditional(grid[:, None]).log_prob(x.expand(2001, 2))
            exact = torch.trapezoid(torch.exp(inner + log_normal(grid[:, None])), grid)
            found = torch.exp(log_density(edg, x.expand(n, 2), torch.randn(n, 1, generator=seeded(2))))
        assert abs(float(found.mean() - exact)) < 4.0 * float(found.std()) / n**0.5 < 0.05 * float(exact)


def slopes(parameter, value, step):
    """Of a value along a random direction of a parameter: by its gradient, and by differences."""
    direction, values = torch.randn(parameter.shape, generator=seeded(6)), []
    with torch.no_grad():
        for change in (step, -2.0 * step):
            parameter += change * direction
            values.append(float(value()))
        parameter += step * direction
    return float((parameter.grad * direction).sum()), (values[0] - values[1]) / (2.0 * step)


def test_gradients_of_networks_are_finite_differences():
    """Of the decoder, and of the encoder that latents are drawn from."""
    edg, x = poor(2), Correlated().samples(8, seeded(1))

    def value():
        return learn_from(edg, x, Correlated()(x), generator=seeded(5))[0]

    value().backward()
    for part in (edg.decoder, edg.score.encoder):
        for parameter in part.parameters():
            found, expected = slopes(parameter, value, 1e-6)
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_gradients_are_finite_differences(monkeypatch):
    """With those of the latents, which are found by running the decoder backwards."""
    monkeypatch.setattr("openmm_tsf.edg.pair_score.IN_TRAINING", 5)
    edg, cluster = clusters(4), LennardJones(4)
    x = edg.decoder.centre(torch.randn(8, 9, generator=seeded(1))).detach()
    energy = cluster(x)

    def value():
        return learn_from(edg, x, energy, generator=seeded(5))[0]

    value().backward()
    for name in ("plain", "sense", "log_scale", "mixed"):
        parameter = dict(edg.decoder.named_parameters())[name]
        found, expected = slopes(parameter, value, 1e-5)
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_two_divergences_enclose_the_partition_function():
    """E[ln w] over exact samples and over draws, of a generator that has learned little; weights have the mean Z."""
    target = Correlated()
    edg = build_edg(target, EDGSettings(score="variational", hidden=24, depth=2), seed=1)
    x = target.samples(20_000, seeded(3))
    above = learn_from(edg, x, target(x), generator=seeded(4))[1]
    below = kl_bound(edg, target, 20_000, generator=seeded(5))
    error = float(above.std()) / 20_000**0.5
    assert above.mean() > target.log_z + 20.0 * error
    assert -below.value < target.log_z - 20.0 * below.error
    assert float(below.log_weights.mean()) == pytest.approx(-below.value, abs=4.0 * below.error)
    z_error = float(torch.exp(below.log_weights).std()) / 20_000**0.5
    assert abs(float(torch.exp(below.log_weights).mean()) - math.exp(target.log_z)) < 4.0 * z_error


def test_walkers_that_are_far_away_are_not_learned_from():
    edg, energy = clusters(4), torch.zeros(100)
    x = edg.decoder.centre(0.3 * torch.randn(100, 9, generator=seeded(3))).detach()
    x[-1] *= 100.0
    loss, log_weights = learn_from(edg, x, energy, generator=seeded(4))
    assert log_weights[-1] > log_weights.nanmedian() + FAR > log_weights[:-1].max()
    assert near(log_weights).tolist() == [True] * 99 + [False]
    assert float(loss.detach()) == pytest.approx(float(log_weights[:-1].mean()))  # energies are zero
    loss.backward()
    assert torch.isfinite(edg.decoder.plain.grad).all()


def test_walkers_whose_latents_are_not_found_are_not_learned_from(monkeypatch):
    """With one Newton step from a guess that is no guess, most are not."""
    monkeypatch.setattr("openmm_tsf.edg.pair_score.IN_TRAINING", 1)
    edg, energy = clusters(4), torch.zeros(100)
    z = torch.randn(100, 9, generator=seeded(3))
    x, log_det, _ = edg.decoder.centre_and_log_det(z)
    edg.score.repeats = 0
    loss, log_weights = learn_from(edg, x.detach(), energy, generator=seeded(4))
    found = ~log_weights.isnan()
    assert 5 < found.sum() < 95 and torch.equal(near(log_weights), found)
    assert torch.allclose(log_weights[found], (log_det - log_normal(z))[found].detach(), rtol=0.0, atol=0.2)
    loss.backward()
    assert torch.isfinite(edg.decoder.plain.grad).all()


WALKING = EDGTrainingSettings(
    steps=60, batch=32, walkers=16, trajectory=3, anneal_share=0.3, checkpoint_every=20, record_every=15
)


def test_training_with_walkers_goes_on_where_it_stopped(tmp_path):
    target, size = Correlated(), {"hidden": 24, "depth": 2}
    whole = build_edg(target, EDGSettings(**size), seed=1)
    expected = train_edg(whole, target, WALKING, seed=3)
    assert expected.n_energy_evaluations == 60 * 32 + 60 * 16 * 4
    assert all(math.isfinite(row[name]) for row in expected.rows for name in ("forward", "n_far", "step_size"))

    def kill(done, total, message):
        if done == 50:
            raise KeyboardInterrupt

    again = build_edg(target, EDGSettings(**size), seed=1)
    with pytest.raises(KeyboardInterrupt):
        train_edg(again, target, WALKING, seed=3, directory=tmp_path, progress=kill)
    history = train_edg(again, target, WALKING, seed=3, directory=tmp_path)
    assert history.rows == expected.rows
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_walkers_of_training_are_at_equilibrium_with_the_target_not_with_the_generator():
    """They begin at its draws and take more of them; it learns next to nothing meanwhile."""
    target = Correlated()
    edg = build_edg(target, EDGSettings(hidden=24, depth=2, width=0.8, spread=2.0), seed=1)
    x = target.samples(50_000, seeded(3))
    exact = learn_from(edg, x, target(x), generator=seeded(4))[1]
    training = EDGTrainingSettings(
        steps=150, batch=500, walkers=500, trajectory=2, anneal_share=0.0, record_every=50, learning_rate=1e-9
    )
    rows = train_edg(edg, target, training, seed=3).rows
    error = float(exact.std()) / 500**0.5
    for row in rows[1:]:  # each the mean of fifty dependent ones
        assert abs(row["forward"] - float(exact.mean())) < 1.5 * error < 0.2
    assert float(exact.mean()) > target.log_z + 0.5 > 0.5 - rows[-1]["bound"]


def test_walkers_cool_down_with_the_target(monkeypatch):
    heats, learned_at, move = [], [], Walkers.move

    def moved(self, target, trajectory, *, tau, generator):
        heats.append(tau)
        return move(self, target, trajectory, tau=tau, generator=generator)

    def learned(*arguments, tau, **options):
        learned_at.append(tau)
        return learn_from(*arguments, tau=tau, **options)

    monkeypatch.setattr(Walkers, "move", moved)
    monkeypatch.setattr("openmm_tsf.edg.training.learn_from", learned)
    edg = build_edg(Correlated(), EDGSettings(hidden=12, depth=1, width=0.8), seed=1)
    train_edg(edg, Correlated(), replace(WALKING, anneal_from=0.1, anneal_share=0.5, steps=10), seed=3)
    assert heats == pytest.approx([10.0 ** max(0.0, 1.0 - step / 5.0) for step in range(10)])
    assert learned_at == heats


def test_there_are_as_many_walkers_as_asked_for_whatever_is_lost(monkeypatch):
    there, move = [], Walkers.move

    def moved(self, *arguments, **options):
        there.append(len(self.x))
        return move(self, *arguments, **options)

    monkeypatch.setattr(Walkers, "move", moved)

    class Half(Correlated):
        def __call__(self, x):
            return torch.where(x[:, 0] > 0.0, torch.nan, super().__call__(x))

    edg = build_edg(Half(), EDGSettings(hidden=12, depth=1, width=0.8), seed=1)
    settings = EDGTrainingSettings(steps=3, batch=64, walkers=64, trajectory=4)
    with pytest.warns(UserWarning, match="not finite and taught nothing"):
        history = train_edg(edg, Half(), settings, seed=3)
    assert 10 < history.n_nonfinite < 150
    assert there == [64, 64, 64]


def test_what_is_learned_of_walkers_makes_them_likely(monkeypatch):
    """With the gradient of the draws' bound left out."""

    def silent(*arguments, **options):
        sample = kl_bound(*arguments, **options)
        return replace(sample, loss=0.0 * sample.loss)

    monkeypatch.setattr("openmm_tsf.edg.training.kl_bound", silent)
    target = Correlated()
    edg = build_edg(target, EDGSettings(hidden=24, depth=2, width=0.8, spread=2.0), seed=1)
    training = EDGTrainingSettings(
        steps=250, batch=64, walkers=64, trajectory=5, anneal_share=0.0, learning_rate=5e-3, record_every=25
    )
    above = [row["forward"] - target.log_z for row in train_edg(edg, target, training, seed=3).rows]
    assert above[0] > 0.6 and 0.0 < above[-1] < 0.3


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="2 to batch = 32, not 33"):
        EDGTrainingSettings(batch=32, walkers=33)
    with pytest.raises(ValueError, match="2 to batch = 32, not 1"):  # how far one is apart from others is NaN
        EDGTrainingSettings(batch=32, walkers=1)
    with pytest.raises(ValueError, match="trajectory must be a whole number of at least 1"):
        EDGTrainingSettings(trajectory=0)
    hot = build_edg(Correlated(), EDGSettings(conditioned=True, hidden=8, depth=1), seed=1)
    with pytest.raises(ValueError, match=r"one temperature, tau = 1, not \[1.0, 2.0\]"):
        train_edg(hot, Correlated(), WALKING, seed=1, temperatures=(1.0, 2.0))
    with pytest.raises(ValueError, match="not one with conditioned=True"):
        train_edg(hot, Correlated(), WALKING, seed=1)
    for score in ("plain", "energy"):
        edg = build_edg(Correlated(), EDGSettings(score=score, hidden=8, depth=1), seed=1)
        with pytest.raises(ValueError, match="need latents from a base that knows x"):
            train_edg(edg, Correlated(), WALKING, seed=1)


@pytest.mark.slow
def test_walkers_make_rare_clusters_less_rare():
    """Six particles: with as many steps, half of whose rows are walkers, a larger effective sample size."""
    cluster, ess = LennardJones(6), []
    for walkers, batch in ((0, 192), (96, 96)):
        settings = EDGSettings(decoder="pairs", score="pairs", stages=12, spread=0.9, width=0.001)
        edg = build_edg(cluster, settings, seed=1)
        training = EDGTrainingSettings(
            steps=300, batch=batch, walkers=walkers, learning_rate=5e-3, anneal_from=0.3, anneal_share=0.2,
            soften_above=200.0, weight_average=0.99,
        )  # fmt: skip
        train_edg(edg, cluster.softened(), training, seed=1)
        ess.append(draw(edg, cluster, n=10_000, generator=seeded(1)).ess)
    assert ess[1] > ess[0] > 0.5 and ess[1] > 0.75
