"""The table of accuracy: what flows of alanine dipeptide are worth at several temperatures, and what they cost.

    python benchmarks/accuracy.py measure runs/seed1/flow.tsf runs/seed2/flow.tsf --out accuracy
    python benchmarks/accuracy.py spline --out runs/spline_1 --seed 1
    python benchmarks/accuracy.py paper --kind tsf --frames-from runs/seed1 --out runs/tsf_1 --seed 1
    python benchmarks/accuracy.py table accuracy/*.json

`spline` and `paper` train what flows are compared with, in run directories that `measure` and the command line read.
What is done is not done again, and what was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import openmm_tsf as tsf
from openmm_tsf import accuracy, accuracy_table
from openmm_tsf.architecture import FlowSettings, Kind, build_modules
from openmm_tsf.assembly import stage_seed
from openmm_tsf.checkpoint import flow_path
from openmm_tsf.config import load_config
from openmm_tsf.console import Bar
from openmm_tsf.ensemble import to_mdtraj
from openmm_tsf.files import whole, write_text
from openmm_tsf.ladder import geometric_ladder
from openmm_tsf.reference import reference_for
from openmm_tsf.rundir import Run, open_run
from openmm_tsf.settings import Config, SampleSettings, SimulateSettings
from openmm_tsf.stages import simulate_stage, train_stage
from openmm_tsf.tempering import BatchedTempering
from openmm_tsf.tempering_storage import run_tempering
from openmm_tsf.training import TrainingSettings

COLD, HOT, N_LEVELS, N_REPLICAS = 300.0, 600.0, 5, 32
"""The ladder of the tempering that gives frames at 300 K."""
WIDEST = 1024
Charge = dict[str, float]
"""Energy evaluations and seconds."""


def measure(options: argparse.Namespace) -> None:
    """One record for each flow and temperature."""
    for path in map(flow_path, options.flows):
        flow, facts = accuracy_table.describe(path, options.model, run=options.run)
        reference = reference_for(flow.molecule)
        energy = tsf.BatchedEnergy(flow.molecule.system, flow.molecule.positions)
        for temperature in options.temperatures:
            asked = {"temperature_kelvin": temperature, "n_asked": options.n, "seed_of_draws": options.seed}
            out = options.out / f"{path.resolve().parent.name}_{path.stem}_{temperature:g}K.json"
            if is_there(out, facts | asked):
                continue
            begin, generator = time.perf_counter(), torch.Generator()
            generator.manual_seed(stage_seed(options.seed, f"accuracy {temperature:g} K"))
            state = None if reference is None else reference.at(temperature)
            try:
                draws = accuracy.collect(
                    flow, energy, temperature, options.n, generator=generator, progress=Bar(out.stem)
                )
                found, said = accuracy.figures(draws, state), "done"
            except (RuntimeError, ValueError) as error:  # as a rule a flow far from where it was trained
                found, said = {}, f"no figures: {error}"
            seconds = time.perf_counter() - begin
            options.out.mkdir(parents=True, exist_ok=True)
            record = {**facts, **asked, **found, "said": said, "seconds": seconds}
            write_text(out, json.dumps(record, indent=1, allow_nan=False))
            ess = f"ESS {100 * found['ess']:.2f} %" if found else said
            print(f"{out}: {ess}, {seconds:.0f} s", flush=True)


def is_there(path: Path, facts: accuracy_table.Record) -> bool:
    """Whether a record is done, with these facts.

    Raises:
        SystemExit: it is of a flow in another place.
    """
    if not path.exists():
        return False
    before = json.loads(path.read_text("utf-8"))
    if before["file"] != facts["file"]:
        raise SystemExit(f"{path} is of {before['file']}, not of {facts['file']}; choose another --out")
    return before["said"] == "done" and all(before[name] == value for name, value in facts.items())


def spline(options: argparse.Namespace) -> None:
    """Frames at 300 K from parallel tempering, and a spline flow trained by their likelihood alone."""
    trajectory, charge = cold_frames(options)
    config = Config(
        seed=options.seed,
        simulate=SimulateSettings(temperature=COLD, trajectory=str(trajectory), trajectory_walkers=N_REPLICAS),
        flow=FlowSettings(kind="spline", hidden=options.hidden or hidden_for("spline", options.parameters)),
        train=training(options, energy_weight=0.0),
        sample=SampleSettings(explore=0.0),
    )
    train_run(options.out, config, charge)


def cold_frames(options: argparse.Namespace) -> tuple[Path, Charge]:
    """A trajectory at the lowest temperature of a parallel tempering, and what the whole of it cost."""
    molecule, folder = tsf.alanine_dipeptide(), options.out.resolve() / "tempering"
    tempering = BatchedTempering(
        molecule, geometric_ladder(COLD, HOT, N_LEVELS), n_replicas_per_temperature=N_REPLICAS,
        n_dynamics_steps=options.spacing, timestep_fs=1.0, seed=stage_seed(options.seed, "tempering"),
    )  # fmt: skip
    dropped = round(1000.0 * options.equilibration / options.spacing)
    n_iterations = dropped + math.ceil(options.frames / N_REPLICAS)
    record = run_tempering(tempering, folder, n_iterations, progress=Bar("tempering"))
    trajectory = folder / f"frames_{COLD:g}K.dcd"
    if not trajectory.exists():
        kept = record.levels == 0
        kept[:dropped] = False
        with whole(trajectory) as temporary:
            to_mdtraj(record.positions[kept], molecule).save_dcd(str(temporary))
    return trajectory, {"n_energy_evaluations": record.n_energy_evaluations, "seconds": record.seconds}


def paper(options: argparse.Namespace) -> None:
    """One of the paper's two models, on frames of a run directory."""
    source = Run(options.frames_from, load_config(options.frames_from / "config.toml"))
    frames = source.record("simulate")
    config = Config(
        seed=options.seed,
        simulate=SimulateSettings(
            temperature=source.config.simulate.temperature,
            trajectory=str((source.path / "training.dcd").resolve()),
            trajectory_walkers=frames["n_walkers"],
            trajectory_stride=max(1, frames["n_frames"] // options.frames),
        ),
        flow=FlowSettings(kind=options.kind, hidden=options.hidden or hidden_for(options.kind, options.parameters)),
        train=training(options),
        sample=SampleSettings(explore=0.0),
    )
    train_run(options.out, config, {name: frames[name] for name in ("n_energy_evaluations", "seconds")})


def training(options: argparse.Namespace, **more: float) -> TrainingSettings:
    """By the plain gradient."""
    return TrainingSettings(
        steps=options.steps, learning_rate=options.learning_rate, estimator="plain",
        evaluate_every=max(1, min(100, options.steps // 10)), **more,
    )  # fmt: skip


def train_run(out: Path, config: Config, charge: Charge) -> None:
    """Train in a run directory; its account of the frames is what they cost where they were made."""
    with open_run(out, config) as run:
        simulate_stage(run, Bar("frames"))
        run.update("simulate", **charge)
        train_stage(run, Bar("training"))
        print(f"{out / 'flow.tsf'}: {json.dumps({name: run.record(name) for name in ('simulate', 'train')})}")


def hidden_for(kind: Kind, n_parameters: int) -> int:
    """The largest width with which a flow of alanine dipeptide has at most so many parameters.

    Raises:
        SystemExit: even a width of 1 has more.
    """

    def count(hidden: int) -> int:
        return sum(p.numel() for module in modules_of(kind, hidden) for p in module.parameters())

    hidden = bisect_right(range(1, WIDEST), n_parameters, key=count)
    if hidden == 0:
        raise SystemExit(f"{n_parameters} parameters are too few: with one hidden unit there are {count(1)}")
    return hidden


@cache
def circular_columns() -> torch.Tensor:
    """(60,) internals of alanine dipeptide that live on the circle."""
    molecule = tsf.alanine_dipeptide()
    return tsf.FlatInternals(molecule, tsf.build_zmatrix(molecule)).circular


def modules_of(kind: Kind, hidden: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Prior and map of an untrained flow of alanine dipeptide."""
    settings = FlowSettings(kind=kind, hidden=hidden)
    circular = circular_columns() & (not settings.on_lines)
    groups = [[i] for i in range(int(circular.sum()))]
    mean = torch.zeros(int((~circular).sum()))
    return build_modules(settings, circular, groups, mean, torch.diag(mean))


def table(options: argparse.Namespace) -> None:
    """The table of all records, as markdown."""
    print(accuracy_table.table([json.loads(path.read_text("utf-8")) for path in options.records]))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(work: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        added = commands.add_parser(work.__name__, help=work.__doc__.splitlines()[0])
        added.set_defaults(work=work)
        return added

    one = command(measure)
    one.add_argument("flows", nargs="+", help="files, run directories, or names of pretrained flows")
    one.add_argument("--out", type=Path, required=True, help="directory of the records")
    one.add_argument("--n", type=int, default=1_000_000, help="draws at each temperature")
    one.add_argument("--temperatures", type=float, nargs="+", default=[300.0, 450.0, 600.0], metavar="K")
    one.add_argument("--seed", type=int, default=1, help="of the draws")
    one.add_argument("--model", help="name in the table; by default the kind of flow")
    one.add_argument("--run", type=Path, help="run directory that tells the costs; by default that of the file")
    for work in (spline, paper):
        one = command(work)
        one.add_argument("--out", type=Path, required=True, help="run directory")
        one.add_argument("--seed", type=int, default=1)
        one.add_argument("--frames", type=int, default=320_000)
        one.add_argument("--steps", type=int, default=6000, help="of the training")
        one.add_argument("--learning-rate", type=float, default=1e-3)
        one.add_argument("--hidden", type=int, help="width; by default that with --parameters")
        shipped = tsf.pretrained("ala2").n_parameters
        one.add_argument("--parameters", type=int, default=shipped, help="by default those of the shipped flow")
        if work is spline:
            one.add_argument("--spacing", type=int, default=50, help="fs between exchanges, and frames")
            one.add_argument("--equilibration", type=float, default=20.0, help="ps to drop")
        else:
            one.add_argument("--kind", choices=("tsf", "real-nvp"), required=True)
            one.add_argument("--frames-from", type=Path, required=True, metavar="RUN", help="run directory")
    one = command(table)
    one.add_argument("records", nargs="+", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    options = parse()
    options.work(options)
