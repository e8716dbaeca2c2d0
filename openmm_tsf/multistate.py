"""What a replica exchange in temperature says: acceptance, paths, MBAR free energies and observables, with errors.

Samples of all temperatures enter every estimate (MBAR); only their energies are needed, because the states differ in
temperature alone. Errors are a block jackknife over time: all replicas of a stretch of iterations are left out at once
and everything is done anew, MBAR included, so correlations in time and between replicas are in the error, as long as a
block is longer than they are.

Source: M. R. Shirts and J. D. Chodera, J. Chem. Phys. 129, 124105 (2008); H. R. Kuensch, Ann. Stat. 17, 1217 (1989).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp

from .analysis import ramachandran_histogram
from .flow_steps import STEPS
from .mbar import Samples, jackknife
from .records import ExchangeRecord, RoundTrips
from .torsions import BASINS, basins
from .units import kT, to_kelvin

N_BLOCKS = 20
COLUMNS = ("alpha_left", "alpha_right", "beta")
"""Keys of the basins in rows of `observables`, in the order of `torsions.BASINS`."""


class FreeEnergies(NamedTuple):
    """MBAR free energies of the K temperatures of a record.

    `temperatures` (K,) [K]; `value` (K,) [nat], f_k = -ln Z_k / Z_0 of the configurations, 0 for the lowest one;
    `error` (K,) [nat], standard error; `n_effective` (K,), independent samples behind each state: Kish's number of the
    MBAR weights over the statistical inefficiency; `overlap` (K, K), the MBAR overlap matrix (rows sum to 1);
    `inefficiency`, iterations per independent sample of the energy along a replica.
    """

    temperatures: np.ndarray
    value: np.ndarray
    error: np.ndarray
    n_effective: np.ndarray
    overlap: np.ndarray
    inefficiency: float


def swap_acceptance(record: ExchangeRecord) -> np.ndarray:
    """Share of accepted among proposed exchanges of two temperatures, (K, K); NaN where none, and on the diagonal."""
    share = np.full(record.swap_proposed.shape, math.nan)
    np.divide(record.swap_accepted, record.swap_proposed, out=share, where=record.swap_proposed > 0)
    np.fill_diagonal(share, math.nan)  # an exchange of a temperature with itself always succeeds and says nothing
    return share


def move_acceptance(record: ExchangeRecord) -> dict[str, np.ndarray]:
    """Share of accepted among proposed flow moves of each kind, (K,); NaN where a temperature had none.

    Kinds that were never proposed are left out, so an exchange without flow moves gives an empty mapping.
    """
    shares = {}
    for kind in STEPS:
        proposed, accepted = (
            np.array([counts.get(f"{kind}_{what}", 0) for counts in record.move_counts], dtype=np.float64)
            for what in ("proposed", "accepted")
        )
        if proposed.any():
            shares[kind] = np.divide(accepted, proposed, out=np.full(len(proposed), math.nan), where=proposed > 0)
    return shares


def replica_paths(record: ExchangeRecord, n_replicas: int = 8) -> np.ndarray:
    """Levels over time (I, n) of n replicas, or of all if there are fewer, spread evenly over the replicas."""
    chosen = np.linspace(0, record.n_replicas - 1, min(n_replicas, record.n_replicas)).round().astype(int)
    return record.levels[:, chosen]


def round_trips(record: ExchangeRecord) -> np.ndarray:
    """How often each replica went from the lowest temperature to the highest and back again, (R,) ints."""
    trips = RoundTrips(len(record.temperatures), record.n_replicas)
    trips.follow(record.levels)
    return trips.counts


def statistical_inefficiency(series: np.ndarray) -> float:
    """Samples per independent sample, 1 + 2 times the sum of the autocorrelation up to its first zero, at least 1.

    Args:
        series: (I,) or (I, R): R series of one length and one mean, whose autocorrelations are averaged.

    Source: J. D. Chodera et al., J. Chem. Theory Comput. 3, 26 (2007).
    """
    shifted = np.asarray(series, dtype=np.float64).reshape(len(series), -1)
    shifted = shifted - shifted.mean()
    n = len(shifted)
    spectrum = np.abs(np.fft.rfft(shifted, 2 * n, axis=0)) ** 2
    covariance = np.fft.irfft(spectrum.sum(1))[:n] / np.arange(n, 0, -1)
    if not covariance[0] > 0.0:
        return 1.0
    correlation = covariance / covariance[0]
    end = int(np.argmax(correlation <= 0.0)) or n
    lag = np.arange(1, end)
    return max(1.0, 1.0 + 2.0 * float(((1.0 - lag / n) * correlation[1:end]).sum()))


def free_energies(
    record: ExchangeRecord, *, n_discard: int = 0, n_blocks: int = N_BLOCKS, samples: Samples | None = None
) -> FreeEnergies:
    """MBAR free energies, effective samples and overlap of the temperatures.

    Args:
        n_discard: iterations left out at the beginning.
        n_blocks: of the jackknife; the error itself is uncertain by 1 / sqrt(2 n_blocks).
        samples: `mbar.Samples.of(record, n_discard, n_blocks)`, which says both and keeps what it has solved: give the
            same to several functions and MBAR is done once. By default they are made here.

    Raises:
        ValueError: fewer iterations left than blocks, or a non-finite energy among them.
    """
    samples = samples or Samples.of(record, n_discard, n_blocks)
    value = samples.f
    error = jackknife(samples, lambda kept, f: f, value)
    log_weights = np.stack([samples.log_weights(value, samples.everything, t) for t in record.temperatures])
    weights = np.exp(log_weights - logsumexp(log_weights, axis=(1, 2), keepdims=True))
    inefficiency = statistical_inefficiency(_standardised(samples))
    flat = weights.reshape(len(weights), -1)
    return FreeEnergies(
        temperatures=np.asarray(record.temperatures, dtype=np.float64),
        value=value,
        error=error,
        n_effective=1.0 / (flat**2).sum(1) / inefficiency,
        overlap=(flat @ flat.T) * samples.counts(samples.everything),
        inefficiency=inefficiency,
    )


def frame_weights(
    record: ExchangeRecord, temperature: float, *, n_discard: int = 0, samples: Samples | None = None
) -> np.ndarray:
    """MBAR weights of the stored frames at a temperature [K] within the ladder, (J * R,), row = j * R + r.

    They sum to 1; frames of discarded iterations weigh 0. The order is that of `record.positions.reshape(-1, A, 3)`.
    With samples as in `free_energies`, theirs is the number of iterations discarded.

    Raises:
        ValueError: a temperature outside the ladder, or no frame is left.
    """
    samples = samples or Samples.of(record, n_discard, 1)
    samples.require_frames()
    return samples.frame_weights(samples.f, samples.everything, _within(record, temperature)).ravel()


def observables(
    record: ExchangeRecord,
    temperatures: Sequence[float],
    phi: np.ndarray | None = None,
    psi: np.ndarray | None = None,
    *,
    n_discard: int = 0,
    n_blocks: int = N_BLOCKS,
    samples: Samples | None = None,
) -> list[dict[str, float]]:
    """What all temperatures together say at any temperature between them, with errors.

    Args:
        temperatures: [K], within the ladder.
        phi, psi: (J * R,) [rad] of the stored frames, `torsions.phi_psi(record.positions.reshape(-1, A, 3), topology)`;
            None for a molecule without them.
        n_discard, n_blocks, samples: as in `free_energies`.

    Returns:
        one row a temperature with the keys of `analysis.observables_against_temperature`: temperature [K], ess (Kish's
        share of the samples), mean_energy [kJ/mol], heat_capacity (of the potential energy, its variance / kT^2)
        [kJ/mol/K] from the energies of every iteration; with phi and psi also, from the stored frames, for each of the
        basins alpha_left, alpha_right and beta: its share, `_free_energy_kt` (-ln of the share) and `_free_energy`
        [kJ/mol]. Each but the first two has an `_error`. A basin that no frame is in has share 0, free energy inf and
        its error NaN; the errors of all basins are NaN where all stored frames lie in one block.
        Besides, n_effective: Kish's number over the statistical inefficiency of the energy.

    Raises:
        ValueError: a temperature outside the ladder, angles that are not those of the stored frames or all of them of
            discarded iterations, or as in `free_energies`.
    """
    wanted = np.array([_within(record, temperature) for temperature in temperatures])
    samples = samples or Samples.of(record, n_discard, n_blocks)
    members = None
    if phi is not None and psi is not None:
        members = _members(record, phi, psi)
        samples.require_frames()

    def figures(kept: np.ndarray, f: np.ndarray) -> np.ndarray:
        return np.stack([_figures(samples, f, kept, temperature, members) for temperature in wanted])

    best = figures(samples.everything, samples.f)
    error = jackknife(samples, figures, best)
    inefficiency = statistical_inefficiency(_standardised(samples))
    rows = []
    for temperature, value, deviation in zip(wanted, best, error, strict=True):
        log_w = samples.log_weights(samples.f, samples.everything, temperature)
        kish = float(np.exp(2.0 * logsumexp(log_w) - logsumexp(2.0 * log_w)))
        rows.append(_row(temperature, kish / log_w.size, kish / inefficiency, value, deviation))
    return rows


def ramachandran(
    record: ExchangeRecord,
    temperature: float,
    phi: np.ndarray,
    psi: np.ndarray,
    *,
    n_discard: int = 0,
    samples: Samples | None = None,
) -> np.ndarray:
    """MBAR-weighted histogram (64, 64) of the stored frames at a temperature [K], as `analysis.ramachandran_histogram`.

    Args:
        phi, psi: (J * R,) [rad] as in `observables`.
        n_discard, samples: as in `frame_weights`.
    """
    weights = frame_weights(record, temperature, n_discard=n_discard, samples=samples)
    if not len(np.ravel(phi)) == len(np.ravel(psi)) == len(weights):
        raise ValueError(f"{np.size(phi)} values of phi and {np.size(psi)} of psi for {len(weights)} stored frames")
    return ramachandran_histogram(np.ravel(phi), np.ravel(psi), weights)


def _figures(
    samples: Samples, f: np.ndarray, kept: np.ndarray, temperature: float, members: np.ndarray | None
) -> np.ndarray:
    """Mean energy, heat capacity and the shares of the basins at one temperature; NaN shares where no frame is kept."""
    log_w = samples.log_weights(f, kept, temperature)
    w = np.exp(log_w - logsumexp(log_w))
    energies = samples.energies[kept]
    mean = (w * energies).sum()
    variance = (w * (energies - mean) ** 2).sum()
    figures = [mean, variance / (kT(temperature) * temperature)]
    if members is not None:
        weights = samples.frame_weights(f, kept, temperature)
        figures += [(weights * (members == basin)).sum() for basin in range(len(BASINS))]
    return np.array(figures)


def _row(temperature: float, ess: float, n_effective: float, value: np.ndarray, error: np.ndarray) -> dict[str, float]:
    row = {"temperature": float(temperature), "ess": ess, "n_effective": n_effective}
    names = ("mean_energy", "heat_capacity", *COLUMNS)
    for name, best, deviation in zip(names, value, error, strict=False):
        row |= {name: float(best), f"{name}_error": float(deviation)}
        if name in COLUMNS:
            in_kt = -math.log(best) if best > 0 else math.inf
            spread = deviation / best if best > 0 else math.nan
            for unit, factor in (("_kt", 1.0), ("", kT(temperature))):
                row |= {f"{name}_free_energy{unit}": float(factor * in_kt)}
                row |= {f"{name}_free_energy{unit}_error": float(factor * spread)}
    return row


def _members(record: ExchangeRecord, phi: np.ndarray, psi: np.ndarray) -> np.ndarray:
    """(J, R) basin of each stored frame."""
    shape = len(record.position_iterations), record.n_replicas
    if not np.size(phi) == np.size(psi) == shape[0] * shape[1]:
        raise ValueError(
            f"{np.size(phi)} values of phi and {np.size(psi)} of psi for {shape[0] * shape[1]} stored frames "
            f"({shape[0]} times {shape[1]} replicas)"
        )
    return basins(np.reshape(phi, shape), np.reshape(psi, shape))


def _standardised(samples: Samples) -> np.ndarray:
    """(I, R) energies along replicas, less the mean of their temperature and over its standard deviation."""
    result = np.zeros(samples.energies.shape)
    for level in range(len(samples.temperatures)):
        there = samples.levels == level
        if there.any():
            result[there] = samples.energies[there] - samples.energies[there].mean()
            result[there] /= result[there].std() or 1.0
    return result


def _within(record: ExchangeRecord, temperature: float) -> float:
    kelvin = to_kelvin(temperature)
    lowest, highest = float(record.temperatures[0]), float(record.temperatures[-1])
    if not lowest - 1e-6 <= kelvin <= highest + 1e-6:
        raise ValueError(f"{kelvin:g} K is not between the temperatures of the exchange, {lowest:g} and {highest:g} K")
    return kelvin
