"""Flows of alanine dipeptide trained at 600 K and what they draw below it, beside parallel tempering.

What figure 3 of arXiv 2108.01590 shows, and what its miss at positive phi comes from.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .architecture import FlowSettings
from .checkpoint import load_flow, save_flow
from .energy import BatchedEnergy
from .ensemble import draw
from .flow import Flow, build_flow
from .flow_steps import FlowSteps
from .ladder import geometric_ladder, mean_energy
from .portraits import Exact, Portrait, Rows, nearest, of_draws, of_walkers, steered_alone
from .records import ExchangeRecord
from .systems import Molecule
from .tempering import BatchedTempering
from .tempering_storage import run_tempering
from .training import Progress, TrainingSettings, train
from .trajectories import Frames
from .typing import Energy

TEMPERATURES = (300.0, 350.0, 424.0, 500.0, 600.0)
"""Where flows are drawn from [K]; the last is that of the training."""
FLOWS: Mapping[str, Mapping[str, Any]] = {
    "real-nvp": {"kind": "real-nvp"},
    "tsf": {"kind": "tsf"},
    "no-entropy": {"kind": "anharmonic", "entropy_order": 0},
    "entropy": {"kind": "anharmonic", "entropy_order": 4},
}
"""The flows compared, by what sets them apart: those of the paper, and ours without and with its entropies."""
CURVE = tuple(np.linspace(300.0, 600.0, 31).tolist())
"""Temperatures [K] of the energies that flows have taken for U."""
STORE_PS = 1.0
"""Time between stored frames of plain parallel tempering [ps]; with a flow each iteration stores."""
ITERATION_FS = 200.0
STEP = 0.005
"""Of the difference quotients of heat capacities, a share of the temperature."""


@dataclass(frozen=True)
class Study:
    """One flow, what it was trained on and what it says.

    Args:
        model: of the molecule; `flow`: name of the flow in `FLOWS`; `seed`: of frames, training and draws.
        n_parameters, n_frames, steps: of the flow and of its training.
        n_energy_evaluations: in training, frames not included.
        seconds: of training.
        frames: shares of phi > 0 and alpha_L among the training frames, see `portraits.of_walkers`.
        raw, reweighted: portraits of the draws at `TEMPERATURES`.
        curve: rows of `energy_curve`, none for a flow that does not steer exactly.
    """

    model: str
    flow: str
    seed: int
    n_parameters: int
    n_frames: int
    steps: int
    n_energy_evaluations: int
    seconds: float
    frames: dict[str, float]
    raw: list[Portrait]
    reweighted: list[Portrait]
    curve: Rows

    def at(self, temperature: float, *, weighted: bool = False) -> Portrait:
        """The portrait nearest to a temperature [K], as drawn or reweighted."""
        return nearest(self.reweighted if weighted else self.raw, temperature)

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Study:
        """What `to_json` gave."""
        stored = json.loads(text)
        portraits = {name: [Portrait(**portrait) for portrait in stored[name]] for name in ("raw", "reweighted")}
        return cls(**{**stored, **portraits})


def study(
    name: str, molecule: Molecule, frames: Frames, energy: Energy, *, model: str, steps: int, n_draws: int, seed: int,
    directory: Path, size: Mapping[str, int] | None = None, progress: Progress | None = None,
) -> Study:  # fmt: skip
    """Train one of `FLOWS` at the temperature of the frames, save it as `flow.tsf`, and look at its draws.

    Interrupted, it goes on from the checkpoint in the directory.

    Args:
        name: of the flow.
        molecule, frames, energy: as in `build_flow` and `train`.
        model: of the molecule, for the record.
        steps: of the training.
        n_draws: at each temperature.
        seed: of starting weights, batches and draws.
        directory: of the checkpoint and the flow.
        size: settings of the architecture besides those of `FLOWS`, the same for all that are compared.
        progress: as in `train`.
    """
    settings = FlowSettings(**FLOWS[name], **(size or {"blocks": 4, "hidden": 64}))
    generator, begin = torch.Generator().manual_seed(seed), time.perf_counter()
    flow = build_flow(molecule, frames, settings, generator=generator)
    history = train(flow, frames, energy, training_of(name, steps), directory=directory, seed=seed, progress=progress)
    seconds = time.perf_counter() - begin
    save_flow(flow, directory / "flow.tsf")
    curve = energy_curve(flow) if settings.steers else []
    return Study(
        model, name, seed, flow.n_parameters, len(frames), steps, history.n_energy_evaluations, seconds,
        of_walkers(frames, molecule), *drawn(flow, energy, n_draws, generator), curve,
    )  # fmt: skip


def training_of(name: str, steps: int) -> TrainingSettings:
    """How one of `FLOWS` is trained: those of the paper by the plain gradient, as there, ours by the path gradient."""
    estimator = "path" if FLOWS[name]["kind"] == "anharmonic" else "plain"
    return TrainingSettings(steps=steps, estimator=estimator, evaluate_every=max(1, min(100, steps // 4)))


def drawn(
    flow: Flow, energy: Energy, n: int, generator: torch.Generator, temperatures: Sequence[float] = TEMPERATURES
) -> tuple[list[Portrait], list[Portrait]]:
    """Portraits of n draws at each temperature, as drawn and reweighted."""
    raw, reweighted = [], []
    for temperature in temperatures:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a low ESS is part of the portrait
            ensemble = draw(flow, energy, temperature=temperature, n=n, generator=generator)
        raw.append(of_draws(ensemble, flow.molecule, weighted=False))
        reweighted.append(of_draws(ensemble, flow.molecule, weighted=True))
    return raw, reweighted


def energy_curve(flow: Flow, temperatures: Sequence[float] = CURVE) -> Rows:
    """<E> [kJ/mol], up to a constant, and dE/dT [kJ/mol/K] of the energy that a steerable flow has taken for U.

    From the normaliser of the prior, without draws: q_T = exp(-E/kT)/Z(T), and the map has no part in Z(T). Of a
    Gaussian prior of D coordinates it is a straight line of slope D k_B/2.
    """
    unit, rows = flow.kT(flow.training_temperature), []
    for temperature in temperatures:
        taus = (scale * temperature / flow.training_temperature for scale in (1.0 - STEP, 1.0, 1.0 + STEP))
        below, here, above = (float(unit * mean_energy(flow, tau)) for tau in taus)
        slope = (above - below) / (2.0 * STEP * temperature)
        rows.append({"temperature": temperature, "mean_energy": here, "heat_capacity": slope})
    return rows


def exchanged(
    molecule: Molecule, directory: Path, *, n_iterations: int, flow: Path | None = None,
    energy: BatchedEnergy | None = None, n_replicas: int = 32, n_proposals: int = 8, seed: int = 1,
    progress: Progress | None = None,
) -> ExchangeRecord:  # fmt: skip
    """Parallel tempering at five temperatures from 300 to 600 K, alone or with moves of a flow.

    It goes on from what is in the directory.

    Args:
        molecule: what to simulate.
        directory: of the run.
        n_iterations: in all, each of 200 fs.
        flow: file of the flow of the moves.
        energy: of the molecule, made if not given.
        n_replicas: at each temperature.
        n_proposals: draws of the flow for each walker and iteration.
        seed: of everything.
        progress: as in `run_tempering`.
    """
    tempering = BatchedTempering(
        molecule, geometric_ladder(300.0, 600.0, 5), energy=energy, flow=None if flow is None else load_flow(flow),
        steps=FlowSteps(n_proposals=n_proposals), n_replicas_per_temperature=n_replicas,
        n_dynamics_steps=round(ITERATION_FS), timestep_fs=1.0, seed=seed,
    )  # fmt: skip
    store_every = round(1000.0 * STORE_PS / ITERATION_FS) if flow is None else 1
    return run_tempering(tempering, directory, n_iterations, store_every=store_every, progress=progress)


@np.errstate(divide="ignore", invalid="ignore")  # what was never drawn, or never visited
def share_table(exact: Sequence[Exact], studies: Sequence[Study]) -> str:
    """Shares of phi > 0 [%]: as drawn at the highest and the lowest of `TEMPERATURES`, and reweighted at the lowest.

    Of flows the mean and its standard error over seeds, that of the draws where there is one. `cooling` is the share
    drawn over the exact one at the lowest temperature, divided by the same at the highest: what steering itself adds
    to a miss that the training left. The last column is the ESS at the lowest temperature [%].
    """
    cold, hot = TEMPERATURES[0], TEMPERATURES[-1]
    rows = [("", "", f"{hot:g} K", f"{cold:g} K", "cooling", f"{cold:g} K reweighted", "ESS")]
    for right in exact:
        values, errors = _shares([right.at(temperature) for temperature in (hot, cold)])
        alone = steered_alone(right.at(hot), cold)
        rows.append((right.model, right.source, *map(_cell, 100.0 * values[:, None], 100.0 * errors), "", "", ""))
        rows.append(("", "phi and psi steered alone", "", f"{100.0 * alone:.3f}", f"{alone / values[1]:.3f}", "", ""))
        for name in FLOWS:
            mine = [study for study in studies if (study.model, study.flow) == (right.model, name)]
            if mine:
                rows.append(("", name, *_row(mine, values, cold, hot)))
    return "\n".join(f"{r[0]:17}{r[1]:27}{r[2]:>17}{r[3]:>17}{r[4]:>17}{r[5]:>18}{r[6]:>6}" for r in rows)


def _row(studies: Sequence[Study], exact: np.ndarray, cold: float, hot: float) -> list[str]:
    """Cells of one flow; `exact` are the shares at the highest and the lowest temperature."""
    warm, cool = (_shares([study.at(temperature) for study in studies]) for temperature in (hot, cold))
    weighted = [study.at(cold, weighted=True) for study in studies]
    cooling = cool[0] / exact[1] / (warm[0] / exact[0])
    error = cooling[0] * np.hypot(warm[1][0] / warm[0][0], cool[1][0] / cool[0][0])
    shares = [_cell(100.0 * values, 100.0 * errors[0]) for values, errors in (warm, cool, _shares(weighted))]
    ess = np.mean([portrait.ess for portrait in weighted])
    return [*shares[:2], _cell(cooling, error), shares[2], f"{100.0 * ess:.1f}"]


def _shares(portraits: Sequence[Portrait]) -> np.ndarray:
    """(2, n) shares of phi > 0, and their errors."""
    return np.array([(portrait.positive, portrait.positive_error) for portrait in portraits]).T


def _cell(values: np.ndarray, error: float) -> str:
    """Mean and standard error over seeds; of one seed, the error given."""
    spread = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else error
    return f"{values.mean():.3f} +- {spread:.3f}"
