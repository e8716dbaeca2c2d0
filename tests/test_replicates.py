"""Medians over data sets: cool below the critical temperature, heat above, neither with many samples."""

import math

import pytest
import torch
from molecules import seeded

from openmm_tsf.tuning import optimal_sampling_temperature
from openmm_tsf.tuning.ising import fit_ising, sample_spins, square_lattice
from openmm_tsf.tuning.replicates import CRITICAL, IsingReplicates, ising_replicates


def test_each_data_set_is_fitted_and_tuned():
    found = ising_replicates(3, 4.4, 60, 4, generator=seeded(5))
    generator, lattice = seeded(5), square_lattice(3)
    for k in range(4):
        fit = fit_ising(sample_spins(lattice, 60, temperature=4.4, generator=generator))
        best = optimal_sampling_temperature(fit.against(lattice, 4.4), temperatures=torch.logspace(-1, 1, 201))
        assert abs(float(found.t_star[k]) - best.t_star.value) < 1e-9
        assert abs(float(found.t_prime[k]) - best.t_prime.value) < 1e-9
        assert bool(found.no_fit[k]) == fit.pseudocount


def test_medians_move_to_one():
    few, many = (ising_replicates(3, 4.4, m, 15, generator=seeded(6)) for m in (60, 2000))
    cold = ising_replicates(3, 2.0, 60, 15, generator=seeded(6))
    assert few.median("t_star", no_fit=False)[0] > 1.15
    assert abs(many.median("t_star", no_fit=False)[0] - 1.0) < 0.03
    assert cold.no_fit.sum() > 8 and cold.median("t_star", no_fit=True)[0] < 0.9
    assert abs(CRITICAL - 2.269185) < 1e-6


def test_medians_of_both_kinds():
    star = torch.tensor([0.7, 0.8, 0.9, math.inf, 2.0])
    cell = IsingReplicates(3, 2.0, 50, star, star, torch.tensor([False, False, False, True, True]))
    middle, low, high = cell.median("t_star", no_fit=False)
    assert (middle, low, high) == pytest.approx((0.8, 0.7, 0.9))
    assert cell.median("t_star", no_fit=True)[0] == 2.0
    none = IsingReplicates(3, 2.0, 50, star, star, torch.ones(5, dtype=torch.bool))
    assert all(math.isnan(x) for x in none.median("t_prime", no_fit=False))
    with pytest.raises(ValueError, match="at least one data set"):
        ising_replicates(3, 2.0, 50, 0, generator=seeded(1))
