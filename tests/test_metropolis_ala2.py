"""Flow moves of alanine dipeptide keep what long reference simulations say of energy, phi and psi at 300 and 600 K.

Walkers start in the distribution, from reweighted draws of the shipped flow; the steps have to keep them there, with
the shipped flow, a damaged copy of it, and one that was never trained.
"""

from __future__ import annotations

import math
from functools import cache

import laws
import numpy as np
import pytest
import torch
from molecules import frames_of, perturbed, seeded

from openmm_tsf import BatchedEnergy, alanine_dipeptide, draw, pretrained
from openmm_tsf.flow import Flow, FlowSettings, build_flow
from openmm_tsf.flow_steps import KINDS, FlowSteps
from openmm_tsf.metropolis import Target, independence_step, latent_step
from openmm_tsf.reference import load_reference
from openmm_tsf.torsions import phi_psi
from openmm_tsf.trajectories import Frames
from openmm_tsf.units import kT

BINS = 64
STEP = {"trained": 0.1, "wrong": 0.1, "untrained": 0.05}


@cache
def energy() -> BatchedEnergy:
    molecule = alanine_dipeptide()
    return BatchedEnergy(molecule.system, molecule.positions, compile=False)


@cache
def flow_of(quality: str) -> Flow:
    if quality == "untrained":
        frames = Frames(frames_of("ala2", 1000), np.full(1000, 600.0))
        return build_flow(alanine_dipeptide(), frames, FlowSettings(blocks=1, hidden=8), generator=seeded(1))
    flow = pretrained("ala2").requires_grad_(False)
    return perturbed(flow, 0.0125) if quality == "wrong" else flow


@cache
def start(temperature: float, n: int, n_draws: int) -> torch.Tensor:
    """n positions from the Boltzmann distribution, up to a bias of the order of one in n_draws."""
    ensemble = draw(
        pretrained("ala2"), energy(), temperature=temperature, n=n_draws, generator=seeded(int(temperature))
    )
    return ensemble.resampled(n, generator=seeded(2)).double()


def centres(angle: np.ndarray) -> np.ndarray:
    """Centres of the reference's bins, into which its angles are gone too."""
    width = 2 * math.pi / BINS
    return (np.floor((angle + math.pi) / width).clip(0, BINS - 1) + 0.5) * width - math.pi


def observe(walkers) -> torch.Tensor:
    phi, psi = map(centres, phi_psi(walkers.x, alanine_dipeptide()))
    return torch.tensor(np.stack((walkers.energy, np.cos(phi), np.sin(phi), np.cos(psi), np.sin(psi)), 1))


def expected(temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of `observe` in the reference and their standard errors."""
    reference = load_reference("ala2").at(temperature)
    axis = (np.arange(BINS) + 0.5) * (2 * math.pi / BINS) - math.pi
    phi, psi = np.meshgrid(axis, axis, indexing="ij")
    functions = np.stack((np.cos(phi), np.sin(phi), np.cos(psi), np.sin(psi))).reshape(4, -1)
    p = reference.ramachandran.flatten() / reference.ramachandran.sum()
    mean = functions @ p
    error = np.sqrt((functions**2 @ p - mean**2) / reference.n_effective)
    return torch.tensor([reference.mean_energy, *mean]), torch.tensor([reference.mean_energy_error, *error])


def run(quality: str, kind: str, temperature: float, *, n_walkers=192, n_times=4, n_draws=6000, steered=None):
    """Observables (times, walkers, 5) and the share of accepted proposals."""
    target = Target(energy(), kT(temperature))
    walkers, g = target.at(start(temperature, n_walkers, n_draws)), seeded(7)
    steps = FlowSteps(kind=kind, n_proposals=8, n_walk_steps=8, step_size=STEP[quality])
    series, proposed, accepted = [], 0, 0
    for _ in range(n_times):
        walkers, counts = steps.run(walkers, target, steered or flow_of(quality).at(temperature), generator=g)
        series.append(observe(walkers))
        proposed += counts["independence_proposed"] + counts["latent_proposed"]
        accepted += counts["independence_accepted"] + counts["latent_accepted"]
        assert counts["unrepresentable"] == 0
    return torch.stack(series), accepted / proposed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("quality", "temperature"), [("trained", 300.0), ("trained", 600.0), ("wrong", 300.0), ("untrained", 600.0)]
)
def test_moves_keep_energy_phi_and_psi(quality, temperature, kind):
    series, accepted = run(quality, kind, temperature)
    if not (quality == "untrained" and kind == "independence"):  # of which not one draw is accepted
        assert accepted > 0.02
    laws.stationary(series, *expected(temperature), resolution=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quality", STEP)
@pytest.mark.parametrize("temperature", [300.0, 600.0])
def test_moves_keep_them_for_long(quality, temperature, kind):
    series, _ = run(quality, kind, temperature, n_walkers=800, n_times=12, n_draws=30_000)
    laws.stationary(series, *expected(temperature), resolution=0.05)


def test_the_shipped_flow_is_accepted_as_often_as_it_has_to_be():
    """At least half of the independent draws at 300 K."""
    target = Target(energy(), kT(300.0))
    walkers = target.at(start(300.0, 192, 6000))
    _, info = independence_step(walkers, target, flow_of("trained").at(300.0), generator=seeded(1), n_proposals=8)
    assert float(info.n_accepted.double().mean()) / 8 > 0.5


def test_draws_that_explore_keep_the_distribution():
    target = Target(energy(), kT(300.0))
    walkers, g, series = target.at(start(300.0, 192, 6000)), seeded(3), []
    for _ in range(4):
        walkers, _ = FlowSteps(n_proposals=8, explore=0.3).run(
            walkers, target, flow_of("trained").at(300.0), generator=g
        )
        series.append(observe(walkers))
    laws.stationary(torch.stack(series), *expected(300.0), resolution=0.1)


# --- negative controls ------------------------------------------------------------------------------------------------


class WithoutHastings:
    """The shipped flow with draws and states that nobody scores."""

    def __init__(self, steered):
        self.steered, self.latent_scale = steered, steered.latent_scale

    def propose(self, n, *, generator):
        x, log_prob, valid = self.steered.propose(n, generator=generator)
        return x, torch.zeros_like(log_prob), valid

    def score(self, x, *, generator):
        return torch.zeros(len(x))

    def to_latents(self, x, *, generator):
        return self.steered.to_latents(x, generator=generator)

    def from_latents(self, z):
        return self.steered.from_latents(z)


@pytest.mark.parametrize("quality", ["trained", "wrong"])
def test_without_the_hastings_term_the_energy_is_wrong(quality):
    series, _ = run(quality, "independence", 300.0, n_times=2, steered=WithoutHastings(flow_of(quality).at(300.0)))
    with pytest.raises(AssertionError, match="not stationary"):
        laws.stationary(series, *expected(300.0), resolution=0.1)


def test_another_temperature_is_noticed():
    target = Target(energy(), kT(350.0))
    start_here, g = target.at(start(300.0, 192, 6000)), seeded(1)
    walkers, _ = independence_step(start_here, target, flow_of("trained").at(350.0), generator=g, n_proposals=16)
    with pytest.raises(AssertionError, match="not stationary"):
        laws.stationary(observe(walkers)[None], *expected(300.0), resolution=0.1)
    laws.stationary(observe(walkers)[None], *expected(350.0), resolution=0.1)  # sixteen draws were enough to get there


# --- latents of molecules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", ["trained", "untrained"])
def test_latents_and_their_volumes(quality):
    """There and back, and the volume is the Jacobian of the map to flat internals."""
    steered = flow_of(quality).at(450.0)
    x = start(300.0, 192, 6000)[:20]
    z, log_volume = steered.to_latents(x, generator=seeded(1))
    assert z.shape == (20, 60) and steered.latent_scale.shape == (60,)
    again, log_volume_again, valid = steered.from_latents(z)
    assert valid.all() and float((log_volume - log_volume_again).abs().max()) < 1e-9
    internals = steered.flow.internals
    assert laws.difference(internals.inverse(again)[0], internals.inverse(x)[0], internals.circular) < 1e-9
    exact = torch.linalg.slogdet(laws.jacobians(lambda z: steered.flow.transform(z)[0], z[:3]))[1]
    assert float((exact - log_volume[:3]).abs().max()) < 1e-6
    circular = steered.latent_scale == 1.0
    assert int(circular.sum()) == int(internals.circular.sum())
    assert float((steered.latent_scale[~circular] - math.sqrt(0.75)).abs().max()) < 1e-12
    turned = z + 2 * math.pi * circular
    assert laws.difference(
        internals.inverse(steered.from_latents(turned)[0])[0], internals.inverse(x)[0], internals.circular
    ) < 1e-9  # fmt: skip


def test_scores_are_densities_and_rigid_motions_do_not_matter():
    steered, x = flow_of("trained").at(300.0), start(300.0, 192, 6000)[:50]
    assert float((steered.score(x, generator=seeded(1)) - steered.log_prob(x)).abs().max()) < 1e-12
    g = seeded(4)
    drawn, log_prob, valid = steered.propose(50, generator=g)
    assert float((steered.score(drawn[valid], generator=g) - log_prob[valid]).abs().max()) < 1e-8


def test_another_isomer_stays_as_it_is_and_is_reported():
    target = Target(energy(), kT(300.0))
    x = start(300.0, 192, 6000)[:3].clone()
    x[1] *= torch.tensor([1.0, 1.0, -1.0])  # the other enantiomer: the same energy, off the chart
    walkers, steered = target.at(x), flow_of("trained").at(300.0)
    for new, info in (
        independence_step(walkers, target, steered, generator=seeded(1), n_proposals=8),
        latent_step(walkers, target, steered, step_size=0.02, generator=seeded(1)),
    ):
        assert info.representable.tolist() == [True, False, True]
        assert torch.equal(new.x[1], x[1]) and int(info.n_accepted[1]) == 0
        assert (info.log_ratio[:, 1] == -math.inf).all()
    _, counts = FlowSteps(kind="mixed").run(walkers, target, steered, generator=seeded(1))
    assert counts["unrepresentable"] == 1
