"""What a flow has not learnt: the variance of ln w at its training temperature, by families of functions of latents.

    python benchmarks/residuals.py runs/ala2/flow.tsf -n 200000

ln w of a right flow is a constant. Latents are independent under the flow, so functions of them that are orthonormal
there each explain the square of their covariance with ln w, and these squares add up. A family stands for what a
richer flow could learn: no architecture made for it gains more than the family's share. Noise of finite n is taken off,
so that a family which explains nothing has a share near zero, of either sign.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

import openmm_tsf as tsf

LARGEST = 3.0
"""ln w is cut this far [nat] from its median, so that a few draws do not stand for all."""


def hermite(u: Tensor) -> list[Tensor]:
    """Orthonormal polynomials 1 ... 4 of columns (n, D), once their ranks are made those of a normal distribution."""
    ranks = u.argsort(0).argsort(0).double()
    v = torch.special.ndtri((ranks + 0.5) / len(u))
    return [v, (v**2 - 1) / 2**0.5, (v**3 - 3 * v) / 6**0.5, (v**4 - 6 * v**2 + 3) / 24**0.5]


def whitened(features: Tensor) -> Tensor:
    """The same span, orthonormal over the draws; what is not independent is left out."""
    centred = features - features.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    keep = values > 1e-6 * values[-1]
    return centred @ (vectors[:, keep] / values[keep].sqrt())


def waves(a: Tensor, harmonics: tuple[int, ...]) -> Tensor:
    """sin and cos of multiples of one angle (n,), or of all combinations of several (n, k)."""
    angles = a.reshape(len(a), -1)
    most = max(harmonics)
    modes = [k for k in itertools.product(range(-most, most + 1), repeat=angles.shape[1]) if k > (0,) * angles.shape[1]]
    modes = [k for k in modes if max(map(abs, k)) in harmonics]
    phase = angles @ torch.tensor(modes, dtype=a.dtype).T
    return torch.cat((phase.sin(), phase.cos()), 1)


def explained(features: Tensor, y: Tensor) -> tuple[float, float]:
    """Variance of y that orthonormal features (n, F) explain, less what noise would, and its standard error."""
    n = len(y)
    value = features.T @ y / n
    noise = (features.square().T @ y.square() / n - value.square()) / n
    return float((value.square() - noise).sum()), float(
        (2.0 * noise.square() + 4.0 * noise * value.square()).sum().sqrt()
    )


def products(left: Tensor, right: Tensor, y: Tensor) -> tuple[float, float]:
    """`explained` by all products of a column of each."""
    total, error = 0.0, 0.0
    for column in left.T:
        value, its_error = explained(column[:, None] * right, y)
        total, error = total + value, math.hypot(error, its_error)
    return total, error


def pairs(u: Tensor, y: Tensor, factor: Tensor | None = None) -> tuple[float, float]:
    """`explained` by u_i u_j with i < j, each times every column of `factor`."""
    total, error = 0.0, 0.0
    columns = [torch.ones_like(y)] if factor is None else list(factor.T)
    for column in columns:
        for i in range(u.shape[1] - 1):
            value, its_error = explained((column * u[:, i])[:, None] * u[:, i + 1 :], y)
            total, error = total + value, math.hypot(error, its_error)
    return total, error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("flow", type=Path)
    parser.add_argument("-n", type=int, default=200_000, help="draws")
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args()
    flow = tsf.load_flow(options.flow)
    energy, hot = tsf.BatchedEnergy(flow.molecule.system), flow.training_temperature
    generator = torch.Generator().manual_seed(options.seed)
    ensemble = tsf.draw(flow, energy, temperature=hot, n=options.n, generator=generator)
    with torch.no_grad():
        q, _ = flow.internals.inverse(ensemble.positions.double())
        parts = [flow.transform.inverse(part)[0] for part in q.split(16384)]
    z = torch.cat(parts)
    y = ensemble.log_weights - ensemble.log_weights.median()
    y = y.clamp(-LARGEST, LARGEST)
    y = y - y.mean()
    prior = flow.prior
    a = z[:, prior.n_stiff :]
    first, second, third, fourth = hermite(z[:, : prior.n_stiff] * torch.exp(-prior.log_width(a)))
    torsions = [
        whitened(waves(a[:, list(group)], tuple(range(1, 9 if len(group) == 2 else 13)))) for group in prior.groups
    ]
    backbone = [whitened(waves(a[:, list(group)], (1,))) for group in prior.groups if len(group) == 2]
    alone = [whitened(waves(a[:, list(group)], (1, 2, 4, 5))) for group in prior.groups if len(group) == 1]
    slow = torch.cat([whitened(waves(a[:, list(group)], (1, 2, 3))) for group in prior.groups], 1)
    total = float(y.var())
    print(f"{options.flow.name}, {hot:g} K, n = {options.n}: ESS {ensemble.ess:.1%}, variance of ln w {total:.4f}")
    rows = {
        "torsion potentials (factors of the prior, to harmonic 8 and 12)": explained(torch.cat(torsions, 1), y),
        "of these, torsions alone without three-fold symmetry": explained(torch.cat(alone, 1), y),
        "two torsion factors together (harmonics 1 to 3)": between(prior.groups, a, y),
        "one stiff latent, mean": explained(first, y),
        "one stiff latent, width": explained(second, y),
        "one stiff latent, skewness": explained(third, y),
        "one stiff latent, kurtosis": explained(fourth, y),
        "two stiff latents, linear map": pairs(first, y),
        "two stiff latents, one squared": products(second, first, y),
        "torsions and one stiff latent": products(slow, first, y),
        "torsions and the width of one stiff latent": products(slow, second, y),
        "(phi, psi) and two stiff latents: conditioned linear map": pairs(first, y, torch.cat(backbone, 1)),
    }
    print("| | share of the variance | error |\n|---|---|---|")
    for name, (value, error) in rows.items():
        print(f"| {name} | {value / total:.2%} | {error / total:.2%} |")


def between(groups: tuple[tuple[int, ...], ...], a: Tensor, y: Tensor) -> tuple[float, float]:
    """`explained` by products of functions of two factors of the prior."""
    low = [whitened(waves(a[:, list(group)], (1, 2, 3))) for group in groups]
    total, error = 0.0, 0.0
    for i, left in enumerate(low):
        for right in low[i + 1 :]:
            value, its_error = products(left, right, y)
            total, error = total + value, math.hypot(error, its_error)
    return total, error


if __name__ == "__main__":
    main()
