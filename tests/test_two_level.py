"""The two-level model: golden numbers, closed forms against grids, medians had elsewhere, and the phase picture."""

import math

import pytest
import torch
from molecules import seeded

from openmm_tsf.tuning import optimal_sampling_temperature, temperature_diagnostics
from openmm_tsf.tuning.two_level import TwoLevel, critical_gap, fit_two_level, median_interval, phase_picture

MEDIANS = {  # another program, the same rule; 20 ground, 80 excited states: median t* at M = 10, 50, 300, 1000, 10^4
    9.0: (0.62, 0.62, 0.79, 0.92, 1.00),
    6.0: (0.93, 0.95, 1.00, 1.00, 1.00),
    4.0: (1.47, 1.57, 1.01, 1.01, 1.00),
    2.5: (3.1, 3.6, 1.03, 1.00, 1.00),
}
SIZES = (10, 50, 300, 1000, 10_000)


def seen(n, **counts):
    row = torch.zeros(1, n, dtype=torch.long)
    for state, count in counts.items():
        row[0, int(state[1:])] = count
    return row


def test_golden_case():
    """Three ground states, seven excited ones, gap 5; two ground states seen, three times and twice."""
    fit = fit_two_level(TwoLevel(3, 7, 5.0), seen(10, s0=3, s1=2))
    assert int(fit.n_ground) == 2
    assert abs(float(fit.gap) - math.log(16.0)) < 1e-12
    numbers = {"t_star": 0.6337, "t_prime": 1.3636}
    for name, value in numbers.items():
        assert abs(float(getattr(fit, name)) - value) < 1e-4
    assert abs(float(fit.covariance) - 1.941) < 1e-3
    assert abs(float(fit.variance) - 1.230) < 1e-3


def brute_fit(counts, n_states):
    """The rule in its own words, in plain Python; prefixes that end among equals only where order cannot matter."""
    ranked, m = sorted(counts, reverse=True), sum(counts)
    best = None
    for k in range(1, n_states):
        q = sum(ranked[:k]) / m
        q = q if q < 1.0 else 1.0 - 1.0 / m
        r = k / n_states
        if q > r:
            value = q * math.log(q / r) + (1 - q) * math.log((1 - q) / (1 - r))
            if best is None or value > best[0] + 1e-12:
                best = value, k, math.log(q * (n_states / k - 1) / (1 - q))
    return best


@pytest.mark.parametrize("gap,m", [(1.0, 7), (3.0, 20), (5.0, 300), (8.0, 12)])
def test_fits_are_those_of_the_rule(gap, m):
    truth = TwoLevel(4, 9, gap)
    counts = truth.sample(m, 40, generator=seeded(3))
    counts = counts[counts.amax(1) > counts.amin(1)]
    fit = fit_two_level(truth, counts)
    for row, n, found in zip(counts.tolist(), fit.n_ground, fit.gap, strict=True):
        _, k, expected = brute_fit(row, 13)
        assert int(n) == k
        assert abs(float(found) - expected) < 1e-12


@pytest.mark.parametrize("gap,m", [(2.5, 30), (4.0, 10), (6.0, 50), (9.0, 300)])
def test_closed_forms_are_zeros_and_minima_of_the_enumeration(gap, m):
    """q_t of four classes, enumerated: K, C, both minima, and the lowest points of the curves."""
    fit = fit_two_level(truth := TwoLevel(20, 80, gap), truth.sample(m, 6, generator=seeded(5)))
    for k in range(6):
        states, star, prime = fit.energies(k), float(fit.t_star[k]), float(fit.t_prime[k])
        best = optimal_sampling_temperature(states, temperatures=torch.logspace(-1, 1, 401))
        assert abs(best.t_star.value - star) < 1e-9 * star
        assert abs(best.t_prime.value - prime) < 1e-9 * prime
        step = 10 ** (2 / 400)
        for curve, root in ((best.fidelity, star), (best.diversity, prime)):
            lowest = float(best.temperatures[curve.argmin()])
            assert root / step <= lowest <= root * step
        found = temperature_diagnostics(states)
        assert abs(found.covariance - float(fit.covariance[k])) < 1e-12
        assert abs(found.variance - float(fit.variance[k])) < 1e-12
        assert found.fidelity == ("lower" if star < 1.0 else "raise")
        assert found.diversity == ("lower" if prime < 1.0 else "raise")


def test_medians_are_those_of_another_program():
    """Within the spread over replicates; to two digits, the interval of the median allowing for both sides' noise."""
    picture = phase_picture(20, 80, list(MEDIANS), SIZES, n_replicates=200, generator=seeded(11))
    expected = torch.tensor(list(MEDIANS.values()))
    low, high = picture.spread.unbind(-1)
    assert ((expected >= low - 0.005) & (expected <= high + 0.005)).all()
    settled = expected == 1.0
    assert ((picture.median - expected).abs()[settled] < 0.01).all()
    assert ((picture.median / expected - 1.0).abs() < 0.08).all()
    assert not picture.failed.any()


def test_phases():
    """Wide gaps cool, narrow ones heat, and many samples need neither; the boundary is the critical gap."""
    picture = phase_picture(20, 80, [3.0, 8.0], [20, 200_000], n_replicates=50, generator=seeded(12))
    assert picture.median[0, 0] > 1.1 and picture.median[1, 0] < 0.9
    assert (picture.median[:, 1] - 1.0).abs().max() < 0.02
    assert 200_000 > TwoLevel(20, 80, 8.0).settling_size() > 20
    for gap in (4.5, 6.5):  # the boundary lies between 5.3 and 5.5
        fit = fit_two_level(truth := TwoLevel(20, 80, gap), truth.sample(20, 200, generator=seeded(13)))
        assert (float(fit.t_star.median()) < 1.0) == (gap > float(critical_gap(fit, 20).median()))
    assert 5.2 < float(critical_gap(fit, 20).median()) < 5.6


def test_samples_are_those_of_the_model():
    truth = TwoLevel(3, 5, 2.0)
    counts = truth.sample(1000, 50, generator=seeded(14))
    assert (counts.sum(1) == 1000).all()
    expected = 1000 * truth.probabilities
    z = (counts.double().mean(0) - expected) / (expected * (1 - truth.probabilities) / 50).sqrt()
    assert z.abs().max() < 4.0


def test_no_t_star_where_the_levels_are_mixed_up():
    """Two excited states seen, no ground state: f_e < f_g, so that KL(q_t || p) falls as t rises for ever."""
    fit = fit_two_level(TwoLevel(3, 7, 5.0), seen(10, s5=3, s6=2))
    assert float(fit.t_star) == math.inf == float(fit.t_prime)
    best = optimal_sampling_temperature(fit.energies(0))
    assert best.t_star is None and best.t_prime is None
    assert "still falls above" in best.statement


def test_median_interval():
    values = torch.randn(400, generator=seeded(15))
    low, high = median_interval(values)
    assert low < values.median() < high
    assert 0.1 < float(high - low) < 0.5  # +-1.96 * 1.2533 / 20 of either side
    assert median_interval(torch.tensor([1.0, math.inf, math.inf, math.inf]))[1] == math.inf


def test_equals_are_ranked_at_random():
    """Ten samples of ten states: one of them is left out of the ground level, not always the last."""
    counts = torch.zeros(400, 100, dtype=torch.long)
    counts[:, 15:25] = 1  # five ground states and five excited ones
    fit = fit_two_level(TwoLevel(20, 80, 4.0), counts)
    assert (fit.n_ground == 9).all()
    share = (fit.true_ground == 5).double().mean()
    assert abs(float(share) - 0.5) < 4 * 0.5 / 20


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: TwoLevel(0, 7, 5.0), "both levels need a state"),
        (lambda: TwoLevel(3, 7, 0.0), "gap must be finite and above 0"),
        (lambda: TwoLevel(3, 7, math.nan), "gap must be finite"),
        (lambda: TwoLevel(3, 7, 5.0).sample(0, generator=seeded(1)), "at least one sample"),
        (lambda: fit_two_level(TwoLevel(3, 7, 5.0), seen(10)), "at least 2 samples, and a replicate has 0"),
        (lambda: fit_two_level(TwoLevel(3, 7, 5.0), seen(10, s0=1)), "at least 2 samples, and a replicate has 1"),
        (lambda: fit_two_level(TwoLevel(3, 7, 5.0), seen(9, s0=5)), "not one state space"),
        (lambda: fit_two_level(TwoLevel(3, 7, 5.0), seen(10, s0=-5)), "negative"),
        (lambda: fit_two_level(TwoLevel(3, 7, 5.0), torch.ones(1, 10, dtype=torch.long)), "seen equally often"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_state_only():
    """All samples equal: a fit there is, of one ground state."""
    fit = fit_two_level(TwoLevel(3, 7, 5.0), seen(10, s1=6))
    assert int(fit.n_ground) == 1 and math.isfinite(float(fit.t_star))
