"""Flows of double wells: made and trained at one temperature, scored at all others against the exact density."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .architecture import FlowSettings
from .flow import Flow, build_vector_flow
from .potentials import QuarticPotentials
from .training import Progress, TrainingSettings, train
from .transforms import Standardise
from .typing import Steerable, Vectors
from .vectors import Samples
from .wells import DoubleWells, TemperedSamples

LATE = 0.25
"""Share of the samples that flows are scored on, and never see."""
N_MARGINALS, N_BINS = 5, 80
"""Coordinates whose marginals are kept, and bins of each."""
ROUNDS = 3
"""Of rotation and potentials in turn; more change nothing."""
DOUBLE_WELL = (0.0, -1.5, 0.0, -1.0)
"""Where the fit of potentials starts: c1, c2, c3 and raw c4 of two wells 2.5 apart."""


@dataclass(frozen=True)
class Score:
    """How well a flow describes the samples of one temperature; all but the first in nat.

    Args:
        temperature: of samples, flow and exact density.
        exact: nll of the exact density, its entropy.
        nll, nll_error: -E[log_prob] and its standard error.
        excess, excess_error: E[ln p - log_prob] on the same samples: nll - exact without most of the noise.

    Errors take the samples for independent.
    """

    temperature: float
    exact: float
    nll: float
    nll_error: float
    excess: float
    excess_error: float


@torch.no_grad()
def score(
    flow: Steerable, wells: DoubleWells, samples: TemperedSamples, temperatures: Sequence[float], *,
    generator: torch.Generator,
) -> list[Score]:  # fmt: skip
    """Score a flow at each of the temperatures.

    Of flows with momenta `log_prob` is ln q(x, p) - ln N(p; 0, tau) with p fresh from the generator, so that nll is an
    upper bound of that of x, as close as the flow keeps momenta apart.

    Args:
        flow: of vectors of as many dimensions.
        wells: the system.
        samples: of the system, at these temperatures and maybe others.
        temperatures: where.
        generator: of momenta.
    """
    rows = []
    for temperature in temperatures:
        x, exact = samples.at(temperature).double(), wells.at(temperature)
        log_q = flow.at(temperature).log_prob(x, generator=generator)
        gap = exact.log_prob(x) - log_q
        root = len(x) ** 0.5
        numbers = -log_q.mean(), log_q.std() / root, gap.mean(), gap.std() / root
        rows.append(Score(temperature, exact.entropy, *map(float, numbers)))
    return rows


def trained(
    wells: DoubleWells, x: Vectors, settings: FlowSettings, training: TrainingSettings, *, temperature: float = 1.0,
    seed: int, progress: Progress | None = None,
) -> Flow:  # fmt: skip
    """A flow trained on samples x (n, d) and energies of one temperature.

    Args:
        wells: the system.
        x: samples at the temperature, latest last.
        settings: the architecture. Of kind "anharmonic" without momenta, `unmix` comes before the training.
        training: how to train.
        temperature: of the samples and of the energy loss.
        seed: of starting weights, batches and draws.
        progress: as in `train`.
    """
    samples = Samples(x.numpy(), temperature)
    generator = torch.Generator().manual_seed(seed)
    flow = build_vector_flow(wells.dim, samples, settings, training_temperature=temperature, generator=generator)
    if flow.prior.stiff is not None and flow.n_momenta == 0:
        early, _ = samples.split(training.held_out)
        unmix(flow, torch.tensor(early.positions).double())
    with tempfile.TemporaryDirectory() as folder:
        train(flow, samples, wells, training, directory=folder, seed=seed, progress=progress)
    return flow


def study(
    wells: DoubleWells, samples: TemperedSamples, settings: FlowSettings, training: TrainingSettings, *,
    temperatures: Sequence[float], seed: int, progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train a flow on the early samples of T = 1 and score it on the late ones of each temperature.

    What comes of it is what JSON can hold; `marginals` in it has histograms of the first coordinates of as many draws
    as there are samples, at the lowest temperature, at 1 and at the highest.
    """
    begin, (early, late) = time.perf_counter(), samples.split(LATE)
    flow = trained(wells, early.at(1.0), settings, training, seed=seed, progress=progress)
    seconds, generator = time.perf_counter() - begin, torch.Generator().manual_seed(seed)
    scores = score(flow, wells, late, temperatures, generator=generator)
    histograms = {}
    for temperature in (samples.temperatures[0], 1.0, samples.temperatures[-1]):
        x, _ = flow.at(temperature).sample(samples.x.shape[1], generator=generator)
        histograms[f"{temperature:g}"] = marginals(x, edges(samples, temperature))
    return {
        "dim": wells.dim, "kind": settings.kind, "seed": seed, "n_parameters": flow.n_parameters, "seconds": seconds,
        "steps": training.steps, "scores": [asdict(row) for row in scores], "marginals": histograms,
    }  # fmt: skip


def edges(samples: TemperedSamples, temperature: float) -> Float[Tensor, "coordinates edges"]:
    """Bins of the marginals of the first coordinates at a temperature: just beyond the samples."""
    x = samples.at(temperature)[:, :N_MARGINALS].double()
    low, high = x.amin(0), x.amax(0)
    reach = 0.05 * (high - low)
    return torch.stack([torch.linspace(*ends, N_BINS + 1) for ends in zip(low - reach, high + reach, strict=True)])


def marginals(x: Vectors, bins: Float[Tensor, "coordinates edges"]) -> list[list[float]]:
    """Densities of the first coordinates of x (n, d) in bins; what lies beyond them counts in the number."""
    found = []
    for column, knots in zip(x.T, bins, strict=False):
        counts = torch.histogram(column.to(knots).cpu(), knots)[0]
        found.append((counts / (len(x) * (knots[1:] - knots[:-1]))).tolist())
    return found


# --- independent components -------------------------------------------------------------------------------------------


@torch.no_grad()
def unmix(flow: Flow, x: Vectors) -> None:
    """Turn the latents of an untrained flow to the independent components of samples, and fit their potentials.

    A covariance has as many roots as there are rotations; this picks the one whose latents are least Gaussian, by the
    fixed-point iteration of independent component analysis, first with cubes, then with the slopes of the quartic
    potentials that fit best.

    Args:
        flow: without momenta or torsions, with quartic potentials; changed in place, by its prior and its first map.
        x: (n, d) samples at the training temperature.

    Raises:
        ValueError: a flow that has no such prior.

    Source: A. Hyvarinen, IEEE Trans. Neural Netw. 10, 626 (1999), symmetric FastICA.
    """
    potentials, standardise = flow.prior.stiff, flow.transform.transforms[-1]
    if potentials is None or flow.prior.n_soft or flow.n_momenta or not isinstance(standardise, Standardise):
        raise ValueError("only a flow of quartic potentials, without torsions and momenta, can be unmixed")
    u, _ = standardise.inverse(x.to(flow.dtype))
    rotation, slope = torch.eye(u.shape[1], dtype=u.dtype), lambda v: (v**3, 3.0 * v * v)
    potentials.coefficients.copy_(torch.tensor(DOUBLE_WELL[:3])[:, None].expand(-1, potentials.n))
    potentials.quartic.fill_(DOUBLE_WELL[3])
    for _ in range(ROUNDS):
        rotation = _independent(u, rotation, slope)
        origin = fit_potentials(potentials, u @ rotation)
        slope = lambda v, origin=origin: potentials.derivatives(v - origin)  # noqa: E731
    standardise.matrix.copy_(standardise.matrix @ rotation)
    standardise.mean.add_(standardise.matrix @ origin)


Slopes = Callable[[Tensor], tuple[Tensor, Tensor]]
"""First and second derivatives of potentials, functions of latents (n, d)."""


def _independent(
    u: Vectors, rotation: Float[Tensor, "dim dim"], slope: Slopes, *, most: int = 200
) -> Float[Tensor, "dim dim"]:
    """Rotation that makes the columns of u (n, d), of unit covariance, independent: a fixed point."""
    for _ in range(most):
        first, second = slope(u @ rotation)
        left, _, right = torch.linalg.svd(u.T @ first / len(u) - rotation * second.mean(0))
        new = left @ right
        change = float((1.0 - (new * rotation).sum(0).abs()).max())
        rotation = new
        if change < 1e-10:
            break
    return rotation


@torch.enable_grad()
def fit_potentials(potentials: QuarticPotentials, v: Vectors) -> Float[Tensor, " dim"]:
    """Maximum likelihood of quartic potentials at tau = 1, in place and from where they are, by L-BFGS.

    The cubic coefficients stay: where they are 0, a polynomial of fourth degree is known by its origin instead.

    Args:
        potentials: of n coordinates.
        v: (samples, n).

    Returns:
        the origin (n,): v - origin is what the potentials are of.
    """
    origin = torch.zeros(potentials.n, dtype=v.dtype, requires_grad=True)
    parameters = [*potentials.parameters(), origin]
    optimiser = torch.optim.LBFGS(parameters, max_iter=100, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = (potentials(v - origin).mean(0) + potentials.log_z(1.0)).sum()
        value.backward()
        potentials.coefficients.grad[2] = 0.0
        return value

    optimiser.step(loss)
    optimiser.zero_grad()
    return origin.detach()
