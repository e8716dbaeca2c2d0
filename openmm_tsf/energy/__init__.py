"""Potential energies of batches of configurations."""

from openmm_tsf.energy.openmm import OpenMMEnergy

__all__ = ["OpenMMEnergy"]
