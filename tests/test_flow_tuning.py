"""Tuning of flows: closed forms agree with the general formulas, and cases that are known exactly come out."""

import copy
import itertools
import json
import math
from collections.abc import Callable

import pytest
import torch
from molecules import perturbed, seeded

from openmm_tsf.architecture import FlowSettings
from openmm_tsf.checkpoint import pretrained
from openmm_tsf.ensemble import draw
from openmm_tsf.flow import Flow, build_vector_flow
from openmm_tsf.flow_tuning import FlowTuning, tune_flow
from openmm_tsf.flow_tuning_plots import tuning_figure
from openmm_tsf.latent_tuning import held_out_scores, is_gaussian, latent_moments, temperature_of_mean, virial_ratio
from openmm_tsf.tempered_draws import pooled_draws, sampling_levels, tempered_draws
from openmm_tsf.transforms import Compose, GlobalScale, Standardise
from openmm_tsf.tune_stage import rows
from openmm_tsf.tuning import temperature_diagnostics
from openmm_tsf.tuning.samples import moments
from openmm_tsf.units import BOLTZMANN
from openmm_tsf.vectors import Samples

SMALL = {"blocks": 2, "hidden": 6, "depth": 1}
QUICK = {"n": 1000, "n_checked": 4000, "n_replicates": 60}
DIM = 6
STIFFNESS = torch.linspace(0.5, 20.0, DIM, dtype=torch.float64)


def crooked(kind: str = "tsf", **settings) -> Flow:
    """A flow with random weights, at T = 1; nothing about it is simple but its law of temperature."""
    x = torch.randn(500, DIM, generator=seeded(1)).cumsum(1) + 0.5
    settings = FlowSettings(kind=kind, momenta=False, **{**SMALL, **settings})
    flow = build_vector_flow(DIM, Samples(x), settings, generator=seeded(2))
    return perturbed(flow, 0.15).requires_grad_(False)


def own_energy(flow: Flow, a: float = 1.0) -> Callable[[torch.Tensor], torch.Tensor]:
    """The energy that the flow is exact for at T = 1, a times over; so it is exact at T = 1/a for that."""
    return lambda x: -a * flow.at(1.0).log_prob(x)


def straight(momenta: bool = False) -> Flow:
    """The exact flow of an oscillator at T = 1."""
    x = torch.randn(500, DIM, generator=seeded(3))
    settings = FlowSettings(kind="tsf", momenta=momenta, **SMALL)
    flow = build_vector_flow(DIM, Samples(x), settings, generator=seeded(2)).requires_grad_(False)
    (layer,) = [m for m in flow.transform.modules() if isinstance(m, Standardise)]
    layer.mean.zero_()
    layer.matrix.copy_(torch.diag(STIFFNESS.rsqrt()))
    return flow


def oscillator(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (STIFFNESS * x**2).sum(1)


def oscillations(n: int = 4000, seed: int = 8) -> Samples:
    return Samples(torch.randn(n, DIM, generator=seeded(seed)) / STIFFNESS.sqrt())


def drawn_out(flow: Flow, a: float) -> Flow:
    """The flow with its latents, positions and momenta, drawn out by sqrt(a)."""
    scale = GlobalScale(flow.prior.dim).double().requires_grad_(False)
    scale.log_scale.fill_(0.5 * math.log(a))
    flow = copy.deepcopy(flow)
    flow.transform = Compose([scale, flow.transform])
    return flow


def holds(interval: tuple[float, float], value: float, slack: float = 1.0) -> bool:
    """Whether a value lies in an interval, widened around its middle."""
    middle, half = sum(interval) / 2.0, (interval[1] - interval[0]) / 2.0
    return abs(value - middle) <= slack * half + 1e-4


# --- averages over the latents ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "t"), [(1.0, 1.0), (0.5, 1.3), (2.0, 0.4)])
def test_latent_moments_of_a_gaussian(temperature, t):
    flow = straight(momenta=True)
    mean, variance = latent_moments(flow, temperature, t)
    dim = 2 * DIM
    constant = 0.5 * dim * math.log(2.0 * math.pi * temperature)
    assert is_gaussian(flow) and flow.prior.dim == dim
    assert mean == pytest.approx(0.5 * dim * t + constant, abs=1e-6)
    assert variance == pytest.approx(0.5 * dim, rel=1e-6)


def test_latent_moments_with_torsions_and_quartic_potentials_are_those_of_draws():
    flow, temperature, t = pretrained("ala2").requires_grad_(False), 300.0, 1.4
    mean, variance = latent_moments(flow, temperature, t)
    z, _ = flow.at(temperature * t).prior.sample(20_000, generator=seeded(4))
    e = -flow.at(temperature).prior.log_prob(z)
    assert not is_gaussian(flow)
    assert abs(float(e.mean()) - mean) < 4.0 * float(e.std()) / math.sqrt(len(e))
    squares = (e - mean) ** 2 / t**2
    assert abs(float(squares.mean()) - variance) < 4.0 * float(squares.std()) / math.sqrt(len(e))
    assert temperature_of_mean(flow, temperature, mean) == pytest.approx(t, abs=1e-8)


def test_means_beyond_reach_are_infinite_or_zero():
    flow = straight()
    assert temperature_of_mean(flow, 1.0, 1e6) == math.inf
    assert temperature_of_mean(flow, 1.0, -1e6) == 0.0


# --- draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momenta", [False, True])
def test_draws_weigh_as_those_of_an_ensemble_do(momenta):
    flow = drawn_out(straight(momenta), 1.3)
    made = tempered_draws(flow, oscillator, 1.0, 0.9, 20_000, generator=seeded(5))
    u, z = made.scored.target_energy, made.log_weights
    if not momenta:
        spread = z + u - made.scored.model_energy / 0.9
        assert float(spread.max() - spread.min()) < 1e-9
        assert torch.equal(u, made.energy)
    x, log_prob, _ = flow.at(0.9).propose(20_000, generator=seeded(5))
    torch.testing.assert_close(z, -oscillator(x) - log_prob)


def test_several_temperatures_are_pooled_to_the_density_of_any():
    flow = crooked("anharmonic")
    draws = [tempered_draws(flow, own_energy(flow), 1.0, t, 4000, generator=seeded(6)) for t in (0.7, 1.0, 1.4)]
    pool = pooled_draws(flow, 1.0, draws)
    for t in (0.75, 1.2):
        seen = moments(pool, torch.tensor([t]))
        mean, variance = latent_moments(flow, 1.0, t)
        assert abs(float(seen.model) - mean) < 0.12
        assert abs(float(seen.variance) / variance - 1.0) < 0.1
        assert float(seen.log_z) != 0.0
    # of the reduced energy of a normalised density, ln of the integral at t = 1 is known: it is zero
    assert abs(float(moments(pool, torch.tensor([1.0])).log_z) - math.log(len(pool))) < 0.02


def test_levels_hold_one_and_overlap():
    flow = straight(momenta=True)
    levels = sampling_levels(flow, 1.0, (0.4, 3.0))
    assert 1.0 in levels and levels == sorted(levels)
    assert levels[0] == pytest.approx(0.4) and levels[-1] == pytest.approx(3.0)
    steps = [b / a for a, b in itertools.pairwise(levels)]
    assert max(steps) < math.exp(0.121)


# --- the closed forms -------------------------------------------------------------------------------------------------


def test_closed_forms_are_the_general_formulas_of_a_gaussian_prior():
    """Of a crooked flow and a target that it has little to do with."""
    flow, t = crooked(), 0.8
    soft = lambda x: 0.05 * (x**2).sum(1) + torch.cos(x).sum(1)  # noqa: E731
    made = tempered_draws(flow, soft, 1.0, t, 40_000, generator=seeded(7), virial=True)
    found = temperature_diagnostics(made.scored, n_replicates=100)
    ratio = virial_ratio(made.virial, made.scored, DIM)
    half = 0.5 * DIM
    error = (found.difference_interval[1] - found.difference_interval[0]) / 2.0
    assert abs(found.covariance - half * ratio.value) < 2.0 * error
    assert abs(found.variance - half) < 2.0 * error
    assert error < 0.2 * found.covariance  # so that another law would be seen
    assert abs(found.covariance - half) > 5.0 * error


def test_the_virial_is_no_closed_form_of_another_prior():
    flow = crooked("anharmonic")
    made = tempered_draws(flow, own_energy(flow), 1.0, 1.0, 20_000, generator=seeded(7), virial=True)
    assert abs(virial_ratio(made.virial, made.scored, DIM).value - 1.0) < 0.05  # by the theorem of equipartition
    wide = drawn_out(flow, 1.5)
    made = tempered_draws(wide, own_energy(flow), 1.0, 1.0, 20_000, generator=seeded(7), virial=True)
    found = temperature_diagnostics(made.scored)
    assert abs(found.covariance / found.variance - virial_ratio(made.virial, made.scored, DIM).value) > 0.02
    assert tune_flow(wide, own_energy(flow), 1.0, generator=seeded(1), **QUICK).closed.virial is None


@pytest.mark.parametrize("momenta", [False, True])
def test_a_perfect_flow_is_left_as_it_is(momenta):
    flow, frames = straight(momenta), oscillations()
    found = tune_flow(flow, oscillator, 1.0, frames=frames, generator=seeded(9), **QUICK)
    assert found.optimum.t_star.value == pytest.approx(1.0, abs=1e-6)
    assert holds(found.closed.virial.interval, 1.0, 1.5)
    assert holds(found.closed.t_prime.interval, 1.0, 1.5) and holds(found.optimum.t_prime.interval, 1.0, 1.5)
    assert found.checks[0].ess == pytest.approx(1.0, abs=1e-6)
    assert found.diagnostics.ess == pytest.approx(1.0, abs=1e-6)


def test_a_perfect_flow_that_is_crooked_too():
    flow = crooked()
    found = tune_flow(flow, own_energy(flow), 1.0, generator=seeded(9), **QUICK)
    assert found.optimum.t_star.value == pytest.approx(1.0, abs=1e-6)
    assert holds(found.closed.virial.interval, 1.0, 1.5)


@pytest.mark.parametrize("a", [0.7, 1.4])
@pytest.mark.parametrize("momenta", [False, True])
def test_latents_drawn_out_by_a_root_are_put_right_by_its_reciprocal(a, momenta):
    flow = drawn_out(straight(momenta), a)
    found = tune_flow(flow, oscillator, 1.0, frames=oscillations(), generator=seeded(9), **QUICK)
    assert found.optimum.t_star.value == pytest.approx(1.0 / a, abs=1e-6)
    for value in (found.closed.t_star, found.closed.t_prime, found.optimum.t_prime):
        assert holds(value.interval, 1.0 / a, 1.6)
        assert abs(value.value * a - 1.0) < 0.05
    assert holds(found.closed.virial.interval, a, 1.6)
    assert found.diagnostics.fidelity == found.diagnostics.diversity == ("lower" if a > 1.0 else "raise")
    checks = {check.name: check for check in found.checks}
    assert checks["as trained"].ess < 0.95
    if not momenta:  # with them the weights of x alone are another matter
        assert checks["t*"].ess > 0.999


@pytest.mark.parametrize("kind", ["anharmonic", "tsf"])
def test_a_flow_of_another_temperature_is_put_right_by_the_ratio(kind):
    """Whatever its prior: the energy is a times that which the flow is exact for."""
    flow, a = crooked(kind), 1.3
    found = tune_flow(flow, own_energy(flow, a), 1.0, generator=seeded(9), **QUICK)
    assert found.optimum.t_star.value == pytest.approx(1.0 / a, abs=1e-6)
    assert found.optimum.t_prime.value == pytest.approx(1.0 / a, abs=1e-6)
    assert found.diagnostics.target_mean_from == "reweighting"


def test_elsewhere_than_at_the_training_temperature():
    flow, a = crooked("anharmonic"), 0.8
    found = tune_flow(flow, own_energy(flow, a), 0.6, generator=seeded(9), **QUICK)
    assert found.optimum.t_star.value == pytest.approx(1.0 / a, abs=1e-6)
    assert found.checks[1].temperature == pytest.approx(0.6 / a, abs=1e-6)


# --- held-out frames --------------------------------------------------------------------------------------------------


def test_correlated_frames_are_thinned_and_their_error_grows():
    flow = straight()
    frames = oscillations(2000)
    own = held_out_scores(flow, 1.0, frames, seeded(1))
    repeated = Samples(torch.tensor(frames.positions).repeat_interleave(10, 0))
    seen = held_out_scores(flow, 1.0, repeated, seeded(1))
    assert seen.mean == pytest.approx(own.mean)
    assert seen.error == pytest.approx(own.error, rel=0.01)
    assert len(own.energies) > 600 and len(seen.energies) < 3 * len(own.energies)
    assert abs(own.error / (float(own.energies.std()) / math.sqrt(2000)) - 1.0) < 0.5


def test_frames_of_another_temperature_are_refused():
    with pytest.raises(ValueError, match=r"of the target's temperature, 0\.5 K, not of 1 K"):
        tune_flow(straight(), oscillator, 0.5, frames=oscillations(), generator=seeded(1), **QUICK)


# --- what can be wrong ------------------------------------------------------------------------------------------------


def test_clashes_are_left_out_and_counted():
    flow = drawn_out(straight(), 1.2)

    def walled(x: torch.Tensor) -> torch.Tensor:
        return oscillator(x) + 1e7 * (x[:, 0] > 3.0)

    found = tune_flow(flow, walled, 1.0, generator=seeded(9), **QUICK)
    share = 0.5 * math.erfc(3.0 * math.sqrt(0.5 / 1.2) / math.sqrt(2.0))
    n = QUICK["n_checked"]
    assert abs(found.checks[0].clashes - share) < 4.0 * math.sqrt(share / n)
    assert found.diagnostics.left_out == pytest.approx(found.checks[0].clashes)
    assert found.optimum.t_star.value == pytest.approx(1.0 / 1.2, abs=0.03)
    assert abs(found.checks[0].mean_energy - 0.6 * DIM) < 0.2


def test_infinite_energies_are_clashes_too():
    flow = straight()
    found = tune_flow(
        flow, lambda x: torch.where(x[:, 0] > 3.0, torch.inf, oscillator(x)), 1.0, generator=seeded(9), **QUICK
    )
    assert found.checks[0].off_chart > 0.0
    assert found.optimum.t_star.value == pytest.approx(1.0, abs=0.02)


def nan_somewhere(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x[:, 0] > 0.0, torch.nan, oscillator(x))


@pytest.mark.parametrize(
    ("energy", "temperature", "changes", "words"),
    [
        (oscillator, 0.0, {}, "above 0 K"),
        (oscillator, math.nan, {}, "above 0 K"),
        (oscillator, 1.0, {"n": 1}, "n = 1 draws are too few"),
        (oscillator, 1.0, {"n_checked": 0}, "n_checked = 0 draws are too few"),
        (oscillator, 1.0, {"span": (1.1, 2.0)}, "through 1, not from 1.1"),
        (oscillator, 1.0, {"span": (0.0, 2.0)}, "from above 0"),
        (oscillator, 1.0, {"span": (0.5, math.inf)}, "from above 0"),
        (nan_somewhere, 1.0, {}, "target energies are not numbers"),
        (lambda x: 0.0 * x.sum(1), 1.0, {}, "all .* one energy"),
        (lambda x: 0.0 * x.sum(1) + torch.inf, 1.0, {}, "0 of 4000 samples have weight and no clash"),
    ],
)
def test_bad_input_is_said_to_be(energy, temperature, changes, words):
    with pytest.raises(ValueError, match=words):
        tune_flow(straight(), energy, temperature, generator=seeded(1), **{**QUICK, **changes})


@pytest.mark.parametrize("kind", ["real-nvp", "spline"])
def test_flows_that_do_not_steer_are_refused(kind):
    with pytest.raises(ValueError, match=f"kind '{kind}' do not steer"):
        tune_flow(crooked(kind), oscillator, 1.0, generator=seeded(1), **QUICK)


# --- what is kept and shown -------------------------------------------------------------------------------------------


def shown(found: FlowTuning) -> dict[str, str]:
    facts = json.loads(json.dumps(found.facts(), allow_nan=False))
    figure = tuning_figure(facts, note="Seed 1.")
    assert len(figure.axes) == 3
    return rows(facts)


def test_a_table_and_a_figure_are_made_of_it():
    found = tune_flow(drawn_out(straight(), 1.4), oscillator, 1.0, frames=oscillations(), generator=seeded(9), **QUICK)
    table = shown(found)
    assert "lower the temperature for fidelity" in table["K - C"]
    assert "run at 0.71" in table["t*, fidelity"] and "held-out samples" in table["t', diversity"]
    assert "as trained" in table["effective sample size"] and "at t*" in table["effective sample size"]
    assert table["latent virial / D"].startswith("1.4") or table["latent virial / D"].startswith("1.3")


def test_no_temperature_is_a_result_too():
    found = tune_flow(drawn_out(straight(), 6.0), oscillator, 1.0, generator=seeded(9), **QUICK)
    assert found.optimum.t_star is None
    table = shown(found)
    assert table["t*, fidelity"] == "none where it was looked for"
    assert "still falls below 0.5" in table["that is"]


def test_the_same_seed_gives_the_same():
    flow = crooked("anharmonic")
    found = [tune_flow(flow, oscillator, 1.0, generator=seeded(2), **QUICK).facts() for _ in range(2)]
    assert found[0] == found[1]


def test_a_tuned_ensemble_has_exact_weights():
    """Run at T/a and weighed for T: of latents drawn out by sqrt(a) that is the target itself."""
    flow, a = drawn_out(straight(), 1.5), 1.5

    class AsMolecule:
        """The model system in the clothes of a molecule of two atoms."""

        def at(self, temperature: float) -> "AsMolecule":
            self.steered = flow.at(temperature)
            return self

        def propose(self, n, *, generator):
            x, log_prob, inside = self.steered.propose(n, generator=generator)
            return x.view(n, 2, 3), log_prob, inside

        def log_constraint_factor(self, x):
            return x.new_zeros(len(x))

    def energy(x: torch.Tensor) -> torch.Tensor:
        return BOLTZMANN * oscillator(x.view(len(x), DIM))

    tuned, plain = (
        draw(AsMolecule(), energy, temperature=1.0, n=4000, generator=seeded(3), at=at) for at in (1.0 / a, None)
    )
    assert tuned.temperature == 1.0 and tuned.ess > 0.999
    assert plain.ess < 0.9
    for made in (tuned, plain):
        value, error = made.mean(made.energy / BOLTZMANN)
        assert abs(float(value) - 0.5 * DIM) < 4.0 * float(error)
