"""What an exchange is made with, as `exchange.toml` keeps it."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from .config import ConfigError, read_table
from .files import write_text
from .flow_steps import FlowSteps
from .ladder import check_ladder

FILE = "exchange.toml"
FREE = ("n_iterations",)
"""Settings that may change from one call to the next; the others make the run what it is."""


@dataclass(frozen=True)
class ExchangeSettings:
    """All that decides an exchange.

    Attributes:
        flow: path of the checkpoint, or a pretrained name; its molecule is what is sampled.
        temperatures: ascending [K].
        n_iterations: in all; may change. What is there already stays, were it more.
        sampler: "batched": all walkers at once (`BatchedTempering`); "openmmtools": a ParallelTemperingSampler.
        plain: True leaves the flow's moves out.
        kind, n_proposals, n_walk_steps, step_size, explore: see `FlowSteps`.
        n_replicas: at each temperature, of the batched sampler; openmmtools has one.
        n_dynamics_steps, timestep_fs, friction_per_ps: Langevin dynamics of an iteration [fs, 1/ps]; the time step is
            1 fs by default, and 2 fs where bonds are constrained.
        swaps: "neighbours" or "random" pairs, of the batched sampler.
        store_every: iterations between stored frames.
        seed: of everything random.
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
        for name in ("n_iterations", "n_replicas", "n_dynamics_steps", "store_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, not {self.seed}")

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


def load_exchange_settings(directory: Path) -> ExchangeSettings:
    """The settings of an exchange that was begun.

    Raises:
        FileNotFoundError: there is none in the directory.
        ConfigError: the file was altered into something that cannot be run.
    """
    path = directory / FILE
    try:
        return read_table(ExchangeSettings, tomllib.loads(path.read_text("utf-8")), "")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from error


def settle(directory: Path, settings: ExchangeSettings) -> ExchangeSettings:
    """The settings to go on with, written to the directory; a run that is there already keeps its own.

    Raises:
        ValueError: the directory has an exchange with other settings: which.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / FILE).is_file():
        before = load_exchange_settings(directory)
        names = [f.name for f in fields(settings) if f.name not in FREE]
        other = [
            f"{n} is {getattr(before, n)!r} there, {getattr(settings, n)!r} now"
            for n in names
            if getattr(before, n) != getattr(settings, n)
        ]
        if other:
            raise ValueError(f"{directory} has an exchange with other settings: {'; '.join(other)}; give another --out")
        settings = replace(before, n_iterations=settings.n_iterations)
    import tomli_w

    table = {name: value for name, value in asdict(settings).items() if value is not None}
    write_text(directory / FILE, tomli_w.dumps(table | {"temperatures": list(settings.temperatures)}))
    return settings
