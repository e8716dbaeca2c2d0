"""What decoders and scores share: features of temperatures and times, and slopes of targets."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from openmm_tsf.typing import Scalars, Vectors

Latents = Float[Tensor, "batch latents"]
"""Of a batch, beside the vectors x that go with them."""
Features = Float[Tensor, "batch features"]
"""What a network reads of each member of a batch."""
TIME_FEATURES = 5
"""Features of a time."""


@runtime_checkable
class Target(Protocol):
    """U(x), the reduced energy at temperature 1: minus the log of an unnormalised density of vectors, twice
    differentiable. At another temperature tau it is U/tau, or `reduced(x, tau)` (B,) of temperatures (B,) where a
    target has this method, since not all of U is an energy: volumes of coordinates do not depend on temperature."""

    dim: int

    def __call__(self, x: Vectors) -> Scalars: ...


def at_temperatures(target: Target, x: Vectors, tau: Scalars) -> Scalars:
    """The reduced energy (B,) of vectors (B, d) at temperatures (B,); see `Target`.

    Raises:
        ValueError: the target gives something else than one number for each row.
    """
    own = getattr(target, "reduced", None)
    u = target(x) if own is None else own(x, tau)
    if not isinstance(u, Tensor):
        raise ValueError(f"the target gave {type(u).__name__} for {len(x)} rows, not a tensor of as many energies")
    if u.shape != x.shape[:1]:
        raise ValueError(f"the target gave energies of shape {tuple(u.shape)} for {len(x)} rows")
    return u / tau if own is None else u


def check_dim(target: Target) -> None:
    """Refuse a target that does not say how many components its vectors have.

    Raises:
        ValueError: it has no `dim` of 1 or more.
    """
    dim = getattr(target, "dim", None)
    if not isinstance(dim, Integral) or dim < 1:
        raise ValueError(f"a target has a whole number `dim`, the components of x; of {target!r} it is {dim!r}")


def log_normal(eps: Latents, log_width: Tensor | float = 0.0) -> Scalars:
    """ln of the density (B,) [nat] of Gaussian numbers that are eps (B, d) in units of their widths."""
    return -(0.5 * eps.square() + log_width + 0.5 * math.log(2.0 * math.pi)).sum(1)


def with_temperature(x: Vectors, tau: Scalars | None, *, conditioned: bool) -> Features:
    """x with a column ln tau if networks are conditioned on temperature, else x.

    Raises:
        ValueError: a conditioned network without temperatures.
    """
    if not conditioned:
        return x
    if tau is None:
        raise ValueError("this generator is conditioned on temperature: give tau for every row")
    return torch.cat((x, tau.log()[:, None]), 1)


def with_harmonics(x: Vectors, harmonics: int, columns: int | None = None) -> Features:
    """x with sines and cosines of multiples of the angles 2 pi Phi(x), Phi the distribution function of N(0, 1), for
    the first columns of x (by default all): a density with many peaks along x is then near at hand for a network.

    Source: Tancik et al., arXiv 2006.10739 (Fourier features).
    """
    angles = 2.0 * math.pi * torch.special.ndtr(x[:, :columns])
    multiples = (k * angles for k in range(1, harmonics + 1))
    return torch.cat((x, *(wave for angle in multiples for wave in (angle.sin(), angle.cos()))), 1)


def time_features(u: Scalars) -> Features:
    """Smooth features of clock readings in [0, 1]."""
    angles = math.pi * u[:, None] * torch.arange(1, TIME_FEATURES, dtype=u.dtype, device=u.device)
    return torch.cat((2.0 * u[:, None] - 1.0, angles.cos()), 1)


def leading(z: Latents, dim: int) -> Vectors:
    """The first `dim` columns of z, with zeros where there are not as many."""
    if z.shape[1] >= dim:
        return z[:, :dim]
    return torch.nn.functional.pad(z, (0, dim - z.shape[1]))


def slope(target: Target, x: Vectors, tau: Scalars | None) -> Vectors:
    """Gradient of the reduced energy at x (B, d), itself differentiable where gradients are on."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        here = x if x.requires_grad and again else x.detach().requires_grad_()
        u = target(here) if tau is None else at_temperatures(target, here, tau)
        (g,) = torch.autograd.grad(u.sum(), here, create_graph=again)
    return g
