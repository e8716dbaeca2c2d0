"""Path-integral sampler: a diffusion from the origin whose drift a network learns, with exact weights of its paths.

dX = sigma u(X, t) dt + sigma dW from X_0 = 0, t in [0, 1], in steps h that get shorter as 1 - t does, since the last
one makes noise of width sigma sqrt(h) that no drift takes back:

    X' = X + sigma (u h + sqrt(h) e),   e ~ N(0, I).

Without drift X_1 ~ N(0, sigma^2), in these steps too. Each step with drift and the same step without are Gaussians,
with ln of their ratio -(|u|^2 h / 2 + sqrt(h) u . e), so that paths have the weights (Girsanov's, exact in steps of any
size)

    ln w = -U(X_1) - ln N(X_1; 0, sigma^2) - sum_k (|u_k|^2 h / 2 + sqrt(h) u_k . e_k),   E[w] = Z.

E[ln w] <= ln Z is made large: the last term has mean zero. u = a(x, t) - b(t) sigma grad U(x) with networks a and b:
the gradient counts as an energy in every step, and as another one where it is differentiated. The other loss is the
variance of ln w over paths that are held fixed, which differentiates no energy and forgets fewer modes.

Sources: Q. Zhang, Y. Chen, arXiv 2111.15141; L. Richter, J. Berner, arXiv 2307.01198 (the variance of ln w).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from openmm_tsf.nets import perceptron
from openmm_tsf.typing import Scalars, Vectors

from .common import (
    Budget,
    Counted,
    Drawn,
    followed,
    learn,
    log_normal,
    mean_of_finite,
    normal,
    seeded,
    without_numbers,
)  # fmt: skip

LARGEST = 10.0
"""Norm at which sigma grad U is cut off where the drift reads it; weights are exact whatever it reads."""
Loss = Literal["entropy", "variance"]


class Drift(nn.Module):
    """u (B, d) of x (B, d), time t and the energy's gradient (B, d) or None.

    Args:
        dim: d.
        scale: sigma; the networks read x / sigma.
        hidden, depth: size of the networks.
        with_gradient: whether the gradient is read.
    """

    def __init__(self, dim: int, scale: float, *, hidden: int, depth: int, with_gradient: bool) -> None:
        super().__init__()
        self.scale = scale
        self.net = perceptron(dim + 5, dim, hidden=hidden, depth=depth)
        self.gate = perceptron(5, 1, hidden=32, depth=1) if with_gradient else None

    def forward(self, x: Vectors, t: float, gradient: Vectors | None) -> Vectors:
        waves = [f(k * math.pi * t) for k in (1, 2) for f in (math.sin, math.cos)]
        time = x.new_tensor([2.0 * t - 1.0, *waves])
        u = self.net(torch.cat((x / self.scale, time.expand(len(x), -1)), 1))
        if self.gate is None or gradient is None:
            return u
        force = -self.scale * torch.nan_to_num(gradient)
        norm = force.norm(dim=1, keepdim=True)
        return u + self.gate(time) * force * (LARGEST / norm.clamp_min(LARGEST))


@dataclass(frozen=True, eq=False)
class Paths:
    """n paths: their ends X_1 (n, d), the sum of |u|^2 h / 2 (n,), and ln of all steps with drift over those without
    (n,), whose mean is that of the sum."""

    end: Vectors
    cost: Scalars
    log_ratio: Scalars


def paths(
    drift: Drift, target: Counted, n: int, n_steps: int, generator: torch.Generator, *, hold: bool = False
) -> Paths:  # fmt: skip
    """Paths with their graph where gradients are on; where they are held, that of the drift alone."""
    ends, again = [1.0 - (1.0 - k / n_steps) ** 2 for k in range(n_steps + 1)], torch.is_grad_enabled() and not hold
    x = torch.zeros(n, target.dim)
    cost, log_ratio = x.new_zeros(n), x.new_zeros(n)
    for k, (t, after) in enumerate(pairwise(ends)):
        h, gradient = after - t, None
        if drift.gate is not None:
            gradient = target.slope(x, create_graph=again and k > 0)[1]
        u, e = drift(x, t, gradient), math.sqrt(h) * normal(n, target.dim, generator)
        increment = h * u + e
        increment = increment.detach() if hold else increment
        cost = cost + 0.5 * h * (u * u).sum(1)
        log_ratio = log_ratio + (u * increment - 0.5 * h * u * u).sum(1)
        x = x + drift.scale * increment
    return Paths(x, cost, log_ratio)


def pis(
    target: Any, budget: Budget, n: int, *, scale: float, n_steps: int = 32, batch: int = 256, hidden: int = 64,
    depth: int = 3, rate: float = 3e-3, with_gradient: bool = True, loss: Loss = "entropy", seed: int,
    name: str = "pis",
) -> Drawn:  # fmt: skip
    """Learn the drift within the budget, then n weighted draws.

    Args:
        target: what to draw from.
        budget: of learning. A path costs 1 energy; where the drift reads the gradient, 1 more in each step, or 2 where
            it is differentiated.
        n: number of draws.
        scale: sigma, about the width of all of the target.
        n_steps: of a path.
        batch: paths in a step of the optimiser.
        hidden, depth, rate: of the network and its optimiser.
        with_gradient: whether the drift reads the gradient of the energy.
        loss: what is made small, -E[ln w] or the variance of ln w.
        seed: of everything.
    """
    generator = torch.Generator().manual_seed(seed)
    size = {"hidden": hidden, "depth": depth, "with_gradient": with_gradient}
    drift = seeded(seed, lambda: Drift(target.dim, scale, **size))
    counted = Counted(target, budget)

    def entropy(_: float) -> Tensor:
        made = paths(drift, counted, batch, n_steps, generator)
        u, finite = followed(counted, made.end)
        return mean_of_finite(made.cost + u + log_normal(made.end, scale), finite)

    def variance(_: float) -> Tensor:
        made = paths(drift, counted, batch, n_steps, generator, hold=True)
        u = counted(made.end)
        minus = made.log_ratio + u + log_normal(made.end, scale)
        minus = minus - minus.detach()[minus.isfinite()].mean()
        return 0.5 * mean_of_finite(minus**2, minus.isfinite())

    steps = sum(1 for _ in learn(drift, counted, entropy if loss == "entropy" else variance, rate=rate))
    training, seconds = counted.n, counted.seconds
    x, energy, log_weights = drawn(drift, counted, n, n_steps, generator)
    facts = {"steps": steps, "batch": batch, "path_steps": n_steps}
    return Drawn(
        name, x, energy, log_weights, training, counted.n - training, seconds, counted.seconds - seconds, facts
    )  # fmt: skip


@torch.no_grad()
def drawn(
    drift: Drift, target: Counted, n: int, n_steps: int, generator: torch.Generator, *, chunk: int = 20_000
) -> tuple[Vectors, Scalars, Scalars]:
    """n draws, their energies and their log-weights."""
    parts = []
    for begin in range(0, n, chunk):
        made = paths(drift, target, min(chunk, n - begin), n_steps, generator)
        u = target(made.end)
        parts.append((made.end, u, without_numbers(-u - log_normal(made.end, drift.scale) - made.log_ratio)))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))
