"""What all rivals share: budgets, counted energies, draws, and an optimiser that ends with the budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from openmm_tsf.nets import follow
from openmm_tsf.typing import Scalars, Vectors
from openmm_tsf.weights import effective_sample_size, log_mean_exp

WARM = 0.03
"""Share of a budget in which the learning rate rises."""
AVERAGE = 0.995
"""Decay of the exponential average of weights that draws are made with."""


@dataclass(frozen=True)
class Budget:
    """What a method may spend on learning: energies (one with its gradient counts one), and seconds of CPU."""

    evaluations: int
    seconds: float = math.inf

    def __post_init__(self) -> None:
        if self.evaluations < 1 or not self.seconds > 0.0:
            raise ValueError(f"a budget is above 0, not {self.evaluations} energies in {self.seconds:g} s")


class Counted:
    """A target that counts: each row of each call is one energy, and its gradient comes with it.

    Where a gradient is differentiated again, `and_hessian` says so, and each row is counted twice.
    """

    def __init__(self, target: Any, budget: Budget) -> None:
        self.target, self.budget, self.dim = target, budget, target.dim
        self.n, self.began = 0, time.process_time()

    def __call__(self, x: Vectors) -> Scalars:
        self.n += len(x)
        return self.target(x)

    def slope(self, x: Vectors, *, create_graph: bool = False) -> tuple[Scalars, Vectors]:
        """U (B,) and its gradient (B, d), without a graph unless wanted; with one, a Hessian-vector product follows."""
        with torch.enable_grad():
            here = x if create_graph and x.requires_grad else x.detach().requires_grad_()
            u = self(here)
            (g,) = torch.autograd.grad(u.sum(), here, create_graph=create_graph)
        self.n += len(x) * create_graph
        return (u, g) if create_graph else (u.detach(), g)

    @property
    def seconds(self) -> float:
        """CPU time since the counting began."""
        return time.process_time() - self.began

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, of energies or of seconds, whichever is more."""
        return max(self.n / self.budget.evaluations, self.seconds / self.budget.seconds)


@dataclass(frozen=True, eq=False)
class Drawn:
    """Draws of a method and what they cost.

    Args:
        method: its name.
        x: (n, d).
        energy: (n,) reduced.
        log_weights: (n,) [nat] whose mean weight estimates Z; None where a method has none.
        n_training, n_drawing: energies (with gradients) spent on learning or warming up, and on the draws.
        seconds_training, seconds_drawing: CPU time.
        facts: what else it has to say; "n_rejected" in it counts draws thrown away, which have weights of zero.
    """

    method: str
    x: Vectors
    energy: Scalars
    log_weights: Scalars | None
    n_training: int
    n_drawing: int
    seconds_training: float
    seconds_drawing: float
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def n_rejected(self) -> int:
        """Draws thrown away on the way to these."""
        return self.facts.get("n_rejected", 0)

    @property
    def ess(self) -> float | None:
        """Kish's effective sample size as a share of the draws, unclipped."""
        return None if self.log_weights is None else effective_sample_size(self.log_weights, self.n_rejected)

    @property
    def log_z(self) -> float | None:
        """ln of the mean weight."""
        return None if self.log_weights is None else log_mean_exp(self.log_weights, self.n_rejected)

    @property
    def log_z_bound(self) -> float | None:
        """The mean of the logarithms of the weights: below ln Z, on average."""
        return None if self.log_weights is None else float(self.log_weights.double().mean())


def without_numbers(log_weights: Scalars) -> Scalars:
    """Log-weights with -inf, a weight of zero, where they are no number: the energy there is +inf or NaN."""
    return torch.where(log_weights.isfinite(), log_weights, -math.inf)


def normal(n: int, dim: int, generator: torch.Generator) -> Vectors:
    """Standard normal vectors (n, dim)."""
    return torch.randn(n, dim, generator=generator)


def log_normal(x: Vectors, scale: Tensor | float = 1.0) -> Scalars:
    """ln N(x; 0, scale^2) (B,) of vectors (B, d)."""
    scale = torch.as_tensor(scale, dtype=x.dtype)
    return (-0.5 * (x / scale) ** 2 - scale.log() - 0.5 * math.log(2.0 * math.pi)).sum(1)


def followed(target: Counted, x: Vectors) -> tuple[Scalars, Tensor]:
    """U of draws x, with the gradient it hands back to them, and which are finite (B,).

    The gradient is taken apart from the graph, so that one that is not finite can be left out: multiplied by the zero
    of a mask it would still be NaN.
    """
    u, g = target.slope(x)
    finite = u.isfinite() & g.isfinite().all(1) & x.isfinite().all(1)
    g = torch.where(finite[:, None], g, 0.0)
    u = torch.where(finite, u, 0.0)
    return u + (g * (x - x.detach())).sum(1), finite


def mean_of_finite(loss: Scalars, finite: Tensor) -> Tensor:
    """Mean of the losses (B,) that are finite.

    Raises:
        RuntimeError: none is.
    """
    finite = finite & loss.isfinite()
    if not finite.any():
        raise RuntimeError(f"none of {len(loss)} draws has a finite energy; the target's scale may be another one")
    return loss[finite].mean()


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """A module whose starting weights belong to this seed, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def learn(
    model: nn.Module, counted: Counted, loss: Callable[[float], Tensor], *, rate: float, anneal_from: float = 1.0,
    anneal_share: float = 0.7, clip: float = 10.0,
) -> Iterator[int]:  # fmt: skip
    """Steps of Adam until the budget is spent; the model ends with the average of its weights.

    The learning rate rises over the first `WARM` of the budget and falls to zero as half a cosine. A step whose
    gradient is not finite is left out. The loss is a function of the temperature, which falls geometrically from
    1/anneal_from to 1, over the first `anneal_share` of the budget; as for the diffusion generator.

    Yields:
        the number of each step, after it.
    """
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    mean = [p.detach().clone() for p in model.parameters()]
    step = 0
    while (progress := counted.progress) < 1.0:
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, progress / WARM + 0.02) * 0.5 * (1.0 + math.cos(math.pi * progress))
        optimiser.zero_grad()
        done = progress / anneal_share if anneal_share else 1.0
        loss(anneal_from ** -max(0.0, 1.0 - done)).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        if torch.isfinite(norm):
            optimiser.step()
        step += 1
        follow(mean, model.parameters(), AVERAGE, step)
        yield step
    with torch.no_grad():
        for kept, p in zip(mean, model.parameters(), strict=True):
            p.copy_(kept)
