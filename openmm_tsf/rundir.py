"""A run directory: one configuration, what its stages have done so far, and nobody else at work in it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import Config, differences, load_config, save_config
from .files import write_text

Progress = Callable[[int, int, str], None]
"""progress(done, total, message)"""

STAGE_OF = {
    "seed": "simulate",
    "molecule": "simulate",
    "simulate": "simulate",
    "zmatrix": "train",
    "model": "train",
    "flow": "train",
    "train": "train",
    "edg": "train",
}
"""The first stage that a part of the configuration matters to. What is not here may change at any time."""
SAVE_EVERY_SECONDS = 15.0


class RunError(ValueError):
    """A run directory that cannot be used as asked; the message is one line."""


@dataclass(frozen=True)
class Run:
    """An open run directory; `open_run` makes it.

    Args:
        path: of the directory.
        config: its resolved configuration, as in its config.toml.
    """

    path: Path
    config: Config

    def record(self, stage: str) -> dict[str, Any]:
        """What stages.json says of a stage; empty where it has not begun."""
        return _read_records(self.path).get(stage, {})

    def update(self, stage: str, **values: Any) -> None:
        """Add values to the record of a stage, written whole or not at all."""
        records = _read_records(self.path)
        records[stage] = {**records.get(stage, {}), **values}
        write_text(self.path / "stages.json", json.dumps(records, indent=2) + "\n")

    def is_done(self, stage: str, *files: str, key: str | None = None) -> bool:
        """Whether a stage has ended, with this key, and its files are there."""
        record = self.record(stage)
        return bool(record.get("done")) and record.get("key") == key and all((self.path / f).exists() for f in files)

    @contextmanager
    def working(
        self,
        stage: str,
        progress: Progress | None,
        evaluations: Callable[[], int] = lambda: 0,
        *,
        resumes: bool = True,
    ) -> Iterator[Progress]:
        """Account for the time and energy evaluations of a stage, over all its interruptions.

        Args:
            stage: begins now and is not done.
            progress: told of every step.
            evaluations: how many energies were evaluated since the block began.
            resumes: whether the stage goes on where it was interrupted, or begins anew and so does its account.

        Yields:
            A progress function to use in the block; the account is written every 15 s, so that a kill loses little.
        """
        before, begin = self.record(stage), time.monotonic()
        if before.get("done") or not resumes:
            before = {}
        saved = begin

        def save() -> None:
            self.update(
                stage,
                seconds=before.get("seconds", 0.0) + time.monotonic() - begin,
                n_energy_evaluations=before.get("n_energy_evaluations", 0) + evaluations(),
            )

        def report(done: int, total: int, message: str = "") -> None:
            nonlocal saved
            if time.monotonic() - saved > SAVE_EVERY_SECONDS:
                save()
                saved = time.monotonic()
            if progress is not None:
                progress(done, total, message)

        self.update(stage, done=False)
        try:
            yield report
        finally:
            save()


@contextmanager
def open_run(directory: str | os.PathLike, config: Config | None = None) -> Iterator[Run]:
    """Open a run directory, made if need be, and keep others out of it.

    Args:
        directory: of the run.
        config: of the run; None for the one that the directory has.

    Raises:
        RunError: another configuration made what is there, the directory is no run directory, or it is in use.
        OSError: it cannot be written.
    """
    path = Path(directory)
    if config is None and not (path / "config.toml").is_file():
        raise RunError(f"{path} is not a run directory: it has no config.toml")
    path.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        yield Run(path, _settle(path, config))


def _settle(path: Path, config: Config | None) -> Config:
    """The configuration to go on with; config.toml says it too."""
    file = path / "config.toml"
    if not file.is_file():
        made = ("training.dcd", "flow.tsf", "generator.edg", "stages.json")
        strange = [name for name in made if (path / name).exists()]
        if strange:
            raise RunError(f"{path} has {strange[0]} but no config.toml: choose another --out folder")
        save_config(config, file)
        return config
    old = load_config(file)
    if config is None or config == old:
        return old
    _refuse_changes(path, old, config)
    save_config(config, file)
    return config


def _refuse_changes(path: Path, old: Config, new: Config) -> None:
    records = _read_records(path)
    begun = {key: values for key, values in differences(old, new).items() if STAGE_OF.get(key.split(".")[0]) in records}
    if begun:
        changes = [f"{key} was {_say(a)} and is now {_say(b)}" for key, (a, b) in begun.items()]
        more = f" (and {len(changes) - 3} more)" if len(changes) > 3 else ""
        raise RunError(
            f"{path} was made with another configuration: {'; '.join(changes[:3])}{more}; "
            "choose another --out folder, or the old values"
        )


def _say(value: Any) -> str:
    return "not set" if value is None else repr(value)


def _read_records(path: Path) -> dict[str, dict[str, Any]]:
    file = path / "stages.json"
    if not file.is_file():
        return {}
    try:
        records = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise RunError(f"{file} is damaged ({error}); remove it to begin the run anew") from error
    if not (isinstance(records, dict) and all(isinstance(record, dict) for record in records.values())):
        raise RunError(f"{file} is damaged (no table of stages); remove it to begin the run anew")
    return records


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the directory for this process; the operating system lets go of it however the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(path / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"{path} is in use by another openmm-tsf; wait for it, or choose another --out folder"
            ) from error
        yield
