"""Flows as rivals: a plain Boltzmann generator (real-NVP trained by energy), and the steerable flow of this package.

Sources: F. Noe, S. Olsson, J. Koehler, H. Wu, Science 365, eaaw1147 (2019); M. Dibak, L. Klein, F. Noe, arXiv
2012.00429.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.architecture import FlowSettings
from openmm_tsf.flow import Flow, build_vector_flow
from openmm_tsf.training import JUDGED_BY, TrainingSettings, train
from openmm_tsf.typing import Scalars, Vectors
from openmm_tsf.vectors import Samples
from openmm_tsf.wells_study import unmix

from .common import Budget, Counted, Drawn, followed, learn, log_normal, mean_of_finite, normal, without_numbers
from .hmc import hmc

HELD_OUT = 0.1
"""Share of the samples that a steerable flow is never trained on."""


def real_nvp(
    target: Any, budget: Budget, n: int, *, scale: float, blocks: int = 6, hidden: int = 64, batch: int = 256,
    rate: float = 2e-3, anneal_from: float = 1.0, anneal_share: float = 0.7, seed: int, name: str = "bg",
) -> Drawn:  # fmt: skip
    """Train real-NVP by energy alone (E[U(G(z)) - ln|det dG(z)|] made small), then n weighted draws.

    Args:
        target: what to draw from.
        budget: of learning; each draw costs one energy.
        n: number of draws.
        scale: the flow starts as N(0, scale^2).
        blocks, hidden: couplings, two in a block, and the width of their networks (two hidden layers).
        batch: draws in a step of the optimiser.
        rate: its learning rate.
        anneal_from, anneal_share: how hot the target starts, and for how long it cools; see `learn`.
        seed: of everything.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.get_default_dtype()
    settings = FlowSettings(kind="real-nvp", momenta=False, blocks=blocks, hidden=hidden)
    width = Samples(scale * normal(8 * target.dim + 1000, target.dim, generator).numpy())
    flow = build_vector_flow(target.dim, width, settings, generator=generator).to(dtype)
    counted = Counted(target, budget)

    def loss(heat: float) -> Tensor:
        x, log_det = flow.transform.forward(normal(batch, target.dim, generator))
        u, finite = followed(counted, x)
        return mean_of_finite(u / heat - log_det, finite)

    annealing = {"anneal_from": anneal_from, "anneal_share": anneal_share}
    steps = sum(1 for _ in learn(flow.transform, counted, loss, rate=rate, **annealing))
    training, seconds = counted.n, counted.seconds
    with torch.no_grad():
        z = normal(n, target.dim, generator)
        x, log_det = flow.transform.forward(z)
        energy = counted(x)
        log_weights = without_numbers(-energy - log_normal(z) + log_det)
    facts = {"steps": steps, "batch": batch, "n_parameters": flow.n_parameters}
    return Drawn(name, x, energy, log_weights, training, n, seconds, counted.seconds - seconds, facts)


class Cooler:
    """Reduced energy at another temperature, U / T."""

    def __init__(self, target: Any, temperature: float) -> None:
        self.target, self.temperature, self.dim = target, temperature, target.dim

    def __call__(self, x: Vectors) -> Scalars:
        return self.target(x) / self.temperature


def steerable(
    target: Any, budget: Budget, n: int, *, scale: float, hot: float = 4.0, blocks: int = 4, hidden: int = 48,
    n_samples: int = 20_000, batch: int = 512, n_chains: int = 256, seed: int, name: str = "tsf",
) -> Drawn:  # fmt: skip
    """Sample a hot temperature by HMC, train a steerable flow there, draw n at 1 with weights.

    Half of the budget goes to the samples, the other half to the energy loss, which begins after two fifths of the
    steps.

    Args:
        target: what to draw from.
        budget: of sampling and learning.
        n: number of draws.
        scale: chains start at N(0, scale^2).
        hot: temperature of samples and training, at which chains should get from mode to mode.
        blocks, hidden, batch: of the flow (quartic potentials on stiff coordinates) and its training.
        n_samples: kept for training.
        n_chains: of HMC.
        seed: of everything.
    """
    half = Budget(max(1, budget.evaluations // 2), budget.seconds / 2.0)
    made = hmc(Cooler(target, hot), half, n_samples, scale=scale, n_chains=n_chains, seed=seed)
    order = torch.randperm(n_samples, generator=torch.Generator().manual_seed(seed))
    samples = Samples(made.x[order].double().numpy(), hot)
    counted = Counted(target, half)
    flow = _trained(target, counted, samples, blocks, hidden, batch, seed)
    training, seconds = made.n_training + made.n_drawing + counted.n, counted.seconds
    seconds_hmc = made.seconds_training + made.seconds_drawing
    begin = counted.n
    with torch.no_grad():
        x, log_prob = flow.at(1.0).sample(n, generator=torch.Generator().manual_seed(seed))
        energy = counted(x)
    log_weights = without_numbers(-energy - log_prob)
    facts = {"hot": hot, "r_hat": made.facts["r_hat"], "n_parameters": flow.n_parameters}
    return Drawn(
        name, x, energy, log_weights, training, counted.n - begin, seconds + seconds_hmc, counted.seconds - seconds,
        facts,
    )  # fmt: skip


def _trained(
    target: Any, counted: Counted, samples: Samples, blocks: int, hidden: int, batch: int, seed: int
) -> Flow:  # fmt: skip
    """The steerable flow, by likelihood and then by energy too, until the budget of `counted` is spent."""
    kelvin = float(samples.temperatures[0])
    settings, early = FlowSettings(blocks=blocks, hidden=hidden), samples.split(HELD_OUT)[0]

    def build() -> Flow:
        generator = torch.Generator().manual_seed(seed)
        return build_vector_flow(target.dim, samples, settings, training_temperature=kelvin, generator=generator)

    flow = build()
    unmix(flow, torch.tensor(early.positions).double())
    if not all(bool(p.isfinite().all()) for p in flow.parameters()):
        flow = build()  # the quartic coefficients of samples that are Gaussian run off to zero
    budget, ramp = counted.budget.evaluations - len(early), 0.4  # training takes the forces at its samples once
    n_judged = min(20, max(1, budget // (3 * JUDGED_BY)))
    every = max(1, round((budget - (n_judged + 1) * JUDGED_BY) / (batch * (1.0 - ramp) * n_judged)))
    training = TrainingSettings(
        steps=every * n_judged, batch_frames=batch, batch_draws=batch, ramp_start=ramp, ramp_end=ramp + 0.3,
        held_out=HELD_OUT, evaluate_every=every, checkpoint_every=every * n_judged, patience=n_judged,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        train(flow, samples, counted, training, directory=folder, seed=seed)
    return flow
