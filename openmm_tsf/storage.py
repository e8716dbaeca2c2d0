"""Arrays in npz files, and states of training: written whole or not at all, read without executing anything."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

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


def write_state(path: str | os.PathLike, state: Mapping[str, Any]) -> None:
    """Write the state of a training: tensors and plain values by name, `identity` among them."""
    with whole(path) as temporary:
        torch.save(dict(state), temporary)


def read_state(path: str | os.PathLike) -> dict[str, Any]:
    """What `write_state` wrote.

    Raises:
        ValueError: the file is damaged, or something else.
    """
    try:
        state = torch.load(path, weights_only=True)
        if not isinstance(state, dict) or "identity" not in state:
            raise ValueError("it holds something else")
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a training checkpoint ({reason}); delete it to start again") from error
    return state
