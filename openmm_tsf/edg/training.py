"""Training a generator on the energy alone; resumable to the bit."""

from __future__ import annotations

import copy
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from openmm_tsf.checks import whole
from openmm_tsf.edg.bound import MOST_LOST, BoundSample, check_target, kl_bound
from openmm_tsf.edg.generator import EDG
from openmm_tsf.edg.networks import Target
from openmm_tsf.edg.recognition import Known
from openmm_tsf.edg.scores import EnergyScore, PlainScore
from openmm_tsf.edg.walkers import Walkers, learn_from, near
from openmm_tsf.files import write_text
from openmm_tsf.nets import follow
from openmm_tsf.storage import read_state, write_state

Progress = Callable[[int, int, str], None]
MOST_LEFT_OUT = 20
"""Steps in a row without a finite gradient after which training gives up."""
HOT_SHARE = 0.2
"""Share of the steps after which the decoder has found the width of the target, and this is hot still."""
FAR_OFF = 2.5
"""By what factor `spread` may differ from that without a warning: beyond it mixtures of Gaussians may lose modes."""


@dataclass(frozen=True)
class EDGTrainingSettings:
    """How to train a generator. The defaults are meant for targets in two dimensions.

    Attributes:
        steps: number of optimiser steps.
        batch: draws in a step, two or more, each costing an energy and its gradient.
        times: of the diffusion for each draw.
        anneal_from: the target starts at 1/anneal_from times its temperature, so that no mode is lost before the
            decoder has seen it; the temperature falls geometrically to its own.
        anneal_share: share of the steps that takes; 0 for none of it.
        learning_rate: largest (AdamW); it rises over the first 2 % of the steps, and falls as a cosine to zero.
        weight_average: decay of the exponential average of the weights that is kept as the result.
        clip: largest norm of the gradient, as a multiple of the recent ones' average.
        soften_above: reduced energies above this pull like their logarithm only; None for never.
        walkers: at equilibrium with the target, hot as it is, which are learned from as well; see `walkers`.
            At most as many as draws in a step; 0 for none.
        trajectory: leapfrog steps of each walker in a step, each costing an energy and its gradient.
        record_every: steps between rows of the history, which average what lies between.
        checkpoint_every: steps between checkpoints.
    """

    steps: int = 4000
    batch: int = 1024
    times: int = 1
    anneal_from: float = 0.01
    anneal_share: float = 0.7
    learning_rate: float = 5e-3
    weight_average: float = 0.998
    clip: float = 3.0
    soften_above: float | None = None
    walkers: int = 0
    trajectory: int = 20
    record_every: int = 100
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        for name in ("steps", "times", "trajectory", "record_every", "checkpoint_every"):
            whole(f"training setting {name}", getattr(self, name))
        whole("training setting batch", self.batch, 2)
        whole("training setting walkers", self.walkers, 0)
        for name in ("learning_rate", "clip", "anneal_from"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"training setting {name} must be above 0, not {getattr(self, name):g}")
        if self.anneal_from > 1.0:
            raise ValueError(f"training setting anneal_from must be at most 1, not {self.anneal_from:g}: it begins hot")
        if self.soften_above is not None and not self.soften_above > 0:
            raise ValueError(f"training setting soften_above must be above 0, or None, not {self.soften_above:g}")
        for name in ("anneal_share", "weight_average"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"training setting {name} must be in [0, 1), not {getattr(self, name):g}")
        if not 0 <= self.walkers <= self.batch or self.walkers == 1:
            raise ValueError(f"there are 0 walkers, or 2 to batch = {self.batch}, not {self.walkers}")


@dataclass
class EDGHistory:
    """What training saw.

    Attributes:
        rows: with step, bound (less ln Z [nat], of the target as heated), energy, entropy, encoder, heat,
            learning_rate, width (of the draws: root mean variance of components of x), n_nonfinite, n_folded (of pairs:
            draws where the decoder folds space, so that the bound is none); and, of walkers, forward (mean ln w,
            at least ln Z at equilibrium), n_far (those left out of this mean, see `walkers.FAR`) and step_size.
        n_energy_evaluations: of the target; see `bound.BoundSample`.
        n_nonfinite: draws left out, since their energy or its gradient was not finite.
        n_left_out: steps left out, since the gradient by the parameters was not finite.
        seconds: of all calls together.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    n_energy_evaluations: int = 0
    n_nonfinite: int = 0
    n_left_out: int = 0
    seconds: float = 0.0


def train_edg(
    edg: EDG, target: Target, settings: EDGTrainingSettings | None = None, *, seed: int,
    directory: str | Path | None = None, temperatures: Sequence[float] = (1.0,), progress: Progress | None = None,
) -> EDGHistory:  # fmt: skip
    """Train a generator in place, by gradients of the bound in single precision.

    A step whose gradient is not finite changes no weights, and counts; many in a row end training without a result,
    since weights from the way down to the target's own temperature are no result.

    Args:
        edg: a generator; on return it holds the averaged weights.
        target: U at temperature 1.
        settings: see EDGTrainingSettings.
        seed: of all draws.
        directory: for checkpoints (`edg_training.pt`) and `history.json`; called again with the same arguments,
            training goes on from there with the same random numbers. Other settings, first weights and targets are
            noticed. None keeps nothing.
        temperatures: one, or the lowest and the highest of a range in which ln tau is uniform, for generators that are
            conditioned on temperature.
        progress: called with (steps done, steps, message).

    Raises:
        ValueError: a target of another dimension, temperatures that do not fit the generator, or a checkpoint of
            another run; walkers for a range of temperatures, or for a score that they cannot be learned with.
        RuntimeError: no draw of a step has a finite energy, or the gradients of `MOST_LEFT_OUT` steps in a row are not
            finite.

    Warns:
        UserWarning: steps were left out, more than `MOST_LOST` of all draws had no finite energy, or `spread` is far
            from the width of the hot target.
    """
    check_target(edg, target)
    trainer = _Trainer(edg, target, settings or EDGTrainingSettings(), seed, temperatures, directory)
    return trainer.run(progress or (lambda done, total, message: None))


class _Trainer:
    """The state of one training run. Networks in single precision, targets in what they are given."""

    def __init__(
        self, edg: EDG, target: Target, settings: EDGTrainingSettings, seed: int, temperatures: Sequence[float],
        directory: str | Path | None,
    ) -> None:  # fmt: skip
        self.result, self.target, self.settings = edg, target, settings
        self.range = _checked_range(temperatures, edg)
        if settings.walkers:
            _check_walking(edg, self.range)
        self.path = None if directory is None else Path(directory) / "edg_training.pt"
        self.edg = copy.deepcopy(edg).float()
        self.average = copy.deepcopy(self.edg)
        self.optimiser = torch.optim.AdamW(self.edg.parameters(), lr=settings.learning_rate, weight_decay=1e-4)
        self.generator = torch.Generator().manual_seed(seed)
        self.step, self.norm, self.left_out, self.history = 0, 0.0, 0, EDGHistory()
        self.recent: list[dict[str, float]] = []
        self.walkers: Walkers | None = None
        self.known: Known | None = None
        facts = {"seed": seed, "temperatures": list(self.range), "shapes": [list(p.shape) for p in edg.parameters()]}
        facts |= {"network": None if edg.settings is None else asdict(edg.settings), "start": _fingerprint(edg)}
        self.identity = json.dumps({"format": 2, **facts, **asdict(settings)})

    def run(self, progress: Progress) -> EDGHistory:
        settings = self.settings
        self._resume()
        before, begin = self.history.seconds, time.perf_counter()
        while self.step < settings.steps:
            sample, row = self._step()
            self._record(sample, row)
            self.history.seconds = before + time.perf_counter() - begin
            if self.step % settings.checkpoint_every == 0 or self.step == settings.steps:
                self._save()
            progress(self.step, settings.steps, f"bound {sample.value:.3f}")
        for message in self._doubts():
            warnings.warn(message, stacklevel=3)
        self.result.load_state_dict(self.average.state_dict())
        self.result.temperatures = self.range if self.result.conditioned else None
        return self.history

    def _doubts(self) -> list[str]:
        """What speaks against the result, in sentences."""
        found, settings = [], self.settings
        if left_out := self.history.n_left_out:
            found.append(f"{left_out} of {settings.steps} steps were left out: their gradient is not finite")
        lost, drawn = self.history.n_nonfinite, settings.steps * settings.batch
        if lost > MOST_LOST * drawn:
            found.append(
                f"{lost} of {drawn} draws of training ({100 * lost / drawn:.2g} %) had an energy that is not finite "
                "and taught nothing: the generator does not know these places; look for what is wrong with the energy"
            )
        rows, spread = self.history.rows, getattr(self.edg.decoder, "spread", None)
        early = [row for row in rows if row["step"] <= HOT_SHARE * settings.steps] or rows[:1]
        hot = early[-1]["width"]
        if spread is not None and not hot / FAR_OFF <= spread <= hot * FAR_OFF:
            found.append(
                f"spread = {spread:.3g} is far from the width of the draws while the target was hot, {hot:.3g}: modes "
                "may have been lost early on, which no weight shows; build the generator with "
                f"spread = {hot:.2g} and train it again"
            )
        return found

    def _step(self) -> tuple[BoundSample, dict[str, float]]:
        """One step of the optimiser: the bound, and what else there is to record."""
        settings = self.settings
        self._set_rate()
        tau = self._heat() * self._temperatures()
        above = math.inf if settings.soften_above is None else settings.soften_above
        options = {"times": settings.times, "soften_above": above, "generator": self.generator}
        sample = kl_bound(self.edg, self.target, settings.batch, tau=tau, **options)
        loss, row = self._with_walkers(sample) if settings.walkers else (sample.loss, {})
        self.optimiser.zero_grad()
        loss.backward()
        limit = settings.clip * self.norm if self.norm else math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.edg.parameters(), limit))
        self.step += 1
        if not math.isfinite(norm):
            self._leave_out()
            return sample, row
        self.left_out = 0
        self.norm = min(norm, limit) if not self.norm else 0.98 * self.norm + 0.02 * min(norm, limit)
        self.optimiser.step()
        follow(self.average.parameters(), self.edg.parameters(), self.settings.weight_average, self.step)
        return sample, row

    def _with_walkers(self, sample: BoundSample) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of draws and walkers, each counting as much, and what there is to record."""
        settings, seeded = self.settings, {"generator": self.generator}
        if self.walkers is None:
            # again from the first, where a step has fewer finite draws
            self.walkers = Walkers(sample.x[torch.arange(settings.walkers) % len(sample.x)])
        walkers = self.walkers
        heat = {"tau": self._heat()}
        energy = walkers.move(self.target, settings.trajectory, **heat, **seeded)
        self.history.n_energy_evaluations += len(energy) * (settings.trajectory + 1)
        loss, log_weights = learn_from(self.edg, walkers.x, energy, **heat, **seeded)
        walkers.offer(sample.x, sample.log_weights, log_weights, **seeded)
        close = near(log_weights)
        row = {"forward": float(log_weights[close].mean()), "n_far": float((~close).sum()), "step_size": walkers.step}
        share = len(energy) / (len(energy) + settings.batch)
        return (1.0 - share) * sample.loss + share * loss, row

    def _leave_out(self) -> None:
        """Count a step without a finite gradient; raises where there were many in a row."""
        self.left_out += 1
        self.history.n_left_out += 1
        if self.left_out == MOST_LEFT_OUT:
            raise RuntimeError(
                f"the gradients of {MOST_LEFT_OUT} steps in a row, up to step {self.step}, are not finite; a smaller "
                "learning_rate, another spread, or a target that is softer where it is steepest may help"
            )

    def _set_rate(self) -> None:
        """Learning rate of this step."""
        settings, done = self.settings, self.step / self.settings.steps
        rise = min(1.0, (done + 1.0 / settings.steps) / 0.02)
        for group in self.optimiser.param_groups:
            group["lr"] = settings.learning_rate * rise * 0.5 * (1.0 + math.cos(math.pi * done))

    def _heat(self) -> float:
        """How many times hotter than it should be the target is."""
        settings = self.settings
        done = self.step / (settings.steps * settings.anneal_share) if settings.anneal_share else 1.0
        return settings.anneal_from ** -max(0.0, 1.0 - done)

    def _temperatures(self) -> torch.Tensor:
        low, high = (math.log(t) for t in self.range)
        return torch.exp(low + (high - low) * torch.rand(self.settings.batch, generator=self.generator))

    def _record(self, sample: BoundSample, row: dict[str, float]) -> None:
        history = self.history
        history.n_energy_evaluations += sample.n_energy_evaluations
        history.n_nonfinite += sample.n_nonfinite
        names = ("energy", "entropy", "encoder", "n_nonfinite", "n_folded")
        parts = {name: float(getattr(sample, name)) for name in names}
        parts["width"] = float(sample.x.var(0, correction=0).mean().sqrt())
        self.recent.append({"bound": sample.value, **parts, **row})
        if self.step % self.settings.record_every and self.step != self.settings.steps:
            return
        means = {name: sum(row[name] for row in self.recent) / len(self.recent) for name in self.recent[-1]}
        rate = self.optimiser.param_groups[0]["lr"]
        history.rows.append({"step": self.step, **means, "heat": self._heat(), "learning_rate": rate})
        self.recent = []

    def _save(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.known is None:
            self.known = Known.of(self.target, self.average)
            self.history.n_energy_evaluations += len(self.known.points)
        state = {
            "identity": self.identity, "step": self.step, "norm": self.norm, "left_out": self.left_out,
            "edg": self.edg.state_dict(), "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(), "generator": self.generator.get_state(), "recent": self.recent,
            "history": asdict(self.history), "target": [self.known.points, self.known.energies],
            "walkers": None if self.walkers is None else {"x": self.walkers.x, "step": self.walkers.step},
        }  # fmt: skip
        write_state(self.path, state)
        write_text(self.path.parent / "history.json", json.dumps(asdict(self.history), indent=1))

    def _resume(self) -> None:
        """Go on from the checkpoint in the directory, if there is one."""
        if self.path is None or not self.path.exists():
            return
        state = read_state(self.path)
        if state["identity"] != self.identity:
            raise ValueError(f"{self.path} belongs to a run with other settings; use another directory or delete it")
        self.known = Known(*state["target"])
        if (difference := self.known.difference(self.target)) is not None:
            raise ValueError(f"{self.path} belongs to a run with another target: {difference}")
        self.edg.load_state_dict(state["edg"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])
        self.step, self.norm, self.recent = state["step"], state["norm"], state["recent"]
        self.left_out = state["left_out"]
        self.history = EDGHistory(**state["history"])
        if state["walkers"] is not None:
            self.walkers = Walkers(**state["walkers"])


def _fingerprint(edg: EDG) -> str:
    """A few digits that tell the first weights of a generator from others."""
    return f"{sum(float(p.detach().double().abs().sum()) for p in edg.parameters()):.6g}"


def _check_walking(edg: EDG, temperatures: tuple[float, float]) -> None:
    """Refuse walkers where they cannot be learned from.

    Raises:
        ValueError: temperatures other than 1 or as an input, or a score whose base knows nothing of x.
    """
    if temperatures != (1.0, 1.0):
        raise ValueError(f"walkers live at one temperature, tau = 1, not {list(temperatures)}")
    if edg.conditioned:
        raise ValueError("walkers need a generator of one temperature, not one with conditioned=True")
    if isinstance(edg.score, (PlainScore, EnergyScore)):
        raise ValueError("walkers need latents from a base that knows x; the plain and the energy score have none")


def _checked_range(temperatures: Sequence[float], edg: EDG) -> tuple[float, float]:
    """The lowest and the highest temperature.

    Raises:
        ValueError: not one or two in ascending order above 0, or a range for a generator of one temperature.
    """
    values = [float(t) for t in temperatures]
    if len(values) not in (1, 2) or values != sorted(values) or not 0.0 < values[0] <= values[-1] < math.inf:
        raise ValueError(f"temperatures must be one, or the two ends of a range above 0, not {values}")
    if (values[0], values[-1]) != (1.0, 1.0) and not edg.conditioned:
        raise ValueError(f"a range of temperatures {values} needs a generator with conditioned=True")
    return values[0], values[-1]
