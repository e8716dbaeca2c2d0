"""L2HMC: leapfrog steps whose scales and shifts are learned, and a Metropolis test that keeps the target exact.

With masks m of half of the coordinates, m' of the other half, and functions S, Q, T of what a line does not change:

    v <- v exp(e/2 S) - e/2 (grad U(x) exp(e Q) + T)                 S, Q, T of (x, grad U, k)
    x <- m' x + m [x exp(e S) + e (v exp(e Q) + T)]                  S, Q, T of (m' x, v, k)
    x <- m x + m' [the same]                                         S, Q, T of (m x, v, k)
    v <- as before

in steps k = 1 .. K, or all of it backwards, as a coin decides. ln|det| is the sum of the scales' logarithms. What is
made small is E[l^2/D - D/l^2], where D is the squared jump times the probability that it is accepted.

Source: D. Levy, M. Hoffman, J. Sohl-Dickstein, arXiv 1711.09268; its extra term for the burn-in is left out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from openmm_tsf.nets import perceptron
from openmm_tsf.typing import Scalars, Vectors

from .common import Budget, Counted, Drawn, learn, mean_of_finite, normal, seeded
from .hmc import Chains, collected, started

LEARNING = 0.5
"""Share of the budget that goes to learning."""
ANNEALING = {"anneal_from": 0.05, "anneal_share": 0.5}
"""Of learning: twenty times as hot at the start, at its own temperature after half of it."""
SMALL = 1e-4
"""Added to the squared jump, so that its inverse is finite."""


class Scales(nn.Module):
    """S, Q and T (B, d) of two vectors (B, d) and a step; at the start all zero, so that the leapfrog step is plain."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = perceptron(2 * dim + 2, 3 * dim, hidden=hidden, depth=2)

    def forward(self, a: Vectors, b: Vectors, phase: float) -> tuple[Tensor, Tensor, Tensor]:
        time = a.new_tensor([math.sin(phase), math.cos(phase)]).expand(len(a), -1)
        s, q, t = self.net(torch.cat((a, b, time), 1)).chunk(3, 1)
        return torch.tanh(s), torch.tanh(q), t


class Learned(nn.Module):
    """The K learned leapfrog steps, in units of `scale`.

    Args:
        dim: d, at least 2.
        scale: unit of length.
        n_steps: K.
        step: e at the start.
        hidden: width of the networks.

    Raises:
        ValueError: one coordinate cannot be masked in halves.
    """

    def __init__(self, dim: int, scale: float, *, n_steps: int, step: float, hidden: int) -> None:
        super().__init__()
        if dim < 2:
            raise ValueError(f"learned leapfrog steps need at least 2 coordinates, not {dim}")
        self.scale, self.n_steps = scale, n_steps
        self.log_step = nn.Parameter(torch.tensor(math.log(step)))
        self.kick, self.drift = Scales(dim, hidden), Scales(dim, hidden)
        masks = torch.stack([(torch.randperm(dim) < dim // 2) for _ in range(n_steps)]).to(torch.get_default_dtype())
        self.register_buffer("masks", masks)

    def _half_kick(self, y: Vectors, v: Vectors, g: Vectors, k: int, sign: int) -> tuple[Vectors, Scalars]:
        """v after half a step (sign 1) or before it (sign -1), and ln of the volume's change."""
        e = self.log_step.exp()
        s, q, t = self.kick(y, torch.asinh(g), 2.0 * math.pi * k / self.n_steps)
        force = 0.5 * e * (g * torch.exp(e * q) + t)
        log_scale = 0.5 * e * s
        v = v * log_scale.exp() - force if sign > 0 else (v + force) * torch.exp(-log_scale)
        return v, sign * log_scale.sum(1)

    def _drift(self, y: Vectors, v: Vectors, mask: Tensor, k: int, sign: int) -> tuple[Vectors, Scalars]:
        """y with the coordinates of the mask moved on, or back."""
        e = self.log_step.exp()
        s, q, t = self.drift((1.0 - mask) * y, v, 2.0 * math.pi * k / self.n_steps)
        way, log_scale = e * (v * torch.exp(e * q) + t), e * s * mask
        new = y * log_scale.exp() + way if sign > 0 else (y - way) * torch.exp(-log_scale)
        return (1.0 - mask) * y + mask * new, sign * log_scale.sum(1)

    def forward(
        self, chains: Chains, v: Vectors, target: Counted, sign: int, heat: float
    ) -> tuple[Vectors, Vectors, Scalars, Vectors, Scalars]:
        """x, v, U and its gradient at the end, and ln|det|; with a graph where gradients are on."""
        graph, total = torch.is_grad_enabled(), v.new_zeros(len(v))
        y, u, slope = chains.x / self.scale, chains.u, chains.g
        for k in range(self.n_steps) if sign > 0 else reversed(range(self.n_steps)):
            mask = self.masks[k]
            v, a = self._half_kick(y, v, slope * self.scale / heat, k, sign)
            y, b = self._drift(y, v, mask if sign > 0 else 1.0 - mask, k, sign)
            y, c = self._drift(y, v, 1.0 - mask if sign > 0 else mask, k, sign)
            u, slope = target.slope(y * self.scale, create_graph=graph)
            v, d = self._half_kick(y, v, slope * self.scale / heat, k, sign)
            total = total + a + b + c + d
        return y * self.scale, v, u, slope, total

    def proposal(
        self, chains: Chains, target: Counted, sign: int, generator: torch.Generator, heat: float = 1.0
    ) -> tuple[Chains, Scalars]:
        """Where the chains would go, and ln of the Metropolis ratio, -inf where it is no number."""
        v = normal(*chains.x.shape, generator)
        x, after, u, g, log_det = self(chains, v, target, sign, heat)
        log_ratio = (chains.u - u) / heat + 0.5 * (v * v).sum(1) - 0.5 * (after * after).sum(1) + log_det
        return Chains(x, u, g), log_ratio.nan_to_num(-math.inf, math.inf, -math.inf)


def iterate(
    learned: Learned, chains: Chains, target: Counted, generator: torch.Generator, heat: float = 1.0
) -> tuple[Chains, Scalars, Scalars]:
    """One step of each chain, each in a direction of its own.

    Returns:
        the chains after it, without graph; the probabilities that the steps were accepted, and the squared jumps that
        were tried, in units of the scale, (B,), with a graph where gradients are on.
    """
    forward = torch.rand(len(chains.x), generator=generator) < 0.5
    order = torch.cat((forward.nonzero()[:, 0], (~forward).nonzero()[:, 0]))
    halves = [Chains(chains.x[rows], chains.u[rows], chains.g[rows]) for rows in order.split(_sizes(forward))]
    made = [
        learned.proposal(half, target, sign, generator, heat)
        for half, sign in zip(halves, (1, -1), strict=True) if len(half.x)
    ]  # fmt: skip
    back = order.argsort()
    new = Chains(*(torch.cat([getattr(part, name) for part, _ in made])[back] for name in ("x", "u", "g")))
    log_ratio = torch.cat([ratio for _, ratio in made])[back]
    accepted = torch.rand(len(log_ratio), generator=generator).log() < log_ratio.detach()
    jump = (((new.x - chains.x) / learned.scale) ** 2).sum(1)
    pairs = ((new.x, chains.x), (new.u, chains.u), (new.g, chains.g))
    kept = (torch.where(accepted.view(-1, *[1] * (a.ndim - 1)), a, b).detach() for a, b in pairs)
    return Chains(*kept), log_ratio.clamp(max=0.0).exp(), jump


def _sizes(forward: Tensor) -> list[int]:
    """How many are forward, and how many are not."""
    return [int(forward.sum()), int((~forward).sum())]


def l2hmc(
    target: Any, budget: Budget, n: int, *, scale: float, n_chains: int = 128, n_steps: int = 8, step: float = 0.1,
    jump: float = 0.3, hidden: int = 32, rate: float = 1e-3, seed: int, name: str = "l2hmc",
) -> Drawn:  # fmt: skip
    """Learn the steps with half of the budget, then n draws of what chains visit with the rest; no weights, no ln Z.

    The target starts hot in learning, so that steps between modes are learned.

    Args:
        target: what to draw from.
        budget: of everything. A step in learning costs two energies, for it is differentiated again; else one.
        n: number of draws.
        scale: chains start at N(0, scale^2), and it is the unit of length.
        n_chains, n_steps: chains, and leapfrog steps of an iteration.
        step: at the start, in units of the scale.
        jump: l, in units of the scale.
        hidden, rate: width of the networks, and rate of learning.
        seed: of everything.
    """
    generator = torch.Generator().manual_seed(seed)
    counted = Counted(target, budget)
    size = {"n_steps": n_steps, "step": step, "hidden": hidden}
    learned = seeded(seed, lambda: Learned(target.dim, scale, **size))
    chains = started(counted, n_chains, scale, generator)

    def loss(heat: float) -> Tensor:
        nonlocal chains
        chains, probability, squares = iterate(learned, chains, counted, generator, heat)
        worth = squares * probability / jump**2 + SMALL
        return mean_of_finite(1.0 / worth - worth, torch.isfinite(worth))

    part = Counted(target, Budget(max(1, int(LEARNING * budget.evaluations)), LEARNING * budget.seconds))
    whole, counted = counted, part
    counted.n = whole.n
    steps = sum(1 for _ in learn(learned, counted, loss, rate=rate, clip=1.0, **ANNEALING))
    whole.n = counted.n
    training, seconds = whole.n, whole.seconds

    @torch.no_grad()
    def move(chains: Chains) -> tuple[Chains, Scalars]:
        return iterate(learned, chains, whole, generator)[:2]

    x, u, facts = collected(chains, move, whole, n, cost=n_steps)
    facts |= {"steps": steps, "step": float(learned.log_step.detach().exp()), "length": n_steps}
    return Drawn(name, x, u, None, training, whole.n - training, seconds, whole.seconds - seconds, facts)
