"""Sequence alignments: FASTA in, states of sites out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

PROTEIN = "-ACDEFGHIKLMNPQRSTVWY"
"""A gap, and the twenty amino acids."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """Sequences of one length.

    Args:
        names: (M,) of the sequences.
        states: (M, L) places of their letters in the alphabet.
        alphabet: the letters.
    """

    names: tuple[str, ...] = field(repr=False)
    states: Int[Tensor, "..."] = field(repr=False)
    alphabet: str

    def __len__(self) -> int:
        return len(self.names)

    def weights(self, identity: float = 0.8) -> Float[Tensor, " sequences"]:
        """(M,) one over the number of sequences (itself among them) that share at least this part of their letters.

        Raises:
            ValueError: a part that is not between 0 and 1.
        """
        if not 0.0 < identity <= 1.0:
            raise ValueError(f"an identity lies between 0 and 1, not at {identity:g}")
        hot = torch.nn.functional.one_hot(self.states, len(self.alphabet)).flatten(1).float()
        least = identity * self.states.shape[1] - 1e-6
        return torch.cat([1.0 / (rows @ hot.T >= least).sum(1).double() for rows in hot.split(2000)])


def read_fasta(path: str | os.PathLike, *, alphabet: str = PROTEIN) -> Alignment:
    """Read an alignment.

    Small letters count as large ones, and `.` as the gap `-`.

    Args:
        path: FASTA; each sequence has a line that begins with > and one or more lines of letters.
        alphabet: the letters that may occur, in the order of their states.

    Raises:
        ValueError: not such a file, no sequences, sequences of different lengths, or letters beyond the alphabet.
        OSError: no such file.
    """
    names, sequences = _records(Path(path).read_text("utf-8"), os.fspath(path))
    lengths = Counter(map(len, sequences))
    usual = lengths.most_common(1)[0][0]
    if ragged := [name for name, letters in zip(names, sequences, strict=True) if len(letters) != usual]:
        raise ValueError(
            f"{path}: {len(ragged)} of {len(names)} sequences have another length than {usual}, first {ragged[0]!r}: "
            "not an alignment"
        )
    if usual < 2:
        raise ValueError(f"{path}: sequences of {usual} letters have no pairs of sites")
    return Alignment(tuple(names), letters_to_states(sequences, alphabet, names), alphabet)


def letters_to_states(
    sequences: Sequence[str], alphabet: str, names: Sequence[str] | None = None
) -> Int[Tensor, "sequences sites"]:
    """(M, L) places in the alphabet of the letters of sequences of one length.

    Raises:
        ValueError: a letter twice in the alphabet, or one in the sequences that it lacks.
    """
    place = {letter: k for k, letter in enumerate(alphabet)}
    if len(place) != len(alphabet) or len(alphabet) < 2:
        raise ValueError(f"an alphabet has at least 2 letters, each once, not {alphabet!r}")
    unknown = Counter("".join(sequences)) - Counter({letter: 10**12 for letter in alphabet})
    if unknown:
        row, where = next((k, i) for k, s in enumerate(sequences) for i, x in enumerate(s) if x not in place)
        name = names[row] if names else f"sequence {row + 1}"
        raise ValueError(
            f"{unknown.total()} letters are not in {alphabet!r}: {''.join(sorted(unknown))!r}, first "
            f"{sequences[row][where]!r} at site {where + 1} of {name!r}"
        )
    return torch.tensor([[place[letter] for letter in letters] for letters in sequences], dtype=torch.long)


def to_fasta(states: Int[Tensor, "sequences sites"], alphabet: str) -> str:
    """Sequences in FASTA, named by their number."""
    letters = ("".join(alphabet[k] for k in row) for row in states.tolist())
    return "".join(f">{number}\n{row}\n" for number, row in enumerate(letters, 1))


def _records(text: str, path: str) -> tuple[list[str], list[str]]:
    """Names and letters, as they stand in the file."""
    names: list[str] = []
    sequences: list[list[str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith(">"):
            names.append(line[1:].strip())
            sequences.append([])
        elif line.strip():
            if not names:
                raise ValueError(f"{path}, line {number}: letters before the first line that begins with >: not FASTA")
            sequences[-1].append("".join(line.split()).upper().replace(".", "-"))
    if not names:
        raise ValueError(f"{path}: no sequences")
    return names, ["".join(parts) for parts in sequences]
