"""Bayesian logistic regression as a target, and how well weighted posterior samples predict.

p(y = 1 | x, w) = 1/(1 + exp(-w_0 - w_1 x_1 - ...)), w_i ~ N(0, PRIOR_VARIANCE) independently, covariates standardised
over the rows that are fitted. ln Z is the log-evidence: the prior is normalised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from openmm_tsf.edg.datasets import load_two_classes
from openmm_tsf.typing import Scalars, Vectors
from openmm_tsf.weights import log_mean_exp

PRIOR_VARIANCE = 1.0
"""Of every coefficient, the intercept's too; a coefficient of 1 changes the odds e-fold in a covariate's width."""
HELD_OUT = 0.2
"""Share of rows to predict."""
DEGREES = 8.0
"""Of freedom of the t distribution that importance sampling takes: tails heavier than any posterior here."""


@dataclass(frozen=True, eq=False)
class LogisticPosterior:
    """-ln [p(y | X, w) p(w)] of coefficients w (B, d), the first of which is the intercept.

    Args:
        covariates: (n, p) standardised; d = p + 1.
        labels: (n,) 0 or 1.
        prior_variance: of each coefficient.

    Raises:
        ValueError: shapes that do not fit, labels other than 0 and 1, numbers that are not finite, no variance.
    """

    covariates: Tensor
    labels: Tensor
    prior_variance: float = PRIOR_VARIANCE

    def __post_init__(self) -> None:
        if self.covariates.ndim != 2 or self.labels.shape != self.covariates.shape[:1] or not len(self.labels):
            shapes = (*self.covariates.shape,), (*self.labels.shape,)
            raise ValueError("covariates {} and labels {} do not fit".format(*shapes))
        if not torch.isfinite(self.covariates).all() or not bool(((self.labels == 0) | (self.labels == 1)).all()):
            raise ValueError("covariates must be finite, labels 0 or 1")
        if not self.prior_variance > 0.0:
            raise ValueError(f"the prior variance must be above 0, not {self.prior_variance:g}")

    @property
    def dim(self) -> int:
        return self.covariates.shape[1] + 1

    def logits(self, w: Vectors, covariates: Tensor | None = None) -> Float[Tensor, "batch rows"]:
        """w_0 + x.w of each row, of those that are fitted or others (m, p)."""
        x = (self.covariates if covariates is None else covariates).to(w)
        return w[:, :1] + w[:, 1:] @ x.T

    def __call__(self, w: Vectors) -> Scalars:
        """-ln of likelihood times prior (B,) [nat]."""
        signs = 1.0 - 2.0 * self.labels.to(w)
        likelihood = softplus(signs * self.logits(w)).sum(1)
        constant = 0.5 * self.dim * math.log(2.0 * math.pi * self.prior_variance)
        return likelihood + 0.5 * w.square().sum(1) / self.prior_variance + constant

    def hessian(self, w: Float[Tensor, " coefficients"]) -> Float[Tensor, "coefficients coefficients"]:
        """Second derivatives at one w (d,)."""
        x = torch.cat((torch.ones_like(self.labels)[:, None], self.covariates), 1).to(w)
        p = torch.sigmoid(x @ w)
        return x.T @ (x * (p * (1.0 - p))[:, None]) + torch.eye(self.dim).to(w) / self.prior_variance

    def mode(self) -> Float[Tensor, " coefficients"]:
        """The w (d,) of lowest U, in double precision, by Newton's method with halved steps; U is convex."""
        w = torch.zeros(self.dim, dtype=torch.float64)
        for _ in range(100):
            w = w.requires_grad_()
            value = self(w[None])[0]
            (slope,) = torch.autograd.grad(value, w)
            w, value = w.detach(), value.detach()
            step = torch.linalg.solve(self.hessian(w), slope)
            if step.abs().max() < 1e-12:
                break
            while self((w - step)[None])[0] > value + 1e-12 * value.abs():
                step = 0.5 * step
            w = w - step
        return w


@dataclass(frozen=True, eq=False)
class Regression:
    """A posterior and the rows kept back.

    Args:
        name: of the data.
        posterior: of the rows that are fitted.
        covariates: (m, p) of the others, standardised with the mean and width of those fitted.
        labels: (m,).
    """

    name: str
    posterior: LogisticPosterior
    covariates: Float[Tensor, "rows covariates"]
    labels: Float[Tensor, " rows"]


def regression(
    name: str, *, split: int | None = 0, held_out: float = HELD_OUT, prior_variance: float = PRIOR_VARIANCE
) -> Regression:  # fmt: skip
    """The posterior of one of the sets of data, in double precision.

    Args:
        name: see `load_two_classes`.
        split: seed of the random order whose last `held_out` share of rows is kept back. None fits all rows, and
            predicts the same.
        held_out: see there.
        prior_variance: of each coefficient.

    Raises:
        ValueError, ModuleNotFoundError: see `load_two_classes`; or nothing is left to fit or to predict.
    """
    data = load_two_classes(name)
    x, y = torch.from_numpy(data.covariates), torch.from_numpy(data.labels).double()
    fitted = predicted = torch.arange(len(y))
    if split is not None:
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(split))
        cut = len(y) - round(held_out * len(y))
        fitted, predicted = order[:cut], order[cut:]
    if not len(fitted) or not len(predicted):
        raise ValueError(f"keeping back a share {held_out:g} of {len(y)} rows leaves none to fit or none to predict")
    mean, width = x[fitted].mean(0), x[fitted].std(0, correction=0)
    if bool((width == 0).any()):
        raise ValueError(f"a covariate of {name!r} is constant over the {len(fitted)} rows that are fitted")
    x = (x - mean) / width
    return Regression(name, LogisticPosterior(x[fitted], y[fitted], prior_variance), x[predicted], y[predicted])


def predictive(task: Regression, w: Vectors, log_weights: Scalars | None = None) -> Float[Tensor, " rows"]:
    """p(y = 1) (m,) of the rows kept back, averaged over posterior samples w (B, d), weighted or all alike."""
    p = torch.sigmoid(task.posterior.logits(w.double(), task.covariates))
    if log_weights is None:
        return p.mean(0)
    return torch.softmax(log_weights.double(), 0) @ p


def accuracy(p: Float[Tensor, " rows"], labels: Float[Tensor, " rows"]) -> float:
    """Share of rows whose class is the likelier one."""
    return float(((p > 0.5) == (labels > 0.5)).double().mean())


def area_under_curve(p: Float[Tensor, " rows"], labels: Float[Tensor, " rows"]) -> float:
    """AUC: how often a row of class 1 has the larger p than one of class 0, ties counting half.

    Raises:
        ValueError: a class is missing.
    """
    ones, zeros = p[labels > 0.5], p[labels <= 0.5]
    if not len(ones) or not len(zeros):
        raise ValueError("the area under the curve needs rows of both classes")
    above = (ones[:, None] > zeros).double() + 0.5 * (ones[:, None] == zeros).double()
    return float(above.mean())


@dataclass(frozen=True, eq=False)
class WeightedPosterior:
    """Draws of a t distribution about the mode, with the log-weights that make them the posterior's.

    Args:
        w: (n, d).
        log_weights: (n,) ln of exp(-U) over the density of the draws.
    """

    w: Vectors
    log_weights: Scalars

    @property
    def log_z(self) -> float:
        """ln of the mean weight: the log-evidence."""
        return log_mean_exp(self.log_weights)

    @property
    def mean(self) -> Tensor:
        """(d,)."""
        return torch.softmax(self.log_weights, 0) @ self.w

    @property
    def covariance(self) -> Tensor:
        """(d, d)."""
        away = self.w - self.mean
        return away.T @ (away * torch.softmax(self.log_weights, 0)[:, None])


@torch.no_grad()
def importance_sample(posterior: LogisticPosterior, n: int, *, generator: torch.Generator) -> WeightedPosterior:
    """n draws of a multivariate t at the mode, as wide as the curvature there says, weighted for the posterior.

    A truth that needs no chain: log-concave posteriors of tens of coefficients are close to it.
    """
    with torch.enable_grad():
        mode = posterior.mode()
    d, nu = posterior.dim, DEGREES
    factor = torch.linalg.cholesky(torch.linalg.inv(posterior.hessian(mode)))
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
    chi2 = torch.randn(n, int(nu), generator=generator, dtype=torch.float64).square().sum(1)
    t = noise * (nu / chi2).sqrt()[:, None]
    constant = math.lgamma(0.5 * (nu + d)) - math.lgamma(0.5 * nu) - 0.5 * d * math.log(math.pi * nu)
    log_q = constant - 0.5 * (nu + d) * torch.log1p(t.square().sum(1) / nu) - float(factor.diagonal().log().sum())
    w = mode + t @ factor.T
    u = torch.cat([posterior(rows) for rows in w.split(4096)])
    return WeightedPosterior(w, -u - log_q)
