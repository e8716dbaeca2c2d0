"""Potential energies of batches of configurations."""

from openmm_tsf.energy.batched import BatchedEnergy
from openmm_tsf.energy.engines import choose_energy
from openmm_tsf.energy.openmm import OpenMMEnergy

__all__ = ["BatchedEnergy", "OpenMMEnergy", "choose_energy"]
