"""Maps with constant Jacobian between latents (u, a): stiff coordinates u on the line, soft torsions a on the circle.

Every class has `forward(z) -> (x, log_det)` and `inverse(x) -> (z, log_det)`; forward points to the molecule.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .geometry import wrap
from .nets import Conditioner
from .typing import Scalars, Transform, Vectors


class Compose(nn.Module):
    """Transforms one after another, the first next to the latents."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(transforms)

    def forward(self, z: Vectors) -> tuple[Vectors, Scalars]:
        total = z.new_zeros(len(z))
        for transform in self.transforms:
            z, log_det = transform(z)
            total = total + log_det
        return z, total

    def inverse(self, x: Vectors) -> tuple[Vectors, Scalars]:
        total = x.new_zeros(len(x))
        for transform in reversed(self.transforms):
            x, log_det = transform.inverse(x)
            total = total + log_det
        return x, total


class LineCoupling(nn.Module):
    """Some stiff coordinates scaled and shifted, given the other stiff ones and all torsions.

    y_i = u_i exp(g_i - mean g) + t_i: volume preserving, because the log-scales sum to zero (Dibak, Klein, Noe,
    arXiv 2012.00429). With `volume_preserving=False` the mean stays: plain real-NVP, which does not steer.

    Args:
        n_stiff, n_soft: sizes of u and a.
        change: indices of u that are changed; the rest is read.
        limit: largest |log-scale| before the mean is taken off.
    """

    def __init__(
        self, n_stiff: int, n_soft: int, change: Sequence[int], *, hidden: int, depth: int, limit: float = 2.0,
        volume_preserving: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.n_stiff, self.limit, self.volume_preserving = n_stiff, limit, volume_preserving
        changed = set(change)
        keep = [i for i in range(n_stiff) if i not in changed]
        self.register_buffer("change", torch.tensor(sorted(changed), dtype=torch.long))
        self.register_buffer("keep", torch.tensor(keep, dtype=torch.long))
        self.net = Conditioner(len(keep), n_soft, 2 * len(changed), hidden=hidden, depth=depth)

    def _scale_and_shift(self, z: Vectors) -> tuple[Tensor, Tensor]:
        out = self.net(z[:, self.keep], z[:, self.n_stiff :])
        log_scale, shift = out.chunk(2, 1)
        log_scale = self.limit * torch.tanh(log_scale / self.limit)
        if self.volume_preserving:
            log_scale = log_scale - log_scale.mean(1, keepdim=True)
        return log_scale, shift

    def forward(self, z: Vectors) -> tuple[Vectors, Scalars]:
        log_scale, shift = self._scale_and_shift(z)
        y = z[:, self.change] * log_scale.exp() + shift
        return z.index_copy(1, self.change, y), self._log_det(log_scale)

    def inverse(self, x: Vectors) -> tuple[Vectors, Scalars]:
        log_scale, shift = self._scale_and_shift(x)
        u = (x[:, self.change] - shift) * (-log_scale).exp()
        return x.index_copy(1, self.change, u), -self._log_det(log_scale)

    def _log_det(self, log_scale: Tensor) -> Scalars:
        if self.volume_preserving:  # zero by construction; the rounding of the sum is not worth carrying
            return log_scale.new_zeros(len(log_scale))
        return log_scale.sum(1)


class CircleCoupling(nn.Module):
    """Some torsions turned by an angle that depends on the other torsions and the stiff coordinates; unit Jacobian.

    Args:
        n_stiff, n_soft: sizes of u and a.
        change: indices of a that are turned.
    """

    def __init__(self, n_stiff: int, n_soft: int, change: Sequence[int], *, hidden: int, depth: int) -> None:
        super().__init__()
        self.n_stiff = n_stiff
        keep = [n_stiff + i for i in range(n_soft) if i not in set(change)]
        columns = [n_stiff + i for i in sorted(change)]
        self.register_buffer("change", torch.tensor(columns, dtype=torch.long))
        self.register_buffer("keep", torch.tensor(keep, dtype=torch.long))
        self.net = Conditioner(n_stiff, len(keep), len(columns), hidden=hidden, depth=depth)

    def _turn(self, z: Vectors, sign: float) -> tuple[Vectors, Scalars]:
        turn = self.net(z[:, : self.n_stiff], z[:, self.keep])
        y = wrap(z[:, self.change] + sign * turn)
        return z.index_copy(1, self.change, y), z.new_zeros(len(z))

    def forward(self, z: Vectors) -> tuple[Vectors, Scalars]:
        return self._turn(z, 1.0)

    def inverse(self, x: Vectors) -> tuple[Vectors, Scalars]:
        return self._turn(x, -1.0)


class Standardise(nn.Module):
    """Latents (u, a) to columns of internals: q_stiff = mean + matrix u, q_soft = a; constant Jacobian.

    Args:
        mean: (n_stiff,) of the stiff columns.
        matrix: (n_stiff, n_stiff), a square root of their covariance.
        circular: (D,) columns of q that are torsions on the circle.
    """

    def __init__(self, mean: Tensor, matrix: Tensor, circular: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("matrix", matrix)
        order = torch.cat((torch.nonzero(~circular)[:, 0], torch.nonzero(circular)[:, 0]))
        self.register_buffer("columns", order, persistent=False)
        self.register_buffer("position", torch.argsort(order), persistent=False)

    def _log_det(self, x: Tensor) -> Scalars:
        return torch.linalg.slogdet(self.matrix)[1].to(x).expand(len(x))

    def forward(self, z: Vectors) -> tuple[Vectors, Scalars]:
        n = len(self.mean)
        q = torch.cat((self.mean + z[:, :n] @ self.matrix.T, z[:, n:]), 1)
        return q[:, self.position], self._log_det(z)

    def inverse(self, x: Vectors) -> tuple[Vectors, Scalars]:
        n = len(self.mean)
        z = x[:, self.columns]
        u = torch.linalg.solve(self.matrix, (z[:, :n] - self.mean).T).T
        return torch.cat((u, z[:, n:]), 1), -self._log_det(x)
