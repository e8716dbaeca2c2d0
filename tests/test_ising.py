"""Small Ising models: transforms and energies against enumeration, fits against their moments and a linear program."""

import math
import time

import numpy as np
import pytest
import torch
from molecules import seeded
from scipy.optimize import linprog

from openmm_tsf.tuning import optimal_sampling_temperature
from openmm_tsf.tuning.ising import (
    correlations,
    fit_correlations,
    fit_ising,
    pair_energies,
    sample_spins,
    spin_states,
    square_lattice,
    walsh,
)
from openmm_tsf.tuning.pairwise import all_states, ising
from openmm_tsf.tuning.sizes import NoFit

NINE = square_lattice(3)


def random_couplings(n, seed=1):
    j = torch.randn(n, n, generator=seeded(seed)).triu(1)
    return j + j.T


def brute_energies(couplings, spins):
    s = spins.double()
    return -0.5 * ((s @ couplings) * s).sum(1)


def test_lattice():
    """Four neighbours each; the ground states have -2 for each spin."""
    assert (square_lattice(4).sum(0) == 4).all() and torch.equal(NINE, NINE.T)
    assert float(pair_energies(square_lattice(4)).min()) == -32.0
    with pytest.raises(ValueError, match="side of at least 3"):
        square_lattice(2)


def test_walsh_is_a_sum_over_states():
    x = torch.randn(3, 16, generator=seeded(1))
    signs = torch.tensor([[(-1.0) ** bin(a & b).count("1") for a in range(16)] for b in range(16)])
    assert torch.allclose(walsh(x), x @ signs)
    assert torch.allclose(walsh(walsh(x)), 16 * x)


def test_energies_are_those_of_the_states_and_of_the_potts_form():
    j = random_couplings(6)
    spins = spin_states(6)
    assert len(spins) == 32 and (spins[:, -1] == 1).all() and len(spins.unique(dim=0)) == 32
    assert torch.allclose(pair_energies(j), brute_energies(j, spins))
    assert torch.allclose(ising(j)((spins + 1) // 2), pair_energies(j))


def test_samples_have_the_moments_of_the_model():
    j = random_couplings(5, 2)
    states = 2 * all_states(5, 2) - 1
    p = torch.softmax(-brute_energies(j, states) / 1.7, 0)
    exact = (states.double().T * p) @ states.double()
    spins = sample_spins(j, 20_000, temperature=1.7, generator=seeded(3))
    assert (correlations(spins) - exact).abs().max() < 4.5 / 20_000**0.5
    assert spins.double().mean(0).abs().max() < 4.5 / 20_000**0.5


@pytest.mark.parametrize("temperature", [3.0, 4.4])
def test_newton_reaches_the_moments(temperature):
    """By enumeration over all 2^9 states, with a transform of no one's making."""
    spins = sample_spins(NINE, 300, temperature=temperature, generator=seeded(4))
    fit = fit_ising(spins)
    states = (2 * all_states(9, 2) - 1).double()
    q = torch.softmax(-brute_energies(fit.couplings, states), 0)
    assert ((states.T * q) @ states - correlations(spins)).abs().max() < 1e-9
    assert not fit.pseudocount and fit.largest_error < 1e-9


def test_a_known_model_comes_back():
    j = 0.5 * random_couplings(7, 5)
    s = (2 * all_states(7, 2) - 1).double()
    p = torch.softmax(-brute_energies(j, s), 0)
    fit = fit_correlations((s.T * p) @ s)
    assert (fit.couplings - j).abs().max() < 1e-8


def test_no_finite_fit_is_what_a_linear_program_says():
    """There is none iff some direction of couplings puts all data on a face of the polytope of correlations."""
    states = spin_states(9).double().numpy()
    i, j = np.triu_indices(9, 1)
    products = states[:, i] * states[:, j]
    found = []
    for seed, temperature in ((s, t) for s in range(6) for t in (2.0, 2.8, 4.4)):
        spins = sample_spins(NINE, 50, temperature=temperature, generator=seeded(seed))
        slopes = products - correlations(spins).numpy()[i, j]
        face = linprog(slopes.sum(0), A_ub=slopes, b_ub=np.zeros(len(slopes)), bounds=(-1, 1))
        found.append(fit_ising(spins).pseudocount)
        assert found[-1] == (face.fun < -1e-7)
    assert any(found) and not all(found)


def test_data_without_a_finite_fit():
    spins = torch.ones(10, 9, dtype=torch.long)
    with pytest.raises(NoFit, match="always equal or always opposite"):
        fit_ising(spins, pseudocount=False)
    fit = fit_ising(spins)
    assert fit.pseudocount and torch.isfinite(fit.couplings).all()
    states = spin_states(9).double()
    q = torch.softmax(-pair_energies(fit.couplings), 0)
    assert ((states.T * q) @ states - torch.eye(9) / 11 - 10 / 11).abs().max() < 1e-8


def test_a_fit_to_many_samples_is_sampled_at_one():
    spins = sample_spins(NINE, 40_000, temperature=3.0, generator=seeded(6))
    best = optimal_sampling_temperature(fit_ising(spins).against(NINE, 3.0))
    assert abs(best.t_star.value - 1.0) < 0.02 and abs(best.t_prime.value - 1.0) < 0.02


def test_few_samples_are_cooled_below_and_heated_above_the_critical_temperature():
    medians = {}
    for temperature in (2.0, 4.4):
        stars = []
        for seed in range(8):
            spins = sample_spins(NINE, 50, temperature=temperature, generator=seeded(20 + seed))
            best = optimal_sampling_temperature(fit_ising(spins).against(NINE, temperature))
            stars.append(best.t_star.value)
        medians[temperature] = float(torch.tensor(stars).median())
    assert medians[2.0] < 0.9 and medians[4.4] > 1.2


def test_training_data_say_nothing_about_t_prime():
    """At maximum likelihood <Ehat> over the data is that over the model, so that t' of the data is 1."""
    spins = sample_spins(NINE, 60, temperature=4.4, generator=seeded(8))
    fit = fit_ising(spins)
    states, own = fit.against(NINE, 4.4), brute_energies(fit.couplings, spins)
    assert not fit.pseudocount
    assert abs(optimal_sampling_temperature(states, held_out=own, n_replicates=0).t_prime.value - 1.0) < 1e-6
    assert optimal_sampling_temperature(states).t_prime.value > 1.2


def test_sixteen_spins_in_two_seconds():
    lattice = square_lattice(4)
    spins = sample_spins(lattice, 500, temperature=2.6, generator=seeded(7))
    begin = time.process_time()
    fit = fit_ising(spins)
    assert time.process_time() - begin < 2.0
    assert fit.largest_error < 1e-9


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: fit_ising(torch.ones(0, 9, dtype=torch.long)), "at least 2 samples"),
        (lambda: fit_ising(torch.ones(1, 9, dtype=torch.long)), "at least 2 samples"),
        (lambda: fit_ising(torch.zeros(5, 9, dtype=torch.long)), "45 spins are neither -1 nor"),
        (lambda: pair_energies(torch.zeros(30, 30)), "2 to 20 spins"),
        (lambda: pair_energies(torch.full((3, 3), math.nan)), "finite and symmetric"),
        (lambda: sample_spins(NINE, 0, generator=seeded(1)), "at least one sample"),
        (lambda: sample_spins(NINE, 5, temperature=0.0, generator=seeded(1)), "above 0"),
        (lambda: fit_correlations(0.5 * torch.eye(9)).against(square_lattice(4), 1.0), "not one state space"),
        (lambda: fit_correlations(0.5 * torch.eye(9)).against(NINE, -1.0), "above 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
