"""Decoder and score for clusters of identical particles: what they do is a sum over pairs.

Latents and configurations are the relative coordinates of `lennard_jones`, whose squares and products do not know in
which order particles come, nor how the cluster is turned. With d_ij = y_i - y_j of unit vector e_ij, both build on maps

    y_i + sum_j phi_ij d_ij                                 a push, phi_ij a number for each pair
    u_i + sum_j [phi_ij 1 + psi_ij e_ij e_ij^T] (u_i - u_j)   a stretch of other coordinates u

with phi and psi learned functions of the distance, and of the distances of the particles around. So p_D(x) and p_E(z|x)
have the symmetries of the target: exchanging particles, and turning or mirroring the cluster, changes neither. Pairs
that overlap in a Gaussian cloud of latents are told apart by a push, wherever they are and whichever particles they
are: this a perceptron of all coordinates would have to learn again for every pair and direction.

The encoder's base is a Gaussian N(m, w^2) around the latents m(x) that x came from. A few pushes guess them; then come
steps of a Newton iteration m <- m + A (x - f(m)), f the decoder's mean and A a stretch. The correction of the score is
a product of stretches of n = (z - a m)/w_t, whose coefficients depend on x and on time: it makes the Gaussian as narrow
in each direction as the decoder makes it, and is linear in z, so that its divergence is cheap.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from openmm_tsf.edg.decoders import Conditional, bounded, positive
from openmm_tsf.edg.diffusion import VariancePreserving
from openmm_tsf.edg.lennard_jones import relative_basis
from openmm_tsf.edg.networks import TIME_FEATURES, Latents, time_features
from openmm_tsf.edg.scores import Given, Parts
from openmm_tsf.nets import perceptron
from openmm_tsf.typing import Scalars, Vectors

CENTRES = (0.0, 0.2, 0.4, 0.55, 0.68, *(0.76 + 0.08 * i for i in range(10)), 1.62, 1.8, 2.1, 2.5)
"""Of the kernels of a distance: dense where particles touch. The unit of length is where they like to be."""
BLUR = 1e-4
"""Added to squared distances, so that they have derivatives where particles coincide."""
LONGEST = 1.0
"""Norm of a Newton step beyond which it is not believed: it never gets longer."""
SURROUNDINGS = 6
"""Numbers that a pair knows of those around it."""
CONTEXT = 4
"""The same for the coefficients of the score's correction."""

PairVectors = Float[Tensor, "batch pairs 3"]
PairFeatures = Float[Tensor, "batch pairs features"]
Coefficients = Float[Tensor, "batch pairs coefficients"]


class Pairs(nn.Module):
    """Vectors between particles, features of their lengths, and sums over pairs.

    Args:
        n: particles, at least 2.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        basis, (i, j) = relative_basis(n), torch.triu_indices(n, n, 1)
        one = torch.eye(n, dtype=basis.dtype)
        member = one[:, i] + one[:, j]
        sharing = (member.T @ member - 2.0 * torch.eye(len(i), dtype=basis.dtype)) / max(1, 2 * (n - 2))
        centres = torch.tensor(CENTRES, dtype=basis.dtype)
        gaps = centres.diff()
        widths = 1.1 * torch.maximum(torch.cat((gaps[:1], gaps)), torch.cat((gaps, gaps[-1:])))
        self.n, self.n_kernels = n, len(centres)
        for name, value in (
            ("steps", (basis[:, i] - basis[:, j]).T.contiguous()), ("sharing", sharing), ("centres", centres),
            ("scales", 1.0 / (math.sqrt(8.0) * widths)),
        ):  # fmt: skip
            self.register_buffer(name, value, persistent=False)

    def vectors(self, y: Vectors) -> PairVectors:
        """d_ij (B, P, 3) of relative coordinates (B, 3 (n - 1))."""
        return self.steps @ y.reshape(len(y), self.n - 1, 3)

    def back(self, forces: PairVectors) -> Vectors:
        """Sums over pairs (B, 3 (n - 1)) of what moves i one way and j the other."""
        return (self.steps.T @ forces).flatten(1)

    def kernels(self, d: PairVectors) -> PairFeatures:
        """(B, P, K) bells of the lengths of d, much like Gaussians, which end at 2.8 widths."""
        r = (d.square().sum(2, keepdim=True) + BLUR).sqrt()
        return (1.0 - ((r - self.centres) * self.scales).square()).clamp_min(0.0).square().square()

    def around(self, features: PairFeatures) -> PairFeatures:
        """Means over the pairs that share a particle with each pair."""
        return self.sharing @ features

    def stretched(self, coefficients: Coefficients, unit: PairVectors, u: Latents) -> Latents:
        """sum_j [phi_ij 1 + psi_ij e_ij e_ij^T] (u_i - u_j) with coefficients (B, P, 2)."""
        d = self.vectors(u)
        along = coefficients[..., 1:] * (unit * d).sum(2, keepdim=True)
        return self.back(coefficients[..., :1] * d + along * unit)


def unit_vectors(d: PairVectors) -> PairVectors:
    """d over its length."""
    return d / (d.square().sum(2, keepdim=True) + BLUR).sqrt()


class Push(nn.Module):
    """y_i + sum_j phi_ij d_ij after a change of scale; the identity at the start."""

    def __init__(self, n_kernels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.plain = nn.Parameter(torch.zeros(n_kernels))
        self.mixed = nn.Parameter(torch.zeros(n_kernels, SURROUNDINGS))
        self.sense = nn.Parameter(torch.randn(n_kernels, SURROUNDINGS) / math.sqrt(n_kernels))

    def forward(self, pairs: Pairs, y: Vectors) -> Vectors:
        y = y * self.log_scale.exp()
        d = pairs.vectors(y)
        k = pairs.kernels(d)
        phi = k @ self.plain + ((k @ self.mixed) * pairs.around(k @ self.sense)).sum(2)
        return y + pairs.back(phi[..., None] * d)


class Width(nn.Module):
    """One ln width (B, 1) of all components, by the distances of a configuration."""

    def __init__(self, n_kernels: int, width: float) -> None:
        super().__init__()
        self.log_width = nn.Parameter(torch.tensor(math.log(positive("width", width))))
        self.change = nn.Parameter(torch.zeros(n_kernels))

    def forward(self, kernels: PairFeatures) -> Float[Tensor, "batch 1"]:
        return bounded(self.log_width + kernels.sum(1) @ self.change)[:, None]


class PairDecoder(nn.Module):
    """Pushes of a Gaussian cloud: x = f(z) + w(x) xi, xi ~ N(0, I).

    Args:
        n: particles; there are 3 (n - 1) latents and as many components.
        stages: number of pushes.
        spread: standard deviation of a component at the start.
        width: w at the start, in units of `spread`.
    """

    n_slopes, conditioned = 0, False

    def __init__(self, n: int, stages: int = 5, *, spread: float = 1.0, width: float = 0.03) -> None:
        super().__init__()
        self.dim = self.latent_dim = 3 * (n - 1)
        self.spread, self.pairs = positive("spread", spread), Pairs(n)
        self.pushes = nn.ModuleList(Push(self.pairs.n_kernels) for _ in range(stages))
        self.width = Width(self.pairs.n_kernels, width * spread)

    def centre(self, z: Latents) -> Vectors:
        """f(z) (B, d)."""
        y = self.spread * z
        for push in self.pushes:
            y = push(self.pairs, y)
        return y

    def conditional(self, z: Latents, tau: Scalars | None = None) -> Conditional:
        """x | z of latents (B, d); there is one temperature."""
        y = self.centre(z)
        return Conditional(y, self.width(self.pairs.kernels(self.pairs.vectors(y))).expand_as(y))


class PairScore(nn.Module):
    """s = -(n + a s'(n, x, t))/w_t around latents m(x) that the decoder takes to x.

    Args:
        decoder: of the generator; it stays the decoder's, though the score trains it too.
        diffusion: of the encoder.
        rounds: stretches of the correction.
        refinements: Newton steps towards m(x).
        hidden, depth: of the network of time.
    """

    def __init__(
        self, decoder: PairDecoder, diffusion: VariancePreserving, *, rounds: int = 3, refinements: int = 2,
        hidden: int = 48, depth: int = 2,
    ) -> None:  # fmt: skip
        super().__init__()
        self._decoder = (decoder,)  # a tuple hides it from the module's parameters
        self.latent_dim, self.diffusion, self.rounds = decoder.latent_dim, diffusion, rounds
        self.pairs, n_kernels = Pairs(decoder.pairs.n), decoder.pairs.n_kernels
        self.pushes = nn.ModuleList(Push(n_kernels) for _ in decoder.pushes)
        self.newton = nn.Parameter(torch.zeros(refinements, n_kernels, 2))
        self.log_steps = nn.Parameter(torch.zeros(refinements))
        self.width = Width(n_kernels, 1.2 * float(decoder.width.log_width.detach().exp()))
        n = 2 * rounds + 1
        self.time = perceptron(TIME_FEATURES, n_kernels * n + rounds, hidden=hidden, depth=depth)
        self.sense = nn.Parameter(torch.randn(n_kernels, CONTEXT) / math.sqrt(n_kernels))
        self.mixed = nn.Parameter(torch.zeros(CONTEXT, n_kernels, n))

    def given(self, x: Vectors, tau: Scalars | None = None) -> Given:
        """What is needed of x (B, d); the features are the kernels of its distances."""
        decoder, m = self._decoder[0], x
        for push in self.pushes:
            m = push(self.pairs, m)
        m, d = m / decoder.spread, self.pairs.vectors(x)
        k, unit = self.pairs.kernels(d), unit_vectors(d)
        for coefficients, log_step in zip(self.newton, self.log_steps, strict=True):
            miss = (x - decoder.centre(m)) / decoder.spread
            step = log_step.exp() * miss + self.pairs.stretched(k @ coefficients, unit, miss)
            m = m + step / (1.0 + step.square().sum(1, keepdim=True) / LONGEST**2).sqrt()
        return Given(x, k.flatten(1), m, self.width(k).expand_as(m), tau)

    def parts(self, z: Latents, given: Given, t: Scalars) -> Parts:
        """The score of latents z (B, d) at times (B,)."""
        centre, width = given.frame(self.diffusion, t)
        memory = self.diffusion.scale(t)[:, None]
        d, k = self.pairs.vectors(given.x), given.features.unflatten(1, (-1, self.pairs.n_kernels))
        unit, (coefficients, uniform) = unit_vectors(d), self._coefficients(k, t)
        n = u = (z - centre) / width
        for i in range(self.rounds):
            pair = coefficients[..., 2 * i : 2 * i + 2]
            u = u * (1.0 + uniform[:, i : i + 1]) + self.pairs.stretched(pair, unit, u)
        shift = self.pairs.back(coefficients[..., -1:] * d)
        return Parts(-n / width, -width.pow(-2).sum(1), -memory / width * (u - n + shift))

    def _coefficients(self, k: PairFeatures, t: Scalars) -> tuple[Coefficients, Float[Tensor, "batch rounds"]]:
        """Of the stretches and of the shift, for each pair (B, P, 2 rounds + 1); and of u itself."""
        c, uniform = self.time(time_features(self.diffusion.clock(t))).tensor_split((-self.rounds,), 1)
        around = self.pairs.around(k @ self.sense)
        mixed = (k @ self.mixed.transpose(0, 1).flatten(1)).unflatten(2, (CONTEXT, -1))
        plain = k @ c.unflatten(1, (self.pairs.n_kernels, -1))
        return plain + (mixed * around[..., None]).sum(2), uniform
