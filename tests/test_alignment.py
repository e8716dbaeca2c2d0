"""Alignments: what is read, what is refused, and the example that ships."""

from pathlib import Path

import numpy as np
import pytest
import torch

import openmm_tsf
from openmm_tsf.tuning.alignment import PROTEIN, letters_to_states, read_fasta, to_fasta
from openmm_tsf.tuning.pairwise import PairwiseModel, gibbs, one_hot

DATA = Path(openmm_tsf.__file__).parent / "data"


def write(folder, text):
    path = folder / "a.fasta"
    path.write_text(text, "utf-8")
    return path


def test_reads_what_is_there(tmp_path):
    found = read_fasta(write(tmp_path, ">one some words\nAC-\nDE\n\n>two\nac.yw\n"))
    assert found.names == ("one some words", "two") and len(found) == 2
    assert found.states.tolist() == [[1, 2, 0, 3, 4], [1, 2, 0, 20, 19]]


def test_writes_what_it_reads(tmp_path):
    states = torch.tensor([[0, 1, 4], [2, 2, 3]])
    assert torch.equal(read_fasta(write(tmp_path, to_fasta(states, "-ABCD")), alphabet="-ABCD").states, states)


def test_weights_of_alike_sequences(tmp_path):
    found = read_fasta(write(tmp_path, ">a\nAAAAA\n>b\nAAAAC\n>c\nCCCCC\n"))
    assert found.weights(0.8).tolist() == [0.5, 0.5, 1.0]
    assert found.weights(1.0).tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="identity"):
        found.weights(0.0)


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "no sequences"),
        ("AC\n", "line 1: letters before the first line"),
        (">a\nACD\n>b\nAC\n>c\nACD\n", "1 of 3 sequences have another length than 3, first 'b'"),
        (">a\nACD\n>b\nAXJ\n", "2 letters are not in .*: 'JX', first 'X' at site 2 of 'b'"),
        (">a\n>b\n", "sequences of 0 letters"),
    ],
)
def test_bad_files(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_fasta(write(tmp_path, text))


def test_bad_alphabets():
    with pytest.raises(ValueError, match="each once"):
        letters_to_states(["AA"], "AAB")
    assert len(set(PROTEIN)) == 21


def test_the_shipped_alignment_is_of_the_shipped_model():
    """Given the other sites, the true model says how often each letter is to be seen; other couplings do not."""
    states = read_fasta(DATA / "potts_alignment.fasta", alphabet="-ACDE").states
    truth = np.load(DATA / "potts_truth.npz")
    model = PairwiseModel(torch.tensor(truth["fields"]), torch.tensor(truth["couplings"]))
    assert states.shape == (2000, 20)
    hot, worst = one_hot(states, 5), []
    apart = torch.block_diag(*[torch.ones(5, 5)] * 20) == 0.0
    for couplings in (model.couplings, -model.couplings):
        p = (model.fields.view(-1) + hot @ couplings.view(100, 100)).view(-1, 20, 5).softmax(2).flatten(1)
        pairs = hot.T @ (hot - p) / (hot.T @ (p * (1.0 - p))).sqrt()  # each pair of letters, the second given the rest
        worst.append(float(pairs[(hot.T @ p > 20.0) & apart].abs().max()))
    assert worst[0] < 6.0 < 10.0 < worst[1]
    energy = model(states).mean()
    moved = model(gibbs(model, states, 5, generator=torch.Generator().manual_seed(1))).mean()
    assert abs(float(moved - energy)) < 0.3  # the standard deviation is about 4
