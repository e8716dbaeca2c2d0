"""Reading back what the multistate samplers of openmmtools stored: acceptance, frames, temperature ladders.

Moves and states are stored as text that can hold Python objects: open only files that you trust, as with openmmtools.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import mdtraj
import numpy as np

from openmm_tsf.exchange.netcdf import StoredRun, open_run
from openmm_tsf.flow_steps import COUNTS, STEPS
from openmm_tsf.records import ExchangeRecord
from openmm_tsf.units import kT

SAME_ENERGY = 1e-6, 1e-3
"""Relative and absolute [kJ/mol] difference of a configuration's energies in two states that have one Hamiltonian."""


def acceptance(storage: Any) -> list[dict[str, Any]]:
    """What became of the proposals of all `FlowMove`s of a run, however deep they are nested in other moves.

    The counts are those of the last iteration stored, since the moves were made; iterations that were done again after
    a crash count twice.

    Args:
        storage: path of the file that the run was created with, or its `MultiStateReporter`.

    Returns:
        one row for each thermodynamic state and kind of step: state (its index), temperature [K], kind ("independence"
        or "latent"), proposed, accepted, share (accepted / proposed, NaN without proposals), nonfinite (proposals whose
        energy was not finite), off_chart (proposals that left the flow's chart) and unrepresentable (walkers that were
        where the flow cannot be, of all kinds together). Empty without FlowMoves.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not of an openmmtools run, or damaged; says what to do.
    """
    with open_run(storage) as stored:
        kelvin = stored.temperatures()
        return [row for state in range(len(kelvin)) for row in _rows(state, kelvin[state], stored.flow_moves(state))]


def to_mdtraj(storage: Any, topology: Any, state: int = 0) -> mdtraj.Trajectory:
    """Frames of one thermodynamic state, in the order of iterations, whichever replica was there.

    All frames that were stored, without the initial one: whole frames every `checkpoint_interval` iterations; frames of
    the `analysis_particle_indices` every `position_interval` iterations, used where they are all atoms of the topology.

    Args:
        storage: as in `acceptance`.
        topology: an `openmm.app.Topology`, an `mdtraj.Topology` or a Molecule, of all atoms or of the analysis
            particles alone.
        state: index of the thermodynamic state, in the order of the run.

    Returns:
        positions [nm], `time` is the iteration; box vectors if the System is periodic.

    Raises:
        ValueError: no such state, no frames of that many atoms, or as in `acceptance`.
    """
    topology = getattr(topology, "mdtraj_topology", topology)
    if not isinstance(topology, mdtraj.Topology):
        topology = mdtraj.Topology.from_openmm(topology)
    with open_run(storage) as stored:
        if not 0 <= state < stored.n_states:
            raise ValueError(f"{stored.path} has states 0 to {stored.n_states - 1}; asked for {state}")
        frames = stored.frames(topology.n_atoms)
        chosen = stored.states[frames.iterations] == state
        trajectory = mdtraj.Trajectory(
            frames.positions[chosen], topology, time=frames.iterations[np.nonzero(chosen)[0]]
        )
        if frames.box_vectors is not None and stored.is_periodic():
            trajectory.unitcell_vectors = frames.box_vectors[chosen]
    return trajectory


def read_exchange(storage: Any) -> ExchangeRecord:
    """A run whose thermodynamic states differ in temperature alone, for `openmm_tsf.multistate`.

    The first entry is iteration 1: iteration 0 holds what the run was created with.

    Args:
        storage: as in `acceptance`.

    Raises:
        ValueError: nothing has been run yet, states that differ in more than temperature or not at all, or as in
            `acceptance`.
    """
    with open_run(storage) as stored:
        if stored.last < 1:
            raise ValueError(f"{stored.path} has no iteration yet; run the sampler first")
        kelvin = stored.temperatures()
        order = np.argsort(kelvin, kind="stable")
        if len(np.unique(kelvin)) < len(kelvin):
            listed = ", ".join(f"{t:g}" for t in kelvin)
            raise ValueError(f"{stored.path} has states of the same temperature ({listed} K): it is no ladder")
        levels = np.argsort(order)[stored.states[1:]]
        swaps = [stored.array(name)[1:].sum(0)[np.ix_(order, order)] for name in ("proposed", "accepted")]
        frames = stored.frames(None)
        return ExchangeRecord(
            sampler="openmmtools",
            temperatures=kelvin[order],
            levels=levels,
            energies=_energies(stored, kelvin),
            swap_proposed=swaps[0].astype(np.int64),
            swap_accepted=swaps[1].astype(np.int64),
            move_counts=tuple(_total(stored.flow_moves(int(state))) for state in order),
            positions=frames.positions,
            position_iterations=frames.iterations - 1,
        )


def _rows(state: int, kelvin: float, moves: list[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    total = _total(moves)
    kinds = {kind for move in moves for kind in (STEPS if move["kind"] == "mixed" else (move["kind"],))}
    for kind in (kind for kind in STEPS if kind in kinds):
        proposed, accepted, nonfinite, off_chart = (
            total[f"{kind}_{what}"] for what in ("proposed", "accepted", "nonfinite", "off_chart")
        )
        yield {
            "state": state,
            "temperature": float(kelvin),
            "kind": kind,
            "proposed": proposed,
            "accepted": accepted,
            "share": accepted / proposed if proposed else float("nan"),
            "nonfinite": nonfinite,
            "off_chart": off_chart,
            "unrepresentable": total["unrepresentable"],
        }


def _total(moves: list[Mapping[str, Any]]) -> dict[str, int]:
    """Counts of several moves together, empty without moves."""
    return {name: sum(int(move["statistics"][name]) for move in moves) for name in COUNTS} if moves else {}


def _energies(stored: StoredRun, kelvin: np.ndarray) -> np.ndarray:
    """(I, R) raw energies [kJ/mol], the same in all states or an error."""
    reduced = stored.array("energies")[1:].astype(np.float64)
    known = stored.array("neighborhoods")[1:] == 1 if "neighborhoods" in stored.analysis.variables else reduced < np.inf
    energies = reduced * kT(kelvin)
    own = np.take_along_axis(energies, stored.states[1:, :, None], axis=2)
    with np.errstate(invalid="ignore"):
        off = np.where(known, np.abs(energies - own), 0.0)
        worst = np.nanmax(off - SAME_ENERGY[0] * np.abs(own))
    if worst > SAME_ENERGY[1]:
        raise ValueError(
            f"the states of {stored.path} differ in more than temperature: the energy of one configuration differs by "
            f"{np.nanmax(off):.3g} kJ/mol between them (pressure, or another Hamiltonian); analyse it with "
            "openmmtools.multistate.MultiStateSamplerAnalyzer"
        )
    return own[:, :, 0]
