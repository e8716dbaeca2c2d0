"""Flows in files: tensors as safetensors, everything else as JSON in the same file. Reading never executes code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .cuts import CutInternals
from .files import whole
from .flow import Flow, FlowSettings, assemble_flow
from .internals import FlatInternals
from .systems import Molecule
from .zmatrix import ZMatrix, ZRow

FORMAT = "openmm_tsf flow 1"
VERSIONED = ("openmm_tsf", "torch", "openmm", "mdtraj", "numpy")


class CheckpointError(ValueError):
    """A file that is not a whole, unaltered flow."""


def save_flow(flow: Flow, path: str | os.PathLike, *, extra: Mapping[str, Any] | None = None) -> str:
    """Write a flow to one file, whole or not at all.

    Args:
        flow: the flow; its molecule, z-matrix, temperature and architecture go along.
        path: by convention ends in .tsf.
        extra: JSON-safe facts to keep, such as figures of the training run.

    Returns:
        The content hash (SHA-256 of tensors and metadata).

    Raises:
        ValueError: a flow of a model system, which has no molecule.
        OSError: the folder cannot be written or is full.
    """
    if flow.molecule is None:
        raise ValueError("flows of model systems have no molecule and no file; keep their state_dict() instead")
    tensors = dict(flow.state_dict())
    facts = {
        **chemistry(flow.molecule, flow.zmatrix),
        "training_temperature": flow.training_temperature,
        "settings": asdict(flow.settings),
        "extra": dict(extra or {}),
    }
    return write_checkpoint(path, tensors, facts, FORMAT)


def load_flow(path: str | os.PathLike, *, dtype: torch.dtype = torch.float64) -> Flow:
    """Read a flow.

    Args:
        path: a file that `save_flow` wrote.
        dtype: of the flow; in double precision draws and densities agree to rounding.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: truncated, altered, or not a flow.
    """
    tensors, facts = read_checkpoint(path, FORMAT, "flow")
    try:
        molecule, zmatrix = chemistry_of(facts)
        settings = _settings(facts["settings"])
        internals = FlatInternals(molecule, zmatrix)
        with torch.random.fork_rng(devices=[]):
            flow = assemble_flow(
                CutInternals(internals) if settings.on_lines else internals, molecule, settings,
                facts["training_temperature"],
                *(_only(tensors, name) for name in (".mean", ".matrix")),
            )  # fmt: skip
        check_finite(tensors)
        flow.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())  # torch lists mismatches in lines
        raise CheckpointError(f"{path} holds a flow that this version cannot read: {reason}") from error
    return flow.to(dtype)


def flow_info(path: str | os.PathLike) -> dict[str, Any]:
    """What a checkpoint says of itself: format, molecule name, temperatures, settings, versions, extra, sha256.

    Raises:
        FileNotFoundError, CheckpointError: as in `load_flow`.
    """
    tensors, facts = read_checkpoint(path, FORMAT, "flow")
    digest, molecule = content_hash(tensors, facts), facts.pop("molecule")
    parameters = sum(t.numel() for name, t in tensors.items() if t.is_floating_point())
    return {"format": FORMAT, "molecule": molecule["name"], "n_numbers": parameters, "sha256": digest, **facts}


def pretrained(name: str = "ala2", *, dtype: torch.dtype = torch.float64) -> Flow:
    """A flow that ships with the package: "ala2", alanine dipeptide in ff96 + OBC1, unconstrained, trained at 600 K.

    Raises:
        ValueError: no flow of that name; the message lists those there are.
    """
    return load_flow(pretrained_path(name), dtype=dtype)


def flow_path(source: str | os.PathLike) -> Path:
    """The checkpoint that a path to it, a run directory or a pretrained name means.

    Raises:
        FileNotFoundError: what looks like a path is not there.
        ValueError: there is no pretrained flow of that name, or it is the run of another model.
    """
    path = Path(source)
    if not path.exists() and (path.suffix or len(path.parts) > 1):
        raise FileNotFoundError(f"no {'diffusion generator' if path.suffix == '.edg' else 'flow'} at {path}")
    if path.suffix == ".edg" or (path / "generator.edg").exists():
        raise ValueError(f"{source} is a diffusion generator, and a flow is needed here")
    return (path / "flow.tsf" if path.is_dir() else path) if path.exists() else pretrained_path(str(source))


def pretrained_path(name: str) -> Path:
    """Where the pretrained flow of that name is.

    Raises:
        ValueError: as in `pretrained`.
    """
    folder = Path(str(files(__package__) / "data"))
    there = sorted(path.stem for path in folder.glob("*.tsf"))
    if name not in there:
        raise ValueError(f"no pretrained flow {name!r}; there are: {', '.join(there) or 'none'}")
    return folder / f"{name}.tsf"


def chemistry(molecule: Molecule, zmatrix: ZMatrix) -> dict[str, Any]:
    """Molecule and z-matrix as facts of a file."""
    rows = [list(asdict(row).values()) for row in zmatrix.rows]
    return {"molecule": molecule.to_dict(), "root": zmatrix.root, "rows": rows}


def chemistry_of(facts: Mapping[str, Any]) -> tuple[Molecule, ZMatrix]:
    """What `chemistry` wrote."""
    molecule = Molecule.from_dict(facts["molecule"])
    rows = tuple(ZRow(*row) for row in facts["rows"])
    return molecule, ZMatrix(tuple(facts["root"]), rows, tuple(molecule.atom_labels))


def write_checkpoint(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], form: str
) -> str:  # fmt: skip
    """Write tensors, facts and versions to one file, whole or not at all.

    Args:
        path: of the file.
        tensors: by name.
        facts: JSON-safe.
        form: name and number of the format.

    Returns:
        The content hash.
    """
    compact = {name: _compact(tensor) for name, tensor in tensors.items()}
    versions = {name: _version(name) for name in VERSIONED}
    text = json.dumps({**facts, "versions": versions}, sort_keys=True, allow_nan=False)
    digest = _digest(compact, text)
    with whole(path) as temporary:
        save_file(compact, temporary, metadata={"format": form, "facts": text, "sha256": digest})
    return digest


def read_checkpoint(path: str | os.PathLike, form: str, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a checked file.

    Args:
        path: of the file.
        form: format that it should have.
        what: a file of this format holds.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: truncated, altered, or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {what} at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != form:
                found = header.get("format")
                raise CheckpointError(f"{path} is not an openmm_tsf {what} (format {found!r}, expected {form!r})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise CheckpointError(f"{path} is cut short or not a {what}: {error}") from error
    if _digest(tensors, header.get("facts", "")) != header.get("sha256"):
        raise CheckpointError(f"{path} was altered: its content does not match its hash; take a fresh copy")
    return tensors, json.loads(header["facts"])


def content_hash(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """The hash that `write_checkpoint` gave to what `read_checkpoint` has read."""
    return _digest(tensors, json.dumps(facts, sort_keys=True, allow_nan=False))


def _settings(stored: Mapping[str, Any]) -> FlowSettings:
    """The architecture that a file tells of; older files know fewer settings.

    Raises:
        ValueError, TypeError: settings that there are no more, or not yet.
    """
    known = {"quartic": False, "harmonics": 2, **stored}
    if not known.pop("volume_preserving", True):
        raise ValueError("couplings that change the volume are of kind real-nvp now; train the flow anew")
    return FlowSettings(**known)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError for numbers that are not finite: draws from such potentials would never end."""
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(f"{len(bad)} of its tensors are not finite ({', '.join(bad[:3])})")


def _compact(tensor: Tensor) -> Tensor:
    """Single precision where nothing is lost by it."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.float64 and torch.equal(tensor.float().double(), tensor):
        return tensor.float()
    return tensor


def _only(tensors: Mapping[str, Tensor], ending: str) -> Tensor:
    """The one tensor whose name ends so."""
    (found,) = (tensor for name, tensor in tensors.items() if name.endswith(ending))
    return found


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        from . import __version__

        return __version__
