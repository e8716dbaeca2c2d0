"""The nouns of the package as protocols.

B is a batch, A a number of atoms, D a number of degrees of freedom.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Positions = Float[Tensor, "batch atoms 3"]
"""Cartesian positions [nm]."""
Vectors = Float[Tensor, "batch dim"]
"""Latents or internal coordinates."""
Scalars = Float[Tensor, "batch"]
"""One number for each member of a batch."""
Mask = Bool[Tensor, "batch"]
"""One yes or no for each member of a batch."""


@runtime_checkable
class Energy(Protocol):
    """Potential energy U [kJ/mol] of positions [nm], differentiable."""

    def __call__(self, positions: Positions) -> Scalars: ...


@runtime_checkable
class Transform(Protocol):
    """An invertible map; forward always points to the molecule. Both ways give ln|det| of their own Jacobian."""

    def forward(self, z: Tensor) -> tuple[Tensor, Scalars]: ...

    def inverse(self, x: Tensor) -> tuple[Tensor, Scalars]: ...


@runtime_checkable
class Density(Protocol):
    """Something that scores: ln q(x) in nat."""

    def log_prob(self, x: Tensor) -> Scalars: ...


@runtime_checkable
class Samplable(Density, Protocol):
    """A density that draws; `log_prob` of the pair returned is that of `log_prob(x)`."""

    def sample(self, n: int, *, generator: torch.Generator) -> tuple[Tensor, Scalars]: ...


@runtime_checkable
class Steerable(Protocol):
    """A family of densities q_T(x) = exp(-E(x)/kT)/Z(T) with one E; the only door for temperature."""

    def at(self, temperature: float) -> Samplable: ...


@runtime_checkable
class Proposal(Protocol):
    """What Metropolis steps ask of a flow at one temperature, with the map G from latents z to configurations x.

    A flow with momenta draws p ~ N(0, tau) for the x that it is given; everything is then of the pair (x, p), and
    ln N(p; 0, tau) is taken off where a density is, and added where a volume is, so that callers need not know.
    """

    @property
    def latent_scale(self) -> Tensor:
        """(D,) widths of a unit step of the latent walk: sqrt(tau) on lines, 1 on circles."""
        ...

    def propose(self, n: int, *, generator: torch.Generator) -> tuple[Tensor, Scalars, Mask]:
        """n draws, their ln q [nat], and which can be configurations; the others may be NaN."""
        ...

    def score(self, x: Tensor, *, generator: torch.Generator) -> Scalars:
        """ln q(x) [nat], -inf where the flow cannot represent x."""
        ...

    def to_latents(self, x: Tensor, *, generator: torch.Generator) -> tuple[Vectors, Scalars]:
        """z of x and ln|det dG(z)|, -inf where the flow cannot represent x."""
        ...

    def from_latents(self, z: Vectors) -> tuple[Tensor, Scalars, Mask]:
        """x of z, ln|det dG(z)|, and which x can be configurations; the others may be NaN."""
        ...
