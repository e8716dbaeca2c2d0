"""Metropolis steps keep the distribution they are for, with any flow; and each term of the ratio is needed for that."""

import math

import laws
import numpy as np
import pytest
import torch
from molecules import internals_of, rigid_trimer, seeded
from toys import QUALITIES, SYSTEMS, ByHand, toy_flow

from openmm_tsf.flow import FlowSettings, build_flow
from openmm_tsf.flow_steps import KINDS, FlowSteps
from openmm_tsf.metropolis import Target, Walkers
from openmm_tsf.trajectories import Frames
from openmm_tsf.units import kT

N_WALKERS, N_TIMES = 1500, 25
FLOWS = [
    (system, quality, steerable, n_momenta)
    for system in SYSTEMS
    for quality in QUALITIES
    for steerable in (True, False)
    for n_momenta in (0, 2)
    if not (system == "ring" and n_momenta)
]


def steps_of(kind: str, **changes) -> FlowSteps:
    return FlowSteps(**{"kind": kind, "n_proposals": 3, "n_walk_steps": 1, "step_size": 0.5, **changes})


def run(start: Walkers, target: Target, flow, steps: FlowSteps, observe, *, seed: int, n_times: int = N_TIMES):
    """Observables (times, walkers, observables) of walkers on their way, and the share of proposals accepted."""
    g, walkers, series, proposed, accepted = seeded(seed), start, [], 0, 0
    for _ in range(n_times):
        walkers, counts = steps.run(walkers, target, flow, generator=g)
        series.append(observe(walkers.x))
        proposed += counts["independence_proposed"] + counts["latent_proposed"]
        accepted += counts["independence_accepted"] + counts["latent_accepted"]
        assert counts["unrepresentable"] == counts["independence_nonfinite"] == counts["latent_off_chart"] == 0
    return torch.stack(series), accepted / proposed


def toy_run(system: str, flow, kind: str, *, seed: int = 11, **changes):
    """`run` of one of SYSTEMS from exact draws."""
    toy = SYSTEMS[system]
    target = Target(toy.energy, toy.kT)
    start = target.at(toy.exact(N_WALKERS, seed=3))
    return run(start, target, flow, steps_of(kind, **changes), toy.observe, seed=seed)


# --- the law itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [0.0, 0.8])
def test_errors_of_means_are_those_that_repetition_shows(memory):
    """Autoregressive series: the standard error of the mean is known, and 400 repetitions scatter by it."""
    g, times, walkers, repeats = seeded(1), 60, 20, 400
    x = torch.randn(repeats, walkers, generator=g)
    rows = []
    for _ in range(times):
        rows.append(x)
        x = memory * x + math.sqrt(1 - memory**2) * torch.randn(repeats, walkers, generator=g)
    series = torch.stack(rows)  # times, repeats, walkers
    scatter = series.mean((0, 2)).std()
    estimated = laws.errors_of_means(series.permute(0, 2, 1)).mean()
    # the scatter of 400 numbers is known to 1/sqrt(800) = 3.5 %
    assert abs(float(estimated / scatter) - 1.0) < 4 * 0.035


def test_exact_draws_have_the_expected_means():
    """An oracle for the tests below: two ways to the same means."""
    for toy in SYSTEMS.values():
        x = toy.exact(200_000, seed=1)
        laws.stationary(toy.observe(x)[None], toy.expected, resolution=0.01)


# --- stationary, whatever the flow ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "quality", "steerable", "n_momenta", "kind"),
    # a mixture of the other two is hardly news; the wrong flows have it
    [(*flow, kind) for flow in FLOWS for kind in KINDS if kind != "mixed" or flow[1] == "wrong"],
)
def test_steps_keep_the_distribution(system, quality, steerable, n_momenta, kind):
    flow = toy_flow(system, quality, steerable=steerable, n_momenta=n_momenta)
    series, accepted = toy_run(system, flow, kind)
    assert accepted > 0.01, "hardly a step was taken: nothing is tested"
    laws.stationary(series, SYSTEMS[system].expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_definitions_written_out_once_more_do_the_same(system, kind):
    """`ByHand`, which the negative controls mutilate, is right as long as nothing is missing."""
    flow = ByHand(toy_flow(system, "wrong", n_momenta=0 if system == "ring" else 2))
    laws.stationary(toy_run(system, flow, kind)[0], SYSTEMS[system].expected)


def test_a_flow_at_another_temperature_or_of_another_system_keeps_it_too():
    toy = SYSTEMS["harmonic"]
    target = Target(toy.energy, toy.kT)
    start = target.at(toy.exact(N_WALKERS, seed=3))
    for kind in KINDS:
        flow = toy_flow("double well", "trained", n_momenta=2)  # made for kT = 1
        series, accepted = run(start, target, flow, steps_of(kind), toy.observe, seed=4)
        assert accepted > 0.01
        laws.stationary(series, toy.expected)


def test_longer_chains_and_walks_keep_it():
    for changes in ({"n_proposals": 1}, {"n_proposals": 16}, {"n_walk_steps": 8}, {"step_size": 2.0}):
        series, _ = toy_run("double well", toy_flow("double well", "wrong", n_momenta=2), "mixed", **changes)
        laws.stationary(series, SYSTEMS["double well"].expected)


@pytest.mark.parametrize("kind", ["independence", "mixed"])
def test_walkers_from_elsewhere_arrive(kind):
    """All walkers in one well to begin with: a good flow takes them to where they belong."""
    toy = SYSTEMS["double well"]
    target = Target(toy.energy, toy.kT)
    start = target.at(toy.exact(1, seed=3).expand(N_WALKERS, -1).clone())
    steps = steps_of(kind, n_proposals=20)
    flow = toy_flow("double well", "trained")
    series, accepted = run(start, target, flow, steps, toy.observe, seed=5, n_times=40)
    assert accepted > 0.05
    laws.stationary(series[20:], toy.expected)


def test_good_flows_are_accepted_and_bad_ones_are_not():
    """A sanity check of the qualities, without which the tests above would test one thing three times."""
    shares = {q: toy_run("double well", toy_flow("double well", q), "independence")[1] for q in QUALITIES}
    assert shares["trained"] > 2 * max(shares["untrained"], shares["wrong"])
    assert toy_run("harmonic", toy_flow("harmonic", "trained", steerable=True), "independence")[1] > 0.9


# --- negative controls ------------------------------------------------------------------------------------------------


def broken(system: str, flow, kind: str, message: str = "not stationary") -> None:
    with pytest.raises(AssertionError, match=message):
        laws.stationary(toy_run(system, flow, kind)[0], SYSTEMS[system].expected)


@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("system", SYSTEMS)
def test_without_the_hastings_term_the_law_breaks(system, quality):
    for kind in ("independence", "mixed"):
        broken(system, ByHand(toy_flow(system, quality)).without("hastings"), kind)


@pytest.mark.parametrize(
    ("system", "quality", "kind"),
    [
        ("harmonic", "untrained", "independence"),
        ("harmonic", "wrong", "independence"),
        ("harmonic", "wild", "latent"),
        ("harmonic", "wrong", "mixed"),
        ("double well", "trained", "independence"),
        ("double well", "trained", "mixed"),
    ],
)
def test_without_the_momenta_the_law_breaks(system, quality, kind):
    flow = ByHand(toy_flow(system, quality, n_momenta=2))
    laws.stationary(toy_run(system, flow, kind)[0], SYSTEMS[system].expected)
    broken(system, flow.without("momentum"), kind)


@pytest.mark.parametrize(
    ("system", "quality", "n_momenta"),
    [("double well", "trained", 0), ("double well", "trained", 2), ("harmonic", "wild", 2), ("ring", "wrong", 0)],
)
def test_without_determinants_the_latent_walk_breaks(system, quality, n_momenta):
    flow = ByHand(toy_flow(system, quality, n_momenta=n_momenta))
    laws.stationary(toy_run(system, flow, "latent")[0], SYSTEMS[system].expected)
    broken(system, flow.without("log_det"), "latent")


def test_with_a_constant_jacobian_the_latent_walk_needs_no_determinants():
    for system in SYSTEMS:
        flow = ByHand(toy_flow(system, "wrong", steerable=True)).without("log_det")
        laws.stationary(toy_run(system, flow, "latent")[0], SYSTEMS[system].expected)


def test_the_wrong_temperature_is_noticed():
    toy = SYSTEMS["harmonic"]
    target = Target(toy.energy, 1.05 * toy.kT)
    start = target.at(toy.exact(N_WALKERS, seed=3))
    series, _ = run(start, target, toy_flow("harmonic", "trained"), steps_of("mixed"), toy.observe, seed=4)
    with pytest.raises(AssertionError, match="not stationary"):
        laws.stationary(series, toy.expected)


# --- the constraint factor --------------------------------------------------------------------------------------------

COSINE_SQUARE = (math.pi / 3 - math.sqrt(3) / 4) / (math.pi / 3 + math.sqrt(3) / 2)
"""<cos^2> of the free trimer of equal masses with two rigid bonds, p(cos) ~ sqrt(4 - cos^2): 0.3210; 1/3 without."""


def cosines(x: torch.Tensor) -> torch.Tensor:
    """Cosine (n,) of the angle of trimers (n, 3, 3)."""
    u, v = x[:, 0] - x[:, 1], x[:, 2] - x[:, 1]
    return (u * v).sum(1) / (u.norm(dim=1) * v.norm(dim=1))


def exact_cosines(n: int, seed: int) -> torch.Tensor:
    """Draws of p(c) ~ sqrt(4 - c^2) on (-1, 1), by rejection."""
    rng = np.random.default_rng(seed)
    c = rng.uniform(-1, 1, 2 * n)
    return torch.tensor(c[rng.random(2 * n) < np.sqrt(1 - c**2 / 4)][:n])


def trimer_run(kind: str, factor: bool, n_times: int = 40):
    """<cos> and <cos^2> of free rigid trimers that start from their distribution, with moves of a rough flow."""
    internals = internals_of("rigid trimer")
    c = exact_cosines(3000, seed=1)
    x = internals.forward(-c[:, None])[0]  # flat internals hold -cos(theta)
    assert float((cosines(x) - c).abs().max()) < 1e-12
    frames = Frames(x.numpy(), np.full(len(x), 300.0))
    steered = build_flow(rigid_trimer(), frames, FlowSettings(blocks=1, hidden=4), generator=seeded(2)).at(300.0)
    target = Target(lambda x: x.new_zeros(len(x)), kT(300.0), steered.log_constraint_factor if factor else None)
    walkers, g, series = target.at(x), seeded(3), []
    steps = FlowSteps(kind=kind, n_proposals=4, n_walk_steps=2, step_size=1.0)
    for _ in range(n_times):
        walkers, counts = steps.run(walkers, target, steered, generator=g)
        series.append(torch.stack((cosines(walkers.x), cosines(walkers.x) ** 2), 1))
    bonds = (walkers.x[:, [0, 2]] - walkers.x[:, [1]]).norm(dim=2)
    assert float((bonds - 0.15).abs().max()) < 1e-12  # moves leave rigid bonds alone
    off_chart = counts["independence_off_chart"] + counts["latent_off_chart"]
    assert off_chart > 0, "no draw was beyond linear: the chart is not tested"
    return torch.stack(series), torch.tensor([0.0, COSINE_SQUARE])


@pytest.mark.parametrize("kind", KINDS)
def test_rigid_trimers_keep_their_angles(kind):
    laws.stationary(*trimer_run(kind, factor=True))


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_constraint_factor_they_do_not(kind):
    series, expected = trimer_run(kind, factor=False)
    with pytest.raises(AssertionError, match="not stationary"):
        laws.stationary(series, expected)
    laws.stationary(series[10:], torch.tensor([0.0, 1 / 3]))  # and what they keep instead is known
