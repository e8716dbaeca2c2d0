"""A molecule as a target of the diffusion generator: energies by hand, windows that fold back, walls, coordinates."""

import math

import numpy as np
import pytest
import torch
from molecules import (
    CHAIN4,
    butane,
    chain4_internals,
    chain4_log_z,
    harmonic_chain4,
    internals_of,
    random_internals,
    seeded,
)
from torch.autograd import gradcheck, gradgradcheck

from openmm_tsf.edg import EDGSettings, EDGTrainingSettings, build_edg, draw, kl_bound, molecule, train_edg
from openmm_tsf.energy import BatchedEnergy, OpenMMEnergy
from openmm_tsf.units import kT


def frames(n: int = 400, temperature: float = 300.0, seed: int = 6) -> np.ndarray:
    return internals_of("chain4").forward(chain4_internals(n, temperature, seed))[0].numpy()


def chain_target(temperature: float = 300.0, walled: bool = False) -> molecule.MolecularTarget:
    chain = harmonic_chain4()
    return molecule.molecular_target(chain, BatchedEnergy(chain.system), frames(), temperature, walled=walled)


def by_hand(q: torch.Tensor) -> torch.Tensor:
    """U [kJ/mol] of internals of `harmonic_chain4`, without positions."""
    away = q - internals_of("chain4").reference
    stiff = CHAIN4["bond"] * away[:, :3].square().sum(1) + CHAIN4["angle"] * away[:, 3:5].square().sum(1)
    return 0.5 * stiff + CHAIN4["barrier"] * (1.0 - torch.cos(q[:, 5] - CHAIN4["centre"]))


def x_of(target: molecule.MolecularTarget, q: torch.Tensor) -> torch.Tensor:
    return torch.linalg.solve(target.root, (q - target.centre).T).T


def share_by_hand(away: torch.Tensor) -> torch.Tensor:
    """The integral of a Gaussian of width WINDOW over 2 pi around a torsion at this distance from the centre."""
    phi = lambda y: 0.5 * (1.0 + torch.erf(y / math.sqrt(2.0)))  # noqa: E731
    return phi((away + math.pi) / molecule.WINDOW) - phi((away - math.pi) / molecule.WINDOW)


@pytest.mark.parametrize("temperature", [300.0, 600.0])
def test_a_molecule_is_the_energy_of_its_internals(temperature):
    target = chain_target().at(temperature)
    x = 2.0 * torch.randn(200, 6, generator=seeded(7))
    x[:, 0] *= 0.4  # so that shares by hand do not cancel
    x[:20, 5] = -1e4  # a bond below zero
    inside = target.chart(x)
    assert 100 < int(inside.sum()) < len(x)
    u, q = target(x), target.flat(x)
    shares = share_by_hand(q[:, 5] - target.centre[5]).log()
    expected = by_hand(q) / kT(temperature) - shares - torch.linalg.slogdet(target.root)[1]
    assert torch.allclose(u[inside], expected[inside], atol=1e-8)
    assert (u[~inside] == torch.inf).all()
    assert (target.n_evaluations, target.n_off_chart) == (200, int((~inside).sum()))
    assert target.share_off_chart == pytest.approx(float((~inside).double().mean()))
    assert target(x.float()).dtype == torch.float32


@pytest.mark.parametrize("walled", [False, True])
def test_temperature_divides_the_energy_and_not_the_volumes(walled):
    """So a target heated up is the molecule at that temperature, in the same coordinates."""
    target = chain_target(300.0, walled)
    x = 2.0 * torch.randn(60, 6, generator=seeded(7))
    for tau in (0.5, 1.0, 2.0):
        hot = target.reduced(x, torch.full((60,), tau))
        assert torch.allclose(hot, target.at(300.0 * tau)(x), atol=1e-9)
    mixed = target.reduced(x, torch.tensor([0.5, 2.0]).repeat(30))
    assert torch.equal(mixed[1::2], hot[1::2])


def test_training_and_draws_take_a_molecule_at_its_temperature():
    target, n = chain_target(300.0), 200
    edg = build_edg(target, EDGSettings(conditioned=True, latent_dim=2, width=0.1), seed=1).double()
    with pytest.warns(UserWarning, match="draws are worth"):
        made = draw(edg, target, 2.0, n, generator=seeded(1))
    known = made.energy.isfinite()
    assert int(known.sum()) > 20
    assert torch.allclose(made.energy[known] / 2.0, target.at(600.0)(made.x)[known], atol=1e-9)
    sample = kl_bound(edg, target.walled(), n, tau=2.0, generator=seeded(1))
    assert sample.energy == pytest.approx(float(target.at(600.0).walled()(sample.x).mean()), abs=1e-6)


def test_images_of_a_torsion_add_up_to_the_circle():
    target = chain_target()
    x = target.standardised(torch.tensor(frames(20, seed=3)))
    turns = 2.0 * math.pi * torch.arange(-6, 7) / target.root[5, 0]
    images = x[:, None] + turns[:, None] * torch.eye(6)[0]
    total = torch.logsumexp(-target(images.flatten(0, 1)).view(20, -1), 1)
    once = -by_hand(target.flat(x)) / kT(300.0) + target.log_det
    assert torch.allclose(total, once, atol=1e-9)
    away = torch.linspace(-40.0, 40.0, 81)
    assert torch.isfinite(molecule.log_window(away)).all()
    assert torch.allclose(molecule.log_window(away[36:45]).exp(), share_by_hand(away[36:45]), atol=1e-12)


def test_the_share_of_an_image_is_how_often_it_is_drawn():
    target = chain_target()
    q = chain4_internals(1, 300.0, 8).repeat(20_000, 1)
    q[:, 5] = target.centre[5] + 2.9
    positions = internals_of("chain4").forward(q)[0]
    plain = target.flat(target.standardised(positions))[:, 5] - target.centre[5]
    assert torch.allclose(plain, torch.tensor(2.9), atol=1e-9)
    drawn = target.flat(target.standardised(positions, generator=seeded(4)))[:, 5] - target.centre[5]
    turned = (drawn < 0.0).double()
    assert torch.allclose(drawn, torch.where(turned > 0, 2.9 - 2.0 * math.pi, 2.9), atol=1e-9)
    share = float(share_by_hand(torch.tensor([2.9 - 2.0 * math.pi])))
    assert 0.1 < share < 0.5
    assert abs(float(turned.mean()) - share) < 4.0 * math.sqrt(share * (1.0 - share) / len(turned))


def test_coordinates_of_a_molecule_go_round():
    target = chain_target()
    where = internals_of("chain4").forward(chain4_internals(400, 300.0, 8))[0]
    x = target.standardised(where)
    assert target.chart(x).all()
    placed, inside = target.positions(x)
    assert inside.all()
    assert torch.allclose(torch.cdist(placed, placed), torch.cdist(where, where), atol=1e-9)
    stiff = torch.cov(target.standardised(torch.tensor(frames()))[:, 1:].T)
    assert torch.allclose(stiff, torch.eye(5), atol=1e-5)  # white, up to the rounding of the root
    off = x.clone()
    off[0, 5] = -1e4
    placed, inside = target.positions(off)
    assert not inside[0]
    assert placed[0].isnan().all()


def test_soft_torsions_come_first_and_then_what_is_floppy():
    target = chain_target()
    moved = (target.root != 0.0).double()
    assert moved[:, 0].tolist() == [0.0] * 5 + [1.0]
    largest = target.root[:5, 1:].abs().argmax(0)  # the symmetric root keeps each column at its own internal
    assert largest.tolist() == [4, 3, 2, 1, 0]


def test_derivatives_of_a_molecule():
    target = chain_target()
    x = target.standardised(internals_of("chain4").forward(chain4_internals(3, 300.0, 9))[0]).requires_grad_()
    assert gradcheck(target, x, eps=1e-6, atol=1e-5, rtol=1e-5)
    assert gradgradcheck(target, x, eps=1e-6, atol=1e-4, rtol=1e-4)
    chain = harmonic_chain4()
    slow = molecule.MolecularTarget(
        target.internals, OpenMMEnergy(chain.system, "Reference"), 300.0, target.centre, target.root
    )
    assert torch.allclose(slow(x), target(x), atol=1e-6)
    slopes = [torch.autograd.grad(t(x).sum(), x)[0] for t in (slow, target)]
    assert torch.allclose(*slopes, atol=1e-5)


def test_walls_lead_back():
    target = chain_target()
    walled = target.walled()
    q = target.flat(torch.zeros(4, 6))
    q[0, 0] = -0.01  # a bond that is none
    q[1, 3] = 1.3  # an angle beyond linear
    q[2] = torch.nan
    x = x_of(target, q).requires_grad_()
    assert torch.isinf(target(x)).tolist() == [True, True, True, False]
    u, exact = walled(x), target(x).detach()
    assert torch.isinf(u).tolist() == [False, False, True, False]
    assert torch.allclose(u[3].detach(), exact[3])
    (slope,) = torch.autograd.grad(u[torch.isfinite(u)].sum(), x)
    along = slope @ torch.linalg.inv(target.root)  # with respect to q
    beyond = (1.3 - (1.0 - molecule.NARROWEST)) / float(target.width[3])
    assert along[0, 0] < 0
    assert float(along[1, 3]) == pytest.approx(molecule.WALL * (1.0 + beyond) / float(target.width[3]), rel=1e-6)
    assert walled.n_off_chart == 3
    assert not walled.walled(False).is_walled


def test_walls_soften_what_is_too_high():
    walled, target = chain_target(walled=True), chain_target()
    x = torch.zeros(2, 6)
    x[:, 5] = torch.tensor([1.0, 60.0])
    constant = target.log_det + target.log_shares(x)
    high, soft = target(x) + constant, walled(x) + constant
    assert high[1] > molecule.SOFTENED + 100
    assert torch.allclose(soft[0], high[0])
    assert float(soft[1]) == pytest.approx(molecule.SOFTENED + math.log1p(float(high[1]) - molecule.SOFTENED), abs=1e-6)


def test_other_isomers_pay_and_are_led_back():
    internals = internals_of("butane")
    q = random_internals(internals, 80, seeded(10), width=0.3)
    energy = lambda x: 0.0 * x.square().sum((1, 2))  # noqa: E731
    target = molecule.molecular_target(butane(), energy, internals.forward(q)[0].numpy(), 300.0)
    right = internals.forward(q[:2])[0]
    wrong = target.standardised(right * torch.tensor([1.0, 1.0, -1.0])).requires_grad_()
    right = target.standardised(right)
    assert torch.isinf(target(wrong)).all()
    assert torch.allclose(target.walled()(right), target(right))
    u = target.walled()(wrong)
    (slope,) = torch.autograd.grad(u.sum(), wrong)
    ahead = target.walled()(wrong - 1e-3 * slope / slope.norm(dim=1, keepdim=True))
    assert torch.isfinite(u).all()
    assert (ahead < u).all()
    hands = internals.chart.excess(target.flat(wrong))
    assert (hands.amax(1) > 0.1).all() and not internals.chart.excess(target.flat(right)).any()
    tolls = molecule.WALL * (hands + 0.5 * hands.square()).sum(1)
    assert torch.allclose(u, tolls - target.log_shares(wrong) - target.log_det, atol=1e-9)


def test_a_trained_generator_gives_the_ln_z_of_the_molecule():
    """Harmonic bonds and angles and a cosine: ln Z in closed form, from draws on the line with windows on it."""
    target = chain_target()
    edg = build_edg(target, EDGSettings(hidden=16, depth=2, latent_dim=1, width=0.8), seed=1)
    settings = EDGTrainingSettings(steps=150, batch=128, anneal_from=0.5, learning_rate=1e-2)
    train_edg(edg, target.walled(), settings, seed=1)
    made = draw(edg, target, n=2000, generator=seeded(2))
    assert made.ess > 0.5
    assert abs(made.log_z - chain4_log_z(300.0)) < 4.0 * made.log_z_error < 0.2
    assert made.log_z_bound < chain4_log_z(300.0)


def test_molecules_refuse():
    target = chain_target()
    with pytest.raises(ValueError, match="6 internals, not"):
        target(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="an invertible root"):
        molecule.MolecularTarget(target.internals, target.energy, 300.0, target.centre, 0.0 * target.root)
    with pytest.raises(ValueError, match="above 0 K"):
        target.at(0.0)
    with pytest.raises(ValueError, match="9 frames on the chart are too few for 5 stiff coordinates"):
        molecule.molecular_target(harmonic_chain4(), target.energy, frames(9), 300.0)
