"""What flows are made of: the settings, and the prior and the layers that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .nets import HARMONICS
from .priors import MolecularPrior
from .splines import spline_layers
from .transforms import CircleCoupling, Compose, GlobalScale, LineCoupling, Standardise

Kind = Literal["anharmonic", "tsf", "real-nvp", "spline"]


@dataclass(frozen=True)
class FlowSettings:
    """Architecture of a flow. The defaults are meant for alanine dipeptide and its like.

    Attributes:
        kind: "anharmonic": steerable potentials for torsions and stiff coordinates behind couplings of constant volume;
            "tsf": a Gaussian behind such couplings, with momenta (Dibak, Klein, Noe, arXiv 2012.00429); "real-nvp":
            the same with couplings of any volume, which do not steer; "spline": circular splines, which do not either.
            The last two are there for comparison.
        momenta: as many momenta as coordinates come along; by default in "tsf" and "real-nvp" only.
        blocks: number of blocks of couplings.
        hidden, depth: width and number of hidden layers of every conditioner.
        harmonics: multiples of the torsions that conditioners read.
        energy_order: largest harmonic of the torsion potentials.
        entropy_order: largest harmonic of the entropies; 0 leaves them out.
        quartic: stiff coordinates of "anharmonic" have quartic potentials; False leaves them Gaussian.
    """

    kind: Kind = "anharmonic"
    momenta: bool | None = None
    blocks: int = 6
    hidden: int = 80
    depth: int = 2
    harmonics: int = HARMONICS
    energy_order: int = 6
    entropy_order: int = 4
    quartic: bool = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"flow setting kind must be one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        for name in ("blocks", "hidden", "depth", "harmonics", "energy_order"):
            if getattr(self, name) < 1:
                raise ValueError(f"flow setting {name} must be at least 1, not {getattr(self, name)}")
        if self.entropy_order < 0:
            raise ValueError(f"flow setting entropy_order must be at least 0, not {self.entropy_order}")

    @property
    def size(self) -> dict[str, int]:
        """Of every conditioner."""
        return {"hidden": self.hidden, "depth": self.depth, "harmonics": self.harmonics}

    @property
    def has_momenta(self) -> bool:
        """Whether momenta come along."""
        return self.on_lines if self.momenta is None else self.momenta

    @property
    def steers(self) -> bool:
        """Whether one energy serves every temperature: the kinds whose maps have a constant Jacobian."""
        return self.kind in ("anharmonic", "tsf")

    @property
    def explores(self) -> bool:
        """Whether draws can be spread over basins: the kind whose torsions have potentials, which can be warmed."""
        return self.kind == "anharmonic"

    @property
    def on_lines(self) -> bool:
        """Whether soft torsions are cut open, because every coordinate is a Gaussian's."""
        return self.kind in ("tsf", "real-nvp")


def cannot_explore(settings: FlowSettings) -> str:
    """Why not, in words."""
    return f"flows of kind {settings.kind!r} have no potentials of torsions by which to spread draws over basins"


def build_modules(
    settings: FlowSettings, circular: Tensor, groups: Sequence[Sequence[int]], mean: Tensor, matrix: Tensor
) -> tuple[MolecularPrior, Compose]:
    """Prior and map of a flow, with weights from torch's global generator; the map starts as a linear one.

    Latents are z = (u, p, a): stiff coordinates, momenta and torsions; vectors are y = (q, p).

    Args:
        settings: the architecture.
        circular: (D,) coordinates that live on the circle.
        groups: of these by factor of the prior, see `MolecularPrior`.
        mean, matrix: mean and root of the covariance of the others, see `Standardise`.
    """
    n_momenta = len(circular) if settings.has_momenta else 0
    n_soft = int(circular.sum())
    n_lines = len(circular) - n_soft + n_momenta
    anharmonic = settings.kind == "anharmonic"
    prior = MolecularPrior(
        n_lines, groups, energy_order=settings.energy_order if anharmonic else 0,
        entropy_order=settings.entropy_order if anharmonic else 0, anharmonic=anharmonic and settings.quartic,
    )  # fmt: skip
    layers = LAYERS[settings.kind](settings, n_lines, n_momenta, groups)
    columns = torch.cat((circular, circular.new_zeros(n_momenta)))
    return prior, Compose([*layers, Standardise(mean, matrix, columns)])


def _anharmonic_layers(
    settings: FlowSettings, n_lines: int, n_momenta: int, groups: Sequence[Sequence[int]]
) -> Iterator[nn.Module]:
    size = settings.size
    n_soft = sum(map(len, groups))
    if n_lines and n_soft:
        yield LineCoupling(n_lines, n_soft, range(n_lines), **size)  # the stiff ones given the torsions alone
    for _ in range(settings.blocks):
        yield from (LineCoupling(n_lines, n_soft, half, **size) for half in _halves(n_lines, n_momenta))
        turned = [[i for g in groups[k::2] for i in g] for k in range(2)]
        yield from (CircleCoupling(n_lines, n_soft, change, **size) for change in turned if change)


def _gaussian_layers(
    settings: FlowSettings, n_lines: int, n_momenta: int, groups: Sequence[Sequence[int]]
) -> Iterator[nn.Module]:
    steers = settings.kind == "tsf"
    for _ in range(settings.blocks):
        for half in _halves(n_lines, n_momenta):
            yield LineCoupling(n_lines, 0, half, volume_preserving=steers, **settings.size)
    yield GlobalScale(n_lines)  # in real-NVP only for the same number of parameters


def _spline_layers(
    settings: FlowSettings, n_lines: int, n_momenta: int, groups: Sequence[Sequence[int]]
) -> Iterator[nn.Module]:
    n_soft = sum(map(len, groups))
    yield from spline_layers(n_lines, n_soft, blocks=settings.blocks, **settings.size)


LAYERS: dict[str, Callable[..., Iterator[nn.Module]]] = {
    "anharmonic": _anharmonic_layers,
    "tsf": _gaussian_layers,
    "real-nvp": _gaussian_layers,
    "spline": _spline_layers,
}
"""Layers of each kind, from the latents on, given settings, numbers of lines and of momenta among them, and groups."""


def _halves(n_lines: int, n_momenta: int) -> list[list[int]]:
    """Lines that are changed in turn, each half given the other; the halves are random.

    With momenta a half holds some positions and the momenta of the others: positions given momenta alone, and momenta
    given positions alone, would begin at a saddle point, because as long as neither depends on the other nothing is
    gained by making it.
    """
    positions = n_lines - n_momenta
    halves = [half.tolist() for half in torch.randperm(positions).tensor_split(2)]
    if n_momenta:
        halves = [half + [positions + i for i in others] for half, others in zip(halves, halves[::-1], strict=True)]
    return [half for half in halves if 0 < len(half) < n_lines]
