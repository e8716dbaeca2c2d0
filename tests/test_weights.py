"""Weights: closed forms, invariances, and error bars against what repetition shows."""

import math

import pytest
import torch
from molecules import seeded

from openmm_tsf import weights

INF = math.inf


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logs(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).log()


def gaussian_log_weights(n: int, seed: int, width: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws of N(0, 1) and their log-weights for N(0, width^2), both normalised."""
    x = torch.randn(n, generator=generator(seed), dtype=torch.float64)
    return x, -0.5 * (x / width) ** 2 - math.log(width) + 0.5 * x**2


@pytest.mark.parametrize("shift", [0.0, 1e5, -1e5])
def test_ess_is_kish_whatever_the_constant(shift):
    log_w = logs(1, 2, 3) + shift
    assert weights.effective_sample_size(log_w) == pytest.approx(36 / (3 * 14), rel=1e-10)
    assert weights.effective_sample_size(log_w, n_rejected=5) == pytest.approx(36 / (8 * 14), rel=1e-10)
    assert weights.largest_weight_share(log_w) == pytest.approx(0.5, rel=1e-10)


def test_equal_weights_are_all_effective_but_for_the_rejected():
    assert weights.effective_sample_size(torch.zeros(7)) == pytest.approx(1.0)
    nearly = 1e-15 * torch.randn(2000, 50, generator=seeded(1))
    assert max(weights.effective_sample_size(log_w) for log_w in nearly) <= 1.0  # rounding is no reason for more
    assert weights.effective_sample_size(torch.zeros(6), n_rejected=2) == pytest.approx(0.75)


def test_ess_of_gaussians_matches_the_closed_form():
    width = 0.6
    _, log_w = gaussian_log_weights(200_000, 1, width)
    expected = width * math.sqrt(2 - width**2)  # 1 / E[(p/q)^2]
    # relative standard error of the ratio (mean w)^2 / mean w^2, by the delta method
    w = log_w.exp()
    influence = 2 * (w - w.mean()) / w.mean() - (w**2 - (w**2).mean()) / (w**2).mean()
    error = expected * float(influence.std()) / math.sqrt(len(w))
    assert abs(weights.effective_sample_size(log_w) - expected) < 4 * error


def test_zero_weights_count_as_draws_and_nothing_else():
    log_w = torch.tensor([0.0, 0.0, -INF, -INF])
    assert weights.effective_sample_size(log_w) == pytest.approx(0.5)
    assert weights.log_mean_exp(log_w) == pytest.approx(math.log(0.5))
    assert weights.effective_sample_size(log_w[:2], n_rejected=2) == weights.effective_sample_size(log_w)


def test_all_zero_weights():
    none = torch.full((3,), -INF)
    assert weights.effective_sample_size(none) == 0.0
    assert weights.log_mean_exp(none) == -INF
    assert math.isnan(weights.largest_weight_share(none))
    with pytest.raises(ValueError, match="all 3 weights are zero"):
        weights.normalised_weights(none)


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize(
    "function", [weights.effective_sample_size, weights.largest_weight_share, weights.log_mean_exp]
)
def test_nan_and_infinite_weights_are_refused(function, bad):
    with pytest.raises(ValueError, match=r"1 of 3 log-weights are NaN or \+inf \(first: row 1\)"):
        function(torch.tensor([0.0, bad, 0.0]))


def test_one_draw_has_no_error():
    assert weights.log_mean_exp_error(1.0, 1) == INF == weights.log_mean_exp_error(0.0, 100)
    assert weights.log_mean_exp_error(1.0, 2) == 0.0
    assert weights.log_mean_exp_error(0.2, 400) == pytest.approx(0.1)
    assert weights.bootstrap_mean(torch.zeros(1), torch.ones(1, 3)).error.tolist() == [INF] * 3
    assert weights.bootstrap_mean(torch.zeros(1), torch.ones(1), n_rejected=3).error == INF


def test_malformed_input_is_refused():
    with pytest.raises(ValueError, match="vector"):
        weights.effective_sample_size(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="at least one"):
        weights.log_mean_exp(torch.zeros(0))
    with pytest.raises(ValueError, match="negative"):
        weights.effective_sample_size(torch.zeros(2), n_rejected=-1)
    with pytest.raises(ValueError, match="2 values for 3 draws"):
        weights.bootstrap_mean(torch.zeros(3), torch.zeros(2))


def test_log_mean_exp_of_a_normalised_target_is_zero():
    _, log_w = gaussian_log_weights(100_000, 2, 0.7)
    w = log_w.exp()
    error = float(w.std()) / math.sqrt(len(w))
    assert abs(weights.log_mean_exp(log_w)) < 4 * error
    assert weights.log_mean_exp(log_w, n_rejected=100_000) == pytest.approx(
        weights.log_mean_exp(log_w) - math.log(2), abs=1e-12
    )


@pytest.mark.parametrize("n", [1, 10, 999, 5000])
def test_systematic_resampling_takes_every_row_as_often_as_its_weight_says(n):
    log_w = 3 * torch.randn(500, generator=generator(3), dtype=torch.float64)
    log_w[::7] = -INF
    log_w[-3:] = -INF
    rows = weights.systematic_resample(log_w, n, generator(4))
    counts = torch.bincount(rows, minlength=500)
    assert rows.shape == (n,)
    assert (counts[log_w == -INF] == 0).all()
    assert ((counts - n * weights.normalised_weights(log_w)).abs() < 1 + 1e-9).all()
    assert torch.equal(rows, weights.systematic_resample(log_w, n, generator(4)))


def test_systematic_resampling_is_unbiased():
    log_w = logs(1, 5, 94)
    rows = torch.stack([weights.systematic_resample(log_w, 3, generator(seed)) for seed in range(2000)])
    share = (rows == 1).double().mean()
    assert abs(float(share) - 0.05) < 4 * math.sqrt(0.15 * 0.85 / 2000) / 3


def test_bootstrap_error_of_a_plain_mean_is_the_textbook_one():
    values = torch.randn(4000, generator=generator(5), dtype=torch.float64)
    estimate = weights.bootstrap_mean(torch.zeros(4000), values, n_replicates=400, generator=generator(6))
    assert float(estimate.value) == pytest.approx(float(values.mean()), abs=1e-12)
    # a standard deviation from 400 replicates is known to 1/sqrt(800) of itself
    assert float(estimate.error) == pytest.approx(float(values.std()) / math.sqrt(4000), rel=4 / math.sqrt(800))


def test_bootstrap_error_is_what_repetition_shows():
    means, errors = [], []
    for seed in range(60):
        x, log_w = gaussian_log_weights(2000, 100 + seed, 0.6)
        estimate = weights.bootstrap_mean(log_w, x**2, n_replicates=50, generator=generator(seed))
        means.append(float(estimate.value))
        errors.append(float(estimate.error))
    scatter = torch.tensor(means).std()
    assert float(torch.tensor(errors).mean()) == pytest.approx(float(scatter), rel=4 / math.sqrt(120))
    assert abs(sum(means) / 60 - 0.36) < 4 * float(scatter) / math.sqrt(60)


def test_rejected_draws_enter_the_bootstrap():
    n, rejected = 3000, 1000

    def log_z_error(n_rejected):
        totals = weights.bootstrap(
            torch.zeros(n), lambda w: w.sum().log(), n_rejected=n_rejected, n_replicates=400, generator=generator(7)
        )
        return float(totals.std())

    binomial = math.sqrt(rejected / n / (n + rejected))
    assert log_z_error(rejected) == pytest.approx(binomial, rel=4 / math.sqrt(800))
    assert log_z_error(0) < 1e-12  # the control: equal weights alone have no spread


def test_weightless_rows_may_hold_anything():
    estimate = weights.bootstrap_mean(torch.tensor([0.0, 0.0, -INF]), torch.tensor([1.0, 1.0, INF]), n_replicates=20)
    assert float(estimate.value) == 1.0
    vector = weights.weighted_mean(
        torch.tensor([1.0, 3.0, 0.0]), torch.tensor([[0.0, 4.0], [4.0, 0.0], [math.nan] * 2])
    )
    assert vector.tolist() == [3.0, 1.0]


def test_bootstrap_without_a_generator_is_reproducible():
    _, log_w = gaussian_log_weights(500, 9, 0.7)
    values = torch.arange(500.0)
    assert weights.bootstrap_mean(log_w, values).error == weights.bootstrap_mean(log_w, values).error
