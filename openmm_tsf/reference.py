"""Long reference simulations that ship with the package, to compare ensembles with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from .storage import read_npz

FOLDER = Path(__file__).parent / "data"
FILES = {"ala2": "ala2_ff96_reference.npz"}
PER_TEMPERATURE = (
    "alpha_left",
    "alpha_left_error",
    "mean_energy",
    "mean_energy_error",
    "energy_variance",
    "energy_variance_error",
    "n_effective",
    "ramachandran",
    "energy_edges",
    "energy_histogram",
)


class ReferenceState(NamedTuple):
    """The reference at one temperature [K]; shares with standard errors, energies in kJ/mol, histograms sum to 1."""

    temperature: float
    alpha_left: float
    alpha_left_error: float
    mean_energy: float
    mean_energy_error: float
    energy_variance: float
    energy_variance_error: float
    n_effective: float
    ramachandran: np.ndarray
    energy_edges: np.ndarray
    energy_histogram: np.ndarray


@dataclass(frozen=True)
class Reference:
    """A long simulation at several temperatures [K], with how it was made in `metadata`."""

    states: tuple[ReferenceState, ...]
    metadata: Mapping[str, Any]

    @property
    def temperatures(self) -> np.ndarray:
        """(K,) [K]."""
        return np.array([state.temperature for state in self.states])

    def at(self, temperature: float | int, tolerance: float = 0.5) -> ReferenceState | None:
        """The state at a temperature [K]; None where the reference has none within `tolerance` [K]."""
        nearest = min(self.states, key=lambda state: abs(state.temperature - temperature))
        return nearest if abs(nearest.temperature - temperature) <= tolerance else None


def load_reference(name: str = "ala2") -> Reference:
    """The reference of a name, "ala2" for alanine dipeptide in ff96 + OBC1 without constraints; or of a path to a file.

    Raises:
        ValueError: there is no reference of this name, or the file is none.
    """
    path = FOLDER / FILES[name] if name in FILES else Path(name)
    if not path.is_file():
        raise ValueError(f"no reference {name!r}; the package has {', '.join(FILES)}, or give the path of a file")
    arrays = read_npz(path, ["temperatures", "metadata", *PER_TEMPERATURE], "a reference file")
    rows = [
        ReferenceState(float(temperature), **{key: _row(arrays[key], index) for key in PER_TEMPERATURE})
        for index, temperature in enumerate(arrays["temperatures"])
    ]
    return Reference(tuple(rows), MappingProxyType(json.loads(str(arrays["metadata"]))))


def reference_for(molecule: Any) -> Reference | None:
    """The shipped reference of a Molecule, None where there is none (another force field, constrained bonds)."""
    known = molecule.name == "alanine-dipeptide-ff96-obc1" and not molecule.constraints
    return load_reference("ala2") if known and (FOLDER / FILES["ala2"]).is_file() else None


def _row(array: np.ndarray, index: int) -> float | np.ndarray:
    value = array[index]
    return float(value) if np.ndim(value) == 0 else np.asarray(value, dtype=np.float64)
