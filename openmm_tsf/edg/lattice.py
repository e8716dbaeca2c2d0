"""Decoder and score for fields on a periodic lattice, which commute with translations and the reversal of all signs.

x is a value on every site, z an amplitude of every mode. Modes are those of Hartley, cas(2 pi (p r/R + q c/C)) with
cas = cos + sin, over sqrt(R C): real, orthonormal, and their own inverse. Whatever commutes with translations and
reflections is a factor for each shell of modes (p and -p, q and -q) there. Translations mix modes of a shell only, so
latents in modes are N(0, I) as before. Where a target is a Gaussian that knows nothing of where it is, z given x is
independent in modes, as it is not in sites: the diagonal Gaussian of the encoder is then exact, and networks do the
rest.

Networks convolve over the lattice, without biases, and have the nonlinearity p/sqrt(1 + q^2), p and q convolutions: odd
in all fields together, as is what they correct.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from openmm_tsf.checks import positive
from openmm_tsf.edg.decoders import Conditional, bounded
from openmm_tsf.edg.diffusion import VariancePreserving
from openmm_tsf.edg.networks import TIME_FEATURES, Features, Latents, time_features
from openmm_tsf.edg.scores import Given, Parts
from openmm_tsf.nets import perceptron
from openmm_tsf.typing import Scalars, Vectors

KERNEL = 3
"""Rows and columns that a convolution reaches over."""
FEATURES = 2
"""Fields of x that the first network of a score hands on to its correction."""


def modes(lattice: tuple[int, int]) -> Float[Tensor, "sites sites"]:
    """Hartley's modes as rows, symmetric and orthogonal: amplitudes are field @ modes, and back again."""
    r, c = (torch.arange(n, dtype=torch.float64) for n in lattice)
    p, q = (y.flatten() for y in torch.meshgrid(r, c, indexing="ij"))
    angle = 2.0 * math.pi * (torch.outer(p, p) / lattice[0] + torch.outer(q, q) / lattice[1])
    return (angle.cos() + angle.sin()) / math.sqrt(lattice[0] * lattice[1])


def shells(lattice: tuple[int, int]) -> Int[Tensor, " sites"]:
    """Of every mode the number of its shell: modes that reflections of the lattice turn into each other."""
    p, q = (torch.minimum(torch.arange(n), n - torch.arange(n)) for n in lattice)
    return (p[:, None] * (lattice[1] // 2 + 1) + q).flatten()


class LatticeNetwork(nn.Module):
    """Fields to fields, both in modes: filter, convolve, filter. It starts at zero output.

    Args:
        lattice: rows and columns.
        n_in, n_out: numbers of fields.
        hidden, depth: fields of a layer, and layers.
        clocked: whether the layers depend on time.
    """

    def __init__(
        self, lattice: tuple[int, int], n_in: int, n_out: int, *, hidden: int, depth: int, clocked: bool = False
    ) -> None:
        super().__init__()
        self.lattice, shell = lattice, shells(lattice)
        self.register_buffer("modes", modes(lattice), persistent=False)
        self.register_buffer("shell", shell, persistent=False)
        n = int(shell.max()) + 1
        self.first = nn.Parameter(torch.ones(n_in, n))
        self.last = nn.Parameter(torch.zeros(n_out, hidden, n))
        widths = [n_in, *[hidden] * depth]
        options = {"padding": KERNEL // 2, "padding_mode": "circular", "bias": False}
        self.near = nn.ModuleList(nn.Conv2d(a, 2 * hidden, KERNEL, **options) for a in widths[:-1])
        self.far = nn.ModuleList(nn.Linear(a, 2 * hidden, bias=False) for a in widths[:-1])
        layers = depth if clocked else 0
        self.clocks = nn.ModuleList(perceptron(TIME_FEATURES, 2 * hidden, hidden=32, depth=1) for _ in range(layers))

    def forward(
        self, fields: Float[Tensor, "batch n_in sites"], time: Features | None = None
    ) -> tuple[Float[Tensor, "batch n_out sites"], Float[Tensor, "batch hidden rows columns"]]:
        """Of fields (B, n_in, N) and features of times (B, k): fields (B, n_out, N), and the last layer in sites."""
        h = ((fields * self.first[:, self.shell]) @ self.modes).unflatten(2, self.lattice)
        for i, (near, far) in enumerate(zip(self.near, self.far, strict=True)):
            y = near(h) + far(h.mean((2, 3)))[:, :, None, None]
            if self.clocks:
                y = y * (1.0 + self.clocks[i](time))[:, :, None, None]
            p, q = y.chunk(2, 1)
            new = p * torch.rsqrt(1.0 + q.square())
            h = h + new if i else new
        out = (h.flatten(2) @ self.modes)[:, None] * self.last[:, :, self.shell]
        return out.sum(2), h


class LatticeDecoder(nn.Module):
    """x = spread (g z + f(z)), from modes to sites, + w(z) xi, with a gain g of every shell.

    Args:
        lattice: rows and columns; there are as many latents as sites.
        hidden, depth: of the network.
        spread: standard deviation of x at the start.
        width: of x | z at the start, in units of `spread`.
    """

    n_slopes, conditioned = 0, False

    def __init__(
        self, lattice: tuple[int, int], *, hidden: int = 8, depth: int = 3, spread: float = 1.0, width: float = 0.3
    ) -> None:
        super().__init__()
        self.dim = self.latent_dim = math.prod(lattice)
        self.spread = positive("spread", spread)
        self.net = LatticeNetwork(lattice, 1, 1, hidden=hidden, depth=depth)
        self.log_gain = nn.Parameter(torch.zeros(int(self.net.shell.max()) + 1))
        self.log_width = nn.Parameter(torch.tensor(math.log(positive("width", width) * spread)))
        self.local = _zero(nn.Linear(hidden, 1, bias=False))

    def conditional(self, z: Latents, tau: Scalars | None = None) -> Conditional:
        """x | z of latents (B, d_z)."""
        plain = z * self.log_gain.exp()[self.net.shell]
        shift, hidden = self.net(plain[:, None])
        change = self.local(hidden.square().flatten(2).transpose(1, 2))[:, :, 0]
        mean = self.spread * (plain + shift[:, 0]) @ self.net.modes
        return Conditional(mean, self.log_width + bounded(change))


class LatticeScore(nn.Module):
    """The gaussian form of `scores`, with latents in modes.

    Args:
        lattice, hidden, depth: as of the decoder.
        diffusion: of the encoder.
        spread: about the standard deviation of x.
        corrected: False leaves s' out.
    """

    def __init__(
        self, lattice: tuple[int, int], diffusion: VariancePreserving, *, hidden: int = 8, depth: int = 3,
        spread: float = 1.0, corrected: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.latent_dim = self.dim = math.prod(lattice)
        self.diffusion, self.corrected = diffusion, corrected
        self.spread, features = positive("spread", spread), FEATURES if corrected else 0
        self.encoder = LatticeNetwork(lattice, 1, 1 + features, hidden=hidden, depth=depth)
        n = int(self.encoder.shell.max()) + 1
        self.gain, self.log_width = nn.Parameter(torch.zeros(n)), nn.Parameter(torch.zeros(n))
        self.change = _zero(nn.Linear(2 * hidden, n, bias=False))
        if corrected:
            self.net = LatticeNetwork(lattice, 3 + features, 1, hidden=hidden, depth=depth, clocked=True)

    def given(self, x: Vectors, tau: Scalars | None = None) -> Given:
        """What is needed of x (B, d)."""
        plain = (x / self.spread) @ self.encoder.modes
        out, hidden = self.encoder(plain[:, None])
        even = torch.cat((hidden.square().mean((2, 3)), hidden.mean((2, 3)).square()), 1)
        shell = self.encoder.shell
        log_width = bounded(self.log_width + self.change(even))[:, shell]
        features = torch.cat((plain, out[:, 1:].flatten(1)), 1)
        return Given(x, features, plain * self.gain[shell] + out[:, 0], log_width, tau)

    def parts(self, z: Latents, given: Given, t: Scalars) -> Parts:
        """The score of latents z (B, d_z) at times (B,)."""
        centre, width = given.frame(self.diffusion, t)
        n = (z - centre) / width
        divergence = -width.pow(-2).sum(1)
        if not self.corrected:
            return Parts(-n / width, divergence, torch.zeros_like(n))
        fields = torch.cat((n, z, given.features), 1).unflatten(1, (-1, self.latent_dim))
        change, _ = self.net(fields, time_features(self.diffusion.clock(t)))
        memory = self.diffusion.scale(t)[:, None]
        return Parts(-n / width, divergence, -memory / width * change[:, 0])


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    return layer
