"""Second derivatives for energies that have only first ones, such as those of OpenMM."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from openmm_tsf.checks import positive
from openmm_tsf.typing import Energy, Scalars

Places = Float[Tensor, "batch *shape"]


class WithCurvature:
    """The same energy, with products of its Hessian by central differences of its gradient.

    Inside a Hamiltonian decoder, `WithCurvature(OpenMMEnergy(system))` is what `OpenMMEnergy(system)` cannot be. A
    product H v costs two gradients, at x +- step v/|v|, |v| being the largest component of a row of v; its error is
    step^2/6 third derivatives of the gradient, and the gradient's own error over the step. Rows that are not finite at
    one of the three places have a product of zero.

    Args:
        energy: U (B,) of x (B, ...), once differentiable.
        step: in the unit of x; 1e-4 nm is right for forces in double precision, 1e-3 nm for single.

    Attributes:
        n_products: rows for which a product was asked.
    """

    def __init__(self, energy: Energy, step: float = 1e-4) -> None:
        self.energy, self.step, self.n_products = energy, positive("step", step), 0

    def __call__(self, x: Places) -> Scalars:
        return _Energy.apply(x, self) if torch.is_grad_enabled() and x.requires_grad else self.energy(x)

    def value_and_gradient(self, x: Places) -> tuple[Scalars, Places]:
        """U (B,) and its gradient (B, ...), both cut off from any graph."""
        with torch.enable_grad():
            here = x.detach().requires_grad_()
            u = self.energy(here)
            (gradient,) = torch.autograd.grad(u.sum(), here)
        return u.detach(), gradient

    def product(self, x: Places, v: Places) -> Places:
        """H v (B, ...) at x."""
        self.n_products += len(x)
        rows = (-1, *[1] * (x.ndim - 1))
        length = v.flatten(1).abs().amax(1).view(rows)
        ahead = self.step * v / torch.where(length > 0.0, length, 1.0)
        (u1, g1), (u2, g2) = (self.value_and_gradient(x + sign * ahead) for sign in (1.0, -1.0))
        sound = (torch.isfinite(u1) & torch.isfinite(u2)).view(rows)
        return torch.where(sound, (g1 - g2) * (length / (2.0 * self.step)), 0.0)


class _Energy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, curved: WithCurvature) -> Tensor:
        u, gradient = curved.value_and_gradient(x)
        ctx.curved = curved
        ctx.save_for_backward(x, gradient, torch.isfinite(u))
        return u

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, gradient, sound = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants second derivatives
            gradient = _Gradient.apply(x, gradient, sound, ctx.curved)
        rows = (-1, *[1] * (x.ndim - 1))
        return torch.where(sound.view(rows), grad.view(rows) * gradient, 0.0), None


class _Gradient(torch.autograd.Function):
    """A gradient, already known, whose derivative is a product with the Hessian."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor, sound: Tensor, curved: WithCurvature) -> Tensor:
        ctx.curved = curved
        ctx.save_for_backward(x, sound)
        return gradient.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, sound = ctx.saved_tensors
        product = ctx.curved.product(x, grad)
        return torch.where(sound.view(-1, *[1] * (x.ndim - 1)), product, 0.0), None, None, None
