"""Ensembles: weights and ln Z against closed forms, counting of rejections, files."""

import math
from dataclasses import FrozenInstanceError, replace

import mdtraj
import numpy as np
import pytest
import torch
from openmm import app, unit

from openmm_tsf.ensemble import Ensemble, draw, out_of_reach, to_mdtraj
from openmm_tsf.units import kT

SPRING = 1000.0  # kJ/mol/nm^2


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def harmonic(positions: torch.Tensor) -> torch.Tensor:
    return 0.5 * SPRING * positions.square().sum((1, 2))


class HalfSpaceFlow:
    """Two particles, normal with `width` times the thermal spread of `harmonic`; valid where the first x > 0."""

    training_temperature = 600.0

    def __init__(self, width: float = 1.1, log_factor: float = 0.0, everything_valid: bool = False):
        self.width, self.log_factor, self.everything_valid = width, log_factor, everything_valid

    def at(self, temperature):
        steered = HalfSpaceFlow(self.width, self.log_factor, self.everything_valid)
        steered.sigma = self.width * math.sqrt(kT(temperature) / SPRING)
        return steered

    def propose(self, n, *, generator):
        z = torch.randn(n, 2, 3, generator=generator, dtype=torch.float64)
        log_prob = -0.5 * z.square().sum((1, 2)) - 3 * math.log(2 * math.pi * self.sigma**2)
        valid = torch.ones(n, dtype=torch.bool) if self.everything_valid else z[:, 0, 0] > 0
        return self.sigma * z, log_prob, valid

    def log_constraint_factor(self, positions):
        return torch.full((len(positions),), self.log_factor, dtype=positions.dtype)


class PatternFlow(HalfSpaceFlow):
    """Draw number i is valid where i % 3 == 2; its position says i."""

    def at(self, temperature):
        self.drawn = 0
        return self

    def propose(self, n, *, generator):
        index = torch.arange(self.drawn, self.drawn + n, dtype=torch.float64)
        self.drawn += n
        return index[:, None, None].expand(n, 2, 3), torch.zeros(n), index % 3 == 2


def exact_log_z(temperature: float) -> float:
    """ln of the integral of exp(-U/kT) over the half-space."""
    return 3 * math.log(2 * math.pi * kT(temperature) / SPRING) - math.log(2)


def small(n: int = 4, **changes) -> Ensemble:
    values = {
        "positions": torch.arange(n * 6, dtype=torch.float64).reshape(n, 2, 3) / 100,
        "energy": torch.linspace(1.0, 2.0, n),
        "log_prob": torch.linspace(0.0, 1.0, n),
        "temperature": 300.0,
    }
    return Ensemble(**(values | changes))


def diatomic() -> app.Topology:
    topology = app.Topology()
    residue = topology.addResidue("N2", topology.addChain())
    for name in ("N1", "N2"):
        topology.addAtom(name, app.element.nitrogen, residue)
    return topology


@pytest.mark.parametrize("at", [None, 450.0])
def test_log_z_of_a_harmonic_half_space(at):
    ensemble = draw(HalfSpaceFlow(), harmonic, temperature=300.0, n=20_000, generator=generator(1), at=at)
    assert len(ensemble) == 20_000
    assert abs(ensemble.log_z - exact_log_z(300.0)) < 4 * ensemble.log_z_error
    without_rejections = math.log(float(torch.exp(ensemble.log_weights).mean()))
    assert abs(without_rejections - exact_log_z(300.0)) > 20 * ensemble.log_z_error  # the control: off by ln 2
    assert ensemble.sampling_temperature == (at or 300.0)


def test_error_of_log_z_is_what_repetition_shows():
    log_z, errors = [], []
    for seed in range(80):
        ensemble = draw(HalfSpaceFlow(), harmonic, temperature=300.0, n=500, generator=generator(seed))
        log_z.append(ensemble.log_z)
        errors.append(ensemble.log_z_error)
    assert float(np.mean(errors)) == pytest.approx(float(np.std(log_z)), rel=4 / math.sqrt(160))


def test_reweighting_is_drawing_there_with_other_weights():
    ensemble = draw(HalfSpaceFlow(1.2), harmonic, temperature=400.0, n=20_000, generator=generator(2))
    other = ensemble.reweighted(300.0 * unit.kelvin)
    assert (other.temperature, other.sampling_temperature) == (300.0, 400.0)
    assert torch.equal(other.positions, ensemble.positions)
    assert abs(other.log_z - exact_log_z(300.0)) < 4 * other.log_z_error
    mean, error = other.mean(other.energy)
    assert abs(float(mean) - 3 * kT(300.0)) < 4 * float(error)  # equipartition, six coordinates
    assert abs(float(ensemble.mean(ensemble.energy).value) - 3 * kT(300.0)) > 4 * float(error)


def test_matched_flow_has_equal_weights_and_only_rejections_cost():
    ensemble = draw(HalfSpaceFlow(1.0), harmonic, temperature=300.0, n=1000, generator=generator(3))
    assert ensemble.ess == pytest.approx(1000 / (1000 + ensemble.n_rejected), rel=1e-9)
    assert ensemble.n_effective == pytest.approx(1000)
    assert ensemble.largest_weight_share == pytest.approx(1e-3, rel=1e-9)


def test_constraint_factor_enters_the_weights():
    plain, factor = (
        draw(HalfSpaceFlow(1.1, c), harmonic, temperature=300.0, n=100, generator=generator(4)) for c in (0.0, 0.25)
    )
    assert torch.allclose(factor.log_weights, plain.log_weights + 0.25)


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_draws_beyond_the_last_one_wanted_are_not_counted(chunk):
    calls = []
    ensemble = draw(
        PatternFlow(),
        lambda x: x[:, 0, 0],
        temperature=300.0,
        n=5,
        generator=generator(),
        chunk=chunk,
        progress=lambda *args: calls.append(args),
    )
    assert ensemble.energy.tolist() == [2, 5, 8, 11, 14]
    assert ensemble.n_rejected == 10
    assert calls[-1] == (5, 5, "10 rejected")


def test_hopeless_flow_gives_up():
    class Hopeless(PatternFlow):
        def propose(self, n, *, generator):
            x, log_prob, valid = super().propose(n, generator=generator)
            return x, log_prob, valid & False

    with pytest.raises(RuntimeError, match=r"only 0 of \d+ draws at 300 K lie on the flow's chart"):
        draw(Hopeless(), harmonic, temperature=300.0, n=10, generator=generator())


def test_unreachable_temperature_warns():
    flow = HalfSpaceFlow(1.0, everything_valid=True)
    with pytest.warns(UserWarning, match=r"^30 K is out of reach .*trained at 600 K.*run at 600 K: ESS [\d.]+ %"):
        draw(flow, harmonic, temperature=30.0, at=600.0, n=2000, generator=generator(5))
    assert out_of_reach(draw(flow, harmonic, temperature=300.0, n=2000, generator=generator(5))) is None


def test_where_the_flow_was_trained_no_nearer_temperature_is_advised():
    flow = HalfSpaceFlow(1.0, everything_valid=True)
    cold = draw(flow, harmonic, temperature=300.0, n=2000, generator=generator(5)).reweighted(30.0)
    assert "nearer to the training temperature or train longer" in out_of_reach(cold, 600.0)
    at_home = replace(cold, sampling_temperature=30.0)
    assert out_of_reach(at_home, 30.0).endswith("; train longer")


@pytest.mark.parametrize(
    ("n", "heaviest", "said"), [(4, 0.9, False), (100, 0.09, False), (100, 0.5, True), (100, 0.2, True)]
)
def test_few_draws_of_which_one_has_most_of_the_weight_are_out_of_reach(n, heaviest, said):
    """Their ESS cannot be below 1/n, which looks like more than it is."""
    log_prob = torch.zeros(n)
    log_prob[0] = -math.log(heaviest * (n - 1) / (1.0 - heaviest))
    ensemble = Ensemble(torch.zeros(n, 1, 3), torch.zeros(n), log_prob, 300.0)
    assert ensemble.largest_weight_share == pytest.approx(heaviest)
    assert (out_of_reach(ensemble, 600.0) is not None) is said


def test_infinite_energy_is_a_zero_weight_and_nan_an_error():
    ensemble = small(energy=torch.tensor([1.0, math.inf, 1.0, 1.0]), log_prob=torch.zeros(4))
    assert ensemble.ess == pytest.approx(0.75)
    assert float(ensemble.mean(ensemble.energy).value) == 1.0
    assert not (ensemble.resampled(50, generator=generator()) == ensemble.positions[1]).all((1, 2)).any()
    with pytest.raises(ValueError, match=r"1 of 4 values of energy are NaN or -inf \(first: row 2\)"):
        small(energy=torch.tensor([1.0, 1.0, math.nan, 1.0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": torch.zeros(4, 6)}, r"positions must have shape \(draws, atoms, 3\)"),
        ({"energy": torch.zeros(3)}, r"energy must have shape \(4,\) .* not \(3,\)"),
        ({"log_prob": torch.zeros(4, 1)}, r"log_prob must have shape \(4,\)"),
        ({"log_prob": torch.full((4,), -math.inf)}, "4 of 4 values of log_prob are not finite"),
        ({"log_factor": torch.zeros(5)}, "log_factor must have shape"),
        ({"temperature": 0.0}, "above 0 K"),
        ({"sampling_temperature": -3.0}, "above 0 K"),
        ({"n_rejected": -1}, "n_rejected cannot be negative"),
    ],
)
def test_malformed_ensembles_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_ensembles_are_frozen_and_say_what_they_are():
    ensemble = small(n_rejected=1, sampling_temperature=450.0)
    with pytest.raises(FrozenInstanceError):
        ensemble.temperature = 400.0
    assert repr(ensemble).startswith("Ensemble(4 draws of 2 atoms, 300 K, drawn at 450 K, 1 rejected, ESS ")


def test_resampled_draws_have_the_weighted_mean():
    ensemble = draw(HalfSpaceFlow(1.2), harmonic, temperature=300.0, n=20_000, generator=generator(6))
    again = ensemble.resampled(generator=generator(7))
    assert again.shape == ensemble.positions.shape
    # systematic resampling adds less noise than independent draws, which would add std/sqrt(n)
    error = float(ensemble.energy.std()) / math.sqrt(20_000)
    assert abs(float(harmonic(again).mean()) - float(ensemble.mean(ensemble.energy).value)) < 4 * error
    assert ensemble.resampled(17, generator=generator(7)).shape == (17, 2, 3)


def test_mdtraj_export_takes_any_topology():
    ensemble, topology = small(), diatomic()
    for given in (topology, mdtraj.Topology.from_openmm(topology)):
        trajectory = ensemble.to_mdtraj(given)
        assert np.allclose(trajectory.xyz, ensemble.positions.numpy(), atol=1e-7)
    with pytest.raises(ValueError, match="positions have 3 atoms, the topology 2"):
        to_mdtraj(torch.zeros(1, 3, 3), topology)


def test_file_round_trip(tmp_path):
    path = tmp_path / "ensemble.npz"
    ensemble = small(n_rejected=3, sampling_temperature=450.0, log_factor=torch.full((4,), 0.1))
    ensemble.save(path)
    again = Ensemble.load(path)
    assert torch.equal(again.positions, ensemble.positions.float())
    for name in ("energy", "log_prob", "log_factor", "log_weights"):
        assert torch.equal(getattr(again, name), getattr(ensemble, name))
    assert (again.temperature, again.sampling_temperature, again.n_rejected) == (300.0, 450.0, 3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["ensemble.npz"]
    with np.load(path) as file:
        assert set(file.files) >= {"positions", "energy", "log_prob", "log_weight", "temperature", "n_rejected"}
        assert file["positions"].dtype == np.float32


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, kept):
    path = tmp_path / "ensemble.npz"
    small(200).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"ensemble.npz is not an ensemble file, or it is cut short or damaged$"):
        Ensemble.load(path)


def test_altered_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "ensemble.npz"
    small(200).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        Ensemble.load(path)
    np.savez(path, something=np.zeros(3))
    with pytest.raises(ValueError, match="is not an ensemble file: it has no energy, explore, format"):
        Ensemble.load(path)
    path.write_text("hello")
    with pytest.raises(ValueError, match="is not an ensemble file"):
        Ensemble.load(path)
    np.savez(path, x=np.array([{}], dtype=object))  # a pickle inside must not be opened
    with pytest.raises(ValueError, match="is not an ensemble file"):
        Ensemble.load(path)


def test_contradicting_file_is_refused(tmp_path):
    path = tmp_path / "ensemble.npz"
    small().save(path)
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **(arrays | {"energy": arrays["energy"] + 1}))
    with pytest.raises(ValueError, match="contradicts itself"):
        Ensemble.load(path)
    np.savez(path, **(arrays | {"format": np.array("openmm-tsf ensemble 9")}))
    with pytest.raises(ValueError, match="has format 'openmm-tsf ensemble 9'"):
        Ensemble.load(path)
    np.savez(path, **(arrays | {"energy": arrays["energy"][:2]}))
    with pytest.raises(ValueError, match="is not a valid ensemble: energy must have shape"):
        Ensemble.load(path)


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "ensemble.npz"
    small().save(path)
    before = path.read_bytes()

    def full(*args, **arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        small(9).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["ensemble.npz"]
