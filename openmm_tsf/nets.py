"""Conditioner networks."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class Conditioner(nn.Module):
    """A perceptron of (numbers, angles) that starts at zero output, so that the layer it drives starts as the identity.

    Angles enter as sines and cosines of themselves and of their doubles, so the output is periodic in them.

    Args:
        n_plain: number of plain inputs.
        n_angles: number of angles [rad].
        n_out: number of outputs.
        hidden: width of the hidden layers.
        depth: number of hidden layers.
    """

    def __init__(self, n_plain: int, n_angles: int, n_out: int, *, hidden: int, depth: int) -> None:
        super().__init__()
        widths = [n_plain + 4 * n_angles, *[hidden] * depth]
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), nn.SiLU()]
        self.last = nn.Linear(widths[-1], n_out)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.body = nn.Sequential(*layers)

    def forward(self, plain: Tensor, angles: Tensor) -> Tensor:
        """(batch, n_plain) and (batch, n_angles) [rad] to (batch, n_out)."""
        sine, cosine = angles.sin(), angles.cos()
        double = 2.0 * sine * cosine, cosine * cosine - sine * sine
        return self.last(self.body(torch.cat((plain, sine, cosine, *double), 1)))
