"""Metropolis steps with a diffusion generator keep a known density, however poor the generator; each term is needed."""

import math
from dataclasses import dataclass

import pytest
import torch
from molecules import CHAIN4, chain4_internals, harmonic_chain4, internals_of, perturbed, seeded
from test_edg_molecule import chain_target

from openmm_tsf.edg import EDG, EDGSettings, build_edg
from openmm_tsf.edg.molecular import MolecularEDG
from openmm_tsf.edg.molecule import MolecularTarget
from openmm_tsf.edg.networks import log_normal
from openmm_tsf.edg.proposal import EDGProposal
from openmm_tsf.energy import BatchedEnergy
from openmm_tsf.ensemble import draw
from openmm_tsf.metropolis import Target, independence_step, latent_step
from openmm_tsf.typing import Proposal
from openmm_tsf.units import kT

N, LOOSE = 2500, {"rtol": 1e-3, "atol": 1e-3}
CENTRES, WIDTHS = torch.tensor([[-1.0, 0.0], [1.2, 0.5]], dtype=torch.float64), torch.tensor([0.5, 0.9])


@dataclass(frozen=True)
class Pair:
    """Two Gaussians of weights 0.3 and 0.7 in the plane."""

    dim = 2

    def __call__(self, x):
        w = WIDTHS.double()
        parts = -0.5 * (x[:, None] - CENTRES).square().sum(2) / w**2 - 2.0 * w.log()
        return -(parts + torch.tensor([0.3, 0.7]).log()).logsumexp(1)

    def exact(self, n: int, seed: int):
        g = seeded(seed)
        k = (torch.rand(n, generator=g) < 0.7).long()
        return CENTRES[k] + WIDTHS[k, None] * torch.randn(n, 2, generator=g)


def features(x):
    return torch.stack((x[:, 0], x[:, 1], x[:, 0] ** 2, x[:, 0] * x[:, 1], (x[:, 0] > 0.3).double()), 1)


def poor_edg(**changes) -> EDG:
    """Not trained, and an encoder whose width depends on x for no reason."""
    given = {"hidden": 12, "depth": 1, "spread": 1.2, "width": 1.0, "latent_dim": 1, **changes}
    edg = build_edg(Pair(), EDGSettings(**given), seed=1)
    perturbed(edg.score.net, 0.1)
    perturbed(edg.decoder, 0.3)
    for row, (size, seed) in enumerate(((0.3, 3), (2.0, 2))):  # mean and ln width of the encoder
        edg.score.encoder[-1].weight.data[row] = size * torch.randn(12, generator=seeded(seed))
    return edg


def surprise(before, after) -> float:
    """Largest change of a mean, in standard errors of the difference of two samples of this size."""
    error = (before.var(0) / len(before) + after.var(0) / len(after)).sqrt()
    return float(((after.mean(0) - before.mean(0)).abs() / error).max())


def walked(proposal, kind: str):
    """Where steps have brought exact draws, and the share accepted."""
    target, g = Target(Pair(), 1.0), seeded(5)
    walkers, accepted, times = target.at(Pair().exact(N, seed=4)), 0.0, 4 if kind == "independence" else 8
    for _ in range(times):
        if kind == "latent":
            walkers, info = latent_step(walkers, target, proposal, step_size=0.8, generator=g)
        else:
            walkers, info = independence_step(walkers, target, proposal, generator=g, n_proposals=2)
        accepted += float(info.n_accepted.double().mean()) / (times * info.n_proposed)
    return walkers.x, accepted


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("kind", ["independence", "latent"])
def test_steps_with_a_poor_generator_keep_the_density(kind, conditioned):
    proposal = EDGProposal(poor_edg(conditioned=conditioned), 1.3 if conditioned else 1.0, **LOOSE)
    assert isinstance(proposal, Proposal)
    x, accepted = walked(proposal, kind)
    assert accepted > 0.05
    assert surprise(features(Pair().exact(20_000, seed=8)), features(x)) < 4.0


@dataclass(frozen=True, eq=False)
class Wrong(EDGProposal):
    """Leaves the encoder's density out."""

    def propose(self, n, *, generator):
        conditional, x, z = self.edg.at(self.tau).decoded(n, generator=generator)
        return x, log_normal(z) + conditional.log_prob(x), torch.isfinite(x).all(1)

    def score(self, x, *, generator=None):
        z, _ = self._with_latents(x, generator)
        return log_normal(z) + self._conditional(z).log_prob(x)

    def from_latents(self, z):
        x, _, valid = super().from_latents(z)
        return x, self._conditional(z[:, :1]).log_width.sum(1), valid

    def to_latents(self, x, *, generator=None):
        v, _ = super().to_latents(x, generator=generator)
        return v, self._conditional(v[:, :1]).log_width.sum(1)


@pytest.mark.parametrize("kind", ["independence", "latent"])
def test_the_encoder_is_needed_for_that(kind):
    x, _ = walked(Wrong(poor_edg(), **LOOSE), kind)
    assert surprise(features(Pair().exact(20_000, seed=8)), features(x)) > 6.0


def test_latents_go_round_and_volumes_are_those_of_the_density():
    proposal = EDGProposal(poor_edg(), rtol=1e-8, atol=1e-8)
    x = Pair().exact(40, seed=3)
    v, volume = proposal.to_latents(x, generator=seeded(6))
    again, back, valid = proposal.from_latents(v)
    assert valid.all()
    assert torch.allclose(again, x, atol=1e-12)
    assert torch.allclose(back, volume, atol=1e-6)
    scored = proposal.score(x, generator=seeded(6))  # the same latents
    assert torch.allclose(log_normal(v[:, :1]) + log_normal(v[:, 1:]) - volume, scored, atol=1e-6)


def test_what_is_not_finite_has_no_density():
    proposal = EDGProposal(poor_edg())
    x = torch.tensor([[0.0, 0.0], [math.nan, 0.0]])
    assert torch.isfinite(proposal.score(x, generator=seeded(1))).tolist() == [True, False]
    assert torch.isfinite(proposal.to_latents(x, generator=seeded(1))[1]).tolist() == [True, False]
    with pytest.raises(ValueError, match="give a generator"):
        proposal.score(x)
    with pytest.raises(ValueError, match="knows one temperature"):
        EDGProposal(poor_edg(), 2.0)


# --- a molecule -------------------------------------------------------------------------------------------------------


def chain_generator(temperature: float = 600.0, turned: float = 0.0, **changes) -> MolecularEDG:
    """Not trained; turned by pi, the window of the torsion ends where its energy is lowest, and one end is favoured."""
    target = chain_target(temperature)
    centre = target.centre + torch.tensor([0.0] * 5 + [turned])
    target = MolecularTarget(target.internals, target.energy, temperature, centre, target.root)
    settings = EDGSettings(**{"hidden": 8, "depth": 1, "width": 0.8, "latent_dim": 1, **changes})
    edg = perturbed(build_edg(target, settings, seed=1), 0.02)
    if turned:
        edg.decoder.net[-1].bias.data[0] += 0.3 * turned
    known = (300.0, 600.0) if settings.conditioned else (temperature, temperature)
    return MolecularEDG(edg, target, harmonic_chain4(), known)


@pytest.mark.parametrize("turned", [0.0, math.pi])
@pytest.mark.parametrize("kind", ["independence", "latent"])
def test_steps_with_the_generator_of_a_molecule_keep_its_distribution(kind, turned):
    generator = chain_generator(300.0, turned)
    target, g = Target(generator.target.energy, kT(300.0), generator.at(300.0).log_constraint_factor), seeded(5)
    positions = internals_of("chain4").forward(chain4_internals(2000, 300.0, 4))[0]
    walkers, accepted = target.at(positions), 0.0
    for _ in range(5):
        if kind == "latent":
            walkers, info = latent_step(walkers, target, generator.at(300.0), step_size=0.3, generator=g)
        else:
            walkers, info = independence_step(walkers, target, generator.at(300.0), generator=g, n_proposals=2)
        accepted += float(info.n_accepted.double().mean()) / (5 * info.n_proposed)
        assert info.representable.all()
    assert accepted > 0.1
    seen = []
    for q in (chain4_internals(20_000, 300.0, 9), internals_of("chain4").inverse(walkers.x)[0]):
        torsion = q[:, 5] - CHAIN4["centre"]
        away = q[:, :5] - internals_of("chain4").reference[:5]
        seen.append(torch.cat((torch.stack((torsion.cos(), torsion.sin()), 1), 1e3 * away, away.square() * 1e6), 1))
    assert surprise(*seen) < 4.0


def test_an_ensemble_of_a_generator_is_as_that_of_a_flow():
    generator = chain_generator(600.0, conditioned=True, width=1.8)
    energy = BatchedEnergy(generator.molecule.system)
    made = draw(generator, energy, temperature=450.0, n=3000, generator=seeded(3))
    assert made.positions.shape == (3000, 4, 3) and made.temperature == made.sampling_temperature == 450.0
    assert made.ess > 0.02
    torsion = internals_of("chain4").inverse(made.positions)[0][:, 5] - CHAIN4["centre"]
    mean, error = made.mean(torsion.cos())
    exact = chain4_internals(200_000, 450.0, 2)[:, 5] - CHAIN4["centre"]
    assert abs(float(mean) - float(exact.cos().mean())) < 4.0 * float(error)
    assert made.log_z_bound < made.log_z
    elsewhere = draw(generator, energy, temperature=450.0, n=3000, generator=seeded(3), at=600.0)
    assert elsewhere.sampling_temperature == 600.0
    assert abs(elsewhere.log_z - made.log_z) < 4.0 * math.hypot(made.log_z_error, elsewhere.log_z_error)


def test_generators_of_molecules_refuse():
    one, many = chain_generator(), chain_generator(conditioned=True)
    with pytest.raises(ValueError, match=r"trained at 600 K, and cannot run at 300 K: run it there and reweight"):
        one.at(300.0)
    with pytest.raises(ValueError, match=r"trained at 300 to 600 K, and cannot run at 250 K"):
        many.at(250.0)
    with pytest.raises(ValueError, match="one temperature cannot have been trained from 300 to 600 K"):
        MolecularEDG(one.edg, one.target, one.molecule, (300.0, 600.0))
    with pytest.raises(ValueError, match="draws 2 coordinates, the molecule has 6"):
        MolecularEDG(poor_edg(), one.target, one.molecule, (600.0, 600.0))
    with pytest.raises(ValueError, match="give a generator"):
        one.at(600.0).score(torch.zeros(1, 4, 3))
    assert "trained from 300 to 600 K" in repr(many) and "trained at 600 K" in repr(one)
