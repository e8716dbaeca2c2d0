"""Times that users feel: internal coordinates, sampling, OpenMM energies, import. Medians of repeats, one process.

python benchmarks/speed.py --flow ala2 --json speed.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import openmm_tsf as tsf
from openmm_tsf.reporting import steering_spread


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time of `work` [s], after one call to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def import_seconds(code: str, repeats: int = 5) -> float:
    """Median time that a fresh interpreter takes for some imports [s]."""
    timed = f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True) for _ in range(repeats)]
    return statistics.median(float(run.stdout) for run in runs)


def measure(flow: tsf.Flow, n: int) -> dict[str, float]:
    """All figures, by name with unit."""
    generator = torch.Generator().manual_seed(1)
    steered, internals = flow.at(300.0), flow.internals
    figures = {}
    with torch.no_grad():
        torch.set_num_threads(1)
        x, _ = steered.sample(4096, generator=generator)
        q, _ = internals.inverse(x)
        figures["internals_of_4096_frames_ms"] = 1e3 * median_seconds(lambda: internals.inverse(x), 15)
        figures["positions_of_4096_frames_ms"] = 1e3 * median_seconds(lambda: internals(q), 15)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            seconds = median_seconds(lambda: steered.sample(n, generator=generator), 3)
            figures[f"sample_{n}_{threads}_threads_s"] = seconds
    figures["steering_spread_300_600_nat"] = steering_spread(flow, x, 300.0, 600.0)
    for contexts in (1, 2):
        energy = tsf.OpenMMEnergy(flow.molecule.system, "CPU", n_contexts=contexts)
        seconds = median_seconds(lambda energy=energy: energy.forces(x[:2048]), 5)
        figures[f"openmm_cpu_energies_and_forces_{contexts}_contexts_per_s"] = 2048 / seconds
    torch_alone, both = import_seconds("import torch"), import_seconds("import torch, openmm_tsf")
    figures["import_torch_s"], figures["import_beyond_torch_s"] = torch_alone, both - torch_alone
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flow", default="ala2", help="a checkpoint, or the name of a pretrained flow")
    parser.add_argument("-n", type=int, default=100_000, help="draws in the sampling figure")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    flow = tsf.load_flow(options.flow) if Path(options.flow).is_file() else tsf.pretrained(options.flow)
    figures = measure(flow, options.n)
    for name, value in figures.items():
        print(f"{name:52} {value:12.4g}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
