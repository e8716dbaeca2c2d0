"""Alanine dipeptide by flows trained at 600 K alone: figure 3 of arXiv 2108.01590, and where its miss is from.

    python benchmarks/figure3.py --out figure3                    # two force fields, four flows, three seeds: hours
    python benchmarks/figure3.py --out figure3 --steps 600 --seeds 1 2
    python benchmarks/figure3.py --out figure3 --seeds             # no flow: what is exact
    python benchmarks/figure3.py --out figure3 --flows no-entropy entropy --refined 150000    # these, refined at 600 K

Results are kept in the directory as they come, one file for each flow and seed; what is there is not done again, and
what was interrupted goes on. Parallel tempering goes on from where it is if --iterations is raised.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import openmm_tsf as tsf
from openmm_tsf import canvas
from openmm_tsf.console import Bar
from openmm_tsf.dynamics import N_WALKERS, simulate
from openmm_tsf.files import write_text
from openmm_tsf.portraits import Exact, of_exchange, of_reference, two_states
from openmm_tsf.reference import load_reference
from openmm_tsf.refinement import RefinementSettings, refine
from openmm_tsf.steering_plots import entropy_figure, histograms_figure, maps_figure
from openmm_tsf.steering_study import (
    FLOWS,
    TEMPERATURES,
    Study,
    drawn,
    energy_curve,
    exchanged,
    share_table,
    study,
)

PAPER, OURS = "ff99sbildn-obc2", "ff96-obc1"
"""The force field of the paper, and that of the reference that ships."""


class Work:
    """One force field: what is missing is done, what is there is read.

    Args:
        model: of alanine dipeptide.
        options: of the command line.
    """

    def __init__(self, model: str, options: argparse.Namespace) -> None:
        self.model, self.options, self.folder = model, options, options.out / model
        self.molecule = tsf.alanine_dipeptide(model=model)
        self.energy = tsf.BatchedEnergy(self.molecule.system, self.molecule.positions)

    def exact(self) -> Exact:
        """Parallel tempering, or the reference that ships."""
        if self.model == OURS:
            return of_reference(load_reference("ala2"), model=self.model)
        return self._exchange("parallel tempering", self.folder / "exchange", self.options.iterations)

    def corrected(self, name: str, seed: int) -> Exact:
        """Parallel tempering with moves of a flow."""
        folder = self._place(name, seed)
        return self._exchange(
            "exchange with the flow", folder / "exchange", self.options.corrected, flow=folder / "flow.tsf", seed=seed
        )

    def study(self, name: str, seed: int) -> Study:
        """One flow, trained on frames of its own seed."""
        folder, options = self._place(name, seed), self.options
        path = folder / "study.json"
        if not path.exists():
            frames = simulate(
                self.molecule, temperature=600.0, n_frames=options.frames, spacing_fs=20.0, seed=seed,
                directory=self.folder / f"frames_{seed}", progress=Bar(f"{self.model} frames {seed}"),
            )  # fmt: skip
            done = study(
                name, self.molecule, frames, self.energy, model=self.model, steps=options.steps,
                n_draws=options.draws, seed=seed, directory=folder, progress=Bar(f"{self.model} {name} {seed}"),
            )  # fmt: skip
            write_text(path, done.to_json())
        found = Study.from_json(path.read_text("utf-8"))
        if (found.steps, found.n_frames) != (options.steps, whole_rows(options.frames)):
            raise SystemExit(f"{path} is of {found.steps} steps on {found.n_frames} frames; choose another --out")
        return found

    def refined(self, name: str, seed: int) -> Study:
        """The same after a refinement at 600 K, on weighted draws, which know populations better than the frames."""
        folder, options = self._place(name, seed), self.options
        path = folder / "study_refined.json"
        if not path.exists():
            before, begin, flow = self.study(name, seed), time.perf_counter(), tsf.load_flow(folder / "flow.tsf")
            training = replace(RefinementSettings().training, steps=options.refine_steps)
            settings = RefinementSettings(n=options.refined, rounds=1, training=training)
            done = refine(
                flow, self.energy, 600.0, settings, directory=folder / "refinement", seed=seed,
                progress=Bar(f"{self.model} {name} {seed}, refined"),
            )  # fmt: skip
            tsf.save_flow(flow, folder / "flow_600K.tsf")
            raw, reweighted = drawn(flow, self.energy, options.draws, torch.Generator().manual_seed(seed))
            after = replace(
                before, raw=raw, reweighted=reweighted, curve=energy_curve(flow),
                n_energy_evaluations=before.n_energy_evaluations + done.n_energy_evaluations,
                seconds=before.seconds + time.perf_counter() - begin,
            )  # fmt: skip
            write_text(path, after.to_json())
        return Study.from_json(path.read_text("utf-8"))

    def _place(self, name: str, seed: int) -> Path:
        return self.folder / f"{name}_{seed}"

    def _exchange(
        self, source: str, folder: Path, n_iterations: int, *, flow: Path | None = None, seed: int = 1
    ) -> Exact:
        path = folder / "exact.json"
        if path.exists():
            found = Exact.from_json(path.read_text("utf-8"))
            if found.n_iterations >= n_iterations:
                return found
        record = exchanged(
            self.molecule, folder, n_iterations=n_iterations, flow=flow, energy=self.energy, seed=seed,
            progress=Bar(str(folder)),
        )  # fmt: skip
        found = of_exchange(record, self.molecule, TEMPERATURES, model=self.model, source=source)
        write_text(path, found.to_json())
        return found


def main() -> None:
    """Do what is missing, print the table and draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of results")
    parser.add_argument("--models", nargs="+", default=[PAPER, OURS], choices=[PAPER, OURS])
    parser.add_argument("--flows", nargs="+", default=list(FLOWS), choices=FLOWS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=1200, help="of the training")
    parser.add_argument("--frames", type=int, default=400_000, help="of the training")
    parser.add_argument("--draws", type=int, default=100_000, help="at each temperature")
    parser.add_argument("--refined", type=int, default=0, help="draws of a refinement of flows at 600 K; 0 for none")
    parser.add_argument("--refine-steps", type=int, default=800, help="of it")
    parser.add_argument("--iterations", type=int, default=20_000, help="of parallel tempering alone, 200 fs each")
    parser.add_argument("--corrected", type=int, default=1000, help="iterations with a flow, of the first seed")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    exact, studies, refined = [], [], []
    for model in options.models:
        work = Work(model, options)
        exact.append(work.exact())
        energy, energy_error, entropy, entropy_error = two_states(exact[-1].at(300), exact[-1].at(600))
        print(f"{model}: phi > 0 less the rest has the energy {energy:.2f} +- {energy_error:.2f} kJ/mol, ", end="")
        print(f"the entropy {entropy:.2f} +- {entropy_error:.2f} k_B")
        for seed in options.seeds:
            studies += [work.study(name, seed) for name in options.flows]
            print(share_table(exact, studies), flush=True)
            if options.refined:
                refined += [work.refined(name, seed) for name in options.flows]
                print("refined at 600 K:", share_table(exact, refined), sep="\n", flush=True)
        if model == PAPER and options.seeds:
            draw_flows(work, exact[-1], [study for study in studies if study.seed == options.seeds[0]])
    print(share_table(exact, studies))
    note = f"{options.draws:,} draws each, {options.steps} steps of training. "
    note += canvas.small_print(options.seeds[0]) if options.seeds else ""
    canvas.save(entropy_figure(exact, studies, note=note), options.out / "entropy.png")


def draw_flows(work: Work, exact: Exact, studies: list[Study]) -> None:
    """The figures of the paper, of one seed."""
    options = work.options
    corrected = {study.flow: work.corrected(study.flow, study.seed) for study in studies}
    sizes = ", ".join(f"{study.flow} {study.n_parameters:,}" for study in studies)
    note = f"{options.draws:,} draws; {options.steps} steps on {options.frames:,} frames; parameters: {sizes}. "
    note += canvas.small_print(studies[0].seed)
    canvas.save(maps_figure(exact, studies, corrected, note=note), options.out / "maps.png")
    canvas.save(histograms_figure(exact, studies, corrected, note=note), options.out / "histograms.png")


def whole_rows(n_frames: int) -> int:
    """Frames that `simulate` makes of so many: each walker has as many."""
    return math.ceil(n_frames / N_WALKERS[True]) * N_WALKERS[True]


if __name__ == "__main__":
    main()
