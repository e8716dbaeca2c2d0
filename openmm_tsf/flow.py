"""The flow: a steerable prior behind a map of constant Jacobian. `flow.at(T)` is the only door for temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .geometry import wrap
from .internals import FlatInternals
from .priors import MolecularPrior, SteeredPrior
from .systems import Molecule
from .trajectories import Frames
from .transforms import CircleCoupling, Compose, LineCoupling, Standardise
from .typing import Mask, Positions, Scalars, Transform, Vectors
from .units import to_kelvin
from .zmatrix import ZMatrix, build_zmatrix


@dataclass(frozen=True)
class FlowSettings:
    """Architecture of a flow. The defaults are meant for alanine dipeptide and its like.

    Attributes:
        blocks: number of blocks of couplings.
        hidden, depth: width and number of hidden layers of every conditioner.
        energy_order: largest harmonic of the torsion potentials.
        entropy_order: largest harmonic of the entropies; 0 leaves them out.
        volume_preserving: False gives plain real-NVP couplings, which do not steer; for comparison only.
    """

    blocks: int = 6
    hidden: int = 80
    depth: int = 2
    energy_order: int = 6
    entropy_order: int = 4
    volume_preserving: bool = True

    def __post_init__(self) -> None:
        for name in ("blocks", "hidden", "depth", "energy_order"):
            if getattr(self, name) < 1:
                raise ValueError(f"flow setting {name} must be at least 1, not {getattr(self, name)}")
        if self.entropy_order < 0:
            raise ValueError(f"flow setting entropy_order must be at least 0, not {self.entropy_order}")


class Flow(nn.Module):
    """A temperature-steerable flow of one molecule: `Flow(prior, transform, internals=..., ...)`, used as `flow.at(T)`.

    Args:
        prior: latent density with `at(tau)`, tau = T / training_temperature.
        transform: latents (batch, D) to internals (batch, D).
        internals: internals to positions, with the chart.
        molecule: the molecule.
        training_temperature: the temperature [K] that is tau = 1.
        settings: the architecture, kept for checkpoints.

    Steering is exact, q_T(x) = exp(-E(x)/kT)/Z(T), when the Jacobian of `transform` is constant
    (Dibak, Klein, Noe, arXiv 2012.00429, eq. 4).
    """

    def __init__(
        self, prior: MolecularPrior, transform: Transform, *, internals: FlatInternals, molecule: Molecule,
        training_temperature: float, settings: FlowSettings,
    ) -> None:  # fmt: skip
        super().__init__()
        self.prior, self.transform, self.internals = prior, transform, internals
        self.molecule, self.settings = molecule, settings
        self.training_temperature = to_kelvin(training_temperature)

    @property
    def zmatrix(self) -> ZMatrix:
        return self.internals.zmatrix

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def dtype(self) -> torch.dtype:
        return self.prior.like.dtype

    def at(self, temperature: Any) -> SteeredFlow:
        """The density at a temperature [K, or a Quantity].

        Raises:
            ValueError: the temperature is not finite and above zero.
        """
        return SteeredFlow(self, to_kelvin(temperature))

    def __repr__(self) -> str:
        return (
            f"Flow({self.molecule.name}, {self.internals.dim} degrees of freedom, trained at "
            f"{self.training_temperature:g} K, {self.n_parameters} parameters)"
        )


@dataclass(frozen=True, repr=False)
class SteeredFlow:
    """A `Flow` at one temperature [K]: draws positions [nm] and scores any frame [nat].

    log_prob is the density in flat internals, which is the Cartesian one with rigid motions integrated out.

    Attributes:
        explore: share of the draws whose backbone torsions come from a hotter density, see `exploring`.
    """

    flow: Flow
    temperature: float
    explore: float = 0.0

    def exploring(self, share: float) -> SteeredFlow:
        """The same density with a share of the draws spread over all basins of the backbone.

        It is scored as such, so weights are as exact as before. A basin that holds 0.1 % of the molecule then gets
        enough draws for an error worth having; the others pay with about that share of their ESS.

        Raises:
            ValueError: the share is not in 0 <= share < 1.
        """
        self.flow.prior.at(1.0, explore=share)
        return replace(self, explore=share)

    @property
    def prior(self) -> SteeredPrior:
        """The latent density at this temperature."""
        return self.flow.prior.at(self.temperature / self.flow.training_temperature, explore=self.explore)

    def log_prob(self, x: Positions) -> Scalars:
        """ln q(x) [nat] of positions (batch, atoms, 3) [nm]; -inf off the chart. Rigid motions do not matter.

        Raises:
            ValueError: wrong number of atoms, or positions that are not finite.
        """
        if not torch.isfinite(x).all():
            bad = torch.nonzero(~torch.isfinite(x).flatten(1).all(1))[:, 0]
            raise ValueError(f"{len(bad)} of {len(x)} frames are not finite, the first at index {int(bad[0])}")
        q, _ = self.flow.internals.inverse(x.to(self.flow.dtype))
        inside = self.flow.internals.chart(q)
        return torch.where(inside, self.log_prob_internals(q), -torch.inf).to(x.dtype)

    def log_prob_internals(self, q: Vectors) -> Scalars:
        """ln q [nat] of internals (batch, D), wherever they are."""
        z, log_det = self.flow.transform.inverse(q)
        return self.prior.log_prob(z) + log_det

    def sample_internals(self, n: int, *, generator: torch.Generator) -> tuple[Vectors, Scalars]:
        """n raw draws of internals (n, D), also off the chart, and their ln q; differentiable."""
        z, log_prob = self.prior.sample(n, generator=generator)
        q, log_det = self.flow.transform(z)
        return q, log_prob - log_det

    @torch.no_grad()
    def propose(self, n: int, *, generator: torch.Generator) -> tuple[Positions, Scalars, Mask]:
        """n raw draws: positions (n, atoms, 3) [nm] (NaN off the chart), ln q [nat], and which are on the chart."""
        q, log_prob = self.sample_internals(n, generator=generator)
        x, inside = self._placed(q)
        return x, log_prob, inside

    def _placed(self, q: Vectors) -> tuple[Positions, Mask]:
        """Positions of internals, NaN off the chart, and which are on it."""
        inside = self.flow.internals.chart(q)
        x = q.new_full((len(q), self.flow.internals.n_atoms, 3), torch.nan)
        x[inside] = self.flow.internals(q[inside])[0]
        return x, inside

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator) -> tuple[Positions, Scalars]:
        """n draws on the chart: positions (n, atoms, 3) [nm] and their ln q [nat].

        Raises:
            RuntimeError: hardly any draw is on the chart.
        """
        xs, logs, have, tried = [], [], 0, 0
        while have < n:
            x, log_prob, inside = self.propose(min(max(n - have, 64), 16384), generator=generator)
            tried, have = tried + len(x), have + int(inside.sum())
            xs.append(x[inside])
            logs.append(log_prob[inside])
            if tried > 1000 * (have + 1) + 10_000:
                raise RuntimeError(
                    f"only {have} of {tried} draws are on the chart at {self.temperature:g} K; train longer"
                )
        if not xs:
            return self.propose(0, generator=generator)[:2]
        return torch.cat(xs)[:n], torch.cat(logs)[:n]

    @property
    def latent_scale(self) -> Tensor:
        """(D,) widths of a unit step of the latent walk: sqrt(tau) on lines, 1 on circles."""
        prior = self.prior
        scale = prior.prior.like.new_ones(prior.prior.dim)
        scale[: prior.prior.n_stiff] = math.sqrt(prior.tau)
        return scale

    @torch.no_grad()
    def score(self, x: Positions, *, generator: torch.Generator | None = None) -> Scalars:
        """`log_prob`, without its gradient; the generator is for flows with momenta."""
        return self.log_prob(x)

    @torch.no_grad()
    def to_latents(self, x: Positions, *, generator: torch.Generator | None = None) -> tuple[Vectors, Scalars]:
        """Latents (batch, D) of positions (batch, atoms, 3) [nm], and ln|det| from there, -inf off the chart."""
        q, _ = self.flow.internals.inverse(x.to(self.flow.dtype))
        z, log_det = self.flow.transform.inverse(q)
        return z, torch.where(self.flow.internals.chart(q), -log_det, -torch.inf)

    @torch.no_grad()
    def from_latents(self, z: Vectors) -> tuple[Positions, Scalars, Mask]:
        """Positions [nm] (NaN off the chart) of latents, ln|det| from there, and which are on the chart.

        Torsions among the latents are wrapped, stiff ones among the internals are not: beyond their branch is off the
        chart.
        """
        n_stiff = self.flow.prior.n_stiff
        q, log_det = self.flow.transform(torch.cat((z[:, :n_stiff], wrap(z[:, n_stiff:])), 1))
        x, inside = self._placed(q)
        return x, log_det, inside

    def log_constraint_factor(self, x: Positions, masses: Tensor | None = None) -> Scalars:
        """ln det Zc / 2 of positions (batch, atoms, 3), to be added to log weights; zero without constraints."""
        return self.flow.internals.log_constraint_factor(x, masses)

    def __repr__(self) -> str:
        return f"{self.flow!r} at {self.temperature:g} K"


def build_flow(
    molecule: Molecule, frames: Frames, settings: FlowSettings | None = None, *,
    training_temperature: Any = None, zmatrix: ZMatrix | None = None, generator: torch.Generator,
) -> Flow:  # fmt: skip
    """An untrained flow whose stiff coordinates have the mean and covariance of the frames given.

    Args:
        molecule: the molecule.
        frames: of the molecule, each with its temperature.
        settings: the architecture.
        training_temperature: the temperature [K, or a Quantity] that is tau = 1; by default the highest of the frames.
        zmatrix: another z-matrix than the automatic one.
        generator: source of the starting weights.

    Raises:
        ValueError: frames of another isomer, or fewer than it takes for a covariance.
    """
    internals = FlatInternals(molecule, zmatrix or build_zmatrix(molecule))
    q, kept = internals.of_frames(frames.positions)
    hottest = frames.temperatures.max()
    training_temperature = to_kelvin(hottest if training_temperature is None else training_temperature)
    stiff = q[kept][:, ~internals.circular]
    if len(stiff) < 2 * stiff.shape[1]:
        raise ValueError(
            f"{len(stiff)} frames are too few for {stiff.shape[1]} stiff coordinates; give at least twice as many"
        )
    tau = torch.tensor(frames.temperatures)[kept] / training_temperature
    mean = stiff.mean(0)
    scaled = (stiff - mean) / tau.sqrt()[:, None]
    values, vectors = torch.linalg.eigh(scaled.T @ scaled / len(scaled))
    # the symmetric root mixes coordinates as little as a root can
    matrix = (vectors * values.clamp_min(1e-12 * values.max()).sqrt()) @ vectors.T
    seed = int(torch.randint(2**31, (1,), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return assemble_flow(internals, molecule, settings or FlowSettings(), training_temperature, mean, matrix)


def assemble_flow(
    internals: FlatInternals, molecule: Molecule, settings: FlowSettings, training_temperature: float, mean: Tensor,
    matrix: Tensor,
) -> Flow:  # fmt: skip
    """The modules of a flow, with weights from torch's global generator."""
    n_soft = int(internals.circular.sum())
    n_stiff = internals.dim - n_soft
    groups = _torsion_groups(internals)
    prior = MolecularPrior(n_stiff, groups, energy_order=settings.energy_order, entropy_order=settings.entropy_order)
    size = {"hidden": settings.hidden, "depth": settings.depth}
    line = {**size, "volume_preserving": settings.volume_preserving}
    layers: list[nn.Module] = []
    if n_stiff and n_soft:
        layers.append(LineCoupling(n_stiff, n_soft, range(n_stiff), **line))  # the stiff ones given the torsions alone
    for _ in range(settings.blocks):
        halves = torch.randperm(n_stiff).tensor_split(2) if n_stiff > 1 else ()
        layers += [LineCoupling(n_stiff, n_soft, half.tolist(), **line) for half in halves]
        turned = [[i for g in groups[k::2] for i in g] for k in range(2)]
        layers += [CircleCoupling(n_stiff, n_soft, change, **size) for change in turned if change]
    transform = Compose([*layers, Standardise(mean, matrix, internals.circular)])
    flow = Flow(
        prior, transform, internals=internals, molecule=molecule, training_temperature=training_temperature,
        settings=settings,
    )  # fmt: skip
    return flow.double()


def _torsion_groups(internals: FlatInternals) -> list[tuple[int, ...]]:
    """Soft torsions by prior factor: phi and psi of a residue together, every other one alone."""
    z = internals.zmatrix
    first = internals.dim - len(z.rows)
    soft = [row for row, circular in zip(z.rows, internals.circular[first:].tolist(), strict=True) if circular]
    axes = [{z.labels[row.bond], z.labels[row.angle]} for row in soft]
    groups, used = [], set()
    for i, axis in enumerate(axes):
        if i in used:
            continue
        residue = next((label.rsplit("-", 1)[0] for label in axis if label.endswith("-CA")), None)
        phi, psi = {f"{residue}-N", f"{residue}-CA"}, {f"{residue}-CA", f"{residue}-C"}
        partner = psi if axis == phi else phi if axis == psi else None
        mates = [j for j in range(i + 1, len(soft)) if axes[j] == partner]
        groups.append(((*mates, i) if axis == psi else (i, *mates)) if mates else (i,))
        used.update(groups[-1])
    return groups
