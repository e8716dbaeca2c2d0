"""When to cool a learned model and when to heat it: the figures of the paper, on small systems that are exact.

python examples/temperature_tuning.py                       # a minute of one core
python examples/temperature_tuning.py --replicates 100      # smoother
"""

import argparse
from pathlib import Path

import torch

from openmm_tsf import canvas
from openmm_tsf.tuning import energy_level_decomposition, optimal_sampling_temperature
from openmm_tsf.tuning.ising import fit_ising, sample_spins, square_lattice
from openmm_tsf.tuning.replicates import ising_replicates
from openmm_tsf.tuning.two_level import TwoLevel, fit_two_level, phase_picture
from openmm_tsf.tuning_plots import divergence_figure, ising_figure, levels_figure, phase_figure, size_figure

torch.set_num_threads(1)  # for tensors this small, more of them wait for each other
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--replicates", type=int, default=20, help="data sets of each kind")
parser.add_argument("--grid", type=int, default=41, help="gaps and sizes of the phase picture, along each axis")
parser.add_argument("--sides", type=int, nargs="+", default=[3, 4], help="of the Ising lattices")
parser.add_argument("--out", type=Path, default=Path("temperature_tuning"), help="directory of the figures")
options = parser.parse_args()
options.out.mkdir(parents=True, exist_ok=True)
note = canvas.small_print(1)
n_ground, n_excited = 20, 80


def logspaced(low: float, high: float, n: int) -> list[int]:
    """Whole numbers, evenly spaced in their logarithm."""
    return torch.logspace(low, high, n).round().int().unique().tolist()


# one fit of each kind: its divergences, and what happens to each energy level
curves, levels = {}, {}
for gap in (8.0, 3.0):
    truth = TwoLevel(n_ground, n_excited, gap)
    states = fit_two_level(truth, truth.sample(50, generator=torch.Generator().manual_seed(3))).energies(0)
    curves[f"Two levels, gap {gap:g}, M = 50"] = optimal_sampling_temperature(states)
for temperature in (2.0, 4.4):
    lattice = square_lattice(3)
    spins = sample_spins(lattice, 50, temperature=temperature, generator=torch.Generator().manual_seed(3))
    states = fit_ising(spins).against(lattice, temperature)
    title = f"Ising 3 x 3, T = {temperature:g}, M = 50"
    best = curves[title] = optimal_sampling_temperature(states)
    levels[title] = tuple(energy_level_decomposition(states.at(t)) for t in (1.0, best.t_star.value))
for title, best in curves.items():
    roots = [f"{root.value:.3f}" if root else "none" for root in (best.t_star, best.t_prime)]
    print(f"{title}: t* = {roots[0]}, t' = {roots[1]}")
canvas.save(divergence_figure(curves, note=note), options.out / "divergences.png")
canvas.save(levels_figure(levels, note=note), options.out / "levels.png")

# two levels: how many samples are enough, and the phases
generator = torch.Generator().manual_seed(1)
few = phase_picture(
    n_ground, n_excited, [9.0, 6.0, 4.0, 2.5], logspaced(1, 4.5, 15), n_replicates=4 * options.replicates,
    generator=generator,
)  # fmt: skip
canvas.save(size_figure(few, note=f"{4 * options.replicates} data sets each. {note}"), options.out / "sizes.png")
gaps = torch.linspace(1.0, 10.0, options.grid).tolist()
picture = phase_picture(
    n_ground, n_excited, gaps, logspaced(0.7, 4.0, options.grid), n_replicates=options.replicates, generator=generator
)
drawn = phase_figure(picture, n_ground, n_excited, note=f"{options.replicates} data sets each. {note}")
canvas.save(drawn, options.out / "phases.png")
for gap, row in zip(few.gaps, few.median.tolist(), strict=True):
    print(f"gap {gap:g}: median t* = {row[0]:.2f} at M = {few.sizes[0]}, {row[-1]:.2f} at M = {few.sizes[-1]}")

# Ising: below, near and above the critical temperature
cells = []
for side in options.sides:
    for temperature in (2.0, 2.3, 4.4):
        for size in (30, 100, 300, 1000, 3000):
            cell = ising_replicates(side, temperature, size, options.replicates, generator=generator)
            cells.append(cell)
            (fitted, _, _), (pseudo, _, _) = (cell.median("t_star", no_fit=no_fit) for no_fit in (False, True))
            print(
                f"{side} x {side}, T = {temperature:g}, M = {size}: median t* = {fitted:.2f}; "
                f"{int(cell.no_fit.sum())} of {len(cell.no_fit)} without a finite fit, t* = {pseudo:.2f}",
                flush=True,
            )
canvas.save(ising_figure(cells, note=f"{options.replicates} data sets each. {note}"), options.out / "ising.png")
print(f"figures are in {options.out}")
