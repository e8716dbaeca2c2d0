"""Exact posteriors of the three logistic regressions, by importance sampling and by NUTS, to compare generators with.

    python benchmarks/edg_truth.py --write benchmarks/edg_truth.npz           # importance sampling, a minute
    python benchmarks/edg_truth.py --write benchmarks/edg_truth.npz --nuts    # and long chains of numpyro beside it

Needs the data packages, and numpyro for the chains; benchmarks/README.md says how to get them. What is written: for
each of the data sets and its split 0, the mean and covariance of the coefficients, the log-evidence with its error, and
accuracy and AUC of the predictions. The chains are there to check: they share nothing with the importance samples but
the numbers they are given.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from openmm_tsf.edg.datasets import SOURCES
from openmm_tsf.edg.logistic import (
    PRIOR_VARIANCE,
    Regression,
    accuracy,
    area_under_curve,
    importance_sample,
    predictive,
    regression,
)
from openmm_tsf.weights import effective_sample_size

SEED, SPLIT = 1, 0


def main() -> None:
    """Compute, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="npz of everything")
    parser.add_argument("--draws", type=int, default=1_000_000, help="importance samples of each posterior")
    parser.add_argument("--nuts", action="store_true", help="chains of numpyro too")
    parser.add_argument("--samples", type=int, default=20_000, help="of each of 4 chains")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    arrays: dict[str, np.ndarray] = {}
    facts = {"seed": SEED, "split": SPLIT, "prior_variance": PRIOR_VARIANCE, "draws": options.draws}
    for name in SOURCES:
        task = regression(name, split=SPLIT)
        found = exact(task, options.draws)
        print(row(name, found))
        arrays |= {f"{name}_{key}": np.asarray(value) for key, value in found.items()}
        if options.nuts:
            chain = chains(task, options.samples)
            print(check(found, chain))
            arrays |= {f"{name}_nuts_{key}": np.asarray(value) for key, value in chain.items()}
            facts |= {"nuts_samples": 4 * options.samples, "nuts_seed": SEED}
    if options.write:
        np.savez_compressed(options.write, metadata=json.dumps(facts), **arrays)
        print(f"written: {options.write}")


def exact(task: Regression, n: int, chunk: int = 100_000) -> dict:
    """Moments, log-evidence and predictions from n importance samples; errors are standard errors."""
    begin, generator = time.process_time(), torch.Generator().manual_seed(SEED)
    drawn = [importance_sample(task.posterior, chunk, generator=generator) for _ in range(n // chunk)]
    log_w = torch.cat([part.log_weights for part in drawn])
    shares = torch.softmax(torch.stack([part.log_weights.logsumexp(0) for part in drawn]), 0)
    means = torch.stack([part.mean for part in drawn])
    mean = shares @ means
    second = torch.stack([part.covariance + torch.outer(part.mean, part.mean) for part in drawn])
    p = torch.stack([predictive(task, part.w, part.log_weights) for part in drawn])
    return {
        "mean": mean.numpy(),
        "mean_error": (means.std(0) / math.sqrt(len(drawn))).numpy(),
        "covariance": (torch.einsum("k,kij->ij", shares, second) - torch.outer(mean, mean)).numpy(),
        "log_z": float(log_w.logsumexp(0)) - math.log(len(log_w)),
        "log_z_error": math.sqrt((1.0 / effective_sample_size(log_w) - 1.0) / len(log_w)),
        "ess": effective_sample_size(log_w),
        "accuracy": accuracy(shares @ p, task.labels),
        "auc": area_under_curve(shares @ p, task.labels),
        "n_predicted": len(task.labels),
        "seconds": time.process_time() - begin,
    }


def chains(task: Regression, n: int) -> dict:
    """The same from 4 chains of n samples by NUTS."""
    import jax
    import numpyro
    from numpyro import distributions, infer
    from numpyro.diagnostics import summary

    jax.config.update("jax_enable_x64", True)
    begin = time.process_time()
    x, y = task.posterior.covariates.numpy(), task.posterior.labels.numpy()
    x = np.concatenate((np.ones((len(x), 1)), x), 1)

    def model() -> None:
        prior = distributions.Normal(0.0, math.sqrt(task.posterior.prior_variance)).expand([x.shape[1]]).to_event(1)
        w = numpyro.sample("w", prior)
        numpyro.sample("y", distributions.BernoulliLogits(jax.numpy.asarray(x) @ w).to_event(1), obs=y)

    mcmc = infer.MCMC(
        infer.NUTS(model), num_warmup=1000, num_samples=n, num_chains=4, chain_method="sequential", progress_bar=False
    )
    mcmc.run(jax.random.PRNGKey(SEED))
    w = np.asarray(mcmc.get_samples(group_by_chain=True)["w"])
    told = summary({"w": w})["w"]
    flat = w.reshape(-1, w.shape[-1])
    p = predictive(task, torch.from_numpy(flat[::4].copy()))
    return {
        "mean": flat.mean(0),
        "mean_error": flat.std(0) / np.sqrt(told["n_eff"]),
        "covariance": np.cov(flat.T),
        "n_effective": told["n_eff"].min(),
        "r_hat": told["r_hat"].max(),
        "accuracy": accuracy(p, task.labels),
        "auc": area_under_curve(p, task.labels),
        "seconds": time.process_time() - begin,
    }


def row(name: str, found: dict) -> str:
    """One posterior in a line."""
    return (
        f"{name:>10}: ln Z {found['log_z']:.4f} +- {found['log_z_error']:.4f}, ESS {found['ess']:.3f}, accuracy "
        f"{100 * found['accuracy']:.2f} %, AUC {100 * found['auc']:.2f} % of {found['n_predicted']} rows, "
        f"{found['seconds']:.0f} s"
    )


def check(found: dict, chain: dict) -> str:
    """How far the two are from each other, in units of the error of the difference."""
    error = np.hypot(found["mean_error"], chain["mean_error"])
    scores = np.abs(found["mean"] - chain["mean"]) / error
    widths = np.sqrt(np.diag(chain["covariance"]) / np.diag(found["covariance"]))
    return (
        f"{'NUTS':>10}: largest of {len(scores)} differences of means {scores.max():.1f} sigma, widths "
        f"{widths.min():.3f} to {widths.max():.3f} of the above, n_eff {chain['n_effective']:.0f}, r_hat "
        f"{chain['r_hat']:.4f}, accuracy {100 * chain['accuracy']:.2f} %, AUC {100 * chain['auc']:.2f} %, "
        f"{chain['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
