"""An openmmtools multistate run on disk, open for reading: its arrays, frames, temperatures and flow moves.

Arrays are read with netCDF4. Moves and states are text that openmmtools itself reads; it can hold Python objects, so
open only files that you trust, as with openmmtools itself.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from openmm_tsf.exchange.quiet import quiet_import
from openmm_tsf.units import to_kelvin


class Frames(NamedTuple):
    """Stored frames: `iterations` (J,), `positions` (J, R, A, 3) float32, `box_vectors` (J, R, 3, 3) or None [nm]."""

    iterations: np.ndarray
    positions: np.ndarray
    box_vectors: np.ndarray | None


@dataclass(frozen=True, eq=False)
class StoredRun:
    """An open run.

    Args:
        path: of the analysis file, for errors.
        analysis: the analysis file (`netCDF4.Dataset`).
        checkpoint: the checkpoint file, None where it is missing.
        reporter: openmmtools' reader of moves and states.
    """

    path: str
    analysis: Any
    checkpoint: Any
    reporter: Any

    @property
    def last(self) -> int:
        """The last iteration that was stored whole."""
        with _reading(self.path):
            return int(self.analysis.variables["last_iteration"][0])

    @property
    def n_states(self) -> int:
        """Number of thermodynamic states."""
        with _reading(self.path):
            return len(self.analysis.groups["thermodynamic_states"].variables)

    @property
    def states(self) -> np.ndarray:
        """(I + 1, R) thermodynamic state of each replica, from iteration 0."""
        return self.array("states").astype(np.int64)

    def array(self, name: str) -> np.ndarray:
        """A variable of the analysis file, from iteration 0 to the last one stored whole."""
        with _reading(self.path):
            return np.asarray(self.analysis.variables[name][: self.last + 1])

    def temperatures(self) -> np.ndarray:
        """(K,) [K], in the order of the states."""
        with _reading(self.path):
            return np.array(
                [_temperature(self._text("thermodynamic_states/state", index)) for index in range(self.n_states)]
            )

    def flow_moves(self, state: int) -> list[Mapping[str, Any]]:
        """The FlowMoves of one state as they were stored; the flow's checkpoint is not needed."""
        return list(_flow_moves(self._text("mcmc_moves/move", state)))

    def is_periodic(self) -> bool:
        """Whether the System has periodic boundaries; frames have box vectors in any case."""
        with _reading(self.path):
            return bool(self.reporter.read_end_thermodynamic_states()[0].is_periodic)

    def frames(self, n_atoms: int | None) -> Frames:
        """Stored frames after iteration 0, of so many atoms, or of as many as there are.

        Where both files have such frames, those of the file with more of them.

        Raises:
            ValueError: there are frames, or none at all, but not of so many atoms.
        """
        sources = ((self.analysis, 1), (self.checkpoint, self.interval))
        found = [frames for frames in (self._frames(*source) for source in sources) if frames is not None]
        if n_atoms is None and not found:
            return Frames(
                np.zeros(0, dtype=np.int64), np.zeros((0, self.states.shape[1], 0, 3), dtype=np.float32), None
            )
        sizes = sorted({frames.positions.shape[2] for frames in found})
        wanted = sizes[-1] if n_atoms is None else n_atoms
        fitting = [frames for frames in found if frames.positions.shape[2] == wanted]
        if not fitting:
            raise ValueError(
                f"{self.path} and its checkpoint file hold frames of {' and '.join(map(str, sizes)) or 'no'} atoms; "
                f"asked for frames of {wanted} atoms"
            )
        return max(fitting, key=lambda frames: len(frames.iterations))

    @property
    def interval(self) -> int:
        """Iterations between whole frames."""
        with _reading(self.path):
            return int(self.analysis.CheckpointInterval)

    def _frames(self, data: Any, interval: int) -> Frames | None:
        if data is None or "positions" not in data.variables:
            return None
        rows = slice(None, self.last // interval + 1)
        with _reading(self.path):
            positions = data.variables["positions"][rows]
            boxes = data.variables["box_vectors"][rows] if "box_vectors" in data.variables else None
        iterations = interval * np.arange(len(positions))
        there = ~np.ma.getmaskarray(positions).any(axis=(1, 2, 3)) & (iterations > 0)
        return Frames(
            iterations[there],
            np.asarray(positions[there], dtype=np.float32),
            None if boxes is None else np.asarray(boxes[there], dtype=np.float32),
        )

    def _text(self, prefix: str, index: int) -> Mapping[str, Any]:
        with _reading(self.path):
            return self.reporter.read_dict(f"{prefix}{index}")


@contextmanager
def open_run(storage: Any) -> Iterator[StoredRun]:
    """Both files of a run, open for reading; where they cannot be read, the error says what to do.

    Only reading is guarded, here and in the methods of `StoredRun`: what the caller does raises its own errors.

    Args:
        storage: path of the analysis file, or a `MultiStateReporter`, which stays open if it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not of an openmmtools run, or damaged.
    """
    path, checkpoint = _paths(storage)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}; give the path that the sampler was created with")
    with ExitStack() as stack:
        with _reading(path):
            analysis, other = stack.enter_context(_datasets(path, checkpoint))
            if getattr(analysis, "DataUsedFor", None) != "analysis":
                raise ValueError(
                    f"{path} is not the main file of an openmmtools multistate run (is it the checkpoint file?); give "
                    "the path that the sampler was created with"
                )
            reporter = stack.enter_context(_reader(path, analysis))
        yield StoredRun(path, analysis, other, reporter)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """What reading a spoilt file raises becomes a ValueError that says what to do."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{path} or its checkpoint file cannot be read ({error}): it is cut short or damaged, or is no NetCDF "
            "file. If a run is writing it just now, try again; otherwise take a copy made before, or start anew"
        ) from error


@contextmanager
def _datasets(path: str, checkpoint: str) -> Iterator[tuple[Any, Any]]:
    """Both files; None for a checkpoint file that is not there.

    Of copies if a sampler has them open, in this process (HDF5 crashes on opening a file twice) or in another one (it
    locks them). openmmtools flushes them after each iteration.
    """
    import netCDF4

    paths = [name for name in (path, checkpoint) if os.path.isfile(name)]
    with ExitStack() as stack:
        try:
            if any(_is_open_here(name) for name in paths):
                raise BlockingIOError
            found = [netCDF4.Dataset(name) for name in paths]
        except OSError:
            folder = stack.enter_context(TemporaryDirectory())
            copies = [shutil.copy(name, os.path.join(folder, f"{index}.nc")) for index, name in enumerate(paths)]
            found = [netCDF4.Dataset(name) for name in copies]
        for dataset in found:
            stack.enter_context(dataset)
        yield found[0], (found[1] if len(found) > 1 else None)


def _is_open_here(path: str) -> bool:
    """Whether this process has a file open; assumed where there is no way to know."""
    wanted = os.stat(path)
    for number in os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else ():
        try:
            if os.path.samestat(wanted, os.fstat(int(number))):
                return True
        except OSError:  # that of the listing itself
            continue
    return not os.path.isdir("/dev/fd")


@contextmanager
def _reader(path: str, analysis: Any) -> Iterator[Any]:
    """openmmtools' reader of texts on an open file: it would wait eight seconds for one that is damaged or missing."""
    with quiet_import():
        from openmmtools.multistate import MultiStateReporter

        reporter = MultiStateReporter(path)
    reporter._storage_analysis = analysis
    try:
        yield reporter
    finally:
        reporter._storage_analysis = None  # it closes what it has when it goes


def _paths(storage: Any) -> tuple[str, str]:
    """Paths of the analysis file and of the checkpoint file."""
    if hasattr(storage, "filepath"):
        if storage.is_open():
            storage.sync()
        return tuple(storage._storage_paths)  # it has no public name for the second
    path = Path(storage).expanduser()
    return str(path), str(path.with_name(f"{path.stem}_checkpoint{path.suffix}"))


def _flow_moves(text: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(text, Mapping):
        if text.get("_serialized__class_name") == "FlowMove":
            yield text
            return
        text = list(text.values())
    if isinstance(text, list | tuple):
        for part in text:
            yield from _flow_moves(part)


def _temperature(text: Mapping[str, Any]) -> float:
    while "thermodynamic_state" in text:  # compound states hold the plain one
        text = text["thermodynamic_state"]
    return to_kelvin(text["temperature"])
