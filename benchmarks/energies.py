"""Energies and forces per second: OpenMM's loop, frame by frame, against batches, for the same frames in one run.

python benchmarks/energies.py --json energies.json          # everything, about half an hour
python benchmarks/energies.py --quick                       # alanine dipeptide in ff96-obc1 only, a few minutes
python benchmarks/energies.py --start                       # how long the first and later processes take to begin
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from openmm import app

import openmm_tsf as tsf

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from molecules import peptide

MODELS = ("ff96-obc1", "ff99sbildn-obc2", "vacuum")
RESIDUES = (3, 5, 10, 20)
BATCHES = (1, 16, 256, 1024, 4096, 16_384, 65_536)
SECONDS = 0.5
"""Least time that a repeat of a measurement takes."""
REPEATS = 5


def molecules(quick: bool) -> Iterator[tuple[str, tsf.Molecule]]:
    """Names and molecules."""
    for model in MODELS[:1] if quick else MODELS:
        yield model, tsf.alanine_dipeptide(model)
    for n in () if quick else RESIDUES:
        grown = peptide(*["ALA"] * n)
        field = app.ForceField("amber14/protein.ff14SB.xml", "implicit/obc1.xml")
        yield (
            f"{n} alanines",
            tsf.Molecule(field.createSystem(grown.topology), grown.topology, grown.positions, f"{n} alanines"),
        )


def frames(molecule: tsf.Molecule, n: int) -> np.ndarray:
    """The reference geometry perturbed by 0.005 nm, (n, A, 3) float32."""
    rng = np.random.default_rng(0)
    return (molecule.positions + rng.normal(scale=0.005, size=(n, molecule.n_atoms, 3))).astype(np.float32)


def rate(work: Callable[[], object], n: int) -> float:
    """Frames per second: the median of repeats of at least `SECONDS` each, after one call to warm up."""
    work()
    begin = time.perf_counter()
    work()
    calls = max(1, round(SECONDS / (time.perf_counter() - begin)))
    found = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        found.append(n * calls / (time.perf_counter() - begin))
    return statistics.median(found)


def plain_loop(system: openmm.System, platform: str, threads: int | None, x: np.ndarray) -> float:
    """The loop that everybody writes: one Context, one frame after the other, numpy in and numpy out."""
    properties = {} if threads is None else {"Threads": str(threads)}
    integrator = openmm.VerletIntegrator(0.001)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName(platform), properties)

    def work() -> None:
        for row in x:
            context.setPositions(row)
            state = context.getState(energy=True, forces=True)
            state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value

    return rate(work, len(x))


def openmm_rates(molecule: tsf.Molecule, x: np.ndarray) -> dict[str, float]:
    """OpenMM's loops by name."""
    n = max(8, min(512, 20_000 // molecule.n_atoms))
    x, system = x[:n].astype(np.float64), molecule.system
    found = {
        "openmm CPU Threads=1": plain_loop(system, "CPU", 1, x),
        "openmm CPU Threads=2": plain_loop(system, "CPU", 2, x),
        "openmm Reference": plain_loop(system, "Reference", None, x[: max(8, n // 8)]),
    }
    for n_contexts in (1, 2):
        energy = tsf.OpenMMEnergy(system, "CPU", n_contexts=n_contexts)
        name = f"openmm CPU pinned, {n_contexts} Context{'s' * (n_contexts > 1)}"
        found[name] = rate(partial(energy.forces, x), n)
        energy.close()
    if torch.cuda.is_available():
        found["openmm CUDA"] = plain_loop(system, "CUDA", None, x)
    return found


def batched_rates(molecule: tsf.Molecule, x: np.ndarray, threads: int) -> Iterator[tuple[str, float]]:
    """Batches by device, dtype, way of running and batch size; sizes that would take minutes are left out."""
    torch.set_num_threads(threads)
    most = 65_536 * 231 / (molecule.n_atoms * (molecule.n_atoms - 1) / 2)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for dtype in (torch.float32, torch.float64):
            for compiled in (False, True):
                energy = tsf.BatchedEnergy(molecule.system, molecule.positions, compile=compiled)
                for n in BATCHES:
                    if n > max(most, 256) or (not compiled and n > 4096 and device == "cpu"):
                        continue
                    positions = torch.from_numpy(x[:n]).to(device, dtype).permute(1, 2, 0).contiguous()

                    def work(energy: Any = energy, positions: torch.Tensor = positions) -> None:
                        energy.evaluate(positions)
                        if positions.is_cuda:
                            torch.cuda.synchronize()

                    way = "compiled" if compiled else "eager"
                    yield f"{device} {str(dtype)[6:]} {way} {threads} threads, batch {n}", rate(work, n)


def memory(molecule: tsf.Molecule, n: int = 1_000_000) -> dict[str, float]:
    """Peak memory of a batch of a million frames beyond its input and output [GiB]; run in a process of its own."""
    torch.set_num_threads(2)
    energy = tsf.BatchedEnergy(molecule.system, molecule.positions)
    x = torch.from_numpy(frames(molecule, 1024)).repeat(n // 1024 + 1, 1, 1)[:n].requires_grad_(True)
    energy(x[:4096].detach())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    energy(x).sum().backward()
    seconds = time.perf_counter() - begin
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    # forces and their negative, the gradient, are output; energies too
    output = (2 * x.numel() + n) * x.element_size() / 2**30
    return {"frames": n, "seconds": seconds, "GiB beyond input and output": peak - output}


def start_seconds() -> dict[str, float]:
    """Time until the first compiled batch is there, in fresh processes without and with a warm compiler cache [s]."""
    code = (
        "import time; t = time.perf_counter(); import torch, openmm_tsf as tsf; m = tsf.alanine_dipeptide();"
        "e = tsf.BatchedEnergy(m.system, m.positions, compile=True);"
        "e(torch.tensor(m.positions[None].copy()).float()); print(time.perf_counter() - t)"
    )
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
        runs = [
            float(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout)
            for _ in range(4)
        ]
    return {"first process": runs[0], "later processes": statistics.median(runs[1:])}


def measure(quick: bool, threads: int) -> Iterator[dict[str, Any]]:
    """Rows of the table: molecule, atoms, way, frames per second and how many times the best OpenMM loop that is."""
    for name, molecule in molecules(quick):
        x = frames(molecule, max(BATCHES))
        loops = openmm_rates(molecule, x)
        best = max(value for way, value in loops.items() if "CUDA" not in way)
        for way, found in [*loops.items(), *batched_rates(molecule, x, threads)]:
            against = loops.get("openmm CUDA", best) if way.startswith("cuda") else best
            yield {"molecule": name, "atoms": molecule.n_atoms, "way": way, "per_s": found, "ratio": found / against}


def main() -> None:
    """Parse the command line, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="alanine dipeptide in ff96-obc1 only")
    parser.add_argument("--start", action="store_true", help="time from nothing to the first compiled batch")
    parser.add_argument("--memory", action="store_true", help="peak memory of a million frames")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    if options.start or options.memory:
        rows = [start_seconds() if options.start else memory(tsf.alanine_dipeptide())]
        print("\n".join(f"{name}: {value:.3g}" for name, value in rows[0].items()))
    else:
        rows = []
        for row in measure(options.quick, options.threads):
            rows.append(row)
            print(f"{row['molecule']:16} {row['way']:50} {row['per_s']:12,.0f}/s {row['ratio']:8.2f}x", flush=True)
    if options.json:
        load = os.getloadavg()[0]
        options.json.write_text(json.dumps({"load": load, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
