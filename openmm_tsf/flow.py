"""The flow: a steerable prior behind a map of constant Jacobian. `flow.at(T)` is the only door for temperature."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import FlowSettings, build_modules, cannot_explore
from .cuts import CutInternals, cut_open
from .internals import FlatInternals
from .priors import MolecularPrior, SteeredPrior
from .proposals import VectorFlow
from .systems import Molecule
from .trajectories import Frames
from .typing import Mask, Scalars, Transform, Vectors
from .units import kT, to_kelvin
from .vectors import Configurations, LineCoordinates, Samples
from .zmatrix import ZMatrix, build_zmatrix

Coordinates = FlatInternals | CutInternals | LineCoordinates


class Flow(nn.Module):
    """A temperature-steerable flow of one molecule: `Flow(prior, transform, internals=..., ...)`, used as `flow.at(T)`.

    Or of a model system of plain vectors, with `LineCoordinates` for internals and no molecule; temperatures then have
    the unit of the energy.

    Args:
        prior: latent density with `at(tau)`, tau = T / training_temperature.
        transform: latents (batch, D + n_momenta) to internals and momenta (batch, D + n_momenta).
        internals: internals to positions, with the chart.
        molecule: the molecule; None for a model system.
        training_temperature: the temperature [K] that is tau = 1.
        settings: the architecture, kept for checkpoints.

    Steering is exact, q_T(x, p) = exp(-E(x, p)/kT)/Z(T), when the Jacobian of `transform` is constant
    (Dibak, Klein, Noe, arXiv 2012.00429, eq. 4).
    """

    def __init__(
        self, prior: MolecularPrior, transform: Transform, *, internals: Coordinates,
        molecule: Molecule | None, training_temperature: float, settings: FlowSettings,
    ) -> None:  # fmt: skip
        super().__init__()
        self.prior, self.transform, self.internals = prior, transform, internals
        self.molecule, self.settings = molecule, settings
        self.training_temperature = to_kelvin(training_temperature)

    @property
    def zmatrix(self) -> ZMatrix | None:
        return self.internals.zmatrix

    @property
    def n_momenta(self) -> int:
        """Number of momenta N(0, tau) that come along with the coordinates."""
        return self.prior.dim - self.internals.dim

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

    def kT(self, temperature: Any) -> Any:
        """Thermal energy of a temperature: [kJ/mol] of one in K, or for a model system the temperature itself."""
        return temperature if self.molecule is None else kT(temperature)

    def __repr__(self) -> str:
        name, unit = ("vectors", "") if self.molecule is None else (self.molecule.name, " K")
        momenta = " and as many momenta" if self.n_momenta else ""
        return (
            f"Flow({name}, {self.internals.dim} degrees of freedom{momenta}, trained at "
            f"{self.training_temperature:g}{unit}, {self.n_parameters} parameters)"
        )


@dataclass(frozen=True, repr=False)
class SteeredFlow:
    """A `Flow` at one temperature [K]: draws positions [nm] and scores any frame [nat].

    log_prob is the density in flat internals, which is the Cartesian one with rigid motions integrated out. With
    momenta it is ln q(x, p) - ln N(p; 0, tau) for p fresh from the generator: weights are as exact, but the number is
    not the marginal density of x (`is_marginal`), and on average it is lower.

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
            ValueError: the share is not in 0 <= share < 1, or not 0 for a kind of flow that cannot.
        """
        if share and not self.flow.settings.explores:
            raise ValueError(f"explore = {share:g} is not possible: {cannot_explore(self.flow.settings)}; take 0")
        self.flow.prior.at(1.0, explore=share)
        return replace(self, explore=share)

    @property
    def prior(self) -> SteeredPrior:
        """The latent density at this temperature."""
        return self.flow.prior.at(self.temperature / self.flow.training_temperature, explore=self.explore)

    @property
    def vectors(self) -> VectorFlow:
        """The same density on internals, where they are one to one or not."""
        flow, prior = self.flow, self.prior
        circular = torch.arange(flow.prior.dim, device=flow.prior.like.device) >= flow.prior.n_stiff
        return VectorFlow(prior, flow.transform, tau=prior.tau, n_momenta=flow.n_momenta, circular=circular)

    @property
    def is_marginal(self) -> bool:
        """Whether `log_prob` is the density of x alone, the same number every time; not with momenta."""
        return self.flow.n_momenta == 0

    def log_prob(self, x: Configurations, *, generator: torch.Generator | None = None) -> Scalars:
        """ln q(x) [nat] of positions (batch, atoms, 3) [nm]; -inf off the chart. Rigid motions do not matter.

        Raises:
            ValueError: wrong number of atoms, positions that are not finite, or momenta without a generator.
        """
        q, inside = self._internals(x)
        log_prob = self.vectors.log_prob(q, generator=generator)
        return torch.where(inside, log_prob, -torch.inf).to(x.dtype)

    def joint_log_prob(self, x: Configurations, p: Vectors) -> Scalars:
        """ln q(x, p) [nat] of positions and momenta (batch, n_momenta), the density that steers; -inf off the chart.

        Raises:
            ValueError: wrong number of atoms or momenta, or positions that are not finite.
        """
        if p.shape != (len(x), self.flow.n_momenta):
            raise ValueError(f"momenta have shape {tuple(p.shape)}; expected {(len(x), self.flow.n_momenta)}")
        q, inside = self._internals(x)
        log_prob = self.vectors.joint_log_prob(torch.cat((q, p.to(q)), 1))
        return torch.where(inside, log_prob, -torch.inf).to(x.dtype)

    def _internals(self, x: Configurations) -> tuple[Vectors, Mask]:
        """Internals of positions, and which are on the chart."""
        if not torch.isfinite(x).all():
            bad = torch.nonzero(~torch.isfinite(x).flatten(1).all(1))[:, 0]
            raise ValueError(f"{len(bad)} of {len(x)} frames are not finite, the first at index {int(bad[0])}")
        q, _ = self.flow.internals.inverse(x.to(self.flow.dtype))
        return q, self.flow.internals.chart(q)

    def log_prob_internals(self, q: Vectors, *, generator: torch.Generator | None = None) -> Scalars:
        """ln q [nat] of internals (batch, D), wherever they are; the generator is for momenta, as in `log_prob`."""
        return self.vectors.log_prob(q, generator=generator)

    @torch.no_grad()
    def propose(self, n: int, *, generator: torch.Generator) -> tuple[Configurations, Scalars, Mask]:
        """n raw draws: positions (n, atoms, 3) [nm] (NaN off the chart), ln q [nat], and which are on the chart."""
        q, log_prob, _ = self.vectors.propose(n, generator=generator)
        x, inside = self.placed(q)
        return x, log_prob, inside

    def placed(self, q: Vectors) -> tuple[Configurations, Mask]:
        """Positions of internals, NaN off the chart, and which are on it."""
        inside = self.flow.internals.chart(q)
        placed, _ = self.flow.internals(q[inside])
        x = q.new_full((len(q), *placed.shape[1:]), torch.nan)
        x[inside] = placed
        return x, inside

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator) -> tuple[Configurations, Scalars]:
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
        """(D + n_momenta,) widths of a unit step of the latent walk: sqrt(tau) on lines, 1 on circles."""
        return self.vectors.latent_scale

    @torch.no_grad()
    def score(self, x: Configurations, *, generator: torch.Generator | None = None) -> Scalars:
        """`log_prob`, without its gradient."""
        return self.log_prob(x, generator=generator)

    @torch.no_grad()
    def to_latents(self, x: Configurations, *, generator: torch.Generator | None = None) -> tuple[Vectors, Scalars]:
        """Latents z of positions x (batch, atoms, 3) [nm], and ln|det| from there; see `VectorFlow.to_latents`.

        The second is -inf off the chart.
        """
        q, inside = self._internals(x)
        z, log_volume = self.vectors.to_latents(q, generator=generator)
        return z, torch.where(inside, log_volume, -torch.inf)

    @torch.no_grad()
    def from_latents(self, z: Vectors) -> tuple[Configurations, Scalars, Mask]:
        """Positions [nm] (NaN off the chart) of latents, ln|det| from there, and which are on the chart.

        Torsions among the latents are wrapped, stiff ones among the internals are not: beyond their branch is off the
        chart.
        """
        q, log_volume, _ = self.vectors.from_latents(z)
        x, inside = self.placed(q)
        return x, log_volume, inside

    def log_constraint_factor(self, x: Configurations, masses: Tensor | None = None) -> Scalars:
        """ln det Zc / 2 of positions (batch, atoms, 3), to be added to log weights; zero without constraints."""
        return self.flow.internals.log_constraint_factor(x, masses)

    def __repr__(self) -> str:
        return f"{self.flow!r} at {self.temperature:g}{'' if self.flow.molecule is None else ' K'}"


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
    settings = settings or FlowSettings()
    internals: Coordinates = FlatInternals(molecule, zmatrix or build_zmatrix(molecule))
    if settings.on_lines:
        q, kept = internals.of_frames(frames.positions)
        internals = cut_open(internals, q[kept])
    return _started(internals, molecule, settings, frames, training_temperature, generator)


def build_vector_flow(
    dim: int, samples: Samples, settings: FlowSettings | None = None, *, training_temperature: float | None = None,
    generator: torch.Generator,
) -> Flow:  # fmt: skip
    """An untrained flow of a model system of plain vectors, with the mean and covariance of the samples given.

    It is used and trained like the flow of a molecule; temperatures have the unit of the energy.

    Args:
        dim: d, number of coordinates.
        samples: each with its temperature.
        settings: the architecture.
        training_temperature: the temperature that is tau = 1; by default the highest of the samples.
        generator: source of the starting weights.

    Raises:
        ValueError: samples of another dimension, or fewer than it takes for a covariance.
    """
    return _started(
        LineCoordinates(dim), None, settings or FlowSettings(), samples, training_temperature, generator
    )  # fmt: skip


def _started(
    internals: Coordinates, molecule: Molecule | None, settings: FlowSettings, frames: Frames | Samples,
    training_temperature: Any, generator: torch.Generator,
) -> Flow:  # fmt: skip
    """A flow whose coordinates on lines have the mean and covariance of the frames."""
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
        return assemble_flow(internals, molecule, settings, training_temperature, mean, matrix)


def assemble_flow(
    internals: Coordinates, molecule: Molecule | None, settings: FlowSettings, training_temperature: float,
    mean: Tensor, matrix: Tensor,
) -> Flow:  # fmt: skip
    """The modules of a flow, with weights from torch's global generator."""
    groups = _torsion_groups(internals)
    prior, transform = build_modules(settings, internals.circular, groups, mean, matrix)
    flow = Flow(
        prior, transform, internals=internals, molecule=molecule, training_temperature=training_temperature,
        settings=settings,
    )  # fmt: skip
    return flow.double()


def flow_digest(flow: Flow) -> str:
    """Short hash of all numbers of a flow."""
    digest = hashlib.sha256(repr((flow.training_temperature, flow.zmatrix)).encode())
    for name, tensor in sorted(flow.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _torsion_groups(internals: Coordinates) -> list[tuple[int, ...]]:
    """Soft torsions by prior factor: phi and psi of a residue together, every other one alone."""
    z = internals.zmatrix
    if z is None:
        return []
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
