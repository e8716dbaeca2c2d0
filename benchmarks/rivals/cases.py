"""The targets of the comparison: what is known of each, its budget, and how the diffusion generator is set for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from openmm_tsf.typing import Scalars, Vectors

GROUPS = ("2d", "wells", "logistic", "lj", "ising", "molecule")
TWO_D = ("MoG2", "MoG2(i)", "MoG6", "MoG9", "Ring", "Ring5")
WELLS, WELLS_SEED = (5, 20), 1
DATA = ("australian", "german", "heart")
CLUSTERS = {13: 20_000_000, 55: 20_000_000}
"""Particles, and energies."""
ISING_SIDE, ISING = 16, (2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6, 2.7)
ISING_CRITICAL = 2.0 / math.log1p(math.sqrt(2.0))
ISING_MARGIN = 0.05
"""a is (4 + margin)/T: the smaller, the nearer to a Gaussian the relaxation is."""
KELVIN = (600.0, 300.0)


@dataclass(frozen=True, eq=False)
class Case:
    """A target with what it takes to run and to judge methods on it.

    Args:
        name, group: of the tables.
        target: U(x) as it is; weights belong to it.
        training: U as methods learn it, where another one is smoother; the target itself by default.
        scale: about the width of the whole target; every method may know it.
        evaluations: the budget of every method.
        n: draws that are judged.
        log_z: exact, or None.
        facts: what judging needs besides.
        network: settings of the diffusion generator, those of its network decoder.
        dynamics: what differs for its Hamiltonian decoder.
        pairs: what differs for its decoder of pairs, of clusters alone.
        steps: settings of its training; fewer steps than the budget pays for, where those would take hours.
        weighing: settings of `draw`.
        rivals: settings of rivals, by method.
    """

    name: str
    group: str
    target: Any
    scale: float
    evaluations: int
    n: int
    log_z: float | None = None
    training: Any = None
    facts: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)
    dynamics: dict[str, Any] = field(default_factory=dict)
    pairs: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, Any] = field(default_factory=dict)
    weighing: dict[str, Any] = field(default_factory=dict)
    rivals: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def learned(self) -> Any:
        """What methods learn from."""
        return self.target if self.training is None else self.training


def names(groups: list[str]) -> list[str]:
    """All cases of these groups, in the order of the tables."""
    listed = {
        "2d": TWO_D, "wells": [f"wells{d}" for d in WELLS], "logistic": DATA, "lj": [f"LJ{n}" for n in CLUSTERS],
        "ising": [f"ising{t:g}" for t in ISING], "molecule": [f"ala2_{t:g}K" for t in KELVIN],
    }  # fmt: skip
    return [name for group in GROUPS if group in groups for name in listed[group]]


def case(name: str) -> Case:
    """A case by its name.

    Raises:
        ValueError: there is none of this name.
    """
    makers: dict[str, Callable[[], Case]] = {
        **{n: lambda n=n: plane(n) for n in TWO_D},
        **{f"wells{d}": lambda d=d: double_wells(d) for d in WELLS},
        **{n: lambda n=n: logistic(n) for n in DATA},
        **{f"LJ{n}": lambda n=n: cluster(n) for n in CLUSTERS},
        **{f"ising{t:g}": lambda t=t: ising(t) for t in ISING},
        **{f"ala2_{t:g}K": lambda t=t: alanine(t) for t in KELVIN},
    }
    if name not in makers:
        raise ValueError(f"no target {name!r}; there are {', '.join(makers)}")
    return makers[name]()


def plane(name: str) -> Case:
    """One of the six densities of the plane."""
    from openmm_tsf.edg.targets import density_2d

    target = density_2d(name)
    return Case(
        name, "2d", target, scale=3.0 if name == "Ring" else 5.0, evaluations=2_000_000, n=10_000, log_z=target.log_z(),
        dynamics={"stages": 3, "batch": 64}, rivals={"tsf": {"hot": 20.0}},
    )  # fmt: skip


class Wells:
    """Double wells at temperature 1."""

    def __init__(self, dim: int) -> None:
        from openmm_tsf.wells import random_wells

        self.wells, self.dim = random_wells(dim, generator=torch.Generator().manual_seed(WELLS_SEED)), dim

    def __call__(self, x: Vectors) -> Scalars:
        return self.wells(x)


def double_wells(dim: int) -> Case:
    """The double wells of the TSF paper, at the temperature that flows are trained at."""
    target = Wells(dim)
    exact = target.wells.at(1.0)
    return Case(
        f"wells{dim}", "wells", target, scale=2.0, evaluations=4_000_000, n=20_000, log_z=float(exact.log_z),
        facts={"mean_energy": exact.mean_energy}, network={"hidden": 128}, dynamics={"stages": 3, "batch": 256},
    )  # fmt: skip


def logistic(name: str) -> Case:
    """The posterior of a logistic regression; see edg_truth.py for the exact one."""
    from openmm_tsf.edg.logistic import regression

    task = regression(name)
    return Case(
        name, "logistic", task.posterior, scale=0.5, evaluations=2_000_000, n=10_000, facts={"task": task},
        network={"hidden": 128}, dynamics={"stages": 2, "batch": 256, "step": 0.01},
        steps={"anneal_share": 0.4, "learning_rate": 2e-3},
    )  # fmt: skip


def cluster(n: int) -> Case:
    """A Lennard-Jones cluster in a harmonic trap; overlaps are softened while methods learn."""
    from openmm_tsf.edg.lennard_jones import LennardJones

    target, pairs = LennardJones(n), {"stages": 12, "learning_rate": 5e-3, "weight_average": 0.99}
    if n < 20:
        pairs.update({"spread": 0.9, "steps": 1250, "batch": 96, "walkers": 96})
    else:  # overlaps of a cloud of latents are many more
        pairs.update({"spread": 1.2, "steps": 1000, "batch": 16, "anneal_from": 0.1, "soften_above": 4000.0})
    return Case(
        f"LJ{n}", "lj", target, training=target.softened(), scale=0.7 if n < 20 else 1.1, evaluations=CLUSTERS[n],
        n=10_000 if n < 20 else 1_000, network={"hidden": 256}, dynamics={"stages": 5, "batch": 256, "step": 0.01},
        pairs=pairs,
        steps={
            "steps": 5000, "anneal_from": 0.3, "anneal_share": 0.2, "learning_rate": 1.5e-3, "soften_above": 200.0,
        },
    )  # fmt: skip


def ising(temperature: float) -> Case:
    """The relaxed Ising model, in whitened coordinates."""
    from openmm_tsf.edg.relaxed_ising import RelaxedIsing

    target = RelaxedIsing(ISING_SIDE, temperature, a=(4.0 + ISING_MARGIN) / temperature, whitened=True)
    # begun at its own temperature, an ordered lattice never learns that small islands turn
    heating = {"anneal_from": 0.5, "anneal_share": 0.5 if temperature < ISING_CRITICAL else 0.0}
    network = {"lattice": (ISING_SIDE, ISING_SIDE), "hidden": 8, "depth": 3, "spread": 1.0, "width": 0.9, "batch": 64}
    return Case(
        f"ising{temperature:g}", "ising", target, scale=2.0, evaluations=4_000_000, n=1_000, log_z=target.log_z,
        facts={"log_z_ising": target.log_z_ising, "temperature": temperature}, network=network,
        dynamics={"lattice": None, "hidden": 256, "spread": 2.0, "stages": 3, "batch": 256},
        steps={"steps": 1200, "learning_rate": 1e-2, "weight_average": 0.995, **heating},
        weighing={"steps": 100},
    )  # fmt: skip


def alanine(kelvin: float) -> Case:
    """Alanine dipeptide in whitened flat internals; centres and covariances are of the shipped flow's draws at 600 K.

    The network decoder has as many latents as there are soft torsions: given them, the rest is nearly Gaussian.
    Dynamics add little noise of their own, and have a latent for each coordinate.
    """
    import openmm_tsf as tsf
    from openmm_tsf.edg.molecule import molecular_target

    molecule = tsf.alanine_dipeptide()
    energy = tsf.BatchedEnergy(molecule.system)
    generator = torch.Generator().manual_seed(1)
    frames = tsf.draw(tsf.pretrained("ala2"), energy, temperature=600.0, n=4000, generator=generator)
    target = molecular_target(molecule, energy, frames.resampled(generator=generator).numpy(), kelvin)
    return Case(
        f"ala2_{kelvin:g}K", "molecule", target, training=target.walled(), scale=1.0, evaluations=4_000_000, n=20_000,
        facts={"molecule": molecule, "energy": energy, "kelvin": kelvin},
        network={"hidden": 128, "latent_dim": int(target.internals.circular.sum()), "width": 0.15, "harmonics": 3},
        dynamics={"stages": 3, "batch": 256, "step": 0.01, "latent_dim": None},
        steps={"anneal_from": 0.3, "anneal_share": 0.4, "learning_rate": 4e-3},
    )  # fmt: skip
