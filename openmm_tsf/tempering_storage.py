"""Batched parallel tempering in a directory: segments of iterations, from the last of which a run goes on.

A segment is one npz file, written whole or not at all: what its iterations gave, and the state at their end with the
random generators. So a run that is interrupted, even by kill -9, or extended, gives the bits of one that is not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .flow_steps import COUNTS
from .records import ExchangeRecord, RoundTrips
from .storage import read_npz, write_npz
from .tempering import BatchedTempering, IterationInfo, TemperingState

Progress = Callable[[int, int, str], None]
FORMAT = "openmm-tsf tempering 1"
SEGMENT_SECONDS = 10.0
SEGMENT_BYTES = 8_000_000
"""A segment ends when it took so long, or when its frames are so large."""
PER_ITERATION = ("levels", "energies")
TOTALS = ("swap_proposed", "swap_accepted", "move_counts")
STATE = ("end_positions", "end_velocities", "end_levels", "generator_dynamics", "generator_moves")
PLAIN = ("format", "settings", "first", "n_energy_evaluations", "seconds")
REQUIRED = (*PER_ITERATION, *TOTALS, *STATE, *PLAIN, "positions", "position_iterations")


def run_tempering(
    tempering: BatchedTempering, directory: str | Path, n_iterations: int, *, store_every: int = 1,
    progress: Progress | None = None,
) -> ExchangeRecord:  # fmt: skip
    """Iterate until there are n_iterations in the directory; go on where an earlier call ended or was interrupted.

    Args:
        tempering: what an iteration is.
        directory: made if need be.
        n_iterations: in all; a run that has them already is only read.
        store_every: iterations between stored frames of all walkers.
        progress: called with (iterations so far, n_iterations, message) about every second.

    Raises:
        ValueError: a directory with other settings (which), a segment that is cut short, damaged or missing (which,
            and how to go on), numbers below 1, walkers that exploded.
        OSError: the directory cannot be written or the disk is full; what was complete before stays good.
    """
    for name, value in (("n_iterations", n_iterations), ("store_every", store_every)):
        if not (isinstance(value, int) and value >= 1):
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    directory = Path(directory).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    for left in directory.glob(".segment_*.partial.npz"):
        left.unlink()  # of a process that was killed
    settings = {**tempering.settings, "store_every": store_every}
    segments = _read(directory)
    _check_settings(directory, segments, settings)
    state = _last_state(tempering, segments[-1]) if segments else tempering.start()
    if state.iteration < n_iterations:
        watch = _Watch(tempering, segments, n_iterations, progress or (lambda done, total, message: None))
        _run(tempering, directory, state, n_iterations, settings, watch)
        segments = _read(directory)
    return _record(segments)


def load_tempering(directory: str | Path) -> ExchangeRecord:
    """What `run_tempering` left in a directory, finished or not.

    Raises:
        ValueError: no segment there, or one that is cut short, damaged or missing; which, and how to go on.
    """
    directory = Path(directory).expanduser()
    segments = _read(directory)
    if not segments:
        raise ValueError(f"{directory} has no parallel tempering: there is no file segment_*.npz")
    return _record(segments)


def _run(
    tempering: BatchedTempering, directory: Path, state: TemperingState, n_iterations: int, settings: dict[str, Any],
    watch: _Watch,
) -> None:  # fmt: skip
    store_every, infos, saved, begin = settings["store_every"], [], state, time.monotonic()
    n_frames = 0

    def save() -> None:
        nonlocal infos, saved, begin, n_frames
        if infos:
            _write(directory, saved.iteration, infos, state, settings, time.monotonic() - begin)
        infos, saved, begin, n_frames = [], state, time.monotonic(), 0

    try:
        while state.iteration < n_iterations:
            state, info = tempering.iterate(state)
            infos.append(info)
            n_frames += state.iteration % store_every == 0
            watch.see(state.iteration, info)
            if time.monotonic() - begin > SEGMENT_SECONDS or n_frames * info.positions.nbytes > SEGMENT_BYTES:
                save()
    finally:
        save()  # whatever ended it, what is complete is kept


def _write(
    directory: Path, first: int, infos: list[IterationInfo], end: TemperingState, settings: dict[str, Any],
    seconds: float,
) -> None:  # fmt: skip
    path = _path(directory, first)
    if path.exists():
        raise ValueError(f"{path} has appeared meanwhile: another process runs in this directory; let only one do so")
    stored = [i for i in range(first, end.iteration) if (i + 1) % settings["store_every"] == 0]
    shape = (0, *infos[0].positions.shape)
    frames = [infos[i - first].positions for i in stored]
    write_npz(
        path,
        format=np.array(FORMAT),
        settings=np.array(json.dumps(settings)),
        first=np.array(first),
        levels=np.array([info.levels for info in infos], dtype=np.int16),
        energies=np.array([info.energies for info in infos]),
        positions=np.array(frames) if frames else np.empty(shape, dtype=np.float32),
        position_iterations=np.array(stored, dtype=np.int64),
        **{name: np.sum([getattr(info, name) for info in infos], axis=0) for name in TOTALS},
        end_positions=end.dynamics.positions.permute(2, 0, 1).cpu().numpy(),
        end_velocities=end.dynamics.velocities.permute(2, 0, 1).cpu().numpy(),
        end_levels=end.levels.cpu().numpy(),
        generator_dynamics=end.generators[0].numpy(),
        generator_moves=end.generators[1].numpy(),
        n_energy_evaluations=np.array(end.n_energy_evaluations),
        seconds=np.array(seconds),
    )


def _read(directory: Path) -> list[dict[str, np.ndarray]]:
    """All segments in order, none missing."""
    segments: list[dict[str, np.ndarray]] = []
    paths = sorted(directory.glob("segment_*.npz"))
    done = 0
    for number, path in enumerate(paths):
        later = f"{path.name} and the {len(paths) - number - 1} after it" if path != paths[-1] else path.name
        advice = f"remove {later} to go on from iteration {done}"
        try:
            segment = read_npz(path, REQUIRED, "a segment of a parallel tempering")
        except ValueError as error:
            raise ValueError(f"{error}; {advice}") from error
        if str(segment["format"]) != FORMAT:
            raise ValueError(f"{path} has the format {str(segment['format'])!r}, expected {FORMAT!r}; {advice}")
        if int(segment["first"]) != done:
            raise ValueError(
                f"{path} begins with iteration {int(segment['first'])}, but those before it end with {done}: a segment "
                f"is missing or there twice; {advice}"
            )
        if segments and str(segment["settings"]) != str(segments[0]["settings"]):
            raise ValueError(f"{path} was made with other settings than the segments before it; {advice}")
        segments.append(segment)
        done += len(segment["levels"])
    return segments


def _check_settings(directory: Path, segments: list[dict[str, np.ndarray]], settings: dict[str, Any]) -> None:
    if not segments:
        return
    before = json.loads(str(segments[0]["settings"]))
    now = json.loads(json.dumps(settings))
    other = [f"{k} was {before.get(k)!r}, now {v!r}" for k, v in now.items() if before.get(k) != v]
    if other:
        raise ValueError(
            f"{directory} has a parallel tempering with other settings: {'; '.join(other)}; choose another folder"
        )


def _last_state(tempering: BatchedTempering, segment: dict[str, np.ndarray]) -> TemperingState:
    generators = torch.from_numpy(segment["generator_dynamics"]), torch.from_numpy(segment["generator_moves"])
    iteration = int(segment["first"]) + len(segment["levels"])
    arrays = (segment[name] for name in STATE[:3])
    return tempering.resume(iteration, *arrays, generators, int(segment["n_energy_evaluations"]))


def _record(segments: list[dict[str, np.ndarray]]) -> ExchangeRecord:
    def joined(name: str) -> np.ndarray:
        return np.concatenate([segment[name] for segment in segments])

    settings = json.loads(str(segments[0]["settings"]))
    totals = {name: np.sum([segment[name] for segment in segments], axis=0) for name in TOTALS}
    counts = totals.pop("move_counts").tolist()
    with_flow = settings["flow"] is not None
    return ExchangeRecord(
        sampler="batched",
        temperatures=np.array(settings["temperatures"]),
        levels=joined("levels").astype(np.int64),
        energies=joined("energies"),
        **totals,
        move_counts=tuple(dict(zip(COUNTS, row, strict=True)) if with_flow else {} for row in counts),
        positions=joined("positions"),
        position_iterations=joined("position_iterations"),
        n_energy_evaluations=int(segments[-1]["n_energy_evaluations"]),
        seconds=float(sum(segment["seconds"] for segment in segments)),
    )


class _Watch:
    """Acceptance and round trips on the way, told about once a second."""

    def __init__(
        self, tempering: BatchedTempering, segments: list[dict[str, np.ndarray]], n_iterations: int, tell: Progress
    ) -> None:
        self._n, self._tell, self._told = n_iterations, tell, -1.0
        self._trips = RoundTrips(len(tempering.temperatures), tempering.n_walkers)
        self._swaps, self._moves = np.zeros(2), np.zeros(len(COUNTS))
        for segment in segments:
            self._trips.follow(segment["levels"])
            self._count(*(segment[name] for name in TOTALS))

    def see(self, done: int, info: IterationInfo) -> None:
        self._trips.follow(info.levels[None])
        self._count(*(getattr(info, name) for name in TOTALS))
        if done == self._n or time.monotonic() - self._told > 1.0:
            self._told = time.monotonic()
            self._tell(done, self._n, self._message())

    def _count(self, proposed: np.ndarray, accepted: np.ndarray, moves: np.ndarray) -> None:
        self._swaps += [accepted.sum(), proposed.sum()]
        self._moves += moves.sum(0)

    def _message(self) -> str:
        counts = dict(zip(COUNTS, self._moves, strict=True))
        proposed = sum(counts[name] for name in COUNTS if name.endswith("_proposed"))
        accepted = sum(counts[name] for name in COUNTS if name.endswith("_accepted"))
        swaps = f"{100 * self._swaps[0] / max(1, self._swaps[1]):.0f} % of swaps"
        flow = f" and {100 * accepted / proposed:.0f} % of proposals" if proposed else ""
        return f"{swaps}{flow} accepted, {self._trips.counts.sum()} round trips"


def _path(directory: Path, first: int) -> Path:
    return directory / f"segment_{first:09d}.npz"
