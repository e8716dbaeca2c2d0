"""What tests of moves share: small flows in files, exact states and means of chain4, openmmtools without its noise."""

from __future__ import annotations

import logging
import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from molecules import CHAIN4, MOLECULES, frames_of, internals_of, perturbed, seeded
from openmm import unit
from scipy.special import i0e, i1e
from torch import Tensor

from openmm_tsf import save_flow
from openmm_tsf.flow import Flow, FlowSettings, build_flow
from openmm_tsf.torsions import dihedrals
from openmm_tsf.trajectories import Frames
from openmm_tsf.units import kT

SMALL = FlowSettings(blocks=1, hidden=8, depth=1, energy_order=2, entropy_order=1)


@cache
def small_flow(name: str, seed: int = 1) -> Flow:
    """A flow of one of MOLECULES at 600 K that knows the covariances of the stiff coordinates, and little else."""
    positions = chain4_states(2000, 600.0, seed=9) if name == "chain4" else frames_of(name, 600)
    frames = Frames(positions, np.full(len(positions), 600.0))
    flow = build_flow(MOLECULES[name](), frames, SMALL, generator=seeded(1))
    return perturbed(flow, 0.05 if name == "chain4" else 0.005, seed).requires_grad_(False)


def flow_file(name: str, folder: Path, seed: int = 1) -> Path:
    """`small_flow` in a file of that name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace(' ', '_')}.tsf"
    save_flow(small_flow(name, seed), path)
    return path


def chain4_states(n: int, temperature: float, seed: int, barrier: float | None = None) -> np.ndarray:
    """n exact draws (n, 4, 3) [nm] of `harmonic_chain4`, or of the same with another barrier of the torsion."""
    barrier = CHAIN4["barrier"] if barrier is None else barrier
    rng, tau = np.random.default_rng(seed), kT(temperature)
    widths = np.sqrt(tau / np.array([CHAIN4["bond"]] * 3 + [CHAIN4["angle"]] * 2))
    q = internals_of("chain4").reference.numpy() + np.zeros((n, 1))
    q[:, :5] += widths * rng.normal(size=(n, 5))
    q[:, 5] = rng.vonmises(CHAIN4["centre"], barrier / tau, size=n)
    return internals_of("chain4").forward(torch.tensor(q))[0].numpy()


def chain4_observables(x: np.ndarray) -> Tensor:
    """(n, 4): energies of bonds and of angles [kJ/mol], cosine and sine of the torsion from its minimum."""
    internals = internals_of("chain4")
    delta = internals.inverse(torch.tensor(x))[0] - internals.reference
    bonds = 0.5 * CHAIN4["bond"] * (delta[:, :3] ** 2).sum(1)
    angles = 0.5 * CHAIN4["angle"] * (delta[:, 3:5] ** 2).sum(1)
    phi = torch.tensor(dihedrals(x, (2, 0, 1, 3))) - CHAIN4["centre"]
    return torch.stack((bonds, angles, phi.cos(), phi.sin()), 1)


def expected_chain4(temperature: float, barrier: float | None = None) -> Tensor:
    """Exact means of `chain4_observables`."""
    tau = kT(temperature)
    kappa = (CHAIN4["barrier"] if barrier is None else barrier) / tau
    return torch.tensor([1.5 * tau, tau, i1e(kappa) / i0e(kappa), 0.0])


def mirror(x: np.ndarray) -> np.ndarray:
    """The other enantiomer."""
    return x * np.array([1.0, 1.0, -1.0])


@cache
def openmmtools_parts() -> SimpleNamespace:
    """mcmc, ThermodynamicState, SamplerState, a cache on the Reference platform, and states with a lambda_torsion."""
    import openmm

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from openmmtools import cache as caches
        from openmmtools import mcmc, states

    logging.getLogger("openmmtools").setLevel(logging.ERROR)

    class Lambda(states.GlobalParameterState):
        lambda_torsion = states.GlobalParameterState.GlobalParameter("lambda_torsion", standard_value=1.0)

    def with_lambda(system: Any, temperature: float, value: float) -> Any:
        plain = states.ThermodynamicState(system, temperature * unit.kelvin)
        return states.CompoundThermodynamicState(plain, [Lambda(lambda_torsion=value)])

    return SimpleNamespace(
        mcmc=mcmc,
        ThermodynamicState=states.ThermodynamicState,
        SamplerState=states.SamplerState,
        cache=caches.ContextCache(platform=openmm.Platform.getPlatformByName("Reference")),
        with_lambda=with_lambda,
    )
