"""Torsions against mdtraj, histograms and distances against closed forms, observables against equipartition."""

import json
import math

import mdtraj
import numpy as np
import pytest
import torch
from poses import posed_ensemble

from openmm_tsf import analysis, reference, torsions
from openmm_tsf.ensemble import Ensemble
from openmm_tsf.units import BOLTZMANN, kT
from openmm_tsf.weights import Estimate

FLAT = np.full((64, 64), 1 / 4096)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def frames(ala2) -> np.ndarray:
    """Shaken copies of alanine dipeptide, (50, 22, 3) nm."""
    return ala2.positions + 0.05 * rng(1).standard_normal((50, 22, 3))


def harmonic_ensemble(n: int, temperature: float, seed: int = 0, **changes) -> Ensemble:
    """Ten free oscillators at `temperature`, exact draws of a density a little too wide; ln q is exact."""
    width = 1.05
    z = torch.randn(n, 10, generator=torch.Generator().manual_seed(seed))
    energy = 0.5 * kT(temperature) * (width * z).square().sum(1)
    log_prob = -0.5 * z.square().sum(1)
    values = {"positions": torch.zeros(n, 1, 3), "energy": energy, "log_prob": log_prob, "temperature": temperature}
    return Ensemble(**(values | changes))


def test_backbone_and_dihedrals_agree_with_mdtraj(ala2, frames):
    trajectory = mdtraj.Trajectory(frames, ala2.mdtraj_topology)
    phi, psi = analysis.phi_psi(frames, ala2)
    assert np.abs(phi - mdtraj.compute_phi(trajectory, opt=False)[1][:, 0]).max() < 1e-5
    assert np.abs(psi - mdtraj.compute_psi(trajectory, opt=False)[1][:, 0]).max() < 1e-5
    assert (
        analysis.backbone(ala2.topology) == analysis.backbone(ala2.mdtraj_topology) == ((4, 6, 8, 14), (6, 8, 14, 16))
    )
    mirrored = analysis.phi_psi(frames * np.array([1, 1, -1]), ala2)
    assert np.allclose(mirrored[0], -phi)


def test_backbone_says_what_is_missing(ala2):
    with pytest.raises(ValueError, match="has 1 residues with both phi and psi; asked for number 1"):
        analysis.backbone(ala2, residue=1)


def test_basins_and_alpha_left():
    phi = np.radians([60.0, 137.0, 138.0, -60.0, -60.0, -150.0, 60.0])
    psi = np.radians([40.0, 0.0, 0.0, -40.0, 60.0, 170.0, 170.0])
    names = [torsions.BASINS[index] for index in analysis.basins(phi, psi)]
    assert names == ["alpha_L", "alpha_L", "alpha_R", "alpha_R", "beta", "beta", "alpha_L"]
    assert analysis.alpha_left(phi).tolist() == [True, True, False, False, False, False, True]


def test_transitions_are_counted_core_to_core_and_walker_by_walker():
    left, right, between = 1.0, -1.5, 0.2
    assert analysis.count_transitions(np.array([right, between, right, between, left, between, left, right])) == 2
    # two walkers, each staying where it is, interleaved in time: no transitions, unless they are mixed up
    interleaved = np.array([left, right] * 5)
    assert analysis.count_transitions(interleaved, n_walkers=2) == 0
    assert analysis.count_transitions(interleaved) == 9


def test_histogram_cells_are_right_closed_and_periodic():
    edge = np.array([-math.pi, math.pi, -math.pi + 2 * math.pi / 64 - 1e-9, 0.0])
    histogram = analysis.ramachandran_histogram(edge, np.full(4, math.pi))
    assert histogram.shape == (64, 64)
    assert histogram[63, 63] == 0.5  # -pi and pi are one angle
    assert histogram[0, 63] == histogram[31, 63] == 0.25
    weighted = analysis.ramachandran_histogram(edge, np.zeros(4), torch.tensor([0.0, 0.0, 3.0, 1.0]))
    assert weighted[0, 31] == 0.75


def test_distances_have_their_closed_forms():
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.25, 0.5])
    assert analysis.total_variation(p, q) == pytest.approx(0.5)
    assert analysis.kl_divergence(p, q) == pytest.approx(math.log(2), abs=1e-8)
    assert analysis.kl_divergence(q, p) == pytest.approx(0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-10), rel=1e-6)
    assert analysis.kl_divergence(p, 7 * p) == pytest.approx(0.0, abs=1e-12)


def test_noise_of_exact_samples_matches_gaussian_theory():
    # each cell differs by a normal of variance p (1/n + 1/m), so TV = sum sqrt(2/pi * variance) / 2
    n, m = 100_000, 50_000
    expected = 0.5 * math.sqrt(2 / math.pi * (1 / n + 1 / m)) * np.sqrt(FLAT).sum()
    assert analysis.expected_total_variation(FLAT, n, m, seed=3) == pytest.approx(expected, rel=0.01)


def test_excess_total_variation_is_zero_for_the_right_model_only():
    exact, sample = rng(4).multinomial(200_000, FLAT.ravel()), rng(5).multinomial(100_000, FLAT.ravel())
    spread = np.std([analysis.total_variation(rng(s).multinomial(100_000, FLAT.ravel()), exact) for s in range(20)])
    assert abs(analysis.excess_total_variation(exact, sample, 200_000, 100_000)) < 5 * spread
    wrong = FLAT.copy()
    wrong[:32] *= 1.3
    sample = rng(5).multinomial(100_000, (wrong / wrong.sum()).ravel())
    assert analysis.excess_total_variation(exact, sample, 200_000, 100_000) > 5 * spread


def test_free_energy_of_a_share():
    value, error = analysis.free_energy(Estimate(torch.tensor(0.01), torch.tensor(0.001)))
    assert (float(value), float(error)) == pytest.approx((math.log(100), 0.1))


def test_observables_of_oscillators_follow_equipartition():
    ensemble = harmonic_ensemble(50_000, 400.0)
    phi = rng(6).uniform(-math.pi, math.pi, 50_000)  # independent of the energy: the share is the same at every T
    rows = analysis.observables_against_temperature(ensemble, [350.0, 400.0, 450.0], phi)
    assert [row["temperature"] for row in rows] == [350.0, 400.0, 450.0]
    for row in rows:
        temperature, share = row["temperature"], 2.4 / (2 * math.pi)
        assert abs(row["mean_energy"] - 5 * kT(temperature)) < 4 * row["mean_energy_error"]
        assert abs(row["heat_capacity"] - 5 * BOLTZMANN) < 4 * row["heat_capacity_error"]
        assert abs(row["alpha_left"] - share) < 4 * row["alpha_left_error"]
        assert row["alpha_left_free_energy_kt"] == pytest.approx(-math.log(row["alpha_left"]))
        assert row["alpha_left_free_energy"] == pytest.approx(kT(temperature) * row["alpha_left_free_energy_kt"])
        assert row["heat_capacity_error"] < 0.1 * row["heat_capacity"]
        assert row["ess"] == ensemble.reweighted(temperature).ess
    # the control: the errors are small enough to tell neighbouring temperatures apart
    assert rows[1]["mean_energy"] - rows[0]["mean_energy"] > 10 * rows[0]["mean_energy_error"]


def test_observables_ignore_weightless_draws():
    ensemble = harmonic_ensemble(2000, 400.0)
    phi = rng(7).uniform(-math.pi, math.pi, 2000)
    energy = ensemble.energy.clone()
    energy[:10] = torch.tensor([math.inf, 1e12] * 5)
    with_bad = Ensemble(ensemble.positions, energy, ensemble.log_prob, 400.0)
    without = Ensemble(*(column[10:] for column in (ensemble.positions, ensemble.energy, ensemble.log_prob)), 400.0)
    bad = analysis.observables_against_temperature(with_bad, [300.0], phi, n_replicates=20)[0]
    good = analysis.observables_against_temperature(without, [300.0], phi[10:], n_replicates=20)[0]
    for name in ("mean_energy", "heat_capacity", "alpha_left"):
        assert bad[name] == pytest.approx(good[name], rel=1e-9)
    assert math.isfinite(bad["heat_capacity_error"])


class PosedFlow:
    """A flow that draws poses of alanine dipeptide, and at 400 K only a handful that carry weight."""

    def __init__(self, molecule):
        self.molecule = molecule

    def at(self, temperature):
        self.temperature = temperature
        return self

    def propose(self, n, *, generator):
        ensemble = posed_ensemble(self.molecule, n, self.temperature, seed=int(self.temperature), left=0.2)
        self.energies = ensemble.energy
        wild = torch.linspace(0, 200, n) if self.temperature == 400.0 else 0.0
        return ensemble.positions, ensemble.log_prob + wild, torch.ones(n, dtype=torch.bool)

    def log_constraint_factor(self, positions):
        return torch.zeros(len(positions))


def test_flow_observables_draw_at_each_temperature(ala2):
    flow = PosedFlow(ala2)
    generator = torch.Generator().manual_seed(1)
    rows = analysis.flow_observables(
        flow, lambda x: flow.energies[: len(x)], [300.0, 400.0], n=1000, generator=generator
    )
    assert [row["temperature"] for row in rows] == [300.0, 400.0]
    assert abs(rows[0]["alpha_left"] - 0.2) < 4 * rows[0]["alpha_left_error"]
    assert rows[0]["ess"] > 0.5
    assert rows[1]["ess"] < 0.02  # in the row instead of a warning


def state(**changes) -> reference.ReferenceState:
    values = dict.fromkeys(reference.ReferenceState._fields, 1.0) | {"temperature": 300.0, "ramachandran": FLAT}
    return reference.ReferenceState(**(values | {"n_effective": 1e5} | changes))


def molecular_ensemble(ala2, n: int = 3000) -> Ensemble:
    positions = torch.as_tensor(ala2.positions + 0.01 * rng(8).standard_normal((n, 22, 3)))
    energy = torch.as_tensor(kT(300.0) * rng(9).standard_normal(n))
    return Ensemble(positions, energy, torch.zeros(n), 300.0, n_rejected=5)


def test_metrics_are_flat_complete_and_json_safe(ala2):
    target = molecular_ensemble(ala2)
    train = target.reweighted(600.0)
    exact = state(alpha_left=0.5, alpha_left_error=0.01)
    figures = analysis.metrics(train, target, ala2, reference=reference.Reference((exact,), {}))
    wanted = ["ess_train", "ess_target", "ramachandran_kl", "ramachandran_excess_tv", "alpha_left_target"]
    wanted += ["alpha_left_target_error", "alpha_left_target_raw", "n_rejected_target", "log_z_target_nat"]
    assert set(wanted) <= set(figures)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert figures["ess_target"] == target.ess
    assert figures["ess_train"] == train.ess
    assert figures["ramachandran_tv"] > 0.9  # nothing like a flat map
    assert figures["alpha_left_target_deviation"] == pytest.approx(-50, rel=0.01)  # none of it is in alpha_L
    assert figures["alpha_left_target_free_energy_kt"] is None  # -ln 0
    assert (figures["temperature_train_kelvin"], figures["n_rejected_target"]) == (600.0, 5)


def test_metrics_without_reference_or_backbone(ala2):
    target = molecular_ensemble(ala2, 200)
    names = set(analysis.metrics(target, target, ala2))
    for figures in (
        analysis.metrics(target, target, ala2, reference=reference.Reference((state(temperature=500.0),), {})),
        analysis.metrics(target, target, mdtraj.Topology()),
    ):
        assert set(figures) == names
        assert figures["ramachandran_kl"] is None
        assert figures["ess_target"] == target.ess
    assert figures["alpha_left_target"] is None


def written_reference(path, **changes):
    n = 2
    arrays = {name: np.arange(1.0, n + 1) for name in reference.PER_TEMPERATURE}
    arrays |= {"ramachandran": np.stack([FLAT, FLAT]), "energy_edges": np.zeros((n, 11))}
    arrays |= {"energy_histogram": np.zeros((n, 10)), "temperatures": np.array([300.0, 600.0])}
    arrays |= {"metadata": json.dumps({"nanoseconds": 1.5})} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


def test_reference_is_read_and_looked_up_by_temperature(tmp_path):
    read = reference.load_reference(written_reference(tmp_path / "r.npz"))
    assert read.temperatures.tolist() == [300.0, 600.0]
    assert read.at(600.2).alpha_left == 2.0
    assert read.at(450.0) is None
    assert read.metadata["nanoseconds"] == 1.5


def test_bad_references_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no reference 'ala3'; the package has ala2"):
        reference.load_reference("ala3")
    with pytest.raises(ValueError, match="is not a reference file: it has no n_effective"):
        reference.load_reference(written_reference(tmp_path / "r.npz", n_effective=None))


@pytest.mark.skipif(not (reference.FOLDER / reference.FILES["ala2"]).is_file(), reason="no reference file yet")
def test_shipped_reference_is_sound(ala2):
    shipped = analysis.reference_for(ala2)
    cold = shipped.at(300.0)
    assert cold.alpha_left == pytest.approx(0.0026, abs=0.0006)  # 0.26 +- 0.02 % in independent dynamics
    for row in shipped.states:
        assert row.ramachandran.shape == (64, 64)
        assert row.ramachandran.sum() == pytest.approx(1.0, abs=1e-5)
        # alpha_L straddles cells, so the histogram can only bound its share
        angle = -np.pi + 2 * np.pi * np.arange(65) / 64
        inside = (angle[:-1] >= 0) & (angle[1:] <= 2.4)
        overlapping = (angle[1:] > 1e-9) & (angle[:-1] < 2.4)
        assert row.ramachandran[inside].sum() - 1e-5 <= row.alpha_left <= row.ramachandran[overlapping].sum() + 1e-5
    energies = [row.mean_energy for row in shipped.states]
    assert all(np.diff(energies) > 0)
    assert analysis.reference_for(type(ala2)(ala2.system, ala2.topology, ala2.positions, "other")) is None
