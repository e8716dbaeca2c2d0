"""The Ising model on a periodic square as a smooth density, and the exact ln Z of both.

With K = adjacency/T and M = K + a I, positive definite for a > 4/T, a Gaussian integral gives for spins s

    exp(s'Ks/2) = exp(-aN/2) exp(s'Ms/2) = exp(-aN/2) (2 pi)^(-N/2) det(M)^(-1/2) integral exp(-x'M^-1 x/2 + s'x) dx,

so (x, s) with the joint density exp(-x'M^-1 x/2 + s'x) has Ising spins (J = 1) as one marginal and 2^N exp(-U(x)) as
the other, with

    U(x) = x'M^-1 x/2 - sum_i ln cosh x_i,   ln Z = ln Z_Ising + ln det(M)/2 - (N/2)(ln(2/pi) - a).

Given x the spins are independent, s_i = +1 with probability 1/(1 + exp(-2 x_i)); given s, x is normal with mean M s and
covariance M.

Source: Zhang, Sutton, Storkey, Ghahramani, NIPS 2012, for the relaxation; Wu, Guo, Zhou, Wang, arXiv 2401.02080.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from openmm_tsf.tuning.ising import Spins, square_lattice
from openmm_tsf.typing import Scalars, Vectors

MARGIN = 0.5
"""a is by default (4 + MARGIN)/T."""


@dataclass(frozen=True, eq=False)
class RelaxedIsing:
    """U(x) of x (B, N), N = side^2.

    Args:
        side: of the square.
        temperature: T, in units of the coupling.
        a: what is added to the diagonal; by default (4 + MARGIN)/T.
        whitened: take u with x = M^(1/2) u for coordinates, U = |u|^2/2 - sum_i ln cosh x_i: the Gaussian part is then
            that of a standard normal. ln Z has no det M.

    Raises:
        ValueError: a side below 3, a temperature not above zero, or a <= 4/T.
    """

    side: int
    temperature: float
    a: float | None = None
    whitened: bool = False

    def __post_init__(self) -> None:
        if self.side < 3:
            raise ValueError(f"a periodic square needs a side of at least 3, not {self.side}")
        if not (math.isfinite(self.temperature) and self.temperature > 0.0):
            raise ValueError(f"the temperature must be finite and above 0, not {self.temperature:g}")
        if not 4.0 / self.temperature < self.diagonal < math.inf:
            raise ValueError(
                f"a = {self.diagonal:g} must be finite and above 4/T = {4.0 / self.temperature:g}, or the Gaussian has "
                "no covariance"
            )

    @property
    def dim(self) -> int:
        return self.side**2

    @property
    def diagonal(self) -> float:
        """a."""
        return (4.0 + MARGIN) / self.temperature if self.a is None else self.a

    @cached_property
    def matrix(self) -> Float[Tensor, "sites sites"]:
        """M = K + a I."""
        return square_lattice(self.side) / self.temperature + self.diagonal * torch.eye(self.dim, dtype=torch.float64)

    @cached_property
    def root(self) -> Float[Tensor, "sites sites"]:
        """The symmetric root of M, which mixes sites as little as a root can."""
        values, vectors = torch.linalg.eigh(self.matrix)
        return (vectors * values.sqrt()) @ vectors.T

    @cached_property
    def _inverse(self) -> Float[Tensor, "sites sites"]:
        return torch.linalg.inv(self.matrix)

    @cached_property
    def log_z_ising(self) -> float:
        """Exact ln of the sum over spins of exp(sum over bonds of s_i s_j / T)."""
        return ising_log_z(self.side, self.temperature)

    @cached_property
    def log_z(self) -> float:
        """Exact ln of the integral of exp(-U)."""
        log_det = 0.0 if self.whitened else float(torch.linalg.slogdet(self.matrix)[1])
        return self.log_z_ising + 0.5 * log_det - 0.5 * self.dim * (math.log(2.0 / math.pi) - self.diagonal)

    def ising(self, log_z: float) -> float:
        """An estimate or bound of ln Z as one of ln Z_Ising."""
        return log_z - self.log_z + self.log_z_ising

    def __call__(self, x: Vectors) -> Scalars:
        """U (B,) of coordinates (B, N)."""
        if self.whitened:
            field, quadratic = self.field(x), x.square().sum(1)
        else:
            field, quadratic = x, (x @ self._inverse.to(x) * x).sum(1)
        return 0.5 * quadratic - (field + softplus(-2.0 * field) - math.log(2.0)).sum(1)  # ln cosh, smooth everywhere

    def field(self, x: Vectors) -> Vectors:
        """What acts on the spins (B, N): x itself, or M^(1/2) x where coordinates are whitened."""
        return x @ self.root.to(x) if self.whitened else x

    def spins(self, x: Vectors, *, generator: torch.Generator) -> Spins:
        """Spins (B, N), -1 or +1, drawn given x (B, N)."""
        field = self.field(x)
        up = torch.rand(x.shape, generator=generator, dtype=x.dtype) < torch.sigmoid(2.0 * field)
        return 2 * up.long() - 1

    def given(self, spins: Spins, *, generator: torch.Generator) -> Vectors:
        """Coordinates (B, N) drawn given spins (B, N): exact draws of exp(-U)/Z where the spins are of the model."""
        root = self.root.to(torch.get_default_dtype())
        s = spins.to(root)
        noise = torch.randn(s.shape, generator=generator, dtype=root.dtype)
        u = s @ root + noise
        return u if self.whitened else u @ root

    def energy(self, spins: Spins) -> Scalars:
        """-sum over bonds of s_i s_j (B,), in units of the coupling."""
        s = spins.to(torch.get_default_dtype()).reshape(-1, self.side, self.side)
        return -(s * (s.roll(1, 1) + s.roll(1, 2))).sum((1, 2))


def ising_log_z(side: int, temperature: float) -> float:
    """Exact ln Z of the Ising model on a periodic square, J = 1, no field.

    Z = (2 sinh 2K)^(N/2)/2 [prod 2 cosh(n g_{2r+1}/2) + prod 2 sinh(n g_{2r+1}/2) + prod 2 cosh(n g_{2r}/2) +
    prod 2 sinh(n g_{2r}/2)], r = 0 ... n - 1, K = 1/T, cosh g_l = cosh 2K coth 2K - cos(pi l/n), with g_l > 0 but
    g_0 = 2K + ln tanh K, which is below zero above the critical temperature.

    Raises:
        ValueError: a side below 3, or a temperature not above zero.

    Source: B. Kaufman, Phys. Rev. 76, 1232 (1949).
    """
    if side < 3 or not (math.isfinite(temperature) and temperature > 0.0):
        raise ValueError(f"need a side of at least 3 and a temperature above 0, not {side} and {temperature:g}")
    k = 1.0 / temperature
    # ln tanh K and cosh 2K coth 2K in forms that do not overflow when it is cold
    log_tanh = math.log(-math.expm1(-2.0 * k)) - math.log1p(math.exp(-2.0 * k))
    fold = 2.0 * k + math.log1p(-math.exp(-4.0 * k))  # ln(2 sinh 2K)

    def gamma(index: int) -> float:
        if index == 0:
            return 2.0 * k + log_tanh
        # cosh 2K coth 2K = sinh 2K + 1/sinh 2K
        c = 0.5 * math.exp(fold) + 2.0 * math.exp(-fold) - math.cos(math.pi * index / side)
        return math.acosh(c)

    logs, signs = [], []
    for parity in (1, 0):
        g = [0.5 * side * gamma(2 * r + parity) for r in range(side)]
        logs += [sum(abs(v) + math.log1p(math.exp(-2.0 * abs(v))) for v in g)]
        signs += [1.0]
        if all(g):
            logs += [sum(abs(v) + math.log(-math.expm1(-2.0 * abs(v))) for v in g)]
            signs += [math.copysign(1.0, math.prod(math.copysign(1.0, v) for v in g))]
    largest = max(logs)
    total = sum(sign * math.exp(log - largest) for sign, log in zip(signs, logs, strict=True))
    return 0.5 * side**2 * fold - math.log(2.0) + largest + math.log(total)
