"""Draws of a flow at several sampling temperatures, scored for one target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from .flow import Flow, SteeredFlow
from .latent_tuning import latent_moments
from .proposals import part_momenta
from .tuning import ScoredSamples
from .typing import Energy

SPAN = (0.5, 2.0)
"""Sampling temperatures between which t* and t' are looked for."""
WIDEST, SPACING = 0.12, 0.9
"""Spacing of ln t between draws, at most, and in standard deviations of Ehat: neighbours must overlap."""
CHUNK = 4096


@dataclass(frozen=True, eq=False)
class TemperedDraws:
    """Draws of a flow at t T, off its chart or on it, scored for T.

    Args:
        scored: Ehat and u of (x, p); off the chart u is infinite.
        log_weights: (n,) of x alone for T, those of `draw` with `at`.
        energy: (n,) U [kJ/mol], +inf off the chart.
        virial: (n,) z . grad_z u, where asked for.
    """

    scored: ScoredSamples
    log_weights: Float[Tensor, " n"] = field(repr=False)
    energy: Float[Tensor, " n"] = field(repr=False)
    virial: Float[Tensor, " n"] | None = field(repr=False)

    def __len__(self) -> int:
        return len(self.scored)


def tempered_draws(
    flow: Flow, energy: Energy, temperature: float, t: float, n: int, *, generator: torch.Generator,
    virial: bool = False,
) -> TemperedDraws:  # fmt: skip
    """n draws of a flow run at t T, scored for T.

    Args:
        flow: of a kind that steers.
        energy: U [kJ/mol]; of a model system, in the unit of its temperatures.
        temperature: T [K].
        t: sampling temperature.
        n: draws, those off the chart included.
        generator: of the draws.
        virial: also z . grad_z u, which takes forces.

    Raises:
        ValueError: a flow that does not steer, fewer than two draws, NaN energies, or temperatures not above zero.
    """
    check_steers(flow)
    target, sampler = flow.at(temperature), flow.at(temperature * t)
    with torch.set_grad_enabled(virial):
        parts = [
            _batch(target, sampler, energy, min(CHUNK, n - done), generator, virial) for done in range(0, n, CHUNK)
        ]
    model, u, log_weights, raw, virials = (torch.cat(column).double() for column in zip(*parts, strict=True))
    return TemperedDraws(ScoredSamples(model, u, t=t), log_weights, raw, virials if virial else None)


def _batch(
    target: SteeredFlow, sampler: SteeredFlow, energy: Energy, n: int, generator: torch.Generator, virial: bool
) -> tuple[Tensor, ...]:
    """Ehat, u, ln w of x, U and the virial of some draws."""
    flow, tau = target.flow, target.prior.tau
    with torch.no_grad():
        z, log_q = sampler.prior.sample(n, generator=generator)
        model = -target.prior.log_prob(z)
    z = z.detach().requires_grad_(virial)
    y, log_det = flow.transform(z)
    q, log_momenta = part_momenta(y, flow.n_momenta, sampler.prior.tau)
    rows = flow.internals.chart(q.detach()).nonzero()[:, 0]
    x, _ = flow.internals(q[rows])
    raw = energy(x).to(q.dtype)
    u_x = raw / flow.kT(target.temperature) - flow.internals.log_constraint_factor(x)
    u = u_x + 0.5 * (y[rows, q.shape[1] :] ** 2).sum(1) / tau
    virials = torch.zeros_like(log_q)
    if virial:
        (slope,) = torch.autograd.grad(u[torch.isfinite(u)].sum(), z)
        virials = (slope * z).sum(1)

    def everywhere(values: Tensor) -> Tensor:
        return torch.full_like(log_q, math.inf).index_copy(0, rows, values.detach())

    log_weights = -everywhere(u_x) - (log_q - log_det - log_momenta).detach()
    return model, everywhere(u), log_weights, everywhere(raw), virials.detach()


def check_steers(flow: Flow) -> None:
    """Raises ValueError for a flow whose density at t T is not that at T to the power 1/t."""
    if not flow.settings.steers:
        raise ValueError(
            f"flows of kind {flow.settings.kind!r} do not steer: run at another temperature they are another model, "
            "and the theory of tuning does not apply; train one of kind anharmonic or tsf"
        )


def sampling_levels(flow: Flow, temperature: float, span: tuple[float, float] = SPAN) -> list[float]:
    """Sampling temperatures to draw at, 1 among them, so close that neighbours overlap.

    Raises:
        ValueError: a span that does not hold 1, or is not above zero.
    """
    low, high = span
    if not (math.isfinite(high) and 0.0 < low < 1.0 < high):
        raise ValueError(
            f"sampling temperatures must be looked at from above 0 through 1, not from {low:g} to {high:g}"
        )
    spacing = min(WIDEST, SPACING / math.sqrt(max(latent_moments(flow, temperature, 1.0)[1], 1e-6)))
    parts = []
    for end in (math.log(low), math.log(high)):
        steps = math.ceil(abs(end) / spacing)
        parts += [math.exp(end * k / steps) for k in range(1, steps + 1)]
    return sorted([1.0, *parts])


@torch.no_grad()
def pooled_draws(flow: Flow, temperature: float, draws: Sequence[TemperedDraws]) -> ScoredSamples:
    """Draws at several t as one set that can be weighted for any t: that of their mixture, for Z is known."""
    prior, tau = flow.prior, flow.at(temperature).prior.tau
    model = torch.cat([d.scored.model_energy for d in draws])
    latent = model - prior.log_z(tau).double()
    log_q = [-latent / d.scored.t - prior.log_z(d.scored.t * tau).double() for d in draws]
    shares = [math.log(len(d) / len(model)) for d in draws]
    log_mixture = torch.stack([a + b for a, b in zip(log_q, shares, strict=True)]).logsumexp(0)
    return ScoredSamples(model, torch.cat([d.scored.target_energy for d in draws]), -log_mixture - model)
