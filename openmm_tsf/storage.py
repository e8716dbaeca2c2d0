"""Arrays in npz files: written whole or not at all, read without executing anything."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterable

import numpy as np

from .files import whole


def write_npz(path: str | os.PathLike, **arrays: np.ndarray) -> None:
    """Write arrays by name.

    Raises:
        OSError: the folder cannot be written or is full; what was at `path` before is then still there.
    """
    with whole(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def read_npz(path: str | os.PathLike, required: Iterable[str], what: str) -> dict[str, np.ndarray]:
    """All arrays of a file.

    Args:
        path: of the file.
        required: names that must be among them.
        what: a file of this kind should be, for the error.

    Raises:
        ValueError: the file is no npz, is cut short or damaged, or lacks a required array.
        OSError: it cannot be opened.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not {what}, or it is cut short or damaged") from error
    missing = sorted(set(required) - set(arrays))
    if missing:
        raise ValueError(f"{path} is not {what}: it has no {', '.join(missing)}")
    return arrays
