"""A decoder for clusters of identical particles: what it does is a sum over pairs.

Latents and configurations are the relative coordinates of `lennard_jones`, whose squares and products do not know in
which order particles come, nor how the cluster is turned. The decoder is a flow in small stages, each of them a push

    y_i + sum_j phi_ij (y_i - y_j),

phi_ij a learned function of the distance of i and j, and of the distances of the particles around. So p_D(x) has the
symmetries of the target: exchanging particles, and turning or mirroring the cluster, does not change it. Pairs that
overlap in a Gaussian cloud of latents are told apart by a push, wherever they are and whichever particles they are. A
perceptron of all coordinates would have to learn this again for every pair and direction.

Two things keep pushes from folding space, after which a configuration has latents that no encoder finds. Functions of
a distance are sums of bells as high as they are wide, so that a step of training changes slopes no more where bells
are narrow. And coefficients are interpolated from a few stages to all, so that stages are small and alike.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from openmm_tsf.checks import positive
from openmm_tsf.edg.decoders import Conditional
from openmm_tsf.edg.lennard_jones import relative_basis
from openmm_tsf.edg.networks import Latents
from openmm_tsf.typing import Mask, Scalars, Vectors

CENTRES = (0.0, 0.2, 0.4, 0.55, 0.68, *(0.76 + 0.08 * i for i in range(10)), 1.62, 1.8, 2.1, 2.5)
"""Of the bells of a distance: dense where particles touch. The unit of length is where they like to be."""
BLUR = 1e-4
"""Added to squared distances, so that they have derivatives where particles coincide."""
SURROUNDINGS = 16
"""Numbers that a pair knows of those around it, each between -1 and 1."""
SHARPNESS = 4.0
"""Of these numbers: what the mean over pairs around is multiplied by."""
MOST_BY_PAIRS = 24
"""Particles up to which Jacobians are sums over pairs of pairs, which is faster there."""
KNOTS = 5
"""Stages that have coefficients of their own; those of the others lie between."""

PairVectors = Float[Tensor, "batch pairs 3"]
PairFeatures = Float[Tensor, "batch pairs features"]
Lengths = Float[Tensor, "batch pairs 1"]
Bells = Float[Tensor, "batch pairs bells"]
Matrices = Float[Tensor, "batch rows columns"]


class Push(NamedTuple):
    """Coefficients of a stage.

    Args:
        log_scale: () of all coordinates, before particles push each other.
        plain: (K,) of the bells in phi.
        mixed: (K, S) of the bells in what multiplies the surroundings.
        sense: (K, S) of the bells in the surroundings.
        bias: (S,) of the surroundings.
    """

    log_scale: Tensor
    plain: Tensor
    mixed: Tensor
    sense: Tensor
    bias: Tensor


class Pairs(nn.Module):
    """Vectors between particles, features of their lengths, sums over pairs, and pushes.

    Args:
        n: particles, at least 2.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        basis, (i, j) = relative_basis(n), torch.triu_indices(n, n, 1)
        each = torch.eye(n, dtype=basis.dtype)
        member, before = each[:, i] + each[:, j], torch.ones_like(each).triu(1)
        which = torch.zeros(n, n, dtype=torch.long)
        which[i, j] = which[j, i] = torch.arange(len(i))
        centres = torch.tensor(CENTRES, dtype=basis.dtype)
        gaps = centres.diff()
        widths = 1.1 * torch.maximum(torch.cat((gaps[:1], gaps)), torch.cat((gaps, gaps[-1:])))
        self.n, self.n_bells, self.share = n, len(centres), 1.0 / max(1, 2 * (n - 2))
        steps, one = (basis[:, i] - basis[:, j]).T.contiguous(), torch.eye(3, dtype=basis.dtype)
        for name, value in (
            ("steps", steps), ("columns", steps.repeat_interleave(3, 1)), ("tiled", one.repeat(1, n - 1)),
            ("member", member), ("sharing", member.T @ member - 2.0 * torch.eye(len(i), dtype=basis.dtype)),
            ("which", which), ("signs", (before - before.T)[..., None]), ("to_places", torch.kron(basis, one)),
            ("centres", centres), ("scales", 1.0 / (math.sqrt(8.0) * widths)), ("heights", widths / widths.max()),
        ):  # fmt: skip
            self.register_buffer(name, value, persistent=False)

    def vectors(self, y: Vectors) -> PairVectors:
        """d_ij (B, P, 3) of relative coordinates (B, 3 (n - 1))."""
        return self.steps @ y.reshape(len(y), self.n - 1, 3)

    def back(self, forces: PairVectors) -> Vectors:
        """Sums over pairs (B, 3 (n - 1)) of what moves i one way and j the other."""
        return (self.steps.T @ forces).flatten(1)

    def bells(self, d: PairVectors) -> Bells:
        """(B, P, K) functions of the lengths of d, much like Gaussians, which end at 2.8 widths."""
        return self._within(lengths(d))[1].square().square() * self.heights

    def bells_and_slopes(self, d: PairVectors) -> tuple[Bells, Bells]:
        """The same, and their derivatives by the length."""
        off, within = self._within(lengths(d))
        cube = within.square() * within * self.heights
        return cube * within, -8.0 * cube * off * self.scales

    def _within(self, r: Lengths) -> tuple[Bells, Bells]:
        """How far from the centres of the bells r is, in units of where they end, and 1 less its square, or 0."""
        off = (r - self.centres) * self.scales
        return off, (1.0 - off.square()).clamp_min(0.0)

    def around(self, features: PairFeatures) -> PairFeatures:
        """Means over the pairs that share a particle with each pair."""
        return self.share * (self.member.T @ (self.member @ features) - 2.0 * features)

    def _phi(self, push: Push, bells: Bells) -> tuple[Lengths, PairFeatures, PairFeatures]:
        """phi by the bells of all pairs, and the factors of its second part: each pair's own, and its surroundings."""
        mixed = bells @ push.mixed
        around = torch.tanh(SHARPNESS * self.around(bells @ push.sense) + push.bias)
        return (bells @ push.plain + _sum(mixed * around))[..., None], mixed, around

    def _by_coordinates(self, vectors: PairVectors) -> Float[Tensor, "batch pairs columns"]:
        """Products (B, P, d) of the rows of `steps` with vectors of pairs."""
        return (vectors @ self.tiled) * self.columns

    def pushed(self, push: Push, y: Vectors) -> Vectors:
        """y (B, d) after a stage."""
        y = y * push.log_scale.exp()
        d = self.vectors(y)
        return y + self.back(self._phi(push, self.bells(d))[0] * d)

    def pushed_with_jacobian(self, push: Push, y: Vectors) -> tuple[Vectors, Matrices]:
        """The same, and d pushed/d y (B, d, d).

        With phi_p of pair p depending on r_q of all pairs q that share a particle with it, by G_pq, it is the scale
        times 1 + sum_p phi_p s_p s_p^T + sum_pq (s_p d_p) G_pq (s_q e_q)^T, s_p the row of `steps`, e the unit vector.
        G_pp is `own`, and other G_pq are a_p . b_q.
        """
        scale = push.log_scale.exp()
        y = y * scale
        d = self.vectors(y)
        k, slope = self.bells_and_slopes(d)
        phi, mixed, around = self._phi(push, k)
        own = (slope @ push.plain + _sum((slope @ push.mixed) * around))[..., None]
        a = (self.share * SHARPNESS) * mixed * (1.0 - around.square())
        change = self._by_particles if self.n > MOST_BY_PAIRS else self._by_pairs
        matrix = change(d, phi, own, a, slope @ push.sense)
        return y + self.back(phi * d), scale * (matrix + torch.eye(y.shape[1]).to(y))

    def _by_pairs(self, d: PairVectors, phi: Lengths, own: Lengths, a: PairFeatures, b: PairFeatures) -> Matrices:
        """The sums of `pushed_with_jacobian`, as products of pairs with pairs: n^5 of them."""
        along = self._by_coordinates(unit_vectors(d))
        others = (a @ b.transpose(1, 2)) * self.sharing
        matrix = self._by_coordinates(d).transpose(1, 2) @ (own * along + others @ along)
        return matrix + torch.kron((self.steps.T * phi.transpose(1, 2)) @ self.steps, torch.eye(3).to(d))

    def _by_particles(self, d: PairVectors, phi: Lengths, own: Lengths, a: PairFeatures, b: PairFeatures) -> Matrices:
        """The same: pairs that share particle i are those of i, so the second sum is sum_i U_i V_i^T, with U_i what all
        d_ij a_ij do to the particles, V_i what all e_ij b_ij do, less pairs with themselves. That is n^3 S products."""
        e, one = unit_vectors(d), torch.eye(3).to(d)
        own = own - 2.0 * _sum(a * b)[..., None]
        each = ((own * d)[..., None] * e[:, :, None] + phi[..., None] * one).flatten(2)
        each = (each[:, self.which] * self.signs.abs()).unflatten(3, (3, 3)).transpose(2, 3)
        matrix = -each
        matrix.diagonal(dim1=1, dim2=3).add_(each.sum(3).permute(0, 2, 3, 1))
        matrix = matrix.flatten(3).flatten(1, 2) + self._on_particles(d, a) @ self._on_particles(e, b).transpose(1, 2)
        basis = self.to_places
        return basis @ matrix @ basis.T

    def _on_particles(self, d: PairVectors, a: PairFeatures) -> Matrices:
        """(B, 3 n, n S): for each i and s what the d_ij a_ijs do, which move i by as much as j the other way."""
        whole, features = (d[:, self.which] * self.signs).transpose(2, 3), a[:, self.which]
        matrix = features[:, :, None] * whole[..., None]
        matrix.diagonal(dim1=1, dim2=3).add_(matrix.sum(3).permute(0, 2, 3, 1))
        return matrix.flatten(3).flatten(1, 2)


def _sum(features: PairFeatures) -> Float[Tensor, "batch pairs"]:
    """Over features: a product, which is several times as fast as a sum over the last of three dimensions."""
    return features @ features.new_ones(features.shape[2])


def lengths(d: PairVectors) -> Lengths:
    """(B, P, 1) of vectors, never 0."""
    return (d.square().sum(2, keepdim=True) + BLUR).sqrt()


def unit_vectors(d: PairVectors) -> PairVectors:
    """d over its length."""
    return d / lengths(d)


class PairDecoder(nn.Module):
    """Pushes of a Gaussian cloud: x = f(z) + w xi, xi ~ N(0, I).

    Training takes w for 0, see `bound`; weights know of it.

    Args:
        n: particles; there are 3 (n - 1) latents and as many components.
        stages: number of pushes.
        spread: standard deviation of a component at the start.
        width: w, in units of `spread`; see `pair_score` for how narrow it should be.

    Raises:
        ValueError: no stage.
    """

    n_slopes, conditioned = 0, False

    def __init__(self, n: int, stages: int = 12, *, spread: float = 1.0, width: float = 0.001) -> None:
        super().__init__()
        if stages < 1:
            raise ValueError(f"need at least one stage, not {stages}")
        self.dim = self.latent_dim = 3 * (n - 1)
        self.spread, self.pairs = positive("spread", spread), Pairs(n)
        self.log_width = math.log(positive("width", width) * spread)
        knots, n_bells = min(KNOTS, stages), self.pairs.n_bells
        places = (torch.arange(stages) + 0.5) / stages * (knots - 1)
        shares = (1.0 - (places[:, None] - torch.arange(knots)).abs()).clamp_min(0.0)
        self.register_buffer("shares", shares, persistent=False)
        self.log_scale = nn.Parameter(torch.zeros(knots))
        self.plain = nn.Parameter(torch.zeros(knots, n_bells))
        self.mixed = nn.Parameter(torch.zeros(knots, n_bells, SURROUNDINGS))
        self.sense = nn.Parameter(torch.randn(knots, n_bells, SURROUNDINGS) / math.sqrt(n_bells))
        self.bias = nn.Parameter(torch.linspace(-1.0, 1.0, SURROUNDINGS).repeat(knots, 1))

    @property
    def pushes(self) -> list[Push]:
        """Coefficients of the stages; the more there are, the less each does."""
        stages, knots = self.shares.shape
        coefficients = [
            (self.shares @ c.reshape(knots, -1)).view(stages, *c.shape[1:])
            for c in (self.log_scale / stages, self.plain / stages, self.mixed / stages, self.sense, self.bias)
        ]
        return [Push(*stage) for stage in zip(*coefficients, strict=True)]

    def centre(self, z: Latents) -> Vectors:
        """f(z) (B, d)."""
        y = self.spread * z
        for push in self.pushes:
            y = self.pairs.pushed(push, y)
        return y

    def centre_and_jacobian(self, z: Latents) -> tuple[Vectors, Matrices]:
        """f(z) (B, d), and its derivatives (B, d, d)."""
        first, *others = self.pushes
        y, matrix = self.pairs.pushed_with_jacobian(first, self.spread * z)
        for push in others:
            y, stage = self.pairs.pushed_with_jacobian(push, y)
            matrix = stage @ matrix
        return y, self.spread * matrix

    def centre_and_log_det(self, z: Latents) -> tuple[Vectors, Scalars, Mask]:
        """f(z) (B, d), ln|det df/dz| (B,), and where f has folded space, so that several z have one f(z) (B,).

        f is one to one if it has not folded space anywhere. Where it has, the gradient of the logarithm points back.
        """
        y, matrix = self.centre_and_jacobian(z)
        sign, log_det = torch.linalg.slogdet(matrix)
        folded = sign <= 0.0
        return y, torch.where(folded, 2.0 * log_det.detach() - log_det, log_det), folded

    def backwards(self, x: Vectors, repeats: int) -> Latents:
        """About the z (B, d) that f takes to x (B, d): stages undone from the last to the first, as what they would do
        to what they have come to, `repeats` times over; off by the order 1/stages of that power."""
        for push in reversed(self.pushes):
            y = x
            for _ in range(repeats):
                y = y - (self.pairs.pushed(push, y) - x)
            x = y
        return x / self.spread

    def conditional(self, z: Latents, tau: Scalars | None = None) -> Conditional:
        """x | z of latents (B, d); there is one temperature."""
        y = self.centre(z)
        return Conditional(y, torch.full_like(y, self.log_width))
