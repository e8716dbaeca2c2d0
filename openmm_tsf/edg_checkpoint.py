"""Generators in files, as flows are: tensors as safetensors, everything else as JSON. Reading never executes code.

A generator of vectors is kept without its target, which may be any function: the file has the energies of a few points,
and who gives a target on loading is told if it is another one. A generator of a molecule has its molecule along.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from .checkpoint import (
    CheckpointError,
    check_finite,
    chemistry,
    chemistry_of,
    content_hash,
    read_checkpoint,
    write_checkpoint,
)
from .edg import EDG, EDGSettings, Target, build_edg
from .edg.bound import check_target
from .edg.curvature import WithCurvature
from .edg.molecular import MolecularEDG
from .edg.molecule import MolecularTarget
from .edg.networks import check_dim
from .edg.recognition import Known
from .energy import BatchedEnergy, OpenMMEnergy
from .energy.unsupported import UnsupportedForce
from .internals import FlatInternals
from .systems import Molecule
from .typing import Energy, Scalars, Vectors

FORMAT = "openmm_tsf edg 2"
MOLECULAR_FORMAT = "openmm_tsf molecular edg 2"


def save_edg(edg: EDG, path: str | os.PathLike, *, target: Target, extra: Mapping[str, Any] | None = None) -> str:
    """Write a generator to one file, whole or not at all.

    Args:
        edg: made by `build_edg`.
        path: by convention ends in .edg.
        target: what it was trained for, to be recognised on loading.
        extra: JSON-safe facts to keep.

    Returns:
        The content hash (SHA-256 of tensors and metadata).

    Raises:
        ValueError: a generator put together by hand, or a target of another dimension, or one that is finite nowhere.
        OSError: the folder cannot be written or is full.
    """
    settings = _settings_of(edg)
    check_target(edg, target)
    known = Known.of(target, edg)
    if not known.tells:
        raise ValueError(
            f"the target is finite at none of {len(known.points)} draws of the generator, so no file could tell it "
            "from others: was the generator trained for it?"
        )
    tensors = {**_weights(edg), "points": known.points, "energies": known.energies}
    facts = {"settings": asdict(settings), "dim": edg.dim, "temperatures": edg.temperatures, "extra": dict(extra or {})}
    return write_checkpoint(path, tensors, facts, FORMAT)


def load_edg(path: str | os.PathLike, target: Target | None = None) -> EDG:
    """Read a generator of vectors.

    Args:
        path: a file that `save_edg` wrote.
        target: what it was trained for; needed unless the decoder is a network, and checked where it is given.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: truncated, altered, or not such a generator.
        ValueError: no target for a decoder that is no network, or another one than that of the training.
    """
    tensors, facts = read_checkpoint(path, FORMAT, "generator of vectors")
    try:
        settings, dim, known = _settings(facts), int(facts["dim"]), facts.get("temperatures")
        temperatures = None if known is None else tuple(map(float, known))
        target_then = Known(tensors.pop("points").double(), tensors.pop("energies").double())
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds a generator that this version cannot read: {error}") from error
    if target is None:
        if settings.decoder != "gaussian":
            raise ValueError(f"{path} has a decoder ({settings.decoder}) that is made for its target: give it")
        target = _Unknown(dim)
    else:
        _check_same(path, target, dim, target_then)
    edg = _built(path, target, settings, tensors)
    edg.temperatures = temperatures
    return edg


def save_molecular_edg(
    generator: MolecularEDG, path: str | os.PathLike, *, extra: Mapping[str, Any] | None = None
) -> str:  # fmt: skip
    """Write a generator of a molecule, with the molecule and its coordinates, to one file; see `save_edg`.

    Raises:
        ValueError, OSError: as in `save_edg`.
    """
    target = generator.target
    tensors = {**_weights(generator.edg), "centre": target.centre, "root": target.root}
    facts = {
        **chemistry(generator.molecule, generator.zmatrix),
        "settings": asdict(_settings_of(generator.edg)),
        "training_temperature": generator.training_temperature,
        "temperatures": list(generator.temperatures),
        "extra": dict(extra or {}),
    }
    return write_checkpoint(path, tensors, facts, MOLECULAR_FORMAT)


def load_molecular_edg(path: str | os.PathLike, *, energy: Energy | None = None) -> MolecularEDG:
    """Read a generator of a molecule.

    Args:
        path: a file that `save_molecular_edg` wrote.
        energy: U [kJ/mol] of positions [nm] for the dynamics of a Hamiltonian decoder; by default the molecule's own,
            in batches where the force field allows.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: truncated, altered, or not such a generator.
    """
    tensors, facts = read_checkpoint(path, MOLECULAR_FORMAT, "generator of a molecule")
    try:
        molecule, zmatrix = chemistry_of(facts)
        settings = _settings(facts)
        coordinates = tensors.pop("centre"), tensors.pop("root")
        needed = energy or decoder_energy(molecule, settings)
        target = MolecularTarget(
            FlatInternals(molecule, zmatrix), needed, facts["training_temperature"], *coordinates, walled=True
        )
        edg = _built(path, target, settings, tensors)
        return MolecularEDG(edg, target, molecule, tuple(facts["temperatures"]))
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} holds a generator that this version cannot read: {reason}") from error


def molecular_edg_info(path: str | os.PathLike) -> dict[str, Any]:
    """What a file of `save_molecular_edg` says of itself: format, molecule's name, temperatures, settings, versions.

    Raises:
        FileNotFoundError, CheckpointError: as in `load_molecular_edg`.
    """
    tensors, facts = read_checkpoint(path, MOLECULAR_FORMAT, "generator of a molecule")
    numbers = sum(t.numel() for name, t in tensors.items() if name.startswith(_PREFIX))
    own = {"molecule": facts["molecule"]["name"], "n_numbers": numbers, "sha256": content_hash(tensors, facts)}
    return {"format": MOLECULAR_FORMAT, **facts, **own}


def decoder_energy(molecule: Molecule, settings: EDGSettings) -> Energy:
    """An energy that a decoder can take the gradients of that it needs, if it needs any."""
    try:
        return BatchedEnergy(molecule.system)
    except UnsupportedForce:
        slow = OpenMMEnergy(molecule.system)
        return WithCurvature(slow) if settings.decoder == "hamiltonian" else slow


_PREFIX = "edg."


@dataclass(frozen=True)
class _Unknown:
    """Stands for a target that nobody asks for its energy."""

    dim: int

    def __call__(self, x: Vectors) -> Scalars:
        raise RuntimeError("this generator was loaded without its target")


def _settings(facts: Mapping[str, Any]) -> EDGSettings:
    """The architecture that a file tells of; JSON has lists for tuples."""
    stored = facts["settings"].items()
    return EDGSettings(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored})


def _settings_of(edg: EDG) -> EDGSettings:
    if edg.settings is None:
        raise ValueError("this generator was put together by hand; only those of build_edg know their settings")
    return edg.settings


def _weights(edg: EDG) -> dict[str, Tensor]:
    return {_PREFIX + name: tensor for name, tensor in edg.state_dict().items()}


def _built(path: str | os.PathLike, target: Target, settings: EDGSettings, tensors: Mapping[str, Tensor]) -> EDG:
    try:
        check_finite(tensors)
        edg = build_edg(target, settings)
        edg.load_state_dict({name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()})
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())  # torch lists mismatches in lines
        raise CheckpointError(f"{path} holds a generator that this version cannot read: {reason}") from error
    return edg


def _check_same(path: str | os.PathLike, target: Target, dim: int, then: Known) -> None:
    """Raises ValueError for a target that is not that of the file."""
    check_dim(target)
    if target.dim != dim:
        raise ValueError(f"the target has {target.dim} dimensions, the generator in {path} {dim}")
    if (difference := then.difference(target)) is not None:
        raise ValueError(f"the generator in {path} was trained for another target: {difference}")
