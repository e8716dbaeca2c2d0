"""Frames to train on: positions with the temperature they were sampled at, from files or simulations."""

from __future__ import annotations

import ctypes
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openmm_tsf.systems import Molecule
from openmm_tsf.units import to_kelvin

if TYPE_CHECKING:
    import mdtraj

HAVE_TOPOLOGY = {".pdb", ".pdb.gz", ".pdbx", ".cif", ".h5", ".hdf5", ".lh5", ".gro", ".mol2", ".hoomdxml"}
"""Files that say which atoms they hold; the others are read with the topology of the molecule."""
SHORTEST, LONGEST = 0.7, 1.35
"""Where the median of a bond over the frames lies, in multiples of the reference length, if the atoms are right."""
BROKEN = 2.0
"""A bond this many times as long as the reference is none: the molecule lies across a periodic box, or exploded."""


@dataclass(frozen=True, eq=False)
class Frames:
    """Positions sampled from Boltzmann distributions, each with its temperature; arrays are read-only.

    Rows are time-major: row = time * n_walkers + walker.

    Args:
        positions: (N, A, 3) [nm], kept as float32.
        temperatures: (N,) [K].
        n_walkers: number of trajectories side by side.

    Raises:
        ValueError: shapes that do not fit, no frames, N no multiple of n_walkers, a temperature that is not above 0 K,
            or positions that are not finite.
    """

    positions: np.ndarray = field(repr=False)
    temperatures: np.ndarray = field(repr=False)
    n_walkers: int = 1

    def __post_init__(self) -> None:
        positions = np.array(self.positions, dtype=np.float32, order="C")
        temperatures = np.array(self.temperatures, dtype=np.float64)
        if positions.ndim != 3 or positions.shape[2] != 3 or temperatures.shape != positions.shape[:1]:
            raise ValueError(
                f"positions have shape {positions.shape}, temperatures {temperatures.shape}; expected (N, A, 3), (N,)"
            )
        if len(positions) == 0 or self.n_walkers < 1 or len(positions) % self.n_walkers:
            raise ValueError(f"{len(positions)} frames are no positive multiple of n_walkers={self.n_walkers}")
        if not (np.isfinite(temperatures) & (temperatures > 0.0)).all():
            raise ValueError(f"temperatures must be finite and above 0 K; the lowest is {temperatures.min():g} K")
        _check_finite(positions)
        for name, array in (("positions", positions), ("temperatures", temperatures)):
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def n_atoms(self) -> int:
        """Number of atoms A."""
        return self.positions.shape[1]

    @property
    def n_times(self) -> int:
        """Number of time rows, each with one frame of every walker."""
        return len(self) // self.n_walkers

    def split(self, holdout: float) -> tuple[Frames, Frames]:
        """The early frames, and the last `holdout` (a fraction between 0 and 1) of all times of every walker.

        Raises:
            ValueError: one of the two parts would be empty.
        """
        cut = (self.n_times - round(self.n_times * holdout)) * self.n_walkers
        if not 0 < cut < len(self):
            raise ValueError(f"cannot hold out a fraction {holdout:g} of {self.n_times} times: one part would be empty")
        return self._rows(slice(None, cut), self.n_walkers), self._rows(slice(cut, None), self.n_walkers)

    def at_temperature(self, temperature: Any) -> Frames:
        """The frames sampled at one temperature [K].

        Raises:
            ValueError: there are none; the message says which temperatures there are.
        """
        kelvin = to_kelvin(temperature)
        chosen = np.isclose(self.temperatures, kelvin, rtol=1e-6, atol=0.0)
        if not chosen.any():
            known = ", ".join(f"{t:g}" for t in np.unique(self.temperatures))
            raise ValueError(f"no frames at {kelvin:g} K; there are frames at {known} K")
        by_time = chosen.reshape(-1, self.n_walkers)
        whole_walkers = (by_time == by_time[0]).all()
        return self._rows(chosen, int(by_time[0].sum()) if whole_walkers else 1)

    def _rows(self, rows: Any, n_walkers: int) -> Frames:
        return Frames(self.positions[rows], self.temperatures[rows], n_walkers)


def join_frames(parts: Sequence[Frames]) -> Frames:
    """Several sets of frames, say at several temperatures, as walkers side by side.

    Raises:
        ValueError: no parts, different numbers of atoms, or different numbers of times.
    """
    sizes = {(part.n_atoms, part.n_times) for part in parts}
    if len(sizes) != 1:
        shown = ", ".join(f"{n_atoms} atoms x {n_times} times" for n_atoms, n_times in sorted(sizes)) or "nothing"
        raise ValueError(f"frames to join must have the same number of atoms and of times; got {shown}")
    n_atoms, n_times = sizes.pop()
    positions = [part.positions.reshape(n_times, part.n_walkers, n_atoms, 3) for part in parts]
    temperatures = [part.temperatures.reshape(n_times, part.n_walkers) for part in parts]
    n_walkers = sum(part.n_walkers for part in parts)
    return Frames(
        np.concatenate(positions, axis=1).reshape(-1, n_atoms, 3),
        np.concatenate(temperatures, axis=1).ravel(),
        n_walkers,
    )


def load_frames(path: Any, molecule: Molecule, temperature: Any, *, n_walkers: int = 1, stride: int = 1) -> Frames:
    """Frames of a trajectory, checked against the molecule.

    Args:
        path: a file that mdtraj reads (DCD, XTC, TRR, NetCDF, HDF5, PDB, ...), or an `mdtraj.Trajectory`.
        molecule: what the frames show. Atoms must come in its order; a file with names of its own is held to it, one
            without (DCD, XTC, ...) by its bond lengths.
        temperature: at which the trajectory was sampled [K].
        n_walkers: number of trajectories that the file interleaves (time-major).
        stride: keep every stride-th time.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, another number or order of atoms, coordinates in a wrong unit, frames
            that are not finite, or bad options.
    """
    kelvin = to_kelvin(temperature)
    if stride < 1 or n_walkers < 1:
        raise ValueError(f"stride and n_walkers must be at least 1, not {stride} and {n_walkers}")
    trajectory, name, has_topology = _read(path, molecule)
    try:
        if has_topology:
            _check_atoms(trajectory.topology, molecule)
        positions = trajectory.xyz
        _check_finite(positions)
        _check_geometry(positions, molecule)
        if len(positions) % n_walkers:
            raise ValueError(f"{len(positions)} frames are no multiple of n_walkers={n_walkers}")
        positions = positions.reshape(-1, n_walkers, molecule.n_atoms, 3)[::stride].reshape(-1, molecule.n_atoms, 3)
        return Frames(positions, np.full(len(positions), kelvin), n_walkers)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _read(path: Any, molecule: Molecule) -> tuple[mdtraj.Trajectory, str, bool]:
    """The trajectory, its name for messages, and whether its topology is its own."""
    import mdtraj

    if isinstance(path, mdtraj.Trajectory):
        return path, "trajectory", True
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    has_topology = any(file.name.lower().endswith(suffix) for suffix in HAVE_TOPOLOGY)
    # Names as they stand in the file: mdtraj would turn those of PDB files into its own.
    options = {"standard_names": False} if ".pdb" in file.name.lower() else {}
    if not has_topology:
        options["top"] = molecule.mdtraj_topology
    try:
        with _hushed():
            return mdtraj.load(str(file), **options), file.name, has_topology
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{file.name} cannot be read as a trajectory of {molecule.n_atoms} atoms: {reason}") from error


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep what C code prints off the standard output: mdtraj announces every DCD file there."""
    try:
        sys.stdout.flush()
        flush = ctypes.CDLL(None).fflush
        kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    except (OSError, TypeError, AttributeError):  # Windows, or no standard output
        yield
        return
    flush(None)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _check_finite(positions: np.ndarray) -> None:
    bad = ~np.isfinite(positions).all(axis=(1, 2))
    if bad.any():
        raise ValueError(
            f"{bad.sum()} of {len(bad)} frames have coordinates that are not finite, first frame {bad.argmax()}"
        )


def _check_atoms(topology: mdtraj.Topology, molecule: Molecule) -> None:
    """Same number of atoms, same elements, same names in the same order.

    Conventions for names differ, so other names are no error as long as elements agree; the same names in another
    order are.
    """
    expected = molecule.mdtraj_topology
    if topology.n_atoms != expected.n_atoms:
        raise ValueError(
            f"{topology.n_atoms} atoms, but the molecule has {expected.n_atoms}; cut it out with mdtraj's atom_slice"
        )
    pairs = list(zip(topology.atoms, expected.atoms, strict=True))
    same_names = Counter(a.name for a, _ in pairs) == Counter(b.name for _, b in pairs)
    wrong = [
        index
        for index, (a, b) in enumerate(pairs)
        if (a.element and b.element and a.element.symbol != b.element.symbol) or (same_names and a.name != b.name)
    ]
    if wrong:
        there, here = pairs[wrong[0]]
        raise ValueError(
            f"atoms in another order than the molecule's: {len(wrong)} of {len(pairs)} differ, first atom {wrong[0]} "
            f"({there} in the file, {here} in the molecule); reorder with mdtraj's atom_slice"
        )


def _check_geometry(positions: np.ndarray, molecule: Molecule) -> None:
    """Bond lengths show wrong units, wrong atom order and molecules broken across a periodic box."""
    if positions.shape[1] != molecule.n_atoms:
        raise ValueError(f"{positions.shape[1]} atoms, but the molecule has {molecule.n_atoms}")
    if not len(positions) or not molecule.bonds:
        return
    pieces = np.split(positions, range(10_000, len(positions), 10_000))  # in pieces, to spare memory
    lengths = np.concatenate([bond_lengths(piece, molecule) for piece in pieces])
    reference = bond_lengths(molecule.positions[None], molecule)[0]
    medians = np.median(lengths, axis=0)
    ratios = medians / reference
    typical = float(np.median(ratios))
    for factor, unit in ((10.0, "angstrom"), (0.1, "nanometres that were scaled as if angstrom")):
        if 0.7 < typical / factor < 1.4:
            raise ValueError(
                f"bonds are {typical:.3g} times as long as the molecule's: looks like {unit}; divide by {factor:g}"
            )
    wrong = np.flatnonzero((ratios > LONGEST) | (ratios < SHORTEST))
    if len(wrong):
        worst = wrong[np.abs(np.log(np.maximum(ratios[wrong], 1e-9))).argmax()]
        raise ValueError(
            f"{len(wrong)} of {len(ratios)} bonds have a wrong length, e.g. {_bond_name(molecule, int(worst))} is "
            f"{medians[worst]:.3f} nm, {ratios[worst]:.3g} times the molecule's; wrong atom order, or another molecule?"
        )
    broken = lengths > BROKEN * reference
    if broken.any():
        frames = broken.any(axis=1)
        first = frames.argmax()
        raise ValueError(
            f"{frames.sum()} of {len(frames)} frames have broken bonds, first frame {first} "
            f"({_bond_name(molecule, int(broken[first].argmax()))}); broken across a periodic box, or exploded?"
        )


def bond_lengths(positions: np.ndarray, molecule: Molecule) -> np.ndarray:
    """Lengths (N, bonds) [nm] of the molecule's bonds in positions (N, A, 3) [nm]."""
    i, j = np.array(molecule.bonds).T
    return np.linalg.norm(positions[:, i] - positions[:, j], axis=-1)


def _bond_name(molecule: Molecule, bond: int) -> str:
    return " to ".join(molecule.atom_labels[atom] for atom in molecule.bonds[bond])
