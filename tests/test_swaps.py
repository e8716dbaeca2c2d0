"""Exchanges of temperatures keep every level's distribution, whoever meets whom."""

import math

import numpy as np
import pytest
import torch
from molecules import seeded

from openmm_tsf.swaps import exchange, neighbour_pairs, random_pairs

BETAS = torch.tensor([1.0, 0.7, 0.5, 0.4], dtype=torch.float64)
SHAPE = 2.5
"""Energies are Gamma(SHAPE)/beta: those of five harmonic degrees of freedom."""
N = 20_000


def one_exchange(pairs_of, betas=BETAS, seed=1):
    """Reduced energies by level after one exchange of exact draws, levels before and after, and counts."""
    g, rng = seeded(seed), np.random.default_rng(seed)
    levels = torch.arange(len(BETAS) * N) % len(BETAS)
    energies = torch.tensor(rng.gamma(SHAPE, size=len(levels))) / BETAS[levels]
    new, proposed, accepted = exchange(levels, energies, betas, pairs_of(levels, energies, g), generator=g)
    return [BETAS[k] * energies[new == k] for k in range(len(BETAS))], levels, new, proposed, accepted


def deviations(energies):
    """Of mean and mean square of each level, in standard errors."""
    moments = ((SHAPE, SHAPE), (SHAPE * (SHAPE + 1), SHAPE * (SHAPE + 1) * (4 * SHAPE + 6)))
    return [
        float(((e**power).mean() - mean) / math.sqrt(variance / len(e)))
        for e in energies
        for power, (mean, variance) in enumerate(moments, 1)
    ]


KINDS = {
    "even": lambda levels, energies, g: neighbour_pairs(levels, 4, 0, generator=g),
    "odd": lambda levels, energies, g: neighbour_pairs(levels, 4, 1, generator=g),
    "random": lambda levels, energies, g: random_pairs(levels, generator=g),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_level_keeps_its_distribution(kind):
    energies, levels, new, _, accepted = one_exchange(KINDS[kind])
    assert max(map(abs, deviations(energies))) < 4.0
    assert torch.equal(new.sort()[0], levels.sort()[0])
    assert int((new != levels).sum()) == int(accepted.sum()) > 0.05 * len(levels)


def matched_by_energy(levels, energies, g):
    """Low energies of the hot walkers with high ones of the cold: whom one meets depends on energies."""
    cold, hot = (levels == 0).nonzero().squeeze(1), (levels == 1).nonzero().squeeze(1)
    return cold[energies[cold].argsort(descending=True)], hot[energies[hot].argsort()]


@pytest.mark.parametrize(
    ("pairs", "betas"),
    [
        (KINDS["random"], torch.zeros(4, dtype=torch.float64)),
        (KINDS["random"], -BETAS),
        (KINDS["even"], 2.0 * BETAS),
        (matched_by_energy, BETAS),
    ],
    ids=["no test", "wrong sign", "wrong kT", "pairs by energy"],
)
def test_wrong_exchanges_are_noticed(pairs, betas):
    assert max(map(abs, deviations(one_exchange(pairs, betas)[0]))) > 8.0


def test_acceptance_is_the_exact_one():
    _, _, _, proposed, accepted = one_exchange(KINDS["random"])
    assert torch.equal(proposed, proposed.T) and torch.equal(accepted, accepted.T)
    assert int(proposed.diagonal().sum()) == int(accepted.diagonal().sum()) == 0
    rng = np.random.default_rng(2)
    cold, hot = (rng.gamma(SHAPE, size=400_000) / float(BETAS[k]) for k in (0, 2))
    wanted = np.minimum(1.0, np.exp(float(BETAS[0] - BETAS[2]) * (cold - hot))).mean()
    found, n = int(accepted[0, 2]) / int(proposed[0, 2]), int(proposed[0, 2])
    assert n > 4000  # a quarter of all pairs is of two levels, one in six of these of 0 and 2
    assert abs(found - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / n)


def test_neighbours_meet_in_turn_as_far_as_there_are_enough():
    levels = torch.tensor([0] * 5 + [1] * 4 + [2] * 3 + [3] * 4)[torch.randperm(16, generator=seeded(1))]
    for turn, wanted in ((0, {(0, 1): 4, (2, 3): 3}), (1, {(1, 2): 3}), (2, {(0, 1): 4, (2, 3): 3})):
        i, j = neighbour_pairs(levels, 4, turn, generator=seeded(turn))
        assert len(torch.cat((i, j)).unique()) == 2 * len(i)
        met = list(zip(levels[i].tolist(), levels[j].tolist(), strict=True))
        assert {pair: met.count(pair) for pair in set(met)} == wanted
    two = levels.clamp(max=1)
    assert len(neighbour_pairs(two, 2, 1, generator=seeded(1))[0]) == 5
    assert len(neighbour_pairs(torch.zeros(3, dtype=torch.int64), 1, 0, generator=seeded(1))[0]) == 0


def test_random_pairs_are_all_walkers_once_and_any_two_meet_equally_often():
    met = np.zeros((5, 5))
    for seed in range(2000):
        i, j = random_pairs(torch.zeros(5, dtype=torch.int64), generator=seeded(seed))
        assert len(torch.cat((i, j)).unique()) == 4
        met[i, j] += 1
        met[j, i] += 1
    found = met[np.triu_indices(5, 1)]  # two of ten pairs each time
    assert np.abs(found - 400).max() < 4.5 * np.sqrt(2000 * 0.2 * 0.8)
