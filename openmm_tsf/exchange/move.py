"""A flow as an MCMCMove of openmmtools."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import openmm
import torch
from openmm import unit

from openmm_tsf.checkpoint import flow_path
from openmm_tsf.exchange.contexts import check_flow, facts_of, walkers_of
from openmm_tsf.exchange.flows import flow_of, use_flow
from openmm_tsf.exchange.velocities import carried
from openmm_tsf.flow import Flow
from openmm_tsf.flow_steps import COUNTS, STEPS, FlowSteps, PlacedFlow
from openmm_tsf.metropolis import Target
from openmm_tsf.units import kT, to_float, to_kelvin

GOAL = 0.3
"""Acceptance that the step size of the latent walk is adapted to."""
STEP_RANGE = (1e-4, 3.0)
MILLION = 1_000_000
STATISTICS = ("n_applied", "n_proposed", "n_accepted", "step_size_per_million", *COUNTS)
NM_PER_PS = unit.nanometer / unit.picosecond
SETTINGS = (
    *("checkpoint", "sha256", "n_adapt"),
    *("kind", "n_proposals", "n_walk_steps", "step_size", "explore"),
)


class FlowMove:
    """Metropolis steps with a temperature-steerable flow, as an MCMCMove of openmmtools.

    Use it like any other move: in an MCMCSampler, in a SequenceMove or WeightedMove beside dynamics, and in the
    multistate samplers. The flow runs at the temperature of the thermodynamic state; energies are those of that
    state's own System and global parameters, in batches where the force field allows and by the sampler's Context
    otherwise. Whatever the flow, the distribution stays that of the state. Dynamics should go along: the flow knows
    one isomer, and the move does nothing where the flow cannot be (counted as `unrepresentable`).

    Positions are written only if something was accepted. Velocities then stay as far as they can, see
    `exchange.velocities`: half kicks and directions of rigid bonds become those of the new place. The integrator is
    that of the Context in the cache, so let the dynamics use the same cache, as all samplers of openmmtools do. Random
    numbers follow `numpy.random.seed`; integrators and exchanges of openmmtools have seeds of their own.

    A move is a path, a hash and numbers; the flow is loaded once in a process. Copies are cheap.

    Args:
        checkpoint: a flow's file, a run directory, or the name of a pretrained flow ("ala2").
        n_proposals: draws of the flow in one application, made and scored in one batch ("independence", "mixed").
        kind: "independence", "latent" or "mixed", see `FlowSteps`.
        step_size: width of the latent walk's steps, 1 being that of the latents at the state's temperature.
        n_walk_steps: steps of the latent walk in one application ("latent", "mixed").
        explore: share of the draws spread over all basins, see `SteeredFlow.exploring`.
        n_adapt: so many applications adapt the step size to an acceptance of 30 %, and are to be discarded as
            equilibration; then it is frozen for good. It is part of `statistics`, so that all copies agree.

    Attributes:
        statistics: a dict of ints (read and write): n_applied, n_proposed, n_accepted (all kinds),
            step_size_per_million, and what `FlowSteps.run` counts.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: no such flow, or settings that make no sense.
    """

    def __init__(
        self, checkpoint: str | os.PathLike, n_proposals: int = 16, kind: str = "independence", step_size: float = 0.1,
        *, n_walk_steps: int = 4, explore: float = 0.0, n_adapt: int = 0,
    ) -> None:  # fmt: skip
        steps = FlowSteps(kind, n_proposals, n_walk_steps, step_size, explore)
        if not STEP_RANGE[0] <= step_size <= STEP_RANGE[1]:
            raise ValueError(f"step_size must be in {STEP_RANGE[0]:g} ... {STEP_RANGE[1]:g}, not {step_size:g}")
        if not (isinstance(n_adapt, int) and n_adapt >= 0):
            raise ValueError(f"n_adapt must be a whole number of at least 0, not {n_adapt!r}")
        path = flow_path(checkpoint).resolve()
        digest = use_flow(path)
        zero = dict.fromkeys(STATISTICS, 0) | {"step_size_per_million": round(MILLION * step_size)}
        settings = {"checkpoint": str(path), "sha256": digest, "n_adapt": n_adapt}
        self.__setstate__({**settings, **asdict(steps), "statistics": zero})

    @property
    def flow(self) -> Flow:
        """The flow, loaded once in a process.

        Raises:
            CheckpointError: its file was moved or changed since the move was made; says what to do.
        """
        return flow_of(self.checkpoint, self.sha256)

    @property
    def step_size(self) -> float:
        """Present step size of the latent walk."""
        return self._statistics["step_size_per_million"] / MILLION

    @property
    def statistics(self) -> dict[str, int]:
        """Counts since the beginning; may be set."""
        return dict(self._statistics)

    @statistics.setter
    def statistics(self, value: dict[str, int]) -> None:
        missing = [name for name in STATISTICS if name not in value]
        if missing:
            raise ValueError(f"statistics of a FlowMove lack {', '.join(missing)}")
        self._statistics = {name: int(value[name]) for name in STATISTICS}

    def apply(self, thermodynamic_state: Any, sampler_state: Any, context_cache: Any = None) -> None:
        """Apply the move; the sampler state is changed in place.

        Args:
            thermodynamic_state: openmmtools ThermodynamicState, or compound one.
            sampler_state: openmmtools SamplerState.
            context_cache: openmmtools ContextCache; the global one by default.

        Raises:
            ValueError: the state has a barostat or a box, its System is not the flow's molecule, or positions are not
                finite.
        """
        _check_ensemble(thermodynamic_state)
        context = _context(thermodynamic_state, context_cache)
        positions = np.array(to_float(sampler_state.positions, unit.nanometer, "positions"), dtype=np.float64)
        temperature = to_kelvin(thermodynamic_state.temperature)
        generator = torch.Generator().manual_seed(seed_from_numpy(2**63 - 1))
        steps = replace(self._steps, step_size=self.step_size)
        moved, counts = apply_steps(steps, self.flow, context, temperature, positions, generator=generator)
        if moved is not None:
            sampler_state.positions = moved * unit.nanometer
            if sampler_state.velocities is not None:
                velocities = np.array(to_float(sampler_state.velocities, NM_PER_PS, "velocities"), dtype=np.float64)
                seed = seed_from_numpy(2**31 - 1)
                velocities = carried(context, velocities, positions, moved, temperature, seed)
                sampler_state.velocities = velocities * NM_PER_PS
        self._count(counts)

    def __deepcopy__(self, memo: dict) -> FlowMove:
        new = object.__new__(FlowMove)
        new.__setstate__(self.__getstate__())
        return new

    def __getstate__(self, **_: Any) -> dict[str, Any]:
        names = ("checkpoint", "sha256", "n_adapt")
        settings = {name: getattr(self, name) for name in names}
        return {**settings, **asdict(self._steps), "statistics": self.statistics}

    def __setstate__(self, state: dict[str, Any]) -> None:
        missing = [name for name in (*SETTINGS, "statistics") if name not in state]
        if missing:  # not a KeyError: openmmtools swallows those
            raise ValueError(f"a stored FlowMove lacks {', '.join(missing)}; it was written by another version")
        self.checkpoint, self.sha256 = str(state["checkpoint"]), str(state["sha256"])
        self.n_adapt = int(state["n_adapt"])
        numbers = {name: int(state[name]) for name in ("n_proposals", "n_walk_steps")}
        numbers |= {name: float(state[name]) for name in ("step_size", "explore")}
        self._steps = FlowSteps(kind=str(state["kind"]), **numbers)
        self.statistics = state["statistics"]

    def __repr__(self) -> str:
        return f"FlowMove({self.checkpoint!r}, n_proposals={self._steps.n_proposals}, kind={self._steps.kind!r})"

    def _count(self, counts: dict[str, int]) -> None:
        """Add counts to the statistics, and adapt the step size as long as that is wanted."""
        now = self._statistics
        for name, number in counts.items():
            now[name] += number
        now["n_applied"] += 1
        for what in ("proposed", "accepted"):
            now[f"n_{what}"] = sum(now[f"{kind}_{what}"] for kind in STEPS)
        tried = counts["latent_proposed"]
        if now["n_applied"] <= self.n_adapt and tried > 0:
            # a stochastic approximation (Robbins and Monro), whose steps shrink
            excess = counts["latent_accepted"] / tried - GOAL
            step = self.step_size * math.exp(2.0 * excess / math.sqrt(now["n_applied"]))
            now["step_size_per_million"] = round(MILLION * min(max(step, STEP_RANGE[0]), STEP_RANGE[1]))


def apply_steps(
    steps: FlowSteps, flow: Flow, context: openmm.Context, temperature: float, positions: np.ndarray,
    *, energy: Any = None, generator: torch.Generator,
) -> tuple[np.ndarray | None, dict[str, int]]:  # fmt: skip
    """Steps for one configuration; everything of it is computed anew, nothing is remembered from earlier calls.

    Args:
        steps: which.
        flow: at any temperature.
        context: whose System and global parameters make the energy.
        temperature: of flow and target [K].
        positions: (A, 3) [nm].
        energy: another than that of the Context.
        generator: of proposals and decisions.

    Returns:
        Positions (A, 3) [nm], None if nothing was accepted; and what `FlowSteps.run` counts.

    Raises:
        ValueError: the System is not the flow's molecule; positions that are not finite.
    """
    facts = facts_of(context)
    check_flow(flow, facts)
    bad = ~np.isfinite(positions).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {len(bad)} atoms of the sampler state have positions that are not finite (first: "
            f"{flow.molecule.atom_labels[int(bad.argmax())]}); the dynamics before this move broke down: use a smaller "
            "time step, or minimise first"
        )
    steered = flow.at(temperature)

    def factor(x: torch.Tensor) -> torch.Tensor:
        return steered.log_constraint_factor(x, facts.masses)

    if energy is None:
        target, walkers = walkers_of(context, temperature, positions, factor)
    else:
        target = Target(energy, kT(temperature), factor)
        walkers = target.at(torch.from_numpy(positions)[None])
    walkers, counts = steps.run(walkers, target, PlacedFlow(steered, walkers.x), generator=generator)
    accepted = counts["independence_accepted"] + counts["latent_accepted"]
    return (walkers.x[0].numpy() if accepted else None), counts


def seed_from_numpy(most: int) -> int:
    """A seed in 1 ... most - 1 from numpy's global generator, which is what decides all moves of openmmtools."""
    drawn = int(np.random.randint(1, most, dtype=np.int64))  # noqa: NPY002
    # the rank of MPI as well: with numpy seeded alike on all ranks, replicas would share their random numbers
    mixed = np.random.SeedSequence((drawn, _rank())).generate_state(1, np.uint64)[0]
    return int(mixed) % (most - 1) + 1


def _rank() -> int:
    mpiplus = sys.modules.get("mpiplus.mpiplus")
    comm = None if mpiplus is None else mpiplus.get_mpicomm()
    return 0 if comm is None else comm.rank


def _check_ensemble(thermodynamic_state: Any) -> None:
    if thermodynamic_state.pressure is not None:
        raise ValueError(
            f"the thermodynamic state has a barostat ({thermodynamic_state.pressure}); a flow samples one molecule "
            "without a box: make the state without pressure"
        )
    if thermodynamic_state.is_periodic:
        raise ValueError("the thermodynamic state is periodic; a flow samples one molecule without a box")


def _context(thermodynamic_state: Any, context_cache: Any) -> openmm.Context:
    """A Context in the thermodynamic state; its global parameters are set, its positions are not."""
    if context_cache is None:
        from openmmtools import cache

        context_cache = cache.global_context_cache
    return context_cache.get_context(thermodynamic_state)[0]
