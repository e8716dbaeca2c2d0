"""Torsions cut open: on lines between the ends of their branch, and nowhere else."""

import math

import laws
import numpy as np
import pytest
import torch
from molecules import MOLECULES, frames_of, internals_of, perturbed, random_internals, seeded

from openmm_tsf.cuts import CutInternals, cut_open, emptiest
from openmm_tsf.flow import Flow, FlowSettings, build_flow
from openmm_tsf.losses import energy_loss
from openmm_tsf.trajectories import Frames
from openmm_tsf.units import kT

N = 1000


def cut_ala2() -> CutInternals:
    internals = internals_of("ala2")
    return cut_open(internals, internals.of_frames(frames_of("ala2", N))[0])


def flow_of(name: str = "ala2", size: float = 0.1, **settings) -> Flow:
    frames = Frames(frames_of(name, N), np.full(N, 600.0))
    settings = FlowSettings(**{"kind": "tsf", "blocks": 2, "hidden": 8, "depth": 1, **settings})
    return perturbed(build_flow(MOLECULES[name](), frames, settings, generator=seeded(1)), size).requires_grad_(False)


# --- where to cut -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5, -3.0])
def test_the_cut_goes_through_the_middle_of_what_is_empty(shift):
    angles = shift + torch.cat((torch.linspace(-1.0, -0.2, 500), torch.linspace(0.5, 2.0, 500)))  # empty: 2 ... 2 pi-1
    gap = shift + 0.5 * (2.0 + laws.TWO_PI - 1.0)
    assert laws.difference(emptiest(angles), torch.tensor(gap), torch.tensor(True)) < math.radians(2.0)


def test_the_cut_goes_through_the_lowest_place_where_nothing_is_empty():
    u = torch.rand(200_000, 2, generator=seeded(1))
    angles = laws.TWO_PI * u[:, 0] - math.pi
    kept = angles[u[:, 1] < 0.6 + 0.4 * torch.cos(angles - 0.7)]
    assert laws.difference(emptiest(kept), torch.tensor(0.7 - math.pi), torch.tensor(True)) < 0.25


def test_hardly_a_frame_is_at_the_cut():
    cut = cut_ala2()
    q, inside = cut.of_frames(frames_of("ala2", N))
    assert inside.all() and cut.chart(q).all()
    soft = cut.whole.circular
    at_the_end = ((q - cut.centre)[:, soft].abs() > math.pi - 0.1).double().mean(0)
    assert float(at_the_end.max()) < 0.02  # 0.2 of 2 pi is 3 %, were torsions uniform


# --- the map ----------------------------------------------------------------------------------------------------------


def test_both_ways_undo_each_other():
    cut = cut_ala2()
    x, _ = cut(random_internals(cut.whole, 200, seeded(2)))
    q, log_det = cut.inverse(x)
    assert cut.chart(q).all() and float(log_det.abs().max()) == 0.0
    assert laws.difference(cut(q)[0], x) < 1e-9
    other = cut.whole.inverse(x)[0]
    assert laws.difference(other, q, cut.whole.circular) < 1e-12 and laws.difference(other, q) > 6.0


def test_what_lies_beyond_the_cut_is_off_the_chart():
    cut = cut_ala2()
    q = cut.of_frames(frames_of("ala2", N))[0][:50]
    column = int(torch.nonzero(cut.whole.circular)[0])
    for turn in (-laws.TWO_PI, laws.TWO_PI):
        beyond = q.clone()
        beyond[:, column] += turn
        assert laws.difference(cut(beyond)[0], cut(q)[0]) < 1e-9  # the same place
        assert cut.chart(q).all() and not cut.chart(beyond).any()


# --- flows ------------------------------------------------------------------------------------------------------------


def test_draws_beyond_the_cut_are_rejected_and_the_others_scored_as_drawn():
    flow = flow_of(momenta=False, size=0.05)
    steered = flow.at(1500.0)
    x, log_q, valid = steered.propose(2000, generator=seeded(4))
    assert 100 < int(valid.sum()) < 1900
    assert torch.isfinite(x[valid]).all() and torch.isnan(x[~valid]).all()
    assert float((steered.log_prob(x[valid]) - log_q[valid]).abs().max()) < 1e-6
    q = flow.transform(steered.prior.sample(2000, generator=seeded(4))[0])[0]
    beyond = ((q - flow.internals.centre).abs() >= math.pi)[:, flow.internals.whole.circular].any(1)
    folded = flow.internals.whole.chart(q) & beyond
    assert int(folded.sum()) > 20 and not valid[folded].any()  # they would be fine if they were folded back
    again = flow.internals(q[folded])[0]
    scores = steered.log_prob(again)
    assert torch.isfinite(scores).all()  # as the configurations within the cut that they are the same as,
    assert float((scores - log_q[folded]).abs().median()) > 0.5  # with another density than they were drawn with


def test_energies_alone_keep_torsions_within_their_cuts():
    """If draws beyond a cut were left out, pushing draws there would lower the loss of the others, and so it went."""
    flow = flow_of("chain4", momenta=False).requires_grad_(True)
    stiff = ~flow.internals.whole.circular
    q = flow.internals.inverse(torch.tensor(frames_of("chain4", N)))[0][:, stiff]
    middle, width = q.mean(0), q.std(0)

    def energy_of_a_free_torsion(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * kT(600.0) * (((flow.internals.inverse(x)[0][:, stiff] - middle) / width) ** 2).sum(1)

    optimiser = torch.optim.Adam(flow.parameters(), lr=0.02)
    shares = []
    for i in range(150):
        drawn = energy_loss(flow, energy_of_a_free_torsion, 600.0, 128, start=1e6, path=False, generator=seeded(i))
        shares.append(float(torch.isfinite(drawn.log_weights).double().mean()))
        optimiser.zero_grad()
        drawn.surrogate.backward()
        optimiser.step()
    assert sum(shares[-20:]) / 20 > 0.95


@pytest.mark.parametrize("name", ["ala2", "ala2 rigid", "chain4"])
def test_molecules_steer_jointly_with_momenta(name):
    flow = flow_of(name)
    x, p = torch.tensor(frames_of(name, N)), torch.randn(N, flow.internals.dim, generator=seeded(5))

    class Joint:
        def at(self, temperature):
            self.steered = flow.at(temperature)
            return self

        def log_prob(self, x):
            return self.steered.joint_log_prob(x, p)

    assert flow.n_momenta == flow.internals.dim and not flow.at(300.0).is_marginal
    laws.steerable(Joint(), x, 300.0, 600.0, bound=1e-9)


def test_molecular_real_nvp_does_not_steer():
    flow = flow_of(kind="real-nvp", momenta=False)
    assert laws.steering_spread(flow, torch.tensor(frames_of("ala2", N)), 300.0, 600.0) > 0.1


def test_momenta_come_along_with_the_default_flow_too():
    flow = flow_of(kind="anharmonic", momenta=True, energy_order=2, entropy_order=1)
    x, p = torch.tensor(frames_of("ala2", N)), torch.randn(N, 60, generator=seeded(5))
    hot, cold = (t * flow.at(t).joint_log_prob(x, p) for t in (600.0, 300.0))
    assert float((hot - cold).max() - (hot - cold).min()) / 300.0 < 1e-9
    assert flow.prior.n_soft == 5 and flow.at(300.0).latent_scale.shape == (120,)


def test_latents_and_positions_go_both_ways_with_momenta():
    for flow in (flow_of(), flow_of(kind="anharmonic", momenta=True, energy_order=2, entropy_order=1)):
        steered, x = flow.at(450.0), torch.tensor(frames_of("ala2", N))[:20]
        z, log_volume = steered.to_latents(x, generator=seeded(1))
        assert z.shape == (20, 120)
        again, log_volume_again, valid = steered.from_latents(z)
        assert valid.all()
        internals = internals_of("ala2")
        assert laws.difference(internals.inverse(again)[0], internals.inverse(x)[0], internals.circular) < 1e-8
        assert laws.difference(log_volume, log_volume_again) < 1e-8
        # ln q(x, p) - ln N(p) is the prior less the volume
        assert laws.difference(steered.score(x, generator=seeded(1)), steered.prior.log_prob(z) - log_volume) < 1e-7
