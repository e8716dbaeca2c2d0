"""Flows of plain vectors, with momenta and without: they obey the laws of molecular flows, in dimensions that can be
integrated over."""

import math
import re

import laws
import numpy as np
import pytest
import torch
from molecules import perturbed, seeded
from test_metropolis import N_WALKERS, run, steps_of
from toys import SYSTEMS

from openmm_tsf.architecture import FlowSettings
from openmm_tsf.config import ConfigError, parse_config
from openmm_tsf.flow import Flow, build_vector_flow
from openmm_tsf.losses import energy_loss, likelihood_loss
from openmm_tsf.metropolis import Target
from openmm_tsf.training import TrainingSettings, train
from openmm_tsf.typing import Proposal
from openmm_tsf.vectors import LineCoordinates, Samples

SMALL = {"blocks": 2, "hidden": 6, "depth": 1}
WELL = SYSTEMS["double well"]
STEERABLE = [("anharmonic", False), ("anharmonic", True), ("tsf", True), ("tsf", False)]


def flow_of(kind: str = "tsf", momenta: bool | None = None, dim: int = 2, size: float = 0.2, **settings) -> Flow:
    """A small flow with random weights, made at T = 1 from a sheared Gaussian."""
    x = torch.randn(500, dim, generator=seeded(1)).cumsum(1) + 0.5
    settings = FlowSettings(kind=kind, momenta=momenta, **{**SMALL, **settings})
    return perturbed(build_vector_flow(dim, Samples(x), settings, generator=seeded(2)), size).requires_grad_(False)


def vectors(n: int, dim: int, seed: int = 3) -> torch.Tensor:
    return 2.0 * torch.randn(n, dim, generator=seeded(seed))


class Joint:
    """A flow whose configurations are pairs y = (x, p), for the laws."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow

    def at(self, temperature: float) -> "Joint":
        self.steered = self.flow.at(temperature)
        return self

    def log_prob(self, y: torch.Tensor) -> torch.Tensor:
        return self.steered.joint_log_prob(*y.split((y.shape[1] - self.flow.n_momenta, self.flow.n_momenta), 1))


# --- steerable --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "momenta"), STEERABLE)
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_flows_steer_jointly_in_positions_and_momenta(kind, momenta, dim):
    flow = flow_of(kind, momenta, dim)
    y = 0.5 * vectors(1000, dim + flow.n_momenta)
    assert flow.n_momenta == (dim if momenta else 0)
    laws.steerable(Joint(flow), y, 0.1, 1.0, bound=1e-9)
    laws.steerable(Joint(flow), y, 10.0, 1.0, bound=1e-9)


@pytest.mark.parametrize("momenta", [False, True])
def test_real_nvp_does_not(momenta):
    flow = flow_of("real-nvp", momenta, 5)
    assert laws.steering_spread(Joint(flow), vectors(1000, 5 + flow.n_momenta), 0.1, 1.0) > 1.0


def test_momenta_make_log_prob_neither_a_marginal_nor_steerable():
    x, single = vectors(1000, 2), flow_of("tsf", True)
    assert flow_of("tsf", False).at(1.0).is_marginal and not single.at(1.0).is_marginal
    hot, cold = (single.at(t).log_prob(x, generator=seeded(4)) for t in (1.0, 0.5))
    spread = hot - 0.5 * cold
    assert float(spread.max() - spread.min()) > 1.0


# --- normalised -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "momenta", "dim"), [("anharmonic", False, 2), ("tsf", True, 1), ("real-nvp", True, 1)]
)
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_densities_of_pairs_are_normalised(kind, momenta, dim, temperature):
    density = Joint(flow_of(kind, momenta, dim)).at(temperature)
    laws.normalised(density.log_prob, [laws.line(25.0, 700)] * 2, atol=1e-6)


def test_densities_of_positions_average_to_the_marginal_and_bound_it_from_below():
    """E over p of q(x, p)/N(p) is q(x); -E[ln] of it is an upper bound of -ln q(x)."""
    steered = flow_of("tsf", True, 1).at(0.7)
    axis = laws.line(40.0, 8001)
    x = torch.tensor([[-0.5], [0.3], [1.0]])
    pairs = torch.stack((x.repeat_interleave(len(axis), 0)[:, 0], axis.repeat(3)), 1)
    joint = steered.joint_log_prob(pairs[:, :1], pairs[:, 1:]).view(3, -1)
    marginal = joint.logsumexp(1) + (axis[1] - axis[0]).log()
    many = steered.log_prob(x.repeat_interleave(100_000, 0), generator=seeded(5)).view(3, -1)
    ratio = (many - marginal[:, None]).exp()
    assert float(((ratio.mean(1) - 1.0) / (ratio.std(1) / math.sqrt(ratio.shape[1]))).abs().max()) < 4.0
    assert float((many.mean(1) - marginal).max()) < -0.01


# --- faithful ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "momenta"), [("anharmonic", False), ("tsf", False), ("real-nvp", False)])
def test_draws_are_scored_as_they_are_drawn(kind, momenta):
    laws.faithful(flow_of(kind, momenta, 3).at(0.8), 500, seeded(3), atol=1e-9)


def normal(x: torch.Tensor, width: float) -> torch.Tensor:
    """ln N(x; 0, width^2)."""
    return -0.5 * (x**2).sum(1) / width**2 - x.shape[1] * math.log(width * math.sqrt(laws.TWO_PI))


@pytest.mark.parametrize("kind", ["tsf", "anharmonic", "real-nvp"])
def test_weights_of_draws_with_momenta_are_exact(kind):
    """The mean of p/q over draws is one; and that of q/p over a known p, scored with fresh momenta, is one too."""
    steered = flow_of(kind, True, size=0.1).at(0.9)
    x, log_q, valid = steered.propose(40_000, generator=seeded(6))
    assert valid.all() and x.shape == (40_000, 2)
    laws.mean_weight_is_one(normal(x - 0.5, 0.5), log_q)
    wide = 2.5 * torch.randn(40_000, 2, generator=seeded(8))
    scores = steered.log_prob(wide, generator=seeded(9))
    laws.mean_weight_is_one(scores, normal(wide, 2.5))
    momenta = normal(math.sqrt(0.9) * torch.randn(40_000, 2, generator=seeded(9)), math.sqrt(0.9))
    with pytest.raises(AssertionError, match=r"mean of p/q is 0\.0"):  # the momenta forgotten
        laws.mean_weight_is_one(scores + momenta, normal(wide, 2.5))


def test_the_same_generator_gives_the_same_draws_and_scores():
    steered, x = flow_of("tsf").at(1.0), vectors(20, 2)
    one, two, other = (steered.score(x, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one, two) and float((one - other).abs().max()) > 1e-3
    one, two, other = (steered.sample(20, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and not torch.equal(one[0], other[0])


# --- stationary -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["independence", "latent"])
@pytest.mark.parametrize("kind", ["tsf", "real-nvp"])
def test_moves_with_momenta_keep_the_distribution(kind, step):
    samples = Samples(WELL.exact(2000, seed=7))
    flow = build_vector_flow(2, samples, FlowSettings(kind=kind, **SMALL), generator=seeded(2))
    steered = perturbed(flow, 0.05).requires_grad_(False).at(1.0)
    assert isinstance(steered, Proposal)
    target = Target(WELL.energy, 1.0)
    start = target.at(WELL.exact(N_WALKERS, seed=3))
    series, accepted = run(start, target, steered, steps_of(step), WELL.observe, seed=11)
    assert accepted > 0.01
    laws.stationary(series, WELL.expected)


# --- building ---------------------------------------------------------------------------------------------------------


def test_untrained_flows_have_the_mean_and_covariance_of_the_samples():
    x = torch.randn(4000, 3, generator=seeded(1)) @ torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 0.2]])
    for kind in ("tsf", "real-nvp", "anharmonic"):
        settings = FlowSettings(kind=kind, quartic=False, **SMALL)
        flow = build_vector_flow(3, Samples(x + 1.0), settings, generator=seeded(2))
        draws, _ = flow.at(1.0).sample(40_000, generator=seeded(3))
        assert draws.dtype == torch.float64
        assert float(((draws.mean(0) - x.mean(0) - 1.0) / x.std(0)).abs().max()) < 5 / math.sqrt(40_000)
        assert float((draws.T.cov() - x.T.cov()).abs().max()) < 0.1


def test_the_baseline_has_as_many_parameters_and_starts_the_same():
    one, other = (flow_of(kind, size=0.0) for kind in ("tsf", "real-nvp"))
    assert one.n_parameters == other.n_parameters and one.n_momenta == other.n_momenta == 2
    x = vectors(10, 2)
    scores = [flow.at(0.5).log_prob(x, generator=seeded(1)) for flow in (one, other)]
    assert torch.equal(*scores)


def test_every_coupling_reads_positions_and_momenta():
    """Halves of one kind would begin at a saddle point of the loss."""
    for layer in flow_of("tsf", dim=4).transform.transforms[:-2]:
        for part in (layer.change, layer.keep):
            assert 0 < int((part < 4).sum()) < 4 and 0 < int((part >= 4).sum()) < 4


def test_energies_and_temperatures_have_one_unit():
    flow = flow_of()
    assert flow.kT(0.3) == 0.3 and flow.at(0.3).prior.tau == 0.3
    assert repr(flow.at(0.3)).startswith("Flow(vectors, 2 degrees of freedom and as many momenta, trained at 1, ")


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tsf", "real-nvp"])
def test_the_likelihood_loss_is_minus_log_prob_each_at_its_own_temperature(kind):
    flow, x = flow_of(kind), vectors(60, 2)
    one = likelihood_loss(flow, x, torch.full((60,), 0.7), generator=seeded(1))
    assert laws.difference(one, -flow.at(0.7).log_prob(x, generator=seeded(1))) < 1e-12
    mixed = torch.tensor([0.5, 0.7, 1.0]).repeat(20)
    loss = likelihood_loss(flow, x, mixed, generator=seeded(1))
    assert torch.equal(loss[mixed == 0.7], one[mixed == 0.7]) and not torch.equal(loss, one)


@pytest.mark.parametrize("kind", ["tsf", "real-nvp", "anharmonic"])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_weights_of_the_energy_loss_average_to_the_partition_function(kind, temperature):
    """Momenta are in draws and target alike: Z is that of the positions alone."""
    flow = flow_of(kind, True, size=0.1)
    result = energy_loss(
        flow, lambda x: ((x - 0.5) ** 2).sum(1), temperature, 80_000, start=1e6, generator=seeded(1)
    )  # fmt: skip
    w = torch.exp(result.log_weights)
    error = float(w.std() / w.mean() / math.sqrt(len(w)))
    log_z = math.log(math.pi * temperature)
    assert error < 0.02 and abs(float(w.mean().log()) - log_z) < 4 * error
    assert result.value > -log_z  # Gibbs' inequality


@pytest.mark.parametrize("kind", ["tsf", "real-nvp", "anharmonic"])
def test_training_brings_the_likelihood_and_evens_out_the_weights(kind, tmp_path):
    samples = Samples(WELL.exact(4000, seed=7), np.full(4000, 1.0))
    flow = build_vector_flow(2, samples, FlowSettings(kind=kind, blocks=3, hidden=16, depth=1), generator=seeded(2))
    new = WELL.exact(2000, seed=8)
    before = flow.at(1.0).score(new, generator=seeded(1)).mean()
    settings = TrainingSettings(
        steps=150, batch_frames=128, batch_draws=64, evaluate_every=50, learning_rate=1e-2, weight_average=0.9
    )
    history = train(flow, samples, WELL.energy, settings, directory=tmp_path, seed=1)
    assert flow.at(1.0).score(new, generator=seeded(1)).mean() > before + 0.2
    assert history.rows[-1]["ess_train"] > 0.05 and history.n_energy_evaluations > 0


# --- bad input --------------------------------------------------------------------------------------------------------


def test_momenta_without_a_generator_are_refused():
    steered, x = flow_of("tsf").at(1.0), vectors(3, 2)
    for ask in (steered.log_prob, steered.score, steered.to_latents, steered.log_prob_internals):
        with pytest.raises(ValueError, match="2 momenta, which are drawn anew: give a generator"):
            ask(x)
    assert torch.isfinite(flow_of("tsf", False).at(1.0).log_prob(x)).all()


def test_momenta_of_another_number_are_refused():
    with pytest.raises(ValueError, match=re.escape("momenta have shape (3, 1); expected (3, 2)")):
        flow_of("tsf").at(1.0).joint_log_prob(vectors(3, 2), torch.zeros(3, 1))


def test_vectors_of_another_dimension_are_refused():
    with pytest.raises(ValueError, match=re.escape("(5, 3); expected (batch, 2)")):
        flow_of().at(1.0).log_prob(torch.zeros(5, 3), generator=seeded(1))
    with pytest.raises(ValueError, match="at least 1 dimension, not 0"):
        LineCoordinates(0)


@pytest.mark.parametrize(
    ("x", "temperatures", "message"),
    [
        (torch.zeros(4), 1.0, "expected"),
        (torch.zeros(0, 2), 1.0, "expected"),
        (torch.zeros(4, 2), [1.0, 2.0], "expected"),
        (torch.full((4, 2), math.nan), 1.0, "4 of 4 samples are not finite"),
        (torch.zeros(4, 2), [1.0, 0.0, 1.0, 1.0], "above 0"),
        (torch.zeros(4, 2), math.inf, "must be finite"),
    ],
)
def test_samples_are_checked(x, temperatures, message):
    with pytest.raises(ValueError, match=message):
        Samples(x, temperatures)


def test_samples_are_split_in_time_and_cannot_be_changed():
    samples = Samples(torch.arange(20.0).view(10, 2), np.linspace(1.0, 2.0, 10))
    early, late = samples.split(0.2)
    assert len(early) == 8 and late.positions[:, 0].tolist() == [16.0, 18.0] and late.temperatures[1] == 2.0
    with pytest.raises(ValueError, match="read-only"):
        samples.positions[0] = 1.0
    with pytest.raises(ValueError, match="one part would be empty"):
        samples.split(0.01)


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="5 frames are too few for 3"):
        build_vector_flow(3, Samples(torch.zeros(5, 3)), generator=seeded(1))


def test_kinds_are_selected_by_name_in_the_configuration():
    assert parse_config({"flow": {"kind": "tsf"}}).flow.has_momenta
    assert not parse_config({"flow": {"kind": "tsf", "momenta": False}}).flow.has_momenta
    assert parse_config({"flow": {"momenta": True}}).flow == FlowSettings(momenta=True)
    assert parse_config({}).flow == FlowSettings() and not FlowSettings().has_momenta
    for wrong in ({"kind": "rnvp"}, {"momenta": "yes"}):
        with pytest.raises(ConfigError, match='"tsf", "real-nvp", "spline"' if "kind" in wrong else "true or false"):
            parse_config({"flow": wrong})
