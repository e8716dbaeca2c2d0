"""Refinement of a trained flow at one target temperature, on its own weighted draws; resumable to the bit.

The architecture stays what it was, so a flow that steers goes on steering exactly; what it has learnt is what holds at
the target, and it may be worse elsewhere.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .architecture import cannot_explore
from .checkpoint import load_flow, save_flow
from .coverage import Coverage, find_wells, shares
from .ensemble import LEAST_ESS, Ensemble, draw
from .files import write_text
from .flow import Flow, flow_digest
from .pretraining import refit_torsions
from .proposals import join_momenta
from .refinement_record import Refinement, Round
from .settings import stage_seed
from .training import History, Progress, TrainingSettings, train
from .trajectories import Frames
from .typing import Energy
from .units import to_kelvin
from .weights import systematic_resample

IDENTITY = "refinement.json"
"""What a directory was begun with."""
STILL = 2.0
"""Standard errors by which the negative log-likelihood may rise."""
FEWEST = 20
"""Effective draws that the first round must have to train on."""


class OutOfReach(ValueError):
    """A flow that is too far from the target to be refined by its own weighted draws."""


@dataclass(frozen=True)
class RefinementSettings:
    """How to refine.

    Attributes:
        n: draws of each round; the more, the smaller the error of the ESS that decides when to stop.
        also: other temperatures [K], of n draws each that tell energies of conformations from entropies in the end,
            see `fit_shares`. Rounds train at the target alone: energies elsewhere make it worse there.
        rounds: at most.
        explore: share of the draws, before the first round, that are spread over all basins; see `Coverage`. None in
            kinds of flows that cannot: basins that these hardly draw go unwatched.
        training: of a round. There is no ramp to wait for, and weights that are good already take smaller steps.
    """

    n: int = 50_000
    also: tuple[float, ...] = ()
    rounds: int = 6
    explore: float = 0.1
    training: TrainingSettings = field(
        default_factory=lambda: TrainingSettings(
            steps=400, learning_rate=5e-4, ramp_start=0.0, ramp_end=0.0, evaluate_every=50
        )
    )

    def __post_init__(self) -> None:
        for name, least in (("n", 100), ("rounds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"refinement setting {name} must be at least {least}, not {getattr(self, name)}")
        for kelvin in self.also:
            if not (math.isfinite(kelvin) and kelvin > 0.0):
                raise ValueError(f"refinement setting also must be temperatures above 0 K, not {kelvin:g} K")
        if not 0.0 < self.explore < 1.0:
            raise ValueError(f"refinement setting explore must be between 0 and 1, not {self.explore:g}")


def refine(
    flow: Flow, energy: Energy, temperature: Any, settings: RefinementSettings | None = None, *,
    directory: str | Path, seed: int, progress: Progress | None = None,
) -> Refinement:  # fmt: skip
    """Refine a trained flow in place at a temperature.

    A round draws from the flow, takes the weighted draws of all rounds for frames at the target, and trains on these
    and on energies there. Its ESS is that of draws made afterwards. Rounds go on until it stops rising by more than its
    error. A round is undone, and ends the refinement, when the ESS falls, when the weighted negative log-likelihood of
    the first draws rises, or when the share of a well leaves what these say of it: they come from the steered flow and
    were spread over all basins. In the end the torsions are given the distributions of the weighted draws of the best
    flow (`fit_shares`), which is judged like a round, but that the ESS may stay as it is.

    Args:
        flow: a trained flow of a molecule; on return it holds the result.
        energy: U [kJ/mol].
        temperature: of the target [K, or a Quantity].
        settings: see RefinementSettings.
        directory: for what an interrupted refinement goes on from; called again with the same arguments, it ends with
            the same bits. No longer needed once it has ended.
        seed: of everything random.
        progress: called with (steps done, steps, message).

    Warns:
        UserWarning: this kind of flow cannot explore, so that rare basins go unwatched.

    Raises:
        OutOfReach: the ESS is below a per cent to begin with.
        ValueError: `directory` holds another refinement, or a damaged file.
        RuntimeError: the loss is not finite, or almost no draw lies on the flow's chart.
    """
    kelvin = to_kelvin(temperature)
    refiner = _Refiner(flow, energy, kelvin, settings or RefinementSettings(), Path(directory), seed)
    return refiner.run(progress or (lambda done, total, message: None))


class _Refiner:
    """One refinement. Whatever takes time is a file in the directory: made where it is not there, and always read."""

    def __init__(
        self, flow: Flow, energy: Energy, temperature: float, settings: RefinementSettings, directory: Path, seed: int
    ) -> None:
        self.target, self.energy, self.temperature, self.settings = flow, energy, temperature, settings
        self.directory, self.seed = directory, seed
        self.best, self.rounds = flow, []
        self.buffers: list[Ensemble] = []

    def run(self, progress: Progress) -> Refinement:
        n_rounds, n_steps = self.settings.rounds, self.settings.rounds * self.settings.training.steps
        self._claim()
        progress(0, n_steps, f"drawing at {self.temperature:g} K")
        coverage = self._begin()
        for number in range(1, n_rounds + 1):
            stopped = self._judge(number, *self._trained(number, progress), coverage)
            if stopped is not None:
                break
        else:
            stopped = f"no more than {n_rounds} round{'s' * (n_rounds > 1)} had been asked for"
        progress(n_steps, n_steps, "fitting shares")
        fitted = self._fitted(coverage)
        progress(n_steps, n_steps, stopped)
        self.target.load_state_dict(self.best.state_dict())
        exact, measured = coverage.exact, [*self.rounds, *([fitted] if fitted else [])]
        return Refinement(
            temperature=self.temperature, rounds=tuple(self.rounds), wells=tuple(map(str, coverage.wells)),
            shares=tuple(exact.value.tolist()), share_errors=tuple(exact.error.tolist()), fitted=fitted,
            stopped=stopped,
            n_energy_evaluations=sum(r.n_energy_evaluations for r in measured),
        )  # fmt: skip

    def _claim(self) -> None:
        """Make the directory, or see that what is in it was begun with the same arguments."""
        facts = {"seed": self.seed, "temperature": self.temperature, "flow": flow_digest(self.best)}
        identity, path = json.dumps({**facts, **asdict(self.settings)}), self.directory / IDENTITY
        self.directory.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.read_text("utf-8") != identity:
            raise ValueError(
                f"{self.directory} belongs to a refinement of another flow or with other settings; use another "
                "directory or delete it"
            )
        write_text(path, identity)

    def _begin(self) -> Coverage:
        """Measure the flow as it came, and what it covers."""
        plain = self._draws("plain_0", self.best)
        if plain.ess < LEAST_ESS:
            trained = self.best.training_temperature
            nearer = "" if self.temperature == trained else f", or refine nearer to the {trained:g} K of its training"
            raise OutOfReach(
                f"{self.temperature:g} K is out of reach of refinement: the ESS of the flow is {100 * plain.ess:.2g} % "
                f"there, and it takes {100 * LEAST_ESS:g} %; train longer{nearer}"
            )
        can = self.best.settings.explores
        if not can:
            why = cannot_explore(self.best.settings)
            warnings.warn(f"basins that the flow hardly draws go unwatched: {why}", stacklevel=4)
        cover = self._draws("cover", self.best, self.settings.explore if can else 0.0)
        if (effective := cover.n_effective + plain.n_effective) < FEWEST:
            raise OutOfReach(
                f"{2 * self.settings.n} draws at {self.temperature:g} K are worth {effective:.0f}, and refinement "
                f"takes {FEWEST}; draw more (-n) or train longer"
            )
        wells = find_wells(cover, self.best.zmatrix)
        coverage = Coverage(cover, wells, shares(wells, plain.positions))
        self.log_prob = coverage.log_prob(self.best)
        self.buffers = [cover, plain]
        self.rounds.append(_round(plain, (0.0, 0.0), coverage.start, kept=True, n_more=len(cover)))
        return coverage

    def _trained(self, number: int, progress: Progress) -> tuple[Flow, int]:
        """The best flow after a round of training, and the energies that it took."""
        folder, steps = self.directory / f"round_{number}", self.settings.training.steps
        path, shown = folder / "flow.tsf", f"round {number}, ESS {self._kept.ess:.1%} so far"

        def report(done: int, total: int, message: str) -> None:
            progress((number - 1) * steps + done, self.settings.rounds * steps, f"{shown}; {message}")

        if not path.exists():
            flow = copy.deepcopy(self.best).requires_grad_(True)  # it may come frozen, for drawing
            training = replace(self.settings.training, energies_at=(self.temperature,))
            frames = joint_frames(self.buffers, self._generator(f"frames {number}"))
            train(
                flow, frames, self.energy, training, directory=folder, progress=report,
                seed=stage_seed(self.seed, f"training {number}"), fresh=False,
            )  # fmt: skip
            save_flow(flow, path)
        report(steps, steps, "drawing")
        history = History.from_json((folder / "history.json").read_text("utf-8"))
        return load_flow(path, dtype=self.best.dtype), history.n_energy_evaluations

    def _judge(self, number: int, flow: Flow, n_more: int, coverage: Coverage) -> str | None:
        """Keep a flow or not; why there are no more rounds, None if there are."""
        old = self._kept
        new, problem = self._measured(f"plain_{number}", flow, n_more, coverage)
        self.rounds.append(new)
        if problem is not None:
            return f"round {number} was undone: {problem}"
        if new.ess - old.ess <= math.hypot(new.ess_error, old.ess_error):
            return f"the ESS rose by no more than its error in round {number}"
        return None

    def _fitted(self, coverage: Coverage) -> Round | None:
        """The best flow with its torsions fitted to its own draws; None where they have no potentials."""
        path = self.directory / "fitted.tsf"
        if not self.best.prior.n_soft:
            return None
        elsewhere = [self._draws(f"also_{kelvin:g}K", self.best, at=kelvin) for kelvin in self.settings.also]
        if not path.exists():
            flow = copy.deepcopy(self.best).requires_grad_(True)
            fit_shares(flow, [self.buffers[-1], *elsewhere], self._generator("shares"))
            save_flow(flow, path)
        flow, n_more = load_flow(path, dtype=self.best.dtype), sum(map(len, elsewhere))
        return self._measured("plain_fitted", flow, n_more, coverage, slack=STILL)[0]

    def _measured(
        self, name: str, flow: Flow, n_more: int, coverage: Coverage, *, slack: float = 0.0
    ) -> tuple[Round, str | None]:
        """Draw from a flow and, unless there is a problem, take it for the best one. ESS may fall by `slack` errors."""
        plain, log_prob = self._draws(name, flow), coverage.log_prob(flow)
        change, raw = coverage.nll_change(self.log_prob, log_prob), shares(coverage.wells, plain.positions)
        new = _round(plain, change, raw, kept=True, n_more=n_more)
        problem = _problem(self._kept, new, coverage.lost(raw, len(plain)), slack)
        if problem is None:
            self.best, self.log_prob = flow, log_prob
            self.buffers.append(plain)
        return replace(new, kept=problem is None), problem

    @property
    def _kept(self) -> Round:
        return [r for r in self.rounds if r.kept][-1]

    def _draws(self, name: str, flow: Flow, explore: float = 0.0, at: float | None = None) -> Ensemble:
        path, kelvin = self.directory / f"{name}.npz", self.temperature if at is None else at
        if not path.exists():
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*out of reach")  # it is told from the ESS
                draw(
                    flow, self.energy, temperature=kelvin, n=self.settings.n, explore=explore,
                    generator=self._generator(name),
                ).save(path)  # fmt: skip
        return Ensemble.load(path)

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(stage_seed(self.seed, purpose))


def fit_shares(flow: Flow, ensembles: Sequence[Ensemble], generator: torch.Generator) -> None:
    """Give the torsions of a flow the distributions that its weighted draws have, in place, couplings as they are.

    What energies teach makes a basin rarer than it is by about half the variance of ln w in it, and few frames cross
    between basins. From draws at several temperatures the entropies of the torsions are fitted too, without which
    shares go wrong away from these; see `refit_torsions`. An ensemble counts as its effective draws.

    Args:
        flow: whose torsions have potentials.
        ensembles: plain draws of this very flow, at one or several temperatures.
        generator: of momenta.
    """
    torsions, taus, weights = [], [], []
    for ensemble in ensembles:
        q, kept = flow.internals.of_frames(ensemble.positions.numpy())
        tau = ensemble.temperature / flow.training_temperature
        with torch.no_grad():
            for part in q[kept].to(flow.dtype).split(16384):
                y, _ = join_momenta(part, flow.n_momenta, tau, generator)
                torsions.append(flow.transform.inverse(y)[0][:, -flow.prior.n_soft :])
        taus.append(torch.full((int(kept.sum()),), tau, dtype=torch.float64))
        weights.append(torch.softmax(ensemble.log_weights[kept], 0) * ensemble.n_effective)
    several = len({ensemble.temperature for ensemble in ensembles}) > 1
    refit_torsions(flow.prior, torch.cat(torsions), torch.cat(taus), torch.cat(weights), entropies=several)


def ess_error(ensemble: Ensemble) -> float:
    """Standard error of `Ensemble.ess`.

    To first order in the fluctuations of the mean weight and the mean square, and besides as much as the ESS falls from
    a tenth of the draws to all of them: where it still falls, the heaviest weights are yet to come.
    """
    n = len(ensemble) + ensemble.n_rejected
    w = torch.exp(ensemble.log_weights - ensemble.log_weights.max())
    mean, square = w.sum() / n, w.square().sum() / n
    pull = 2.0 * w / mean - w.square() / square  # of mean 1, rejected draws as zeros included
    scatter = ensemble.ess * math.sqrt(max(float(pull.square().sum() / n) - 1.0, 0.0) / n)
    parts = [w[i::10] for i in range(10)]  # each with a tenth of the rejected draws
    of_parts = [10.0 / n * float(p.sum().square() / p.square().sum().clamp_min(1e-300)) for p in parts]
    return math.hypot(scatter, sum(of_parts) / 10.0 - ensemble.ess)


def joint_frames(ensembles: Sequence[Ensemble], generator: torch.Generator) -> Frames:
    """Equally likely frames at their common temperature from ensembles of the same size, by different flows.

    Each gives as many as it has effective draws. Rows take turns, so that the last frames, which training holds out,
    are the last draws of every ensemble.
    """
    log_weights = [e.log_weights - torch.logsumexp(e.log_weights, 0) + math.log(e.n_effective) for e in ensembles]
    n = max(1, round(sum(e.n_effective for e in ensembles)))
    rows = systematic_resample(torch.stack(log_weights, 1).flatten(), n, generator)
    positions = torch.stack([e.positions for e in ensembles], 1).flatten(0, 1)[rows].numpy()
    return Frames(positions, np.full(n, ensembles[0].temperature))


def _round(plain: Ensemble, change: tuple[Any, Any], raw: Tensor, *, kept: bool, n_more: int) -> Round:
    return Round(
        ess=plain.ess, ess_error=ess_error(plain), largest_weight_share=plain.largest_weight_share,
        nll_change=float(change[0]), nll_change_error=float(change[1]), raw_shares=tuple(raw.tolist()), kept=kept,
        n_energy_evaluations=len(plain) + n_more,
    )  # fmt: skip


def _problem(old: Round, new: Round, lost: str | None, slack: float) -> str | None:
    """Why a round is undone; None if it is not."""
    if lost is not None:
        return lost
    if not new.nll_change <= STILL * new.nll_change_error:
        return (
            f"the first draws became less likely, by {new.nll_change:.3g} ± {new.nll_change_error:.2g} nat on average"
        )
    if new.ess <= old.ess - slack * math.hypot(new.ess_error, old.ess_error):
        return f"the ESS went from {old.ess:.2%} to {new.ess:.2%}"
    return None
