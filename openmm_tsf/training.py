"""Training a flow on frames and energies, as a rule at the training temperature; resumable to the bit."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .cuts import CutInternals
from .files import write_text
from .flow import Flow, flow_digest
from .losses import Divergence, energy_loss, likelihood_loss, slopes_of
from .nets import follow
from .pretraining import pretrain
from .storage import read_state, write_state
from .trajectories import Frames
from .typing import Energy
from .vectors import Samples
from .weights import effective_sample_size

Progress = Callable[[int, int, str], None]
FORMAT = 2
"""Of checkpoints."""
JUDGED_BY = 4096
"""Draws behind the ESS and the energy loss that training reports, and judges itself by."""

AT_ONCE = 16384
"""Frames whose forces are computed between two reports of progress."""


@dataclass(frozen=True)
class TrainingSettings:
    """How to train. The defaults are meant for alanine dipeptide and its like.

    Attributes:
        steps: number of optimiser steps.
        batch_frames: frames in a step.
        batch_draws: draws in a step, each costing one energy and its forces.
        flatten: half of the draws of a step have their torsions from a density flattened as if pairs of torsions were
            so many times as hot, so that rare basins are learnt as well as common ones; 1 for none of it.
        energy_weight: final weight of the energy loss; the likelihood has the rest.
        energies_at: temperatures of the energy loss [K], which take turns; none for that of training alone. Several
            tell what of a conformation's weight is energy and what is entropy, which one temperature hardly does.
        ramp_start, ramp_end: share of the steps where the energy weight starts to rise and where it is full.
        learning_rate: largest of the one-cycle schedule (AdamW).
        weight_average: decay of the exponential average of the weights that is kept as the result.
        clip: largest norm of the gradient.
        held_out: share of the frames, the latest in time, that never trains.
        evaluate_every: steps between evaluations of the held-out frames.
        estimator: of the gradient: "path", which needs the forces at the frames and has no noise once the flow is
            right, or "plain"; see `losses`. By default "plain" for flows whose torsions are cut open, else "path".
        patience: evaluations without a better score after which training stops; the score is the held-out nll and the
            energy loss of fresh draws, at their final weights.
        checkpoint_every: steps between checkpoints.
    """

    steps: int = 1200
    batch_frames: int = 512
    batch_draws: int = 464
    flatten: float = 2.0
    energy_weight: float = 0.5
    energies_at: tuple[float, ...] = ()
    ramp_start: float = 0.1
    ramp_end: float = 0.4
    learning_rate: float = 2e-3
    weight_average: float = 0.99
    clip: float = 10.0
    estimator: Literal["path", "plain"] | None = None
    held_out: float = 0.1
    evaluate_every: int = 100
    patience: int = 20
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "batch_frames", "batch_draws", "evaluate_every", "patience", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"training setting {name} must be at least 1, not {getattr(self, name)}")
        if not (math.isfinite(self.flatten) and self.flatten >= 1):
            raise ValueError(f"training setting flatten must be at least 1, not {self.flatten:g}")
        for name in ("learning_rate", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"training setting {name} must be above 0, not {getattr(self, name):g}")
        if not 0 <= self.ramp_start <= self.ramp_end <= 1:
            raise ValueError(f"need 0 <= ramp_start <= ramp_end <= 1, not {self.ramp_start:g} and {self.ramp_end:g}")
        for name, top in (("energy_weight", 1.0), ("held_out", 0.9), ("weight_average", 1.0)):
            if not 0 <= getattr(self, name) <= top or (name != "energy_weight" and getattr(self, name) == 1.0):
                raise ValueError(f"training setting {name} must be between 0 and {top:g}, not {getattr(self, name):g}")
        for kelvin in self.energies_at:
            if not (math.isfinite(kelvin) and kelvin > 0.0):
                raise ValueError(f"training setting energies_at must be temperatures above 0 K, not {kelvin:g} K")
        if self.estimator not in ("path", "plain", None):
            raise ValueError(f'training setting estimator must be "path" or "plain", not {self.estimator!r}')
        if self.held_out == 0:
            raise ValueError("training setting held_out must be above 0: held-out frames decide when to stop")

    def takes_paths(self, kind: str, *, cut: bool) -> bool:
        """Whether gradients are path gradients, for a flow of this kind whose torsions are cut open or not.

        Raises:
            ValueError: they are asked for where they would be wrong.
        """
        if cut and self.estimator == "path":
            raise ValueError(
                f'estimator = "path" is wrong for flows of kind {kind!r}, whose torsions are cut open where frames '
                'still are; leave it out, or take "plain"'
            )
        return not cut if self.estimator is None else self.estimator == "path"


@dataclass
class History:
    """What training saw: rows with step, loss, held_out_nll, ess_train, energy_loss and learning_rate.

    `diverged_at` is the step where nothing was finite any more; the result is then the best from before.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    n_energy_evaluations: int = 0
    best_step: int = 0
    stopped_early: bool = False
    diverged_at: int | None = None

    def to_json(self) -> str:
        """JSON text; what is not known yet (the ESS before the first draw) is null there."""
        rows = [{k: None if math.isnan(v) else v for k, v in row.items()} for row in self.rows]
        return json.dumps({**asdict(self), "rows": rows}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> History:
        """What `to_json` gave."""
        stored = json.loads(text)
        rows = [{k: math.nan if v is None else v for k, v in row.items()} for row in stored["rows"]]
        return cls(**{**stored, "rows": rows})


def train(
    flow: Flow, frames: Frames | Samples, energy: Energy, settings: TrainingSettings | None = None, *,
    directory: str | Path, seed: int, fresh: bool = True, progress: Progress | None = None,
) -> History:  # fmt: skip
    """Train a flow in place: likelihood of frames, then likelihood and energy loss.

    The weights with the best score on held-out frames and fresh draws are kept. Checkpoints go to
    `directory/training_state.pt`; called again with the same arguments, training goes on from there with the same
    random numbers.

    Args:
        flow: an untrained flow (`build_flow`, `build_vector_flow`), or a trained one where not `fresh`; on return it
            holds the result.
        frames: each with its own temperature; the latest `held_out` share steers and never trains.
        energy: U [kJ/mol]; of a model system, in the unit of its temperatures.
        settings: see TrainingSettings.
        directory: for checkpoints and `history.json`.
        seed: of batches and draws.
        fresh: False goes on from the weights that the flow has, without pretraining.
        progress: called with (steps done, steps, message).

    Raises:
        ValueError: frames off the chart, or a checkpoint in `directory` of another run.
        Divergence: the gradient is not finite, or no draw has a finite energy, before there is a result to keep.

    Warns:
        UserWarning: the same, with a result to keep.
    """
    trainer = _Trainer(flow, frames, energy, settings or TrainingSettings(), Path(directory), seed, fresh)
    trainer.resume()
    return trainer.run(progress or (lambda done, total, message: None))


class _Trainer:
    """The state of one training run. Single precision throughout: twice as fast, and the result is exact in double."""

    def __init__(
        self, flow: Flow, frames: Frames | Samples, energy: Energy, settings: TrainingSettings, directory: Path,
        seed: int, fresh: bool,
    ) -> None:  # fmt: skip
        self.target, self.energy, self.settings, self.directory = flow, energy, settings, directory
        self.fresh, self.energies_at = fresh, settings.energies_at or (flow.training_temperature,)
        early, late = frames.split(settings.held_out)
        self.q, self.temperatures = _internals(flow, early)
        q, temperatures = _internals(flow, late)
        thin = max(1, len(q) // 5000)
        self.held_out = q[::thin], temperatures[::thin]
        self.flow = copy.deepcopy(flow).float()
        self.average = copy.deepcopy(self.flow)
        self.optimiser = torch.optim.AdamW(self.flow.parameters(), lr=settings.learning_rate, weight_decay=1e-4)
        rise = max(0.1, min(2.0 / settings.steps, 0.9))  # of two steps at least: with one the schedule divides by zero
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, settings.learning_rate, total_steps=settings.steps, pct_start=rise
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.history, self.step, self.loss = History(), 0, math.nan
        self.best = (math.inf, copy.deepcopy(self.flow.state_dict()))
        facts = {"format": FORMAT, "seed": seed, "frames": _digest(frames), "temperature": flow.training_temperature}
        facts |= {"flow": asdict(flow.settings), "zmatrix": str(flow.zmatrix)}
        facts |= {"start": None if fresh else flow_digest(flow)}
        self.identity = json.dumps({**facts, **asdict(settings)})
        self.start = self._highest_energy(early)  # clashes of draws are softened from here on
        self.path = settings.takes_paths(flow.settings.kind, cut=isinstance(flow.internals, CutInternals))
        self.slopes: Tensor | None = None

    def _highest_energy(self, frames: Frames | Samples) -> float:
        """Highest reduced energy [kT] of a few hundred frames."""
        some = slice(None, None, max(1, len(frames.positions) // 256))
        u = self.energy(torch.tensor(frames.positions[some], dtype=torch.float64))
        return float((u / self.target.kT(torch.tensor(frames.temperatures[some]))).max())

    def run(self, progress: Progress) -> History:
        settings = self.settings
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.path and self.step < settings.steps and not self.history.stopped_early:
            self.slopes = self._forces(progress)
        if self.step == 0:
            self.history.n_energy_evaluations = 0 if self.slopes is None else len(self.slopes)
            if self.fresh:
                self._pretrain()
        while self.step < settings.steps and not self.history.stopped_early:
            try:
                self._step()
                if self.step % settings.evaluate_every == 0 or self.step == settings.steps:
                    self._evaluate()
            except Divergence as error:
                self._give_up(error)
            if self.step % settings.checkpoint_every == 0:
                self._save()
            progress(self.step, settings.steps, self._message())
        self._save()
        if math.isinf(self.best[0]):
            raise Divergence("no evaluation gave a finite score of held-out frames; look at the frames")
        self.target.load_state_dict(self.best[1])
        return self.history

    def _forces(self, progress: Progress) -> Tensor:
        """Derivatives (frames, D) of U/kT by the internals, at the frames; they are not kept in files."""
        slopes: list[Tensor] = []
        for q, temperatures in zip(self.q.split(AT_ONCE), self.temperatures.split(AT_ONCE), strict=True):
            done = AT_ONCE * len(slopes)
            progress(self.step, self.settings.steps, f"forces at the frames, {done:,} of {len(self.q):,}")
            slopes.append(slopes_of(self.target, self.energy, q, temperatures))
        return torch.cat(slopes)

    def _pretrain(self) -> None:
        start = copy.deepcopy(self.flow)
        tau = self.temperatures / self.target.training_temperature
        pretrain(start, self.q, tau, flatten=self.settings.flatten, generator=self.generator)
        for flow in (self.flow, self.average):
            flow.load_state_dict(start.state_dict())

    def _step(self) -> None:
        settings = self.settings
        weight = self._weight()
        rows = torch.randint(len(self.q), (settings.batch_frames,), generator=self.generator)
        loss = likelihood_loss(
            self.flow, self.q[rows], self.temperatures[rows], generator=self.generator,
            slopes=None if self.slopes is None else self.slopes[rows],
        ).mean()  # fmt: skip
        total = (1.0 - weight) * loss
        if weight > 0.0:
            drawn = energy_loss(
                self.flow, self.energy, self.energies_at[self.step % len(self.energies_at)], settings.batch_draws,
                start=self.start, flatten=settings.flatten, path=self.path, generator=self.generator,
            )  # fmt: skip
            total = total + weight * drawn.surrogate
            self.history.n_energy_evaluations += settings.batch_draws
        self.optimiser.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.flow.parameters(), settings.clip)
        if not torch.isfinite(norm):
            raise Divergence(
                f"the gradient is not finite at step {self.step}; more frames, or a smaller learning_rate or "
                "energy_weight, may help"
            )
        self.optimiser.step()
        self.schedule.step()
        self.step += 1
        self.loss = float(loss.detach())
        follow(self.average.parameters(), self.flow.parameters(), self.settings.weight_average, self.step)

    @torch.no_grad()
    def _evaluate(self) -> None:
        momenta = torch.Generator().manual_seed(0)  # the same each time, so that evaluations differ by the flow alone
        nll = float(likelihood_loss(self.average, *self.held_out, generator=momenta).mean())
        energy, ess = self._draws()
        row = {"step": self.step, "loss": self.loss, "held_out_nll": nll, "energy_loss": energy, "ess_train": ess}
        self.history.rows.append(row | {"learning_rate": self.schedule.get_last_lr()[0]})
        weight = self.settings.energy_weight
        score = (1.0 - weight) * nll + (weight * energy if weight else 0.0)
        if score < self.best[0]:
            self.best = (score, copy.deepcopy(self.average.state_dict()))
            self.history.best_step = self.step
        elif self.step - self.history.best_step >= self.settings.patience * self.settings.evaluate_every:
            self.history.stopped_early = True

    def _draws(self) -> tuple[float, float]:
        """Energy loss [nat], a mean over temperatures, and ESS at the first of them, of draws from the average; NaN
        where there are none, or energies do not train."""
        if self.settings.energy_weight == 0.0:
            return math.nan, math.nan
        losses, ess = [], []
        for kelvin in self.energies_at:
            self.history.n_energy_evaluations += JUDGED_BY
            try:
                drawn = energy_loss(
                    self.average, self.energy, kelvin, JUDGED_BY, start=self.start, flatten=1.0, path=False,
                    generator=torch.Generator().manual_seed(0),
                )  # fmt: skip
            except Divergence:  # no score; if it stays so, the steps will say it
                return math.nan, 0.0
            losses.append(drawn.value)
            ess.append(float(effective_sample_size(drawn.log_weights.double())))
        return sum(losses) / len(losses), ess[0]

    def _give_up(self, error: Divergence) -> None:
        """Stop with the best weights so far; raises the error again where there are none."""
        if math.isinf(self.best[0]):
            raise error
        self.history.stopped_early, self.history.diverged_at = True, self.step
        warnings.warn(
            f"training stopped, and the weights of step {self.history.best_step} are kept: {error}", stacklevel=4
        )

    def _weight(self) -> float:
        """Weight of the energy loss at this step."""
        settings = self.settings
        ramp = (self.step / settings.steps - settings.ramp_start) / max(settings.ramp_end - settings.ramp_start, 1e-9)
        return settings.energy_weight * min(max(ramp, 0.0), 1.0)

    def _message(self) -> str:
        if not self.history.rows:
            return f"loss {self.loss:.2f}"
        row = self.history.rows[-1]
        return f"loss {self.loss:.2f}  held-out {row['held_out_nll']:.2f}  ESS {row['ess_train']:.0%}"

    def _save(self) -> None:
        state = {
            "identity": self.identity, "step": self.step, "flow": self.flow.state_dict(),
            "average": self.average.state_dict(), "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(), "generator": self.generator.get_state(), "best": self.best,
            "loss": self.loss, "history": asdict(self.history),
        }  # fmt: skip
        write_state(self.directory / "training_state.pt", state)
        write_text(self.directory / "history.json", self.history.to_json())

    def resume(self) -> None:
        """Go on from the checkpoint in the directory, if there is one."""
        path = self.directory / "training_state.pt"
        if not path.exists():
            return
        state = read_state(path)
        if state["identity"] != self.identity:
            raise ValueError(
                f"{path} belongs to a run with other settings or frames, or of another version of this program; use "
                "another directory or delete it"
            )
        self.flow.load_state_dict(state["flow"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        self.step, self.best, self.loss = state["step"], tuple(state["best"]), state["loss"]
        self.history = History(**state["history"])


def _digest(frames: Frames | Samples) -> str:
    """What tells these frames from others."""
    return hashlib.sha256(frames.positions.tobytes() + frames.temperatures.tobytes()).hexdigest()


def _internals(flow: Flow, frames: Frames | Samples) -> tuple[Tensor, Tensor]:
    """Internals (frames on the chart, D) and temperatures in single precision."""
    q, kept = flow.internals.of_frames(frames.positions)
    return q[kept].float(), torch.tensor(frames.temperatures, dtype=torch.float32)[kept]
