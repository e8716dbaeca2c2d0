"""What a refinement did: the flow before, every round, and why there were no more."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Round:
    """A flow after a round, measured on draws that no flow had seen; round 0 is the flow as it came.

    Attributes:
        ess, ess_error: Kish's effective sample size of plain draws as a share of all, and its standard error.
        largest_weight_share: of these draws.
        nll_change, nll_change_error: rise of the weighted negative log-likelihood of the first draws [nat] over the
            best flow before.
        raw_shares: of the draws in each well.
        kept: whether the flow took the place of the one before.
        n_energy_evaluations: of the round.
    """

    ess: float
    ess_error: float
    largest_weight_share: float
    nll_change: float
    nll_change_error: float
    raw_shares: tuple[float, ...]
    kept: bool
    n_energy_evaluations: int


@dataclass(frozen=True)
class Refinement:
    """What a refinement did.

    Attributes:
        temperature: of the target [K].
        rounds: the flow as it came, then every round, those that were undone too.
        wells: of the soft torsions, in words.
        shares, share_errors: of the Boltzmann distribution in each well, as the first draws have it.
        stopped: why there are no more rounds.
        n_energy_evaluations: in all.
        fitted: the flow with the shares of its torsions fitted in the end; None where there was nothing to fit.
    """

    temperature: float
    rounds: tuple[Round, ...]
    wells: tuple[str, ...]
    shares: tuple[float, ...]
    share_errors: tuple[float, ...]
    stopped: str
    n_energy_evaluations: int
    fitted: Round | None = None

    @property
    def before(self) -> Round:
        """The flow as it came."""
        return self.rounds[0]

    @property
    def after(self) -> Round:
        """The flow that was kept."""
        last = [] if self.fitted is None else [self.fitted]
        return [r for r in (*self.rounds, *last) if r.kept][-1]

    def to_json(self) -> str:
        """JSON text; a number that is not finite is null."""
        return json.dumps(_or_null(asdict(self)), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Refinement:
        """What `to_json` gave."""
        stored = json.loads(text)
        lists = {name: tuple(stored[name]) for name in ("wells", "shares", "share_errors")}
        rounds = tuple(_round(row) for row in stored["rounds"])
        fitted = None if stored.get("fitted") is None else _round(stored["fitted"])
        return cls(**{**stored, **lists, "rounds": rounds, "fitted": fitted})


def _round(row: dict[str, Any]) -> Round:
    numbers = {name: math.nan if value is None else value for name, value in row.items()}
    return Round(**{**numbers, "raw_shares": tuple(row["raw_shares"])})


def _or_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _or_null(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
