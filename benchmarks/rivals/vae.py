"""Variational autoencoder by energy: the decoder of the diffusion generator with a Gaussian encoder and no diffusion.

z ~ N(0, I), x | z ~ p_D, and q(z | x) a diagonal Gaussian whose mean and widths a network gives. What is made small is

    E[ln N(z; 0, I) + ln p_D(x | z) + U(x) - ln q(z | x)] >= KL(p_D(x) || pi) - ln Z,

and the weights are exp(-U(x)) q(z | x) / [N(z; 0, I) p_D(x | z)], of mean Z.

Source: the ablation of H. Wu et al., arXiv 2401.02080.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from openmm_tsf.edg.decoders import Conditional
from openmm_tsf.edg.networks import with_harmonics
from openmm_tsf.nets import perceptron
from openmm_tsf.typing import Scalars, Vectors

from .common import (
    Budget,
    Counted,
    Drawn,
    followed,
    learn,
    log_normal,
    mean_of_finite,
    normal,
    seeded,
    without_numbers,
)  # fmt: skip


class Encoder(nn.Module):
    """q(z | x) = N(m(x), diag s(x)^2) of latents z (B, d_z) given x (B, d).

    Args:
        dim, latent_dim: d and d_z.
        scale: the network reads x / scale.
        harmonics: that it reads too, of as many components of x as there are latents.
        hidden, depth: its size.
    """

    def __init__(
        self, dim: int, latent_dim: int, scale: float, *, harmonics: int = 0, hidden: int = 128, depth: int = 3
    ) -> None:
        super().__init__()
        self.scale, self.harmonics, self.latent_dim = scale, harmonics, latent_dim
        n = dim + 2 * harmonics * min(dim, latent_dim)
        self.net = perceptron(n, 2 * latent_dim, hidden=hidden, depth=depth)

    def log_prob(self, z: Vectors, x: Vectors) -> Scalars:
        """ln q(z | x) (B,)."""
        features = with_harmonics(x / self.scale, self.harmonics, self.latent_dim)
        mean, log_width = self.net(features).chunk(2, 1)
        return Conditional(mean, log_width).log_prob(z)


class Pair(nn.Module):
    """A decoder and its encoder, to be trained together."""

    def __init__(self, decoder: nn.Module, encoder: Encoder) -> None:
        super().__init__()
        self.decoder, self.encoder = decoder, encoder

    def joint(
        self, n: int, latent_dim: int, generator: torch.Generator, heat: float = 1.0
    ) -> tuple[Vectors, Scalars]:  # fmt: skip
        """Draws x (n, d), reparametrised, and ln N(z) + ln p_D(x | z) - ln q(z | x) (n,).

        Heat is the temperature of the target in a decoder that reads its gradients.
        """
        z = normal(n, latent_dim, generator)
        conditional = self.decoder.conditional(z, z.new_full((n,), heat))
        x = conditional.sample(normal(*conditional.mean.shape, generator))
        return x, log_normal(z) + conditional.log_prob(x) - self.encoder.log_prob(z, x)


def vae(
    target: Any, budget: Budget, n: int, *, scale: float, decoder: Any, latent_dim: int, harmonics: int = 0,
    costs: int = 1, batch: int = 256, rate: float = 2e-3, anneal: bool = True, seed: int, name: str = "vae",
) -> Drawn:  # fmt: skip
    """Train decoder and encoder within the budget, then n weighted draws.

    Args:
        target: what to draw from.
        budget: of learning.
        n: number of draws.
        scale: the encoder reads x / scale.
        decoder: makes one, given the counted target, which decoders that read its gradients are to call.
        latent_dim: d_z.
        harmonics: that the encoder reads, see `Encoder`.
        costs: energies of a draw beyond those that the decoder asks the target for in a plain forward pass: 1 for
            U(x), and 1 for each gradient of the decoder that training differentiates again.
        batch: draws in a step of the optimiser.
        rate: its learning rate.
        anneal: whether the target starts hot, as for the diffusion generator.
        seed: of everything.
    """
    generator = torch.Generator().manual_seed(seed)
    counted = Counted(target, budget)

    def build() -> Pair:
        return Pair(decoder(counted), Encoder(target.dim, latent_dim, scale, harmonics=harmonics))

    pair = seeded(seed, build)

    def loss(heat: float) -> Tensor:
        x, rest = pair.joint(batch, latent_dim, generator, heat)
        u, finite = followed(counted, x)
        counted.n += (costs - 1) * batch
        return mean_of_finite(rest + u / heat, finite)

    steps = sum(1 for _ in learn(pair, counted, loss, rate=rate, anneal=anneal))
    training, seconds = counted.n, counted.seconds
    x, energy, log_weights = drawn(pair, counted, n, latent_dim, generator)
    facts = {"steps": steps, "batch": batch, "n_parameters": sum(p.numel() for p in pair.parameters())}
    return Drawn(
        name, x, energy, log_weights, training, counted.n - training, seconds, counted.seconds - seconds, facts
    )  # fmt: skip


def drawn(
    pair: Pair, target: Counted, n: int, latent_dim: int, generator: torch.Generator, *, chunk: int = 20_000
) -> tuple[Vectors, Scalars, Scalars]:
    """n draws, their energies and their log-weights."""
    parts = []
    for begin in range(0, n, chunk):
        with torch.no_grad():
            x, rest = pair.joint(min(chunk, n - begin), latent_dim, generator)
            u = target(x)
        parts.append((x, u, without_numbers(-u - rest)))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))
