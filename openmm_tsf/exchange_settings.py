"""What an exchange is made with, as `exchange.toml` keeps it.

A second copy is sealed when the first iteration is about to run: `exchange.toml` may be edited, but what is stored was
made with what was sealed.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from .checks import positive
from .config import ConfigError, read_table
from .files import write_text
from .flow_steps import FlowSteps
from .ladder import check_ladder

FILE, SEAL = "exchange.toml", "exchange.sealed.toml"
SEGMENTS, STORAGE = "segments", "exchange.nc"
"""Where the samplers store iterations: a folder of the batched one, a file of openmmtools."""
FREE = ("n_iterations",)
"""Settings that may change from one call to the next; the others make the run what it is."""
FEWEST_ITERATIONS = 4
"""Error bars take that many."""


@dataclass(frozen=True)
class ExchangeSettings:
    """All that decides an exchange.

    Attributes:
        flow: path of the checkpoint, or a pretrained name; its molecule is what is sampled.
        temperatures: ascending [K].
        n_iterations: in all, at least 4, which error bars take; may change. What is there already stays, were it more.
        sampler: "batched": all walkers at once (`BatchedTempering`); "openmmtools": a ParallelTemperingSampler.
        plain: True leaves the flow's moves out.
        kind, n_proposals, n_walk_steps, step_size, explore: see `FlowSteps`.
        n_replicas: at each temperature, of the batched sampler; openmmtools has one.
        n_dynamics_steps, timestep_fs, friction_per_ps: Langevin dynamics of an iteration [fs, 1/ps]; the time step is
            1 fs by default, and 2 fs where bonds are constrained.
        swaps: "neighbours" or "random" pairs, of the batched sampler.
        store_every: iterations between stored frames. They are the checkpoints of openmmtools: after an interruption
            the iterations since the last one are done again. The batched sampler loses none.
        seed: of everything random in the batched sampler; of the moves in openmmtools.
    """

    flow: str
    temperatures: tuple[float, ...]
    n_iterations: int = 1000
    sampler: Literal["batched", "openmmtools"] = "batched"
    plain: bool = False
    kind: Literal["independence", "latent", "mixed"] = "independence"
    n_proposals: int = 16
    n_walk_steps: int = 4
    step_size: float = 0.1
    explore: float = 0.0
    n_replicas: int = 8
    n_dynamics_steps: int = 100
    timestep_fs: float | None = None
    friction_per_ps: float = 1.0
    swaps: Literal["neighbours", "random"] = "neighbours"
    store_every: int = 1
    seed: int = 1

    def __post_init__(self) -> None:
        check_ladder(self.temperatures)
        _ = self.steps
        if self.n_iterations < FEWEST_ITERATIONS:
            raise ValueError(
                f"n_iterations must be at least {FEWEST_ITERATIONS}, which error bars take, not {self.n_iterations}"
            )
        for name, least in (("n_replicas", 1), ("n_dynamics_steps", 1), ("store_every", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        step, friction = self.timestep_fs, self.friction_per_ps
        if step is not None:
            positive("timestep_fs", step)
        if not (math.isfinite(friction) and friction >= 0.0):
            raise ValueError(f"friction_per_ps must be finite and at least 0, not {friction:g}")

    @property
    def steps(self) -> FlowSteps:
        """What a move with the flow is."""
        return FlowSteps(self.kind, self.n_proposals, self.n_walk_steps, self.step_size, self.explore)


def make_settings(**values: Any) -> ExchangeSettings:
    """Settings from values by name, each checked; None means the default.

    Raises:
        ConfigError: an unknown name, a wrong type or a value out of range.
    """
    return read_table(ExchangeSettings, {name: value for name, value in values.items() if value is not None}, "")


def changed_settings(settings: ExchangeSettings, **values: Any) -> ExchangeSettings:
    """Settings with other values by name, each checked as in `make_settings`; None leaves a value as it is."""
    return make_settings(**(_table(settings) | {name: value for name, value in values.items() if value is not None}))


def load_exchange_settings(directory: Path) -> ExchangeSettings:
    """The settings of an exchange that was begun.

    Raises:
        FileNotFoundError: there is none in the directory.
        ConfigError: the file was altered into something that cannot be run.
    """
    return _load(directory / FILE)


def has_iterations(directory: Path) -> bool:
    """Whether a sampler has stored any iteration in the directory.

    Raises:
        ValueError: exchange.nc is damaged.
    """
    if any((directory / SEGMENTS).glob("segment_*.npz")):
        return True
    if not (directory / STORAGE).exists():
        return False
    from .exchange.netcdf import open_run

    with open_run(directory / STORAGE) as run:
        return run.last > 0  # iteration 0 is what openmmtools begins with


def settle(directory: Path, settings: ExchangeSettings) -> ExchangeSettings:
    """The settings to go on with, written to the directory; iterations that are stored there keep theirs.

    Raises:
        ValueError: the directory has iterations made with other settings: which; or nothing tells with which.
    """
    directory.mkdir(parents=True, exist_ok=True)
    table = _table(settings)
    if has_iterations(directory):
        _check_same(directory, settings)
    else:
        _forget(directory, settings)
        head = "# What the iterations here are made with. Not to be edited: exchange.toml is compared with it.\n\n"
        _write(directory / SEAL, {name: value for name, value in table.items() if name not in FREE}, head)
    _write(directory / FILE, table)
    return settings


def _check_same(directory: Path, settings: ExchangeSettings) -> None:
    seal = directory / SEAL
    if not seal.is_file():
        if not (directory / STORAGE).exists():
            return  # segments hold their settings and are compared when they are read
        raise ValueError(
            f"{seal} is missing, so nothing tells what {STORAGE} was made with: put it back, or give another --out"
        )
    before = _load(seal)
    pairs = {f.name: (getattr(before, f.name), getattr(settings, f.name)) for f in fields(settings)}
    other = [f"{n} is {a!r} there, {b!r} now" for n, (a, b) in pairs.items() if a != b and n not in FREE]
    if other:
        raise ValueError(
            f"{directory} has an exchange with other settings: {'; '.join(other)}; only -n may change: leave out what "
            f"differs, here or in {FILE}, or begin another one with --out"
        )


def _forget(directory: Path, settings: ExchangeSettings) -> None:
    """Remove what openmmtools has made ready for other settings and not run."""
    seal = directory / SEAL
    if seal.is_file() and replace(_load(seal), n_iterations=settings.n_iterations) == settings:
        return
    for name in (STORAGE, STORAGE.replace(".nc", "_checkpoint.nc")):
        (directory / name).unlink(missing_ok=True)


def _load(path: Path) -> ExchangeSettings:
    try:
        return read_table(ExchangeSettings, tomllib.loads(path.read_text("utf-8")), "")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _table(settings: ExchangeSettings) -> dict[str, Any]:
    table = asdict(settings) | {"temperatures": list(settings.temperatures)}
    return {name: value for name, value in table.items() if value is not None}


def _write(path: Path, table: dict[str, Any], head: str = "") -> None:
    import tomli_w

    write_text(path, head + tomli_w.dumps(table))
