"""A DCD file that grows while a simulation runs, and can be cut back to what is known to be good.

Header as OpenMM's DCDFile writes it; frames are written many at a time, which DCDFile does not do.
"""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import numpy as np
from openmm import app

BOX_FLAG = slice(48, 52)
MADE_WHEN = slice(180, 260)
COUNTERS = slice(8, 24)


class GrowingDcd:
    """A DCD file without box, open for appending; nobody else can open it so at the same time.

    Args:
        path: of the file; made if `n_frames` is 0, and there otherwise.
        topology: of the molecule.
        timestep_ps: of the dynamics.
        interval: steps between frames.
        n_frames: frames to keep; what is behind them in the file, whole or in part, is cut off.

    Raises:
        ValueError: the file does not hold `n_frames` frames of this molecule, or it is in use.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path, topology: app.Topology, timestep_ps: float, interval: int, n_frames: int) -> None:
        self.path = path
        self.n_atoms = topology.getNumAtoms()
        self._interval = interval
        self._header = _header(topology, timestep_ps, interval)
        flags = os.O_RDWR | getattr(os, "O_BINARY", 0) | (0 if n_frames else os.O_CREAT)
        # Unbuffered: a full disk is noticed at once, and nothing is left to write when the file closes.
        self._file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
        try:
            _lock(self._file, path)
            self._cut(n_frames)
        except BaseException:
            self._file.close()
            raise

    def append(self, positions: np.ndarray) -> None:
        """Append frames (n, A, 3) [nm]; when this returns they are on the disk."""
        record = [("head", "<i4"), ("data", "<f4", (self.n_atoms,)), ("tail", "<i4")]
        frames = np.empty((len(positions), 3), dtype=record)
        frames["head"] = frames["tail"] = 4 * self.n_atoms
        frames["data"] = (10.0 * positions).transpose(0, 2, 1)
        self._file.seek(0, io.SEEK_END)
        self._write(frames.tobytes())
        self.n_frames += len(positions)
        self._count()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _cut(self, n_frames: int) -> None:
        if n_frames == 0:
            self._file.truncate(0)
            self._write(self._header)
        else:
            size = len(self._header) + n_frames * 3 * (4 * self.n_atoms + 8)
            start = self._file.read(len(self._header))
            found = self._file.seek(0, io.SEEK_END)
            if _without_counters(start) != _without_counters(self._header) or found < size:
                raise ValueError(
                    f"{self.path} is not the file that was written here: {n_frames} frames of {self.n_atoms} atoms "
                    f"take {size} bytes, it has {found}; remove the folder to begin anew"
                )
            self._file.truncate(size)
        self.n_frames = n_frames
        self._count()

    def _count(self) -> None:
        last_step = min((max(self.n_frames, 1) - 1) * self._interval, 2**31 - 1)
        self._file.seek(COUNTERS.start)
        self._write(struct.pack("<4i", self.n_frames, 0, self._interval, last_step))
        os.fsync(self._file.fileno())

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def _header(topology: app.Topology, timestep_ps: float, interval: int) -> bytes:
    buffer = io.BytesIO()
    app.DCDFile(buffer, topology, timestep_ps, interval=interval)
    header = bytearray(buffer.getvalue())
    header[BOX_FLAG] = bytes(4)  # a topology may have a box that the forces do not use
    header[MADE_WHEN] = b"Frames of openmm_tsf".ljust(80, b"\0")  # the same run gives the same bytes at any time
    return bytes(header)


def _without_counters(header: bytes) -> bytes:
    return header[: COUNTERS.start] + header[COUNTERS.stop :]


def _lock(file: io.FileIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"{path} is being written by another process; wait for it, or choose another folder"
        ) from error
