"""Pairwise models: energies against sums, Gibbs sampling against enumeration, pseudo-likelihood against the truth."""

import pytest
import torch
from molecules import seeded

from openmm_tsf.tuning.pairwise import (
    PairwiseModel,
    all_states,
    fit_pseudolikelihood,
    gibbs,
    ising,
    one_hot,
    temper_pairwise,
)


def random_model(sites=4, states=3, scale=0.7, seed=1):
    g = seeded(seed)
    j = scale * torch.randn(sites, states, sites, states, generator=g)
    j = 0.5 * (j + j.permute(2, 3, 0, 1))
    for k in range(sites):
        j[k, :, k] = 0.0
    return PairwiseModel(scale * torch.randn(sites, states, generator=g), j)


def numbers(states, n_states):
    """The place of each state in the enumeration."""
    return (states * n_states ** torch.arange(states.shape[1] - 1, -1, -1)).sum(1)


def z_scores(states, model, t=1.0):
    p = torch.softmax(-model(model.states()) / t, 0)
    counts = torch.bincount(numbers(states, model.n_states), minlength=len(p))
    kept = p * len(states) > 5
    return ((counts - len(states) * p) / (len(states) * p * (1 - p)).sqrt())[kept]


def test_energies_are_sums_over_sites_and_pairs():
    model = random_model()
    states = all_states(4, 3)
    assert states.shape == (81, 4) and torch.equal(numbers(states, 3), torch.arange(81))
    for s, energy in zip(states[::7].tolist(), model(states)[::7], strict=True):
        h = sum(model.fields[i, s[i]] for i in range(4))
        j = sum(model.couplings[i, s[i], k, s[k]] for i in range(4) for k in range(i + 1, 4))
        assert abs(float(energy + h + j)) < 1e-12
    assert one_hot(states, 3).sum() == 81 * 4


def test_ising_as_potts():
    j = torch.tensor([[0.0, 0.4, -0.7], [0.4, 0.0, 1.1], [-0.7, 1.1, 0.0]])
    h = torch.tensor([0.3, -0.2, 0.9])
    s = 2.0 * all_states(3, 2) - 1.0
    assert torch.allclose(ising(j, h)(all_states(3, 2)), -s @ h - 0.5 * ((s @ j) * s).sum(1))


@pytest.mark.parametrize("t", [0.6, 1.0, 2.0])
def test_gibbs_leaves_the_distribution_as_it_is(t):
    """Chains that start in it stay in it."""
    model, g = random_model(), seeded(2)
    start = torch.multinomial(torch.softmax(-model(model.states()) / t, 0), 20_000, True, generator=g)
    end = gibbs(model, model.states()[start], 3, t=t, generator=g)
    z = z_scores(end, model, t)
    assert z.abs().max() < 4.5 and 0.5 < z.square().mean() < 1.7
    assert (numbers(end, 3) != start).double().mean() > 0.3


def test_gibbs_at_another_temperature_does_not():
    """Negative control: the same test fails for chains that are 20 % too warm."""
    model, g = random_model(), seeded(2)
    start = torch.multinomial(torch.softmax(-model(model.states()), 0), 20_000, True, generator=g)
    end = gibbs(model, model.states()[start], 3, t=1.2, generator=g)
    assert z_scores(end, model).square().mean() > 3.0


def test_each_chain_has_its_own_temperature():
    model, g = random_model(), seeded(3)
    start = torch.zeros(20_000, 4, dtype=torch.long)
    t = torch.tensor([0.7, 1.6]).repeat_interleave(10_000)
    end = gibbs(model, start, 25, t=t, generator=g)
    for half, temperature in ((end[:10_000], 0.7), (end[10_000:], 1.6)):
        assert z_scores(half, model, temperature).abs().max() < 4.5
    assert not start.any()


def test_tempering_crosses_where_gibbs_does_not():
    """Two states far apart: all up and all down, as often as they must be."""
    model = ising(0.9 * (torch.ones(8, 8) - torch.eye(8)), torch.full((8,), 0.05))
    p = torch.softmax(-model(model.states()), 0)
    right = float((p * model.states().double().mean(1)).sum())
    found = temper_pairwise(model, 3000, n_replicas=150, hottest=8.0, equilibration=100, generator=seeded(4))
    assert found.states.shape == (3000, 8) and (found.swaps_accepted > 0.1).all()
    assert abs(float(found.states.double().mean()) - right) < 0.05
    alone = temper_pairwise(model, 1500, n_levels=1, n_replicas=150, equilibration=100, generator=seeded(4))
    assert abs(float(alone.states.double().mean()) - right) > 0.08


def test_pseudolikelihood_finds_the_truth():
    model = random_model(5, 3, 0.6, 5)
    rows = torch.multinomial(torch.softmax(-model(model.states()), 0), 5000, True, generator=seeded(6))
    fit = fit_pseudolikelihood(model.states()[rows], 3, ridge=1e-3)
    q, p = (torch.softmax(-m(model.states()), 0) for m in (fit, model))
    few = fit_pseudolikelihood(model.states()[rows[:100]], 3, ridge=1e-3)
    worse = torch.softmax(-few(model.states()), 0)
    assert float((p * (p / q).log()).sum()) < 0.02 < 0.1 < float((p * (p / worse).log()).sum())


def test_pseudolikelihood_is_at_its_optimum():
    """Finite differences of the objective, from its definition, in directions of fields and couplings."""
    model = random_model(3, 3, 1.0, 7)
    data = model.states()[torch.multinomial(torch.softmax(-model(model.states()), 0), 200, True, generator=seeded(8))]
    fit, ridge = fit_pseudolikelihood(data, 3, ridge=0.02), 0.02

    def objective(h, j):
        total = 0.0
        for site in range(3):
            logits = torch.stack(
                [
                    h[site] + sum(j[site, :, k, s[k]] for k in range(3) if k != site)
                    for s in data
                ]
            )  # fmt: skip
            total = total - torch.log_softmax(logits, 1)[torch.arange(200), data[:, site]].mean()
        return total + 0.5 * ridge * (h.square().sum() + 0.5 * j.square().sum())

    best = objective(fit.fields, fit.couplings)
    for seed in range(4):
        step = random_model(3, 3, 1e-3, 20 + seed)
        for sign in (1, -1):
            assert objective(fit.fields + sign * step.fields, fit.couplings + sign * step.couplings) > best


def test_weights_of_samples_are_repeats():
    data = all_states(3, 2)[torch.tensor([0, 1, 3, 5, 7, 7, 7, 0])]
    once = fit_pseudolikelihood(all_states(3, 2)[torch.tensor([0, 1, 3, 5, 7])], 2, weights=[2.0, 1.0, 1.0, 1.0, 3.0])
    assert (once.couplings - fit_pseudolikelihood(data, 2).couplings).abs().max() < 1e-4


ZERO = torch.zeros(3, 2, 3, 2)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: PairwiseModel(torch.zeros(3, 2), torch.zeros(3, 2, 3, 3)), "expected .L, S., .L, S, L, S."),
        (lambda: PairwiseModel(torch.zeros(3, 2) / 0.0, ZERO), "must be finite"),
        (lambda: PairwiseModel(torch.zeros(3, 2), ZERO + 1.0), "zero within a site"),
        (lambda: random_model()(torch.zeros(5, 3, dtype=torch.long)), "not one state space"),
        (lambda: random_model()(torch.full((5, 4), 3)), "states from 3 to 3 for a model of 3"),
        (lambda: all_states(40, 2), "too many to enumerate"),
        (lambda: gibbs(random_model(), torch.zeros(5, 4, dtype=torch.long), 1, t=0.0, generator=seeded(1)), "above 0"),
        (lambda: temper_pairwise(random_model(), 0, generator=seeded(1)), "cannot draw 0"),
        (lambda: fit_pseudolikelihood(torch.zeros(1, 4, dtype=torch.long), 3), "at least 2 samples"),
        (lambda: fit_pseudolikelihood(all_states(3, 2), 2, ridge=0.0), "above 0"),
        (lambda: fit_pseudolikelihood(all_states(3, 2), 2, weights=[1.0]), "weights of 8 samples"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
