"""Flows of double wells: scores are what they say, and unmixing finds the directions of the wells."""

import pytest
import torch
from molecules import seeded
from pictures import misplaced, words

from openmm_tsf.flow import FlowSettings, build_vector_flow
from openmm_tsf.potentials import QuarticPotentials
from openmm_tsf.training import TrainingSettings
from openmm_tsf.vectors import Samples
from openmm_tsf.wells import random_wells, temper, temperature_ladder
from openmm_tsf.wells_plots import marginals_figure, nll_figure
from openmm_tsf.wells_study import LATE, edges, fit_potentials, marginals, score, study, unmix

WELLS = random_wells(3, generator=seeded(1))
LADDER = temperature_ladder(0.1, 1.0, 10.0, 9)
SMALL = {"blocks": 1, "hidden": 8, "depth": 1}


@pytest.fixture(scope="module")
def samples():
    return temper(WELLS, LADDER, 8000, n_replicas=64, generator=seeded(2))


def flow_of(samples, **settings):
    x = Samples(samples.at(1.0).numpy(), 1.0)
    return build_vector_flow(3, x, FlowSettings(**SMALL, **settings), generator=seeded(3))


def test_scores_of_a_gaussian_are_those_of_arithmetic(samples):
    """An untrained flow of kind tsf is the Gaussian with the mean and covariance of the samples, times T."""
    flow = flow_of(samples, kind="tsf")
    rows = score(flow, WELLS, samples, [0.1, 1.0, 10.0], generator=seeded(4))
    x = samples.at(1.0).double()
    gauss = torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.T, correction=0))
    here = rows[1]
    assert here.nll == pytest.approx(-float(gauss.log_prob(x).mean()), abs=1e-5)
    assert here.exact == WELLS.at(1.0).entropy
    for row in rows:
        assert row.excess > 10 * row.excess_error > 0.0
        y = samples.at(row.temperature).double()
        entropy = -WELLS.at(row.temperature).log_prob(y).mean()
        assert row.nll - row.excess == pytest.approx(float(entropy), abs=1e-9)


def test_the_excess_cannot_be_negative_but_by_chance(samples):
    """Of the exact density it is zero; of a Gaussian with momenta it is as much as without them."""

    class Exact:
        def at(self, temperature):
            return type("Steered", (), {"log_prob": lambda _, x, generator: WELLS.at(temperature).log_prob(x)})()

    for row in score(Exact(), WELLS, samples, LADDER, generator=seeded(4)):
        assert abs(row.excess) < 1e-12 and abs(row.nll - row.exact) < 5 * row.nll_error


def test_unmixing_finds_the_wells_and_steers_to_all_temperatures(samples):
    flow = flow_of(samples)
    before = score(flow, WELLS, samples, LADDER, generator=seeded(4))
    unmix(flow, samples.at(1.0).double())
    after = score(flow, WELLS, samples, LADDER, generator=seeded(4))
    matrix = WELLS.mix @ flow.transform.transforms[-1].matrix
    largest = matrix.abs() / matrix.norm(dim=1, keepdim=True)
    assert largest.amax(1).min() > 0.99
    assert sorted(largest.argmax(1).tolist()) == [0, 1, 2]
    for first, last in zip(before, after, strict=True):
        assert last.excess < 0.1 < 0.2 < first.excess


def test_potentials_fit_by_likelihood_are_those_drawn_from():
    """A shift of the samples is found as the origin."""
    true, fitted = QuarticPotentials(2), QuarticPotentials(2)
    with torch.no_grad():
        true.coefficients.copy_(torch.tensor([[0.2, 0.0], [-1.5, 0.3], [0.0, 0.0]]))
        true.quartic.fill_(-1.0)
        fitted.coefficients[1] = -1.0
        fitted.quartic.fill_(-0.5)
    shift = torch.tensor([0.7, -0.2])
    origin = fit_potentials(fitted, true.sample(200_000, 1.0, generator=seeded(5)) + shift)
    v = torch.linspace(-1.8, 1.8, 50)[:, None] + shift
    densities = [(p(v - o) + p.log_z(1.0)).detach() for p, o in ((fitted, origin), (true, shift))]
    assert (densities[0] - densities[1]).abs().max() < 0.05
    assert torch.equal(fitted.coefficients[2].detach(), torch.zeros(2))


def test_only_flows_with_quartic_potentials_alone_are_unmixed(samples):
    for settings in ({"kind": "tsf"}, {"quartic": False}, {"momenta": True}):
        with pytest.raises(ValueError, match="only a flow of quartic potentials"):
            unmix(flow_of(samples, **settings), samples.at(1.0).double())


def test_marginals_are_densities(samples):
    bins = edges(samples, 1.0)
    inside, beyond = ((torch.tensor(marginals(samples.at(t), bins)) * bins.diff(dim=1)).sum(1) for t in (1.0, 10.0))
    assert torch.allclose(inside, torch.ones(3))
    assert 0.5 < beyond.min() < beyond.max() < 0.999


def test_studies_and_their_figures(samples):
    training = TrainingSettings(steps=20, batch_frames=64, batch_draws=16, evaluate_every=10)
    done = [
        study(WELLS, samples, FlowSettings(kind=kind, **SMALL), training, temperatures=[0.1, 1.0, 10.0], seed=seed)
        for kind in ("real-nvp", "tsf", "anharmonic")
        for seed in (1, 2)
    ]
    counts = {d["kind"]: d["n_parameters"] for d in done}
    assert counts["tsf"] == counts["real-nvp"]
    late = samples.split(LATE)[1]
    assert done[0]["scores"][1]["nll_error"] == pytest.approx(late.x.shape[1] ** -0.5, rel=1.0)
    assert done[-1]["scores"][1]["excess"] < 0.1 < done[0]["scores"][1]["excess"]
    figure = nll_figure(done, note="A note.")
    assert not misplaced(figure)
    assert {"real-NVP", "TSF, Gaussian prior", "TSF, quartic prior", "exact", "3 dimensions"} <= set(words(figure))
    figure = marginals_figure(samples, done[::2], note="A note.")
    assert {"$x_3$", "T = 0.1", "T = 1", "T = 10"} <= set(words(figure))
    assert any("The first 3 of 3 coordinates" in text for text in words(figure))
