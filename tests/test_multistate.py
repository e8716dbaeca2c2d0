"""MBAR on replica exchanges whose answers are known: values, calibration of errors, and records that must be caught."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import ndtr

from openmm_tsf import multistate, torsions
from openmm_tsf.mbar import Samples
from openmm_tsf.records import ExchangeRecord, RoundTrips
from openmm_tsf.units import BOLTZMANN, kT

TEMPERATURES = np.array([300.0, 378.0, 476.0, 600.0])
DIM = 20
ENERGY_LEFT, DEGENERACY = 6.0, 0.5
"""[kJ/mol], and relative number of states, of alpha_L above everything else."""
LEFT, RIGHT, BETA = (1.0, 0.5), (-1.2, -0.7), (-1.3, 2.4)


def share_left(temperature):
    """Exact share of alpha_L."""
    weight = DEGENERACY * np.exp(-ENERGY_LEFT / kT(temperature))
    return weight / (1.0 + weight)


def exact(temperature: float) -> dict[str, float]:
    """Mean energy, heat capacity and shares: DIM oscillators, and alpha_L; the rest is half alpha_R, half beta."""
    p = share_left(temperature)
    return {
        "mean_energy": 0.5 * DIM * kT(temperature) + p * ENERGY_LEFT,
        "heat_capacity": 0.5 * DIM * BOLTZMANN + p * (1 - p) * ENERGY_LEFT**2 / (kT(temperature) * temperature),
        "alpha_left": p,
        "alpha_right": 0.5 * (1 - p),
        "beta": 0.5 * (1 - p),
    }


def exact_free_energies() -> np.ndarray:
    weight = 1.0 + DEGENERACY * np.exp(-ENERGY_LEFT / kT(TEMPERATURES))
    f = -0.5 * DIM * np.log(TEMPERATURES) - np.log(weight)
    return f - f[0]


def memory(rng: np.random.Generator, n: int, shape: tuple[int, ...], a: float) -> np.ndarray:
    """(n, *shape) unit normals, each an AR(1) process with correlation a from one row to the next."""
    noise = rng.standard_normal((n, *shape))
    for row in range(1, n):
        noise[row] = a * noise[row - 1] + math.sqrt(1 - a * a) * noise[row]
    return noise


def exchange(seed: int, n: int = 600, n_replicas: int = 4, a: float = 0.8, store_every: int = 2):
    """(record, phi, psi) of replicas with exact distributions at their temperatures and memory in time."""
    rng = np.random.default_rng(seed)
    levels = np.stack([np.roll(np.arange(4), shift) for shift in rng.integers(4, size=n)])
    levels = np.tile(levels, n_replicas // 4)
    temperature = TEMPERATURES[levels]
    left = ndtr(memory(rng, n, (n_replicas,), a)) < share_left(temperature)
    energies = 0.5 * kT(temperature) * (memory(rng, n, (n_replicas, DIM), a) ** 2).sum(2) + ENERGY_LEFT * left
    angles = np.where(rng.random((n, n_replicas, 1)) < 0.5, RIGHT, BETA)
    angles = np.where(left[..., None], LEFT, angles)[::store_every]
    proposed = np.full((4, 4), 10)
    record = ExchangeRecord(
        sampler="batched",
        temperatures=TEMPERATURES,
        levels=levels,
        energies=energies,
        swap_proposed=proposed,
        swap_accepted=proposed // 2,
        move_counts=({},) * 4,
        positions=np.zeros((len(angles), n_replicas, 1, 3), dtype=np.float32),
        position_iterations=np.arange(0, n, store_every),
    )
    return record, angles[..., 0].ravel(), angles[..., 1].ravel()


def deviations(row: dict[str, float]) -> dict[str, float]:
    """Deviation of each figure from the exact one, in its errors."""
    return {name: (row[name] - value) / row[f"{name}_error"] for name, value in exact(row["temperature"]).items()}


# --- values -----------------------------------------------------------------------------------------------------------


def test_free_energies_are_those_of_the_partition_functions():
    record, _, _ = exchange(seed=1, n=3000)
    result = multistate.free_energies(record)
    z = (result.value - exact_free_energies())[1:] / result.error[1:]
    assert result.value[0] == result.error[0] == 0.0
    assert np.abs(z).max() < 4.0 and result.error.max() < 0.1
    assert np.allclose(result.overlap.sum(1), 1.0)
    assert (np.diag(result.overlap, 1) > 0.1).all()
    # energies forget within (1 + a^2) / (1 - a^2) iterations, those of alpha_L a little differently
    assert result.inefficiency == pytest.approx(1.64 / 0.36, rel=0.2)
    assert (result.n_effective > 0.4 * record.energies.size / 4 / result.inefficiency).all()
    assert (result.n_effective < record.energies.size / result.inefficiency).all()


def test_observables_are_exact_on_the_ladder_and_between():
    record, phi, psi = exchange(seed=2, n=3000)
    temperatures = [300.0, 340.0, 430.0, 530.0, 600.0]
    rows = multistate.observables(record, temperatures, phi, psi)
    assert [row["temperature"] for row in rows] == temperatures
    for row in rows:
        assert max(map(abs, deviations(row).values())) < 4.0, deviations(row)
        assert row["mean_energy_error"] < 0.02 * row["mean_energy"]
        assert row["alpha_left_error"] < 0.2 * row["alpha_left"]
        assert row["alpha_left_free_energy_kt"] == pytest.approx(-math.log(row["alpha_left"]))
        assert row["alpha_left_free_energy_kt_error"] == pytest.approx(row["alpha_left_error"] / row["alpha_left"])
        assert row["beta_free_energy"] == pytest.approx(kT(row["temperature"]) * row["beta_free_energy_kt"])
        assert row["alpha_left"] + row["alpha_right"] + row["beta"] == pytest.approx(1.0)
        assert 0.0 < row["ess"] < 1.0 and row["n_effective"] < row["ess"] * record.energies.size


def test_rows_have_the_keys_of_a_reweighted_ensemble():
    record, phi, psi = exchange(seed=3, n=60)
    shared = ["temperature", "ess"]
    for name in ("mean_energy", "heat_capacity", "alpha_left", "alpha_left_free_energy_kt", "alpha_left_free_energy"):
        shared += [name, f"{name}_error"]
    assert set(shared) <= set(multistate.observables(record, [300.0], phi, psi)[0])
    without = multistate.observables(record, [300.0])[0]
    assert not [name for name in without if "alpha" in name or "beta" in name]
    assert "mean_energy" in without


def test_a_wrong_record_is_caught():
    record, phi, psi = exchange(seed=4, n=3000)
    hottest = record.levels == 3
    # a thermostat at 420 K that says 600 K
    lukewarm = replace(record, energies=np.where(hottest, record.energies * 420.0 / 600.0, record.energies))
    result = multistate.free_energies(lukewarm)
    assert np.abs((result.value - exact_free_energies())[1:] / result.error[1:]).max() > 8.0
    late = multistate.observables(record, [300.0], np.roll(phi, 1), np.roll(psi, 1))[0]  # angles of other frames
    assert abs(deviations(late)["alpha_left"]) > 4.5


def test_the_beginning_is_discarded():
    record, phi, psi = exchange(seed=5, n=1200)
    cold = record.energies.copy()
    cold[:200] *= 0.5  # as after a minimisation
    phi = np.where(np.arange(len(phi)) < 100 * 4, LEFT[0], phi)
    started = replace(record, energies=cold)
    whole = multistate.observables(started, [400.0], phi, psi)[0]
    rest = multistate.observables(started, [400.0], phi, psi, n_discard=200)[0]
    assert max(map(abs, deviations(rest).values())) < 4.0
    for name in ("mean_energy", "alpha_left"):
        assert abs(whole[name] - exact(400.0)[name]) > 4.0 * rest[f"{name}_error"]
    assert abs(multistate.free_energies(started).value[3] - exact_free_energies()[3]) > 0.5
    weights = multistate.frame_weights(started, 400.0, n_discard=200)
    assert (weights[:400] == 0.0).all() and (weights[400:] > 0.0).all()
    assert weights.sum() == pytest.approx(1.0)


def test_ramachandran_is_weighed():
    record, phi, psi = exchange(seed=6, n=400)
    histogram = multistate.ramachandran(record, 300.0, phi, psi)
    assert histogram.shape == (64, 64) and histogram.sum() == pytest.approx(1.0)
    share = multistate.observables(record, [300.0], phi, psi)[0]["alpha_left"]
    assert histogram[32:].sum() == pytest.approx(share)  # all of phi > 0
    assert abs(histogram[32:].sum() - torsions.alpha_left(phi).mean()) > 0.01


def test_a_basin_that_nothing_is_in_has_no_free_energy():
    record, phi, psi = exchange(seed=7, n=100)
    row = multistate.observables(record, [300.0], np.full_like(phi, BETA[0]), np.full_like(psi, BETA[1]))[0]
    assert row["alpha_left"] == 0.0 and row["alpha_left_free_energy"] == math.inf
    assert math.isnan(row["alpha_left_free_energy_error"])
    assert row["beta"] == pytest.approx(1.0) and row["beta_free_energy"] == pytest.approx(0.0)


def test_samples_made_once_are_solved_once_and_give_the_same(monkeypatch):
    record, phi, psi = exchange(seed=9, n=100)
    calls = []
    solve = Samples.solve
    monkeypatch.setattr(Samples, "solve", lambda *arguments: calls.append(1) or solve(*arguments))
    settings = {"n_discard": 20, "n_blocks": 5}
    samples = Samples.of(record, **settings)

    def everything(free, rest):
        weights = multistate.frame_weights(record, 400.0, **rest)
        picture = multistate.ramachandran(record, 400.0, phi, psi, **rest)
        rows = multistate.observables(record, [300.0, 400.0], phi, psi, **free)
        return multistate.free_energies(record, **free), weights, picture, rows

    once = everything({"samples": samples}, {"samples": samples})
    assert len(calls) == 6
    anew = everything(settings, {"n_discard": 20})
    assert len(calls) == 6 + 14
    for first, second in zip(once[0], anew[0], strict=True):
        assert np.array_equal(first, second)
    assert np.array_equal(once[1], anew[1]) and np.array_equal(once[2], anew[2]) and once[3] == anew[3]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_errors_are_calibrated_and_those_without_time_are_not():
    inside, scrambled = [], []
    for seed in range(24):
        record, phi, psi = exchange(seed=100 + seed, n=600)
        z = deviations(multistate.observables(record, [340.0], phi, psi)[0])
        f = multistate.free_energies(record)
        off = (f.value - exact_free_energies())[3]
        inside.append([z["mean_energy"], z["heat_capacity"], z["alpha_left"], off / f.error[3]])
        order = np.random.default_rng(seed).permutation(record.n_iterations)
        mixed = replace(record, levels=record.levels[order], energies=record.energies[order])
        scrambled.append(off / multistate.free_energies(mixed).error[3])
    rms = np.sqrt(np.mean(np.square(inside), axis=0))
    # Student's t of 20 blocks that are a little short: 1.1 (1.09 to 1.13 in 120 records); 24 records scatter by 0.16
    assert (np.abs(rms - 1.1) < 0.5).all(), rms
    assert np.sqrt(np.mean(np.square(scrambled))) > 1.6  # twice the error is expected


@pytest.mark.parametrize(("iterations", "known"), [((99,), False), ((96, 97, 99), False), ((50, 99), True)])
def test_frames_in_one_block_have_shares_without_errors(iterations, known):
    record, phi, psi = exchange(seed=10, n=100, store_every=1)
    rows = [4 * i + r for i in iterations for r in range(4)]
    record = replace(record, positions=record.positions[list(iterations)], position_iterations=np.array(iterations))
    row = multistate.observables(record, [400.0], phi[rows], psi[rows])[0]
    assert row["alpha_left"] + row["alpha_right"] + row["beta"] == pytest.approx(1.0)
    assert math.isfinite(row["beta_error"]) == math.isfinite(row["beta_free_energy_error"]) == known
    assert row["mean_energy_error"] > 0.0


def test_statistical_inefficiency_of_a_known_process():
    rng = np.random.default_rng(0)
    for a in (0.5, 0.9):
        series = memory(rng, 20_000, (4,), a)
        assert multistate.statistical_inefficiency(series) == pytest.approx((1 + a) / (1 - a), rel=0.1)
    assert multistate.statistical_inefficiency(rng.standard_normal(20_000)) < 1.1
    assert multistate.statistical_inefficiency(np.ones(10)) == 1.0


# --- exchanges --------------------------------------------------------------------------------------------------------


def walk(levels: list[list[int]]) -> ExchangeRecord:
    """A record of which only the levels (replicas, iterations) matter."""
    record, _, _ = exchange(seed=0, n=len(levels[0]), store_every=1)
    levels = np.array(levels).T
    return replace(
        record,
        levels=levels,
        energies=np.zeros(levels.shape),
        positions=np.zeros((0, levels.shape[1], 1, 3)),
        position_iterations=np.zeros(0, dtype=int),
    )


def test_round_trips_go_up_and_down_again():
    record = walk(
        [
            [0, 1, 2, 3, 2, 1, 0, 0, 3, 0],  # twice, without stopping in the second
            [3, 2, 1, 0, 1, 2, 3, 2, 1, 1],  # down and up, never up and down
            [0, 1, 2, 1, 0, 1, 2, 1, 0, 0],  # never at the top
            [3, 3, 0, 1, 3, 2, 0, 0, 1, 3],  # once, after the way down
            [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        ]
    )
    assert multistate.round_trips(record).tolist() == [2, 0, 0, 1, 0]


def test_round_trips_are_counted_as_the_levels_come_in():
    levels = np.random.default_rng(3).integers(3, size=(200, 7))
    whole, parts = RoundTrips(3, 7), RoundTrips(3, 7)
    whole.follow(levels)
    seen = 0
    for begin, end in ((0, 1), (1, 2), (2, 2), (2, 90), (90, 91), (91, 200)):
        parts.follow(levels[begin:end])
        assert (parts.counts >= seen).all()
        seen = parts.counts
    assert np.array_equal(parts.counts, whole.counts) and whole.counts.min() > 10
    one = RoundTrips(1, 2)  # the bottom is the top
    one.follow(np.zeros((9, 2), dtype=int))
    assert one.counts.tolist() == [0, 0]


def test_replica_paths_are_levels_of_some_replicas():
    record = walk([[replica % 4] * 3 for replica in range(20)])
    assert multistate.replica_paths(record, 2).tolist() == [[0, 3]] * 3
    assert multistate.replica_paths(record, 100).shape == (3, 20)


def test_swap_acceptance():
    record, _, _ = exchange(seed=0, n=40)
    proposed, accepted = np.diag([4] * 4), np.diag([4] * 4)
    proposed[0, 1] = proposed[1, 0] = 8
    accepted[0, 1] = accepted[1, 0] = 2
    share = multistate.swap_acceptance(replace(record, swap_proposed=proposed, swap_accepted=accepted))
    assert share[0, 1] == share[1, 0] == 0.25
    assert np.isnan(share).sum() == 14  # an exchange with itself says nothing


# --- bad input --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_answered_is_refused():
    record, phi, psi = exchange(seed=8, n=40)
    with pytest.raises(ValueError, match="299 K is not between the temperatures of the exchange, 300 and 600 K"):
        multistate.observables(record, [299.0], phi, psi)
    with pytest.raises(ValueError, match="79 values of phi and 80 of psi for 80 stored frames"):
        multistate.observables(record, [300.0], phi[1:], psi)
    with pytest.raises(ValueError, match="79 values of phi and 80 of psi for 80 stored frames"):
        multistate.ramachandran(record, 300.0, phi[1:], psi)
    with pytest.raises(ValueError, match="40 iterations without the first 30 do not make 20 blocks"):
        multistate.free_energies(record, n_discard=30)
    with pytest.raises(ValueError, match="none of the 20 stored frames is left"):
        multistate.frame_weights(record, 300.0, n_discard=39)
    with pytest.raises(ValueError, match="none of the 20 stored frames is left"):
        multistate.observables(record, [300.0], phi, psi, n_discard=39, n_blocks=1)
    broken = record.energies.copy()
    broken[7, 2] = math.inf
    with pytest.raises(ValueError, match=r"1 of 160 energies are not finite \(first: iteration 7\)"):
        multistate.free_energies(replace(record, energies=broken))


def test_pymbar_is_silent():
    code = """
import sys
sys.path.insert(0, "tests")
from test_multistate import exchange, multistate
assert "pymbar" not in sys.modules
multistate.free_energies(exchange(0, n=40)[0])
assert "pymbar" in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
