"""A generator: decoder, score and diffusion, and the door through which its temperature enters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from openmm_tsf.checks import whole
from openmm_tsf.edg.decoders import Conditional, Decoder, GaussianDecoder, HamiltonianDecoder
from openmm_tsf.edg.diffusion import VariancePreserving
from openmm_tsf.edg.lattice import LatticeDecoder, LatticeScore
from openmm_tsf.edg.networks import Latents, Target, check_dim
from openmm_tsf.edg.pair_score import PairScore
from openmm_tsf.edg.pairs import PairDecoder
from openmm_tsf.edg.scores import EnergyScore, GaussianScore, PlainScore, Score
from openmm_tsf.typing import Vectors

DecoderKind = Literal["gaussian", "hamiltonian", "pairs"]
ScoreKind = Literal["gaussian", "plain", "energy", "variational", "pairs"]
ROUNDING = 1e-6
"""By how much, relatively, a temperature may be out of the range of training."""


class EDG(nn.Module):
    """An energy-based diffusion generator.

    Args:
        decoder: latents to x.
        score: of the encoder.
        diffusion: of the encoder; by default the one that the score has.
        settings: what `build_edg` made it of, for files.

    Attributes:
        temperatures: lowest and highest tau of its training, where temperature is an input; None before any.

    Raises:
        ValueError: decoder and score of different numbers of latents or components of x, only one of them conditioned
            on temperature, or another diffusion than that of the score.
    """

    def __init__(
        self, decoder: Decoder, score: Score, diffusion: VariancePreserving | None = None, *,
        settings: EDGSettings | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if decoder.latent_dim != score.latent_dim:
            raise ValueError(f"the decoder has {decoder.latent_dim} latents, the score {score.latent_dim}")
        if decoder.dim != score.dim:
            raise ValueError(f"x has {decoder.dim} components in the decoder, {score.dim} in the score")
        if getattr(score, "conditioned", decoder.conditioned) != decoder.conditioned:
            raise ValueError("temperature is an input of only one of decoder and score: give both the same conditioned")
        own = getattr(score, "diffusion", None) or diffusion or VariancePreserving()
        if diffusion not in (None, own):
            raise ValueError(f"the score was made for {own}, not for {diffusion}: leave the diffusion out")
        self.decoder, self.score, self.diffusion = decoder, score, own
        self.settings = settings
        self.temperatures: tuple[float, float] | None = None

    @property
    def dim(self) -> int:
        """Number of components of x."""
        return self.decoder.dim

    @property
    def latent_dim(self) -> int:
        """Number of latents."""
        return self.decoder.latent_dim

    @property
    def conditioned(self) -> bool:
        """Whether temperature is an input of the networks."""
        return self.decoder.conditioned

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next(self.parameters()).device

    def at(self, tau: float = 1.0) -> SampledEDG:
        """The generator at a temperature, as a multiple of that of training. What temperature does is learned, not
        exact: weights set it right.

        Raises:
            ValueError: not finite and above 0, not 1 for a generator without temperature as an input, or out of the
                range of its training.
        """
        if not (math.isfinite(tau) and tau > 0.0):
            raise ValueError(f"the temperature must be finite and above 0, not {tau:g}")
        if tau != 1.0 and not self.conditioned:
            raise ValueError(
                f"this generator knows one temperature, tau = 1, not {tau:g}; build it with conditioned=True, and "
                "train it over a range"
            )
        low, high = self.temperatures or (tau, tau)
        if not low * (1.0 - ROUNDING) <= tau <= high * (1.0 + ROUNDING):
            raise ValueError(
                f"this generator was trained from tau = {low:g} to {high:g}, and knows nothing of {tau:g}; train it "
                "over a range that has it"
            )
        return SampledEDG(self, float(tau))


@dataclass(frozen=True, eq=False)
class SampledEDG:
    """A generator at one temperature. Its density has no closed form: see `draws.draw` for weights."""

    edg: EDG
    tau: float

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator) -> tuple[Vectors, Latents]:
        """n draws: x (n, d) and the latents z_0 (n, d_z) that they came from."""
        _, x, z = self.decoded(n, generator=generator)
        return x, z

    @torch.no_grad()
    def decoded(self, n: int, *, generator: torch.Generator) -> tuple[Conditional, Vectors, Latents]:
        """n draws with the Gaussians that they were drawn from: x | z_0, x and z_0."""
        edg, options = self.edg, {"generator": generator, "dtype": self.edg.dtype, "device": generator.device}
        z = torch.randn(n, edg.latent_dim, **options).to(edg.device)
        xi = torch.randn(n, edg.dim, **options).to(edg.device)
        conditional = edg.decoder.conditional(z, self.taus(n))
        return conditional, conditional.sample(xi), z

    def taus(self, n: int) -> Tensor:
        """The temperature, n times."""
        return torch.full((n,), self.tau, dtype=self.edg.dtype, device=self.edg.device)


@dataclass(frozen=True)
class EDGSettings:
    """Architecture of a generator.

    Attributes:
        decoder: "gaussian", a network, "hamiltonian", dynamics of the target, or "pairs", for clusters of identical
            particles in relative coordinates; see `pairs`.
        score: "gaussian", "plain" or "energy", see `scores`; "variational" is "gaussian" without its correction, so
            that the encoder is that of a variational autoencoder; "pairs" goes with the decoder of this name.
        latent_dim: number of latents; by default as many as components of x.
        hidden, depth: width and number of hidden layers of every network.
        spread: standard deviation of x at the start, in its unit.
        width: of x given its latents, as a share of `spread`: at the start, by default 0.3, for as many components as
            there are latents ("gaussian"); or for good, by default 0.001, and the wider it is the less even weights
            are ("pairs").
        harmonics: sines and cosines of latents and of x that networks read, for targets with several peaks in a row;
            0 for none; see `networks.with_harmonics`.
        stages, leaps, step: of the dynamics ("hamiltonian"); stages also counts pushes ("pairs").
        conditioned: temperature is an input, for training over a range.
        lattice: rows and columns of the periodic lattice on whose sites x is, see `lattice`; with the decoder
            "gaussian" and the scores "gaussian" and "variational".
    """

    decoder: DecoderKind = "gaussian"
    score: ScoreKind = "gaussian"
    latent_dim: int | None = None
    hidden: int = 64
    depth: int = 3
    spread: float = 1.0
    width: float | None = None
    harmonics: int = 0
    stages: int = 5
    leaps: int = 1
    step: float = 0.05
    conditioned: bool = False
    lattice: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.width is None:
            object.__setattr__(self, "width", 0.001 if self.decoder == "pairs" else 0.3)
        for name, kinds in (("decoder", DecoderKind), ("score", ScoreKind)):
            if getattr(self, name) not in get_args(kinds):
                wanted = ", ".join(get_args(kinds))
                raise ValueError(f"generator setting {name} must be one of {wanted}, not {getattr(self, name)!r}")
        for name, least in (("hidden", 1), ("depth", 1), ("leaps", 1), ("stages", 0), ("harmonics", 0)):
            whole(f"generator setting {name}", getattr(self, name), least)
        if self.latent_dim is not None:
            whole("generator setting latent_dim", self.latent_dim)
        if self.lattice is not None:
            self._check_lattice()
        if self.harmonics and (self.decoder == "pairs" or self.lattice is not None):
            raise ValueError("neither clusters nor lattices have networks that read harmonics; leave them at 0")
        if (self.decoder == "pairs") != (self.score == "pairs"):
            raise ValueError(f'decoder and score are both "pairs" or neither, not {self.decoder!r} and {self.score!r}')
        if self.decoder == "pairs" and (self.conditioned or self.latent_dim is not None):
            raise ValueError('decoder = "pairs" has one temperature, and as many latents as components')

    def _check_lattice(self) -> None:
        if not isinstance(self.lattice, tuple) or len(self.lattice) != 2:
            raise ValueError(f"a lattice has rows and columns, as (16, 16), not {self.lattice!r}")
        for name, value in zip(("rows", "columns"), self.lattice, strict=True):
            whole(f"the number of {name} of a lattice", value)
        if (
            self.decoder != "gaussian"
            or self.score not in ("gaussian", "variational")
            or (self.conditioned or self.latent_dim is not None)
        ):
            raise ValueError(
                "on a lattice the decoder is gaussian, the score gaussian or variational, there are as many latents "
                "as sites, and one temperature"
            )


def build_edg(target: Target, settings: EDGSettings | None = None, *, seed: int = 0) -> EDG:
    """An untrained generator for a target, in double precision.

    Args:
        target: gives the dimension, and the number of particles `n` for "pairs"; only Hamiltonian decoders keep it.
        settings: see EDGSettings.
        seed: of the networks' first weights.

    Raises:
        ValueError: a target without a dimension, "pairs" for one without particles, or a lattice of another number of
            sites.
    """
    settings, diffusion = settings or EDGSettings(), VariancePreserving()
    check_dim(target)
    make = _of_pairs if settings.decoder == "pairs" else _of_vectors if settings.lattice is None else _on_lattice
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder, score = make(target, settings, diffusion)
    return EDG(decoder, score, diffusion, settings=settings).double()


def _of_vectors(target: Target, settings: EDGSettings, diffusion: VariancePreserving) -> tuple[Decoder, Score]:
    latent_dim = settings.latent_dim or target.dim
    size: dict[str, Any] = {"hidden": settings.hidden, "depth": settings.depth}
    common = {**size, **{name: getattr(settings, name) for name in ("spread", "harmonics", "conditioned")}}
    decoder: Decoder
    if settings.decoder == "hamiltonian":
        dynamics = {"leaps": settings.leaps, "latent_dim": latent_dim, "step": settings.step}
        decoder = HamiltonianDecoder(target, target.dim, settings.stages, **dynamics, **common)
    else:
        decoder = GaussianDecoder(latent_dim, target.dim, width=settings.width, **common)
    if settings.score in ("plain", "energy"):
        score = PlainScore(latent_dim, target.dim, diffusion, **common)
        return decoder, EnergyScore(decoder, score) if settings.score == "energy" else score
    corrected = settings.score != "variational"
    return decoder, GaussianScore(latent_dim, target.dim, diffusion, corrected=corrected, **common)


def _of_pairs(target: Target, settings: EDGSettings, diffusion: VariancePreserving) -> tuple[Decoder, Score]:
    n = getattr(target, "n", 0)
    if n < 2 or target.dim != 3 * (n - 1):
        raise ValueError('decoder = "pairs" needs a target of n >= 2 particles in 3 (n - 1) relative coordinates')
    decoder = PairDecoder(n, settings.stages, spread=settings.spread, width=settings.width)
    return decoder, PairScore(decoder, diffusion)


def _on_lattice(target: Target, settings: EDGSettings, diffusion: VariancePreserving) -> tuple[Decoder, Score]:
    rows, columns = settings.lattice
    if rows * columns != target.dim:
        raise ValueError(f"a lattice of {rows} x {columns} sites is none of x with {target.dim} components")
    size: dict[str, Any] = {"hidden": settings.hidden, "depth": settings.depth, "spread": settings.spread}
    decoder = LatticeDecoder((rows, columns), width=settings.width, **size)
    return decoder, LatticeScore((rows, columns), diffusion, corrected=settings.score == "gaussian", **size)
