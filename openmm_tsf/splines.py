"""Rational-quadratic spline couplings for latents (u, a): on the line inside a box, on the circle all the way round.

They change volume, so a flow made of them does not steer: it is the usual choice of the field for one temperature, here
for comparison. C. Durkan et al., arXiv 1906.04032; on the circle D. J. Rezende et al., arXiv 2002.02428.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from .geometry import wrap
from .nets import Conditioner
from .typing import Scalars, Vectors

SMALLEST_BIN = 2.0**-10
"""Least width and height of a bin, as a share of the box; a power of 2, so that it is the same in any precision."""
LARGEST_LOG_SLOPE = 4.0
"""Slopes at knots lie within exp(+-this)."""


def rational_quadratic(
    x: Float[Tensor, "dim batch"], knots: Float[Tensor, "2 knots dim batch"],
    log_slopes: Float[Tensor, "knots dim batch"], *, inverse: bool = False,
) -> tuple[Float[Tensor, "dim batch"], Float[Tensor, "dim batch"]]:  # fmt: skip
    """A rising function from [0, 1] onto itself, a ratio of two parabolas between knots; or its inverse.

    With t in [0, 1] along a bin of width w and height h, and end slopes d0 and d1 in units of h/w:

        y = y0 + h [t^2 + d0 t (1 - t)] / [1 + (d0 + d1 - 2) t (1 - t)]

    The inverse solves (1 - b) t^2 + b t = (y - y0)/h for t. Its discriminant is a sum of squares, and of the two forms
    of the root the one that does not cancel is taken, so the inverse is as good as the function in single precision.
    The batch is contiguous, which is several times faster on a CPU than bins in the last dimension.

    Args:
        x: (dim, batch) on [0, 1]; y for the inverse.
        knots: x and y of the knots, each strictly rising from 0 to 1.
        log_slopes: ln dy/dx at the knots.

    Returns:
        y and ln dy/dx, each (dim, batch); for the inverse x and ln dx/dy.

    Source: Durkan et al., arXiv 1906.04032, section 3.1.
    """
    here = (x >= knots[int(inverse), 1:-1]).sum(0, keepdim=True)
    ends = torch.cat((here, here + 1))
    (x0, x1), (y0, y1) = (corners.unbind() for corners in knots.gather(1, ends.expand(2, -1, -1, -1)).unbind())
    w, h = x1 - x0, y1 - y0
    d0, d1 = (log_slopes.gather(0, ends).exp() * (w / h)).unbind()
    excess = d0 + d1 - 2.0
    t = _solve((x - y0) / h, d0, excess) if inverse else (x - x0) / w
    s = 1.0 - t
    denominator = 1.0 + excess * t * s
    log_slope = torch.log(h / w * (2.0 * t * s + d0 * s * s + d1 * t * t) / (denominator * denominator))
    if inverse:
        return x0 + w * t, -log_slope
    return y0 + h * (t * t + d0 * t * s) / denominator, log_slope


def _solve(e: Tensor, d0: Tensor, excess: Tensor) -> Tensor:
    """The root t in [0, 1] of (1 - b) t^2 + b t = e, by the one of its two forms that does not cancel."""
    b = d0 - e * excess
    size = b.abs()
    root = ((b - 2.0 * e).square() + 4.0 * e * (1.0 - e)).sqrt() + size
    return torch.where(b > 0, 2.0 * e / root, 0.5 * root / (1.0 + size))


class SplineCoupling(nn.Module):
    """Some columns of (u, a) moved by splines, given all others.

    A stiff coordinate has a spline from [-bound, bound] onto itself with slopes 1 at the ends, and the identity
    outside. A torsion has one from the circle onto itself whose slopes agree where it closes, and a turn.
    The logarithm of the volume is the sum of those of the slopes.

    Args:
        n_stiff, n_soft: sizes of u and a.
        change: columns of (u, a) that are moved; the rest, at least one, is read.
        bins: pieces of each spline.
        bound: half the width of the box.
        size: hidden, depth and harmonics of the `Conditioner`.

    Raises:
        ValueError: nothing to move or nothing to read, fewer than two bins or more than fit, or no box.
    """

    def __init__(
        self, n_stiff: int, n_soft: int, change: Sequence[int], *, bins: int = 8, bound: float = 5.0, **size: int
    ) -> None:
        super().__init__()
        changed = sorted(set(change))
        keep = [i for i in range(n_stiff + n_soft) if i not in changed]
        if not changed or not keep or len(changed) + len(keep) != n_stiff + n_soft:
            raise ValueError(f"a coupling moves some of {n_stiff + n_soft} columns and reads others, not {changed}")
        if not 2 <= bins <= 0.5 / SMALLEST_BIN:
            raise ValueError(f"splines have 2 ... {0.5 / SMALLEST_BIN:.0f} bins, not {bins}")
        if not (math.isfinite(bound) and bound > 0):
            raise ValueError(f"the box of a spline must have a width above 0, not {2 * bound:g}")
        self.bins, self.bound = bins, bound
        self.n_line = sum(i < n_stiff for i in changed)
        self.n_circle = len(changed) - self.n_line
        self.register_buffer("change", torch.tensor(changed, dtype=torch.long))
        self.register_buffer("read_u", torch.tensor([i for i in keep if i < n_stiff], dtype=torch.long))
        self.register_buffer("read_a", torch.tensor([i for i in keep if i >= n_stiff], dtype=torch.long))
        # knots = first + rise @ shares of the bins; the last one is 1 to the last bit
        first = SMALLEST_BIN * torch.arange(bins + 1.0)
        rise = torch.ones(bins + 1, bins).tril(-1) * (1.0 - bins * SMALLEST_BIN)
        first[-1], rise[-1] = 1.0, 0.0
        self.register_buffer("first", first[:, None], persistent=False)
        self.register_buffer("rise", rise, persistent=False)
        self.n_out = (2 * bins * len(changed), (bins - 1) * self.n_line, bins * self.n_circle, self.n_circle)
        self.net = Conditioner(len(self.read_u), len(self.read_a), sum(self.n_out), **size)

    def _splines(self, z: Vectors) -> tuple[Tensor, Tensor, Tensor]:
        """Knots, logarithms of slopes, and turns of the torsions, given the columns that are read; batch last."""
        n, columns = len(z), len(self.change)
        out = self.net(z[:, self.read_u], z[:, self.read_a]).T.contiguous()
        boxes, line, circle, turn = out.split(self.n_out)
        shares = boxes.reshape(2, self.bins, columns * n).softmax(1)
        knots = (self.first + self.rise @ shares).reshape(2, self.bins + 1, columns, n)
        line = pad(line.reshape(self.bins - 1, self.n_line, n), (0, 0, 0, 0, 1, 1))
        circle = circle.reshape(self.bins, self.n_circle, n)
        slopes = torch.cat((line, torch.cat((circle, circle[:1]))), 1)
        return knots, LARGEST_LOG_SLOPE * torch.tanh(slopes / LARGEST_LOG_SLOPE), turn

    def _moved(self, z: Vectors, *, inverse: bool) -> tuple[Vectors, Scalars]:
        knots, log_slopes, turn = self._splines(z)
        sizes = self.n_line, self.n_circle
        u, a = z.T[self.change].split(sizes)
        v = torch.cat((u / self.bound, wrap(a - turn if inverse else a) / math.pi))
        inside = v.clamp(-1.0, 1.0)
        share, log_slope = rational_quadratic(0.5 + 0.5 * inside, knots, log_slopes, inverse=inverse)
        # beyond the box the spline stays at its end, where its slope is 1, and the rest is added as it is
        u, a = (2.0 * share - 1.0 + (v - inside)).split(sizes)
        v = torch.cat((self.bound * u, wrap(math.pi * a if inverse else math.pi * a + turn)))
        return z.index_copy(1, self.change, v.T), log_slope.sum(0)

    def forward(self, z: Vectors) -> tuple[Vectors, Scalars]:
        return self._moved(z, inverse=False)

    def inverse(self, x: Vectors) -> tuple[Vectors, Scalars]:
        return self._moved(x, inverse=True)


def spline_layers(
    n_stiff: int, n_soft: int, *, blocks: int, bins: int = 8, bound: float = 5.0, **size: int
) -> list[nn.Module]:
    """Two couplings for each block: the columns with a 0 in one binary digit of their number, then those with a 1.

    Digits take turns, so within ceil(log2 D) blocks every two columns have been moved one given the other
    (C. Gao et al., arXiv 2001.05486). Weights come from torch's global generator; the layers start as the identity.

    Raises:
        ValueError: fewer than two columns, or what `SplineCoupling` refuses.
    """
    dim = n_stiff + n_soft
    if dim < 2:
        raise ValueError(f"couplings take at least 2 coordinates, not {dim}")
    layers: list[nn.Module] = []
    for block in range(blocks):
        digit = block % (dim - 1).bit_length()
        for value in (0, 1):
            change = [i for i in range(dim) if i >> digit & 1 == value]
            coupling = SplineCoupling(n_stiff, n_soft, change, bins=bins, bound=bound, **size)
            layers.append(coupling)
    return layers
