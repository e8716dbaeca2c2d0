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
        size: hidden, depth and harmonics of the `Conditioner`.
    """

    def __init__(
        self, n_stiff: int, n_soft: int, change: Sequence[int], *, limit: float = 2.0, volume_preserving: bool = True,
        **size: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.n_stiff, self.limit, self.volume_preserving = n_stiff, limit, volume_preserving
        changed = set(change)
        keep = [i for i in range(n_stiff) if i not in changed]
        self.register_buffer("change", torch.tensor(sorted(changed), dtype=torch.long))
        self.register_buffer("keep", torch.tensor(keep, dtype=torch.long))
        self.net = Conditioner(len(keep), n_soft, 2 * len(changed), **size)

    def _scale_and_shift(self, z: Vectors) -> tuple[Tensor, Tensor]:
        out = self.net(z.index_select(1, self.keep), z[:, self.n_stiff :])
        log_scale, shift = out.chunk(2, 1)
        log_scale = self.limit * torch.tanh(log_scale / self.limit)
        if self.volume_preserving:
            log_scale = log_scale - log_scale.mean(1, keepdim=True)
        return log_scale, shift

    def forward(self, z: Vectors) -> tuple[Vectors, Scalars]:
        log_scale, shift = self._scale_and_shift(z)
        y = z.index_select(1, self.change) * log_scale.exp() + shift
        return z.index_copy(1, self.change, y), self._log_det(log_scale)

    def inverse(self, x: Vectors) -> tuple[Vectors, Scalars]:
        log_scale, shift = self._scale_and_shift(x)
        u = (x.index_select(1, self.change) - shift) * (-log_scale).exp()
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
        size: hidden, depth and harmonics of the `Conditioner`.
    """

    def __init__(self, n_stiff: int, n_soft: int, change: Sequence[int], **size: int) -> None:
        super().__init__()
        self.n_stiff = n_stiff
        keep = [n_stiff + i for i in range(n_soft) if i not in set(change)]
        columns = [n_stiff + i for i in sorted(change)]
        self.register_buffer("change", torch.tensor(columns, dtype=torch.long))
        self.register_buffer("keep", torch.tensor(keep, dtype=torch.long))
        self.net = Conditioner(n_stiff, len(keep), len(columns), **size)

    def _turn(self, z: Vectors, sign: float) -> tuple[Vectors, Scalars]:
        turn = self.net(z[:, : self.n_stiff], z.index_select(1, self.keep))
        y = wrap(z.index_select(1, self.change) + sign * turn)
        return z.index_copy(1, self.change, y), z.new_zeros(len(z))

    def forward(self, z: Vectors) -> tuple[Vectors, Scalars]:
        return self._turn(z, 1.0)

    def inverse(self, x: Vectors) -> tuple[Vectors, Scalars]:
        return self._turn(x, -1.0)


class GlobalScale(nn.Module):
    """All lines times one trainable number: u to exp(s) u, torsions as they are. Log-determinant: n_lines s, constant.

    Args:
        n_lines: size of u.

    Source: Dibak, Klein, Noe, arXiv 2012.00429.
    """

    def __init__(self, n_lines: int) -> None:
        super().__init__()
        self.n_lines = n_lines
        self.log_scale = nn.Parameter(torch.zeros(()))

    def _scaled(self, z: Vectors, log_scale: Tensor) -> tuple[Vectors, Scalars]:
        lines, rest = z.split((self.n_lines, z.shape[1] - self.n_lines), 1)
        return torch.cat((lines * log_scale.exp(), rest), 1), (self.n_lines * log_scale).expand(len(z))

    def forward(self, z: Vectors) -> tuple[Vectors, Scalars]:
        return self._scaled(z, self.log_scale)

    def inverse(self, x: Vectors) -> tuple[Vectors, Scalars]:
        return self._scaled(x, -self.log_scale)


class Standardise(nn.Module):
    """Latents (u, p, a) to vectors (q, p): q_stiff = mean + matrix u, q_soft = a, momenta p as they are; constant
    Jacobian.

    Args:
        mean: (n_stiff,) of the stiff columns.
        matrix: (n_stiff, n_stiff), a square root of their covariance.
        circular: (D,) columns of (q, p) that are torsions on the circle.
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
