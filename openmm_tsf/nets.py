"""Networks: perceptrons, conditioners of flows, and the moving average of weights."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn

HARMONICS = 3
"""Multiples of angles that conditioners read, by default."""


def perceptron(n_in: int, n_out: int, *, hidden: int, depth: int) -> nn.Sequential:
    """A perceptron that starts at zero output, so that what it corrects starts uncorrected."""
    widths = [n_in, *[hidden] * depth]
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.SiLU()]
    last = nn.Linear(widths[-1], n_out)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


@torch.no_grad()
def follow(average: Iterable[Tensor], weights: Iterable[Tensor], decay: float, step: int) -> None:
    """Move an exponential average of weights after a step (from 1); in the first steps it follows closely."""
    keep = min(decay, step / (step + 10.0))
    for mean, new in zip(average, weights, strict=True):
        mean.lerp_(new, 1.0 - keep)


class Conditioner(nn.Module):
    """A perceptron of (numbers, angles) that starts at zero output, so that the layer it drives starts as the identity.

    Angles enter as sines and cosines of their multiples, so the output is periodic in them. The third serves methyl
    groups, whose threefold barrier is everywhere in a molecule.

    Args:
        n_plain: number of plain inputs.
        n_angles: number of angles [rad].
        n_out: number of outputs.
        hidden: width of the hidden layers.
        depth: number of hidden layers.
        harmonics: multiples of the angles.
    """

    def __init__(
        self, n_plain: int, n_angles: int, n_out: int, *, hidden: int, depth: int, harmonics: int = HARMONICS
    ) -> None:
        super().__init__()
        self.harmonics = harmonics
        layers = perceptron(n_plain + 2 * harmonics * n_angles, n_out, hidden=hidden, depth=depth)
        self.last, self.body = layers[-1], layers[:-1]

    def forward(self, plain: Tensor, angles: Tensor) -> Tensor:
        """(batch, n_plain) and (batch, n_angles) [rad] to (batch, n_out)."""
        sine, cosine = angles.sin(), angles.cos()
        features = [plain, sine, cosine]
        for _ in range(self.harmonics - 1):
            s, c = features[-2:]
            features += [s * cosine + c * sine, c * cosine - s * sine]
        return self.last(self.body(torch.cat(features, 1)))
