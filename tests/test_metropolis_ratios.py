"""Metropolis ratios against numbers worked out by hand, and what becomes of proposals and states that cannot be."""

import math
from dataclasses import FrozenInstanceError

import laws
import numpy as np
import pytest
import torch
from molecules import seeded
from toys import SYSTEMS, ByHand, Scripted, toy_flow

from openmm_tsf.flow_steps import COUNTS, KINDS, FlowSteps
from openmm_tsf.metropolis import Target, independence_step, latent_step

INF, NAN = math.inf, math.nan


def first(x: torch.Tensor) -> torch.Tensor:
    """U is the first component, whatever that is."""
    return x[:, 0].clone()


def second(x: torch.Tensor) -> torch.Tensor:
    """ln c is the second component."""
    return x[:, 1].clone()


def states(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# --- stored cases -----------------------------------------------------------------------------------------------------

# kT = 2. Two walkers with (U, ln c) = (1, 0.1) and (3, 0), two proposals each: the first of both, the second of both.
WALKERS = states((1.0, 0.1), (3.0, 0.0))
SCORES = [-2.5, -0.5]
PROPOSED = [(3.0, 0.4), (-197.0, 0.0), (2.0, -0.2), (-197.5, 0.7)]
LOG_Q = [2e6, -0.25, -3.0, -1.0]
# walker 0: -(3 - 1)/2 + (0.4 - 0.1) + (-2.5 - 2e6), never accepted; then -(2 - 1)/2 + (-0.2 - 0.1) + (-2.5 + 3)
# walker 1: -(-197 - 3)/2 + 0 + (-0.5 + 0.25), always accepted; then, from there, -(-197.5 + 197)/2 + 0.7 + (-0.25 + 1)
BY_HAND = states((-2_000_003.2, 99.75), (-0.3, 1.7))


def test_independence_ratios_are_those_worked_out_by_hand():
    target = Target(first, 2.0, second)
    proposal = Scripted(PROPOSED, LOG_Q, SCORES)
    walkers, info = independence_step(target.at(WALKERS), target, proposal, generator=seeded(1), n_proposals=2)
    assert info.log_ratio.shape == (2, 2) and info.n_proposed == 2
    assert float((info.log_ratio - BY_HAND).abs().max()) < 1e-9
    assert info.n_accepted.dtype == torch.int64 and int(info.n_accepted[1]) == 2
    assert torch.equal(walkers.x[1], states(PROPOSED[3])[0])  # the last one accepted
    assert float(walkers.energy[1]) == -197.5 and float(walkers.log_factor[1]) == 0.7
    assert torch.equal(proposal.asked[0], WALKERS)  # scored as they were given


def test_latent_ratios_are_those_worked_out_by_hand():
    target = Target(first, 2.0, second)
    # -(3 - 1)/2 + (0.4 - 0.1) + (0.75 + 2.5) and -(2 - 3)/2 - 0.2 + (-1 + 0.5), with ln|det| there less ln|det| here
    proposal = Scripted([(3.0, 0.4), (2.0, -0.2)], [0.75, -1.0], SCORES)
    walkers, info = latent_step(target.at(WALKERS), target, proposal, step_size=0.3, generator=seeded(1))
    assert float((info.log_ratio - states((2.55, -0.2))).abs().max()) < 1e-12
    assert info.n_proposed == 1 and int(info.n_accepted[0]) == 1
    assert torch.equal(walkers.x[0], states((3.0, 0.4))[0])


def test_temperature_and_constant_shifts():
    """Energies count in kT; constants in U, ln q, ln c cancel."""
    x = torch.cat((WALKERS, states(*PROPOSED)))
    for shift, kT in ((0.0, 1.0), (5e3, 0.5), (-7e4, 8.0)):
        target = Target(lambda x, shift=shift: x[:, 0] + shift, kT, lambda x: x[:, 1] + 11.0)
        proposal = Scripted(x[2:4], torch.tensor([0.3, -0.9]) + 40.0, torch.tensor(SCORES) + 40.0)
        _, info = independence_step(target.at(WALKERS), target, proposal, generator=seeded(1))
        by_hand = -(x[2:4, 0] - x[:2, 0]) / kT + x[2:4, 1] - x[:2, 1] + states((-2.5 - 0.3, -0.5 + 0.9))
        assert float((info.log_ratio - by_hand).abs().max()) < 1e-9


@pytest.mark.parametrize("step", ["independence", "latent"])
@pytest.mark.parametrize("log_ratio", [-3.0, -0.5, 0.0, 2.0])
def test_decisions_have_the_probability_of_the_ratio(step, log_ratio):
    n = 40_000
    target = Target(first, 1.0)
    walkers = target.at(torch.zeros(n, 1))
    proposal = Scripted(torch.full((n, 1), -log_ratio), torch.zeros(n), torch.zeros(n))
    if step == "independence":
        new, info = independence_step(walkers, target, proposal, generator=seeded(2))
    else:
        new, info = latent_step(walkers, target, proposal, step_size=1.0, generator=seeded(2))
    wanted = min(1.0, math.exp(log_ratio))
    error = math.sqrt(wanted * (1 - wanted) / n)
    assert abs(float(info.n_accepted.double().mean()) - wanted) <= 4.5 * error
    assert torch.equal(new.x[:, 0] == -log_ratio, info.n_accepted == 1) or log_ratio == 0.0


def test_latent_steps_are_symmetric_and_as_wide_as_asked():
    n, widths = 50_000, (1.0, 0.3, 2.0)
    target = Target(lambda x: torch.zeros(len(x)), 1.0)
    proposal = Scripted(torch.zeros(n, 1), torch.zeros(n), torch.zeros(n), latent_scale=widths)
    latent_step(target.at(torch.zeros(n, 1)), target, proposal, step_size=0.4, generator=seeded(3))
    step = proposal.latents[0] / (0.4 * torch.tensor(widths))  # Scripted states have their latents at zero
    assert float((step.mean(0)).abs().max()) < 4.5 / math.sqrt(n)
    assert float((step.std(0) - 1).abs().max()) < 4.5 / math.sqrt(2 * n)
    assert float((step**3).mean(0).abs().max()) < 4.5 * math.sqrt(15 / n)
    assert float((torch.corrcoef(step.T) - torch.eye(3)).abs().max()) < 4.5 / math.sqrt(n)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("kind", ["independence", "latent"])
def test_ratios_of_flows_are_those_of_densities_and_jacobians(system, kind):
    """With a real flow: what was accepted, its ratio by autograd of the map and the density of the prior."""
    toy, flow = SYSTEMS[system], toy_flow(system, "trained")
    x = toy.exact(500, seed=1)
    target = Target(toy.energy, toy.kT)
    if kind == "independence":
        walkers, info = independence_step(target.at(x), target, flow, generator=seeded(1))
    else:
        walkers, info = latent_step(target.at(x), target, flow, step_size=0.5, generator=seeded(1))
    moved = info.n_accepted == 1
    assert int(moved.sum()) > 20

    def log_density(x: torch.Tensor) -> torch.Tensor:  # ln q, or -ln|det dG| which the latent walk needs
        z = flow.transform.inverse(x)[0]
        log_det = torch.linalg.slogdet(laws.jacobians(lambda z: flow.transform.forward(z)[0], z))[1]
        return flow.prior.log_prob(z) - log_det if kind == "independence" else -log_det

    old, new = x[moved], walkers.x[moved]
    by_hand = -(toy.energy(new) - toy.energy(old)) / toy.kT + log_density(old) - log_density(new)
    assert float((info.log_ratio[0, moved] - by_hand).abs().max()) < 1e-9


@pytest.mark.parametrize("system", ["harmonic", "double well"])
def test_momenta_average_to_the_density_of_the_positions(system):
    """The mean of exp(score) over p is the marginal q(x), and weights of proposals average to one."""
    toy, flow, g = SYSTEMS[system], toy_flow(system, "trained", n_momenta=2), seeded(1)
    x = toy.exact(5, seed=2).repeat(4000, 1)
    densities = flow.score(x, generator=g).exp().view(4000, 5)
    mean, error = densities.mean(0), densities.std(0) / math.sqrt(4000)
    # the marginal by quadrature over both momenta
    p = laws.line(7.0 * math.sqrt(toy.kT), 121)
    grid = torch.cartesian_prod(p, p)
    for i in range(5):
        y = torch.cat((x[i].expand(len(grid), -1), grid), 1)
        z, log_det = flow.transform.inverse(y)
        exact = float((flow.prior.log_prob(z) + log_det).exp().sum() * (p[1] - p[0]) ** 2)
        assert abs(float(mean[i]) - exact) < 4.5 * float(error[i])


def test_definitions_agree_where_nothing_is_random():
    """`VectorFlow` beside the same written out: volumes of latents, momenta included, differ by a constant at most."""
    for system in SYSTEMS:
        for n_momenta in (0,) if system == "ring" else (0, 2):
            flow = toy_flow(system, "wrong", n_momenta=n_momenta)
            z = flow.prior.sample(200, generator=seeded(4))[0]
            (x, volume, valid), (x2, volume2, _) = flow.from_latents(z), ByHand(flow).from_latents(z)
            assert torch.equal(x, x2) and valid.all()
            assert float((volume - volume2).std()) < 1e-12


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["independence", "latent"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_energies_that_are_not_finite_reject_and_are_counted(step, bad):
    target = Target(first, 1.0)
    walkers = target.at(states((0.0,), (0.0,)))
    proposal = Scripted([[bad], [-50.0]], [0.0, 0.0], [0.0, 0.0])
    arguments = {"generator": seeded(1)} | ({"step_size": 1.0} if step == "latent" else {})
    new, info = {"independence": independence_step, "latent": latent_step}[step](walkers, target, proposal, **arguments)
    assert new.x.flatten().tolist() == [0.0, -50.0] and new.energy.tolist() == [0.0, -50.0]
    assert info.n_nonfinite.tolist() == [1, 0] and info.n_off_chart.tolist() == [0, 0]
    assert info.n_accepted.tolist() == [0, 1] and info.n_proposed == 1
    assert float(info.log_ratio[0, 0]) == -INF


@pytest.mark.parametrize("step", ["independence", "latent"])
def test_proposals_off_the_chart_reject_are_counted_and_never_evaluated(step):
    seen = []

    def energy(x):
        assert torch.isfinite(x).all(), "the energy was asked of what is not a configuration"
        seen.append(len(x))
        return first(x)

    target = Target(energy, 1.0, first)
    walkers = target.at(states((0.0,), (0.0,)))
    proposal = Scripted([[NAN], [-50.0]], [0.0, 0.0], [0.0, 0.0], valid=[False, True])
    arguments = {"generator": seeded(1)} | ({"step_size": 1.0} if step == "latent" else {})
    new, info = {"independence": independence_step, "latent": latent_step}[step](
        walkers, Target(energy, 1.0), proposal, **arguments
    )
    assert new.x.flatten().tolist() == [0.0, -50.0]
    assert info.n_off_chart.tolist() == [1, 0] and info.n_nonfinite.tolist() == [0, 0]
    assert seen == [2, 1]
    assert float(info.log_ratio[0, 0]) == -INF


@pytest.mark.parametrize("step", ["independence", "latent"])
def test_states_that_the_flow_cannot_represent_stay_and_are_reported(step):
    target = Target(first, 1.0)
    walkers = target.at(states((0.0,), (0.0,)))
    proposal = Scripted([[-50.0], [-50.0]], [0.0, 0.0], [-INF, 0.0])
    arguments = {"generator": seeded(1)} | ({"step_size": 1.0} if step == "latent" else {})
    new, info = {"independence": independence_step, "latent": latent_step}[step](walkers, target, proposal, **arguments)
    assert new.x.flatten().tolist() == [0.0, -50.0]
    assert info.representable.tolist() == [False, True]
    assert info.n_accepted.tolist() == [0, 1] and info.n_proposed == 1  # it counts as a proposal all the same
    assert float(info.log_ratio[0, 0]) == -INF


def test_a_state_without_probability_is_left_and_not_entered():
    target = Target(lambda x: torch.where(x[:, 0] < 0, INF, x[:, 0]), 1.0)
    walkers = target.at(states((-1.0,), (-1.0,), (0.0,)))
    assert walkers.energy.tolist() == [INF, INF, 0.0]
    proposal = Scripted([[-1.0], [1e5], [-1.0]], [0.0] * 3, [0.0] * 3)
    new, info = independence_step(walkers, target, proposal, generator=seeded(1))
    assert not torch.isnan(info.log_ratio).any()
    assert new.energy.tolist() == [INF, 1e5, 0.0] and info.n_accepted.tolist() == [0, 1, 0]


def test_broken_configurations_and_energies_are_refused():
    target = Target(first, 1.0)
    with pytest.raises(ValueError, match="1 of 2 configurations are not finite"):
        Target(lambda x: torch.zeros(len(x)), 1.0).at(states((0.0,), (NAN,)))
    for bad in (NAN, -INF):
        with pytest.raises(ValueError, match="1 of 2 configurations is NaN or -inf"):
            Target(lambda x, bad=bad: torch.tensor([0.0, bad]), 1.0).at(states((0.0,), (1.0,)))
    for kT in (0.0, -1.0, NAN, INF):
        with pytest.raises(ValueError, match="kT"):
            Target(first, kT)
    walkers = target.at(states((0.0,)))
    proposal = Scripted([[0.0]], [0.0], [0.0])
    with pytest.raises(ValueError, match="n_proposals"):
        independence_step(walkers, target, proposal, generator=seeded(1), n_proposals=0)
    for size in (0.0, -1.0, NAN, INF):
        with pytest.raises(ValueError, match="step_size"):
            latent_step(walkers, target, proposal, step_size=size, generator=seeded(1))


# --- pure functions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_steps_change_nothing_that_they_are_given(kind):
    toy, flow = SYSTEMS["double well"], toy_flow("double well", "trained", n_momenta=2)
    target = Target(toy.energy, toy.kT)
    walkers = target.at(toy.exact(50, seed=1))
    before = walkers.x.clone(), walkers.energy.clone(), walkers.log_factor.clone()
    steps = FlowSteps(kind=kind, n_proposals=4, n_walk_steps=3, step_size=0.5)
    runs = [steps.run(walkers, target, flow, generator=seeded(s)) for s in (1, 1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(before, (walkers.x, walkers.energy, walkers.log_factor), strict=True))
    assert torch.equal(runs[0][0].x, runs[1][0].x) and runs[0][1] == runs[1][1]
    assert not torch.equal(runs[0][0].x, runs[2][0].x)
    with pytest.raises(FrozenInstanceError):
        walkers.x = None
    new, counts = runs[0]
    assert new.energy.dtype == torch.float64
    assert float((new.energy - toy.energy(new.x)).abs().max()) < 1e-12  # energies belong to the positions beside them
    assert set(counts) == set(COUNTS)
    independent, latent = 50 * 4 * (kind != "latent"), 50 * 3 * (kind != "independence")
    assert (counts["independence_proposed"], counts["latent_proposed"]) == (independent, latent)


def test_global_random_state_is_not_touched():
    toy, flow = SYSTEMS["harmonic"], toy_flow("harmonic", "trained", n_momenta=2)
    target = Target(toy.energy, toy.kT)
    walkers, before = target.at(toy.exact(5, seed=1)), (torch.get_rng_state(), np.random.get_state()[1].copy())  # noqa: NPY002
    FlowSteps(kind="mixed").run(walkers, target, flow, generator=seeded(1))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_all_proposals_are_evaluated_in_one_batch():
    toy, flow, sizes = SYSTEMS["harmonic"], toy_flow("harmonic", "trained"), []

    def energy(x):
        sizes.append(len(x))
        return toy.energy(x)

    target = Target(energy, toy.kT)
    walkers = target.at(toy.exact(7, seed=1))
    FlowSteps(n_proposals=16).run(walkers, target, flow, generator=seeded(1))
    assert sizes == [7, 112]


# --- single precision -------------------------------------------------------------------------------------------------

STIFF = 1e16
"""Where rounding to single precision changes U by some kT."""


def test_rounded_positions_are_taken_at_their_word():
    """A state that was stored in single precision is what it is now; nothing of what it was gets into the ratio."""

    def energy(x):
        return 0.5 * STIFF * ((x.double() - 1.234567890123) ** 2).sum(1)

    target = Target(energy, 1.0)
    x = torch.full((1, 1), 1.234567890123)
    stored = x.float().double()
    was, found = target.at(x), target.at(stored)
    assert float(found.energy - was.energy) > 0.1  # rounding matters
    proposal = Scripted(x, [0.0], [0.0])
    _, info = independence_step(found, target, proposal, generator=seeded(1))
    assert float(info.log_ratio) == pytest.approx(float(energy(stored)), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_energies_belong_to_the_positions_even_in_single_precision(kind):
    """Whatever dtype walkers have, the energy kept is that of the positions kept, to float64 rounding."""
    flow = toy_flow("harmonic", "trained")

    def energy(x):
        return SYSTEMS["harmonic"].energy(x.double())

    target = Target(energy, SYSTEMS["harmonic"].kT)
    walkers = target.at(SYSTEMS["harmonic"].exact(200, seed=1).float())
    new, counts = FlowSteps(kind=kind, n_proposals=4).run(walkers, target, flow_in_double(flow), generator=seeded(1))
    assert counts["independence_accepted"] + counts["latent_accepted"] > 20
    again = target.at(new.x)
    assert float((again.energy - new.energy).abs().max()) < 1e-9


def flow_in_double(flow):
    """The same flow for positions of any dtype, computing in double precision as molecular flows do."""

    class Wide:
        latent_scale = flow.latent_scale

        def propose(self, n, *, generator):
            return flow.propose(n, generator=generator)

        def score(self, x, *, generator):
            return flow.score(x.double(), generator=generator)

        def to_latents(self, x, *, generator):
            return flow.to_latents(x.double(), generator=generator)

        def from_latents(self, z):
            return flow.from_latents(z)

    return Wide()


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "gibbs"}, {"n_proposals": 0}, {"n_walk_steps": 0}, {"step_size": 0.0}, {"step_size": NAN},
        {"explore": 1.0}, {"explore": -0.1},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings):
    name = next(iter(settings))
    with pytest.raises(ValueError, match=name):
        FlowSteps(**settings)
