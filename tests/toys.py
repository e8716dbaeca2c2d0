"""Small systems with known answers, flows of every quality for them, and proposals that are wrong on purpose."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from molecules import perturbed, seeded
from scipy.special import iv
from torch import Tensor

from openmm_tsf.proposals import VectorFlow
from openmm_tsf.transforms import CircleCoupling, Compose, LineCoupling, Standardise

# --- systems ----------------------------------------------------------------------------------------------------------


class Harmonic:
    """U = x K x / 2 in two dimensions."""

    dim, n_circular, kT = 2, 0, 0.7
    stiffness = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)

    def energy(self, x: Tensor) -> Tensor:
        return 0.5 * ((x @ self.stiffness.to(x)) * x).sum(1)

    def exact(self, n: int, seed: int) -> Tensor:
        root = torch.linalg.cholesky(self.kT * torch.linalg.inv(self.stiffness))
        return torch.randn(n, 2, generator=seeded(seed), dtype=torch.float64) @ root.T

    def observe(self, x: Tensor) -> Tensor:
        return torch.stack((x[:, 0], x[:, 0] ** 2, x[:, 0] * x[:, 1], x[:, 1] ** 2, self.energy(x)), 1)

    @property
    def expected(self) -> Tensor:
        c = self.kT * torch.linalg.inv(self.stiffness)
        return torch.stack((torch.zeros(()), c[0, 0], c[0, 1], c[1, 1], torch.tensor(self.kT)))


class DoubleWell:
    """U = sum a y_i + b y_i^2 + c y_i^4 with y = A x: two wells in each direction, of unequal depth."""

    dim, n_circular, kT = 2, 0, 1.0
    a, b, c = 0.3, -3.0, 0.6
    mix = torch.tensor([[1.0, 0.6], [-0.4, 1.2]], dtype=torch.float64)

    def well(self, y: Any) -> Any:
        return self.a * y + self.b * y**2 + self.c * y**4

    def energy(self, x: Tensor) -> Tensor:
        return self.well(x @ self.mix.to(x).T).sum(1)

    def _grid(self) -> tuple[np.ndarray, np.ndarray]:
        y = np.linspace(-4.0, 4.0, 40_001)
        p = np.exp(-self.well(y) / self.kT)
        return y, p / p.sum()

    def exact(self, n: int, seed: int) -> Tensor:
        y, p = self._grid()
        u = np.random.default_rng(seed).random((n, 2))
        drawn = torch.tensor(np.interp(u, np.cumsum(p) - 0.5 * p, y), dtype=torch.float64)
        return drawn @ torch.linalg.inv(self.mix).T

    def observe(self, x: Tensor) -> Tensor:
        y = x @ self.mix.T
        return torch.stack((y[:, 0], y[:, 1] ** 2, (y[:, 0] > 0).double(), y[:, 0] * y[:, 1], self.energy(x)), 1)

    @property
    def expected(self) -> Tensor:
        y, p = self._grid()
        mean = p @ y
        return torch.tensor([mean, p @ y**2, p[y > 0].sum(), mean**2, 2.0 * (p @ self.well(y))])


class Ring:
    """A torsion a in a cosine, and a length u that follows the cosine of it: x = (u, a)."""

    dim, n_circular, kT = 2, 1, 0.8
    spring, follow, barrier, centre = 4.0, 0.8, 1.2, 2.8

    def energy(self, x: Tensor) -> Tensor:
        u, a = x.T
        return 0.5 * self.spring * (u - self.follow * a.cos()) ** 2 + self.barrier * (1 - (a - self.centre).cos())

    def exact(self, n: int, seed: int) -> Tensor:
        rng = np.random.default_rng(seed)
        a = rng.vonmises(self.centre, self.barrier / self.kT, n)
        u = self.follow * np.cos(a) + math.sqrt(self.kT / self.spring) * rng.normal(size=n)
        return torch.tensor(np.stack((u, a), 1))

    def observe(self, x: Tensor) -> Tensor:
        u, a = x.T
        return torch.stack((a.cos(), a.sin(), u, u**2, u * a.cos()), 1)

    @property
    def expected(self) -> Tensor:
        kappa = self.barrier / self.kT
        first, second = iv(1, kappa) / iv(0, kappa), iv(2, kappa) / iv(0, kappa)
        cosine, square = first * math.cos(self.centre), 0.5 + 0.5 * second * math.cos(2 * self.centre)
        g = self.follow
        found = [cosine, first * math.sin(self.centre), g * cosine, self.kT / self.spring + g * g * square, g * square]
        return torch.tensor(found)


SYSTEMS = {"harmonic": Harmonic(), "double well": DoubleWell(), "ring": Ring()}
QUALITIES = ("untrained", "trained", "wrong")
OFF = {"wrong": 0.2, "wild": 0.4}
"""By how much the parameters of wrong flows are off; hardly a draw of a wild one is accepted."""

# --- flows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prior:
    """N(0, tau) on lines, then a von Mises density on circles, which no uniform bug can hide behind."""

    n_lines: int
    n_circles: int
    tau: float

    def log_prob(self, z: Tensor) -> Tensor:
        lines, circles = z[:, : self.n_lines], z[:, self.n_lines :]
        gauss = -0.5 * (lines**2).sum(1) / self.tau - 0.5 * self.n_lines * math.log(2 * math.pi * self.tau)
        return gauss + (0.5 * circles.cos() / self.tau - math.log(2 * math.pi * float(iv(0, 0.5 / self.tau)))).sum(1)

    def sample(self, n: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        lines = math.sqrt(self.tau) * torch.randn(n, self.n_lines, generator=generator, dtype=torch.float64)
        seed = int(torch.randint(2**31, (1,), generator=generator))
        circles = np.random.default_rng(seed).vonmises(0.0, 0.5 / self.tau, (n, self.n_circles))
        z = torch.cat((lines, torch.tensor(circles)), 1)
        return z, self.log_prob(z)


@cache
def toy_flow(system: str, quality: str, *, steerable: bool = False, n_momenta: int = 0) -> VectorFlow:
    """A flow of one of SYSTEMS at its temperature; those that are not steerable have a Jacobian that varies."""
    toy = SYSTEMS[system]
    dim, n_circles = toy.dim + n_momenta, toy.n_circular
    n_lines = dim - n_circles
    circular = torch.tensor([False] * n_lines + [True] * n_circles)
    x = toy.exact(4000, seed=5)
    y = torch.cat((x, math.sqrt(toy.kT) * torch.randn(len(x), n_momenta, generator=seeded(6))), 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        size = {"hidden": 16, "depth": 1}
        halves = [range(n_lines // 2), range(n_lines // 2, n_lines)] if n_lines > 1 else [range(1)]
        layers: list[torch.nn.Module] = []
        for _ in range(2):
            layers += [LineCoupling(n_lines, n_circles, h, volume_preserving=steerable, **size) for h in halves]
            if n_circles:
                layers.append(CircleCoupling(n_lines, n_circles, range(n_circles), **size))
        mean, matrix = torch.zeros(n_lines), torch.eye(n_lines)
        if quality == "trained":
            lines = y[:, :n_lines] - y[:, :n_lines].mean(0)
            mean, matrix = y[:, :n_lines].mean(0), torch.linalg.cholesky(lines.T @ lines / (len(y) * toy.kT))
        if quality in OFF:
            mean = mean + 0.2
        transform = Compose([*layers, Standardise(mean, matrix, circular)]).double()
        prior = Prior(n_lines, n_circles, toy.kT)
        if quality == "trained":
            _train(transform, prior, y)
    if quality in OFF:
        perturbed(transform, OFF[quality])
    transform.requires_grad_(False)
    return VectorFlow(prior, transform, tau=toy.kT, n_momenta=n_momenta, circular=circular)


def _train(transform: torch.nn.Module, prior: Prior, y: Tensor) -> None:
    """Maximum likelihood; good enough is good enough."""
    optimizer = torch.optim.Adam(transform.parameters(), lr=0.02)
    for step in range(150):
        batch = y[(step * 256) % 3840 :][:256]
        z, log_det = transform.inverse(batch)
        loss = -(prior.log_prob(z) + log_det).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@dataclass(frozen=True)
class ByHand:
    """The definitions of PHYSICS of moves written out once more, with terms that may be left out.

    Attributes:
        flow: prior, transform, tau and number of momenta.
        hastings: whether draws and states are scored.
        momentum: whether |p|^2/2 counts.
        log_det: whether the latent walk has its determinants.
    """

    flow: VectorFlow
    hastings: bool = True
    momentum: bool = True
    log_det: bool = True

    @property
    def latent_scale(self) -> Tensor:
        circular = self.flow.circular
        lines = torch.full(circular.shape, math.sqrt(self.flow.tau))
        return torch.where(circular, torch.ones_like(lines), lines)

    def _kinetic(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """x of (x, p), and ln N(p; 0, tau) but for its constant."""
        m, tau = self.flow.n_momenta, self.flow.tau
        x, p = y[:, : y.shape[1] - m], y[:, y.shape[1] - m :]
        return x, -0.5 * (p**2).sum(1) / tau if self.momentum else torch.zeros(len(y))

    def _with_momenta(self, x: Tensor, generator: torch.Generator) -> Tensor:
        p = torch.randn(len(x), self.flow.n_momenta, generator=generator, dtype=torch.float64)
        return torch.cat((x, p * math.sqrt(self.flow.tau)), 1)

    def propose(self, n: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        z, log_prior = self.flow.prior.sample(n, generator=generator)
        y, log_det = self.flow.transform.forward(z)
        x, kinetic = self._kinetic(y)
        return x, (log_prior - log_det if self.hastings else 0.0) - kinetic, torch.ones(n, dtype=torch.bool)

    def score(self, x: Tensor, *, generator: torch.Generator) -> Tensor:
        y = self._with_momenta(x, generator)
        z, log_det = self.flow.transform.inverse(y)
        return (self.flow.prior.log_prob(z) + log_det if self.hastings else 0.0) - self._kinetic(y)[1]

    def to_latents(self, x: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        y = self._with_momenta(x, generator)
        z, log_det = self.flow.transform.inverse(y)
        return z, (-log_det if self.log_det else 0.0) + self._kinetic(y)[1]

    def from_latents(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, log_det = self.flow.transform.forward(z)
        x, kinetic = self._kinetic(y)
        return x, (log_det if self.log_det else 0.0) + kinetic, torch.ones(len(z), dtype=torch.bool)

    def without(self, what: str) -> ByHand:
        return replace(self, **{what: False})


class Scripted:
    """A proposal that says what it is told to, and remembers what it was asked.

    Args:
        x: (n, d) what is proposed, in the order of proposals.
        log_prob: (n,) ln q of these.
        scores: (B,) ln q of the states.
        valid: (n,) which proposals can be; all by default.
        volumes: (B,) ln|det| at the states, and (n,) `log_prob` serves as that at the proposals.
    """

    def __init__(self, x: Any, log_prob: Any, scores: Any, *, valid: Any = None, latent_scale: Any = (1.0,)) -> None:
        self.x, self.log_prob, self.scores = (torch.as_tensor(a, dtype=torch.float64) for a in (x, log_prob, scores))
        self.x = self.x.reshape(len(self.log_prob), -1)
        self.valid = torch.ones(len(self.x), dtype=torch.bool) if valid is None else torch.tensor(valid)
        self.latent_scale = torch.tensor(latent_scale)
        self.asked: list[Tensor] = []
        self.latents: list[Tensor] = []

    def propose(self, n: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        assert n == len(self.x), f"{n} proposals asked for, {len(self.x)} are scripted"
        return self.x.clone(), self.log_prob.clone(), self.valid.clone()

    def score(self, x: Tensor, *, generator: torch.Generator) -> Tensor:
        self.asked.append(x.clone())
        return self.scores.clone()

    def to_latents(self, x: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        self.asked.append(x.clone())
        return torch.zeros(len(x), len(self.latent_scale)), self.scores.clone()

    def from_latents(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.latents.append(z.clone())
        return self.x.clone(), self.log_prob.clone(), self.valid.clone()
