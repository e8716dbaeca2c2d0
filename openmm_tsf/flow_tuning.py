"""The sampling temperature of a flow: run at t T and weighed for T, where is it closest to the target?

A flow that steers, run at the temperature t T, is q_t ~ exp(-Ehat/t) with Ehat = -ln q_T: what `tuning` is about. So
fresh draws at any t cost no more than others, and some of what its diagnostics need is known without draws, see
`latent_tuning`. With momenta all of it is of pairs (x, p), where steering holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .flow import Flow
from .latent_tuning import (
    ClosedForms,
    HeldOut,
    closed_t_prime,
    held_out_scores,
    is_gaussian,
    latent_moments,
    virial_ratio,
    virial_root,
)
from .tempered_draws import SPAN, TemperedDraws, check_steers, pooled_draws, sampling_levels, tempered_draws
from .trajectories import Frames
from .tuning import (
    OptimalTemperature,
    TemperatureDiagnostics,
    optimal_sampling_temperature,
    temperature_diagnostics,
)
from .tuning.samples import unclashed
from .typing import Energy
from .units import to_kelvin
from .vectors import Samples
from .weights import bootstrap, effective_sample_size, largest_weight_share

FORMAT = "openmm-tsf tuning 1"
ON_GRID = 80
"""Sampling temperatures at which the curves are computed; an even number, so that 1 lies between two of them."""
FEWEST_DRAWS = 100

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Check:
    """Fresh draws at one sampling temperature, as `sample --at` makes them.

    Args:
        name: "as trained", "t*" or "t'".
        t, temperature: of sampling, the latter in K.
        ess, ess_error: Kish's effective sample size for T as a share of all draws, and its standard error.
        largest_weight_share: of these draws.
        mean_energy: of the draws as they come [kJ/mol], without clashes.
        off_chart, clashes: shares of the draws.
    """

    name: str
    t: float
    temperature: float
    ess: float
    ess_error: float
    largest_weight_share: float
    mean_energy: float
    off_chart: float
    clashes: float


@dataclass(frozen=True, eq=False)
class FlowTuning:
    """Which sampling temperature serves a flow, and why.

    Args:
        temperature, training_temperature: of the target and of the flow [K].
        diagnostics: K, C and advice from draws at t = 1.
        optimum: t*, t' and the curves.
        closed: what ln Z, held-out frames and the latent virial say.
        checks: fresh draws at t = 1, t* and t'.
        n: draws at each t of the search, `n_pooled` of all of them.
        n_energy_evaluations: one for each draw.
    """

    temperature: float
    training_temperature: float
    diagnostics: TemperatureDiagnostics
    optimum: OptimalTemperature
    closed: ClosedForms
    checks: tuple[Check, ...]
    n: int
    n_pooled: int
    n_energy_evaluations: int

    @property
    def n_effective(self) -> float:
        """Effective draws of the search, reweighted to the target: what <Ehat>_p rests on where there are no frames."""
        return self.optimum.reweighting_ess * self.n_pooled

    def facts(self) -> dict[str, Any]:
        """All of it, JSON-safe: what is not a finite number is null."""
        o = self.optimum
        best = int(o.ess.argmax())
        curves = ("temperatures", "fidelity", "diversity", "covariance", "variance", "ess", "n_effective", "trusted")
        return _plain(
            {
                "format": FORMAT,
                "temperature": self.temperature,
                "training_temperature": self.training_temperature,
                "t_star": None if o.t_star is None else o.t_star._asdict(),
                "t_prime": None if o.t_prime is None else o.t_prime._asdict(),
                "statement": o.statement,
                "highest_ess": {"t": float(o.temperatures[best]), "ess": float(o.ess[best])},
                "diagnostics": asdict(self.diagnostics),
                "closed_forms": {**asdict(self.closed), **_intervals(self.closed)},
                "checks": [asdict(check) for check in self.checks],
                "curves": {name: getattr(o, name).tolist() for name in curves},
                "left_out": o.left_out,
                "reweighting_ess": o.reweighting_ess,
                "confidence": o.confidence,
                "n": self.n,
                "n_pooled": self.n_pooled,
                "n_effective": self.n_effective,
                "n_energy_evaluations": self.n_energy_evaluations,
            }
        )


def _intervals(closed: ClosedForms) -> dict[str, Any]:
    found = {name: getattr(closed, name) for name in ("t_prime", "virial", "t_star")}
    return {name: None if value is None else value._asdict() for name, value in found.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- the search -------------------------------------------------------------------------------------------------------


def tune_flow(
    flow: Flow, energy: Energy, temperature: Any, *, frames: Frames | Samples | None = None, n: int = 3000,
    n_checked: int = 10_000, span: tuple[float, float] = SPAN, n_replicates: int = 200, generator: torch.Generator,
    progress: Progress | None = None,
) -> FlowTuning:  # fmt: skip
    """Find the sampling temperatures t* and t' of a flow for a target.

    Args:
        flow: of a kind that steers.
        energy: U [kJ/mol]; of a model system, in the unit of its temperatures.
        temperature: T of the target [K, or a Quantity].
        frames: of the target, at T, that the flow was not trained on; without, what they say is had by reweighting.
        n: draws at each of a dozen t or more.
        n_checked: draws at t = 1, t* and t', for diagnostics and ESS.
        span: lowest and highest t that is looked at.
        n_replicates: of the bootstrap.
        generator: of the draws.
        progress: told of the draws.

    Raises:
        ValueError: a flow that does not steer, too few draws, a span without 1, frames of another temperature, or draws
            at T that are nearly all clashes.
    """
    check_steers(flow)
    kelvin = to_kelvin(temperature)
    for name, number in (("n", n), ("n_checked", n_checked)):
        if number < FEWEST_DRAWS:
            raise ValueError(f"{name} = {number} draws are too few to tune by; at least {FEWEST_DRAWS} are needed")
    levels, gaussian = sampling_levels(flow, kelvin, span), is_gaussian(flow)
    grid = torch.logspace(*(math.log10(t) for t in span), ON_GRID, dtype=torch.float64)
    held_out = None if frames is None else held_out_scores(flow, kelvin, frames, generator)
    total, spent = n * (len(levels) - 1) + 3 * n_checked, 0

    def drawn_at(t: float, size: int) -> TemperedDraws:
        nonlocal spent
        draws = tempered_draws(flow, energy, kelvin, t, size, generator=generator, virial=gaussian)
        spent += size
        if progress is not None:
            progress(spent, total, f"{kelvin * t:.4g} K")
        return draws

    first = drawn_at(1.0, n_checked)
    scores = None if held_out is None else held_out.energies
    diagnostics = temperature_diagnostics(first.scored, held_out=scores, n_replicates=max(n_replicates, 2))
    draws = [first if t == 1.0 else drawn_at(t, n) for t in levels]
    pool = pooled_draws(flow, kelvin, draws)
    optimum = optimal_sampling_temperature(pool, temperatures=grid, held_out=scores, n_replicates=n_replicates)
    roots = {"t*": optimum.t_star, "t'": optimum.t_prime}
    further = {name: (root.value, drawn_at(root.value, n_checked)) for name, root in roots.items() if root is not None}
    checks = tuple(_check(name, kelvin, t, d) for name, (t, d) in {"as trained": (1.0, first), **further}.items())
    closed = _closed_forms(flow, kelvin, held_out, first)
    if gaussian:
        virials = torch.cat([d.virial for d in draws])
        closed = replace(closed, t_star=virial_root(virials, pool, closed.dim, grid))
    return FlowTuning(kelvin, flow.training_temperature, diagnostics, optimum, closed, checks, n, len(pool), spent)


def _check(name: str, temperature: float, t: float, draws: TemperedDraws) -> Check:
    kept = unclashed(draws.scored)
    off = float(torch.isinf(draws.energy).double().mean())
    ess = effective_sample_size(draws.log_weights)
    error = 0.0
    if ess > 0.0:
        error = float(bootstrap(draws.log_weights, lambda w: w.sum() ** 2 / (w * w).sum(), n_replicates=100).std())
    return Check(
        name, t, temperature * t, ess, error / len(draws), largest_weight_share(draws.log_weights),
        float(draws.energy[kept].mean()), off, 1.0 - off - float(kept.double().mean()),
    )  # fmt: skip


def _closed_forms(flow: Flow, temperature: float, held_out: HeldOut | None, first: TemperedDraws) -> ClosedForms:
    """All but t*, which takes draws at other t."""
    dim = flow.prior.dim
    virial = None if first.virial is None else virial_ratio(first.virial, first.scored, dim)
    t_prime = None if held_out is None else closed_t_prime(flow, temperature, held_out)
    return ClosedForms(dim, latent_moments(flow, temperature, 1.0)[1], t_prime, virial, None)
