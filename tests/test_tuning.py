"""Tuning: derivatives of exact divergences, Gaussians whose answers are known, coverage of intervals, bad input."""

import math

import pytest
import torch
from molecules import seeded

from openmm_tsf.tuning import (
    ScoredSamples,
    data_size_curve,
    energy_level_decomposition,
    enumerated,
    optimal_sampling_temperature,
    temperature_diagnostics,
)
from openmm_tsf.tuning.pool import pooled
from openmm_tsf.tuning.samples import TAIL_LEAST, effective_number, moments, target_ess, without_clashes
from openmm_tsf.tuning.sizes import NoFit, settling_size

DIM, STIFF = 3, torch.tensor([0.4, 1.3, 1.7])


def random_states(n=40, seed=1):
    """Energies of a model and of a target that know something of each other."""
    e = 2.0 * torch.randn(n, generator=seeded(seed))
    return e, 1.3 * e + torch.randn(n, generator=seeded(seed + 1))


def divergences(e, u, t):
    """Both divergences, from their definitions."""
    log_q, log_p = torch.log_softmax(-e / t, 0), torch.log_softmax(-u, 0)
    return float((log_q.exp() * (log_q - log_p)).sum()), float((log_p.exp() * (log_p - log_q)).sum())


def gaussian(n, t=1.0, seed=1, model=STIFF):
    """Samples of q_t ~ exp(-sum k x^2 / 2t), the target being a standard normal: everything is known.

    K = D / 2k summed, C = D / 2: t* = D / sum 1/k, and t' = sum k / D.
    """
    x = (t / model).sqrt() * torch.randn(n, DIM, generator=seeded(seed))
    return ScoredSamples(0.5 * (model * x * x).sum(1), 0.5 * (x * x).sum(1), t=t)


T_STAR, T_PRIME = DIM / float((1.0 / STIFF).sum()), float(STIFF.mean())


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.4, 1.0, 2.2])
@pytest.mark.parametrize("seed", [1, 5])
def test_derivatives_of_exact_divergences(t, seed):
    e, u = random_states(seed=seed)
    found, h = temperature_diagnostics(enumerated(e, u, t=t)), 1e-5
    up, down = divergences(e, u, t + h), divergences(e, u, t - h)
    first, second = ((a - b) / (2.0 * h) for a, b in zip(up, down, strict=True))
    assert abs(first - found.difference / t) < 1e-6
    assert abs(second - found.gap / t**2) < 1e-6
    assert found.fidelity == ("lower" if first > 0 else "raise")
    assert found.diversity == ("lower" if second > 0 else "raise")


@pytest.mark.parametrize("seed", [1, 5, 9])
def test_curves_are_the_divergences_and_roots_their_minima(seed):
    e, u = random_states(seed=seed)
    grid = torch.linspace(0.3, 3.0, 109)
    best = optimal_sampling_temperature(enumerated(e, u), temperatures=grid)
    exact = torch.tensor([divergences(e, u, float(t)) for t in grid]).T
    assert (best.fidelity - exact[0]).abs().max() < 1e-12
    assert (best.diversity - exact[1]).abs().max() < 1e-12
    for root, curve in ((best.t_star, exact[0]), (best.t_prime, exact[1])):
        assert abs(root.value - float(grid[curve.argmin()])) <= 2.7 / 108
    assert best.method == "enumeration" and best.trusted.all()
    log_w = -u + e / grid[10]
    q = torch.softmax(-e / grid[10], 0)
    w = log_w.exp()
    assert abs(float(best.ess[10]) - float((q * w).sum() ** 2 / (q * w * w).sum())) < 1e-12


def test_degeneracies_are_states():
    e, u = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.3, 0.9, 3.0])
    sizes = torch.tensor([2, 1, 4])
    classes = optimal_sampling_temperature(enumerated(e, u, sizes.double().log()))
    states = optimal_sampling_temperature(enumerated(e.repeat_interleave(sizes), u.repeat_interleave(sizes)))
    assert abs(classes.t_star.value - states.t_star.value) < 1e-10
    assert abs(classes.t_prime.value - states.t_prime.value) < 1e-10


def test_a_perfect_model_is_kept():
    _, u = random_states()
    found = temperature_diagnostics(enumerated(u + 7.0, u))
    assert (found.fidelity, found.diversity) == ("keep", "keep")
    best = optimal_sampling_temperature(enumerated(u, u))
    assert abs(best.t_star.value - 1.0) < 1e-9 and abs(best.t_prime.value - 1.0) < 1e-9


@pytest.mark.parametrize("a", [0.5, 2.0])
def test_a_model_of_the_wrong_scale(a):
    """Ehat = u / a: both temperatures are 1/a, whatever the target."""
    _, u = random_states()
    best = optimal_sampling_temperature(enumerated(u / a, u))
    assert abs(best.t_star.value * a - 1.0) < 1e-9 and abs(best.t_prime.value * a - 1.0) < 1e-9


def test_no_temperature_is_better_where_energies_are_opposed():
    _, u = random_states()
    best = optimal_sampling_temperature(enumerated(-u, u))
    assert best.t_star is None and best.t_prime is None
    assert best.statement.count("still falls above 4") == 2


def test_what_each_temperature_serves_is_said():
    best = optimal_sampling_temperature(gaussian(4000))
    assert best.t_star.value < 1.0 < best.t_prime.value
    assert "the two disagree" in best.statement and "fidelity" in best.statement and "diversity" in best.statement


# --- samples ----------------------------------------------------------------------------------------------------------


def test_gaussians_by_reweighting():
    best = optimal_sampling_temperature(gaussian(10_000))
    for root, exact in ((best.t_star, T_STAR), (best.t_prime, T_PRIME)):
        low, high = root.interval
        assert low < exact < high and high - low < 0.2
        assert root.share_without < 0.05
    exact = 0.5 * sum(float(best.temperatures[40] / k - 1.0 - (best.temperatures[40] / k).log()) for k in STIFF)
    assert abs(float(best.fidelity[40]) - exact) < 0.02


def test_gaussians_by_fresh_samples():
    """The model knows a wide range of temperatures; one sample of t = 1 alone would not be trusted at t = 0.25."""
    seeds = iter(range(100, 200))
    best = optimal_sampling_temperature(lambda t: gaussian(1000, t, next(seeds)), n_replicates=40)
    assert best.method == "fresh samples" and best.trusted.all()
    for root, exact in ((best.t_star, T_STAR), (best.t_prime, T_PRIME)):
        low, high = root.interval
        assert abs(root.value - exact) < high - low < 0.1  # four standard errors
    t = best.temperatures
    exact = 0.5 * (t[:, None] / STIFF - 1.0 - (t[:, None] / STIFF).log()).sum(1)
    assert (best.fidelity - exact).abs().max() < 0.1
    backwards = 0.5 * (STIFF / t[:, None] - 1.0 - (STIFF / t[:, None]).log()).sum(1)
    assert (best.diversity - backwards).abs().max() < 0.1


def test_pooled_free_energies():
    draws = [gaussian(4000, t, k) for k, t in enumerate((0.4, 1.0, 2.5))]
    log_z = moments(pooled(draws), torch.tensor([0.4, 2.5])).log_z
    assert abs(float(log_z[1] - log_z[0]) - 0.5 * DIM * math.log(2.5 / 0.4)) < 0.05
    with pytest.raises(ValueError, match="overlap too little"):
        pooled([gaussian(100, 1e-6), gaussian(100, 1e6)])


def test_the_bootstrap_covers():
    """Of 60 sets of samples, the 95 % intervals of K - C contain the exact value in all but a few."""
    exact = 0.5 * float((1.0 / STIFF).sum()) - 0.5 * DIM
    inside = 0
    for seed in range(60):
        low, high = temperature_diagnostics(gaussian(400, seed=300 + seed), n_replicates=100).difference_interval
        inside += low < exact < high
    assert 50 <= inside <= 60


def test_held_out_samples_give_the_mean_over_the_target():
    x = torch.randn(5000, DIM, generator=seeded(8))
    held_out = 0.5 * (STIFF * x * x).sum(1)
    found = temperature_diagnostics(samples := gaussian(5000), held_out=held_out)
    assert found.target_mean_from == "held-out samples" and found.target_mean == float(held_out.mean())
    assert found.diversity == "raise"
    assert temperature_diagnostics(samples).target_mean_from == "reweighting"
    best = optimal_sampling_temperature(samples, held_out=held_out)
    assert best.t_prime.interval[0] < T_PRIME < best.t_prime.interval[1]


def test_weighted_samples_are_samples():
    """Samples of t = 1.4, weighted for 1, say what samples of 1 say."""
    warm = gaussian(20_000, 1.4)
    found, direct = (temperature_diagnostics(s) for s in (warm.at(1.0), gaussian(20_000, seed=2)))
    assert found.t == 1.0
    assert abs(found.difference - direct.difference) < 0.1
    assert abs(found.gap - direct.gap) < 0.1
    assert effective_number(warm, 1.0) < 20_000


def test_temperatures_without_enough_samples_are_not_trusted():
    best = optimal_sampling_temperature(gaussian(300), n_replicates=0, temperatures=[0.001, 0.5, 1.0, 2.0, 1000.0])
    assert not best.trusted[0] and not best.trusted[-1] and best.trusted[1:-1].all()


# --- clashes ----------------------------------------------------------------------------------------------------------


def test_clashes_are_left_out_and_counted():
    """Two in a hundred samples clash; without the rule they make K what they like."""
    clean = gaussian(5000)
    u = clean.target_energy.clone()
    u[::50] = 1e8
    u[0] = math.inf
    bad = ScoredSamples(clean.model_energy, u)
    kept, left_out = without_clashes(bad)
    assert abs(left_out - 0.02) < 1e-9 and len(kept) == 4900
    found = temperature_diagnostics(bad)
    assert abs(found.left_out - 0.02) < 1e-9
    assert abs(found.difference - temperature_diagnostics(clean).difference) < 0.1
    assert abs(temperature_diagnostics(bad, tail=math.inf).difference) > 1e3
    weights = torch.softmax(-u + clean.model_energy, 0)
    assert abs(found.ess - float(1.0 / weights.square().sum()) / 5000) < 1e-12
    assert abs(float(target_ess(bad, torch.ones(1))) - found.ess) < 1e-12
    best = optimal_sampling_temperature(bad, n_replicates=0)
    assert abs(float(best.ess[40]) - found.ess) < 1e-3


def test_ordinary_samples_are_not_clashes():
    assert without_clashes(gaussian(5000))[1] == 0.0
    e = torch.zeros(100)
    e[90:] = 3.0
    levels = ScoredSamples(e, 2.0 * e)  # an interquartile range of zero
    assert without_clashes(levels)[1] == 0.0
    far = ScoredSamples(e, e * (TAIL_LEAST + 5.0))
    assert abs(without_clashes(far)[1] - 0.1) < 1e-12


# --- levels and sizes -------------------------------------------------------------------------------------------------


def test_levels_of_an_enumeration():
    e, u = torch.tensor([0.0, 0.5, 1.0, 1.5]), torch.tensor([0.0, 0.2, 0.2, 4.0])
    found = energy_level_decomposition(enumerated(e, u))
    q, p = torch.softmax(-e, 0), torch.softmax(-u, 0)
    assert torch.allclose(found.energy, torch.tensor([0.0, 0.2, 4.0]))
    assert torch.allclose(found.model, torch.stack([q[0], q[1] + q[2], q[3]]))
    assert torch.allclose(found.target, torch.stack([p[0], p[1] + p[2], p[3]]))
    h = 1e-5
    up, down = (torch.softmax(-e / (1.0 + s), 0) for s in (h, -h))
    slope = [(a.sum().log() - b.sum().log()) / (2 * h) for a, b in ((up[k], down[k]) for k in ([0], [1, 2], [3]))]
    assert torch.allclose(found.slope, torch.stack(slope), atol=1e-8)
    assert found.helped_by_cooling.tolist() == [False, False, True]
    assert not found.model_error.any()


def test_levels_of_samples():
    found = energy_level_decomposition(gaussian(10_000), n_levels=6, n_replicates=20)
    assert len(found.energy) == 6 and (found.energy.diff() > 0).all()
    assert abs(float(found.model.sum()) - 1.0) < 1e-12 and abs(float(found.target.sum()) - 1.0) < 1e-12
    e = torch.randint(3, (2000,), generator=seeded(3)).double()
    error = energy_level_decomposition(ScoredSamples(e, 2.0 * e)).model_error
    assert ((error / (2.0 / 9.0 / 2000) ** 0.5 - 1.0).abs() < 0.2).all()
    one = energy_level_decomposition(gaussian(500))
    assert len(one.energy) <= 12


def normal_fit(x):
    """The spread of a standard normal from samples of it: t* of the fit is 1/variance."""
    variance = float(x.var())
    if variance > 8.0:
        raise NoFit("too wide")
    grid = torch.linspace(-8, 8, 400)
    return enumerated(0.5 * grid**2 / variance, 0.5 * grid**2)


def test_data_size_curve():
    data = torch.randn(4000, generator=seeded(9))
    curve = data_size_curve(data, normal_fit, [4000, 10, 100, 1000], n_subsets=7, tolerance=0.1)
    assert curve.sizes == (10, 100, 1000, 4000)
    assert (curve.t_star[:, -1] - 1.0).abs().max() < 0.06
    assert curve.t_star[:, 0].std() > 5 * curve.t_star[:, 2].std()
    assert torch.allclose(
        curve.t_star[:, -1], curve.t_star[:1, -1].expand(7)
    )  # all data in any order are the same data
    assert curve.settles_at in (10, 100, 1000)
    assert not curve.no_fit.any()
    wide = data_size_curve(10.0 * data, normal_fit, [10, 20])
    assert wide.no_fit.all() and wide.settles_at is None and torch.isnan(wide.t_star).all()


def test_settling_size():
    t_star = torch.tensor([[0.5, 1.01, 1.3, 1.02, 0.99]])
    assert settling_size((1, 2, 3, 4, 5), t_star, 0.05) == 4
    assert settling_size((1, 2, 3, 4, 5), t_star, 0.001) is None
    assert settling_size((1, 2, 3, 4, 5), t_star, 0.6) == 1


# --- bad input --------------------------------------------------------------------------------------------------------

E, U = random_states(100)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: ScoredSamples(E[:0], U[:0]), "0 samples say nothing"),
        (lambda: ScoredSamples(E[:1], U[:1]), "1 samples say nothing"),
        (lambda: ScoredSamples(E, U[:50]), "100 model energies and 50 target energies.*one state space"),
        (lambda: ScoredSamples(E.view(10, 10), U), "must be a vector"),
        (lambda: ScoredSamples(E.where(E < 1, math.nan), U), "model energies are not numbers"),
        (lambda: ScoredSamples(E, U.where(U < 1, math.nan)), "target energies are not numbers"),
        (lambda: ScoredSamples(E.where(E < 1, math.inf), U), "model energies are not numbers"),
        (lambda: ScoredSamples(E, U.where(U < 1, -math.inf)), "target energies are not numbers"),
        (lambda: ScoredSamples(E, U, log_weights=torch.zeros(7)), "7 weights for 100 samples"),
        (lambda: ScoredSamples(E, U, log_weights=torch.full((100,), -math.inf)), "all 100 weights are zero"),
        (lambda: ScoredSamples(E, U, t=0.0), "must be finite and above 0"),
        (lambda: ScoredSamples(E, U, t=-1.0), "must be finite and above 0"),
        (lambda: ScoredSamples(E, U).at(math.nan), "must be finite and above 0"),
        (lambda: enumerated(E, U.where(U < 1, math.inf)), "infinite at every t"),
        (lambda: enumerated(E, U, torch.zeros(3)), "3 degeneracies for 100 states"),
        (lambda: temperature_diagnostics(ScoredSamples(E[:5], U[:5])), "at least 20 are needed"),
        (lambda: temperature_diagnostics(ScoredSamples(E, U, log_weights=100.0 * E)), "are worth"),
        (lambda: temperature_diagnostics(ScoredSamples(0.0 * E, U)), "model gives all 100 samples one energy"),
        (lambda: temperature_diagnostics(ScoredSamples(E, 0.0 * U + 3.0)), "target gives all 100 samples one energy"),
        (lambda: temperature_diagnostics(enumerated(0.0 * E, U)), "variance is zero"),
        (lambda: temperature_diagnostics(ScoredSamples(E, U), n_replicates=1), "at least 2 bootstrap"),
        (lambda: temperature_diagnostics(ScoredSamples(E, U), confidence=1.0), "confidence lies between"),
        (lambda: temperature_diagnostics(ScoredSamples(E, U), tail=0.0), "bound of the tail"),
        (lambda: temperature_diagnostics(ScoredSamples(E, U + math.inf)), "no clash"),
        (lambda: temperature_diagnostics(ScoredSamples(E, U), held_out=E[:3]), "at least 20 held-out"),
        (lambda: temperature_diagnostics(ScoredSamples(E, U), held_out=E / 0.0), "not finite"),
        (lambda: optimal_sampling_temperature(enumerated(E, U), temperatures=[1.0]), "at least 2 different"),
        (lambda: optimal_sampling_temperature(enumerated(E, U), temperatures=[0.0, 1.0]), "above 0"),
        (lambda: optimal_sampling_temperature(lambda t: gaussian(50)), "came at t = 1"),
        (lambda: pooled([enumerated(E, U)]), "enumeration needs no other"),
        (lambda: energy_level_decomposition(enumerated(E, U), n_levels=1), "at least 2 levels"),
        (lambda: data_size_curve(E, normal_fit, [1, 10]), "sizes lie between 2 and the 100"),
        (lambda: data_size_curve(E, normal_fit, [10, 101]), "sizes lie between"),
        (lambda: data_size_curve(E, normal_fit, []), "sizes lie between"),
        (lambda: data_size_curve(E, normal_fit, [10], tolerance=0.0), "tolerance above 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_diagnostics_read_as_a_sentence():
    text = str(temperature_diagnostics(gaussian(4000)))
    assert "lower the temperature for fidelity" in text and "raise it for diversity" in text


def test_intervals_do_not_shift_with_the_grid():
    """Zeros of replicates are interpolated between grid points; the error of that must not look like statistics."""
    wide = torch.tensor([1 / 0.6, 1 / 1.5], dtype=torch.float64)
    x = torch.randn(5000, 10, 2, generator=seeded(3), dtype=torch.float64)
    samples = ScoredSamples(0.5 * x.square().sum((1, 2)), 0.5 * (x.square() * wide).sum((1, 2)))
    fine, coarse = (
        optimal_sampling_temperature(samples, temperatures=grid).t_star for grid in (None, [0.7, 0.8, 0.95, 1.1, 1.4])
    )
    width = fine.interval[1] - fine.interval[0]
    assert coarse.value == pytest.approx(fine.value, abs=1e-9)
    assert coarse.interval == pytest.approx(fine.interval, abs=0.1 * width)


@pytest.mark.parametrize("temperatures", [[0.5, 1.0, 2.0], [0.5, 0.8, 1.0], [1.0, 1.5, 2.0]])
def test_a_root_on_a_grid_point_is_found(temperatures):
    """A model that is the target has t* = t' = 1, where sums of different order round to either side of zero."""
    energy = torch.randn(400, generator=seeded(5), dtype=torch.float64).cumsum(0)
    found = optimal_sampling_temperature(ScoredSamples(energy, energy), temperatures=temperatures, n_replicates=0)
    for root in (found.t_star, found.t_prime):
        assert root is None or root.value == pytest.approx(1.0, abs=1e-9)
