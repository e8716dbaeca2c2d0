"""A target may be any function, which no file can hold. Its energies at a few draws of its generator tell it from
others."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from openmm_tsf.edg.generator import EDG, SampledEDG
from openmm_tsf.edg.networks import Target
from openmm_tsf.typing import Scalars, Vectors

N_POINTS = 8
"""Draws at which energies are compared."""
TOLERANCE = 1e-4
"""Relative difference of these energies up to which a target is the same, computed elsewhere."""


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of a target.

    Args:
        points: (P, d).
        energies: (P,) U of them; not finite where the target is not.
    """

    points: Vectors
    energies: Scalars

    @classmethod
    @torch.no_grad()
    def of(cls, target: Target, edg: EDG) -> Known:
        """Energies of a few draws, always the same of the same generator."""
        at = SampledEDG(edg, (edg.temperatures or (1.0,))[0])
        points = at.sample(N_POINTS, generator=torch.Generator().manual_seed(0))[0].cpu().double()
        return cls(points, target(points).double())

    @property
    def tells(self) -> bool:
        """Whether the target can be told from others, since some of the energies are finite."""
        return bool(torch.isfinite(self.energies).any())

    @torch.no_grad()
    def difference(self, target: Target) -> str | None:
        """How a target differs from the one that is known; None where it does not."""
        found = target(self.points).double()
        finite = torch.isfinite(found)
        apart = (found - self.energies).abs() / (1.0 + self.energies.abs())
        apart = torch.where(finite & torch.isfinite(self.energies), apart, 0.0)
        apart = torch.where(finite == torch.isfinite(self.energies), apart, torch.inf)
        if not (apart > TOLERANCE).any():
            return None
        row = int(apart.argmax())
        return (
            f"at {int((apart > TOLERANCE).sum())} of {len(found)} points energies differ, "
            f"{float(self.energies[row]):.6g} then and {float(found[row]):.6g} now at number {row}"
        )
