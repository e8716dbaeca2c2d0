"""From raw frames of `reference.py` to the shipped reference: MBAR weights, block bootstrap, histograms.

Every frame was sampled with the bias V; the mixture of all sampled states is its density, so a frame's weight at a
temperature is exp(-U/kT) / sum_k N_k exp(f_k - beta_k (U + V)), with f_k from MBAR (Shirts and Chodera 2008).
Errors: walkers are dealt into blocks, blocks are drawn with replacement, and everything, f_k included, is computed
again, from every twentieth time: what is slow enough to make the errors does not move in 0.8 ps.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp

from openmm_tsf.units import BOLTZMANN

TARGETS = np.array([300.0, 350.0, 400.0, 424.0, 450.0, 500.0, 550.0, 600.0])
N_BINS, N_ENERGY_BINS, N_BLOCKS, N_REPLICATES, THIN, SEED = 64, 100, 64, 100, 20, 2026
BASINS = {
    "alpha_left": "0 < phi < 2.4 rad",
    "alpha_right": "not alpha_left, and -120 < psi < 50 degrees",
    "beta": "everything else",
}


class Raw(NamedTuple):
    """Flat frames, time-major; `shape` is (times, walkers), energies in kJ/mol, angles in rad."""

    phi: np.ndarray
    psi: np.ndarray
    energy: np.ndarray
    bias: np.ndarray
    state: np.ndarray
    keep: np.ndarray
    shape: tuple[int, int]
    swaps: np.ndarray


class Figures(NamedTuple):
    """What is reported, one row per target temperature; `variance` in (kJ/mol)^2, histograms sum to 1."""

    alpha_left: np.ndarray
    phi_positive: np.ndarray
    mean_energy: np.ndarray
    energy_variance: np.ndarray
    basin_share: np.ndarray
    ramachandran: np.ndarray
    energy_histogram: np.ndarray
    kish: np.ndarray


def load(out: Path) -> Raw:
    """Read every whole chunk but the first of each part, which is equilibration in the fixed bias.

    Raises:
        ValueError: there are fewer than two chunks.
    """
    paths = [path for path in sorted(out.glob("chunk_*.npz")) if not path.stem.endswith("_00000")]
    if not paths:
        raise ValueError(f"{out} holds fewer than two chunks; run longer")
    chunks = [dict(np.load(path)) for path in paths]
    names = ("phi", "psi", "omega_1", "omega_2", "energy", "bias", "state", "same_isomer")
    columns = {key: np.concatenate([chunk[key] for chunk in chunks]) for key in names}
    shape = columns["phi"].shape
    keep = columns["same_isomer"].copy()
    for name in ("omega_1", "omega_2"):
        keep &= np.abs(columns[name]) > np.pi / 2.0
    flat = {key: columns[key].ravel() for key in ("phi", "psi", "energy", "bias", "state")}
    swaps = np.sum([chunk["swaps"] for chunk in chunks], axis=0)
    flat["state"] = flat["state"].astype(np.int64)
    return Raw(**flat, keep=keep.ravel(), shape=shape, swaps=swaps)


def every(raw: Raw, n: int) -> Raw:
    """Every n-th time of the frames."""
    times, walkers = raw.shape
    flat = {
        name: column.reshape(times, walkers)[::n].ravel()
        for name, column in raw._asdict().items()
        if name not in ("shape", "swaps")
    }
    return raw._replace(**flat, shape=(len(range(0, times, n)), walkers))


def solve(reduced: np.ndarray, counts: np.ndarray, start: np.ndarray | None) -> np.ndarray:
    """MBAR's f_k from reduced potentials (states, frames) and frames per state."""
    import pymbar

    return pymbar.MBAR(reduced, counts, initial_f_k=start).f_k


class Analysis:
    """Weights and figures of any multiset of blocks of walkers.

    Args:
        raw: the frames.
        temperatures: those sampled [K].
        n_blocks: that the walkers are dealt into.
        start: of some of the frames; its f_k and energy bins are kept.
    """

    def __init__(self, raw: Raw, temperatures: np.ndarray, n_blocks: int, start: Analysis | None = None) -> None:
        self.raw, self.n_blocks, self.n_states = raw, n_blocks, len(temperatures)
        walkers = np.tile(np.arange(raw.shape[1]), raw.shape[0])
        self.block = np.where(raw.keep, walkers % n_blocks, -1)
        beta = 1.0 / (BOLTZMANN * np.asarray(temperatures))
        self.reduced = beta[:, None] * (raw.energy + raw.bias)
        self.cell = _bin(raw.phi) * N_BINS + _bin(raw.psi)
        self.alpha_left = (raw.phi > 0.0) & (raw.phi < 2.4)
        helix = ~self.alpha_left & (raw.psi > np.radians(-120.0)) & (raw.psi < np.radians(50.0))
        self.basin = np.where(self.alpha_left, 0, np.where(helix, 1, 2))
        if start is None:
            self.f = self._free_energies(np.ones(n_blocks, dtype=int), None)
            self.edges = np.stack([self._edges(temperature) for temperature in TARGETS])
        else:
            self.f, self.edges = start.f, start.edges

    def _free_energies(self, multiplicity: np.ndarray, start: np.ndarray | None) -> np.ndarray:
        rows = np.concatenate(
            [np.flatnonzero(self.block == block) for block in np.repeat(range(self.n_blocks), multiplicity)]
        )
        return solve(self.reduced[:, rows], np.bincount(self.raw.state[rows], minlength=self.n_states), start)

    def weights(self, temperature: float, multiplicity: np.ndarray, f: np.ndarray) -> np.ndarray:
        """Normalised weights (frames,) at a temperature [K]; dropped frames have zero."""
        per_frame = np.append(multiplicity, 0)[self.block]
        counts = np.bincount(self.raw.state, weights=per_frame, minlength=self.n_states)
        if getattr(self, "_mixture_of", None) is not f:
            self._mixture = logsumexp((np.log(counts) + f)[:, None] - self.reduced, axis=0)
            self._mixture_of = f
        log_weight = -self.raw.energy / (BOLTZMANN * temperature) - self._mixture
        weight = per_frame * np.exp(log_weight - log_weight[per_frame > 0].max())
        return weight / weight.sum()

    def _edges(self, temperature: float) -> np.ndarray:
        weight = self.weights(temperature, np.ones(self.n_blocks, dtype=int), self.f)
        mean = weight @ self.raw.energy
        width = np.sqrt(weight @ (self.raw.energy - mean) ** 2)
        return np.linspace(mean - 5.0 * width, mean + 7.0 * width, N_ENERGY_BINS + 1)

    def figures(self, multiplicity: np.ndarray | None = None) -> Figures:
        """All figures from blocks taken `multiplicity` times each, with f_k of their own; by default once each."""
        f = self.f if multiplicity is None else self._free_energies(multiplicity, self.f)
        multiplicity = np.ones(self.n_blocks, dtype=int) if multiplicity is None else multiplicity
        rows = []
        for temperature, edges in zip(TARGETS, self.edges, strict=True):
            weight, energy = self.weights(temperature, multiplicity, f), self.raw.energy
            mean = weight @ energy
            basins = np.bincount(self.basin, weights=weight, minlength=3)
            cells = np.bincount(self.cell, weights=weight, minlength=N_BINS**2).reshape(N_BINS, N_BINS)
            level = np.floor((energy - edges[0]) * (N_ENERGY_BINS / (edges[-1] - edges[0]))).astype(np.int64)
            inside = (level >= 0) & (level < N_ENERGY_BINS)
            levels = np.bincount(level[inside], weights=weight[inside], minlength=N_ENERGY_BINS)
            spread = weight @ (energy - mean) ** 2
            row = (basins[0], weight[self.raw.phi > 0.0].sum(), mean, spread, basins, cells, levels / levels.sum())
            rows.append((*row, 1.0 / np.sum(weight**2)))
        return Figures(*(np.array(column) for column in zip(*rows, strict=True)))

    def bootstrap(self, n_replicates: int) -> list[Figures]:
        """Figures of block resamples, seed fixed."""
        generator = np.random.default_rng(SEED)
        draws = generator.multinomial(self.n_blocks, np.full(self.n_blocks, 1.0 / self.n_blocks), size=n_replicates)
        return [self.figures(draw) for draw in draws]

    def ramachandran_errors(self, n_replicates: int) -> np.ndarray:
        """Standard errors of the Ramachandran bins (targets, bins, bins), from all frames and with f_k as they are.

        Unlike basins, neighbouring bins see motion within a fraction of a picosecond, so that thinned frames would show
        larger errors than there are.
        """
        generator = np.random.default_rng(SEED)
        draws = generator.multinomial(self.n_blocks, np.full(self.n_blocks, 1.0 / self.n_blocks), size=n_replicates)
        place = np.maximum(self.block, 0) * N_BINS**2 + self.cell
        errors = []
        for temperature in TARGETS:
            weight = self.weights(temperature, np.ones(self.n_blocks, dtype=int), self.f)
            sums = np.bincount(place, weights=weight, minlength=self.n_blocks * N_BINS**2).reshape(self.n_blocks, -1)
            shares = draws @ sums
            errors.append((shares / shares.sum(axis=1, keepdims=True)).std(axis=0, ddof=1))
        return np.array(errors).reshape(-1, N_BINS, N_BINS)


def _bin(angle: np.ndarray) -> np.ndarray:
    return np.clip(((angle + np.pi) * N_BINS / (2.0 * np.pi)).astype(int), 0, N_BINS - 1)


def autocorrelation_frames(raw: Raw) -> float:
    """Integrated autocorrelation time, in frames, of phi > 0 along a walker in the biased run (window of 6 times)."""
    signal = (raw.phi.reshape(raw.shape) > 0.0).astype(float)
    signal -= signal.mean()
    size = 2 * len(signal)
    power = np.abs(np.fft.rfft(signal, size, axis=0)) ** 2
    correlation = np.fft.irfft(power, size, axis=0)[: len(signal)].mean(axis=1)
    times = 2.0 * np.cumsum(correlation / correlation[0]) - 1.0
    return float(times[np.argmax(np.arange(len(times)) > 6.0 * times)])


def transitions(raw: Raw) -> int:
    """Passages between the cores 0.5 < phi < 2.0 and -2.8 < phi < -0.5, both ways, along the walkers."""
    total = 0
    for phi in raw.phi.reshape(raw.shape).T:
        core = np.where((phi > 0.5) & (phi < 2.0), 1, np.where((phi > -2.8) & (phi < -0.5), -1, 0))
        core = core[core != 0]
        total += int(np.count_nonzero(np.diff(core)))
    return total


def analyse(out: Path, write: Path | None, n_blocks: int = N_BLOCKS, n_replicates: int = N_REPLICATES) -> None:
    """Print the figures with errors and, where `write` is given, save them there."""
    settings = json.loads((out / "settings.json").read_text())
    raw = load(out)
    thinned = Analysis(every(raw, THIN), settings["sampled_temperatures"], n_blocks)
    analysis = Analysis(raw, settings["sampled_temperatures"], n_blocks, start=thinned)
    best, replicates = analysis.figures(), thinned.bootstrap(n_replicates)
    error = Figures(*(np.std(column, axis=0, ddof=1) for column in zip(*replicates, strict=True)))
    error = error._replace(ramachandran=analysis.ramachandran_errors(n_replicates))
    arrays = summary(analysis, best, error)
    metadata = settings | described(raw, settings, analysis) | {"n_blocks": n_blocks, "n_replicates": n_replicates}
    table(best, error, arrays)
    print(json.dumps(metadata, indent=1))
    if write is not None:
        partial = write.with_suffix(".partial.npz")
        np.savez_compressed(partial, **arrays, metadata=json.dumps(metadata))
        os.replace(partial, write)


def summary(analysis: Analysis, best: Figures, error: Figures) -> dict[str, np.ndarray]:
    """The arrays of the shipped file; energies in kJ/mol, heat capacity (potential part) in kJ/mol/K."""
    thermal = BOLTZMANN * TARGETS
    # total variation adds absolute deviations, so what makes it up are the bins' standard errors, not their variances
    spread = np.sum(error.ramachandran, axis=(1, 2))
    binomial = np.sum(np.sqrt(best.ramachandran * (1.0 - best.ramachandran)), axis=(1, 2))
    arrays = {"temperatures": TARGETS, "n_frames": np.array(analysis.raw.keep.sum())}
    for name in ("alpha_left", "phi_positive", "mean_energy", "energy_variance", "basin_share"):
        arrays |= {name: getattr(best, name), f"{name}_error": getattr(error, name)}
    arrays["heat_capacity"] = best.energy_variance / (thermal * TARGETS)
    arrays["heat_capacity_error"] = error.energy_variance / (thermal * TARGETS)
    arrays["basin_names"] = np.array(list(BASINS))
    arrays["basin_free_energy"] = -thermal[:, None] * np.log(best.basin_share)
    arrays["basin_free_energy_error"] = thermal[:, None] * error.basin_share / best.basin_share
    arrays |= {"ramachandran": best.ramachandran.astype(np.float32), "n_effective": (binomial / spread) ** 2}
    arrays |= {"n_effective_kish": best.kish, "energy_edges": analysis.edges, "energy_histogram": best.energy_histogram}
    arrays["n_effective_alpha_left"] = best.alpha_left * (1.0 - best.alpha_left) / error.alpha_left**2
    return arrays


def described(raw: Raw, settings: dict, analysis: Analysis) -> dict:
    """How the reference was made, JSON-safe."""
    import pymbar

    frame_ps = settings["frame_steps"] * settings["timestep_fs"] * 1e-3
    return {
        "molecule": "alanine dipeptide, ff96 + OBC1, no constraints (openmmtools AlanineDipeptideImplicit)",
        "method": "replica exchange with a fixed bias on (phi, psi), MBAR; errors by bootstrap over walkers",
        "n_effective_is": "(sum sqrt(p(1-p)) / sum error(p))^2 over Ramachandran bins; _kish: of the weights",
        "basins": BASINS,
        "nanoseconds": raw.phi.size * frame_ps * 1e-3,
        "frame_ps": frame_ps,
        "phi_autocorrelation_ps": autocorrelation_frames(raw) * frame_ps,
        "picoseconds_per_walker": raw.shape[0] * frame_ps,
        "n_walkers": raw.shape[1],
        "transitions": transitions(raw),
        "swap_acceptance": float(raw.swaps[0] / raw.swaps[1]),
        "n_dropped_isomer": int((~raw.keep).sum()),
        "pymbar": pymbar.__version__,
        "numpy": np.__version__,
    }


def table(best: Figures, error: Figures, arrays: dict[str, np.ndarray]) -> None:
    """Print one line per temperature."""
    print("T [K]  alpha_L [%]  phi > 0 [%]  <U> [kJ/mol]  var U  n_eff (histogram, Kish, alpha_L)")
    for k, temperature in enumerate(TARGETS):
        pairs = [(100.0 * best.alpha_left[k], 100.0 * error.alpha_left[k])]
        pairs += [(100.0 * best.phi_positive[k], 100.0 * error.phi_positive[k])]
        pairs += [(best.mean_energy[k], error.mean_energy[k]), (best.energy_variance[k], error.energy_variance[k])]
        text = "  ".join(f"{value:.4f} +- {deviation:.4f}" for value, deviation in pairs)
        sizes = [arrays[name][k] for name in ("n_effective", "n_effective_kish", "n_effective_alpha_left")]
        print(f"{temperature:5.0f}  {text}  " + " ".join(f"{size:.0f}" for size in sizes))
