"""The synthetic alignment that ships: 20 sites, 5 letters, 2,000 sequences of a known Potts model.

    python benchmarks/potts_alignment.py --out openmm_tsf/data

writes potts_alignment.fasta and potts_truth.npz (fields (20, 5) and couplings (20, 5, 20, 5) of the letters -ACDE).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from openmm_tsf.files import whole, write_text
from openmm_tsf.tuning.alignment import to_fasta
from openmm_tsf.tuning.pairwise import PairwiseModel, temper_pairwise

SITES, ALPHABET, SEQUENCES, SEED = 20, "-ACDE", 2000, 7
CONTACTS, STRENGTH, FIELD = 12, 0.8, 0.4
"""Pairs of sites in contact beside neighbours along the chain, and the widths of couplings and of fields."""


def truth(generator: torch.Generator) -> PairwiseModel:
    """Random fields, and random couplings between neighbours and between CONTACTS other pairs."""
    letters = len(ALPHABET)
    i, j = torch.triu_indices(SITES, SITES, 2)
    chosen = torch.randperm(len(i), generator=generator)[:CONTACTS]
    first = torch.cat([torch.arange(SITES - 1), i[chosen]])
    second = torch.cat([torch.arange(1, SITES), j[chosen]])
    couplings = torch.zeros(SITES, letters, SITES, letters, dtype=torch.float64)
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        pair = STRENGTH * torch.randn(letters, letters, generator=generator, dtype=torch.float64)
        pair = pair - pair.mean(0) - pair.mean(1, keepdim=True) + pair.mean()
        couplings[a, :, b], couplings[b, :, a] = pair, pair.T
    fields = FIELD * torch.randn(SITES, letters, generator=generator, dtype=torch.float64)
    # as they are stored, so that the sequences are of the model that is read back
    return PairwiseModel(fields.float().double(), couplings.float().double())


def main() -> None:
    """Draw the model and the sequences, and write both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the files")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(SEED)
    model = truth(generator)
    drawn = temper_pairwise(model, SEQUENCES, n_replicas=500, equilibration=500, n_sweeps=50, generator=generator)
    rates = ", ".join(f"{rate:.2f}" for rate in drawn.swaps_accepted.tolist())
    print(f"{SEQUENCES} sequences, {len(drawn.states.unique(dim=0))} different; exchanges accepted: {rates}")
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "potts_alignment.fasta", to_fasta(drawn.states, ALPHABET))
    with whole(options.out / "potts_truth.npz") as path:
        np.savez_compressed(path, fields=model.fields.float().numpy(), couplings=model.couplings.float().numpy())


if __name__ == "__main__":
    main()
