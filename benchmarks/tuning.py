"""What tuning the sampling temperature must reach, measured: exact cases, medians over data sets, signs, times.

    python benchmarks/tuning.py --out tuning                     # everything: some three minutes of one core
    python benchmarks/tuning.py --out tuning --parts exact potts

Results are kept in the directory, one JSON file for each part, and what is there is not done again; tuning.md is the
table of all parts that are there, each figure with its limit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from openmm_tsf.files import write_text
from openmm_tsf.tuning import (
    OptimalTemperature,
    ScoredSamples,
    energy_level_decomposition,
    optimal_sampling_temperature,
    temperature_diagnostics,
)
from openmm_tsf.tuning.alignment import read_fasta
from openmm_tsf.tuning.ising import fit_ising, sample_spins, square_lattice
from openmm_tsf.tuning.pairwise import PairwiseModel, fit_pseudolikelihood, temper_pairwise
from openmm_tsf.tuning.replicates import ising_replicates
from openmm_tsf.tuning.two_level import TwoLevel, fit_two_level, phase_picture

SIZES = (10, 50, 300, 1000, 10_000)
MEDIANS = {  # 20 ground and 80 excited states: expected median t* at SIZES, to the digits given
    9.0: (0.62, 0.62, 0.79, 0.92, 1.00),
    6.0: (0.93, 0.95, 1.00, 1.00, 1.00),
    4.0: (1.47, 1.57, 1.01, 1.01, 1.00),
    2.5: (3.1, 3.6, 1.03, 1.00, 1.00),
}
GOLDEN = {"t_star": 0.6337, "t_prime": 1.3636, "covariance": 1.941, "variance": 1.230}
CELLS = [(3, t, m) for t in (2.0, 2.3, 4.4) for m in (50, 200, 1000)]
CELLS += [(4, 2.0, 215), (4, 2.3, 54), (4, 2.3, 215), (4, 2.3, 1500), (4, 4.4, 215)]
POTTS_AT = (0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.4)
Row = tuple[str, str, str, bool | None]
"""What, what was found, the limit, and whether it was reached."""


def main() -> None:
    """Run the parts that are missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of results")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--replicates", type=int, default=100, help="data sets of each Ising model")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    options.out.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        path = options.out / f"{part}.json"
        if not path.exists():
            begin, used = time.perf_counter(), time.process_time()
            rows = PARTS[part](options.replicates)
            times = {"seconds": time.perf_counter() - begin, "processor_seconds": time.process_time() - used}
            write_text(path, json.dumps({"rows": rows, **times}, indent=1) + "\n")
        for what, found, limit, _ in json.loads(path.read_text("utf-8"))["rows"]:
            print(f"{what:60} {found:50} {limit}", flush=True)
    write_text(options.out / "tuning.md", table(options.out))


def table(folder: Path) -> str:
    """All parts that are there, in markdown."""
    lines = ["| what | found | limit | |", "|---|---|---|---|"]
    for part in PARTS:
        if (path := folder / f"{part}.json").exists():
            done = json.loads(path.read_text("utf-8"))
            for what, found, limit, reached in done["rows"]:
                lines.append(
                    f"| {what} | {found} | {limit} | {'' if reached is None else 'yes' if reached else 'NO'} |"
                )
            lines.append(
                f"| *{part}: time* | {done['seconds']:.0f} s, {done['processor_seconds']:.0f} s of one core | | |"
            )
    return "\n".join(lines) + "\n"


def timed(work: Callable[[], object]) -> tuple[object, float, float]:
    """What it gives, and the seconds it takes: of wall, of the processor."""
    begin, used = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - begin, time.process_time() - used


# --- exact cases ------------------------------------------------------------------------------------------------------


def exact(_: int) -> list[Row]:
    """The golden case, closed forms against minima on a grid, the derivative against finite differences."""
    counts = torch.tensor([[3, 2, 0, 0, 0, 0, 0, 0, 0, 0]])
    fit = fit_two_level(TwoLevel(3, 7, 5.0), counts)
    rows: list[Row] = []
    for name, value in GOLDEN.items():
        found, limit = (
            float(getattr(fit, name)),
            1e-4 if name.startswith("t_") else 5e-4,
        )  # K, C: three digits are given
        rows.append((f"golden case, {name}", f"{found:.5f}", f"{value} +- {limit:g}", abs(found - value) <= limit))
    steps, slopes = [], []
    for gap, m in ((2.5, 30), (4.0, 10), (5.0, 40), (6.0, 50), (9.0, 300)):
        truth = TwoLevel(20, 80, gap)
        fit = fit_two_level(truth, truth.sample(m, 20, generator=seeded(5)))
        for k in range(20):
            grid = torch.logspace(-1, 1, 401, dtype=torch.float64)
            best = optimal_sampling_temperature(fit.energies(k), temperatures=grid)
            for curve, root in ((best.fidelity, fit.t_star[k]), (best.diversity, fit.t_prime[k])):
                if float(root) < 10.0:
                    steps.append(abs(math.log(grid[curve.argmin()] / root)) / (math.log(100.0) / 400))
            slopes += [slope_error(fit.energies(k), t) for t in (0.7, 1.0, 1.6)]
    for seed, temperature in ((s, t) for s in range(5) for t in (2.0, 2.3, 4.4)):
        spins = sample_spins(square_lattice(3), 60, temperature=temperature, generator=seeded(seed))
        states = fit_ising(spins).against(square_lattice(3), temperature)
        slopes += [slope_error(states, t) for t in (0.7, 1.0, 1.6)]
    what = f"closed forms of t*, t' from {len(steps)} minima on a grid, farthest"
    rows.append((what, f"{max(steps):.2f} steps", "1 step", max(steps) <= 1.0))
    what = f"(K - C)/t against finite differences, {len(slopes)} cases, largest error"
    return [*rows, (what, f"{max(slopes):.1e}", "1e-6", max(slopes) <= 1e-6)]


def slope_error(states: ScoredSamples, t: float) -> float:
    """(K - C)/t less the slope of sum q_t ln(q_t/p), by differences of fourth order."""
    base, log_p = states.log_base, torch.log_softmax(states.log_base - states.target_energy, 0)

    def divergence(at: float) -> float:
        log_q = torch.log_softmax(base - states.model_energy / at, 0)
        return float((log_q.exp() * (log_q - log_p)).sum())

    h = 1e-3
    slope = (8.0 * (divergence(t + h) - divergence(t - h)) - divergence(t + 2 * h) + divergence(t - 2 * h)) / (12.0 * h)
    found = temperature_diagnostics(states.at(t))
    return abs(found.difference / t - slope)


# --- medians over data sets -------------------------------------------------------------------------------------------


def two_level(_: int) -> list[Row]:
    """Medians of t* of 200 replicates, and the time of the phase picture of 50."""
    picture = phase_picture(20, 80, list(MEDIANS), SIZES, n_replicates=200, generator=seeded(11))
    rows: list[Row] = []
    for i, (gap, medians) in enumerate(MEDIANS.items()):
        for j, (m, expected) in enumerate(zip(SIZES, medians, strict=True)):
            low, high = picture.spread[i, j].tolist()
            half = 0.05 if expected > 3.0 else 0.005  # the last digit that is given
            inside = low - half <= expected <= high + half
            median = interval(*(values[i, j] for values in (picture.median, picture.low, picture.high)))
            found = f"{median}, quartiles {low:.3f} {high:.3f}"
            rows.append((f"two levels, gap {gap:g}, M = {m:,}: median t*", found, f"{expected:g} in quartiles", inside))
    rows += boundaries()
    gaps, sizes = torch.linspace(1.0, 10.0, 41).tolist(), torch.logspace(0.7, 4.0, 41).round().int().unique().tolist()
    _, wall, used = timed(lambda: phase_picture(20, 80, gaps, sizes, n_replicates=50, generator=seeded(1)))
    what = f"phase picture, {len(gaps)} gaps x {len(sizes)} sizes x 50 replicates"
    return [*rows, (what, f"{wall:.0f} s ({used:.0f} s of one core)", "120 s", wall <= 120.0)]


def boundaries() -> list[Row]:
    """Where the medians of 200 replicates change from heating to cooling, and where either ends."""
    gaps, sizes = torch.linspace(4.0, 7.0, 25).tolist(), (10, 30, 50)
    picture = phase_picture(20, 80, gaps, sizes, n_replicates=200, generator=seeded(12))
    rows: list[Row] = []
    for j, m in enumerate(sizes):
        first = int((picture.median[:, j] < 1.0).nonzero()[0])
        limit = f"theory: {float(picture.critical[first, j]):.2f}"
        rows.append((f"two levels, M = {m}: cooling begins at the gap", f"{gaps[first]:.2f}", limit, None))
    sizes = tuple(range(60, 160, 10))
    picture = phase_picture(20, 80, (2.0, 2.5, 4.0), sizes, n_replicates=200, generator=seeded(13))
    for gap, medians in zip(picture.gaps, picture.median, strict=True):
        found = ", ".join(f"{m}: {t:.2f}" for m, t in zip(sizes, medians.tolist(), strict=True))
        rows.append((f"two levels, gap {gap:g}: median t* at M", found, "1 beyond n_g ln n_g = 60", None))
    return rows


def ising(replicates: int) -> list[Row]:
    """Medians of t* and t', data sets without a finite fit apart."""
    rows: list[Row] = []
    for side, temperature, m in CELLS:
        found = ising_replicates(side, temperature, m, replicates, generator=seeded(1000 * side + m))
        where = f"Ising {side} x {side}, T = {temperature:g}, M = {m:,}"
        for no_fit, kind in ((False, "with a finite fit"), (True, "without, pseudocount")):
            if n := int((found.no_fit == no_fit).sum()):
                cells = [
                    f"{s} {interval(*found.median(a, no_fit=no_fit))}" for a, s in (("t_star", "t*"), ("t_prime", "t'"))
                ]
                rows.append((f"{where}, {n} of {replicates} {kind}", ", ".join(cells), "", None))
    lattice = square_lattice(4)
    times = []
    for k, (temperature, m) in enumerate((t, m) for t in (2.0, 2.3, 4.4) for m in (54, 500)):
        spins = sample_spins(lattice, m, temperature=temperature, generator=seeded(k))
        times.append(timed(lambda spins=spins: fit_ising(spins))[1])
    return [*rows, ("4 x 4 fit, slowest of 6", f"{max(times):.2f} s", "2 s", max(times) <= 2.0)]


def interval(middle: float, low: float, high: float) -> str:
    """A number and its 95 % interval, if it has one."""
    return f"{middle:.3f}" if math.isnan(low) else f"{middle:.3f} [{low:.3f}, {high:.3f}]"


# --- signs ------------------------------------------------------------------------------------------------------------


def signs(_: int) -> list[Row]:
    """sign(K - C) = sign(1 - t*), K - C being of 500 samples of the model, t* of the enumeration."""
    rows: list[Row] = []
    runs: list[tuple[ScoredSamples, float]] = []
    for gap in (2.5, 4.0, 6.0, 9.0):
        for m in (10, 50, 300):
            truth = TwoLevel(20, 80, gap)
            fit = fit_two_level(truth, truth.sample(m, 20, generator=seeded(m)))
            runs += [(fit.energies(k), float(fit.t_star[k])) for k in range(20)]
    rows.append(agreement("two levels", runs))
    runs = []
    for temperature in (2.0, 2.3, 3.2, 4.4):
        for m in (50, 200):
            for seed in range(20):
                spins = sample_spins(square_lattice(3), m, temperature=temperature, generator=seeded(seed))
                states = fit_ising(spins).against(square_lattice(3), temperature)
                best = optimal_sampling_temperature(states, temperatures=torch.logspace(-1.0, 1.0, 31))
                if best.t_star:
                    runs.append((states, best.t_star.value))
    return [*rows, agreement("Ising 3 x 3", runs)]


def agreement(name: str, runs: list[tuple[ScoredSamples, float]]) -> Row:
    """The share of agreement among the runs whose interval of K - C excludes zero."""
    agree, decided, too_few, generator = 0, 0, 0, seeded(17)
    for states, star in runs:
        rows = torch.multinomial(states.log_weights.softmax(0), 500, True, generator=generator)
        try:
            found = temperature_diagnostics(
                ScoredSamples(states.model_energy[rows], states.target_energy[rows]), generator=generator
            )
        except ValueError:  # the model's energy does not vary among its samples
            too_few += 1
            continue
        if found.fidelity != "keep":
            decided += 1
            agree += (found.difference > 0.0) == (star < 1.0)
    share = agree / max(decided, 1)
    found = f"{agree} of {decided} = {100 * share:.1f} % ({len(runs)} runs, {too_few} whose samples say nothing)"
    return (f"{name}: sign(K - C) = sign(1 - t*) where the interval excludes zero", found, "95 %", share >= 0.95)


# --- an alignment -----------------------------------------------------------------------------------------------------


def potts(_: int) -> list[Row]:
    """The alignment that ships: fit to all sequences, samples of the fit at several t, t* and t' against the truth."""
    data = resources.files("openmm_tsf") / "data"
    stored = np.load(str(data / "potts_truth.npz"))
    truth = PairwiseModel(torch.from_numpy(stored["fields"]), torch.from_numpy(stored["couplings"]))
    sequences = read_fasta(str(data / "potts_alignment.fasta"), alphabet="-ACDE")
    generator = seeded(1)
    fit, fit_wall, fit_used = timed(lambda: fit_pseudolikelihood(sequences.states, 5))

    def draw(model: PairwiseModel, t: float) -> torch.Tensor:
        return temper_pairwise(model, 2000, t=t, n_replicas=250, generator=generator).states

    drawn, draw_wall, draw_used = timed(lambda: [draw(fit, t) for t in POTTS_AT])
    held_out = fit(draw(truth, 1.0))
    scored = {t: ScoredSamples(fit(s), truth(s), t=t) for t, s in zip(POTTS_AT, drawn, strict=True)}

    def tune() -> tuple:
        best = optimal_sampling_temperature(
            lambda t: scored[t], temperatures=list(scored), held_out=held_out, n_replicates=50
        )
        return temperature_diagnostics(scored[1.0], held_out=held_out), best, energy_level_decomposition(scored[1.0])

    (found, best, _), tune_wall, tune_used = timed(tune)
    total, used = fit_wall + draw_wall + tune_wall, fit_used + draw_used + tune_used
    seconds = f"{fit_wall:.0f} + {draw_wall:.0f} + {tune_wall:.0f} = {total:.0f} s ({used:.0f} s of one core)"
    again = []
    for _ in range(5):
        states = draw(fit, 1.0)
        again.append(temperature_diagnostics(ScoredSamples(fit(states), truth(states))).ess)
    ess = [f"{100 * share:.0f} % at {t:g}" for t, share in zip(POTTS_AT, best.ess.tolist(), strict=True)]
    what = f"Potts, {len(sequences):,} sequences: fit + samples at {len(scored)} t + tuning"
    return [
        (what, seconds, "180 s", total <= 180.0),
        (
            "Potts: K, C at t = 1",
            f"{found.covariance:.2f}, {found.variance:.2f}: {found.fidelity} for fidelity",
            "",
            None,
        ),
        ("Potts: t*, t'", roots(best), "", None),
        ("Potts: ESS", ", ".join(ess), "", None),
        ("Potts: ESS at 1 of five sets of 2,000", ", ".join(f"{100 * e:.0f} %" for e in sorted(again)), "", None),
    ]


# --- what misleads ----------------------------------------------------------------------------------------------------


def limits(_: int) -> list[Row]:
    """Clashes, weights worth little, few held-out samples and the training data in their place.

    The model is a Gaussian of variance 1; the target has variance 0.6 in half of the dimensions and 1.5 in the others.
    KL(q_t || p) is least where t sum 1/variance = D, KL(p || q_t) where t D = sum variance: t* = 6/7, t' = 1.05.
    """
    rows: list[Row] = []
    precision = torch.tensor([1.0 / 0.6, 1.0 / 1.5], dtype=torch.float64)
    generator = seeded(3)

    def gaussian(n: int, dim: int) -> torch.Tensor:
        return torch.randn(n, dim // 2, 2, generator=generator, dtype=torch.float64)

    def scored(x: torch.Tensor) -> ScoredSamples:
        return ScoredSamples(0.5 * x.square().sum((1, 2)), 0.5 * (x.square() * precision).sum((1, 2)))

    for dim in (2, 20, 60):
        best = optimal_sampling_temperature(scored(gaussian(2000, dim)))
        rows.append((f"{dim}-d Gaussian, 2,000 samples reweighted, {worth(best)}", roots(best), "0.857, 1.05", None))
    samples = scored(gaussian(2000, 20))
    for m in (20, 200, 2000):
        held_out = 0.5 * (gaussian(m, 20).square() / precision).sum((1, 2))
        best = optimal_sampling_temperature(samples, held_out=held_out)
        rows.append((f"20-d Gaussian, {m:,} held-out samples", roots(best), "0.857, 1.05", None))
    hit = samples.target_energy.clone()
    hit[:20] = 1e4
    clashing = ScoredSamples(samples.model_energy, hit)
    for tail in (math.inf, 10.0):
        found = temperature_diagnostics(clashing, tail=tail)
        low, high = found.difference_interval
        what = f"20-d Gaussian, 1 % of clashes, {100 * found.left_out:.1f} % left out: K - C"
        rows.append((what, f"{interval(found.difference, low, high)}: {found.fidelity}", "1.67", None))
    lattice = square_lattice(3)
    spins = sample_spins(lattice, 60, temperature=4.4, generator=seeded(8))
    fit = fit_ising(spins)
    own, s = fit.against(lattice, 4.4), spins.double()
    trained = optimal_sampling_temperature(own, held_out=-0.5 * ((s @ fit.couplings) * s).sum(1))
    right = optimal_sampling_temperature(own)
    found = f"{interval(trained.t_prime.value, *trained.t_prime.interval)}"
    return [*rows, ("Ising 3 x 3, t' from the training data", found, f"{right.t_prime.value:.3f}", None)]


def worth(best: OptimalTemperature) -> str:
    """Effective samples, of all, once reweighted to the target."""
    return f"ESS {100 * best.reweighting_ess:.1f} %"


def roots(best: OptimalTemperature) -> str:
    """t* and t' with their intervals."""
    return ", ".join(interval(r.value, *r.interval) if r else "none" for r in (best.t_star, best.t_prime))


def seeded(seed: int) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


PARTS = {"exact": exact, "two_level": two_level, "ising": ising, "signs": signs, "potts": potts, "limits": limits}

if __name__ == "__main__":
    main()
